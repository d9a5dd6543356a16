"""How an edit goes through the noise levels: which step t of the schedule each of its draws gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from splatedit.diffusion import Draw, check_range, step_range, with_noise
from splatedit.errors import InputError

PARTS = 16  # of the range of steps; `stratified` visits each once in as many draws


class Progress(NamedTuple):
    """Where an edit stands when it draws."""

    low: int  # steps of the schedule drawn from, both included
    high: int
    done: float = 0.0  # share of the edit, 0 at its first step, 1 at its last
    drawn: int = 0  # draws made before


def uniform(count: int, at: Progress, generator: torch.Generator) -> Tensor:
    """Each step of the range with the same probability."""
    return torch.randint(at.low, at.high + 1, (count,), generator=generator, device=generator.device)


def stratified(count: int, at: Progress, generator: torch.Generator) -> Tensor:
    """Uniform, and any PARTS draws from a multiple of PARTS on fall one into each of PARTS equal parts of the range.

    The parts come in bit-reversed order, so that neighbouring draws lie far apart.
    """
    bits = PARTS.bit_length() - 1
    order = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(PARTS)]
    part = torch.tensor([order[(at.drawn + i) % PARTS] for i in range(count)], device=generator.device)
    place = (part + torch.rand(count, generator=generator, device=generator.device)) / PARTS
    return at.low + (place * (at.high + 1 - at.low)).long().clamp_max(at.high - at.low)


def annealed(count: int, at: Progress, generator: torch.Generator) -> Tensor:
    """No chance: from the top of the range at the first step in a straight line to the bottom at the last."""
    t = round(at.high - at.done * (at.high - at.low))
    return torch.full((count,), t, dtype=torch.int64, device=generator.device)


Timesteps = Callable[[int, Progress, torch.Generator], Tensor]  # count, where, generator -> t (count,) int64
TIMESTEPS: dict[str, Timesteps] = {"uniform": uniform, "stratified": stratified, "annealed": annealed}
PUBLISHED = {"sdi": "annealed", "dreamcatalyst": "annealed"}  # by guidance; the others draw uniformly


def edit_draw(
    name: str,
    alphas_cumprod: Tensor,
    z: Tensor,
    t_range: tuple[float, float],
    generator: torch.Generator,
    *,
    done: float = 0.0,
    drawn: int = 0,
    anneal: float = 0.0,
) -> Draw:
    """The draw of one step of an edit for latents z (b, c, h, w), by a key of TIMESTEPS.

    t_range: fractions of the schedule. anneal: how far its upper end has come down once the edit is `done` (1): 0 not
    at all, 1 to the lower end; `annealed` goes all the way down by itself. Raises InputError.
    """
    check_draws(name, t_range)
    low, high = t_range
    if name != "annealed":
        high = high - (high - low) * anneal * done
    at = Progress(*step_range(alphas_cumprod, (low, high)), done, drawn)
    return with_noise(alphas_cumprod, TIMESTEPS[name](len(z), at, generator), z, generator)


def check_draws(name: str, t_range: tuple[float, float]) -> None:
    """Raise InputError for a way to draw that is not known, or a range that no schedule has."""
    if name not in TIMESTEPS:
        raise InputError(f"timesteps: {name!r} is not known; choose one of {', '.join(TIMESTEPS)}.")
    check_range(t_range)
