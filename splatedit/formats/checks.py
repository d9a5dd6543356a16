"""What every format asks of Gaussians: sound numbers when read, sound shapes when written, what has no place in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from splatedit.errors import InputError
from splatedit.gaussians import PARAMETERS, SH_REST, Gaussians


def check_read(gaussians: Gaussians, path: Path | str, keys: Mapping[str, str] | None = None) -> Gaussians:
    """The same Gaussians, if there is one, all numbers are finite and no quaternion is 0; else InputError with the row.

    For formats without columns of their own, and for scenes from memory: the message names the parameter, by its key in
    the file where `keys` has one, its component and the row.
    """
    key = {name: name for name in PARAMETERS} | dict(keys or {})
    n = gaussians.n
    if n == 0:
        raise InputError(f"{path}: found 0 Gaussians, expected at least 1; the scene is empty.")
    for name in PARAMETERS:
        value = getattr(gaussians, name).reshape(n, -1)
        if not all_finite(value):
            bad = ~value.isfinite()
            row, column = (int(i) for i in bad.nonzero()[0])
            raise InputError(
                f"{path}: {key[name]}, row {row}, component {column}: found {value[row, column].item()}, expected a "
                f"finite number ({int(bad.any(1).sum())} of {n} rows are affected); remove such Gaussians first."
            )
    still = ~gaussians.quats.any(1)
    if still.any():
        raise InputError(
            f"{path}: {key['quats']}, row {int(still.nonzero()[0])}: found 0 0 0 0, expected a quaternion "
            f"({int(still.sum())} of {n} rows are affected); remove such Gaussians first."
        )
    return gaussians


def check_write(gaussians: Gaussians, path: Path) -> dict[str, np.ndarray]:
    """The six parameters as float32 arrays in their own shapes; InputError for a wrong shape or a number not finite."""
    n, k = gaussians.n, gaussians.shN.shape[1] if gaussians.shN.ndim == 3 else -1
    shapes = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,), "sh0": (n, 1, 3), "shN": (n, k, 3)}
    for name, value in gaussians.parameters.items():
        if tuple(value.shape) != shapes[name]:
            raise InputError(f"{path}: {name} has shape {tuple(value.shape)}, expected {shapes[name]}; not written.")
    if n == 0:
        raise InputError(f"{path}: the scene holds 0 Gaussians; nothing is written.")
    if k not in SH_REST.values():
        expected = ", ".join(map(str, SH_REST.values()))
        raise InputError(f"{path}: shN has {k} coefficients, expected one of {expected}; not written.")
    plain = {name: value.detach().cpu().to(torch.float32) for name, value in gaussians.parameters.items()}
    for name, value in plain.items():
        if not all_finite(value):
            bad = ~value.reshape(n, -1).isfinite().all(1)
            row, count = int(bad.nonzero()[0]), int(bad.sum())
            raise InputError(f"{path}: {name} of Gaussian {row} is not finite ({count} of {n} are); not written.")
    still = ~plain["quats"].any(1)
    if still.any():
        row, count = int(still.nonzero()[0]), int(still.sum())
        raise InputError(f"{path}: quats of Gaussian {row} is 0 0 0 0, no rotation ({count} of {n} are); not written.")
    return {name: value.numpy() for name, value in plain.items()}


def all_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite; minimum and maximum show both, and need no memory of their own."""
    return not value.numel() or all(end.isfinite() for end in value.aminmax())


def unnamed_losses(gaussians: Gaussians) -> list[str]:
    """What only a plain .ply holds: extra columns, other elements, header comments; [] if there are none."""
    losses = [f"extra columns {', '.join(gaussians.extra)}"] if gaussians.extra else []
    losses += [f"other elements {', '.join(gaussians.elements)}"] if gaussians.elements else []
    return losses + (["header comments"] if gaussians.comments or gaussians.obj_info else [])
