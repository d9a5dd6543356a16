"""Score distillation via inversion: the noise of SDS is not drawn but found, by DDIM run upwards from the render."""

from __future__ import annotations

import torch
from torch import Tensor

from splatedit.diffusion import SMALLEST, Denoise, Draw, Guided, Text, pick, scales
from splatedit.errors import InputError
from splatedit.score import Request, weighed


def sdi(
    denoise: Guided,
    z: Tensor,
    draw: Draw,
    request: Request,
    *,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    steps: int = 10,
    scale: float | None = None,
    eta: float = 0.3,
    weight: str = "x0",
) -> Tensor:
    """SDI (arXiv 2405.15891): w(t) (ehat - e), e the noise that DDIM inversion of z under the target text ends with.

    With the weight x0, s / a, this is z - zhat. scale: of the guidance during the inversion; None is minus that of the
    score, as in the official code, and 1 where guidance is off. steps, eta: see `invert`. Made for steps t that fall
    during the edit (`annealed`). Departs from the official code in one point: there the inversion ends up to T / steps
    above t, and what it reached is denoised as if it were at t; here both are t.
    """
    if scale is None:
        scale = 1.0 if denoise.scale == 1 else -denoise.scale
    inverse = denoise._replace(scale=scale)
    noise = invert(inverse, z, draw.t, request.target, alphas_cumprod, generator, steps, eta)
    draw = draw._replace(noise=noise)
    return weighed(denoise(draw.noised(z), draw.t, request.target) - noise, draw, weight)


def invert(
    denoise: Denoise,
    z: Tensor,
    t: Tensor,
    text: Text,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    steps: int = 10,
    eta: float = 0.0,
) -> Tensor:
    """The noise e with a z + s e the latents at steps t (b,) that DDIM (arXiv 2010.02502), run upwards from z, reaches.

    steps: of the whole schedule; a row climbs those of the grid 0, T / steps, 2 T / steps, ... that lie below its t and
    then to t, one evaluation each. eta: fresh noise added after each, in units of DDIM's own deviation. At t = 0 there
    is nothing to find: zeros. Raises InputError for fewer than one step.
    """
    if not 1 <= steps <= len(alphas_cumprod):
        raise InputError(f"steps: found {steps}, expected from 1 to {len(alphas_cumprod)}.")
    x = z
    for i in range(steps):
        now, then = (t.clamp_max(k * len(alphas_cumprod) // steps) for k in (i, i + 1))
        rows = (now < then).nonzero()[:, 0]
        if len(rows) == 0:
            break
        (a, s), (a2, s2) = (scales(alphas_cumprod, k[rows], z) for k in (now, then))
        a, a2 = a.clamp_min(SMALLEST), a2.clamp_min(SMALLEST)
        ehat = denoise(x[rows], now[rows], pick(text, rows))
        deviation = s / s2 * (1 - (a2 / a) ** 2).sqrt()
        climbed = a2 * (x[rows] - s * ehat) / a + s2 * ehat
        if eta:
            fresh = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype).to(z.device)
            climbed = climbed + eta * deviation * fresh[rows]
        x = x.index_copy(0, rows, climbed)
    a, s = scales(alphas_cumprod, t, z)
    found = (x - a * z) / s.clamp_min(SMALLEST)
    return torch.where((t > 0).view(-1, 1, 1, 1), found, 0)
