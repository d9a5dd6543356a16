"""Reading and writing a large .ply, beside numpy's own reading of the same bytes and beside other libraries.

    python benchmarks/files.py [--gaussians 1000000] [--degree 3] [--times 7] [--folder FOLDER]

All contenders take turns in one process, and each number is the fastest of its turns: on a machine that does other
things as well that is what repeats. CPU time is summed over threads. The yardstick is numpy.fromfile or tofile of the
same bytes plus one copy of them. Peak memory is that of a process of its own, beyond what it had before, in sizes of
the file.

A peer that is not installed is skipped: pip install "splatedit[benchmark]", and gsplat for its exporter.

Not all do the same. gsply hands out views into the bytes of the file, unchecked and not contiguous; "contiguous" adds
what gsplat or a GPU would ask of them. splatedit checks every number, and `save` waits until the disk has it (fsync)
before the new file takes the place of the old; "no fsync" is its writer alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does

import numpy as np
import torch

from splatedit.files import load, save
from splatedit.formats.ply import write_ply
from splatedit.gaussians import SH_REST, Gaussians

Action = Callable[[Path], Any]


class Contender(NamedTuple):
    """One way to read or write the file."""

    name: str
    needs: str  # the package, "" for none
    run: Action


def made(n: int, degree: int) -> Gaussians:
    """Random splats without a file behind them."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(n, 3), (n, 4), (n, 3), (n,), (n, 1, 3), (n, SH_REST[degree], 3)]
    means, quats, scales, opacities, sh0, shN = (torch.randn(shape, generator=draw) for shape in shapes)
    return Gaussians(means, quats, scales, opacities, sh0, shN)


# ------------------------------------------------------------------------------------------------------------- reading


def gsply_contiguous(path: Path) -> list[np.ndarray]:
    """gsply's views as the arrays that gsplat takes."""
    import gsply

    data = gsply.plyread(path)
    return [np.ascontiguousarray(getattr(data, k)) for k in ("means", "quats", "scales", "opacities", "sh0", "shN")]


def plyfile_read(path: Path) -> list[np.ndarray]:
    """As INRIA's loader does it, column by column."""
    from plyfile import PlyData

    vertex = PlyData.read(str(path))["vertex"]
    names = [p.name for p in vertex.properties]
    groups = (
        ("x", "y", "z"),
        *([n for n in names if n.startswith(p)] for p in ("f_dc", "f_rest", "opac", "scale", "rot")),
    )
    return [np.stack([np.asarray(vertex[name]) for name in group], 1) for group in groups if group]


def read_by_gsply(path: Path) -> Any:
    import gsply

    return gsply.plyread(path)


READERS = [
    Contender("numpy.fromfile", "", lambda path: np.fromfile(path, np.uint8)),
    Contender("numpy.fromfile + copy", "", lambda path: np.fromfile(path, np.uint8).copy()),
    Contender("splatedit.load", "", load),
    Contender("gsply", "gsply", read_by_gsply),
    Contender("gsply, contiguous", "gsply", gsply_contiguous),
    Contender("plyfile", "plyfile", plyfile_read),
]


# ------------------------------------------------------------------------------------------------------------- writing


def writers(gaussians: Gaussians, content: np.ndarray) -> list[Contender]:
    """Ways to write these splats; `content` is the file they make."""
    numbers = {name: value.numpy() for name, value in gaussians.parameters.items()}

    def synced(path: Path) -> None:
        with open(path, "wb") as stream:
            content.copy().tofile(stream)
            os.fsync(stream.fileno())

    def alone(path: Path) -> None:
        with open(path, "wb") as stream:
            write_ply(gaussians, stream, path)

    def gsply(path: Path) -> None:
        import gsply

        means, scales, quats, opacities = (numbers[name] for name in ("means", "scales", "quats", "opacities"))
        gsply.plywrite(path, means, scales, quats, opacities, numbers["sh0"][:, 0], numbers["shN"])

    def gsplat(path: Path) -> None:
        from gsplat.exporter import export_splats

        g = gaussians
        export_splats(g.means, g.scales, g.quats, g.opacities, g.sh0, g.shN, save_to=str(path))

    def plyfile(path: Path) -> None:
        """As INRIA's code does it: one wide array, then a tuple for each row."""
        from plyfile import PlyData, PlyElement

        n = gaussians.n
        wide = np.concatenate([numbers["means"], np.zeros((n, 3)), numbers["sh0"][:, 0]], 1, dtype=np.float32)
        rest = numbers["shN"].transpose(0, 2, 1).reshape(n, -1)
        parts = (wide, rest, numbers["opacities"][:, None], numbers["scales"], numbers["quats"])
        wide = np.concatenate(parts, 1)
        table = np.empty(n, [(f"c{i}", "f4") for i in range(wide.shape[1])])
        table[:] = list(map(tuple, wide))
        PlyData([PlyElement.describe(table, "vertex")]).write(str(path))

    return [
        Contender("numpy.tofile", "", lambda path: content.tofile(path)),
        Contender("copy + numpy.tofile", "", lambda path: content.copy().tofile(path)),
        Contender("splatedit, no fsync", "", alone),
        Contender("gsply", "gsply", gsply),
        Contender("gsplat's exporter", "gsplat", gsplat),
        Contender("plyfile", "plyfile", plyfile),
        Contender("copy + numpy.tofile + fsync", "", synced),
        Contender("splatedit.save", "", lambda path: save(gaussians, path)),
    ]


