"""What a prior makes of a source, laid open: drift of the posterior mean, FPR and its price, where gradients pull, and
whether an edit can be undone.

Every function takes a Subject and a generator of all its randomness, and returns a Table: tidy rows (one observation
each, down to the single view and draw), which `pandas.DataFrame(table.rows)` takes as they are, and `table.figure()`,
as which a notebook shows it.
`averaged` takes means over views and draws. The same subject and seed give the same rows bit for bit on a CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from splatedit.diffusion import SMALLEST, Draw, Guided, Text, denoising_errors, guided, repeat, with_noise
from splatedit.distilling import Distiller, Method
from splatedit.errors import InputError
from splatedit.fpr import BACKWARD, SOLVERS, fpr, moments
from splatedit.guidance import GUIDANCE, Request
from splatedit.images import SGD_STEP
from splatedit.metrics import psnr, ssim
from splatedit.page import show
from splatedit.tuning import bind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from splatedit.priors import Prior

STEPS = (100, 300, 500, 700, 850)  # of a schedule of 1000; scaled to the length of another
EDITS = ("dds", "cds", "pds", "ids")
Row = dict[str, Any]


class Subject:
    """What is looked at: latents of a picture or of a scene's views, what they show, and the model that is asked.

    latents: (b, c, h, w); pictures: (b, 3, h, w) in [0, 1], from which latents are made; one of the two. scale: of
    classifier-free guidance; None is what suits model and guidance. Raises InputError.
    """

    def __init__(
        self,
        prior: Prior,
        source: str,
        target: str | None = None,
        *,
        latents: Tensor | None = None,
        pictures: Tensor | None = None,
        scale: float | None = None,
    ):
        if (latents is None) == (pictures is None):
            raise InputError("subject: give latents (b, c, h, w) or pictures (b, 3, h, w), one of the two.")
        self.prior, self.source, self.target, self.scale = prior, source, source if target is None else target, scale
        if latents is None:
            assert pictures is not None
            with torch.no_grad():
                latents = torch.cat([prior.encode(one[None]) for one in pictures])  # so that views do not matter
        self.z = latents.detach()
        if self.z.ndim != 4 or not len(self.z) or not bool(self.z.isfinite().all()):
            raise InputError(f"subject: found latents {tuple(self.z.shape)}, expected finite numbers (b, c, h, w).")

    def denoise(self, guidance: str = "ids") -> Guided:
        """The guided model, at the scale that suits a key of `guidance.GUIDANCE`."""
        scale = Method(guidance, self.scale).scale(self.prior)
        return guided(self.prior.denoise, self.prior.null(1), scale)

    @cached_property
    def source_text(self) -> Text:
        return repeat(self.prior.text([self.source]), len(self.z))

    @cached_property
    def target_text(self) -> Text:
        return repeat(self.prior.text([self.target]), len(self.z))

    def steps(self, steps: Iterable[int]) -> list[int]:
        """Steps of a schedule of 1000 as steps of this one; raises InputError for those that it has not."""
        table = self.prior.alphas_cumprod
        found = [round(t * len(table) / 1000) for t in steps]
        last = int((table >= SMALLEST).sum()) - 1
        if not found or min(found) < 0 or max(found) > last:
            raise InputError(
                f"steps: found {list(steps)}, expected numbers from 0 to {math.floor(1000 * last / len(table))}."
            )
        return found

    def draws(self, steps: Iterable[int], count: int, generator: torch.Generator) -> list[tuple[int, int, Draw]]:
        """(t, number, Draw) for `count` draws of noise at each step; every view has noise of its own."""
        if count < 1:
            raise InputError(f"draws: found {count}, expected 1 or more.")
        filled = [(t, i, torch.full((len(self.z),), t)) for t in self.steps(steps) for i in range(count)]
        return [(t, i, with_noise(self.prior.alphas_cumprod, at, self.z, generator)) for t, i, at in filled]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) of latents, one by one, so that how many there are changes no bit."""
        return torch.cat([self.prior.decode(one[None]) for one in z])


