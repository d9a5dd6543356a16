"""Posterior distillation: the score of an edit plus a term that holds it at the source, weighed by noise level.

    g = psi_t (z - z_source) + chi_t (ehat_target - ehat_source)

This one formula is PDS, whatever the second noise of its definition (which cancels), and DreamCatalyst.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from splatedit.diffusion import SMALLEST, Denoise, Draw
from splatedit.errors import InputError
from splatedit.score import Request, target_and_source


def pds(
    denoise: Denoise,
    z: Tensor,
    draw: Draw,
    request: Request,
    *,
    alphas_cumprod: Tensor,
    stride: int = 2,
    identity: float = 1.0,
    psi: Tensor | None = None,
    chi: Tensor | None = None,
) -> Tensor:
    """Posterior distillation sampling (arXiv 2311.13831): edit and source shall share their stochastic latents.

    stride: see `pds_weights`; 2 are the numbers of the official code, 1 is DDS weighed by chi. identity: factor on psi.
    psi, chi: tables (T,) over the steps of the schedule, instead of those weights.
    """
    tables = pds_weights(alphas_cumprod, stride)
    psi, chi = (at(own if own is not None else table, draw) for own, table in zip((psi, chi), tables, strict=True))
    return held(denoise, z, draw, request, identity * psi, chi)


def dreamcatalyst(
    denoise: Denoise,
    z: Tensor,
    draw: Draw,
    request: Request,
    *,
    alphas_cumprod: Tensor,
    delta: float = 0.2,
    gamma: float = 0.8,
    psi0: float = 0.075,
    identity: float = 1.0,
) -> Tensor:
    """DreamCatalyst (arXiv 2407.11394): PDS that holds on to the source at high noise instead of at low noise.

    With tau = t / T: chi = delta + gamma tau^(1/e), psi = identity psi0 exp(tau); the constants are those of the
    official code. Its schedule of steps is `annealed`; its InstructPix2Pix prior and FreeU are not part of this.
    """
    tau = (draw.t.to(z.dtype) / len(alphas_cumprod)).view(-1, 1, 1, 1)
    return held(denoise, z, draw, request, identity * psi0 * tau.exp(), delta + gamma * tau ** (1 / math.e))


def held(denoise: Denoise, z: Tensor, draw: Draw, request: Request, psi: Tensor, chi: Tensor) -> Tensor:
    """The formula at the head of this file. psi, chi: (b, 1, 1, 1)."""
    target, source = target_and_source(denoise, z, draw, request)
    return psi * (z - request.z_source) + chi * (target - source)


def pds_weights(alphas_cumprod: Tensor, stride: int = 2) -> tuple[Tensor, Tensor]:
    """psi and chi of PDS at every step of a schedule, each (T,) float64.

    They follow from the posterior of step t - stride given step t. With stride 1 that posterior is consistent and psi
    is zero everywhere. The official code combines the beta of one step with the alphas_cumprod of two steps earlier
    (500 inference steps); psi is what this mismatch leaves, and grows with stride - 1. Steps below `stride`, without a
    predecessor, take the weights of step `stride`. Raises InputError for a stride that the schedule does not have.
    """
    if not 1 <= stride < len(alphas_cumprod):
        raise InputError(f"stride: found {stride}, expected from 1 to {len(alphas_cumprod) - 1}.")
    power = alphas_cumprod.double().clamp_min(SMALLEST)
    before = torch.cat([power.new_ones(1), power[:-1]])
    t = torch.arange(len(power), device=power.device).clamp_min(stride)
    now, then = power[t], power[t - stride]
    alpha = now / before[t]
    beta = 1 - alpha
    c0, c1 = then.sqrt() * beta / (1 - now), alpha.sqrt() * (1 - then) / (1 - now)
    deviation = ((1 - then) / (1 - now) * beta).sqrt()
    psi = (then.sqrt() - c0 - c1 * now.sqrt()) / deviation
    chi = c0 * ((1 - now) / now).sqrt() / deviation
    return psi, chi


def at(table: Tensor, draw: Draw) -> Tensor:
    """A table (T,) at the draw's steps, (b, 1, 1, 1) in its type and on its device."""
    return table.to(draw.t.device)[draw.t].to(draw.noise.dtype).view(-1, 1, 1, 1)
