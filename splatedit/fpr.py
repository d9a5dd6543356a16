"""Fixed-point regularisation (FPR) of IDS (arXiv 2502.19930): noise from which the network finds the source again."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from splatedit.diffusion import SMALLEST, Denoise, Draw, Text

REFERENCE_SIZE = 16384  # numbers in a 4x64x64 latent, at which the step of IDS was published


class FPR(NamedTuple):
    """What fixed-point regularisation leaves behind."""

    noise: Tensor  # (b, c, h, w) the refined noise
    residuals: Tensor  # (k, b) |z_source - zhat| of each sample: before each step and, from `ids`, after the last


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
