"""The first picture of an ordinary PLY, before torch is imported, which takes longer than all else together.

A twin of `formats.ply` and `encoding.encode` in numpy, for the files that nearly everybody has. Where anything is out
of the ordinary there is no first look, and what reads the file properly says what is wrong. The display replaces its
node.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from splatedit import extents
from splatedit.viewer import framing

if TYPE_CHECKING:
    import viser

MOST = 200_000  # display.SPLATS
SAMPLE = 10_000  # splats that quantiles are taken of: enough to know where to look from
NODE = "/splats/after"  # of the display
RADIUS, SMALLEST, LARGEST, THINNEST = 32.0, 2.0**-11, 240.0, 2.0**-5  # as in encoding
SH_C0 = 0.28209479177387814  # gaussians.SH_C0
POSITION, COLOR = ("x", "y", "z"), ("f_dc_0", "f_dc_1", "f_dc_2")
SIZE, TURN = ("scale_0", "scale_1", "scale_2"), ("rot_0", "rot_1", "rot_2", "rot_3")
NEEDED = (*POSITION, *COLOR, *SIZE, *TURN, "opacity")
TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "char": "i1", "int8": "i1", "uchar": "u1"}
TYPES |= {"uint8": "u1", "short": "<i2", "int16": "<i2", "ushort": "<u2", "uint16": "<u2", "int": "<i4", "int32": "<i4"}
TYPES |= {"uint": "<u4", "uint32": "<u4"}


class Glance(NamedTuple):
    """What viser's `add_gaussian_splats` takes, of n splats, and where the scene is."""

    centers: np.ndarray  # (n, 3) float32, in units in which the scene has RADIUS
    covariances: np.ndarray  # (n, 3, 3) float32
    rgbs: np.ndarray  # (n, 3) uint8
    opacities: np.ndarray  # (n, 1) uint8
    centre: np.ndarray  # (3,) float64, world units
    radius: float
    up: str


def show(server: viser.ViserServer, seen: Glance) -> None:
    """Show it to every browser that comes, from where all of it is seen."""
    framing.aim(server, seen.centre, seen.radius, seen.up)
    x, y, z = seen.centre.tolist()
    scale = seen.radius / RADIUS
    server.scene.add_gaussian_splats(NODE, *seen[:4], scale=scale, position=(x, y, z))


def glance(path: str | Path, up: str | None = None) -> Glance | None:
    """Read a plain binary PLY of at most MOST splats; None for any other file, and for one that is not sound."""
    try:
        read = columns(Path(path).expanduser())
    except (OSError, ValueError, KeyError):
        return None
    if read is None:
        return None
    column, comments = read
    points, sizes, turns, colors = (np.stack([column[n] for n in names], 1) for names in (POSITION, SIZE, TURN, COLOR))
    logits = column["opacity"]
    if not all(np.isfinite(part).all() for part in (points, sizes, turns, colors, logits)) or not turns.any(1).all():
        return None
    every = -(-len(points) // SAMPLE)
    sample = [part[::every].astype(np.float64) for part in (points, sizes, logits)]
    mass = extents.weigh(sample[1], sample[2])
    centre, radius = extents.ball(sample[0], mass)
    if radius <= 0:
        return None
    said = extents.up_in_header(comments)
    up = up or beside(Path(path)) or (said[0] if said else extents.up_of_ground(sample[0], mass)) or extents.DEFAULT_UP
    with np.errstate(over="ignore"):
        return Glance(
            ((points - centre.astype(np.float32)) * np.float32(RADIUS / radius)),
            covariances(turns, np.exp(sizes) * np.float32(RADIUS / radius)),
            as_bytes(0.5 + SH_C0 * colors),
            as_bytes(1 / (1 + np.exp(-logits)))[:, None],
            centre,
            radius,
            up,
        )


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
    if element is None or not all(kinds) or not 0 < int(element[1]) <= MOST:
        return None
    row = np.dtype([(kind[2], TYPES[kind[1]]) for kind in kinds if kind])
    n, start = int(element[1]), len(head) + len(ended)
    if path.stat().st_size != start + n * row.itemsize or any(row[name] != "<f4" for name in NEEDED):
        return None
    rows = np.fromfile(path, row, offset=start)
    return {name: rows[name] for name in NEEDED}, comments


def beside(path: Path) -> str | None:
    """The up axis that a sound sidecar names."""
    try:
        said = re.search(r"^up: *[\"']?([+-][xyz])[\"']? *(#.*)?$", path.with_suffix(".yaml").read_text("utf-8"), re.M)
    except (OSError, ValueError):
        return None
    return said[1] if said else None


def covariances(turns: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """R diag(s^2) R^T, (n, 3, 3), of quaternions (n, 4) wxyz and standard deviations (n, 3) held in bounds."""
    deviations = deviations.clip(SMALLEST, LARGEST)
    deviations = np.maximum(deviations, THINNEST * deviations.max(1, keepdims=True))
    w, x, y, z = np.ascontiguousarray((turns / np.linalg.norm(turns, axis=1, keepdims=True)).T)
    rotation = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    axes = np.stack([np.stack(row) for row in rotation]) * deviations.T
    return np.ascontiguousarray(np.stack([(axes[i] * axes).sum(1) for i in range(3)]).transpose(2, 0, 1))


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8, rounded; others are clipped."""
    return (values * 255 + 0.5).clip(0, 255).astype(np.uint8)
