"""Lenses as camera files describe them, and the pinhole that takes the place of a distorted one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from splatedit.errors import InputError

# COLMAP's models by number, with their parameters in the order of its files (colmap/src/colmap/sensor/models.h).
MODELS: dict[int, tuple[str, tuple[str, ...]]] = {
    0: ("SIMPLE_PINHOLE", ("f", "cx", "cy")),
    1: ("PINHOLE", ("fx", "fy", "cx", "cy")),
    2: ("SIMPLE_RADIAL", ("f", "cx", "cy", "k1")),
    3: ("RADIAL", ("f", "cx", "cy", "k1", "k2")),
    4: ("OPENCV", ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2")),
    5: ("OPENCV_FISHEYE", ("fx", "fy", "cx", "cy", "k1", "k2", "k3", "k4")),
    6: ("FULL_OPENCV", ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")),
    7: ("FOV", ("fx", "fy", "cx", "cy", "omega")),
    8: ("SIMPLE_RADIAL_FISHEYE", ("f", "cx", "cy", "k1")),
    9: ("RADIAL_FISHEYE", ("f", "cx", "cy", "k1", "k2")),
    10: ("THIN_PRISM_FISHEYE", ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "sx1", "sy1")),
    11: ("RAD_TAN_THIN_PRISM_FISHEYE", ("fx", "fy", "cx", "cy", *(f"_{i}" for i in range(12)))),
    12: ("SIMPLE_DIVISION", ("f", "cx", "cy", "k")),
    13: ("DIVISION", ("fx", "fy", "cx", "cy", "k")),
    14: ("SIMPLE_FISHEYE", ("f", "cx", "cy")),
    15: ("FISHEYE", ("fx", "fy", "cx", "cy")),
    16: ("EUCM", ("fx", "fy", "cx", "cy", "alpha", "beta")),
    17: ("EQUIRECTANGULAR", ("w", "h")),
}
# What each model does to a picture; a model that is not here has no pinhole that we know.
BROWN = ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")  # OpenCV's order
FISHEYE = ("k1", "k2", "k3", "k4")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("SIMPLE_PINHOLE", "PINHOLE"), ("pinhole", ())),
    **dict.fromkeys(("SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV"), ("brown", BROWN)),
    **dict.fromkeys(("SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "OPENCV_FISHEYE"), ("fisheye", FISHEYE)),
    **dict.fromkeys(("SIMPLE_FISHEYE", "FISHEYE"), ("fisheye", FISHEYE)),
    "FOV": ("fov", ("omega",)),
}
LARGEST = 100_000  # pixels along an edge; the largest panoramas have a third of this
WIDEST = math.radians(60)  # from the axis: a perspective picture beyond is all stretched edges
BEYOND = math.radians(85)  # from the axis: where the search for a direction ends


class Lens(NamedTuple):
    """How directions become pixels: (fx x + cx, fy y + cy), where (x, y) are the distorted (X/Z, Y/Z)."""

    width: int  # pixels
    height: int  # pixels
    fx: float  # pixels
    fy: float  # pixels
    cx: float  # pixels; the centre of the first pixel is at 0.5
    cy: float  # pixels
    kind: str = "pinhole"  # or a key of RADIAL
    k: tuple[float, ...] = ()  # its coefficients: BROWN, FISHEYE or omega


def make_lens(where: str, model: str, width: int, height: int, values: Mapping[str, float]) -> Lens:
    """The lens that `model`, by COLMAP's name, and its parameters describe; raises InputError, beginning with `where`.

    values: finite numbers under the names of MODELS; coefficients that are not there are 0.
    """
    if model not in KINDS:
        raise InputError(
            f"{where}: camera model {model}: no pinhole camera can be made of it here, expected one of "
            f"{', '.join(KINDS)}; undistort the pictures first, e.g. with `colmap image_undistorter`."
        )
    if not (1 <= width <= LARGEST and 1 <= height <= LARGEST):
        raise InputError(f"{where}: pictures of {width}x{height}, expected 1 to {LARGEST} pixels each way.")
    kind, names = KINDS[model]
    fx, fy = (values.get(name, values.get("f", 0.0)) for name in ("fx", "fy"))
    for focal, size in ((fx, width), (fy, height)):
        if not 0.01 <= focal / max(width, height) <= 1e4:
            raise InputError(
                f"{where}: focal length {focal:.6g} of a picture {size} pixels across, "
                "expected 0.01 to 10000 times the larger edge."
            )
    for key in ("cx", "cy"):
        if not abs(values[key]) <= 100 * max(width, height):
            raise InputError(
                f"{where}: {key} is {values[key]:.6g}, expected the middle of the {width}x{height} pixels, or near it."
            )
    k = tuple(values.get(name, 0.0) for name in names)
    if kind != "fisheye" and not any(k):
        kind, k = "pinhole", ()
    return Lens(width, height, fx, fy, values["cx"], values["cy"], kind, k)


# -------------------------------------------------------------------------------------------------------- distortion


def _brown(r: np.ndarray, k: tuple[float, ...]) -> np.ndarray:
    """Brown and Conrady's radii with OpenCV's denominator, from tangents r."""
    k1, k2, _, _, k3, k4, k5, k6 = k
    r2 = r * r
    return r * (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))


def _fisheye(r: np.ndarray, k: tuple[float, ...]) -> np.ndarray:
    """Kannala and Brandt's: an odd polynomial in the angle from the axis."""
    angle = np.arctan(r)
    a2 = angle * angle
    return angle * (1 + a2 * (k[0] + a2 * (k[1] + a2 * (k[2] + a2 * k[3]))))