class Rows(list[Row]):
    """Rows with the same keys, which a notebook and a terminal show as a table."""

    def __repr__(self) -> str:
        if not self:
            return "(no rows)"
        columns = headings(self)
        lines = [
            [name.replace("|", "\\|") for name in columns],
            *([with_error(row, c) for c in columns] for row in self),
        ]
        wide = [max(len(line[k]) for line in lines) for k in range(len(columns))]
        text = ["| " + " | ".join(cell.ljust(n) for cell, n in zip(line, wide, strict=True)) + " |" for line in lines]
        return "\n".join([text[0], "|" + "|".join("-" * (n + 2) for n in wide) + "|", *text[1:]])

    _repr_markdown_ = __repr__


def headings(rows: Sequence[Row]) -> list[str]:
    """The columns worth reading: standard errors stand beside their means, and n is the same for all."""
    return [name for name in rows[0] if name != "n" and not name.endswith("_se")]


def with_error(row: Row, name: str) -> str:
    """A value to four digits, and its standard error if it has one that is more than rounding."""
    error = row.get(f"{name}_se", math.nan)
    value = show(row[name])
    return value if math.isnan(error) or error <= 1e-12 * abs(row[name]) else f"{value} ± {error:.2g}"


class Table(NamedTuple):
    """What a diagnosis found."""

    name: str  # a key of figures.FIGURES
    title: str
    says: str  # what the columns and the figure mean
    rows: list[Row]  # all with the same keys
    pictures: Tensor | None = None  # what a figure shows beside numbers; its shape is told by the function that made it

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    def figure(self) -> Figure:
        """A matplotlib figure, not attached to any window; raises InputError if matplotlib is not installed."""
        from splatedit.figures import FIGURES

        return FIGURES[self.name](self)

    def __repr__(self) -> str:
        return f"<Table {self.name!r}, {len(self.rows)} rows of {', '.join(self.columns)}>"

    def _repr_png_(self) -> bytes:
        from splatedit.figures import png

        return png(self.figure())


