"""FPR solvers against closed forms, in double precision, on denoisers of Gaussian mixtures."""

import math
from collections import Counter

import pytest
import torch
from mixtures import F64, SCALE, SHAPE, SIZE, WIDTH, Affine, Modes, draw_at, exact, normal, seeded

from splatedit.diffusion import guided, pick, repeat
from splatedit.errors import InputError
from splatedit.fpr import BACKWARD, REFERENCE_SIZE, SOLVERS, fpr, moments
from splatedit.guidance import dds, ids

pytestmark = pytest.mark.usefixtures("one_thread")

SINGLE = [name for name, solver in SOLVERS.items() if not solver.levels]
NULL = [name for name, solver in SOLVERS.items() if solver.null]


class Counting:
    """A network that counts its rows, forward and back."""

    def __init__(self, network):
        self.network, self.rows = network, Counter()

    def __call__(self, x, t, text):
        self.rows["forward"] += len(x)
        out = self.network(x, t, text)
        if out.requires_grad:
            out.register_hook(lambda grad: self.rows.update(back=len(grad)))
        return out


def residual(denoise, z, draw, noise, text):
    """|z - zhat| of each sample with this noise."""
    gap = denoise(draw.a * z + draw.s * noise, draw.t, text) - noise
    return ((draw.s / draw.a) * gap).flatten(1).norm(dim=1)


def iterated(mixture, solver):
    """The score whose fixed point a solver looks for."""
    return guided(mixture.mixture, mixture.null, 0.0 if SOLVERS[solver].null else SCALE)


@pytest.fixture
def modes():
    return Modes()


@pytest.fixture
def affine():
    return Affine()


# ------------------------------------------------------------------------------------------------ one Gaussian, solved
def fixed_point(affine, solver, z, draw):
    """s / (a v) (z - m): m the mean of the text that the solver iterates on."""
    mean = affine.null_mean if SOLVERS[solver].null else affine.mean(affine.source_mean)
    return draw.s / (draw.a * WIDTH) * (z - mean)


@pytest.mark.parametrize("solver", ["picard", "picard_null"])
def test_picard_contracts_as_theory_says(solver, affine):
    """For one Gaussian of variance v the error shrinks by s^2 / (a^2 v + s^2) each time."""
    z, draw = normal(2, *SHAPE, seed=5), draw_at([300, 700], normal(2, *SHAPE, seed=6))
    wanted, text = fixed_point(affine, solver, z, draw), repeat(affine.source, 2)
    found = [fpr(affine.denoise, z, draw, text, n, solver=solver).noise - wanted for n in range(7)]
    rate = draw.s**2 / (draw.a**2 * WIDTH + draw.s**2)
    for before, after in zip(found, found[1:], strict=False):
        exact(after, rate * before)
    half = fpr(affine.denoise, z, draw, text, 1, 0.5, solver).noise - wanted
    exact(half, (1 + rate) / 2 * found[0])


def test_anderson_solves_a_linear_problem_in_two_steps(affine):
    z, draw = normal(1, *SHAPE, seed=5), draw_at([500], normal(1, *SHAPE, seed=6))
    wanted = fixed_point(affine, "anderson", z, draw)
    draw = draw._replace(noise=wanted + 0.05 * draw.noise)  # near, so that no step is cut short
    exact(fpr(affine.denoise, z, draw, affine.source, 2, solver="anderson").noise, wanted, atol=1e-6)
    picard = fpr(affine.denoise, z, draw, affine.source, 2, solver="picard_null").noise
    assert (picard - wanted).norm() > 1e-2


def test_polyak_halves_a_linear_residual_and_twice_its_step_solves_it(affine):
    z, draw = normal(1, *SHAPE, seed=5), draw_at([500], normal(1, *SHAPE, seed=6))
    wanted = fixed_point(affine, "grad_polyak", z, draw)
    draw = draw._replace(noise=wanted + 0.05 * draw.noise)
    found = fpr(affine.denoise, z, draw, affine.source, 4, solver="grad_polyak")
    exact(found.residuals[1:] / found.residuals[:-1], torch.full((3, 1), 0.5, dtype=F64), atol=1e-9)
    exact(fpr(affine.denoise, z, draw, affine.source, 1, 2.0, "grad_polyak").noise, wanted)


