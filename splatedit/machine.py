"""What a run is measured on: versions, device, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from splatedit import __version__

if TYPE_CHECKING:
    pass


def versions() -> dict[str, str]:
    """Of Python, splatedit and what decides its numbers."""
    found = {"splatedit": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in ("torch", "numpy", "numba", "diffusers", "transformers", "gsplat"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device_name(device) -> str:
    """The GPU's name, or the CPU's kind with cores and threads."""
    import torch

    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"


def peak_memory() -> dict[str, int | None]:
    """MiB: the largest resident size of the process so far, and the most that torch held on the GPU."""
    import resource

    import torch

    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    gpu = torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else None
    return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit, "gpu": gpu}
