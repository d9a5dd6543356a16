""".ksplat of mkkellogg/GaussianSplats3D, read only: sections of Gaussians in buckets, positions relative to these.

https://github.com/mkkellogg/GaussianSplats3D, src/loaders/SplatBuffer.js, and splat-transform's read-ksplat.ts. Level 0
holds float32, 1 and 2 float16 and 16-bit positions, 2 also 8-bit harmonics. Axes are those of the .ply.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from splatedit.errors import InputError
from splatedit.formats.limits import check_count
from splatedit.formats.packing import FLAT, assemble, opacity_logits
from splatedit.gaussians import SH_C0, SH_REST, Gaussians

HEADER, SECTION = 4096, 1024  # bytes
NUMBERS = {0: ("<f4", "<f4", "<f4"), 1: ("<u2", "<f2", "<f2"), 2: ("<u2", "<f2", "u1")}  # level: means, others, shN
SH_RANGE = (-1.5, 1.5)  # of level 2, where the header says 0


class Section(NamedTuple):
    """One section's header, as far as it is needed."""

    count: int
    room: int  # rows that have a place
    bucket: int  # rows in a full bucket
    buckets: int
    width: float  # of a bucket, world units
    bucket_bytes: int
    reach: int  # level of the 16 bits that is half a bucket
    full: int  # buckets
    partial: int
    degree: int

    @classmethod
    def of(cls, data: bytes, at: int) -> Section:
        """Read from byte `at` on."""
        fields = struct.unpack_from("<IIIIfHxxIxxxxIIH", data, at)
        return cls(*fields)._replace(reach=fields[6] or 32767)

    def row(self, level: int) -> np.dtype:
        """One Gaussian."""
        mean, other, sh = NUMBERS[level]
        fields = [("mean", mean, 3), ("scale", other, 3), ("quat", other, 4), ("colour", "u1", 4)]
        return np.dtype([*fields, ("sh", sh, 3 * SH_REST[self.degree])])


def read_ksplat(path: Path) -> Gaussians:
    """Read a .ksplat file of level 0, 1 or 2, sections one after the other; raises InputError for a damaged one."""
    data = path.read_bytes()
    if len(data) < HEADER or data[0] != 0 or data[1] < 1:
        found = f"version {data[0]}.{data[1]}" if len(data) >= HEADER else f"{len(data)} bytes"
        raise InputError(f"{path}: found {found}, expected a header of {HEADER} bytes that says 0.1; no .ksplat file.")
    sections, _, _, count, level = struct.unpack_from("<IIIIH", data, 4)
    if level not in NUMBERS:
        raise InputError(f"{path}: found the compression level {level}, expected 0, 1 or 2; the file is damaged.")
    check_count(path, sections, SECTION, len(data) - HEADER, "sections")
    low, high = (value or other for value, other in zip(struct.unpack_from("<ff", data, 36), SH_RANGE, strict=True))
    at, parts = HEADER + sections * SECTION, []
    for i in range(sections):
        section = Section.of(data, HEADER + i * SECTION)
        if section.count == 0:
            continue
        part, at = _section(path, data, at, section, level, (low, high))
        parts.append(part)
    found = sum(len(part["means"]) for part in parts)
    if found != count or not parts:
        raise InputError(f"{path}: the header promises {count} Gaussians, its sections {found}; the file is damaged.")
    most = max(part["shN"].shape[1] for part in parts)
    for part in parts:
        part["shN"] = np.pad(part["shN"], ((0, 0), (0, most - part["shN"].shape[1]), (0, 0)))
    return assemble(path, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _section(
    path: Path, data: bytes, at: int, section: Section, level: int, sh_range: tuple[float, float]
) -> tuple[dict[str, np.ndarray], int]:
    """The parameters of one section whose buckets start at byte `at`, and where the next one's start."""
    if section.degree not in SH_REST or section.count > section.room:
        raise InputError(
            f"{path}: a section promises {section.count} of {section.room} Gaussians with harmonics of degree "
            f"{section.degree}, expected 0 to 3; the file is damaged."
        )
    row = section.row(level)
    rows_at = at + 4 * section.partial + section.bucket_bytes * section.buckets
    check_count(path, section.room, row.itemsize, len(data) - rows_at)
    rows = np.frombuffer(data, row, section.count, rows_at)
    scales = rows["scale"].astype(np.float64)
    values = {
        "means": rows["mean"] if level == 0 else _placed(path, data, at, section, rows["mean"]),
        "quats": rows["quat"],
        "scales": np.log(np.where(scales >= FLAT, scales, np.where(scales == 0, FLAT, np.nan))),
        "opacities": opacity_logits(rows["colour"][:, 3]),
        "sh0": ((rows["colour"][:, None, :3] / 255.0 - 0.5) / SH_C0),
        "shN": _harmonics(rows["sh"], section.degree, level, sh_range),
    }
    return values, rows_at + row.itemsize * section.room


def _placed(path: Path, data: bytes, at: int, section: Section, levels: np.ndarray) -> np.ndarray:
    """Positions from 16 bits around the centre of each row's bucket: the full ones first, then those partly filled."""
    if section.full > section.buckets or section.bucket_bytes < 12:
        raise InputError(f"{path}: a section fills {section.full} of {section.buckets} buckets; the file is damaged.")
    partial = np.frombuffer(data, "<u4", section.partial, at).astype(np.int64)
    ends = np.cumsum(np.concatenate([np.full(section.full, section.bucket), partial]))
    bucket = np.searchsorted(ends, np.arange(section.count), side="right")
    if bucket[-1] >= min(section.buckets, len(ends)):
        raise InputError(f"{path}: {section.count} Gaussians do not fit a section's {section.buckets} buckets.")
    raw = np.frombuffer(data, np.uint8, section.buckets * section.bucket_bytes, at + 4 * section.partial)
    centres = raw.reshape(section.buckets, -1)[:, :12].copy().view("<f4")
    return (levels.astype(np.float64) - section.reach) * (section.width / 2 / section.reach) + centres[bucket]


def _harmonics(raw: np.ndarray, degree: int, level: int, sh_range: tuple[float, float]) -> np.ndarray:
    """(n, k, 3) out of (n, 3 k): degree by degree, and in each all of red, then green, then blue."""
    low, high = sh_range
    values = low + (high - low) * (raw / 255.0) if level == 2 else raw
    ends = [3 * SH_REST[d] for d in range(degree + 1)]
    blocks = [values[:, a:b].reshape(len(raw), 3, -1) for a, b in zip(ends, ends[1:], strict=False)]
    return np.concatenate([np.zeros((len(raw), 3, 0)), *blocks], 2).transpose(0, 2, 1)