@pytest.mark.parametrize("solver", SINGLE)
def test_every_solver_ends_at_the_fixed_point_of_one_gaussian(solver, affine):
    z, draw = normal(2, *SHAPE, seed=5), draw_at([200, 300], normal(2, *SHAPE, seed=6))
    wanted = fixed_point(affine, solver, z, draw)
    draw = draw._replace(noise=wanted + draw.noise)
    found = fpr(affine.denoise, z, draw, affine.source, 400, solver=solver)
    # Steps of grad keep their length: it ends by walking to and fro across the fixed point.
    slack = 3 * math.sqrt(SIZE / REFERENCE_SIZE) if solver == "grad" else 1e-6
    assert (found.noise - wanted).abs().max() < slack < (draw.noise - wanted).abs().max()


# ---------------------------------------------------------------------------------------------------- several Gaussians
@pytest.mark.parametrize("solver", SINGLE)
def test_the_residual_falls(solver, modes):
    """Picard's only without guidance: at scale 7.5 it is driven away (next test)."""
    z, draw = normal(4, *SHAPE, seed=5), draw_at([200, 200, 300, 300], normal(4, *SHAPE, seed=6))
    scale, text = 1.0 if solver == "picard" else SCALE, repeat(modes.source, 4)
    found = fpr(guided(modes.mixture, modes.null, scale), z, draw, text, 3, solver=solver)
    denoise = guided(modes.mixture, modes.null, 0.0 if SOLVERS[solver].null else scale)
    exact(found.residuals[0], residual(denoise, z, draw, draw.noise, text))
    last = residual(denoise, z, draw, found.noise, text)
    assert (torch.cat([found.residuals, last[None]]).diff(dim=0).mean(1) < 0).all()
    assert found.residuals.shape == (3, 4) and found.iterations.tolist() == [3] * 4


def test_guidance_drives_picard_away_but_not_picard_on_the_null_text(modes):
    z, draw = normal(8, *SHAPE, seed=5), draw_at([500] * 8, normal(8, *SHAPE, seed=6))
    risen, fallen = (
        fpr(modes.denoise, z, draw, modes.source, 6, solver=s).residuals for s in ("picard", "picard_null")
    )
    assert (risen.diff(dim=0) > 0).all() and (risen[-1] > 10 * risen[0]).all()
    assert (fallen.diff(dim=0) < 0).all() and (fallen[-1] < 0.8 * fallen[0]).all()


@pytest.mark.parametrize("solver", NULL)
def test_solvers_on_the_null_text_know_no_prompt(solver, modes):
    z, draw = normal(2, *SHAPE, seed=5), draw_at([300, 800], normal(2, *SHAPE, seed=6))
    one, other = (fpr(modes.denoise, z, draw, text, 3, solver=solver) for text in (modes.source, modes.target))
    assert torch.equal(one.noise, other.noise) and torch.equal(one.residuals, other.residuals)
    scaled = fpr(guided(modes.mixture, modes.null, 1.0), z, draw, modes.source, 3, solver=solver)
    assert torch.equal(one.noise, scaled.noise)
    assert not torch.equal(one.noise, draw.noise)


def test_picard_on_the_source_text_does_know_it(modes):
    z, draw = normal(2, *SHAPE, seed=5), draw_at([300, 800], normal(2, *SHAPE, seed=6))
    one, other = (fpr(modes.denoise, z, draw, t, 3, solver="picard").noise for t in (modes.source, modes.target))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SINGLE)
@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"stop": 0.1}, {"sphere": True}])
def test_no_iterations_leave_the_noise_and_ids_is_dds(solver, options, modes):
    z, z_source = normal(2, *SHAPE, seed=4), normal(2, *SHAPE, seed=5)
    draw = draw_at([300, 800], normal(2, *SHAPE, seed=6))
    found = fpr(modes.denoise, z_source, draw, modes.source, 0, solver=solver, **options)
    assert torch.equal(found.noise, draw.noise) and found.residuals.shape == (0, 2) and found.rms.shape == (1, 2)
    assert found.backwards == 0 and found.evaluations == (4 if options.get("keep_best") else 0)
    request = Modes.request(modes, z_source)
    grad = ids(modes.denoise, z, draw, request, 0, solver=solver, **options)
    exact(grad, dds(modes.denoise, z, draw, request))


