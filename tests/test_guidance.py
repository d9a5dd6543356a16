"""Guidance against closed forms, in double precision, on denoisers of Gaussian mixtures; then on every toy scene."""

import math

import pytest
import torch
from mixtures import F64, SCALE, SHAPE, SIZE, WIDTH, Affine, Modes, Seen, draw_at, exact, normal, seeded, toy_prior
from torch import nn
from torch.autograd.functional import jacobian

from splatedit.diffusion import (
    PREDICTIONS,
    Draw,
    MixtureDenoiser,
    guided,
    pick,
    repeat,
    sample_draw,
    scaled_linear,
    scales,
    to_eps_x0,
)
from splatedit.guidance import GUIDANCE, Request, dds, fpr, ids, push, sds
from splatedit.tuning import bind

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def affine():
    return Affine()


@pytest.fixture
def modes():
    return Modes()


# ------------------------------------------------------------------------------------------------------------ push, sds
def test_push_hands_over_exactly_the_given_gradient():
    theta, grad = normal(5, seed=1).requires_grad_(), normal(2, 3, seed=2).requires_grad_()

    def scene(theta):
        return theta.outer(theta)[:2, :3].sin()

    (found,) = torch.autograd.grad(push(scene(theta), grad), theta)
    z = scene(theta)
    # The other device in use: half the squared distance to a target one gradient step away.
    (other,) = torch.autograd.grad(0.5 * (z - (z - grad).detach()).square().sum(), theta)
    exact(found, other)
    (direct,) = torch.autograd.grad(scene(theta), theta, grad.detach())
    exact(found, direct)
    assert grad.grad is None


@pytest.mark.parametrize("weight", ["sigma2", "uniform"])
def test_sds_pulls_towards_the_guided_mean_on_average(weight, affine):
    """E[g] = weight k a (z - m_w), k = s / (a^2 v + s^2): over-saturated by the guidance scale."""
    count = 100_000
    z = normal(1, *SHAPE, seed=5)
    draw = draw_at([500] * count, normal(count, *SHAPE, seed=6))
    grad = sds(affine.denoise, z, draw, affine.request(z.expand(count, *SHAPE)), weight=weight)
    a, s = draw.a[0], draw.s[0]
    expected = (
        (s**2 if weight == "sigma2" else 1) * s / (a**2 * WIDTH + s**2) * a * (z[0] - affine.mean(affine.target_mean))
    )
    error = grad.std(0) / math.sqrt(count)
    assert ((grad.mean(0) - expected).abs() < 4 * error).all()
    assert expected.abs().max() > 100 * error.max(), "a test that could have failed"


def test_sds_names_an_unknown_weight(affine):
    z = normal(1, *SHAPE)
    with pytest.raises(ValueError, match="weight: found 'snr'"):
        sds(affine.denoise, z, draw_at([500], z), affine.request(z), weight="snr")


# ------------------------------------------------------------------------------------------------------------------ dds
def test_dds_is_the_closed_form_whatever_the_noise(affine):
    z, z_source = normal(4, *SHAPE, seed=5), normal(4, *SHAPE, seed=6)
    shift = SCALE * (affine.target_mean - affine.source_mean)
    for seed in range(3):
        draw = draw_at([20, 300, 700, 948], normal(4, *SHAPE, seed=10 + seed))
        rate = draw.s * draw.a / (draw.a**2 * WIDTH + draw.s**2)
        exact(dds(affine.denoise, z, draw, affine.request(z_source)), rate * (z - z_source - shift))


def test_dds_comes_to_rest_at_the_source_plus_the_guided_difference(affine):
    z_source = normal(1, *SHAPE, seed=6)
    z, generator = z_source.clone(), seeded()
    for _ in range(200):
        draw = sample_draw(scaled_linear(), z, (0.2, 0.8), generator)
        z = z - dds(affine.denoise, z, draw, affine.request(z_source))
    exact(z[0], z_source[0] + SCALE * (affine.target_mean - affine.source_mean), atol=1e-9)


