"""Fixed-point regularisation (FPR) of IDS (arXiv 2502.19930): noise from which the network finds the source again.

With x = a z + s e, the posterior mean of x is the source z exactly if the network finds in x the noise that was put
in: z - zhat(x) = (s / a) (ehat(x) - e). FPR is the search for such an e, a fixed point of e -> ehat(a z + s e), and
each entry of SOLVERS is one way to search. None should be run to convergence: the exact fixed point of a Gaussian prior
is far larger than any noise the network was trained on, so that stopping after two or three iterations is part of the
method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splatedit.diffusion import SMALLEST, Denoise, Draw, Guided, Text, pick, repeat
from splatedit.errors import InputError
from splatedit.score import lifted_gradient

REFERENCE_SIZE = 16384  # numbers in a 4x64x64 latent, at which the step of IDS was published
BACKWARD = 1.15  # cost of a backward pass to the input in forward passes, by the FLOPs of Stable Diffusion's U-Net
# Longest steps of the solvers that could overshoot, in units of the expected length of the noise. Chosen by
# benchmarks/drift.py: with longer ones Polyak's third step raises the drift at t = 850 again.
POLYAK_REACH, ANDERSON_REACH = 0.1, 0.25


class FPR(NamedTuple):
    """What fixed-point regularisation leaves behind. k: iterations made; a stopped sample repeats its last numbers."""

    noise: Tensor  # (b, c, h, w) the refined noise
    residuals: Tensor  # (k, b) |z_source - zhat| before each iteration, of the text iterated on; NaN: not evaluated.
    # `guidance.ids` adds a last row: after the last iteration and under the guided source text, whatever the solver.
    rms: Tensor  # (k + 1, b) of the noise before each iteration and after the last; of white noise 1
    kurtosis: Tensor  # (k + 1, b), of Gaussian noise 3
    autocorrelation: Tensor  # (k + 1, b) between neighbouring pixels, of white noise 0
    iterations: Tensor  # (b,) that went into `noise`
    evaluations: int  # rows sent forward through the network
    backwards: int  # rows sent back
    trail: Tensor  # (k + 1, b, c, h, w) the noise before each iteration and after the last, which is `noise`
    score: Tensor | None = None  # (b, c, h, w) guided ehat of the source at `noise`, where the search came by it

    @property
    def cost(self) -> float:
        """In forward passes of one row."""
        return self.evaluations + BACKWARD * self.backwards


class Point(NamedTuple):
    """One iterate, both (b, c, h, w)."""

    x: Tensor
    noise: Tensor

    def where(self, rows: Tensor, other: Point) -> Point:
        """These values in the given rows (b,) bool, those of `other` elsewhere."""
        return Point(*(torch.where(column(rows), new, old) for new, old in zip(self, other, strict=True)))


class Look(NamedTuple):
    """One iterate and what the network said of it."""

    point: Point
    ehat: Tensor  # (b, c, h, w)
    residual: Tensor  # (b,) |z - zhat|
    slope: Tensor | None  # (b, c, h, w) gradient of the residual with respect to x, for solvers that need it
    score: Tensor | None  # (b, c, h, w) guided ehat of the source, where that was part of the answer


class Frame(NamedTuple):
    """What a step has to know besides: the change between x and noise, and how long the user wants it."""

    z: Tensor  # (b, c, h, w) source latents
    draw: Draw
    lam: float

    @property
    def span(self) -> float:
        """Expected length of a sample's noise."""
        return math.sqrt(self.z[0].numel())

    def at_x(self, x: Tensor) -> Point:
        """The iterate with these noised latents."""
        return Point(x, (x - self.draw.a * self.z) / self.draw.s)

    def at_noise(self, noise: Tensor) -> Point:
        """The iterate with this noise."""
        return Point(self.draw.a * self.z + self.draw.s * noise, noise)


Step = Callable[[list[Look], Frame], Point]  # the last few looks, the newest last -> the next iterate