def published(denoise, z, draw, text, iters, lam):
    """The loop of the published code for each sample, the seed of its gradient lifted by 2^k against underflow."""
    x, boost = draw.noised(z), 2.0 ** round(math.log2(8 * math.sqrt(z[0].numel())))
    for _ in range(iters):
        x = x.detach().requires_grad_()
        norm = (z - (x - draw.s * denoise(x, draw.t, text)) / draw.a).flatten(1).norm(dim=1)
        (slope,) = torch.autograd.grad(boost * norm.sum(), x)
        x = x - lam * math.sqrt(z[0].numel() / REFERENCE_SIZE) / boost * slope
    return ((x - draw.a * z) / draw.s).detach()


def test_the_default_is_the_published_loop_bit_for_bit(modes):
    single = Modes()
    single.mixture.means, single.mixture.directions = modes.mixture.means.float(), modes.mixture.directions.float()
    single.mixture.variances = modes.mixture.variances.float()
    texts = [text._replace(embeds=text.embeds.float()) for text in (modes.null, modes.source)]
    denoise, text = guided(single.mixture, texts[0], SCALE), repeat(texts[1], 3)
    z, draw = normal(3, *SHAPE, seed=5).float(), draw_at([100, 500, 900], normal(3, *SHAPE, seed=6).float())
    found = fpr(denoise, z, draw, text)
    assert found.noise.dtype == torch.float32
    assert torch.equal(found.noise, published(denoise, z, draw, text, 3, 1.0))
    assert not torch.equal(found.noise, draw.noise)


# ------------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize("solver", SINGLE)
@pytest.mark.parametrize("iters", [1, 3])
def test_the_sphere_keeps_the_length_of_the_noise(solver, iters, modes):
    z, draw = normal(3, *SHAPE, seed=5), draw_at([100, 500, 900], normal(3, *SHAPE, seed=6))
    free, bound = (
        fpr(modes.denoise, z, draw, modes.source, iters, 5.0 if solver == "grad" else 1.0, solver, sphere=s)
        for s in (False, True)
    )
    length = draw.noise.flatten(1).norm(dim=1)
    exact(bound.noise.flatten(1).norm(dim=1), length)
    exact(bound.rms, (length / math.sqrt(SIZE)).expand(iters + 1, 3))
    assert (free.noise.flatten(1).norm(dim=1) - length).abs().min() > 1e-3
    assert (bound.noise - draw.noise).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SINGLE)
def test_keep_best_returns_the_iterate_with_the_least_residual_and_its_score(solver, modes):
    count = 12
    z, draw = normal(count, *SHAPE, seed=5), draw_at([700] * count, normal(count, *SHAPE, seed=6))
    lam = 600.0 if solver == "grad" else 1.0  # long enough to overshoot
    text, iters = repeat(modes.source, count), 4
    found = fpr(modes.denoise, z, draw, text, iters, lam, solver, keep_best=True)
    denoise = iterated(modes, solver)
    reached = residual(denoise, z, draw, found.noise, text)
    # The way without looking back, up to its first rise: the noise kept is the last one before it.
    way = [fpr(modes.denoise, z, draw, text, n, lam, solver).noise for n in range(iters + 1)]
    heights = torch.stack([residual(denoise, z, draw, noise, text) for noise in way])
    falls = (heights.diff(dim=0) < 0).long().cumprod(0).sum(0)
    assert found.iterations.tolist() == falls.tolist()
    if solver in ("grad", "picard"):
        assert int(falls.min()) < iters, "a test that could have failed"
    exact(reached, heights.gather(0, falls[None])[0], atol=1e-8)
    assert (found.residuals.diff(dim=0) <= 0).all()
    exact(found.score, modes.denoise(draw.a * z + draw.s * found.noise, draw.t, text), atol=1e-10)