def averaged(rows: Sequence[Row], by: Sequence[str], values: Sequence[str]) -> Rows:
    """Means over the rows that agree in the columns `by`, NaN left out; `<value>_se` is the standard error, and n."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    return Rows({**dict(zip(by, key, strict=True)), **spread(group, values)} for key, group in groups.items())


def spread(group: Sequence[Row], values: Sequence[str]) -> Row:
    """Mean and standard error of each value over rows."""
    found: Row = {}
    for name in values:
        numbers = [float(row[name]) for row in group if not math.isnan(row[name])]
        mean = sum(numbers) / len(numbers) if numbers else math.nan
        wide = sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1) if len(numbers) > 1 else math.nan
        found |= {name: mean, f"{name}_se": math.sqrt(wide / len(numbers)) if len(numbers) > 1 else math.nan}
    return {**found, "n": len(group)}


# ------------------------------------------------------------------------------------------------ drift and its price
def drift(
    subject: Subject,
    generator: torch.Generator,
    *,
    steps: Sequence[int] = STEPS,
    solvers: Sequence[str] = tuple(SOLVERS),
    iters: int = 3,
    lam: float = 1.0,
    draws: int = 1,
) -> Table:
    """Posterior-mean drift |z - zhat| / |z| of random noise (iteration 0) and after each iteration of each FPR solver.

    Of the guided score under the source prompt, whatever the solver iterates on, and with the same draws for all. Rows:
    solver, t, draw, view, iteration; drift; rms, kurtosis and lag-1 autocorrelation of the noise (1, 3, 0 if white);
    forwards, backwards and cost: network rows spent on the search for this view (cost: a backward counts BACKWARD).
    """
    for solver in solvers:
        check_solver(solver)
    denoise, rows = subject.denoise(), []
    for t, number, draw in subject.draws(steps, draws, generator):
        for solver in solvers:
            for iteration, found in enumerate(path(subject, denoise, draw, solver, iters, lam)):
                rows += [
                    {"solver": solver, "t": t, "draw": number, "view": view, "iteration": iteration, **one}
                    for view, one in enumerate(found)
                ]
    says = (
        "How far the posterior mean of the noised source lies from the source, as a share of its length, under the "
        "guided source prompt: for noise as drawn (iteration 0), and after each iteration of each solver. rms 1 and "
        "kurtosis 3 are those of the noise that the model was trained on."
    )
    return Table("drift", "Posterior-mean drift", says, rows)


def path(subject: Subject, denoise: Guided, draw: Draw, solver: str, iters: int, lam: float) -> list[list[Row]]:
    """Drift, moments and price of the noise before the first and after each iteration, for each view."""
    search = fpr(denoise, subject.z, draw, subject.source_text, iters, lam, solver)
    whole, found = max(iters, 1) * len(subject.z), []
    for k, noise in enumerate(search.trail):
        shares = drifts(subject, denoise, draw._replace(noise=noise)).tolist()
        shape = [part.tolist() for part in moments(noise)]
        # Nothing here stops a search early, so that every iteration costs the same.
        price = {"forwards": search.evaluations * k / whole, "backwards": search.backwards * k / whole}
        price["cost"] = price["forwards"] + BACKWARD * price["backwards"]
        names = ("drift", "rms", "kurtosis", "autocorrelation")
        found.append([{**dict(zip(names, row, strict=True)), **price} for row in zip(shares, *shape, strict=True)])
    return found


def drifts(subject: Subject, denoise: Guided, draw: Draw) -> Tensor:
    """|z - zhat| / |z| of each view (b,) at a draw, under the guided source prompt."""
    size = subject.z.flatten(1).norm(dim=1).clamp_min(1e-12)
    return (subject.z - posterior_mean(subject, denoise, draw)).flatten(1).norm(dim=1) / size


def cost_versus_drift(table: Table, steps: Sequence[int] | None = None) -> Table:
    """From a table of `drift`: mean drift and cost of each solver stopped after each iteration.

    steps: of the schedule, of which to take means; None is all. on_front: no other row is cheaper (or as cheap) and has
    less drift.
    """
    rows = [row for row in table.rows if steps is None or row["t"] in steps]
    means = averaged(rows, ("solver", "iteration"), ("drift", "forwards", "backwards", "cost"))
    kept = [{key: row[key] for key in row if not key.endswith("_se") or key == "drift_se"} for row in means]
    for row in kept:
        better = (other for other in kept if other["cost"] <= row["cost"] and other["drift"] <= row["drift"])
        row["on_front"] = not any((o["cost"], o["drift"]) != (row["cost"], row["drift"]) for o in better)
    says = (
        "What a search costs in rows through the network (one back counts 1.15 forward), and the drift it leaves, "
        "mean over noise levels, views and draws. on_front: nothing cheaper has less drift. Less drift is not yet a "
        "better edit: see the sweep."
    )
    return Table("cost", "Cost versus drift", says, kept)


def residual_curves(
    subject: Subject,
    generator: torch.Generator,
    *,
    steps: Sequence[int] = (300, 500, 700, 850),
    solvers: Sequence[str] = tuple(SOLVERS),
    iters: int = 8,
    lam: float = 1.0,
    draws: int = 1,
) -> Table:
    """What each solver sees of its progress: the residual |z - zhat| under the text it iterates on, by iteration.

    Rows: solver, t, draw, view, iteration; residual before that iteration, as a share of |z|; rms, kurtosis and
    autocorrelation of the noise there. More iterations than an edit makes show who converges, where to, and who leaves.
    """
    for solver in solvers:
        check_solver(solver)
    if iters < 1:
        raise InputError(f"iters: found {iters}, expected 1 or more.")
    denoise, size = subject.denoise(), subject.z.flatten(1).norm(dim=1).clamp_min(1e-12)
    rows: list[Row] = []
    for t, number, draw in subject.draws(steps, draws, generator):
        for solver in solvers:
            found = fpr(denoise, subject.z, draw, subject.source_text, iters, lam, solver)
            parts = (found.residuals / size, found.rms, found.kurtosis, found.autocorrelation)
            names = ("residual", "rms", "kurtosis", "autocorrelation")
            for k in range(iters):
                for view, numbers in enumerate(zip(*(part[k].tolist() for part in parts), strict=True)):
                    here = {"solver": solver, "t": t, "draw": number, "view": view, "iteration": k}
                    rows.append({**here, **dict(zip(names, numbers, strict=True))})
    says = (
        "The residual that a solver works on, as a share of the source's length, before each iteration: under the null "
        "text for picard_null and anderson, else under the guided source prompt. Solved to the end the noise leaves "
        "what the model was trained on (rms far from 1): stopping early is part of the method."
    )
    return Table("residuals", "Residuals", says, rows)


def posterior_means(
    subject: Subject,
    generator: torch.Generator,
    *,
    steps: Sequence[int] = STEPS,
    solver: str = "grad",
    iters: int = 3,
    lam: float = 1.0,
) -> Table:
    """What the model sees in the noised source, as pictures: decoded posterior means of random and of refined noise.

    Rows: noise ("random" or the solver), t, view, drift, and PSNR in dB to the decoded source. pictures: (views, 2,
    steps + 1, 3, h, w) in [0, 1]: random noise above refined; the decoded source first in both rows.
    """
    check_solver(solver)
    denoise, rows, strips = subject.denoise(), [], []
    plain = subject.decode(subject.z)
    for t, _, draw in subject.draws(steps, 1, generator):
        refined = fpr(denoise, subject.z, draw, subject.source_text, iters, lam, solver).noise
        pair = []
        for name, noise in (("random", draw.noise), (solver, refined)):
            now = draw._replace(noise=noise)
            shares, seen = drifts(subject, denoise, now).tolist(), subject.decode(posterior_mean(subject, denoise, now))
            pair.append(seen)
            rows += [
                {"noise": name, "t": t, "view": view, "drift": share, "psnr": psnr(seen[view], plain[view])}
                for view, share in enumerate(shares)
            ]
        strips.append(torch.stack(pair, 1))
    pictures = torch.stack([torch.stack([plain, plain], 1), *strips], 2)
    says = (
        "What the model takes the noised source for: posterior means under the guided source prompt, decoded, for "
        f"random noise and for noise refined by {solver} in {iters} iterations. "
        "Left is the source as the autoencoder sees it."
    )
    return Table("means", "Posterior means", says, rows, pictures)


def iterations(
    subject: Subject,
    generator: torch.Generator,
    *,
    t: int = 500,
    solvers: Sequence[str] = ("grad",),
    iters: int = 3,
    lam: float = 1.0,
) -> Table:
    """How the posterior mean comes nearer to the source, iteration by iteration, at one step t of a schedule of 1000.

    The same draw for all solvers, and the guided source prompt. Rows: solver, t, view, iteration (0: noise as drawn),
    drift, PSNR in dB to the decoded source, rms, kurtosis and autocorrelation of the noise. pictures: (views, solvers,
    iters + 2, 3, h, w) in [0, 1]: the decoded source, then the posterior means.
    """
    for solver in solvers:
        check_solver(solver)
    denoise, plain, rows, strips = subject.denoise(), subject.decode(subject.z), [], []
    ((at, _, draw),) = subject.draws((t,), 1, generator)
    for solver in solvers:
        strips.append([plain])
        for k, noise in enumerate(fpr(denoise, subject.z, draw, subject.source_text, iters, lam, solver).trail):
            now = draw._replace(noise=noise)
            seen, shares = subject.decode(posterior_mean(subject, denoise, now)), drifts(subject, denoise, now)
            strips[-1].append(seen)
            for view, numbers in enumerate(zip(shares.tolist(), *(m.tolist() for m in moments(noise)), strict=True)):
                found = dict(zip(("drift", "rms", "kurtosis", "autocorrelation"), numbers, strict=True))
                rows.append(
                    {"solver": solver, "t": at, "view": view, "iteration": k, **found}
                    | {"psnr": psnr(seen[view], plain[view])}
                )
    says = (
        f"What the model takes the source for, noised to t = {at}: posterior means under the guided source prompt, for "
        "noise as drawn (k = 0) and after each iteration of the search. Left is the source as the autoencoder sees it."
    )
    pictures = torch.stack([torch.stack(strip, 1) for strip in strips], 1)
    return Table("iterations", "Iteration by iteration", says, rows, pictures)


@torch.no_grad()
def posterior_mean(subject: Subject, denoise: Guided, draw: Draw) -> Tensor:
    """zhat = (x - s ehat(x)) / a of the noised source x = a z + s e, (b, c, h, w), under the guided source prompt."""
    x = draw.noised(subject.z)
    return (x - draw.s * denoise(x, draw.t, subject.source_text)) / draw.a.clamp_min(SMALLEST)


# -------------------------------------------------------------------------------------------------- where an edit pulls
def gradient_maps(
    subject: Subject,
    generator: torch.Generator,
    *,
    guidances: Sequence[str] = ("sds", "dds", "cds", "pds", "dreamcatalyst", "ids"),
    steps: Sequence[int] = (300, 500, 700),
    draws: int = 1,
    z: Tensor | None = None,
) -> Table:
    """Where each guidance pulls: the length of its gradient over channels, at each place of the latents.

    z: the edited latents (b, c, h, w); None is the source, where an edit begins. Rows: guidance, t, view; rms of the
    gradient; top_tenth: share of its squared length in the tenth of the places where it is greatest (0.1 if it is
    everywhere alike). Means over draws, which are the same for all guidances. pictures: (guidances, steps, views, h, w)
    of those lengths.
    """
    z = subject.z if z is None else z.detach()
    every = subject.draws(steps, draws, generator)
    maps = []
    for name in guidances:
        check_guidance(name)
        denoise, options = subject.denoise(name), bind(name, subject.prior, generator)
        request = Request(subject.target_text, subject.source_text, subject.z)
        with torch.no_grad():
            lengths = [GUIDANCE[name](denoise, z, draw, request, **options).square().sum(1) for *_, draw in every]
        maps.append(torch.stack(lengths).unflatten(0, (-1, draws)).mean(1))
    found = torch.stack(maps)  # squared lengths, (guidances, steps, views, h, w)
    kept = max(1, found[0, 0, 0].numel() // 10)
    total = found.flatten(3).sum(3)
    top = found.flatten(3).topk(kept, dim=3).values.sum(3) / total.clamp_min(
        1e-300 if total.dtype == torch.float64 else 1e-38
    )
    rms = (total / subject.z[0].numel()).sqrt()
    rows = [
        {"guidance": name, "t": t, "view": view, "rms": float(rms[g, i, view]), "top_tenth": float(top[g, i, view])}
        for g, name in enumerate(guidances)
        for i, t in enumerate(subject.steps(steps))
        for view in range(len(z))
    ]
    says = (
        "Where each guidance pulls when asked for the target, by noise level: length of the gradient over the latent's "
        "channels, each map with a scale of its own. top_tenth: share of the squared gradient in a tenth of the "
        "picture; 0.1 is everywhere alike."
    )
    return Table("maps", "Gradients", says, rows, found.sqrt())


def over_picture(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (..., h, w) at the size (height, width) of a picture, bilinear, each divided by its greatest value."""
    flat = F.interpolate(maps.reshape(-1, 1, *maps.shape[-2:]), size, mode="bilinear", align_corners=False)
    flat = flat / flat.amax((2, 3), keepdim=True).clamp_min(1e-12)
    return flat.view(*maps.shape[:-2], *size)