# ------------------------------------------------------------------------------------------------------------ the steps
def unit_step(looks: list[Look], frame: Frame) -> Point:
    """Against the gradient of the *unsquared* residual, as published (arXiv 2502.19930 and its code).

    The gradient is J^T r / |r|: the step is as long however large the residual is. lambda is a length in latent units
    at 4x64x64 and grows with the square root of the latent's size, which keeps its relative strength.
    """
    here = looks[-1]
    assert here.slope is not None
    return frame.at_x(here.point.x - frame.lam * math.sqrt(frame.z[0].numel() / REFERENCE_SIZE) * here.slope)


def polyak_step(looks: list[Look], frame: Frame) -> Point:
    """The same direction, as far as would halve a linear residual: no lambda to tune.

    Polyak's step for a function whose least value, 0, is known; also the least-norm Newton step of residual = 0. Half
    of it is taken (lambda 2 takes all), at most POLYAK_REACH of the noise's expected length.
    """
    here = looks[-1]
    assert here.slope is not None
    steepness = here.slope.flatten(1).norm(dim=1).clamp_min(1e-12)
    longest = POLYAK_REACH * frame.span * frame.draw.s.flatten()
    wanted = (0.5 * frame.lam * here.residual / steepness).minimum(longest)
    return frame.at_x(here.point.x - column(wanted / steepness) * here.slope)


def picard_step(looks: list[Look], frame: Frame) -> Point:
    """e <- ehat(a z + s e): no backward pass. lambda below 1 damps it."""
    here = looks[-1]
    return frame.at_noise(here.point.noise.lerp(here.ehat, frame.lam))