@pytest.mark.parametrize("solver", SINGLE)
def test_keep_best_costs_nothing_where_nothing_overshoots(solver, affine):
    z, z_source = normal(2, *SHAPE, seed=4), normal(2, *SHAPE, seed=5)
    draw, plain, safe = draw_at([300, 500], normal(2, *SHAPE, seed=6)), [], []
    for record, keep_best in ((plain, False), (safe, True)):
        ids(affine.denoise, z, draw, affine.request(z_source), solver=solver, history=record, keep_best=keep_best)
    assert (safe[0].evaluations, safe[0].backwards) == (plain[0].evaluations, plain[0].backwards)
    exact(safe[0].noise, plain[0].noise)
    exact(safe[0].residuals, plain[0].residuals)


@pytest.mark.parametrize("solver", SINGLE)
def test_a_sample_stops_once_its_residual_is_small(solver, affine):
    z, draw = normal(2, *SHAPE, seed=5), draw_at([100, 900], normal(2, *SHAPE, seed=6))
    text, size = repeat(affine.source, 2), z.flatten(1).norm(dim=1)
    start = fpr(affine.denoise, z, draw, text, 1, solver=solver).residuals[0] / size
    stop = float(start.sort().values.mean())  # between the two
    early, late = start.argmin(), start.argmax()
    found = fpr(affine.denoise, z, draw, text, 2, solver=solver, stop=stop)
    plain = fpr(affine.denoise, z, draw, text, 2, solver=solver)
    assert torch.equal(found.noise[early], draw.noise[early]) and found.iterations[early] == 0
    exact(found.noise[late], plain.noise[late])
    assert found.evaluations == plain.evaluations - (1 if SOLVERS[solver].null else 2)
    assert found.residuals[1, early] == found.residuals[0, early]


@pytest.mark.parametrize("solver", SINGLE)
@pytest.mark.parametrize("keep_best", [False, True])
def test_steps_outside_the_range_are_left_alone(solver, keep_best, modes):
    z, draw = normal(4, *SHAPE, seed=5), draw_at([299, 300, 700, 701], normal(4, *SHAPE, seed=6))
    options = {"solver": solver, "keep_best": keep_best}
    found = fpr(modes.denoise, z, draw, modes.source, t_range=(300, 700), **options)
    whole = fpr(modes.denoise, z, draw, modes.source, **options)
    assert torch.equal(found.noise[::3], draw.noise[::3]) and found.residuals[:, ::3].isnan().all()
    exact(found.noise[1:3], whole.noise[1:3])
    none = fpr(modes.denoise, z, draw, modes.source, t_range=(400, 500), solver=solver)
    assert torch.equal(none.noise, draw.noise) and none.evaluations == none.backwards == 0


@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"stop": 0.5}, {"sphere": True}])
def test_by_level_asks_nobody_below_step_300_picard_up_to_700_and_polyak_beyond(options, modes):
    steps = [700, 100, 300, 299, 699, 950]
    z, noise = normal(6, *SHAPE, seed=5), normal(6, *SHAPE, seed=6)
    draw, text = draw_at(steps, noise), repeat(modes.source, 6)
    found = fpr(modes.denoise, z, draw, text, 3, solver="by_level", **options)
    assert torch.equal(found.noise[[1, 3]], noise[[1, 3]]) and found.iterations[[1, 3]].tolist() == [0, 0]
    for solver, rows in (("picard_null", [2, 4]), ("grad_polyak", [0, 5])):
        picked = torch.tensor(rows)
        part = fpr(modes.denoise, z[picked], draw.pick(picked), pick(text, picked), 3, solver=solver, **options)
        for name in ("noise", "iterations"):
            assert torch.equal(getattr(found, name)[picked], getattr(part, name))
        made = len(part.residuals)
        assert torch.equal(found.residuals[:made, picked], part.residuals)
        assert torch.equal(found.rms[: made + 1, picked], part.rms)
        assert not torch.equal(found.noise[picked], noise[picked])
    assert found.residuals.shape == (3, 6) and found.rms.shape == (4, 6)
    assert (found.score is not None) == bool(options.get("keep_best"))


