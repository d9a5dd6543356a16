"""What the history of an edit costs: bytes on disk, seconds and memory of push, undo, redo and strength.

    python benchmarks/history.py [EDITED.ply SCENE.ply] [--count 100000]

Without files an edit is made up: every Gaussian moves in all that a run moves (not shN), as far as an edit of the
bundled cat scene does. Prints a table.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch

from splatedit import files
from splatedit.gaussians import Gaussians
from splatedit.stack import Stack, push

# Median change of an edit of the bundled cat scene in 300 steps, in the units that files store.
MOVES = {"means": 0.01, "quats": 0.02, "scales": 0.05, "opacities": 0.2, "sh0": 0.3}


def made_up(count: int, degree: int) -> tuple[Gaussians, Gaussians]:
    """A scene and an edit of it."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh0": (1, 3)}
    shapes["shN"] = ((degree + 1) ** 2 - 1, 3)
    scene = Gaussians(**{name: torch.randn(count, *shape, generator=rng) for name, shape in shapes.items()})
    moved = {k: getattr(scene, k) + m * torch.randn(getattr(scene, k).shape, generator=rng) for k, m in MOVES.items()}
    return scene, scene._replace(**moved)


def measure(name: str, scene: Path, edited: Path) -> None:
    """Push, undo, redo, strength on one pair of files; prints a line."""
    seconds = {}

    def clock(what, work):
        start = time.perf_counter()
        result = work()
        seconds[what] = time.perf_counter() - start
        return result

    before = files.load(scene)
    entry = clock("push", lambda: push(edited, before, scene=scene))
    digest, size = files.sha256(edited), edited.stat().st_size
    history = Stack.open(edited)
    clock("undo", history.undo)
    assert files.sha256(edited) == files.sha256(scene)
    clock("redo", history.redo)
    assert files.sha256(edited) == digest
    clock("strength", lambda: history.strength(0.5))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    each = entry.bytes / before.n
    times = "  ".join(f"{k} {v:.2f} s" for k, v in seconds.items())
    print(f"{name:<24} {before.n:>9,} splats  file {size / 1e6:.2f} MB  edit {entry.bytes / 1e6:.2f} MB", end="  ")
    print(f"({each:.1f} bytes each, {entry.bytes / size:.0%})  {times}  peak {peak:.0f} MiB")


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
