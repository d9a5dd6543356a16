"""PDS and DreamCatalyst against their definitions, in double precision."""

import math

import pytest
import torch
from mixtures import SCALE, SHAPE, WIDTH, Affine, Modes, draw_at, exact, normal

from splatedit.diffusion import pick, repeat, scaled_linear
from splatedit.errors import InputError
from splatedit.guidance import GUIDANCE, dds, dreamcatalyst, pds
from splatedit.posterior import pds_weights

pytestmark = pytest.mark.usefixtures("one_thread")
ABAR = scaled_linear()


@pytest.mark.parametrize(
    ("t", "psi2", "chi2", "psi4", "psi10"),
    [
        (21, 1.613322, 0.231696, 5.0913, 18.591),
        (101, 0.314320, 0.115470, 0.95144, 2.9357),
        (301, 0.079400, 0.083821, 0.23906, 0.72498),
        (501, 0.032107, 0.082135, 0.09661, 0.29245),
        (701, 0.014451, 0.090018, 0.04348, 0.13163),
        (901, 0.006195, 0.103461, 0.01866, 0.05662),
        (979, 0.004206, 0.109538, 0.01267, 0.03854),
    ],
)
def test_weights_are_those_of_the_official_code(t, psi2, chi2, psi4, psi10):
    psi, chi = pds_weights(ABAR, 2)
    assert float(psi[t]) == pytest.approx(psi2, abs=1e-6) and float(chi[t]) == pytest.approx(chi2, abs=1e-6)
    assert float(pds_weights(ABAR, 4)[0][t]) == pytest.approx(psi4, rel=3e-5, abs=5e-6)  # as printed
    assert float(pds_weights(ABAR, 10)[0][t]) == pytest.approx(psi10, rel=3e-5, abs=5e-6)


def test_stride_one_holds_nothing():
    for table in (ABAR, ABAR.float()):  # as a prior has it
        psi, chi = pds_weights(table, 1)
        assert psi.abs().max() < 1e-12 and chi.min() > 0


def test_weights_are_finite_at_both_ends_of_any_schedule():
    ended = ABAR.clone()
    ended[-1] = 0  # zero terminal SNR
    for stride in (1, 2, 10):
        for weights in pds_weights(ended, stride):
            assert weights.shape == (1000,) and weights.isfinite().all()
            assert torch.equal(weights[:stride], weights[stride].expand(stride))


def definition(z, request, modes, draw, stride, other):
    """The stochastic latents' difference, written out: posterior of step t - stride, whose noise `other` both share."""
    zetas = []
    for clean, text in ((z, request.target), (request.z_source, request.source)):
        rows = []
        for i, t in enumerate(draw.t.tolist()):
            now, then, one = ABAR[t], ABAR[t - stride], ABAR[t] / ABAR[t - 1]
            x = now.sqrt() * clean[i] + (1 - now).sqrt() * draw.noise[i]
            ehat = modes.denoise(x[None], draw.t[i : i + 1], pick(text, torch.tensor([i])))
            zhat = (x - (1 - now).sqrt() * ehat[0]) / now.sqrt()
            mean = then.sqrt() * (1 - one) / (1 - now) * zhat + one.sqrt() * (1 - then) / (1 - now) * x
            earlier = then.sqrt() * clean[i] + (1 - then).sqrt() * other[i]
            rows.append((earlier - mean) / ((1 - then) / (1 - now) * (1 - one)).sqrt())
        zetas.append(torch.stack(rows))
    return zetas[0] - zetas[1]


@pytest.mark.parametrize("stride", [1, 2, 10])
def test_pds_is_the_difference_of_stochastic_latents_whatever_their_noise(stride):
    modes = Modes()
    z, z_source = normal(3, *SHAPE, seed=5), normal(3, *SHAPE, seed=6)
    draw, request = draw_at([21, 301, 901], normal(3, *SHAPE, seed=7)), modes.request(z_source)
    grad = pds(modes.denoise, z, draw, request, alphas_cumprod=ABAR, stride=stride)
    for seed in range(2):
        exact(grad, definition(z, request, modes, draw, stride, normal(3, *SHAPE, seed=20 + seed)), atol=1e-9)


