"""Compressed PLY of SuperSplat and PlayCanvas: 16 bytes a Gaussian, in chunks of 256 with their own ranges.

The layout is the one that splat-transform (github.com/playcanvas/splat-transform, 2.x, read-ply and
write-compressed-ply) reads and writes: element `chunk` holds minimum and maximum of positions, log scales and colours
of 256 Gaussians each; `vertex` holds positions and scales as 11, 10 and 11 bits within them, the three smaller
components of the unit quaternion as 10 bits each, colours and opacity as 8 bits; `sh`, if there is one, the higher
spherical harmonics as bytes from -4 to 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import torch
from scipy.special import expit

from splatedit.errors import InputError
from splatedit.formats.checks import check_write, unnamed_losses
from splatedit.formats.packing import from_smallest_three, normalized, opacity_logits, smallest_three
from splatedit.formats.ply_file import NAMES, PlyFile, table, table_of, write_tables
from splatedit.gaussians import PARAMETERS, SH_C0, SH_REST, Gaussians

LARGEST = 1e37  # of a range's ends; colours become larger by 1 / SH_C0, and have to stay float32
CHUNK = 256
RANGES = {  # columns of an element `chunk`: minima, then maxima
    "means": ("min_x", "min_y", "min_z", "max_x", "max_y", "max_z"),
    "scales": ("min_scale_x", "min_scale_y", "min_scale_z", "max_scale_x", "max_scale_y", "max_scale_z"),
    "colours": ("min_r", "min_g", "min_b", "max_r", "max_g", "max_b"),  # missing before SuperSplat 2: 0 and 1
}
PACKED = ("packed_position", "packed_rotation", "packed_scale", "packed_color")
BITS_3 = ((21, 11), (11, 10), (0, 11))  # (shift, bits) of x, y, z
BITS_4 = ((24, 8), (16, 8), (8, 8), (0, 8))  # red, green, blue, opacity
BITS_QUAT = ((20, 10), (10, 10), (0, 10))  # the three components that are not the largest; bits 30, 31 say which is
SCALES = (-20.0, 20.0)  # log scales beyond are clamped
SH_LIMIT = 4.0


def is_compressed(ply: PlyFile) -> bool:
    """Whether the header is that of a compressed splat."""
    return "vertex" in ply.elements and PACKED[0] in ply.elements["vertex"].columns


def unpack(ply: PlyFile) -> Gaussians:
    """The Gaussians of a compressed PLY, quaternions of length 1; raises InputError with element, property and row."""
    count = _check_header(ply)
    vertex, ranges = table(ply, "vertex"), _ranges(ply)
    which = np.minimum(np.arange(count) // CHUNK, len(ranges["means"]) - 1)
    colours = _unorm(vertex["packed_color"], BITS_4)
    values = {
        "means": _within(_unorm(vertex["packed_position"], BITS_3), ranges["means"][which]),
        "quats": _quats(vertex["packed_rotation"]),
        "scales": _within(_unorm(vertex["packed_scale"], BITS_3), ranges["scales"][which]),
        "opacities": opacity_logits(vertex["packed_color"] & 255),
        "sh0": ((_within(colours[:, :3], ranges["colours"][which]) - 0.5) / SH_C0)[:, None],
        "shN": _harmonics(ply, count),
    }
    tensors = (torch.from_numpy(np.ascontiguousarray(values[name], np.float32)) for name in PARAMETERS)
    extra = {name: vertex[name].copy() for name in ply.elements["vertex"].columns if name not in PACKED}
    others = {e.name for e in ply.elements.values() if not e.lists} - {"chunk", "vertex", "sh"}
    elements = {name: table(ply, name) for name in ply.elements if name in others}
    return Gaussians(*tensors, extra=extra, comments=ply.comments, obj_info=ply.obj_info, elements=elements)


def _check_header(ply: PlyFile) -> int:
    """The number of Gaussians; InputError unless elements, properties, types and counts are those of the format."""
    where = f"{ply.path}: compressed PLY"
    count = ply.elements["vertex"].count
    if count == 0:
        raise InputError(f"{where}: element 'vertex' holds 0 Gaussians, expected at least 1; the scene is empty.")
    wanted = {("vertex", name): "u4" for name in PACKED}
    if "chunk" not in ply.elements:
        raise InputError(f"{where}: no element 'chunk', found {', '.join(ply.elements)}; export it again.")
    coloured = "min_r" in ply.elements["chunk"].columns
    chunked = [name for key, names in RANGES.items() if key != "colours" or coloured for name in names]
    wanted |= {("chunk", name): "f4" for name in chunked}
    counts = {"chunk": -(-count // CHUNK)}
    if "sh" in ply.elements:
        k = len(ply.elements["sh"].columns)
        sizes = [3 * k for k in SH_REST.values() if k]
        if k not in sizes:
            expected = ", ".join(map(str, sizes))
            raise InputError(f"{where}: element 'sh' has {k} properties, expected one of {expected}; export it again.")
        wanted |= {("sh", f"f_rest_{i}"): "u1" for i in range(k)}
        counts["sh"] = count
    for (element, name), code in wanted.items():
        found = ply.elements[element].columns.get(name)
        if found != code:
            what = f"the type {NAMES[found]}" if found else "no such property"
            raise InputError(
                f"{where}: element {element!r}, property {name!r}: found {what}, expected {NAMES[code]}; "
                "export it again."
            )
    for name, expected in counts.items():
        if ply.elements[name].count != expected:
            raise InputError(
                f"{where}: element {name!r} has {ply.elements[name].count} rows, expected {expected} for {count} "
                "Gaussians; the file is damaged, export it again."
            )
    return count


def _ranges(ply: PlyFile) -> dict[str, np.ndarray]:
    """Minima and maxima of each chunk, (chunks, 6) float64 by what they bound."""
    chunks = table(ply, "chunk")
    ranges = {}
    for key, names in RANGES.items():
        if names[0] not in ply.elements["chunk"].columns:
            ranges[key] = np.tile([0.0, 0, 0, 1, 1, 1], (len(chunks), 1))
            continue
        ranges[key] = np.stack([chunks[name] for name in names], 1).astype(np.float64)
        bad = ~(np.abs(ranges[key]) <= LARGEST)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"{ply.path}: element 'chunk', property {names[column]!r}, row {row}: found "
                f"{ranges[key][row, column]:g}, expected a finite number, {LARGEST:g} at most; export it again."
            )
    return ranges


def _unorm(packed: np.ndarray, fields: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The bit fields of (n,) integers as (n, fields) numbers in [0, 1]."""
    return np.stack([((packed >> shift) & (2**bits - 1)) / (2**bits - 1) for shift, bits in fields], 1)


