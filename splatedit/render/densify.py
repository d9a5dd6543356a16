"""Densification: Gaussians copied, split, moved and removed between two optimiser steps, with nothing left behind.

    rows = split(parameters, optimizer, pulled & large, generator)
    statistic = statistic[rows.source]

`parameters` is a dictionary of leaf tensors with one row per Gaussian, in gsplat's names and as a splat file holds
them: "means", "quats", "scales" (log), "opacities" (logit, (n,) or (n, 1)), and any others, which follow. A change of
rows needs new tensors: they replace the old ones in the dictionary and in the optimisers, and what an optimiser
remembers of a row (Adam's moments) goes where the row goes. A row that is only carried over keeps its bits; one whose
value was set here begins with moments of 0. Whatever else a program holds per Gaussian follows by `rows.source`.

gsplat's DefaultStrategy works on a CPU as it is, on top of `splatedit.render.rasterization`; its MCMCStrategy calls
CUDA kernels, and `mcmc_strategy` gives one that does not need them for CPU tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from splatedit.errors import InputError
from splatedit.render.twin import rotation

__all__ = [
    "Rows",
    "add",
    "clone",
    "duplicate",
    "halve",
    "jitter",
    "mcmc_strategy",
    "prune",
    "rearrange",
    "relocate",
    "relocation",
    "screen_gradients",
    "split",
]

Parameters = MutableMapping[str, Tensor] | torch.nn.ParameterDict
Optimizers = Optimizer | Mapping[str, Optimizer] | Iterable[Optimizer]

# gsplat's table of binomials ends there, and the paper's code does; more copies of one Gaussian count as this many
MOST_COPIES = 51


class Rows(NamedTuple):
    """What became of the rows: `statistic[rows.source]` makes any other per-Gaussian tensor follow."""

    source: Tensor  # (m,) int64: the old row that each of the m new rows was copied from
    fresh: Tensor  # (m,) bool: whether its value or place is new, so that what was learnt of it no longer holds


# ---------------------------------------------------------------- rows, and what the optimiser remembers of them


@torch.no_grad()
def rearrange(
    parameters: Parameters,
    optimizers: Optimizers,
    source: Tensor,
    fresh: Tensor,
    values: Mapping[str, Tensor] | None = None,
) -> Rows:
    """Make row i of every parameter a copy of row source[i], with the optimiser state and gradient of that row.

    source: (m,) int64 rows of the n there are, in any order, any number of times. fresh: (m,) bool, rows whose moments
    and gradients are set to 0. values: by parameter name, what the fresh rows hold instead of the copy, (fresh.sum(),
    ...) in their order. State tensors that have the parameter's shape follow (Adam, AdamW, SGD with momentum, RMSprop,
    gsplat's SelectiveAdam); the rest, like Adam's step count, is kept. Everything below is made of this.

    Raises InputError, before anything is changed, if parameters differ in their number of rows.
    """
    _count(parameters)
    held, changed = list(_each(optimizers)), fresh.nonzero()[:, 0]
    for name, old in list(parameters.items()):
        new = old.detach().index_select(0, source)
        if values is not None and name in values:
            new[changed] = values[name].to(new.dtype).reshape(-1, *new.shape[1:])
        new = torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new
        new.requires_grad_(old.requires_grad)
        if old.grad is not None:
            new.grad = _carried(old.grad, source, changed)
        for optimizer in held:
            _replace(optimizer, old, new, source, changed)
        parameters[name] = new
    return Rows(source, fresh)


def _replace(optimizer: Optimizer, old: Tensor, new: Tensor, source: Tensor, changed: Tensor) -> None:
    """Let the optimiser hold `new` in place of `old`."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                state[key] = _carried(value, source, changed)
        optimizer.state[new] = state


def _carried(value: Tensor, source: Tensor, changed: Tensor) -> Tensor:
    return value.index_select(0, source).index_fill_(0, changed, 0)