# --------------------------------------------------------------------------------------------------------- whole edits
def distilled(
    subject: Subject,
    generator: torch.Generator,
    method: Method,
    *,
    prompts: tuple[str, str] | None = None,
    z_source: Tensor | None = None,
    steps: int = 200,
    rate: float = SGD_STEP,
) -> tuple[Tensor, list[float]]:
    """Edit latents by plain gradient descent: the edited (b, c, h, w), and mean drift at the noise used in each step.

    prompts: source and target; z_source: what is edited; None: those of the subject. rate: z <- z - rate g.
    """
    if steps < 1 or not (math.isfinite(rate) and rate > 0):
        raise InputError(f"steps, rate: found {steps} and {rate}, expected 1 or more, and more than 0.")
    source, target = prompts or (subject.source, subject.target)
    z_source = subject.z if z_source is None else z_source
    distiller = Distiller(subject.prior, method, target, source, z_source, generator)
    z, seen, size = z_source.clone(), [], z_source.flatten(1).norm(dim=1).clamp_min(1e-12)
    for index in range(steps):
        pull = distiller(z, list(range(len(z))), index / max(steps - 1, 1))
        z = z - rate * pull.gradient
        if pull.fpr is not None:
            seen.append(float((pull.fpr.residuals[-1] / size).mean()))
    if not bool(z.isfinite().all()):
        raise InputError(f"{method.guidance}: the latents are no longer finite after {steps} steps; lower the rate.")
    return z, seen