# ----------------------------------------------------------------------------------------------------------- measuring


def fastest(contenders: list[Contender], place: Callable[[], Path], times: int) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds, the smallest of several turns each; what takes over 5 seconds has one turn."""
    found: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    for _ in range(times):
        for contender in contenders:
            if found[contender.name] and found[contender.name][0][0] > 5:
                continue
            path = place()
            clocks = time.perf_counter(), time.process_time()
            result = contender.run(path)
            found[contender.name].append((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
            del result
    return {name: (min(w for w, _ in runs), min(c for _, c in runs)) for name, runs in found.items()}


def peak(args: argparse.Namespace, kind: str, name: str, folder: Path) -> float:
    """Bytes a fresh process needs at most beyond what it had before."""
    command = [sys.executable, __file__, f"--peak={kind}:{name}", f"--folder={folder}"]
    command += [f"--gaussians={args.gaussians}", f"--degree={args.degree}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_here(args: argparse.Namespace, small: Path, large: Path) -> None:
    """Print the answer of `peak`: one small file first, so that imports and thread pools are not counted."""
    kind, name = args.peak.split(":")
    for path in (small, large):
        gaussians = load(path) if kind == "write" else None
        content = np.fromfile(path, np.uint8) if kind == "write" and "numpy" in name else np.empty(0, np.uint8)
        chosen = READERS if gaussians is None else writers(gaussians, content)
        run = next(c.run for c in chosen if c.name == name)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        kept = run(path if kind == "read" else path.with_suffix(".out.ply"))
        status = Path("/proc/self/status").read_text()
        high = int(status.split("VmHWM:")[1].split()[0]) * 1024
    del kept
    print(high - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gaussians", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--degree", type=int, default=3, choices=list(SH_REST))
    parser.add_argument("--times", type=int, default=7, metavar="N", help="turns of each contender")
    parser.add_argument("--folder", metavar="FOLDER", help="where files are written; else a temporary one")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.peak:
            peak_here(args, Path(args.folder) / "small.ply", Path(args.folder) / "large.ply")
            return
        small, large = Path(folder) / "small.ply", Path(folder) / "large.ply"
        save(made(100, args.degree), small)
        bare = made(args.gaussians, args.degree)
        columns = [
            "x",
            "y",
            "z",
            *(f"f_dc_{i}" for i in range(3)),
            *(f"f_rest_{i}" for i in range(3 * bare.shN.shape[1])),
        ]
        columns += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
        save(bare._replace(layout=tuple(columns)), large)  # without normals, the order of gsplat and gsply
        size = large.stat().st_size
        print(f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {date.today()}")
        print(f"{args.gaussians} Gaussians of degree {args.degree}: {size / 1e6:.0f} MB")
        rehearse(READERS, small)
        show(args, "read", READERS, lambda: large, "numpy.fromfile + copy", Path(folder), size)

        def fresh() -> Path:
            (Path(folder) / "written.ply").unlink(missing_ok=True)
            return Path(folder) / "written.ply"

        rehearse(writers(load(small), np.fromfile(small, np.uint8)), fresh())
        contenders = writers(load(large), np.fromfile(large, np.uint8))
        show(args, "write", contenders, fresh, "copy + numpy.tofile", Path(folder), size)


def rehearse(contenders: list[Contender], path: Path) -> None:
    """One turn each on a small scene: imports and compiling are not what is measured."""
    for contender in contenders:
        if not contender.needs or importlib.util.find_spec(contender.needs):
            contender.run(path)


def show(args, kind: str, contenders: list[Contender], place, yardstick: str, folder: Path, size: int) -> None:
    present = [c for c in contenders if not c.needs or importlib.util.find_spec(c.needs)]
    found = fastest(present, place, args.times)
    print(f"\n{kind:<30} wall ms  CPU ms  wall / yardstick  CPU / yardstick  peak memory / file")
    for contender in contenders:
        if contender not in present:
            print(f"{contender.name:<30} not installed, skipped")
            continue
        wall, cpu = found[contender.name]
        base = found[yardstick + (" + fsync" if contender.name == "splatedit.save" else "")]
        memory = peak(args, kind, contender.name, folder) / size
        mark = " *" if contender.name == yardstick else ""
        ratios = f"{wall / base[0]:>17.2f} {cpu / base[1]:>16.2f} {memory:>19.2f}"
        print(f"{contender.name + mark:<30} {1e3 * wall:>7.0f} {1e3 * cpu:>7.0f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
