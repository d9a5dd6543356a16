"""SDI against the closed form of DDIM on a Gaussian, in double precision."""

import math

import pytest
import torch
from mixtures import SHAPE, WIDTH, Affine, Modes, draw_at, exact, normal, seeded

from splatedit.diffusion import guided, repeat, scaled_linear
from splatedit.errors import InputError
from splatedit.guidance import sdi
from splatedit.inversion import invert

pytestmark = pytest.mark.usefixtures("one_thread")
ABAR = scaled_linear()


def test_inversion_of_a_gaussian_is_the_product_of_its_steps():
    """Each step scales the distance from the centre: ehat = k (x - a m) with k = s / (a^2 v + s^2)."""
    affine, z = Affine(), normal(1, *SHAPE, seed=5)
    noise = invert(affine.mixture, z, torch.tensor([450]), affine.target, ABAR, seeded(), steps=10)
    offset, centre = z - ABAR[0].sqrt() * affine.target_mean, affine.target_mean
    for now, then in ((0, 100), (100, 200), (200, 300), (300, 400), (400, 450)):
        (a, s), (a2, s2) = ((ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()) for t in (now, then))
        k = s / (a**2 * WIDTH + s**2)
        offset = offset * (a2 * (1 - s * k) / a + s2 * k)
    x = ABAR[450].sqrt() * centre + offset
    exact(noise, (x - ABAR[450].sqrt() * z) / (1 - ABAR[450]).sqrt(), atol=1e-11)


def test_inversion_follows_the_flow_of_probability():
    """Between noise levels a Gaussian's deviations grow like its own: sqrt(a^2 v + s^2)."""
    affine, z, t = Affine(), normal(1, *SHAPE, seed=5), 700
    wide = [(a * WIDTH + 1 - a).sqrt() for a in (ABAR[0], ABAR[t])]
    x = ABAR[t].sqrt() * affine.target_mean + wide[1] / wide[0] * (z - ABAR[0].sqrt() * affine.target_mean)
    expected = (x - ABAR[t].sqrt() * z) / (1 - ABAR[t]).sqrt()
    misses = []
    for steps in (10, 100, 1000):
        noise = invert(affine.mixture, z, torch.tensor([t]), affine.target, ABAR, seeded(), steps)
        misses.append(float((noise - expected).norm() / expected.norm()))
    assert misses[0] > 5 * misses[1] > 25 * misses[2] and misses[2] < 0.01


def test_the_gradient_is_the_gap_to_the_posterior_mean():
    modes, z = Modes(), normal(2, *SHAPE, seed=5)
    draw, request = draw_at([250, 850], normal(2, *SHAPE, seed=6)), modes.request(z)
    grad = sdi(modes.denoise, z, draw, request, alphas_cumprod=ABAR, generator=seeded(), eta=0)
    inverse = guided(modes.mixture, modes.null, -modes.denoise.scale)
    noise = invert(inverse, z, draw.t, request.target, ABAR, seeded())
    x = draw._replace(noise=noise).noised(z)
    zhat = (x - draw.s * modes.denoise(x, draw.t, request.target)) / draw.a
    exact(grad, z - zhat, atol=1e-9)
    other = draw._replace(noise=normal(2, *SHAPE, seed=9))
    exact(sdi(modes.denoise, z, other, request, alphas_cumprod=ABAR, generator=seeded(), eta=0), grad)


def test_where_guidance_is_off_it_is_off_in_the_inversion():
    modes, z = Modes(), normal(1, *SHAPE, seed=5)
    plain, request = modes.denoise._replace(scale=1.0), modes.request(z)
    draw = draw_at([500], normal(1, *SHAPE, seed=6))
    found, stated, other = (
        sdi(plain, z, draw, request, alphas_cumprod=ABAR, generator=seeded(), eta=0, scale=scale)
        for scale in (None, 1.0, -1.0)
    )
    exact(found, stated, atol=0)
    assert (found - other).norm() > 1e-3


def test_every_row_climbs_as_far_as_its_own_step():
    modes, z, counts = Modes(), normal(4, *SHAPE, seed=5), []

    def counting(x, t, text):
        assert len(x) == len(t) == len(text.embeds)
        counts.append(sorted(t.tolist()))
        return modes.mixture(x, t, text)

    t, text = torch.tensor([0, 50, 250, 999]), repeat(modes.target, 4)
    together = invert(counting, z, t, text, ABAR, seeded())
    assert counts[:4] == [[0, 0, 0], [100, 100], [200, 200], [300]] and len(counts) == 10
    exact(together[0], torch.zeros(SHAPE, dtype=z.dtype))
    for row in range(4):
        one = slice(row, row + 1)
        exact(together[one], invert(modes.mixture, z[one], t[one], modes.target, ABAR, seeded()))


def test_fresh_noise_has_ddim_s_deviation_and_comes_from_the_generator():
    affine = Affine()
    count, t = 4000, 100
    z = normal(1, *SHAPE, seed=5).expand(count, *SHAPE)
    text = repeat(affine.target, count)
    still, moved, again = (
        invert(affine.mixture, z, torch.full((count,), t), text, ABAR, seeded(3), steps=10, eta=eta)
        for eta in (0.0, 0.5, 0.5)
    )
    assert torch.equal(moved, again)
    (a, s), (a2, s2) = ((ABAR[k].sqrt(), (1 - ABAR[k]).sqrt()) for k in (0, t))
    deviation = 0.5 * s / s2 * (1 - (a2 / a) ** 2).sqrt() / s2
    size = count * math.prod(SHAPE)
    found = (moved - still).square().mean().sqrt()
    assert float(found) == pytest.approx(float(deviation), rel=4 / math.sqrt(2 * size))


def test_too_few_steps_are_an_error():
    modes, z = Modes(), normal(1, *SHAPE)
    with pytest.raises(InputError, match="steps: found 0, expected from 1 to 1000"):
        invert(modes.mixture, z, torch.tensor([500]), modes.target, ABAR, seeded(), steps=0)