def duplicate(parameters: Parameters, optimizers: Optimizers, chosen: Tensor) -> Rows:
    """Append a copy of every Gaussian of the mask `chosen` (n,), as 3DGS grows small ones (arXiv 2308.04079).

    Two at one place are more opaque than one; `clone` makes copies that do not change the picture.
    """
    n = _masked(parameters, chosen)
    picks = chosen.nonzero()[:, 0]
    source = torch.cat([torch.arange(n, device=picks.device), picks])
    return rearrange(parameters, optimizers, source, _last(len(picks), len(source), picks.device))


def split(
    parameters: Parameters,
    optimizers: Optimizers,
    chosen: Tensor,
    generator: torch.Generator | None = None,
    *,
    shrink: float = 1.6,
    same_alpha: bool = False,
) -> Rows:
    """Replace every Gaussian of the mask `chosen` (n,) by two smaller ones, as 3DGS grows large ones.

    The two are appended at places drawn from the Gaussian, with its scales divided by `shrink`; the others move up
    (arXiv 2308.04079). same_alpha: two at one place would be as opaque as the one was (arXiv 2404.06109, gsplat's
    `revised_opacity`).
    """
    n = _masked(parameters, chosen, "means", "quats", "scales", "opacities")
    picks = chosen.nonzero()[:, 0].repeat(2)
    source = torch.cat([(~chosen).nonzero()[:, 0], picks])
    scales = parameters["scales"].detach()[picks]
    offset = scales.exp() * _normal(scales, generator)
    offset = (rotation(parameters["quats"].detach()[picks]) @ offset[:, :, None])[:, :, 0]
    values = {"means": parameters["means"].detach()[picks] + offset, "scales": scales - math.log(shrink)}
    if same_alpha:
        values["opacities"] = _half_alpha(parameters["opacities"].detach()[picks])
    return rearrange(parameters, optimizers, source, _last(len(picks), n + len(picks) // 2, picks.device), values)


def halve(parameters: Parameters, optimizers: Optimizers, chosen: Tensor) -> Rows:
    """Replace every Gaussian of the mask `chosen` (n,) by two halves, which together look nearly as it did.

    They lie half a standard deviation to either side of its centre on its longest axis, along which they have 0.7 of
    its extent; two at one place would be as opaque as it was. `split` leaves a picture to be repaired, and an edit by a
    prior that sees few pixels does not repair it. Nothing is drawn by chance. The halves are appended, the others move
    up.
    """
    n = _masked(parameters, chosen, "means", "quats", "scales", "opacities")
    picks = chosen.nonzero()[:, 0].repeat(2)
    source = torch.cat([(~chosen).nonzero()[:, 0], picks])
    scales, means = parameters["scales"].detach()[picks], parameters["means"].detach()[picks]
    longest = torch.nn.functional.one_hot(scales.argmax(1), 3).to(scales)
    side = torch.where(_last(len(picks) // 2, len(picks), picks.device), -0.5, 0.5).to(scales)
    offset = side[:, None] * longest * scales.exp()
    offset = (rotation(parameters["quats"].detach()[picks]) @ offset[:, :, None])[:, :, 0]
    values = {"means": means + offset, "scales": scales + math.log(0.7) * longest}
    values["opacities"] = _half_alpha(parameters["opacities"].detach()[picks])
    return rearrange(parameters, optimizers, source, _last(len(picks), n + len(picks) // 2, picks.device), values)


def prune(parameters: Parameters, optimizers: Optimizers, chosen: Tensor) -> Rows:
    """Remove every Gaussian of the mask `chosen` (n,)."""
    _masked(parameters, chosen)
    source = (~chosen).nonzero()[:, 0]
    return rearrange(parameters, optimizers, source, torch.zeros_like(source, dtype=torch.bool))


# ---------------------------------------------------------------- 3DGS as Markov chain Monte Carlo, arXiv 2404.09591


@torch.no_grad()
def relocation(opacities: Tensor, scales: Tensor, ratios: Tensor, n_max: int = MOST_COPIES) -> tuple[Tensor, Tensor]:
    """The opacity and scales with which N Gaussians at one place look like one did (arXiv 2404.09591, equation 9).

    opacities (k,) in [0, 1] and scales (k, d), activated, not logits and logarithms. ratios (k,): N, itself included;
    clamped to 1 ... n_max, as gsplat's compute_relocation does. Returns (k,) and (k, d) in the types given.

    1 - (1 - new)^N = old keeps what comes through at the centre. The scales are multiplied by old / S with
    S = sum_{i=1}^N sum_{k=0}^{i-1} C(i-1, k) (-1)^k new^(k+1) / sqrt(k+1), which keeps the sum of opacity along any
    line through the centre.
    """
    n = ratios.clamp(1, n_max).double()
    old = opacities.double().clamp(max=1 - 2.0**-53)  # at 1 the sum below would lose its digits
    new = -torch.expm1(torch.log1p(-old) / n)
    # summed over i first, the binomials make C(N, j) with j = k + 1: one sum, and its terms end by themselves
    term, total = torch.ones_like(new), torch.zeros_like(new)
    for j in range(1, 1 + int(n.amax()) if len(n) else 1):
        term = term * ((j - 1 - n) / j * new)
        total = total - term / math.sqrt(j)
    factor = torch.where(total > 0, old / total, 1.0)  # one that nobody sees keeps its size
    return new.to(opacities.dtype), (factor[:, None] * scales).to(scales.dtype)


def clone(parameters: Parameters, optimizers: Optimizers, picks: Tensor, *, min_opacity: float = 0.005) -> Rows:
    """Append a copy of each row in `picks` (k,) int64, and let all copies of a row and itself look as it did alone.

    A row may be picked several times. No opacity falls below min_opacity.
    """
    n = _count(parameters, "scales", "opacities")
    changed = torch.unique(picks)
    source = torch.cat([torch.arange(n, device=picks.device), picks])
    fresh = _last(len(picks), len(source), picks.device)
    fresh[changed] = True
    return rearrange(parameters, optimizers, source, fresh, _shared(parameters, source[fresh], min_opacity))


def add(
    parameters: Parameters,
    optimizers: Optimizers,
    count: int,
    generator: torch.Generator | None = None,
    *,
    among: Tensor | None = None,
    min_opacity: float = 0.005,
) -> Rows:
    """Append `count` Gaussians: copies, by `clone`, of rows drawn with their opacity as the probability.

    count: none are added if it is 0 or less. among: a mask (n,) of those that may be drawn. Raises InputError if none
    can be.
    """
    picks = _draw(_opacities(parameters, among), count, generator)
    return clone(parameters, optimizers, picks, min_opacity=min_opacity)


def relocate(
    parameters: Parameters,
    optimizers: Optimizers,
    dead: Tensor,
    generator: torch.Generator | None = None,
    *,
    among: Tensor | None = None,
    min_opacity: float = 0.005,
) -> Rows:
    """Move every Gaussian of the mask `dead` (n,) onto a living one, drawn with its opacity as the probability.

    It becomes a copy of that one, and all copies together look as that one did; `min_opacity` as in `clone`. The number
    of rows and the place of each stay. among: a mask (n,) of those that may be drawn. As in the paper's code both ends
    start with moments of 0; gsplat leaves those of the dead one. Raises InputError if none can be drawn.
    """
    n = _masked(parameters, dead, "scales", "opacities")
    picks = _draw(_opacities(parameters, among) * ~dead, int(dead.sum()), generator)
    source = torch.arange(n, device=dead.device)
    source[dead] = picks
    fresh = dead.clone()
    fresh[picks] = True
    return rearrange(parameters, optimizers, source, fresh, _shared(parameters, source[fresh], min_opacity))


@torch.no_grad()
def jitter(
    parameters: Parameters, size: float, generator: torch.Generator | None = None, *, chosen: Tensor | None = None
) -> None:
    """Shake the centres, in place: each moves by its covariance times `size` times normal noise, faint ones most.

    The noise is multiplied by sigmoid(100 (0.005 - opacity)), so an opaque Gaussian stays (arXiv 2404.09591). size: the
    learning rate of the centres times 5e5, as gsplat has it. chosen: a mask (n,); the others keep their bits.
    """
    _count(parameters, "means", "quats", "scales", "opacities")
    if chosen is not None:
        _masked(parameters, chosen)
    means, scales = parameters["means"], parameters["scales"].exp()
    faint = torch.sigmoid(100 * (0.005 - parameters["opacities"].flatten().sigmoid()))
    axes = rotation(parameters["quats"])
    noise = _normal(means, generator) * (size * faint)[:, None]
    noise = axes @ (scales * scales * (axes.mT @ noise[:, :, None])[:, :, 0])[:, :, None]
    moved = means + noise[:, :, 0]
    means.copy_(moved if chosen is None else torch.where(chosen[:, None], moved, means))


def mcmc_strategy(generator: torch.Generator | None = None, **options: Any) -> Any:
    """gsplat's MCMCStrategy(**options), which for CPU tensors uses `relocate`, `add` and `jitter` of this module.

    A drop-in for gsplat.MCMCStrategy, of which it is a subclass; CUDA tensors go to gsplat's own code. generator: where
    the CPU's random numbers come from; without it torch's global generator, which gsplat always uses.

    Raises InputError where gsplat is missing: the three functions need no gsplat.
    """
    try:
        strategy = _mcmc_class()(**options)
    except ImportError as error:
        raise InputError(
            f"mcmc_strategy: gsplat cannot be imported ({error}); `pip install gsplat`, or call "
            "relocate, add and jitter of splatedit.render.densify, which do not need it."
        ) from error
    strategy.generator = generator
    return strategy


@functools.cache
def _mcmc_class() -> type:
    from gsplat import MCMCStrategy  # pyright: ignore[reportMissingImports]

    class CpuMCMCStrategy(MCMCStrategy):
        generator: Any = None

        def step_post_backward(
            self,
            params: Any,
            optimizers: dict[str, Optimizer],
            state: dict[str, Any],
            step: int,
            info: dict[str, Any],
            lr: float,
        ) -> None:
            if params["means"].is_cuda:
                return super().step_post_backward(params, optimizers, state, step, info, lr)
            if self.refine_start_iter < step < self.refine_stop_iter and step % self.refine_every == 0:
                dead = params["opacities"].detach().flatten().sigmoid() <= self.min_opacity
                relocate(params, optimizers, dead, self.generator, min_opacity=self.min_opacity)
                n = len(params["means"])
                more = min(self.cap_max, int(1.05 * n)) - n
                add(params, optimizers, more, self.generator, min_opacity=self.min_opacity)
                if self.verbose:
                    print(f"Step {step}: Relocated {int(dead.sum())} GSs. Now having {len(params['means'])} GSs.")
            last = getattr(self, "noise_injection_stop_iter", -1)  # newer than gsplat 1.5.3
            if last < 0 or step < last:
                jitter(params, lr * self.noise_lr, self.generator)

    return CpuMCMCStrategy


# ---------------------------------------------------------------- who should grow


@torch.no_grad()
def screen_gradients(meta: Mapping[str, Any], *, absgrad: bool = False) -> tuple[Tensor, Tensor]:
    """How hard the loss pulls at each Gaussian on screen, summed over cameras (n,), and how many see it (n,) int64.

    meta: the third result of `rasterization`, after meta["means2d"].retain_grad() and backward(). The unit is that of
    gsplat's `grow_grad2d`: loss, averaged over cameras, per half the picture's width or height; add up both results
    over steps and divide. absgrad: take the sums of absolute values (arXiv 2404.10484) that rasterization(absgrad=True)
    leaves.

    Raises InputError if the gradient is not there.
    """
    means2d = meta["means2d"]
    gradient = getattr(means2d, "absgrad", None) if absgrad else means2d.grad
    if gradient is None:
        hint = "call rasterization(absgrad=True)" if absgrad else 'call meta["means2d"].retain_grad()'
        raise InputError(
            f"screen_gradients: means2d has no {'absgrad' if absgrad else 'grad'}; {hint} before backward()."
        )
    half = torch.tensor([meta["width"], meta["height"]], dtype=gradient.dtype, device=gradient.device) / 2
    pull = (gradient * half * meta["n_cameras"]).norm(dim=-1)  # 0 where a camera does not see it
    return pull.sum(0), (meta["radii"] > 0).all(-1).sum(0)


# ---------------------------------------------------------------- small things


def _each(optimizers: Optimizers) -> Iterator[Optimizer]:
    if isinstance(optimizers, Optimizer):
        yield optimizers
    else:
        yield from optimizers.values() if isinstance(optimizers, Mapping) else optimizers


def _count(parameters: Parameters, *needed: str) -> int:
    """How many rows there are; raises InputError for parameters that differ in that, or are not there."""
    counts = {name: len(p) for name, p in parameters.items()}
    for name in needed:
        if name not in counts:
            raise InputError(f"densify: parameters have {', '.join(counts)}, and no {name!r}, which is needed here.")
    if len(set(counts.values())) != 1:
        raise InputError(f"densify: parameters differ in their number of rows: {counts}.")
    return next(iter(counts.values()))


def _masked(parameters: Parameters, chosen: Tensor, *needed: str) -> int:
    n = _count(parameters, *needed)
    if chosen.dtype != torch.bool or chosen.shape != (n,):
        raise InputError(
            f"densify: a mask {tuple(chosen.shape)} of {chosen.dtype} where ({n},) of torch.bool is expected."
        )
    return n


def _last(count: int, total: int, device: torch.device) -> Tensor:
    return torch.arange(total, device=device) >= total - count


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def _opacities(parameters: Parameters, among: Tensor | None) -> Tensor:
    """Opacities (n,) in [0, 1], and 0 outside the mask."""
    _count(parameters, "scales", "opacities")
    opacities = parameters["opacities"].detach().flatten().sigmoid()
    if among is None:
        return opacities
    _masked(parameters, among)
    return opacities * among


def _draw(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` rows, with replacement; torch.multinomial ends at 2^24 rows."""
    if count > 0 and not weights.any():
        raise InputError(f"densify: none of {len(weights)} Gaussians is alive and may be copied, so none can be added.")
    device = weights.device if generator is None else generator.device
    at = torch.rand(max(count, 0), generator=generator, device=device, dtype=torch.float64).to(weights.device)
    edges = weights.double().cumsum(0)
    return torch.searchsorted(edges, at * edges[-1:], right=True)


def _shared(parameters: Parameters, rows: Tensor, min_opacity: float) -> dict[str, Tensor]:
    """Opacities and scales, as stored, for `rows` that name a Gaussian as often as there will be copies of it."""
    opacities = parameters["opacities"].detach().flatten()[rows].double().sigmoid()
    scales = parameters["scales"].detach()[rows].double().exp()
    copies = torch.bincount(rows, minlength=1)[rows]
    opacities, scales = relocation(opacities, scales, copies)
    return {"opacities": _logit(opacities.clamp(min=min_opacity)), "scales": scales.log()}


def _half_alpha(opacities: Tensor) -> Tensor:
    """Logits with which two at one place are as opaque as one with these."""
    return _logit(-torch.expm1(torch.log1p(-opacities.double().sigmoid()) / 2))


def _logit(opacities: Tensor) -> Tensor:
    return opacities.clamp(max=1 - torch.finfo(torch.float32).eps).logit()
