"""Where a browser looks from when it opens; without torch, which takes longer to import than a page to load."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from splatedit.extents import direction

if TYPE_CHECKING:
    import viser

ELEVATION, FOV = 15.0, 45.0  # degrees; as `splatedit render` does
NEAR, FAR = 0.002, 200.0  # radii of the scene
BEHIND = 1.0  # world units before every camera: there the browser hangs the picture behind the scene


class Place(NamedTuple):
    """Where a camera stands and what it looks at, world units."""

    position: np.ndarray  # (3,) float64
    target: np.ndarray  # (3,) float64


def place(centre: np.ndarray, radius: float, up: str, aspect: float = 1.0) -> Place:
    """The first camera of `cameras.orbit`: the ball around the scene just fits into the window.

    up: one of cameras.UPS; aspect: width over height of the window.
    """
    above = direction(up)
    right = np.array([0.0, 1, 0] if up[1] == "x" else [1.0, 0, 0])
    tilt = np.radians(ELEVATION)
    forward = np.cross(above, right) * np.cos(tilt) - above * np.sin(tilt)
    half = np.radians(FOV) / 2  # of the height
    half = min(half, np.arctan(np.tan(half) * aspect))
    target = np.asarray(centre, np.float64)
    return Place(target - radius / np.sin(half) * forward, target)


def aim(server: viser.ViserServer, centre: np.ndarray, radius: float, up: str) -> None:
    """New browsers, and Reset View, look from there; which way is up holds for those that are there, too."""
    server.scene.set_up_direction(up)  # type: ignore[arg-type]
    first, found = server.initial_camera, place(centre, radius, up)
    with server.atomic():
        first.fov, (first.near, first.far) = float(np.radians(FOV)), planes(radius)
        first.position, first.look_at = found


def move(client: viser.ClientHandle, centre: np.ndarray, radius: float, up: str) -> None:
    """This browser looks from there, from farther away if its window is higher than wide."""
    camera = client.camera
    found = place(centre, radius, up, camera.aspect)
    with client.atomic():
        camera.fov, (camera.near, camera.far) = float(np.radians(FOV)), planes(radius)
        camera.up_direction = direction(up)
        camera.position = found.position
        camera.look_at = found.target  # last: whoever moves the position moves this along


def planes(radius: float) -> tuple[float, float]:
    """How near and how far a browser sees, in world units, the picture behind the scene too."""
    return min(NEAR * radius, BEHIND / 2), max(FAR * radius, 2 * BEHIND)
