"""Cameras around a scene: robust bounds, a guess at which way is up, orbits and domes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from splatedit import extents
from splatedit.errors import InputError
from splatedit.extents import DEFAULT_UP, UPS, direction
from splatedit.gaussians import Gaussians


class Cameras(NamedTuple):
    """c pinhole cameras with pictures of one size; OpenCV axes: x right, y down, z forward."""

    w2c: Tensor  # (c, 4, 4) float32, world to camera
    K: Tensor  # (c, 3, 3) float32, pixels; the centre of the first pixel is at 0.5
    width: int  # pixels
    height: int  # pixels

    @property
    def n(self) -> int:
        """How many cameras there are."""
        return self.w2c.shape[0]

    def __repr__(self) -> str:
        return f"Cameras({self.n}, pictures of {self.width}x{self.height})"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        from splatedit.displays import cameras_bundle

        return cameras_bundle(self)

    def pick(self, index: int | slice | Sequence[int] | Tensor) -> Cameras:
        """Some of the cameras, still as a batch; raises IndexError for one that does not exist."""
        if isinstance(index, int):
            index = [index]
        elif isinstance(index, Tensor):
            index = index.to(self.w2c.device)
        return self._replace(w2c=self.w2c[index], K=self.K[index])  # pyright: ignore[reportArgumentType]

    def resized(self, width: int, height: int) -> Cameras:
        """The same views as pictures of another size, in pixels; another aspect ratio stretches them."""
        if width < 1 or height < 1:
            raise InputError(f"size: found {width}x{height}, expected at least 1x1 pixels.")
        scale = self.K.new_tensor([width / self.width, height / self.height, 1.0])
        return self._replace(K=self.K * scale[:, None], width=width, height=height)


class Bounds(NamedTuple):
    """A ball around what is worth looking at."""

    centre: Tensor  # (3,) float32, on the device of the Gaussians
    radius: float  # world units, above 0


# -------------------------------------------------------------------------------------------------------------- bounds


def bounds(gaussians: Gaussians) -> Bounds:
    """The ball that holds the scene but not its floaters.

    Each Gaussian weighs opacity times area (`visible`). Starting from the weighted median, everything beyond 2.5 times
    the distance that holds 90 % of the weight is dropped until nothing more goes. The centre is the middle of the box
    that holds 99 % of the remaining weight along each axis, the radius the distance from it that holds 99.5 %.
    """
    centre, radius = extents.ball(*visible(gaussians))
    if radius <= 0:  # a single Gaussian, or all at one place: its own size is the scene's
        radius = 3 * float(gaussians.scales.detach().double().exp().amax())
    return Bounds(torch.tensor(centre, dtype=torch.float32, device=gaussians.means.device), radius)


def visible(gaussians: Gaussians, most: int = 50_000) -> tuple[np.ndarray, np.ndarray]:
    """Means (m, 3) and how much each can be seen (m,), `extents.weigh`, float64; of at most `most` drawn at random.

    Without those that are not finite; raises InputError if none is left.
    """
    seen = [value.detach() for value in (gaussians.means, gaussians.scales, gaussians.opacities)]
    if gaussians.n > most:  # quantiles of a sample will do, and a million Gaussians take no longer than this
        rows = torch.randperm(gaussians.n, generator=torch.Generator().manual_seed(0))[:most]
        seen = [value[rows.to(value.device)] for value in seen]
    points, scales, opacities = (value.cpu().double().numpy() for value in seen)
    sound = np.isfinite(points).all(1) & np.isfinite(scales).all(1) & np.isfinite(opacities)
    if not sound.any():
        raise InputError(f"scene: found {gaussians.n} splats, none of them with finite numbers; expected at least one.")
    return points[sound], extents.weigh(scales[sound], opacities[sound])


# ------------------------------------------------------------------------------------------------------------------ up


def guess_up(gaussians: Gaussians) -> str:
    """One of UPS; see `explain_up`."""
    return explain_up(gaussians)[0]


def explain_up(gaussians: Gaussians) -> tuple[str, str]:
    """Which way is up, and why: by header comment, else by a ground, else "-y", the convention of COLMAP captures.

    A comment counts if it names an axis or a vector ("Vertical Axis: z", "up: -y", "Vertical axis: 0 -1 0"). A ground
    is a thin layer at one extreme that lies under at least 60 % of the scene (`extents.ground_scores`), while no other
    side is as flat: the layer there fills less than two thirds of that. Only y and +z can win: x up or z down is
    written by no common tool and has to be said.
    """
    if said := extents.up_in_header(gaussians.comments, gaussians.obj_info):
        return said[0], f"the header says {said[1].strip()!r}"
    if up := extents.up_of_ground(*visible(gaussians)):
        return up, "there is a flat ground on the opposite side"
    return DEFAULT_UP, "assumed, as in COLMAP captures: no header comment, no clear ground"


# ---------------------------------------------------------------------------------------------------------------- rigs


def look(eye: Tensor | Sequence[float], target: Tensor | Sequence[float], up: Tensor | Sequence[float] | str) -> Tensor:
    """World-to-camera matrix (4, 4) float32 of a camera at `eye` that sees `target` in the middle, `up` upwards.

    up: a vector or one of UPS. Straight up or down the picture's right is the right of azimuth 0. Raises InputError
    if eye and target are one point.
    """
    if isinstance(up, str):
        up = _frame(check_up(up))[1]
    origin, aim, above = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (eye, target, up))
    forward = aim - origin
    if float(forward.norm()) == 0 or float(above.norm()) == 0:
        raise InputError(f"look: eye {origin.tolist()} and target {aim.tolist()} must differ, up must not be zero.")
    forward = forward / forward.norm()
    right = torch.linalg.cross(forward, above / above.norm())
    if float(right.norm()) < 1e-9:
        axis = int(above.abs().argmax())
        right = _frame(("+" if above[axis] > 0 else "-") + "xyz"[axis])[0]
        right = right - (right @ forward) * forward
    return _w2c(right / right.norm(), forward, origin).float()


def orbit(
    gaussians: Gaussians,
    n: int = 8,
    *,
    elevation: float = 15.0,
    azimuth: float = 0.0,
    size: int | tuple[int, int] = 256,
    fov: float = 45.0,
    up: str | None = None,
    zoom: float = 1.0,
) -> Cameras:
    """n cameras evenly around the scene, all at one elevation, the first one at `azimuth`.

    Angles in degrees. Azimuth 0 is the camera whose right is +x (+y where x is up) and grows as the camera moves to its
    right; positive elevation looks down. size: pixels, one number or (width, height); fov: across the shorter side;
    up: one of UPS, None to guess; zoom: 2 halves the distance. Raises InputError for a value out of range.
    """
    if n < 1:
        raise InputError(f"views: found {n}, expected at least 1.")
    return _rig(gaussians, [(azimuth + 360 * i / n, elevation) for i in range(n)], size, fov, up, zoom)


def dome(
    gaussians: Gaussians,
    n: int = 36,
    *,
    elevations: Sequence[float] = (0.0, 18.0, 34.0),
    azimuth: float = 0.0,
    size: int | tuple[int, int] = 256,
    fov: float = 45.0,
    up: str | None = None,
    zoom: float = 1.0,
) -> Cameras:
    """n cameras in rings, one ring per elevation, lowest index first; each ring is turned by its share of a step.

    The first rings take one camera more where n does not divide evenly. Everything else as in `orbit`.
    """
    if n < 1 or not elevations:
        raise InputError(f"views: found {n} on {len(elevations)} rings, expected at least 1 of each.")
    rings = min(n, len(elevations))
    angles = []
    for ring in range(rings):
        count = n // rings + (ring < n % rings)
        turn = azimuth + 360 / count * ring / rings
        angles += [(turn + 360 * i / count, elevations[ring]) for i in range(count)]
    return _rig(gaussians, angles, size, fov, up, zoom)


RIGS = {"orbit": orbit, "dome": dome}


def check_up(up: str) -> str:
    """`up` itself if it is one of UPS; else an InputError that names the nearest."""
    if up in UPS:
        return up
    near = [f"+{up}"] if f"+{up}" in UPS else difflib.get_close_matches(str(up).lower(), UPS, 1)
    raise InputError(
        f"up: found {up!r}, expected one of {', '.join(UPS)}{f'; did you mean {near[0]}?' if near else '.'}"
    )


def _rig(gaussians: Gaussians, angles: list[tuple[float, float]], size, fov: float, up: str | None, zoom: float):
    """Cameras at (azimuth, elevation) pairs around the bounds of the scene."""
    width, height = (size, size) if isinstance(size, int) else size
    if width < 1 or height < 1:
        raise InputError(f"size: found {width}x{height}, expected at least 1x1 pixels.")
    if not 0 < fov < 180:
        raise InputError(f"fov: found {fov}, expected degrees between 0 and 180.")
    if not 0 < zoom < math.inf:
        raise InputError(f"zoom: found {zoom}, expected a number above 0.")
    for _, elevation in angles:
        if not -90 <= elevation <= 90:
            raise InputError(f"elevation: found {elevation}, expected degrees from -90 to 90.")
    up = guess_up(gaussians) if up is None else check_up(up)
    centre, radius = bounds(gaussians)
    half = math.radians(fov) / 2
    distance = radius / math.sin(half) / zoom  # the ball just fits
    focal = min(width, height) / 2 / math.tan(half)
    w2c = torch.stack([_around(centre.double().cpu(), distance, *pair, up) for pair in angles])
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]).expand(len(angles), 3, 3)
    device = gaussians.means.device
    return Cameras(w2c.float().to(device), K.clone().to(device), width, height)


def _frame(up: str) -> tuple[Tensor, Tensor, Tensor]:
    """Right, up and forward (3,) float64 of the camera at azimuth 0 and elevation 0."""
    above = torch.from_numpy(direction(up))
    right = torch.tensor([0.0, 1, 0] if up[1] == "x" else [1.0, 0, 0], dtype=torch.float64)
    return right, above, torch.linalg.cross(above, right)


def _around(centre: Tensor, distance: float, azimuth: float, elevation: float, up: str) -> Tensor:
    """World-to-camera (4, 4) float64 from angles in degrees; exact at the poles too, where `look` has to choose."""
    right, above, ahead = _frame(up)
    a, e = math.radians(azimuth), math.radians(elevation)
    level = ahead * math.cos(a) - right * math.sin(a)
    forward = level * math.cos(e) - above * math.sin(e)
    return _w2c(right * math.cos(a) + ahead * math.sin(a), forward, centre - distance * forward)


def _w2c(right: Tensor, forward: Tensor, eye: Tensor) -> Tensor:
    """World-to-camera (4, 4) float64 from two orthonormal axes and the camera centre."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
    matrix[:3, 3] = -matrix[:3, :3] @ eye
    return matrix
