"""Diagnostics on the exact denoiser of Gaussians, where drift, gradients and edits are known in closed form."""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from mixtures import SCALE, SHAPE, WIDTH, Affine, Modes, exact, normal, seeded

from splatedit import diagnostics
from splatedit.diagnostics import Subject
from splatedit.diffusion import guided, repeat
from splatedit.errors import InputError
from splatedit.fpr import BACKWARD, SOLVERS

PROMPTS = ("", "source", "target")


class ToyPrior:
    """As much of a Prior as an edit of latents asks for, around the exact denoiser of a mixture."""

    def __init__(self, toy):
        self.toy, self.alphas_cumprod, self.evaluations = toy, toy.mixture.alphas_cumprod, 0

    def text(self, prompts):
        (prompt,) = prompts
        return getattr(self.toy, prompt or "null")

    def null(self, b=1):
        return repeat(self.toy.null, b)

    def default_scale(self, guidance):
        return SCALE

    def check_scale(self, scale):
        pass

    def denoise(self, x, t, text):
        self.evaluations += len(x)
        return self.toy.mixture(x, t, text)

    def decode(self, z):
        pixels = (z[:, :1].sigmoid()).expand(-1, 3, -1, -1)
        return pixels.repeat_interleave(8, 2).repeat_interleave(8, 3)

    def encode(self, pictures):
        return pictures[:, :2, ::8, ::8].logit()


def subject(toy, views=2, target="target", seed=5):
    return Subject(ToyPrior(toy), "source", target, latents=normal(views, *SHAPE, seed=seed))


def spreads(toy, t):
    """a, s and the variance a^2 v + s^2 of x_t."""
    power = toy.mixture.alphas_cumprod[t]
    return power.sqrt(), (1 - power).sqrt(), power * WIDTH + 1 - power


def rows_of(table, **wanted):
    return [row for row in table.rows if all(row[key] == value for key, value in wanted.items())]


