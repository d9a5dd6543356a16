"""Every kernel of the CPU renderer alone: one thread, the same arguments again and again, the shortest of many calls.

    python benchmarks/raster_kernels.py 10kx512 100kx512 1Mx512
    PYTHONPATH=OLD python benchmarks/raster_kernels.py --here no 100kx512      # the kernels of another checkout

What a change in a kernel brings shows here without the noise of the rest. Memory is warm, so the first touch of a page
is not in it, and neither is Python. Run it twice: on a shared machine a neighbour may slow one run down.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))


class Call(NamedTuple):
    """One start of a kernel, which can be repeated."""

    kernel: Any
    count: int
    args: tuple[Any, ...]
    before: list[tuple[np.ndarray, np.ndarray]]  # arrays of integers, and what was in them: places and keys are used up

    def __call__(self) -> float:
        """Run it on this thread; milliseconds."""
        for array, content in self.before:
            array[...] = content
        start = time.perf_counter()
        self.kernel(0, self.count, 0, *self.args)
        return 1e3 * (time.perf_counter() - start)


def calls_of(scene: dict[str, Any]) -> dict[str, Call]:
    """What forward and backward start, by the names of the kernels."""
    from splatedit.render import pool, rasterization

    calls: dict[str, Call] = {}
    run = pool.run

    def watched(kernel: Any, count: int, chunks: int, *args: Any) -> None:
        before = [(a, a.copy()) for a in args if isinstance(a, np.ndarray) and a.dtype.kind in "iu"]
        calls[kernel.py_func.__name__] = Call(kernel, count, args, before)
        run(kernel, count, chunks, *args)

    pool.run = watched
    try:
        leaves = {k: scene[k].requires_grad_() for k in ("means", "quats", "scales", "opacities", "colors")}
        image, alphas, _ = rasterization(**{**scene, **leaves})
        torch.autograd.backward([image, alphas], [torch.randn_like(image), torch.randn_like(alphas)])
    finally:
        pool.run = run
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=["10kx512", "100kx512", "1Mx512"], help="Gaussians x pixels")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--here", choices=("yes", "no"), default="yes", help="the package of this checkout")
    options = parser.parse_args()
    if options.here == "yes":
        sys.path.insert(0, str(Path(__file__).parent.parent))
    import_module("splatedit.render")  # before raster, which puts its own checkout first
    from raster import header, row
    from raster_peers import ball

    torch.set_num_threads(1)
    print("\n".join(header(argparse.Namespace(num_threads=1))))
    for text in options.rows:
        n, width, height = row(text)
        print(f"\n{text}: ms on one thread, the shortest of {options.repeats}")
        for name, call in calls_of(ball(n, width, height)).items():
            print(f"{name:>20} {min(call() for _ in range(options.repeats)):9.2f}", flush=True)


if __name__ == "__main__":
    main()