def _fov(r: np.ndarray, k: tuple[float, ...]) -> np.ndarray:
    """Devernay and Faugeras's field-of-view model."""
    return np.arctan(2 * r * math.tan(k[0] / 2)) / k[0]


RADIAL: dict[str, Callable[[np.ndarray, tuple[float, ...]], np.ndarray]] = {
    "brown": _brown,
    "fisheye": _fisheye,
    "fov": _fov,
}


def distort(lens: Lens, points: np.ndarray) -> np.ndarray:
    """Where the lens puts tangents (m, 2), X/Z and Y/Z, as (m, 2) to be scaled by the focal lengths."""
    if lens.kind == "pinhole":
        return points
    r = np.linalg.norm(points, axis=1, keepdims=True)
    with np.errstate(all="ignore"):  # what overflows is a fold, and found as one
        factor = np.where(r > 1e-12, RADIAL[lens.kind](r, lens.k) / np.maximum(r, 1e-12), 1.0)
        return points * factor + _tangential(lens, points)


def _tangential(lens: Lens, points: np.ndarray) -> np.ndarray | float:
    """What a lens element that is out of true adds, (m, 2)."""
    if lens.kind != "brown" or not any(lens.k[2:4]):
        return 0.0
    p1, p2 = lens.k[2:4]
    x, y = points.T
    r2 = x * x + y * y
    return np.stack([2 * p1 * x * y + p2 * (r2 + 2 * x * x), p1 * (r2 + 2 * y * y) + 2 * p2 * x * y], 1)


def undistort(lens: Lens, points: np.ndarray) -> np.ndarray:
    """The tangents (m, 2) that `distort` takes to `points` (m, 2); NaN where there are none below 85 degrees.

    Radii are looked up in a table that ends at the first fold of the lens, beyond which a pixel would show two
    directions; right to 1e-6.
    """
    if lens.kind == "pinhole":
        return points
    angles, radii = _table(lens)
    guess = points
    with np.errstate(all="ignore"):
        for _ in range(30):
            rest = points - _tangential(lens, guess)
            r = np.linalg.norm(rest, axis=1)
            tangents = np.where(r <= radii[-1], np.tan(np.interp(r, radii, angles)), np.nan)
            before, guess = guess, rest * (tangents / np.maximum(r, 1e-300))[:, None]
            if not np.nanmax(np.abs(guess - before), initial=0.0) > 1e-9:
                break
        missed = ~(np.abs(distort(lens, guess) - points).max(1) < 1e-6)
    return np.where(missed[:, None], np.nan, guess)


def _table(lens: Lens) -> tuple[np.ndarray, np.ndarray]:
    """Angles from the axis and where they come to lie, as long as a larger angle is farther out, to BEYOND at most."""
    angles = np.linspace(0, BEYOND, 8001)
    with np.errstate(all="ignore"):
        radii = RADIAL[lens.kind](np.tan(angles), lens.k)
        rising = np.diff(radii) > 0
    last = len(rising) if rising.all() else int(rising.argmin())
    return angles[: last + 1], radii[: last + 1]


def pinhole(lens: Lens, where: str = "lens") -> Lens:
    """The lens without distortion: same focal lengths, the largest picture that shows only what the lens shows.

    The rule of COLMAP's undistorter without blank pixels: the picture is cut at the innermost direction of each edge,
    at 60 degrees from the axis at most. Raises InputError, beginning with `where`, if the distortion folds the picture.
    """
    if lens.kind == "pinhole":
        return lens
    spans = []
    for ends in _edges(lens):
        found = [end[~np.isnan(end)] for end in ends]
        if not all(map(len, found)) and _table(lens)[0][-1] < BEYOND:
            numbers = ", ".join(f"{value:.4g}" for value in lens.k)
            raise InputError(
                f"{where}: the distortion ({numbers}) folds the picture before its edge, so it cannot be undone; "
                "undistort the pictures first, e.g. with `colmap image_undistorter`."
            )
        span = found[0].max(initial=-math.tan(WIDEST)), found[1].min(initial=math.tan(WIDEST))
        spans.append((float(span[0]), float(span[1])))
    (left, right), (top, bottom) = spans
    width, height = (int(f * (b - a) + 1e-6) for f, (a, b) in zip((lens.fx, lens.fy), spans, strict=True))
    if width < 1 or height < 1:
        raise InputError(f"{where}: nothing is left of the picture when its distortion is undone; check the camera.")
    return Lens(width, height, lens.fx, lens.fy, -left * lens.fx, -top * lens.fy)


def _edges(lens: Lens, points: int = 65) -> list[tuple[np.ndarray, np.ndarray]]:
    """Horizontal tangents along the left and the right edge of the picture, vertical ones along top and bottom."""
    along = np.linspace(0, 1, points)
    focal, origin = np.array([lens.fx, lens.fy]), np.array([lens.cx, lens.cy])
    sides = []
    for axis, size in enumerate((lens.width, lens.height)):
        for edge in (0, size):
            pixels = np.empty((points, 2))
            pixels[:, axis], pixels[:, 1 - axis] = edge, along * (lens.width, lens.height)[1 - axis]
            sides.append((pixels - origin) / focal)
    found = undistort(lens, np.concatenate(sides)).reshape(4, points, 2)
    return [(found[0, :, 0], found[1, :, 0]), (found[2, :, 1], found[3, :, 1])]
