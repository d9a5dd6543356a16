"""Schedules, prediction types and the exact denoiser, against tables and closed forms, in double precision."""

import math

import pytest
import torch
from torch.autograd.functional import jacobian

from splatedit.diffusion import (
    MixtureDenoiser,
    Text,
    denoising_errors,
    guided,
    repeat,
    sample_draw,
    scaled_linear,
    scales,
    stack,
    to_eps_x0,
)

F64 = torch.float64
SHAPE = (2, 2, 3)
SIZE = math.prod(SHAPE)


def exact(**kwargs):
    torch.testing.assert_close(rtol=0, atol=kwargs.pop("atol", 1e-12), **kwargs)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=seeded(seed))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mixture():
    """Five components with two stretched directions each."""
    directions = torch.linalg.qr(normal(5, SIZE, 2, seed=3)).Q
    variances = torch.rand(5, 2, dtype=F64, generator=seeded(4)) + 0.1
    return MixtureDenoiser(0.7 * normal(5, *SHAPE, seed=2), None, 0.05, directions, variances)


@pytest.fixture
def texts(mixture):
    return mixture.text([1, 2, 3, 4, 5]), mixture.text([0, 1, 4, 0, 0])


@pytest.mark.parametrize(
    ("t", "power"),
    [(0, 0.99915000), (20, 0.98131436), (100, 0.89422348), (500, 0.27633268), (948, 0.00843403), (999, 0.00466010)],
)
def test_the_schedule_is_that_of_stable_diffusion(t, power):
    table = scaled_linear()
    assert table.dtype == F64 and float(table[t]) == pytest.approx(power, abs=1e-8)
    a, s = scales(table, torch.tensor([t]), table)
    assert a.shape == (1, 1, 1, 1) and float(a**2 + s**2) == pytest.approx(1, abs=1e-15)


def test_a_draw_noises_as_the_schedule_says_and_keeps_to_its_range():
    z = normal(16384, 1, 1, 2)
    draw = sample_draw(scaled_linear(), z, (0.02, 0.98), seeded())
    assert draw.noise.dtype == F64 and draw.t.dtype == torch.int64
    assert (int(draw.t.min()), int(draw.t.max())) == (20, 980), "both ends included"
    power = scaled_linear()[draw.t].view(-1, 1, 1, 1)
    exact(actual=draw.noised(z), expected=power.sqrt() * z + (1 - power).sqrt() * draw.noise)
    again = sample_draw(scaled_linear(), z, (0.02, 0.98), seeded())
    assert all(torch.equal(p, q) for p, q in zip(draw, again, strict=True))


def test_steps_without_any_picture_left_are_never_drawn():
    table = torch.cat([scaled_linear()[:-2], torch.tensor([1e-9, 0.0])]).float()
    draw = sample_draw(table, torch.zeros(4096, 1, 1, 1), (0.99, 1.0), seeded())
    assert int(draw.t.max()) == 997
    above = sample_draw(table, torch.zeros(4, 1, 1, 1), (0.9995, 1.0), seeded())
    assert above.t.tolist() == [997] * 4


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_every_prediction_type_means_the_same_pair(kind, mixture, texts):
    if kind == "flow":
        sigma = torch.tensor([0.2, 0.6, 0.9], dtype=F64).view(-1, 1, 1, 1)
        a, s = 1 - sigma, sigma
    else:
        a, s = scales(scaled_linear(), torch.tensor([50, 500, 948]), normal(1))
    ehat, zhat = normal(3, *SHAPE, seed=5), normal(3, *SHAPE, seed=6)
    x = a * zhat + s * ehat
    output = {"epsilon": ehat, "v_prediction": a * ehat - s * zhat, "sample": zhat, "flow": ehat - zhat}[kind]
    found = to_eps_x0(output, x, a, s, kind)
    exact(actual=found[0], expected=ehat)
    exact(actual=found[1], expected=zhat)
    exact(actual=a * found[1] + s * found[0], expected=x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_ends_of_a_schedule_never_divide_by_zero(kind, power):
    a, s = scales(torch.tensor([power]), torch.tensor([0]), torch.zeros(1))
    for part in to_eps_x0(torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), a, s, kind):
        assert part.isfinite().all()


