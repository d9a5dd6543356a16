"""What a caller of `rasterization` may get wrong, said before anything is drawn: the argument, its shape, the wish.

`arguments` looks at types, shapes, choices and plain numbers, `values` into the tensors, `refuse` at what only gsplat
can do. All take the arguments of `rasterization` as a dictionary, and raise InputError.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from splatedit.errors import InputError
from splatedit.render.constants import TILE

RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
RASTERIZE_MODES = ("classic", "antialiased")
PARAMETERS = ("means", "quats", "scales", "opacities", "colors")
VIEWS = ("viewmats", "Ks", "backgrounds")
SHORTEST, LONGEST = 1e-18, 1e18  # lengths of quaternions whose squares float32 can hold
FLAT = 1e-6  # volume spanned by the axes of a camera, made unit vectors, that counts as none; of a rotation it is 1
UNIT = [0.0, 0.0, 0.0, 1.0]  # the last row of a view matrix

# what gsplat can do beyond the signature of `rasterization`, with the value that asks for nothing
GSPLAT_ONLY = {
    "covars": None,
    "segmented": False,
    "distributed": False,
    "camera_model": "pinhole",
    "with_ut": False,
    "with_eval3d": False,
    "radial_coeffs": None,
    "tangential_coeffs": None,
    "thin_prism_coeffs": None,
    "ftheta_coeffs": None,
    "rolling_shutter": None,
    "viewmats_rs": None,
}


def arguments(given: dict[str, Any]) -> None:
    """Raise unless all tensors have the shape, type and device that the others call for, and all options make sense."""
    _tensors(given)
    _shapes(given)
    _colors(given)
    _same_kind(given)
    _choices(given)
    _numbers(given)


def values(given: dict[str, Any], parameters: bool = True) -> None:
    """Raise for tensors that hold what cannot be drawn: NaN, infinities, quaternions of no length, broken cameras.

    Costs one pass over the tensors and, on a GPU, one transfer of a few numbers. parameters=False leaves out means,
    quats, scales, opacities and colors, for a backend that looks at these as it draws. `arguments` comes first.
    """
    c = len(given["viewmats"])
    with torch.no_grad():
        summary = _summary(given) if parameters else []
        found = torch.cat([t.flatten() for t in (*(given[k] for k in VIEWS), *summary) if t is not None]).tolist()
    if not all(map(math.isfinite, found)) or (summary and not SHORTEST <= found[-2] <= found[-1] <= LONGEST):
        _name_the_bad(given)
    for i in range(c):
        _camera(i, found[16 * i : 16 * (i + 1)], found[16 * c + 9 * i : 16 * c + 9 * (i + 1)], c)


def refuse(given: dict[str, Any], backend: str) -> None:
    """Raise for what only gsplat can do, on a backend of another name."""
    for name, neutral in GSPLAT_ONLY.items():
        value = given.get(name, neutral)
        if value is not neutral and value != neutral and getattr(value, "name", None) != "GLOBAL":
            found = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise _mistake(
                f'{name}={found} is something only backend "gsplat" can do; '
                f'leave it out, or {neutral!r}, for backend "{backend}".'
            )
    if given["tile_size"] != TILE:
        raise _mistake(f'tile_size={given["tile_size"]} on backend "{backend}", which has tiles of {TILE} pixels only.')


# ---------------------------------------------------------------- types, shapes, choices


def _mistake(text: str) -> InputError:
    return InputError(f"rasterization: {text}")


def shape_of(tensor: Tensor | np.ndarray) -> str:
    """The shape as a message has it: (10, 3)."""
    return f"({', '.join(map(str, tensor.shape))})"


def _tensors(given: dict[str, Any]) -> None:
    for name in (*PARAMETERS, *VIEWS):
        value = given[name]
        if not isinstance(value, Tensor) and not (name == "backgrounds" and value is None):
            raise _mistake(f"{name} is a {type(value).__name__} where a tensor is expected.")


def _shapes(given: dict[str, Any]) -> None:
    means, viewmats = given["means"], given["viewmats"]
    if means.dim() != 2:
        raise _mistake(f"means {shape_of(means)} where (n, 3) is expected: no batch dimensions.")
    n, c = len(means), len(viewmats) if viewmats.dim() else 0
    expected = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,)}
    expected |= {"viewmats": (c, 4, 4), "Ks": (c, 3, 3)}
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
            raise _mistake(f"{name} {shape_of(given[name])} where {wanted} is expected.")
    if c == 0:
        raise _mistake("viewmats (0, 4, 4) where at least one camera is expected.")


def _colors(given: dict[str, Any]) -> None:
    colors, degree, backgrounds = given["colors"], given["sh_degree"], given["backgrounds"]
    n, c, shape = len(given["means"]), len(given["viewmats"]), tuple(colors.shape)
    if degree is None:
        if len(shape) < 2 or shape[:-1] not in ((n,), (c, n)) or shape[-1] == 0:
            raise _mistake(f"colors {shape_of(colors)} where ({n}, d) or ({c}, {n}, d) is expected without sh_degree.")
    elif not isinstance(degree, numbers.Integral) or degree not in (0, 1, 2, 3):
        raise _mistake(f"sh_degree {degree} is not one of 0, 1, 2, 3.")
    else:
        k = (int(degree) + 1) ** 2
        if len(shape) < 3 or shape[-1] != 3 or shape[-2] < k or shape[:-2] not in ((n,), (c, n)):
            raise _mistake(
                f"colors {shape_of(colors)} where ({n}, k, 3) with k at least {k} is expected for sh_degree {degree}."
            )
    if backgrounds is not None and tuple(backgrounds.shape) != (c, shape[-1]):
        raise _mistake(f"backgrounds {shape_of(backgrounds)} where ({c}, {shape[-1]}) is expected.")


def _same_kind(given: dict[str, Any]) -> None:
    means = given["means"]
    for name in (*PARAMETERS, *VIEWS):
        t = given[name]
        if t is not None and (t.dtype != means.dtype or t.device != means.device):
            raise _mistake(
                f"{name} is {t.dtype} on {t.device}, means is {means.dtype} on {means.device}; the same is expected."
            )
    if means.dtype not in (torch.float32, torch.float64):
        raise _mistake(f"means is {means.dtype} where torch.float32 is expected.")


def _choices(given: dict[str, Any]) -> None:
    for name, choices in (("render_mode", RENDER_MODES), ("rasterize_mode", RASTERIZE_MODES)):
        if given[name] not in choices:
            raise _mistake(f"{name} {given[name]!r} is not one of {', '.join(map(repr, choices))}.")
    for name in ("packed", "sparse_grad"):
        if given[name]:
            raise _mistake(f"{name}=True is not supported; {name}=False is expected.")


def _numbers(given: dict[str, Any]) -> None:
    for name in ("width", "height"):
        value = given[name]
        if not isinstance(value, numbers.Integral) or value < 1:
            raise _mistake(f"{name} {value!r} where a whole number of at least 1 pixel is expected.")
    near, far = given["near_plane"], given["far_plane"]
    expected = {
        "near_plane": ("a finite distance above 0", lambda x: 0 < x < math.inf),
        "far_plane": (f"a distance above near_plane={near!r}", lambda x: near < x),
        "radius_clip": ("a finite number of pixels, 0 or more,", lambda x: 0 <= x < math.inf),
        "eps2d": ("a finite variance, 0 or more square pixels,", lambda x: 0 <= x < math.inf),
    }
    for name, (wish, holds) in expected.items():  # written so that NaN, which compares false, is refused
        value = far if name == "far_plane" else given[name]
        if not isinstance(value, numbers.Real) or not holds(value):
            raise _mistake(f"{name} {value!r} where {wish} is expected.")


# ---------------------------------------------------------------- what is in the tensors


def _summary(given: dict[str, Any]) -> list[Tensor]:
    """Sums, finite only if all numbers are (or too large to add up), then the least and the largest length of quats.

    Empty if there are no Gaussians. numpy adds up on the CPU: torch would start OpenMP, which hangs in a forked child.
    """
    parameters = [given[k] for k in PARAMETERS]
    if len(parameters[0]) == 0:
        return []
    if given["means"].is_cpu:
        means, quats, *others = map(_array, parameters)
        with np.errstate(all="ignore"):
            lengths = np.sqrt(np.einsum("nk,nk->n", quats, quats))
            numbers = [float(a.sum()) for a in (means, *others)] + [float(lengths.min()), float(lengths.max())]
        return [torch.tensor(numbers, dtype=given["means"].dtype)]
    means, quats, *others = parameters
    lengths = torch.linalg.vector_norm(quats, dim=-1)
    return [t.sum() for t in (means, *others)] + list(torch.aminmax(lengths))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _name_the_bad(given: dict[str, Any]) -> None:
    """Raise for the first row of the first tensor that cannot be drawn; silent if there is none."""
    for name in (*PARAMETERS, *VIEWS):
        if given[name] is None:
            continue
        a = _array(given[name])
        per_view = name == "colors" and a.ndim > (2 if given["sh_degree"] is None else 3)
        bad = ~np.isfinite(a)
        if bad.any():
            rows = np.asarray(bad.reshape(*a.shape[: 2 if per_view else 1], -1).any(-1))
            raise _bad_rows(name, a, rows, "finite numbers are expected")
        if name == "quats":
            with np.errstate(all="ignore"):
                lengths = np.sqrt(np.einsum("nk,nk->n", a, a))
            rows = np.asarray((lengths < SHORTEST) | (lengths > LONGEST))
            if rows.any():
                raise _bad_rows(name, a, rows, f"a length from {SHORTEST:g} to {LONGEST:g} is expected")


def _bad_rows(name: str, a: np.ndarray, rows: np.ndarray, expected: str) -> InputError:
    """means (1000, 3): row 17 is (nan, 0, 1), the first of 3 such rows; finite numbers are expected."""
    first, count = np.argwhere(rows)[0].tolist(), int(rows.sum())
    row = a[tuple(first)]
    if row.size <= 4:
        found = "is " + _tuple(row.reshape(-1).tolist())
    else:
        at = np.argwhere(~np.isfinite(row))[0].tolist()
        found = f"has {row[tuple(at)]:.4g} at {at}"
    others = f", the first of {count} such rows" if count > 1 else ""
    return _mistake(f"{name} {shape_of(a)}: row {', '.join(map(str, first))} {found}{others}; {expected}.")


def _tuple(row: list[float]) -> str:
    numbers = ", ".join(f"{x:.4g}" for x in row)
    return numbers if len(row) == 1 else f"({numbers})"


def _camera(i: int, view: list[float], K: list[float], c: int) -> None:
    """Camera i of c: its view matrix and K, row by row."""
    bottom = view[12:]
    if max(abs(a - b) for a, b in zip(bottom, UNIT, strict=True)) > 1e-3:
        transposed = view[3::4] == UNIT
        raise _mistake(
            f"viewmats ({c}, 4, 4): the last row of camera {i} is {_tuple(bottom)} where (0, 0, 0, 1) is expected"
            f"{': is it transposed?' if transposed else '.'}"
        )
    x, y, z = view[0:3], view[4:7], view[8:11]
    cross = (y[1] * z[2] - y[2] * z[1], y[2] * z[0] - y[0] * z[2], y[0] * z[1] - y[1] * z[0])
    volume = abs(sum(a * b for a, b in zip(x, cross, strict=True)))
    if not volume > FLAT * math.hypot(*x) * math.hypot(*y) * math.hypot(*z):
        raise _mistake(f"viewmats ({c}, 4, 4): camera {i} is singular where a rotation and a translation are expected.")
    if not (K[0] > 0 and K[4] > 0):
        raise _mistake(
            f"Ks ({c}, 3, 3): camera {i} has fx, fy = {_tuple([K[0], K[4]])} where numbers above 0 are expected."
        )