def test_by_level_needs_a_null_text_and_knows_mistakes(modes):
    z, draw = normal(1, *SHAPE, seed=5), draw_at([500], normal(1, *SHAPE, seed=6))
    with pytest.raises(InputError, match="asks for the null text"):
        fpr(modes.mixture, z, draw, modes.source, solver="by_level")
    with pytest.raises(InputError, match="fpr iters"):
        fpr(modes.denoise, z, draw, modes.source, -1, solver="by_level")


# --------------------------------------------------------------------------------------------------------- the account
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [SCALE, 1.0])
@pytest.mark.parametrize(
    "options", [{}, {"keep_best": True}, {"stop": 0.9}, {"t_range": (400, 800)}, {"keep_best": True, "stop": 0.9}]
)
def test_evaluations_and_backward_passes_are_counted_truly(solver, scale, options, modes):
    z, z_source = normal(4, *SHAPE, seed=4), normal(4, *SHAPE, seed=5)
    draw = draw_at([100, 500, 700, 900], normal(4, *SHAPE, seed=6))
    network, history = Counting(modes.mixture), []
    denoise = guided(network, modes.null, scale)
    found = fpr(denoise, z_source, draw, modes.source, 3, 1.0, solver, **options)
    assert (found.evaluations, found.backwards) == (network.rows["forward"], network.rows["back"])
    assert found.cost == found.evaluations + BACKWARD * found.backwards
    network.rows.clear()
    ids(denoise, z, draw, modes.request(z_source), 3, 1.0, solver, history, **options)
    assert (history[0].evaluations, history[0].backwards) == (network.rows["forward"], network.rows["back"])


def test_the_published_step_costs_16_9_evaluations_and_two_picard_steps_6(modes):
    z, draw = normal(1, *SHAPE, seed=4), draw_at([500], normal(1, *SHAPE, seed=6))
    costs = {}
    for solver, iters in (("grad", 3), ("grad_polyak", 3), ("picard_null", 2), ("picard_null", 3), ("grad", 0)):
        ids(modes.denoise, z, draw, modes.request(z), iters, solver=solver, history=(history := []))
        costs[solver, iters] = history[0].cost
    assert costs == pytest.approx(
        {
            ("grad", 3): 16.9,
            ("grad_polyak", 3): 16.9,
            ("picard_null", 2): 6,
            ("picard_null", 3): 7,
            ("grad", 0): 4,
        }
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"stop": 0.9, "sphere": True}])
def test_a_batch_is_its_samples(solver, options, modes):
    z, draw = normal(3, *SHAPE, seed=5), draw_at([300, 700, 850], normal(3, *SHAPE, seed=6))
    together = fpr(modes.denoise, z, draw, modes.source, 4, 1.0, solver, **options)
    spent = 0
    for row in range(3):
        one = torch.tensor([row])
        alone = fpr(modes.denoise, z[one], draw.pick(one), modes.source, 4, 1.0, solver, **options)
        exact(together.noise[one], alone.noise, atol=1e-9)
        made = len(alone.residuals)
        exact(together.residuals[:made, one], alone.residuals, atol=1e-9)
        exact(together.rms[:made, one], alone.rms[:made], atol=1e-9)
        assert together.iterations[row] == alone.iterations[0]
        spent += alone.evaluations
    assert together.evaluations == spent


def test_the_history_tells_what_the_noise_has_become(modes):
    z, draw = normal(2, *SHAPE, seed=5), draw_at([500, 700], normal(2, *SHAPE, seed=6))
    found = fpr(modes.denoise, z, draw, modes.source, 2, solver="picard_null")
    way = [fpr(modes.denoise, z, draw, modes.source, n, solver="picard_null").noise for n in range(3)]
    for name, column in zip(("rms", "kurtosis", "autocorrelation"), zip(*map(moments, way), strict=True), strict=True):
        exact(getattr(found, name), torch.stack(column))
    exact(found.trail, torch.stack(way))