def test_an_unknown_prediction_type_is_told():
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="prediction_type: found 'score', expected one of epsilon, v_prediction"):
        to_eps_x0(one, one, one, one, "score")


def dense_posterior(mixture, x, a, s, weights):
    """The posterior of one row by textbook formulas with full matrices: an independent second opinion."""
    means = mixture.means
    widths = torch.diag_embed(mixture.variances)
    covs = mixture.directions @ widths @ mixture.directions.mT + mixture.floor * torch.eye(SIZE, dtype=F64)
    noised = a**2 * covs + s**2 * torch.eye(SIZE, dtype=F64)
    likelihood = torch.distributions.MultivariateNormal(a * means, noised).log_prob(x.flatten())
    share = torch.softmax(likelihood + weights.log(), 0)
    gain = a * covs @ torch.linalg.inv(noised)
    centres = means + (gain @ (x.flatten() - a * means)[..., None])[..., 0]
    mean = share @ centres
    spread = centres - mean
    inner = covs - a * gain @ covs
    return mean.view(SHAPE), torch.einsum("k,kde->de", share, inner + spread[:, :, None] * spread[:, None])


def test_the_mixture_denoiser_is_exact(mixture):
    weights = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=F64)
    t, x = torch.tensor([30, 400, 900]), normal(3, *SHAPE, seed=7)
    text = repeat(mixture.text(weights), 3)
    mean, covariance = mixture.posterior(x, t, text)
    a, s = scales(mixture.alphas_cumprod, t, x)
    for row in range(3):
        one_mean, one_covariance = dense_posterior(mixture, x[row], a[row].item(), s[row].item(), weights)
        exact(actual=mean[row], expected=one_mean, atol=1e-10)
        exact(actual=covariance[row], expected=one_covariance, atol=1e-10)


def test_tweedie_the_clean_latents_are_the_posterior_mean(mixture, texts):
    t, x = torch.tensor([30, 400, 900]), normal(3, *SHAPE, seed=7)
    text = repeat(texts[1], 3)
    a, s = scales(mixture.alphas_cumprod, t, x)
    _, zhat = to_eps_x0(mixture(x, t, text), x, a, s, "epsilon")
    exact(actual=zhat, expected=mixture.posterior(x, t, text)[0])


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_jacobian_of_the_guided_noise_is_the_posterior_covariance(scale, mixture, texts):
    """d G / d noise = I - SNR (w Cov[z|x, y] - (w - 1) Cov[z|x, null]) with G(noise) = ehat_w(a z + s noise)."""
    null, text = texts
    t, z, noise = torch.tensor([400]), normal(1, *SHAPE, seed=8), normal(1, *SHAPE, seed=9)
    a, s = scales(mixture.alphas_cumprod, t, z)
    predict = guided(mixture, null, scale)
    found = jacobian(lambda n: predict(a * z + s * n, t, text).flatten(), noise).reshape(SIZE, SIZE)
    cov, cov_null = (mixture.posterior(a * z + s * noise, t, y)[1][0] for y in (text, null))
    snr = float(a**2 / s**2)
    expected = torch.eye(SIZE, dtype=F64) - snr * (scale * cov - (scale - 1) * cov_null)
    exact(actual=found, expected=expected, atol=1e-10)