def sweep(
    subject: Subject,
    generator: torch.Generator,
    *,
    lams: Sequence[float] = (0.3, 1.0, 3.0, 10.0),
    iters: Sequence[int] = (0, 1, 3, 8),
    solver: str = "grad",
    steps: int = 50,
    rate: float = SGD_STEP,
    score_draws: int = 8,
) -> Table:
    """How hard FPR holds on to the source: a short edit for each lambda and number of iterations.

    Each edit starts from the same state of the generator. Rows: lam, iters, view; distance: how far the latents went,
    |z - z_src| / |z_src|; margin: denoising error under the source prompt less that under the target prompt, greater
    is more of the target (before: of the source); psnr in dB of the decoded edit to the decoded source; drift: mean of
    the noise used. No iterations are DDS, of which there is one row for each view, with lam 0.
    """
    check_solver(solver)
    state, plain, rows = generator.get_state(), subject.decode(subject.z), []
    jobs = [(0.0, 0)] * (0 in iters) + [(lam, n) for lam in lams for n in iters if n]
    before = margins(subject, subject.z, generator, score_draws)
    for lam, count in jobs:
        generator.set_state(state)
        method = Method("ids", subject.scale, anneal=0.0, solver=solver, fpr_iters=count, fpr_lambda=lam)
        z, seen = distilled(subject, generator, method, steps=steps, rate=rate)
        generator.set_state(state)
        after, pictures = margins(subject, z, generator, score_draws), subject.decode(z)
        for view in range(len(z)):
            rows.append(
                {
                    "lam": lam,
                    "iters": count,
                    "view": view,
                    "distance": distance(z[view], subject.z[view]),
                    "margin": float(after[view]),
                    "before": float(before[view]),
                    "psnr": psnr(pictures[view], plain[view]),
                    "drift": sum(seen) / len(seen),
                }
            )
    says = (
        f"Edits of {steps} steps with IDS at each lambda and number of iterations N, beside DDS (N = 0). Low and left: "
        "held at the source; towards DDS: FPR does little. margin: how much better the target prompt explains the "
        "edit than the source prompt (before: the source itself)."
    )
    return Table("sweep", "Lambda and N", says, rows)


