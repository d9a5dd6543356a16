"""The first picture of an ordinary PLY, before torch is imported, which takes longer than all else together.

A twin of `formats.ply` in numpy, for the files that nearly everybody has. Where anything is out of the ordinary there
is no first look, and what reads the file properly says what is wrong.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from splatedit import extents
from splatedit.errors import InputError
from splatedit.sidecars import sidecar
from splatedit.viewer import framing, wire
from splatedit.viewer.wire import Splats

if TYPE_CHECKING:
    from splatedit.viewer.server import Served

SAMPLE = 10_000  # splats that quantiles are taken of: enough to know where to look from
POSITION, COLOR = ("x", "y", "z"), ("f_dc_0", "f_dc_1", "f_dc_2")
SIZE, TURN = ("scale_0", "scale_1", "scale_2"), ("rot_0", "rot_1", "rot_2", "rot_3")
NEEDED = (*POSITION, *COLOR, *SIZE, *TURN, "opacity")
TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "char": "i1", "int8": "i1", "uchar": "u1"}
TYPES |= {"uint8": "u1", "short": "<i2", "int16": "<i2", "ushort": "<u2", "uint16": "<u2", "int": "<i4", "int32": "<i4"}
TYPES |= {"uint": "<u4", "uint32": "<u4"}


class Glance(NamedTuple):
    """What a browser is sent first, and where the scene is."""

    splats: Splats
    centre: np.ndarray  # (3,) float64, world units
    radius: float
    up: str


def show(served: Served, seen: Glance) -> Served:
    """Show it to every browser that comes, from where all of it is seen; the display takes it over."""
    framing.aim(served.server, *seen[1:])
    at = wire.place(seen.centre, seen.radius)
    add = served.server.scene.add_gaussian_splats
    handle = add(wire.path_of("after"), **seen.splats._asdict(), scale=at.scale, position=at.position)
    return served._replace(first=wire.First(handle, seen.splats, at))


def glance(path: str | Path, up: str | None = None) -> Glance | None:
    """Read a plain binary PLY of at most wire.SPLATS splats; None for any other file, and for one that is not sound."""
    try:
        read, beside = columns(Path(path).expanduser()), sidecar(path).up
    except (OSError, ValueError, KeyError, InputError):
        return None
    if read is None:
        return None
    column, comments = read
    points, sizes, turns, colors = (np.stack([column[n] for n in names], 1) for names in (POSITION, SIZE, TURN, COLOR))
    logits = column["opacity"]
    if not all(np.isfinite(part).all() for part in (points, sizes, turns, colors, logits)) or not turns.any(1).all():
        return None
    with np.errstate(over="ignore"):
        if not np.isfinite(np.exp(sizes)).all():
            return None
    every = -(-len(points) // SAMPLE)
    sample = [part[::every].astype(np.float64) for part in (points, sizes, logits)]
    mass = extents.weigh(sample[1], sample[2])
    centre, radius = extents.ball(sample[0], mass)
    if radius <= 0:
        return None
    said = extents.up_in_header(comments)
    up = up or beside or (said[0] if said else extents.up_of_ground(sample[0], mass)) or extents.DEFAULT_UP
    splats = wire.splats(points, turns, sizes, logits, colors, wire.place(centre, radius))
    return Glance(splats, centre, radius, up)


def columns(path: Path) -> tuple[dict[str, np.ndarray], list[str]] | None:
    """The columns (n,) by name, and the comments, of a little-endian file of vertices alone; None if it is not that."""
    with open(path, "rb") as stream:
        head, ended, _ = stream.read(1 << 16).partition(b"end_header\n")
    lines = head.decode("ascii").split("\n")
    if not ended or lines[:2] != ["ply", "format binary_little_endian 1.0"]:
        return None
    comments = [line.removeprefix("comment ") for line in lines if line.startswith("comment ")]
    rest = [line for line in lines[2:] if line and not line.startswith("comment ")]
    element = re.fullmatch(r"element vertex (\d{1,9})", rest[0])
    kinds = [re.fullmatch(r"property (\w+) (\w+)", line) for line in rest[1:]]
    if element is None or not all(kinds) or not 0 < int(element[1]) <= wire.SPLATS:
        return None
    row = np.dtype([(kind[2], TYPES[kind[1]]) for kind in kinds if kind])
    n, start = int(element[1]), len(head) + len(ended)
    if path.stat().st_size != start + n * row.itemsize or any(row[name] != "<f4" for name in NEEDED):
        return None
    rows = np.fromfile(path, row, offset=start)
    return {name: rows[name] for name in NEEDED}, comments