@pytest.mark.parametrize("name", ["dds", "ids"])
def test_asking_for_the_source_changes_nothing(name, modes):
    z = normal(2, *SHAPE, seed=5)
    request = modes.request(z)._replace(target=repeat(modes.source, 2))
    grad = GUIDANCE[name](modes.denoise, z, draw_at([300, 800], normal(2, *SHAPE, seed=6)), request)
    exact(grad, torch.zeros_like(z))


# ------------------------------------------------------------------------------------------------------------ fpr, ids
def residual(denoise, z_source, draw, text):
    zhat = (draw.noised(z_source) - draw.s * denoise(draw.noised(z_source), draw.t, text)) / draw.a
    return z_source - zhat


def test_the_residual_is_the_gap_between_noise_put_in_and_noise_found(modes):
    z, text = normal(3, *SHAPE, seed=5), repeat(modes.source, 3)
    draw = draw_at([100, 500, 900], normal(3, *SHAPE, seed=6))
    record = fpr(modes.denoise, z, draw, text, iters=1)
    gap = modes.denoise(draw.noised(z), draw.t, text) - draw.noise
    exact(record.residuals[0], ((draw.s / draw.a) * gap).flatten(1).norm(dim=1))


@pytest.mark.parametrize("lam", [0.5, 3.0])
def test_a_step_of_fpr_has_the_length_of_the_unit_residual_pulled_back(lam, modes):
    z, text = normal(1, *SHAPE, seed=5), modes.source
    draw = draw_at([600], normal(1, *SHAPE, seed=6))
    record = fpr(modes.denoise, z, draw, text, iters=1, lam=lam)
    step = record.noise - draw.noise  # in units of s: x moved by s times this

    def clean(x):
        return ((x - draw.s * modes.denoise(x, draw.t, text)) / draw.a).flatten()

    jac = jacobian(clean, draw.noised(z)).reshape(SIZE, SIZE)
    gap = residual(modes.denoise, z, draw, text).flatten()
    pulled = jac.T @ (gap / gap.norm())
    exact((draw.s * step).flatten(), lam * math.sqrt(SIZE / 16384) * pulled, atol=1e-10)
    assert float(record.residuals[0]) == pytest.approx(float(gap.norm()), abs=1e-12)


def test_fpr_on_an_affine_score_reaches_the_noise_the_network_agrees_with(affine):
    """The fixed point is s / (a v) (z - m_w); J is a multiple of the identity, so one step can lead there."""
    z, draw = normal(1, *SHAPE, seed=5), draw_at([600], normal(1, *SHAPE, seed=6))
    a, s = draw.a, draw.s
    slope = float(a * WIDTH / (a**2 * WIDTH + s**2))
    length = float(residual(affine.denoise, z, draw, affine.source).norm()) / slope**2
    record = fpr(affine.denoise, z, draw, affine.source, iters=1, lam=length / math.sqrt(SIZE / 16384))
    exact(record.noise, s / (a * WIDTH) * (z - affine.mean(affine.source_mean)), atol=1e-10)
    # Steps of the default length walk there in a straight line.
    walk = fpr(affine.denoise, z, draw, affine.source, iters=20).residuals[:, 0]
    assert (walk.diff() < 0).all()
    exact(walk.diff(), walk.diff()[:1].expand(19), atol=1e-10)


def test_a_batch_of_two_is_two_batches_of_one(modes):
    z, z_source = normal(2, *SHAPE, seed=5), normal(2, *SHAPE, seed=6)
    draw = draw_at([300, 850], normal(2, *SHAPE, seed=7))
    together, record = [], fpr(modes.denoise, z_source, draw, repeat(modes.source, 2))
    grad = ids(modes.denoise, z, draw, modes.request(z_source), history=together)
    for row in range(2):
        one = slice(row, row + 1)
        alone = []
        lone = Draw(*(part[one] for part in draw))
        exact(grad[one], ids(modes.denoise, z[one], lone, modes.request(z_source[one]), history=alone))
        exact(together[0].noise[one], alone[0].noise)
        exact(together[0].residuals[:, one], alone[0].residuals)
        exact(record.noise[one], alone[0].noise)


