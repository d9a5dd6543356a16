"""What the history of an edit costs: bytes on disk, seconds and memory of push, undo, redo and strength.

    python benchmarks/history.py [EDITED.ply SCENE.ply] [--count 100000]

Without files an edit is made up: every Gaussian moves in all that a run moves (not shN), as far as an edit of the
bundled cat scene does. CPU time and memory are those of a process of its own, less what it takes to import splatedit.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from splatedit import files
from splatedit.gaussians import Gaussians

# Median change of an edit of the bundled cat scene in 300 steps, in the units that files store.
MOVES = {"means": 0.011, "quats": 0.009, "scales": 0.04, "opacities": 0.34, "sh0": 0.36}


def made_up(count: int, degree: int) -> tuple[Gaussians, Gaussians]:
    """A scene and an edit of it."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh0": (1, 3)}
    shapes["shN"] = ((degree + 1) ** 2 - 1, 3)
    means, quats, scales, opacities, sh0, shN = (torch.randn(count, *shape, generator=rng) for shape in shapes.values())
    scene = Gaussians(means, quats, scales, opacities, sh0, shN)
    moved = {k: getattr(scene, k) + m * torch.randn(getattr(scene, k).shape, generator=rng) for k, m in MOVES.items()}
    return scene, scene._replace(**moved)


# Each in a process of its own, so that its memory can be told; prints CPU seconds and MiB, less what it began with.
CHILD = """
import sys, time
from splatedit import files, stack
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
scene, edited = sys.argv[1:]
start, base = time.process_time(), peak()
{work}
print(time.process_time() - start, peak() - base)
"""
WORK = {
    "push": "stack.push(edited, files.load(scene), scene=scene)",
    "undo": "stack.Stack.open(edited).undo()",
    "redo": "stack.Stack.open(edited).redo()",
    "strength": "stack.Stack.open(edited).strength(0.5)",
}


def measure(name: str, scene: Path, edited: Path) -> None:
    """Push, undo, redo, strength on one pair of files; prints a line each. Undo and redo are checked bit for bit."""
    digest, size, count = files.sha256(edited), edited.stat().st_size, files.load(scene).n
    lines = []
    for what, expected in (("push", digest), ("undo", files.sha256(scene)), ("redo", digest), ("strength", None)):
        command = [sys.executable, "-c", CHILD.format(work=WORK[what]), str(scene), str(edited)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, memory = map(float, done.stdout.split())
        lines.append(
            f"    {what:<9}{seconds:6.2f} s CPU  {memory:6.0f} MiB, {memory * 2**20 / size:.1f} times the file"
        )
        assert expected is None or files.sha256(edited) == expected
    record = Path(f"{edited}.history", "0001.npz").stat().st_size
    print(f"{name}: {count:,} splats, {size / 1e6:.2f} MB; the edit on disk {record / 1e6:.2f} MB", end=", ")
    print(f"{record / count:.1f} bytes each, {record / size:.0%} of the file", *lines, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="EDITED.ply SCENE.ply")
    parser.add_argument("--count", type=int, default=100_000, help="Gaussians of the made-up scene")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scene, edited = Path(folder) / "scene.ply", Path(folder) / "edited.ply"
        if options.files:
            shutil.copy(options.files[0], edited)
            shutil.copy(options.files[1], scene)
            measure(options.files[1].name, scene, edited)
            return
        for degree in (0, 3):
            for path, gaussians in zip((scene, edited), made_up(options.count, degree), strict=True):
                files.save(gaussians, path)
            shutil.rmtree(f"{edited}.history", ignore_errors=True)
            measure(f"made up, SH degree {degree}", scene, edited)


if __name__ == "__main__":
    main()