def test_guidance_scale_one_is_off_zero_is_null_and_omega_converts(mixture, texts):
    null, text = texts
    t, x, y = torch.tensor([100, 600]), normal(2, *SHAPE), repeat(text, 2)
    free, told = mixture(x, t, repeat(null, 2)), mixture(x, t, y)
    exact(actual=guided(mixture, null, 1.0)(x, t, y), expected=told)
    exact(actual=guided(mixture, null, 0.0)(x, t, y), expected=free)
    omega = 6.5
    exact(actual=guided(mixture, null, 7.5)(x, t, y), expected=(1 + omega) * told - omega * free)
    exact(actual=guided(mixture, null, 1 + omega)(x, t, y), expected=told + omega * (told - free))


@pytest.mark.parametrize(("scale", "rows"), [(7.5, 6), (1.0, 3), (0.0, 3)])
def test_guidance_is_one_network_call(scale, rows, mixture, texts):
    seen = []

    def counted(x, t, text):
        seen.append((len(x), text.embeds))
        return mixture(x, t, text)

    guided(counted, texts[0], scale)(normal(3, *SHAPE), torch.tensor([5, 6, 7]), repeat(texts[1], 3))
    assert [n for n, _ in seen] == [rows]
    if scale == 7.5:
        assert torch.equal(seen[0][1], stack(repeat(texts[0], 3), repeat(texts[1], 3)).embeds), "null rows first"


def test_texts_stack_and_repeat():
    one = Text(torch.ones(1, 2, 3), torch.ones(1, 4), torch.ones(1, 6))
    two = Text(torch.zeros(1, 2, 3), torch.zeros(1, 4), torch.zeros(1, 6))
    both = stack(one, two, one)
    assert [part.shape[0] for part in both] == [3, 3, 3]
    assert both.pooled[:, 0].tolist() == [1, 0, 1]
    assert repeat(one, 5).ids.shape == (5, 6) and repeat(both, 3).embeds.shape == (3, 2, 3)
    assert stack(Text(torch.ones(1, 2, 3)), Text(torch.ones(2, 2, 3))).pooled is None
    with pytest.raises(AssertionError):
        stack(one, Text(torch.ones(1, 2, 3)))
    with pytest.raises(AssertionError):
        repeat(both, 2)


def test_denoising_errors_find_the_component_a_view_came_from():
    means = torch.stack([torch.full(SHAPE, v, dtype=F64) for v in (-1.0, 0.0, 1.0)])
    mixture = MixtureDenoiser(means, floor=0.05)
    texts = [mixture.text(row) for row in torch.eye(3).tolist()]
    z = means[[2, 0, 1, 1]] + 0.1 * normal(4, *SHAPE)
    calls = []

    def counted(x, t, text):
        calls.append((len(x), x, t))
        return mixture(x, t, text)

    errors = denoising_errors(counted, z, texts, mixture.alphas_cumprod, seeded(), draws=3, rows=8)
    assert errors.shape == (4, 3) and errors.argmin(1).tolist() == [2, 0, 1, 1]
    assert [n for n, _, _ in calls] == [8, 4] * 3, "12 rows in pieces of 8, for each of 3 draws"
    x = torch.cat([calls[0][1], calls[1][1]]).view(3, 4, *SHAPE)
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2]), "every text sees the same draws"
    first, last = calls[0][2], calls[-1][2]
    assert int(first.max()) <= 400 and int(last.min()) >= 600, "draws are spread over the range"
    exact(actual=errors, expected=denoising_errors(mixture, z, texts, mixture.alphas_cumprod, seeded(), draws=3))


def test_denoising_errors_of_texts_with_pooled_embeddings():
    def denoise(x, t, text):
        assert text.pooled.shape == (len(x), 1) and text.ids.shape == (len(x), 6)
        return x * text.pooled[:, :, None, None]

    texts = [Text(torch.ones(1, 1, 1), torch.full((1, 1), v), torch.ones(1, 6)) for v in (0.0, 9.0)]
    errors = denoising_errors(denoise, torch.zeros(3, 1, 2, 2), texts, scaled_linear(), seeded(), draws=2, rows=4)
    assert (errors[:, 0] < errors[:, 1]).all()