@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"stop": 0.3}, {"t_range": (400, 600)}])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_trail_leads_from_the_drawn_noise_to_the_refined(solver, options, modes):
    z, draw = normal(3, *SHAPE, seed=5), draw_at([200, 500, 800], normal(3, *SHAPE, seed=6))
    found = fpr(modes.denoise, z, draw, modes.source, 3, 1.0, solver, **options)
    assert torch.equal(found.trail[0], draw.noise) and torch.equal(found.trail[-1], found.noise)
    exact(found.rms, found.trail.square().mean((2, 3, 4)).sqrt())


def test_moments_of_white_noise_and_of_a_chequerboard():
    white = torch.randn(2, 4, 128, 128, generator=seeded())
    rms, kurtosis, together = moments(white)
    se = 1 / math.sqrt(white[0].numel())
    assert (rms - 1).abs().max() < 4 * se and (kurtosis - 3).abs().max() < 4 * math.sqrt(24) * se
    assert together.abs().max() < 4 * se
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().mul(4).sub(2).expand(1, 3, 8, 8)
    assert [float(m) for m in moments(board)] == pytest.approx([2, 1, -1], abs=1e-6)
    assert [float(m) for m in moments(torch.ones(1, 1, 1, 1))] == pytest.approx([1, 0, 0])


# ------------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "picard-null"}, "solver: 'picard-null' is not known; choose one of grad, "),
        ({"iters": -1}, "fpr iters: found -1"),
        ({"lam": -0.5}, "fpr lambda: found -0.5"),
        ({"lam": math.nan}, "fpr lambda: found nan"),
        ({"stop": -1.0}, "fpr stop: found -1.0"),
    ],
)
def test_mistakes_are_named(options, words, modes):
    z, draw = normal(1, *SHAPE, seed=5), draw_at([500], normal(1, *SHAPE, seed=6))
    with pytest.raises(InputError, match=words):
        fpr(modes.denoise, z, draw, modes.source, **options)


@pytest.mark.parametrize("solver", NULL)
def test_a_denoiser_without_null_text_is_told_apart(solver, modes):
    z, draw = normal(1, *SHAPE, seed=5), draw_at([500], normal(1, *SHAPE, seed=6))
    with pytest.raises(InputError, match="asks for the null text"):
        fpr(modes.mixture, z, draw, modes.source, solver=solver)


# ------------------------------------------------------------------------------------------------------ half precision
@pytest.mark.parametrize("solver", SINGLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_serve_single_precision_latents(solver, dtype, modes):
    def network(x, t, text):
        # As Prior.denoise does: the network's own type inside, the caller's outside.
        return (0.4 * x.to(dtype)).to(x.dtype) + 0 * text.embeds.sum((1, 2)).view(-1, 1, 1, 1)

    null = modes.null._replace(embeds=torch.zeros(1, 1, 1))
    z, noise = (torch.randn(2, 4, 8, 8, generator=seeded(s)) for s in (1, 2))
    found = fpr(guided(network, null, 3.0), z, draw_at([300, 700], noise), null, solver=solver, keep_best=True)
    assert found.noise.dtype == torch.float32 and found.noise.isfinite().all() and not torch.equal(found.noise, noise)


@pytest.mark.parametrize("solver", SINGLE)
def test_an_overflow_costs_its_sample_the_steps_and_nothing_else(solver, modes):
    z, draw = normal(2, *SHAPE, seed=5), draw_at([300, 700], normal(2, *SHAPE, seed=6))

    def overflowing(x, t, text):
        return torch.where((t == 300).view(-1, 1, 1, 1), math.inf, modes.mixture(x, t, text))

    for keep_best in (False, True):
        denoise = guided(overflowing, modes.null, SCALE)
        found = fpr(denoise, z, draw, modes.source, 2, solver=solver, keep_best=keep_best)
        assert torch.equal(found.noise[0], draw.noise[0])
        expected = fpr(modes.denoise, z, draw, modes.source, 2, solver=solver, keep_best=keep_best)
        exact(found.noise[1], expected.noise[1])
