"""What report.html costs: bytes of its pictures and its film by coding, and the seconds that a run takes for it.

    python benchmarks/report.py scenes/cat.ply outputs/cat/a-pig@20261121-170312/edited.ply [--size 256]

The pictures and the film are drawn as a run draws them, from an orbit; with --size 512 as for Stable Diffusion. CPU
time is of all threads of this process.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from splatedit import files, media, page
from splatedit.cameras import bounds, orbit
from splatedit.regions import pixel_changes, splat_changes
from splatedit.report import FILM_BYTES
from splatedit.results import FPS
from splatedit.scenes import marked
from splatedit.work import ELEVATION, FRAMES, VIEWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", type=Path)
    parser.add_argument("edited", type=Path)
    parser.add_argument("--size", type=int, default=256, help="of the pictures, pixels")
    options = parser.parse_args()
    both = files.load(options.scene), files.load(options.edited)
    cameras, turn = (orbit(both[0], n, elevation=ELEVATION, size=options.size) for n in (VIEWS, FRAMES))
    before, after = (list(media.draw(g, cameras)) for g in both)
    film = list(media.beside(*(media.draw(g, turn) for g in both)))
    table = Table("what", "kB", "CPU s", title=f"{both[0].n:,} splats, {VIEWS} pairs and {FRAMES} frames")
    table = rows(table, before + after, film)
    inside = torch.arange(both[0].n) < both[0].n // 2
    for name, work in {
        "splats: whole, inside, outside": lambda: splat_changes(*both, bounds(both[0]).radius, None, inside),
        "mask drawn": lambda: list(media.draw(marked(both[0], inside), cameras, (0.0, 0.0, 0.0))),
        "pixels: whole, inside, outside": lambda: pixel_changes(before, after, before),
    }.items():
        table.add_row(name, "", f"{timed(work)[1]:.2f}")
    Console(width=100).print(table)


def rows(table: Table, pictures: list[np.ndarray], film: list[np.ndarray]) -> Table:
    """Add the codings to the table; the page takes the first of the pictures and what it can of the film."""
    codings = {
        "pictures, WebP as in the page": lambda: sum(len(page.picture(image)) * 3 // 4 for image in pictures),
        "pictures, WebP lossless": lambda: sum(coded([image], "webp", lossless=True) for image in pictures),
        "pictures, PNG": lambda: sum(coded([image], "png") for image in pictures),
        "film, mp4 as in turntable.mp4": lambda: len(mp4(film)[0]),
        "film, mp4 as in the page": lambda: len(mp4(film)[1] or b""),
        "film, animated WebP": lambda: coded(film, "webp", quality=80),
        "film, animated PNG": lambda: coded(film, "png"),
    }
    for name, code in codings.items():
        size, seconds = timed(code)
        table.add_row(name, f"{size / 1000:.0f}", f"{seconds:.2f}")
    return table


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the CPU seconds it takes."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def coded(frames: list[np.ndarray], format: str, **how: Any) -> int:
    """Bytes of a picture, or of frames that follow one another."""
    stream = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in frames)
    more = {"save_all": True, "append_images": rest, "duration": 1000 / FPS, "loop": 0} if rest else {}
    first.save(stream, format=format, **more, **how)
    return stream.tell()


def mp4(film: list[np.ndarray]) -> tuple[bytes, bytes | None]:
    """turntable.mp4, and what the page takes of it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        media.save_frames(film, path, FPS)
        return path.read_bytes(), media.smaller_mp4(path, FILM_BYTES)


if __name__ == "__main__":
    main()