def _within(fractions: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    low, high = ranges[:, :3], ranges[:, 3:]
    return low * (1 - fractions) + high * fractions


def _quats(packed: np.ndarray) -> np.ndarray:
    """Unit quaternions (n, 4), w x y z, from the three smaller components and the number of the largest."""
    return from_smallest_three(packed >> 30, (_unorm(packed, BITS_QUAT) - 0.5) * 2**0.5)


def _harmonics(ply: PlyFile, count: int) -> np.ndarray:
    """The higher spherical harmonics, (n, k, 3): bytes are the middles of 256 steps, the outer two the ends."""
    if "sh" not in ply.elements:
        return np.empty((count, 0, 3), np.float32)
    bytes_ = table(ply, "sh")
    steps = (np.arange(256) + 0.5) / 256
    steps[0], steps[255] = 0, 1
    values = ((steps - 0.5) * (2 * SH_LIMIT)).astype(np.float32)
    k = len(ply.elements["sh"].columns) // 3
    out = np.empty((count, k, 3), np.float32)
    for i in range(3 * k):
        out[:, i % k, i // k] = values[bytes_[f"f_rest_{i}"]]
    return out


# --------------------------------------------------------------------------------------------------------------- out


def write_compressed_ply(gaussians: Gaussians, stream: IO[bytes], path: Path) -> None:
    """Write a compressed PLY to a stream; `path` is only named in errors.

    Gaussians are put into Morton order, so that the 256 of a chunk are neighbours. Errors: positions, log scales and
    colours 1/2046 (y: 1/1022; colours: 1/510) of their range within a chunk, opacity 1/510, rotations 0.25 degrees,
    higher harmonics 1/64 (1/32 in the outermost of the 256 steps).
    """
    values = check_write(gaussians, path)
    order = morton_order(values["means"])
    n = len(order)
    padded = np.append(order, np.full(-n % CHUNK, order[-1]))  # the last chunk's range is that of its own Gaussians
    scales = np.clip(values["scales"], *SCALES)
    colours = values["sh0"][:, 0] * np.float32(SH_C0) + np.float32(0.5)
    chunks, unit = {}, {}
    for key, value in (("means", values["means"]), ("scales", scales), ("colours", colours)):
        parts = value[padded].reshape(-1, CHUNK, 3)
        low, high = parts.min(1), parts.max(1)
        chunks |= dict(zip(RANGES[key], np.concatenate([low, high], 1).T, strict=True))
        spread = (high.astype(np.float64) - low)[:, None]
        unit[key] = ((parts - low[:, None]) / np.where(spread > 0, spread, 1)).reshape(-1, 3)[:n]
    alpha = expit(values["opacities"][order].astype(np.float64))
    largest, small = smallest_three(normalized(values["quats"][order]))
    packed = (
        _pack(unit["means"], BITS_3),
        _pack(small * 0.5**0.5 + 0.5, BITS_QUAT) | largest.astype(np.uint32) << np.uint32(30),
        _pack(unit["scales"], BITS_3),
        _pack(np.concatenate([unit["colours"], alpha[:, None]], 1), BITS_4),
    )
    tables = {"chunk": table_of(chunks), "vertex": table_of(dict(zip(PACKED, packed, strict=True)))}
    if k := values["shN"].shape[1]:
        steps = np.clip((values["shN"][order] / (2 * SH_LIMIT) + 0.5) * 256, 0, 255).astype(np.uint8)
        tables["sh"] = table_of({f"f_rest_{i}": steps[:, i % k, i // k] for i in range(3 * k)})
    write_tables(stream, tables, gaussians.comments, gaussians.obj_info)


def compressed_ply_losses(gaussians: Gaussians) -> list[str]:
    """What a compressed PLY cannot hold of these Gaussians."""
    losses = ["precision (8 to 11 bits a number)", "the order of the Gaussians"]
    if gaussians.shN.numel() and float(gaussians.shN.detach().abs().max()) > SH_LIMIT:
        losses.append(f"spherical harmonics beyond {SH_LIMIT:g}")
    if float(gaussians.scales.detach().abs().max()) > SCALES[1]:
        losses.append(f"log scales beyond {SCALES[1]:g}")
    return losses + [loss for loss in unnamed_losses(gaussians) if loss != "header comments"]


def morton_order(means: np.ndarray) -> np.ndarray:
    """Rows in Morton order, (n,) int64, 21 bits an axis over the scene's extent; equal codes keep their order."""
    low, high = means.min(0).astype(np.float64), means.max(0).astype(np.float64)
    cells = ((means - low) / np.where(high > low, high - low, 1) * (2**21 - 1)).astype(np.uint64)
    codes = np.zeros(len(means), np.uint64)
    for axis in range(3):
        codes |= _spread(cells[:, axis]) << np.uint64(axis)
    return np.argsort(codes, kind="stable")


def _spread(x: np.ndarray) -> np.ndarray:
    """21 bits with two zeros between each (the usual magic numbers)."""
    for shift, mask in (
        (32, 0x001F00000000FFFF),
        (16, 0x001F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        x = (x | (x << np.uint64(shift))) & np.uint64(mask)
    return x


def _pack(fractions: np.ndarray, fields: tuple[tuple[int, int], ...]) -> np.ndarray:
    """(n, fields) numbers in [0, 1] rounded into the bit fields of (n,) uint32."""
    packed = np.zeros(len(fractions), np.uint32)
    for i, (shift, bits) in enumerate(fields):
        top = 2**bits - 1
        packed |= np.clip(np.floor(fractions[:, i] * top + 0.5), 0, top).astype(np.uint32) << np.uint32(shift)
    return packed
