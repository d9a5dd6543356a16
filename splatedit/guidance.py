"""Score-distillation gradients: pure functions that know nothing of scenes, cameras or settings.

Each takes a denoiser (already guided, see `diffusion.guided`), latents z (b, c, h, w), a Draw and a Request, and
returns d objective / dz, shaped like z. `push` turns that into a loss. Adding a guidance is one function and one
word in GUIDANCE; whoever needs more than a Request holds takes it as a keyword option.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from splatedit.contrastive import cds
from splatedit.diffusion import SMALLEST, Denoise, Draw
from splatedit.fpr import FPR, fpr, rows_per_sample
from splatedit.inversion import sdi
from splatedit.posterior import dreamcatalyst, pds
from splatedit.score import Guidance, Request, push, target_and_source, weighed
from splatedit.variational import vsd

__all__ = [
    "BACKWARDS",
    "FPR",
    "GUIDANCE",
    "Guidance",
    "Request",
    "cds",
    "dds",
    "dreamcatalyst",
    "fpr",
    "ids",
    "pds",
    "push",
    "sdi",
    "sds",
    "vsd",
]


def sds(denoise: Denoise, z: Tensor, draw: Draw, request: Request, weight: str = "sigma2") -> Tensor:
    """Score distillation (DreamFusion, arXiv 2209.14988): w(t) (ehat - noise)."""
    return weighed(denoise(draw.noised(z), draw.t, request.target) - draw.noise, draw, weight)


def dds(denoise: Denoise, z: Tensor, draw: Draw, request: Request, weight: str = "uniform") -> Tensor:
    """Delta denoising score (arXiv 2304.07090): the same draw on both branches cancels the bias of SDS."""
    target, source = target_and_source(denoise, z, draw, request)
    return weighed(target - source, draw, weight)


def ids(
    denoise: Denoise,
    z: Tensor,
    draw: Draw,
    request: Request,
    iters: int = 3,
    lam: float = 1.0,
    solver: str = "grad",
    history: list[FPR] | None = None,
    weight: str = "uniform",
    **options: Any,
) -> Tensor:
    """Identity-preserving distillation sampling (arXiv 2502.19930): DDS at the noise that `fpr` found for the source.

    iters, lam, solver, options: of `fpr`; no iterations are DDS. history: a list that receives the FPR of the step,
    with the evaluations of the whole step and one residual more than iterations: the source branch, evaluated at the
    refined latents as in the official code, gives the last one for nothing. Where the request knows the source's score,
    the draw's noise is taken as refined already.
    """
    if request.source_score is not None:
        iters, options = 0, {}
    refined = fpr(denoise, request.z_source, draw, request.source, iters, lam, solver, **options)
    if refined.score is not None:
        request = request._replace(source_score=refined.score)
    draw = draw._replace(noise=refined.noise)
    target, source = target_and_source(denoise, z, draw, request)
    if history is not None:
        last = (draw.s / draw.a.clamp_min(SMALLEST) * (source - draw.noise)).flatten(1).norm(dim=1)
        branches = 2 if request.source_score is None else 1
        spent = refined.evaluations + branches * len(z) * rows_per_sample(denoise)
        residuals = torch.cat([refined.residuals, last.detach()[None]])
        history.append(refined._replace(residuals=residuals, evaluations=spent))
    return weighed(target - source, draw, weight)


GUIDANCE: dict[str, Guidance] = {
    "sds": sds,
    "vsd": vsd,
    "sdi": sdi,
    "dds": dds,
    "cds": cds,
    "pds": pds,
    "dreamcatalyst": dreamcatalyst,
    "ids": ids,
}

# Rows of the network through which a guidance sends gradients back for each sample, beside those of FPR: to the latents
# for the contrastive loss, to the weights for the LoRA.
BACKWARDS: dict[str, int] = {"cds": 1, "vsd": 1}
