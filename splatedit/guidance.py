"""Score-distillation gradients: pure functions that know nothing of scenes, cameras or settings.

Each takes a denoiser (already guided, see `diffusion.guided`), latents z (b, c, h, w), a Draw and a Request, and
returns d objective / dz, shaped like z. `push` turns that into a loss. Adding a guidance is one function and one
word in GUIDANCE; whoever needs more than a Request holds takes it as a keyword option.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from splatedit.diffusion import SMALLEST, Denoise, Draw, Text, stack

REFERENCE_SIZE = 16384  # numbers in a 4x64x64 latent, at which the step of IDS was published


class Request(NamedTuple):
    """What is asked of an edit, one row for each row of z."""

    target: Text
    source: Text
    z_source: Tensor  # (b, c, h, w) latents of the unedited scene in the same views


Guidance = Callable[..., Tensor]  # (denoise, z, draw, request, **options) -> gradient like z


class FPR(NamedTuple):
    """What fixed-point regularisation leaves behind."""

    noise: Tensor  # (b, c, h, w) the refined noise
    residuals: Tensor  # (k, b) |z_source - zhat| of each sample: before each step and, from `ids`, after the last


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
    """ehat of the edited latents under the target text and of the source latents under the source text, in one call."""
    x = torch.cat([draw.noised(z), draw.noised(request.z_source)])
    both = denoise(x, torch.cat([draw.t, draw.t]), stack(request.target, request.source))
    target, source = both.chunk(2)
    return target, source


def fpr(denoise: Denoise, z_source: Tensor, draw: Draw, source: Text, iters: int = 3, lam: float = 1.0) -> FPR:
    """Fixed-point regularisation of IDS (arXiv 2502.19930): noise from which the network finds the source again.

    Each iteration moves x_t against the gradient of |z_source - zhat(x_t)|, the *unsquared* L2 norm of each sample,
    taken through the guided network; its length is therefore the same however large the residual is. lam is a length in
    latent units at 4x64x64 and grows with the square root of the latent's size, which keeps its relative strength.
    """
    size = z_source[0].numel()
    length = lam * math.sqrt(size / REFERENCE_SIZE)
    # The gradient's seed has entries near 1/sqrt(size), which half precision loses on the way through a network.
    # A power of two lifts them and, being exact, changes nothing in single precision.
    boost = 2.0 ** round(math.log2(8 * math.sqrt(size)))
    a = draw.a.clamp_min(SMALLEST)
    x, residuals = draw.noised(z_source), []
    for _ in range(iters):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            residual = (z_source.detach() - (x - draw.s * denoise(x, draw.t, source)) / a).flatten(1).norm(dim=1)
            (slope,) = torch.autograd.grad(boost * residual.sum(), x)
        # An overflow in half precision costs that sample this step, not the run.
        sound = slope.flatten(1).isfinite().all(1).view(-1, 1, 1, 1)
        x = (x - torch.where(sound, length / boost * slope, 0)).detach()
        residuals.append(residual.detach())
    noise = (x - draw.a * z_source) / draw.s if iters else draw.noise
    return FPR(noise.detach(), torch.stack(residuals) if residuals else z_source.new_zeros(0, len(z_source)))


GUIDANCE: dict[str, Guidance] = {"sds": sds, "dds": dds, "ids": ids}
