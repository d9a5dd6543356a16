"""How long the renderer takes to start: imports, and the first picture of a fresh process.

    python benchmarks/start.py [--times 5] [--threads 2]

Each line is a process of its own, each number the median of several (of one where everything is compiled, into an empty
NUMBA_CACHE_DIR). Wall time is what the user waits; CPU time, summed over threads, is what to compare on a machine that
does other things as well. "all of it" is what the process takes from its first import on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

PROCESS = """
import json, sys, time
clocks = time.perf_counter, time.process_time
marks = [("", [clock() for clock in clocks])]
def mark(name):
    marks.append((name, [clock() for clock in clocks]))

import torch
torch.set_num_threads({threads})
mark("import torch")
import splatedit.render
mark("import splatedit.render, after torch")
if {warm}:
    splatedit.render.warm()
    mark("warm()")
scene = dict(means=torch.rand(1000, 3) - 0.5, quats=torch.randn(1000, 4), scales=torch.full((1000, 3), 0.02))
scene |= dict(opacities=torch.full((1000,), 0.5), colors=torch.rand(1000, 16, 3), sh_degree=3)
scene["viewmats"] = torch.eye(4)[None]
scene["viewmats"][0, 2, 3] = 2.0
scene |= dict(Ks=torch.tensor([[[64.0, 0, 32], [0, 64, 32], [0, 0, 1]]]), width=64, height=64, render_mode="RGB+ED")
leaves = [scene[name].requires_grad_() for name in ("means", "quats", "scales", "opacities", "colors")]
mark("")
image, alphas, meta = splatedit.render.rasterization(**scene, rasterize_mode="antialiased")
mark("first picture")
image.sum().backward()
mark("first gradients")
spent = [(name, [b - a for a, b in zip(before, now)]) for (_, before), (name, now) in zip(marks, marks[1:]) if name]
spent.append(("all of it", [b - a for a, b in zip(marks[0][1], marks[-1][1])]))
print(json.dumps(spent))
"""


def measure(folder: str, threads: int, times: int, warm: bool = False) -> list[tuple[str, float, float]]:
    """Step, wall seconds and CPU seconds, medians of `times` processes that keep machine code in `folder`."""
    command = [sys.executable, "-c", PROCESS.format(threads=threads, warm=warm)]
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"NUMBA_CACHE_DIR": folder}
    root = Path(__file__).resolve().parents[1]
    runs = []
    for _ in range(times):
        done = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout))
    steps = [name for name, _ in runs[0]]
    columns = [[tuple(run[i][1]) for run in runs] for i in range(len(steps))]
    middles = [[statistics.median(c) for c in zip(*column, strict=True)] for column in columns]
    return [(name, wall, cpu) for name, (wall, cpu) in zip(steps, middles, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, load {load:.1f}"
    print(f"{date.today()}, {machine}")
    print(f"{'machine code':<14}{'step':<38}{'wall s':>8}{'CPU s':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, times, warm in (
            ("none", 1, False),
            ("on disk", options.times, False),
            ("on disk", options.times, True),
        ):
            for step, wall, cpu in measure(folder, options.threads, times, warm):
                print(f"{name:<14}{step:<38}{wall:>8.2f}{cpu:>8.2f}", flush=True)
            print()


if __name__ == "__main__":
    main()
