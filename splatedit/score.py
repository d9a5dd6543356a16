"""What every score-distillation gradient shares: what is asked, weights of noise levels, both branches in one call.

A guidance is a function (denoise, z, draw, request, **options) -> d objective / dz, like z (b, c, h, w); `denoise` is
already guided (see `diffusion.guided`). It knows nothing of scenes, cameras or settings; `push` makes a loss of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from splatedit.diffusion import SMALLEST, Denoise, Draw, Text, stack
from splatedit.errors import InputError


class Request(NamedTuple):
    """What is asked of an edit, one row for each row of z."""

    target: Text
    source: Text
    z_source: Tensor  # (b, c, h, w) latents of the unedited scene in the same views
    source_score: Tensor | None = None  # ehat of z_source at the draw under `source`, if known: saves its evaluation
    camera: Tensor | None = None  # (b, 16) camera-to-world matrices, row by row, for a denoiser that is told the view


Guidance = Callable[..., Tensor]  # (denoise, z, draw, request, **options) -> gradient like z


def push(z: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient with respect to z is `grad`, whatever z depends on."""
    return (z * grad.detach()).sum()


WEIGHTS: dict[str, Callable[[Draw], Tensor | float]] = {
    "uniform": lambda draw: 1.0,
    "sigma2": lambda draw: draw.s**2,  # 1 - alphas_cumprod, of DreamFusion
    "fantasia3d": lambda draw: draw.a * draw.s**2,  # arXiv 2303.13873
    "x0": lambda draw: draw.s / draw.a.clamp_min(SMALLEST),  # counts the score in clean latents instead of noise
}


def weighed(grad: Tensor, draw: Draw, weight: str) -> Tensor:
    """`grad` times w(t), a key of WEIGHTS; raises InputError for another."""
    if weight not in WEIGHTS:
        raise InputError(f"weight: found {weight!r}, expected one of {', '.join(WEIGHTS)}.")
    return WEIGHTS[weight](draw) * grad


def target_and_source(denoise: Denoise, z: Tensor, draw: Draw, request: Request) -> tuple[Tensor, Tensor]:
    """ehat of the edited latents under the target text and of the source latents under the source text, in one call.

    Only the first is evaluated where the request knows the second (see `source_cache`).
    """
    if request.source_score is not None:
        return denoise(draw.noised(z), draw.t, request.target), request.source_score
    x = torch.cat([draw.noised(z), draw.noised(request.z_source)])
    both = denoise(x, torch.cat([draw.t, draw.t]), stack(request.target, request.source))
    target, source = both.chunk(2)
    return target, source


def lifted_gradient(values: Tensor, x: Tensor) -> Tensor:
    """The gradient of each sample's value (b,) with respect to its own x (b, ...), through a half-precision network.

    Entries of a gradient near 1 / sqrt(size) would be lost on the way: a power of two lifts them, and being exact,
    changes nothing in single precision. A sample may still overflow.
    """
    boost = 2.0 ** round(math.log2(8 * math.sqrt(x[0].numel())))
    (grad,) = torch.autograd.grad(boost * values.sum(), x)
    return grad / boost


def slope(values: Tensor, x: Tensor) -> Tensor:
    """As `lifted_gradient`, but a sample whose gradient overflows gets zeros; the others keep theirs."""
    grad = lifted_gradient(values, x)
    sound = grad.flatten(1).isfinite().all(1).view(-1, *[1] * (x.ndim - 1))
    return torch.where(sound, grad, 0)