def test_drift_of_one_gaussian_in_closed_form():
    """z - zhat = (s^2 (z - m) - a s v e) / (a^2 v + s^2), and each iteration of picard shrinks it by s^2 / (same)."""
    toy = Affine()
    one = subject(toy)
    table = diagnostics.drift(one, seeded(1), steps=(300, 700), solvers=("picard",), iters=4, draws=2)
    assert len(table.rows) == 2 * 2 * 5 * 2
    for t, number, draw in one.draws((300, 700), 2, seeded(1)):
        a, s, variance = spreads(toy, t)
        first = (s**2 * (one.z - toy.mean(toy.source_mean)) - a * s * WIDTH * draw.noise) / variance
        for view in range(2):
            expected = first[view].norm() / one.z[view].norm()
            for row in rows_of(table, t=t, draw=number, view=view):
                known = float(expected * (s**2 / variance) ** row["iteration"])
                assert row["drift"] == pytest.approx(known, rel=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_costs_are_the_evaluations_counted(solver):
    """By a counter in the denoiser for rows forward, by one in autograd for rows back."""
    toy = Modes()
    one, back = subject(toy, views=3), []

    def network(x, t, text):
        out = toy.mixture(x, t, text)
        if out.requires_grad:
            out.register_hook(lambda grad: back.append(len(grad)))
        return out

    denoise = guided(one.prior.denoise, toy.null, SCALE)
    table = diagnostics.drift(one, seeded(1), steps=(500,), solvers=(solver,), iters=2)
    priced = diagnostics.cost_versus_drift(table)
    for iters in (1, 2):
        counted, before = denoise._replace(network=lambda *x: one.prior.denoise(*x)), one.prior.evaluations
        (_, _, draw), *_ = one.draws((500,), 1, seeded(1))
        diagnostics.fpr(counted, one.z, draw, one.source_text, iters, 1.0, solver)
        forwards = (one.prior.evaluations - before) / 3
        back.clear()
        diagnostics.fpr(denoise._replace(network=network), one.z, draw, one.source_text, iters, 1.0, solver)
        (row,) = rows_of(priced, solver=solver, iteration=iters)
        assert row["forwards"] == forwards and row["backwards"] == sum(back) / 3
        assert row["cost"] == forwards + BACKWARD * sum(back) / 3
        assert (
            row["cost"]
            == {"picard_null": 1, "anderson": 1, "by_level": 1, "picard": 2}.get(solver, 2 * (1 + BACKWARD)) * iters
        )


def test_front_is_what_nothing_beats():
    table = diagnostics.drift(subject(Modes()), seeded(1), steps=(300, 500), iters=2)
    rows = diagnostics.cost_versus_drift(table).rows
    assert any(row["on_front"] for row in rows) and not all(row["on_front"] for row in rows)
    for row in rows:
        beaten = any(
            o["cost"] <= row["cost"]
            and o["drift"] <= row["drift"]
            and (o["cost"], o["drift"]) != (row["cost"], row["drift"])
            for o in rows
        )
        assert row["on_front"] == (not beaten)
    only = diagnostics.cost_versus_drift(table, steps=(300,)).rows
    known = [row["drift"] for row in rows_of(table, solver="grad", iteration=2, t=300)]
    assert rows_of(diagnostics.Table("", "", "", only), solver="grad", iteration=2)[0]["drift"] == sum(known) / len(
        known
    )


def test_residuals_are_those_of_the_text_iterated_on():
    """For picard the guided source prompt, so its residuals are its drift; for picard_null not."""
    one = subject(Modes())
    options = {"steps": (500,), "draws": 2, "iters": 3}
    curves = diagnostics.residual_curves(one, seeded(1), solvers=("picard", "picard_null"), **options)
    drift = diagnostics.drift(one, seeded(1), solvers=("picard", "picard_null"), **options)
    for solver in ("picard", "picard_null"):
        for k in range(3):
            left, right = (
                torch.tensor([row[key] for row in rows_of(table, solver=solver, iteration=k)])
                for table, key in ((curves, "residual"), (drift, "drift"))
            )
            assert torch.allclose(left, right, rtol=1e-5, atol=0) == (solver == "picard")


def test_posterior_mean_pictures_are_the_mixtures_own():
    toy = Modes()
    one = subject(toy, views=2)
    one.scale = 1.0  # where the guided posterior mean is the mixture's
    table = diagnostics.posterior_means(one, seeded(1), steps=(300, 700), iters=2)
    assert table.pictures.shape == (2, 2, 3, 3, 16, 24)
    exact(table.pictures[:, 0, 0], one.decode(one.z))
    for column, (_, _, draw) in enumerate(one.draws((300, 700), 1, seeded(1)), 1):
        mean, _ = toy.mixture.posterior(draw.noised(one.z), draw.t, one.source_text)
        exact(table.pictures[:, 0, column], one.decode(mean), atol=1e-10)
        known = (mean - one.z).flatten(1).norm(dim=1) / one.z.flatten(1).norm(dim=1)
        found = [row["drift"] for row in rows_of(table, noise="random", t=(300, 700)[column - 1])]
        exact(torch.tensor(found, dtype=known.dtype), known, atol=1e-10)


def test_no_gradient_where_the_target_is_the_source():
    names = ("dds", "pds", "dreamcatalyst", "ids")
    table = diagnostics.gradient_maps(subject(Modes(), target="source"), seeded(1), guidances=names, draws=2)
    assert table.pictures.shape == (4, 3, 2, 2, 3)
    exact(table.pictures, torch.zeros_like(table.pictures), atol=1e-12)
    pulled = diagnostics.gradient_maps(subject(Modes()), seeded(1), guidances=names, draws=2)
    assert (pulled.pictures.flatten(2).amax(2) > 1e-3).all()


def test_gradient_map_of_dds_between_gaussians():
    """At the source it is s a / (a^2 v + s^2) times the guided difference of means, whatever the noise."""
    toy = Affine()
    table = diagnostics.gradient_maps(subject(toy), seeded(1), guidances=("dds", "ids"), steps=(500,), draws=2)
    a, s, variance = spreads(toy, 500)
    pull = s * a / variance * SCALE * (toy.source_mean - toy.target_mean)
    for found in table.pictures.flatten(0, 2):
        exact(found, pull.norm(dim=0), atol=1e-9)
    for row in table.rows:
        assert row["rms"] == pytest.approx(float(pull.square().mean().sqrt()), rel=1e-9)


def test_maps_over_pictures_end_at_one():
    maps = torch.rand(2, 3, 4, 5, generator=seeded())
    large = diagnostics.over_picture(maps, (32, 40))
    assert large.shape == (2, 3, 32, 40)
    exact(large.flatten(2).amax(2), torch.ones(2, 3), atol=1e-6)
    assert float(diagnostics.over_picture(torch.zeros(1, 2, 2), (4, 4)).max()) == 0


def test_edits_between_gaussians_come_back_to_where_they_began():
    """Scores are affine: with the same noise levels both ways, back is the way there with the sign changed."""
    toy, steps, rate = Affine(), 8, 0.3
    one = subject(toy)
    options = {"guidances": ("dds", "pds", "ids", "sds"), "steps": steps, "rate": rate, "timesteps": "annealed"}
    table = diagnostics.invertibility(one, seeded(1), **options)
    left = 1.0
    for k in range(steps):
        a, s, variance = spreads(toy, round(950 - k / (steps - 1) * 900))
        left *= 1 - rate * float(s * a / variance)
    way = (1 - left) * SCALE * float((toy.target_mean - toy.source_mean).norm())
    for row in table.rows:
        if row["guidance"] == "sds":
            assert row["distance"] > 0.05
            continue
        assert row["distance"] < 1e-9 and row["psnr"] > 100 and row["ssim"] > 1 - 1e-9
        if row["guidance"] in ("dds", "ids"):
            assert row["moved"] == pytest.approx(way / float(one.z[row["view"]].norm()), rel=1e-9)
    assert table.pictures.shape == (4, 2, 3, 3, 16, 24)


@pytest.mark.parametrize("reachable", [True, False])
def test_lpips_is_a_column_where_it_can_be_had(reachable, monkeypatch):
    """The package takes pictures in [-1, 1], and asks the network for its weights when it is first used."""

    class Network:
        def __init__(self, net, verbose):
            if not reachable:
                raise OSError("no route to host")

        def to(self, device):
            return self

        def __call__(self, a, b):
            assert float(a.min()) >= -1 and float(b.max()) <= 1
            return (a - b).abs().mean() / 2

    module = ModuleType("lpips")
    module.LPIPS, module.__spec__ = Network, ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", module)
    table = diagnostics.invertibility(subject(Modes()), seeded(1), guidances=("dds",), steps=2)
    assert ("lpips" in table.columns) == reachable
    if reachable:
        for row, (source, _, back) in zip(table.rows, table.pictures[0], strict=True):
            assert row["lpips"] == pytest.approx(float((source - back).abs().mean()), rel=1e-5)


def test_sweep_begins_with_dds():
    one = subject(Modes())
    options = {"lams": (0.0, 1.0, 30.0), "iters": (0, 2), "steps": 4, "rate": 0.1}
    table = diagnostics.sweep(one, seeded(1), **options)
    edits = {(lam, n): rows_of(table, lam=lam, iters=n) for lam, n in ((0.0, 0), (0.0, 2), (1.0, 2), (30.0, 2))}
    assert len(table.rows) == 2 * 4
    z, _ = diagnostics.distilled(one, seeded(1), diagnostics.Method("dds", anneal=0.0), steps=4, rate=0.1)
    # `sweep` draws noise for the margins of the source first, then goes back to the state it was given.
    for view, (row, still) in enumerate(zip(edits[0.0, 0], edits[0.0, 2], strict=True)):
        assert row["distance"] == pytest.approx(diagnostics.distance(z[view], one.z[view]), rel=1e-12)
        assert still["distance"] == pytest.approx(row["distance"], rel=1e-9)
    assert edits[1.0, 2][0]["distance"] != edits[0.0, 0][0]["distance"]


def test_same_seed_same_rows():
    for _ in range(2):
        first, second = (
            [
                diagnostics.drift(subject(Modes()), seeded(3), steps=(500,)).rows,
                diagnostics.invertibility(subject(Modes()), seeded(3), guidances=("ids",), steps=3).rows,
            ]
            for _ in range(2)
        )
        assert first == second


def test_averages_and_their_errors():
    rows = [{"a": "x", "v": value} for value in (1.0, 2.0, 6.0, math.nan)] + [{"a": "y", "v": 5.0}]
    x, y = diagnostics.averaged(rows, ("a",), ("v",))
    assert x["a"] == "x" and x["v"] == 3.0 and x["n"] == 4
    assert x["v_se"] == pytest.approx(math.sqrt(7 / 3))
    assert y["v"] == 5.0 and math.isnan(y["v_se"])


def test_iterations_show_what_drift_measures():
    """The same draw as `drift` at that step: the same numbers; and the pictures are the decoded posterior means."""
    one, solvers = subject(Modes()), ("grad", "picard_null")
    table = diagnostics.iterations(one, seeded(3), t=700, solvers=solvers, iters=2)
    drift = diagnostics.drift(one, seeded(3), steps=(700,), solvers=solvers, iters=2)
    plain = one.decode(one.z)
    assert len(table.rows) == len(drift.rows) == 2 * 2 * 3 and table.pictures.shape[:3] == (2, 2, 4)
    for row, known in zip(table.rows, drift.rows, strict=True):
        for key in ("solver", "t", "view", "iteration", "drift", "rms", "kurtosis"):
            assert row[key] == known[key]
        strip = table.pictures[row["view"], solvers.index(row["solver"])]
        assert torch.equal(strip[0], plain[row["view"]])
        error = (strip[row["iteration"] + 1] - plain[row["view"]]).square().mean()
        assert row["psnr"] == pytest.approx(-10 * math.log10(float(error)), rel=1e-6)


def test_a_notebook_shows_rows_as_a_table_and_a_table_as_its_figure():
    rows = [{"solver": "grad", "v": value} for value in (1.0, 2.0)] + [{"solver": "picard_null", "v": 0.123456}]
    expected = [
        "| solver      | v         |",
        "|-------------|-----------|",
        "| grad        | 1.5 ± 0.5 |",
        "| picard_null | 0.1235    |",
    ]
    found = diagnostics.averaged(rows, ("solver",), ("v",))
    assert found._repr_markdown_().splitlines() == repr(found).splitlines() == expected
    assert repr(diagnostics.Rows([{"|r|": 2}])).splitlines()[0] == r"| \|r\| |"
    assert found[0]["v"] == 1.5 and repr(diagnostics.Rows()) == "(no rows)"
    assert diagnostics.with_error({"v": 12.9, "v_se": 1.3e-15}, "v") == "12.9", "rounding is no error"
    table = diagnostics.drift(subject(Affine()), seeded(), steps=(300,), solvers=("picard",), iters=1)
    assert table._repr_png_().startswith(b"\x89PNG")
    assert repr(table).startswith("<Table 'drift', 4 rows of solver, t, draw, view, ")


def test_pictures_become_latents():
    pictures = torch.rand(2, 3, 16, 24, generator=seeded(), dtype=torch.float64).clamp(0.1, 0.9)
    one = Subject(ToyPrior(Affine()), "source", pictures=pictures)
    exact(one.z, pictures[:, :2, ::8, ::8].logit())
    assert one.target == "source"


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda one: Subject(one.prior, "source"), "one of the two"),
        (lambda one: Subject(one.prior, "source", latents=one.z[0]), r"found latents \(2, 2, 3\)"),
        (lambda one: diagnostics.drift(one, seeded(), solvers=("newton",)), "'newton' is not known"),
        (lambda one: diagnostics.drift(one, seeded(), steps=(1200,)), "steps: found"),
        (lambda one: diagnostics.drift(one, seeded(), draws=0), "draws: found 0"),
        (lambda one: diagnostics.residual_curves(one, seeded(), iters=0), "iters: found 0"),
        (lambda one: diagnostics.gradient_maps(one, seeded(), guidances=("dda",)), "'dda' is not known"),
        (lambda one: diagnostics.invertibility(one, seeded(), guidances=("dds",), rate=-1.0), "found 200 and -1.0"),
    ],
)
def test_mistakes_are_told(act, words):
    with pytest.raises(InputError, match=words):
        act(subject(Affine()))