def published_ids(denoise, z, draw, request, iters, lam):
    """One sample through the steps of the public IDS code, written out from their description."""
    x = draw.noised(request.z_source)
    for _ in range(iters):
        x = x.detach().requires_grad_()
        zhat = (x - draw.s * denoise(x, draw.t, request.source)) / draw.a
        (slope,) = torch.autograd.grad(torch.linalg.norm(request.z_source - zhat), x)
        x = (x - lam * slope).detach()
    noise = (x - draw.a * request.z_source) / draw.s
    x_target = draw.a * z + draw.s * noise
    return denoise(x_target, draw.t, request.target) - denoise(x, draw.t, request.source)


@pytest.mark.parametrize("t", [60, 500, 940])
def test_ids_is_the_published_algorithm(t, modes):
    z, z_source = normal(1, *SHAPE, seed=5), normal(1, *SHAPE, seed=6)
    draw, request = draw_at([t], normal(1, *SHAPE, seed=7)), modes.request(z_source)
    expected = published_ids(modes.denoise, z, draw, request, 3, 0.8 * math.sqrt(SIZE / 16384))
    with torch.no_grad():  # as the loop calls it: the inner gradients must not need the caller's
        found = ids(modes.denoise, z, draw, request, iters=3, lam=0.8)
    exact(found, expected, atol=1e-11)
    assert not found.requires_grad
    assert (found - dds(modes.denoise, z, draw, request)).abs().max() > 1e-6, "and it is not DDS"


@pytest.mark.parametrize(("iters", "lam"), [(1, 1.0), (3, 1.0), (5, 40.0)])
def test_ids_is_dds_where_scores_are_affine(iters, lam, affine):
    z, z_source = normal(3, *SHAPE, seed=5), normal(3, *SHAPE, seed=6)
    draw, request = draw_at([100, 500, 900], normal(3, *SHAPE, seed=7)), affine.request(z_source)
    found = ids(affine.denoise, z, draw, request, iters=iters, lam=lam)
    exact(found, dds(affine.denoise, z, draw, request), atol=1e-10)


def test_ids_without_iterations_is_dds(modes):
    z, z_source, history = normal(2, *SHAPE, seed=5), normal(2, *SHAPE, seed=6), []
    draw, request = draw_at([200, 700], normal(2, *SHAPE, seed=7)), modes.request(z_source)
    found = ids(modes.denoise, z, draw, request, iters=0, history=history)
    assert torch.equal(found, dds(modes.denoise, z, draw, request))
    assert history[0].residuals.shape == (1, 2) and torch.equal(history[0].noise, draw.noise)


def test_at_the_fixed_point_the_source_score_is_the_noise_itself(affine):
    z, z_source = normal(1, *SHAPE, seed=5), normal(1, *SHAPE, seed=6)
    draw = draw_at([600], z)
    fixed = draw.s / (draw.a * WIDTH) * (z_source - affine.mean(affine.source_mean))
    draw, history = draw._replace(noise=fixed), []
    exact(affine.denoise(draw.noised(z_source), draw.t, affine.source), fixed)
    grad = ids(affine.denoise, z, draw, affine.request(z_source), lam=0.0, history=history)
    exact(grad, affine.denoise(draw.noised(z), draw.t, affine.target) - fixed)
    exact(history[0].residuals, torch.zeros(4, 1, dtype=F64))


def test_no_residual_at_all_is_no_step_and_no_nan():
    z, noise = normal(2, *SHAPE, seed=5), normal(2, *SHAPE, seed=6)
    draw = draw_at([300, 800], noise)

    def oracle(x, t, text):
        return (x - draw.a * z) / draw.s

    record = fpr(oracle, z, draw, repeat(MixtureDenoiser(z).text([1, 1]), 2))
    assert record.noise.isfinite().all() and record.residuals.max() < 1e-12
    assert (record.noise - noise).norm() < 0.2


def test_the_history_ends_with_the_residual_after_the_last_step(modes):
    z_source, history = normal(2, *SHAPE, seed=6), []
    draw, request = draw_at([300, 850], normal(2, *SHAPE, seed=7)), modes.request(z_source)
    ids(modes.denoise, z_source, draw, request, iters=3, history=history)
    (record,) = history
    assert record.residuals.shape == (4, 2)
    last = residual(modes.denoise, z_source, draw._replace(noise=record.noise), request.source)
    exact(record.residuals[-1], last.flatten(1).norm(dim=1))
    longer = fpr(modes.denoise, z_source, draw, request.source, iters=4)
    exact(longer.residuals, record.residuals)


