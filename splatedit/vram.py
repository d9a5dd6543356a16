"""What an edit does without so that it fits into 8, 12, 16 or 24 GB of a GPU, and one step down after it did not."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# Settings by GB. For Stable Diffusion 1.5 in half precision at 512 pixels, by the sizes of what is kept; not yet
# measured on a GPU (benchmarks/vram.py does). The records of the source cache lie in main memory anyway. Slicing of
# attention is in none of them: fused attention, which torch 2 has on every GPU it supports, keeps less without it.
VRAM: dict[int, dict[str, Any]] = {
    24: {"vae_slicing": True, "rows_at_once": 16, "max_gaussians": 4_000_000},
    16: {"vae_slicing": True, "rows_at_once": 8, "max_gaussians": 3_000_000, "checkpointing": True},
    12: {"vae_slicing": True, "rows_at_once": 4, "max_gaussians": 2_000_000, "checkpointing": True, "supersample": 1},
    8: {
        "vae_slicing": True,
        "rows_at_once": 2,
        "max_gaussians": 1_000_000,
        "checkpointing": True,
        "supersample": 1,
        "views_per_step": 1,
    },
}
# Settings that decide how much memory an edit takes; the second line leaves its result as it is, to rounding.
MEMORY = ("vram", "views_per_step", "supersample", "vae_tiling", "max_gaussians")
MEMORY += ("checkpointing", "attention_slicing", "vae_slicing", "rows_at_once")


class Smaller(NamedTuple):
    """The next preset down and what it changes."""

    vram: int
    changes: dict[str, Any]  # settings by name, `vram` among them


def cap(settings: Mapping[str, Any], n: int) -> int | None:
    """`max_gaussians` for a scene of n: that of a preset never asks for fewer than there are, a user's own does."""
    most, vram = settings["max_gaussians"], settings["vram"]
    if most is None or vram is None or most != VRAM[vram]["max_gaussians"]:
        return most
    return max(most, n)


def leaner(settings: Mapping[str, Any], vram: int) -> dict[str, Any]:
    """What a preset lowers in these settings: to the smaller number (None is the largest), and switches to on."""
    changes: dict[str, Any] = {}
    for name, value in VRAM[vram].items():
        now = settings[name]
        if name == "max_gaussians" and not settings["grow_percent"]:
            continue
        lower = (not now if isinstance(value, bool) else now is None or value < now) and value != now
        if lower:
            changes[name] = value
    return changes


def step_down(settings: Mapping[str, Any], room: float | None) -> Smaller | None:
    """The largest preset below the settings' own, and not above `room` (GB; None: unknown), that changes anything."""
    own = settings["vram"] or math.inf
    fitting = [vram for vram in VRAM if vram < own and (room is None or vram <= max(math.ceil(room), min(VRAM)))]
    for vram in sorted(fitting, reverse=True):
        if changes := leaner(settings, vram):
            return Smaller(vram, {"vram": vram, **changes})
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an exception says, of a GPU or of main memory."""
    import torch

    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def room(device: torch.device) -> float | None:
    """GB that torch has, or could have, on a GPU; None on a CPU, which pages."""
    import torch

    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / 1e9


def release() -> None:
    """Give back what nobody holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