def anderson_step(looks: list[Look], frame: Frame) -> Point:
    """Picard's step from the mixture of the last three iterates at which a linear gap ehat - e would be smallest.

    Anderson's mixing (doi 10.1145/321296.321305), each sample its own. A sample whose residual has risen forgets its
    past and takes a plain step; no step is longer than ANDERSON_REACH of the noise's expected length.
    """
    here, past = looks[-1], looks[:-1]
    noise, gap = (part.flatten(1) for part in (here.point.noise, here.ehat - here.point.noise))
    move = frame.lam * gap
    if past:
        noises = torch.stack([noise - look.point.noise.flatten(1) for look in past], 2)  # (b, d, m)
        gaps = torch.stack([gap - (look.ehat - look.point.noise).flatten(1) for look in past], 2)
        square = gaps.mT @ gaps
        ridge = 1e-6 * square.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        eye = torch.eye(len(past), dtype=square.dtype, device=square.device)
        share = torch.linalg.solve(square + ridge.view(-1, 1, 1) * eye, gaps.mT @ gap[..., None])
        fell = here.residual <= past[-1].residual
        move = torch.where(fell[:, None], move - ((noises + frame.lam * gaps) @ share)[..., 0], move)
    move = move * (ANDERSON_REACH * frame.span / move.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    return frame.at_noise(here.point.noise + move.view_as(here.point.noise))


class Solver(NamedTuple):
    """A step, and what it has to know at each iterate; or, by noise level, which of the others is to do the work."""

    step: Step | None
    slope: bool = False  # the gradient through the network
    null: bool = False  # of the null text alone, which costs one row instead of two; else of the guided source text
    levels: tuple[tuple[float, str | None], ...] = ()  # falling: from which a^2 / s^2 up, which solver; None: none


# Steps 300 and 700 of Stable Diffusion's schedule. Below the first the network finds the source from any noise; beyond
# the second, the null text's posterior is so wide that only the gradient finds the way.
LEVELS = ((1.45, None), (0.09, "picard_null"), (0.0, "grad_polyak"))


SOLVERS: dict[str, Solver] = {
    "grad": Solver(unit_step, slope=True),
    "grad_polyak": Solver(polyak_step, slope=True),
    "picard_null": Solver(picard_step, null=True),
    "picard": Solver(picard_step),
    "anderson": Solver(anderson_step, null=True),
    "by_level": Solver(None, levels=LEVELS),
}


# ----------------------------------------------------------------------------------------------------------- the search
def fpr(
    denoise: Denoise,
    z_source: Tensor,
    draw: Draw,
    source: Text,
    iters: int = 3,
    lam: float = 1.0,
    solver: str = "grad",
    *,
    t_range: tuple[int, int] | None = None,
    sphere: bool = False,
    keep_best: bool = False,
    stop: float = 0.0,
) -> FPR:
    """Refine the noise of `draw` until the network finds z_source (b, c, h, w) in a z_source + s noise.

    denoise: guided (see `diffusion.guided`). solver: a key of SOLVERS; `grad` is the published one. iters: iterations;
    0 leaves the noise as it is. lam: factor of a step, in the solver's own unit. t_range: first and last step of the
    schedule at which noise is refined; None is all. sphere: after each iteration the noise gets back the length it was
    drawn with. keep_best: a sample whose residual rises goes back to the iterate before and stops; the last iterate is
    judged by the source score that IDS needs anyway, and that is returned. stop: a sample stops once |z_source - zhat|
    is below this share of |z_source|. Raises InputError for an option out of range, and for a solver on the null text
    if `denoise` has none.
    """
    method = check_options(denoise, iters, lam, solver, stop)
    if method.levels:
        options = {"t_range": t_range, "sphere": sphere, "keep_best": keep_best, "stop": stop}
        return by_level(method.levels, denoise, z_source, draw, source, iters, lam, **options)
    search = Search(denoise, Frame(z_source.detach(), draw, lam), source, method, keep_best, stop, t_range)
    looks: list[Look] = []
    for _ in range(iters):
        if search.partial and not search.going.any():
            break
        looks = [*looks[-2:], search.look()]
        search.judge(looks[-1])
        search.note()
        assert method.step is not None
        after = method.step(looks, search.frame)
        if sphere:
            after = search.frame.at_noise(after.noise * (length(draw.noise) / length(after.noise).clamp_min(1e-12)))
        search.move(after)
    return search.finish()


def check_options(denoise: Denoise, iters: int, lam: float, solver: str, stop: float) -> Solver:
    """The solver of that name; raises InputError."""
    if solver not in SOLVERS:
        raise InputError(f"solver: {solver!r} is not known; choose one of {', '.join(SOLVERS)}.")
    for name, value in (("iters", iters), ("lambda", lam), ("stop", stop)):
        if not (value >= 0 and math.isfinite(value)):
            raise InputError(f"fpr {name}: found {value}, expected 0 or more.")
    names = [name for _, name in SOLVERS[solver].levels if name] or [solver]
    if any(SOLVERS[name].null for name in names) and not isinstance(denoise, Guided):
        raise InputError(f"solver: {solver!r} asks for the null text, which this denoiser has not; see `guided`.")
    return SOLVERS[solver]


def by_level(
    levels: tuple[tuple[float, str | None], ...],
    denoise: Denoise,
    z_source: Tensor,
    draw: Draw,
    source: Text,
    iters: int,
    lam: float,
    **options: Any,
) -> FPR:
    """Each sample by the solver for its noise level, see `Solver.levels`; the searches' accounts as one."""
    source, snr = repeat(source, len(z_source)), (draw.a / draw.s).square().flatten()
    rows, parts, above = [], [], math.inf
    for level, name in levels:
        chosen = ((snr >= level) & (snr < above)).nonzero()[:, 0]
        above = level
        if len(chosen):
            part = z_source[chosen], draw.pick(chosen), pick(source, chosen), iters if name else 0, lam, name or "grad"
            rows.append(chosen)
            parts.append(fpr(denoise, *part, **options))
    return merged(rows, parts, iters)


def merged(rows: list[Tensor], parts: list[FPR], k: int) -> FPR:
    """Searches of some rows each as one of all rows and k iterations; who ended sooner repeats the last numbers."""
    order = torch.cat(rows).argsort()

    def beside(tables: list[Tensor], height: int) -> Tensor:
        blank = [table if len(table) else table.new_full((1, *table.shape[1:]), math.nan) for table in tables]
        return torch.cat([t[torch.arange(height).clamp_max(len(t) - 1)] for t in blank], 1)[:, order]

    scores = [part.score for part in parts if part.score is not None]
    return FPR(
        noise=torch.cat([part.noise for part in parts])[order],
        residuals=beside([part.residuals for part in parts], k),
        rms=beside([part.rms for part in parts], k + 1),
        kurtosis=beside([part.kurtosis for part in parts], k + 1),
        autocorrelation=beside([part.autocorrelation for part in parts], k + 1),
        iterations=torch.cat([part.iterations for part in parts])[order],
        evaluations=sum(part.evaluations for part in parts),
        backwards=sum(part.backwards for part in parts),
        trail=beside([part.trail for part in parts], k + 1),
        score=torch.cat(scores)[order] if len(scores) == len(parts) else None,
    )


class Search:
    """Where the samples are, what the network said of it, and what that has cost so far."""

    def __init__(
        self,
        denoise: Denoise,
        frame: Frame,
        source: Text,
        method: Solver,
        keep_best: bool,
        stop: float,
        t_range: tuple[int, int] | None,
    ):
        z, draw = frame.z, frame.draw
        self.denoise, self.frame, self.source, self.method = denoise, frame, repeat(source, len(z)), method
        self.keep_best, self.enough = keep_best, stop * length(z).flatten()
        # Asking which samples are still going makes a GPU wait; without these options all of them always are.
        self.partial = keep_best or stop > 0 or t_range is not None
        low, high = t_range or (0, int(1e9))
        self.going = (draw.t >= low) & (draw.t <= high)  # (b,) bool
        self.here = self.kept = Point(draw.noised(z).detach(), draw.noise)  # the newest iterates, and the accepted ones
        self.steps = self.kept_steps = torch.zeros_like(draw.t)  # that led there
        self.residual = z.new_full((len(z),), math.inf)  # of the accepted
        self.score, self.scored = torch.zeros_like(z), torch.zeros_like(self.going)  # of the accepted, where known
        self.evaluations = self.backwards = 0
        self.residuals: list[Tensor] = []
        self.trail: list[Tensor] = []

    def look(self, last: bool = False) -> Look:
        """Evaluate the samples still going at `here`; for the others the numbers mean nothing.

        last: no step follows, and the guided source score is wanted, whatever text the solver iterates on.
        """
        rows = self.going.nonzero()[:, 0] if self.partial else torch.arange(len(self.going), device=self.going.device)
        x, z, draw, text = self.here.x, self.frame.z, self.frame.draw, self.source
        if self.partial:
            x, z, draw, text = x[rows], z[rows], draw.pick(rows), pick(text, rows)
        score = slope = None
        if self.method.slope and not last:
            ehat, residual, slope = self.differentiate(x, z, draw, text)
            score = ehat
        else:
            with torch.no_grad():
                ehat, score = self.evaluate(x, draw, text, last)
            residual = gap(z, x, draw, ehat)
        if self.partial:
            ehat, residual, slope, score = (self.spread(part, rows) for part in (ehat, residual, slope, score))
        assert ehat is not None and residual is not None
        return Look(self.here, ehat, residual, slope, score)

    def spread(self, part: Tensor | None, rows: Tensor) -> Tensor | None:
        """The evaluated rows at their places among all rows, 0 elsewhere."""
        return None if part is None else part.new_zeros(len(self.going), *part.shape[1:]).index_copy(0, rows, part)

    def evaluate(self, x: Tensor, draw: Draw, text: Text, last: bool) -> tuple[Tensor, Tensor | None]:
        """ehat of what the solver iterates on, and the guided source score where it is the same or wanted."""
        if not self.method.null:
            self.evaluations += len(x) * rows_per_sample(self.denoise)
            ehat = self.denoise(x, draw.t, text)
            return ehat, ehat
        assert isinstance(self.denoise, Guided)
        self.evaluations += len(x) * (2 if last else 1)
        if not last:
            return self.denoise.unconditional(x, draw.t), None
        free, told = self.denoise.halves(x, draw.t, text)
        return free, self.denoise.mix(free, told)

    def differentiate(self, x: Tensor, z: Tensor, draw: Draw, text: Text) -> tuple[Tensor, Tensor, Tensor]:
        """ehat, residual and its gradient with respect to x, through the guided network."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ehat = self.denoise(x, draw.t, text)
            residual = gap(z, x, draw, ehat)
            slope = lifted_gradient(residual, x)
        self.evaluations += len(x) * rows_per_sample(self.denoise)
        self.backwards += len(x) * rows_per_sample(self.denoise)
        return ehat.detach(), residual.detach(), slope

    def judge(self, look: Look) -> None:
        """Accept the iterates just looked at, unless a residual rose and the best is to be kept; see who stops."""
        good = self.going & (look.residual < self.residual) if self.keep_best else self.going
        self.kept = look.point.where(good, self.kept)
        self.kept_steps = torch.where(good, self.steps, self.kept_steps)
        self.residual = torch.where(good, look.residual, self.residual)
        if look.score is not None:
            self.score, self.scored = torch.where(column(good), look.score, self.score), self.scored | good
        else:
            self.scored = self.scored & ~good
        self.going = good & (self.residual > self.enough)

    def note(self) -> None:
        """Write down residual and noise of the accepted iterates."""
        self.residuals.append(self.residual)
        self.trail.append(self.kept.noise.detach())

    def move(self, after: Point) -> None:
        """Go on to `after`. An overflow in half precision costs that sample this step, not the run."""
        moving = self.going & after.x.flatten(1).isfinite().all(1)
        self.here = after.where(moving, self.kept)
        self.steps = self.kept_steps + moving.long()

    def settle(self) -> Tensor:
        """Judge the last iterates, go to the best, and return the guided source score (b, c, h, w) there."""
        if self.going.any():
            self.judge(self.look(last=True))
        self.here, self.steps = self.kept, self.kept_steps
        rows = (~self.scored).nonzero()[:, 0]
        if len(rows):
            with torch.no_grad():
                late = self.denoise(self.here.x[rows], self.frame.draw.t[rows], pick(self.source, rows))
            self.evaluations += len(rows) * rows_per_sample(self.denoise)
            self.score = self.score.index_copy(0, rows, late)
        return self.score

    def finish(self) -> FPR:
        """The noise found, with the account of the search."""
        score = self.settle() if self.keep_best else None
        noise = self.here.noise.detach()
        residuals = torch.stack(self.residuals) if self.residuals else self.residual[:0].view(0, len(noise))
        trail = torch.stack([*self.trail, noise])
        rms, kurtosis, autocorrelation = (m.view(len(trail), -1) for m in moments(trail.flatten(0, 1)))
        return FPR(
            noise,
            residuals.masked_fill(residuals.isinf(), math.nan),
            rms,
            kurtosis,
            autocorrelation,
            self.steps,
            self.evaluations,
            self.backwards,
            trail,
            score,
        )


def gap(z: Tensor, x: Tensor, draw: Draw, ehat: Tensor) -> Tensor:
    """|z - zhat| of each sample, (b,), from the predicted noise at x."""
    return (z - (x - draw.s * ehat) / draw.a.clamp_min(SMALLEST)).flatten(1).norm(dim=1)


def moments(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rms, kurtosis and lag-1 autocorrelation of each sample of noise (b, c, h, w), each (b,): 1, 3 and 0 if white."""
    centred = noise - noise.mean((1, 2, 3), keepdim=True)
    variance = centred.square().mean((1, 2, 3)).clamp_min(1e-12)
    kurtosis = centred.square().square().mean((1, 2, 3)) / variance.square()
    pairs = ((centred[..., 1:] * centred[..., :-1]), (centred[:, :, 1:] * centred[:, :, :-1]))
    pairs = torch.cat([pair.flatten(1) for pair in pairs], 1)
    together = pairs.sum(1) / max(pairs.shape[1], 1) / variance
    return noise.square().mean((1, 2, 3)).sqrt(), kurtosis, together


def rows_per_sample(denoise: Denoise) -> int:
    """Rows that the network sees for each sample."""
    return denoise.rows if isinstance(denoise, Guided) else 1


def length(x: Tensor) -> Tensor:
    """L2 norm of each sample, (b, 1, 1, 1)."""
    return column(x.flatten(1).norm(dim=1))


def column(values: Tensor) -> Tensor:
    """(b,) as (b, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