def test_fpr_survives_half_precision_networks():
    """A gradient that half precision would flush to zero on its way back arrives whole."""
    z = torch.randn(1, 4, 32, 32, generator=seeded(1))
    t = torch.tensor([500])
    draw = Draw(t, *scales(scaled_linear(), t, z), torch.randn(1, 4, 32, 32, generator=seeded(2)))
    text = MixtureDenoiser(z).text([1])

    def network(x, t, text, dtype):
        return (((x * 2**13).to(dtype) * 2**-13).float() * 0.5).to(torch.float32)

    half, single = (
        fpr(lambda x, t, y, d=d: network(x, t, y, d), z, draw, text, iters=1).noise - draw.noise
        for d in (torch.float16, torch.float32)
    )
    assert (half - single).norm() < 2e-3 * single.norm()


def test_an_overflow_costs_its_sample_one_step_and_nothing_else(modes):
    z, text = normal(2, *SHAPE, seed=5), repeat(modes.source, 2)
    draw = draw_at([300, 700], normal(2, *SHAPE, seed=6))

    def overflowing(x, t, text):
        out = modes.denoise(x, t, text)
        spoiled = torch.tensor([math.inf, 1.0], dtype=F64).view(2, 1, 1, 1)
        out.register_hook(lambda grad: grad * spoiled)
        return out

    found, expected = (fpr(d, z, draw, text, iters=2).noise for d in (overflowing, modes.denoise))
    exact(found[0], draw.noise[0])
    exact(found[1], expected[1])


def test_picard_iteration_contracts_without_guidance_as_theory_says(affine):
    """For one Gaussian of variance v the error shrinks by s^2 / (a^2 v + s^2) each time."""
    z, draw = normal(1, *SHAPE, seed=5), draw_at([600], normal(1, *SHAPE, seed=6))
    a, s = draw.a, draw.s
    fixed = s / (a * WIDTH) * (z - affine.source_mean)
    noise, errors = draw.noise, []
    for _ in range(6):
        errors.append(float((noise - fixed).norm()))
        noise = affine.mixture(a * z + s * noise, draw.t, affine.source)
    for before, after in zip(errors, errors[1:], strict=False):
        assert after / before == pytest.approx(float(s**2 / (a**2 * WIDTH + s**2)), abs=1e-8)


# ------------------------------------------------------------------------------------------------------- network calls
@pytest.mark.parametrize(
    ("name", "scale", "calls"),
    [
        ("sds", SCALE, [6]),
        ("dds", SCALE, [12]),
        ("ids", SCALE, [6, 6, 12]),
        ("sds", 1.0, [3]),
        ("dds", 1.0, [6]),
        ("ids", 1.0, [3, 3, 6]),
    ],
)
def test_null_source_and_target_go_through_the_network_together(name, scale, calls, modes):
    seen = []

    def network(x, t, text):
        seen.append((len(x), len(t), len(text.embeds)))
        return modes.mixture(x, t, text)

    z = normal(3, *SHAPE, seed=5)
    options = {"iters": 2} if name == "ids" else {}
    draw = draw_at([300, 500, 700], normal(3, *SHAPE, seed=6))
    GUIDANCE[name](guided(network, modes.null, scale), z, draw, modes.request(z), **options)
    assert seen == [(n, n, n) for n in calls]


# ----------------------------------------------------------------------------------------- every guidance, every scene
RED, BLUE = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.5])


class Points(nn.Module):
    """Sixty-four points in the plane, seen as pixels of two channels."""

    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(RED + 0.05 * torch.randn(64, 2, generator=seeded()))

    def forward(self):
        return self.points.T.reshape(1, 2, 8, 8)


class Picture(nn.Module):
    """The latents themselves, as in the editing of pictures."""

    def __init__(self):
        super().__init__()
        self.z = nn.Parameter(RED.view(1, 2, 1, 1) + 0.05 * torch.randn(1, 2, 8, 8, generator=seeded()))

    def forward(self):
        return self.z