def test_stride_one_is_dds_weighed_by_chi():
    modes = Modes()
    z, draw = normal(2, *SHAPE, seed=5), draw_at([100, 800], normal(2, *SHAPE, seed=7))
    request = modes.request(normal(2, *SHAPE, seed=6))
    chi = pds_weights(ABAR, 1)[1][draw.t].view(-1, 1, 1, 1)
    exact(
        pds(modes.denoise, z, draw, request, alphas_cumprod=ABAR, stride=1), chi * dds(modes.denoise, z, draw, request)
    )


def test_pds_comes_to_rest_short_of_dds():
    """For affine scores the edit ends at w dm chi k a / (psi + chi k a)."""
    affine, t = Affine(), 301
    z_source, draw = normal(1, *SHAPE, seed=6), draw_at([t], normal(1, *SHAPE, seed=7))
    psi, chi = (float(table[t]) for table in pds_weights(ABAR, 2))
    ka = float(draw.s * draw.a / (draw.a**2 * WIDTH + draw.s**2))
    z = z_source
    for _ in range(400):
        z = z - pds(affine.denoise, z, draw, affine.request(z_source), alphas_cumprod=ABAR)
    share = chi * ka / (psi + chi * ka)
    exact(z[0], z_source[0] + share * SCALE * (affine.target_mean - affine.source_mean), atol=1e-9)
    assert 0.2 < share < 0.8


def test_tables_of_one_s_own_take_the_place_of_the_weights():
    modes = Modes()
    z, z_source = normal(2, *SHAPE, seed=5), normal(2, *SHAPE, seed=6)
    draw, request = draw_at([100, 800], normal(2, *SHAPE, seed=7)), modes.request(z_source)
    ramp = torch.linspace(0, 1, 1000)
    plain = dds(modes.denoise, z, draw, request)
    rise = (draw.t.double() / 999).view(-1, 1, 1, 1)
    found = pds(modes.denoise, z, draw, request, alphas_cumprod=ABAR, psi=ramp, chi=1 - ramp, identity=2)
    exact(found, 2 * rise * (z - z_source) + (1 - rise) * plain, atol=1e-6)
    only_psi = pds(modes.denoise, z, draw, request, alphas_cumprod=ABAR, psi=ramp * 0)
    exact(only_psi, pds(modes.denoise, z, draw, request, alphas_cumprod=ABAR, identity=0))


def test_dreamcatalyst_holds_harder_the_more_noise():
    modes = Modes()
    z, z_source = normal(2, *SHAPE, seed=5), normal(2, *SHAPE, seed=6)
    draw, request = draw_at([200, 900], normal(2, *SHAPE, seed=7)), modes.request(z_source)
    grad = dreamcatalyst(modes.denoise, z, draw, request, alphas_cumprod=ABAR)
    plain = dds(modes.denoise, z, draw, request)
    for row, tau in enumerate((0.2, 0.9)):
        chi, psi = 0.2 + 0.8 * tau ** (1 / math.e), 0.075 * math.exp(tau)
        exact(grad[row], chi * plain[row] + psi * (z - z_source)[row])
    free = dreamcatalyst(modes.denoise, z, draw, request, alphas_cumprod=ABAR, identity=0, delta=1, gamma=0)
    exact(free, plain)


@pytest.mark.parametrize("name", ["pds", "dreamcatalyst"])
def test_asking_for_the_source_changes_nothing_and_a_departure_is_called_back(name):
    modes = Modes()
    z = normal(2, *SHAPE, seed=5)
    draw = draw_at([300, 800], normal(2, *SHAPE, seed=6))
    request = modes.request(z)._replace(target=repeat(modes.source, 2))
    exact(GUIDANCE[name](modes.denoise, z, draw, request, alphas_cumprod=ABAR), torch.zeros_like(z))
    away = GUIDANCE[name](modes.denoise, z + 10, draw, request, alphas_cumprod=ABAR, identity=1e6)
    assert (away > 0).all()


@pytest.mark.parametrize("stride", [0, -1, 1000])
def test_a_stride_that_the_schedule_does_not_have_is_an_error(stride):
    with pytest.raises(InputError, match=f"stride: found {stride}, expected from 1 to 999"):
        pds_weights(ABAR, stride)
