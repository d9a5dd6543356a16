""".splat as antimatter15/splat's converter writes it: 32 bytes for each Gaussian, no header.

Three float32 of the position, three of the standard deviations, four bytes of colour and opacity, four bytes of the
quaternion w x y z as 128 + 128 q. https://github.com/antimatter15/splat, convert.py and main.js. Axes are those of the
.ply: nothing is turned. The converter sorts by size and opacity; here the order stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np

from splatedit.errors import InputError
from splatedit.formats.checks import check_write, unnamed_losses
from splatedit.formats.packing import FLAT, assemble, normalized, opacity_bytes, opacity_logits, to_bytes
from splatedit.gaussians import SH_C0, Gaussians

ROW = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("colour", "u1", 3), ("opacity", "u1"), ("quat", "u1", 4)])


def read_splat(path: Path) -> Gaussians:
    """Read a .splat file; raises InputError for a size that is no multiple of 32, and for numbers no splat has."""
    size = path.stat().st_size
    if size == 0 or size % ROW.itemsize:
        raise InputError(
            f"{path}: found {size} bytes, expected a multiple of {ROW.itemsize}, which one Gaussian takes; "
            "it is cut short or not a .splat file, copy or download it again."
        )
    rows = np.fromfile(path, ROW)
    negative = ~(rows["scale"] >= 0).all(1)  # NaN too
    if negative.any():
        row = int(negative.argmax())
        raise InputError(
            f"{path}: row {row}: found the size {rows['scale'][row].tolist()}, expected numbers of 0 or more "
            f"({negative.sum()} of {len(rows)} rows are affected); this is not a .splat file, or a damaged one."
        )
    n = len(rows)
    values = {
        "means": rows["mean"],
        "quats": _quats(rows["quat"]),
        "scales": np.log(np.maximum(rows["scale"], FLAT)),
        "opacities": opacity_logits(rows["opacity"]),
        "sh0": ((rows["colour"] / 255.0 - 0.5) / SH_C0)[:, None],
        "shN": np.zeros((n, 0, 3)),
    }
    return assemble(path, values)


def write_splat(gaussians: Gaussians, stream: IO[bytes], path: Path) -> None:
    """Write 32 bytes for each Gaussian to a stream, in their order; `path` is only named in errors."""
    values = check_write(gaussians, path)
    rows = np.empty(gaussians.n, ROW)
    rows["mean"] = values["means"]
    rows["scale"] = np.exp(np.clip(values["scales"], np.log(FLAT), np.log(np.finfo(np.float32).max) - 1e-5))
    rows["colour"] = to_bytes(255 * (0.5 + SH_C0 * values["sh0"][:, 0].astype(np.float64)))
    rows["opacity"] = opacity_bytes(values["opacities"])
    rows["quat"] = to_bytes(128 + 128 * normalized(values["quats"]))
    stream.write(rows.tobytes())


def splat_losses(gaussians: Gaussians) -> list[str]:
    """What of these Gaussians 32 bytes cannot hold, as noun phrases."""
    colour = 0.5 + SH_C0 * gaussians.sh0.detach()
    bright = int(((colour < 0) | (colour > 1)).any(2).any(1).sum())
    return [
        *(["spherical harmonics above degree 0"] if gaussians.sh_degree else []),
        *([f"colours below 0 or above 1 ({bright} of {gaussians.n} Gaussians)"] if bright else []),
        "precision (8 bits for colours, opacities and rotations)",
        *unnamed_losses(gaussians),
    ]


def _quats(packed: np.ndarray) -> np.ndarray:
    """Quaternions of length 1; four times 128 is no rotation, which viewers draw as none."""
    return normalized((packed.astype(np.float64) - 128) / 128)