def test_every_table_has_its_figure():
    from splatedit.figures import FIGURES, svg

    one, drift = subject(Modes()), diagnostics.drift(subject(Modes()), seeded(), steps=(300, 700), iters=2)
    tables = [
        drift,
        diagnostics.cost_versus_drift(drift),
        diagnostics.residual_curves(one, seeded(), steps=(300, 700), iters=3),
        diagnostics.posterior_means(one, seeded(), steps=(300, 700)),
        diagnostics.iterations(one, seeded(), solvers=("grad", "picard"), iters=2),
        diagnostics.gradient_maps(one, seeded(), guidances=("sds", "dds"), steps=(300, 700)),
        diagnostics.sweep(one, seeded(), lams=(1.0, 3.0), iters=(0, 1), steps=2),
        diagnostics.invertibility(one, seeded(), guidances=("dds", "ids"), steps=2),
    ]
    assert {table.name for table in tables} == set(FIGURES)
    for table in tables:
        drawn = svg(table.figure())
        assert drawn.startswith(b"<?xml") and len(drawn) > 5000
        assert {*table.rows[0]} == {*table.columns} and all({*row} == {*table.columns} for row in table.rows)
    assert svg(tables[0].figure()) == svg(tables[0].figure())


def test_a_figure_as_pixels_and_as_a_notebook_shows_it():
    from splatedit.figures import new, pixels, png

    figure, ((axes,),) = new(1, 1, 2, 1)
    axes.set_position((0, 0, 1, 1))
    axes.set_facecolor("red")
    shown = pixels(figure, dpi=50)
    assert shown.shape == (50, 100, 3) and shown.dtype == "uint8" and shown[25, 50].tolist() == [255, 0, 0]
    assert figure._repr_png_() == png(figure)