class Blobs(nn.Module):
    """Soft discs with positions, sizes and colours, blended by their coverage; two views of them."""

    def __init__(self):
        super().__init__()
        self.places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) / 4 + 0.125
        # In tenths: at the rate of the colours, discs would run from being red faster than they could turn blue.
        self.offsets = nn.Parameter(torch.randn(16, 2, generator=seeded()))
        self.widths = nn.Parameter(torch.full((16,), -15.0))
        self.colours = nn.Parameter(RED.repeat(16, 1))

    def forward(self):
        line = (torch.arange(8) + 0.5) / 8
        pixels = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(-1, 1, 2)
        distance = (pixels - self.places - self.offsets / 10).square().sum(-1)
        cover = torch.exp(-distance / (self.widths / 10).exp() ** 2)
        image = (cover @ self.colours / (cover.sum(1, keepdim=True) + 0.01)).T.view(1, 2, 8, 8)
        return torch.cat([image, image.flip(-1)])


@pytest.mark.parametrize("scene", [Points, Picture, Blobs])
@pytest.mark.parametrize("name", GUIDANCE)
def test_every_guidance_moves_every_scene_to_the_target(name, scene):
    shades = torch.stack([c.view(2, 1, 1).expand(2, 8, 8) * k for c in (RED, BLUE) for k in (0.9, 1.1)])
    mixture = MixtureDenoiser(shades, floor=0.02)
    null, red, blue = (mixture.text(row) for row in ([1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]))
    network, generator, scene = Seen(mixture), seeded(), scene()
    denoise, options = guided(network, null, 1.5), bind(name, toy_prior(network), generator)
    z_source = scene().detach().clone()
    request = Request(repeat(blue, len(z_source)), repeat(red, len(z_source)), z_source)
    optimizer = torch.optim.Adam(scene.parameters(), lr=0.03)
    for _ in range(150):
        z = scene()
        draw = sample_draw(mixture.alphas_cumprod, z, (0.02, 0.98), generator)
        with torch.no_grad():
            grad = GUIDANCE[name](denoise, z.detach(), draw, request, **options)
        optimizer.zero_grad()
        push(z, grad).backward()
        optimizer.step()
    miss = (scene().mean((0, 2, 3)) - BLUE).norm()
    assert miss < 0.5 * (RED - BLUE).norm(), f"{name}: still {miss:.2f} from the target"


@pytest.mark.parametrize("prediction", [p for p in PREDICTIONS if p not in ("epsilon", "flow")])
@pytest.mark.parametrize("name", GUIDANCE)
def test_gradients_do_not_depend_on_what_the_network_predicts(name, prediction, modes):
    """The same exact scores, once as noise and once through a network of another kind (`flow` has another schedule)."""

    def network(x, t, text):
        ehat = modes.mixture(x, t, text)
        a, s = scales(scaled_linear(), t, x)
        output = (ehat - s * x) / a if prediction == "v_prediction" else (x - s * ehat) / a
        return to_eps_x0(output, x, a, s, prediction)[0]

    z, draw = normal(2, *SHAPE, seed=5), draw_at([300, 800], normal(2, *SHAPE, seed=6))
    request, grads = modes.request(normal(2, *SHAPE, seed=7)), []
    for one in (modes.mixture, network):
        seen = Seen(one)
        options = bind(name, toy_prior(seen, scaled_linear()), seeded())
        grads.append(GUIDANCE[name](guided(seen, modes.null, SCALE), z, draw, request, **options))
    exact(grads[0], grads[1], atol=1e-9)


@pytest.mark.parametrize("name", ["sds", "dds", "cds", "pds", "dreamcatalyst"])
def test_samples_of_a_batch_know_nothing_of_each_other(name, modes):
    z, draw = normal(2, *SHAPE, seed=5), draw_at([300, 800], normal(2, *SHAPE, seed=6))
    request, seen = modes.request(normal(2, *SHAPE, seed=7)), Seen(modes.mixture)
    denoise, options = guided(seen, modes.null, SCALE), bind(name, toy_prior(seen), seeded())
    together = GUIDANCE[name](denoise, z, draw, request, **options)
    for row in range(2):
        one = torch.tensor([row])
        lone = Request(pick(request.target, one), pick(request.source, one), request.z_source[one])
        exact(together[one], GUIDANCE[name](denoise, z[one], draw.pick(one), lone, **options))