@torch.no_grad()
def margins(subject: Subject, z: Tensor, generator: torch.Generator, draws: int) -> Tensor:
    """Denoising error under the source prompt less that under the target prompt, of latents z, (b,)."""
    texts = [subject.prior.text([prompt]) for prompt in (subject.source, subject.target)]
    errors = denoising_errors(subject.prior.denoise, z, texts, subject.prior.alphas_cumprod, generator, draws)
    return errors[:, 0] - errors[:, 1]


def invertibility(
    subject: Subject,
    generator: torch.Generator,
    *,
    guidances: Sequence[str] = EDITS,
    steps: int = 200,
    rate: float = SGD_STEP,
    timesteps: str = "uniform",
    solver: str = "grad",
) -> Table:
    """Edit, then edit back with the prompts swapped: what has not come back was not part of the edit.

    Each guidance starts from the same state of the generator. Rows: guidance, view; distance: |z_back - z_src| /
    |z_src|; moved: the same of the edit; psnr (dB), ssim, and lpips (AlexNet, if the package `lpips` is there) of the
    picture that came back to the decoded source; psnr_edit: of the edit. A guidance that changes nothing comes back
    perfectly: read with `moved`. pictures: (guidances, views, 3, 3, h, w): source, edit, back.
    """
    state, plain, rows, seen = generator.get_state(), subject.decode(subject.z), [], []
    compare = perceptual(plain)
    for name in guidances:
        check_guidance(name)
        generator.set_state(state)
        method = Method(name, subject.scale, anneal=0.0, timesteps=timesteps, solver=solver)
        there, _ = distilled(subject, generator, method, steps=steps, rate=rate)
        swapped = (subject.target, subject.source)
        back, _ = distilled(subject, generator, method, prompts=swapped, z_source=there, steps=steps, rate=rate)
        edit, again = subject.decode(there), subject.decode(back)
        seen.append(torch.stack([plain, edit, again], 1))
        for view in range(len(back)):
            row = {
                "guidance": name,
                "view": view,
                "moved": distance(there[view], subject.z[view]),
                "distance": distance(back[view], subject.z[view]),
                "psnr": psnr(again[view], plain[view]),
                "ssim": ssim(again[view : view + 1], plain[view : view + 1]),
                "psnr_edit": psnr(edit[view], plain[view]),
            }
            rows.append({**row, **({"lpips": compare(again[view], plain[view])} if compare else {})})
    says = (
        f"The source edited to the target in {steps} steps, and the edit edited back with the prompts swapped. "
        "distance: what did not come back, as a share of the source's latents; moved: how far the edit had gone. PSNR, "
        "SSIM and LPIPS compare what came back with the source; LPIPS needs the package lpips."
    )
    return Table("invertibility", "There and back", says, rows, torch.stack(seen))


def perceptual(like: Tensor) -> Any:
    """LPIPS of two pictures (3, h, w) in [0, 1]; None without the package, or with its weights out of reach."""
    if importlib.util.find_spec("lpips") is None:
        return None
    lpips = importlib.import_module("lpips")
    try:
        network = lpips.LPIPS(net="alex", verbose=False).to(like.device)
    except OSError:  # it asks the network for AlexNet
        return None

    @torch.no_grad()
    def compare(a: Tensor, b: Tensor) -> float:
        return float(network(a[None].float() * 2 - 1, b[None].float() * 2 - 1))

    return compare


def distance(z: Tensor, source: Tensor) -> float:
    """|z - source| / |source|."""
    return float((z - source).norm() / source.norm().clamp_min(1e-12))


def check_solver(name: str) -> None:
    """Raise InputError for a solver that is not known."""
    if name not in SOLVERS:
        raise InputError(f"solver: {name!r} is not known; choose one of {', '.join(SOLVERS)}.")


def check_guidance(name: str) -> None:
    """Raise InputError for a guidance that is not known."""
    if name not in GUIDANCE:
        raise InputError(f"guidance: {name!r} is not known; choose one of {', '.join(GUIDANCE)}.")
