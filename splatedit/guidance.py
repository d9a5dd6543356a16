"""Score-distillation gradients: pure functions that know nothing of scenes, cameras or settings.

Each takes a denoiser (already guided, see `diffusion.guided`), latents z (b, c, h, w), a Draw and a Request, and
returns d objective / dz, shaped like z. `push` turns that into a loss. Adding a guidance is one function and one
word in GUIDANCE; whoever needs more than a Request holds takes it as a keyword option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from splatedit.diffusion import SMALLEST, Denoise, Draw, Text, stack
from splatedit.fpr import FPR, fpr


class Request(NamedTuple):
    """What is asked of an edit, one row for each row of z."""

    target: Text
    source: Text
    z_source: Tensor  # (b, c, h, w) latents of the unedited scene in the same views
    source_score: Tensor | None = None  # ehat of z_source at the draw under `source`, if known: saves its evaluation


Guidance = Callable[..., Tensor]  # (denoise, z, draw, request, **options) -> gradient like z


def push(z: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient with respect to z is `grad`, whatever z depends on."""
    return (z * grad.detach()).sum()


def sds(denoise: Denoise, z: Tensor, draw: Draw, request: Request, weight: str = "sigma2") -> Tensor:
    """Score distillation (DreamFusion, arXiv 2209.14988): s^2 (ehat - noise), or weight 1 if weight="uniform"."""
    residual = denoise(draw.noised(z), draw.t, request.target) - draw.noise
    if weight == "uniform":
        return residual
    if weight == "sigma2":
        return draw.s**2 * residual
    raise ValueError(f"weight: found {weight!r}, expected sigma2 or uniform.")


def dds(denoise: Denoise, z: Tensor, draw: Draw, request: Request) -> Tensor:
    """Delta denoising score (arXiv 2304.07090): the same draw on both branches cancels the bias of SDS."""
    target, source = target_and_source(denoise, z, draw, request)
    return target - source


def ids(
    denoise: Denoise,
    z: Tensor,
    draw: Draw,
    request: Request,
    iters: int = 3,
    lam: float = 1.0,
    history: list[FPR] | None = None,
) -> Tensor:
    """Identity-preserving distillation sampling (arXiv 2502.19930): DDS at the noise that `fpr` found for the source.

    history: a list that receives the FPR, with one residual more than `iters`: the source branch, evaluated again at
    the refined latents as in the official code, gives the last one for nothing.
    """
    refined = fpr(denoise, request.z_source, draw, request.source, iters, lam)
    draw = draw._replace(noise=refined.noise)
    target, source = target_and_source(denoise, z, draw, request)
    if history is not None:
        last = (draw.s / draw.a.clamp_min(SMALLEST) * (source - draw.noise)).flatten(1).norm(dim=1)
        history.append(refined._replace(residuals=torch.cat([refined.residuals, last.detach()[None]])))
    return target - source


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


GUIDANCE: dict[str, Guidance] = {"sds": sds, "dds": dds, "ids": ids}
