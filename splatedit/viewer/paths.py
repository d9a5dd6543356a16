"""Ways of a camera: keyframes and what lies between them, turntables; as Cameras for our renderer and as a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from splatedit.errors import InputError
from splatedit.extents import direction

if TYPE_CHECKING:
    import viser

    from splatedit.cameras import Cameras

KEY = "-key"  # in the names of a camera file: these views are keyframes, the others lie between them
MOST = 200  # keyframes that are taken from a file that names none
SHORTEST = 1e-3  # between two keyframes, so that a view that is added twice stops the film for a moment


class Key(NamedTuple):
    """A view: where a camera is, what it turns around, what is up in its picture. World units, float64."""

    position: np.ndarray  # (3,)
    target: np.ndarray  # (3,)
    up: np.ndarray  # (3,), not along the line of sight
    fov: float  # radians, from top to bottom


# ------------------------------------------------------------------------------------------------------ single views
def key_of(camera: viser.CameraHandle) -> Key:
    """What a browser looks at now."""
    return Key(
        np.asarray(camera.position, np.float64),
        np.asarray(camera.look_at, np.float64),
        np.asarray(camera.up_direction, np.float64),
        float(camera.fov),
    )


def go(client: viser.ClientHandle, key: Key) -> None:
    """Let a browser look from there."""
    camera = client.camera
    with client.atomic():
        camera.up_direction = key.up
        camera.position = key.position
        camera.look_at = key.target  # last: whoever moves the position moves this along
        camera.fov = key.fov


def axes(key: Key) -> np.ndarray:
    """Camera to world rotation (3, 3), OpenCV axes as columns: right, down, forward."""
    forward = key.target - key.position
    forward = forward / max(np.linalg.norm(forward), 1e-12)
    right = np.cross(forward, key.up)
    if np.linalg.norm(right) < 1e-6 * np.linalg.norm(key.up):  # straight up or down: any right will do
        right = np.cross(forward, np.eye(3)[np.abs(forward).argmin()])
    right = right / np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward], 1)


def from_w2c(w2c: np.ndarray, fov: float, distance: float) -> Key:
    """The view of a camera matrix (4, 4), OpenCV axes; distance: to what it turns around, above 0."""
    rotation = w2c[:3, :3].T
    position = -rotation @ w2c[:3, 3]
    return Key(position, position + distance * rotation[:, 2], -rotation[:, 1], fov)


def cameras_of(keys: Sequence[Key], width: int, height: int) -> Cameras:
    """Cameras with pictures of this size in pixels, as much from top to bottom as the browser shows."""
    import torch

    from splatedit.cameras import Cameras

    w2c, K = np.tile(np.eye(4), (len(keys), 1, 1)), np.tile(np.eye(3), (len(keys), 1, 1))
    for index, key in enumerate(keys):
        rotation = axes(key).T
        w2c[index, :3, :3], w2c[index, :3, 3] = rotation, -rotation @ key.position
        K[index, [0, 1], [0, 1]] = height / 2 / math.tan(key.fov / 2)
        K[index, :2, 2] = width / 2, height / 2
    return Cameras(torch.from_numpy(w2c).float(), torch.from_numpy(K).float(), width, height)


def around(centre: np.ndarray, distance: float, azimuth: float, elevation: float, up: str, fov: float) -> Key:
    """The view from these angles in degrees, as of `cameras.orbit`."""
    above = direction(up)
    right = np.array([0.0, 1, 0] if up[1] == "x" else [1.0, 0, 0])
    ahead = np.cross(above, right)
    a, e = math.radians(azimuth), math.radians(elevation)
    forward = (ahead * math.cos(a) - right * math.sin(a)) * math.cos(e) - above * math.sin(e)
    return Key(centre - distance * forward, centre, above, fov)


# ----------------------------------------------------------------------------------------------------------- moving
def along(keys: Sequence[Key], frames: int, loop: bool = False) -> list[Key]:
    """`frames` views from the first keyframe to the last, with `loop` on to the first again, but not that one twice.

    Places follow the centripetal Catmull-Rom curve (Yuksel et al. 2011, doi:10.1016/j.cad.2010.08.008), which makes no
    loops of its own, at a speed without jumps; orientations the shortest turn, held where their lines of sight meet.
    Every keyframe is met, where there are frames enough. Raises InputError without keyframes.
    """
    if not keys or frames < 1:
        raise InputError(f"film: found {len(keys)} keyframes and {frames} frames, expected 1 or more of each.")
    stops, gaps = laid_out(keys, loop)
    if not gaps:
        return stops * frames
    at, found = stops_at(gaps, frames, loop), []
    for frame in range(frames):
        leg = min(int(np.searchsorted(at, frame, side="right")) - 1, len(gaps) - 1)
        share = (frame - at[leg]) / max(at[leg + 1] - at[leg], 1)
        found.append(between(stops, gaps, leg, min(share, 1.0), loop))
    return found


def laid_out(keys: Sequence[Key], loop: bool) -> tuple[list[Key], list[float]]:
    """The keyframes, with the first one again at the end of a loop, and how far apart they are on the film.

    That is the root of the way, in sizes of the whole path, plus the turn in radians.
    """
    stops = [*keys, keys[0]] if loop and len(keys) > 1 else list(keys)
    places = np.stack([key.position for key in keys])
    size = max(float(np.linalg.norm(places - places.mean(0), axis=1).max()), 1e-12)
    gaps = []
    for a, b in zip(stops[:-1], stops[1:], strict=True):
        cosine = (np.trace(axes(a).T @ axes(b)) - 1) / 2
        way = float(np.linalg.norm(b.position - a.position)) / size
        gaps.append(max(math.sqrt(way + math.acos(min(1.0, max(-1.0, cosine)))), SHORTEST))
    return stops, gaps


def stops_at(gaps: Sequence[float], frames: int, loop: bool) -> list[int]:
    """The frame of each stop, from 0: of the last one the frame after the film, if it is a loop."""
    last = frames if loop else frames - 1
    return np.round(np.cumsum([0.0, *gaps]) / sum(gaps) * last).astype(int).tolist()


def between(stops: Sequence[Key], gaps: Sequence[float], leg: int, share: float, loop: bool) -> Key:
    """The view at a share of the way, 0 to 1, from one stop to the next."""
    from scipy.spatial.transform import Rotation, Slerp

    a, b, count = stops[leg], stops[leg + 1], len(gaps)
    before = stops[leg - 1].position if leg else stops[-2].position if loop else 2 * a.position - b.position
    after = stops[leg + 2].position if leg + 2 <= count else stops[1].position if loop else 2 * b.position - a.position
    knots = (
        gaps[leg - 1] if leg or loop else gaps[leg],
        gaps[leg],
        gaps[(leg + 1) % count] if leg + 1 < count or loop else gaps[leg],
    )
    position = curve((before, a.position, b.position, after), knots, share)
    turn = Slerp([0, 1], Rotation.from_matrix(np.stack([axes(a), axes(b)])))(share).as_matrix()
    near, far = (float(np.linalg.norm(key.target - key.position)) for key in (a, b))
    distance = near ** (1 - share) * far**share
    ahead = held(a, b, share, position, turn[:, 2])
    return Key(position, position + distance * ahead, -turn[:, 1], (1 - share) * a.fov + share * b.fov)


def held(a: Key, b: Key, share: float, position: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Where to look (3,) at a share of the way between two views: where their lines of sight meet, as far as they do.

    ahead: where the turn leads, (3,) of length one: of views that look past each other, or whose camera stands still.
    """
    (f, g), way = (axes(key)[:, 2] for key in (a, b)), b.position - a.position
    sine2 = 1 - (f @ g) ** 2
    if sine2 < 1e-6:  # side by side, or face to face
        return ahead
    near, far = (way @ f - (f @ g) * (way @ g)) / sine2, ((f @ g) * (way @ f) - way @ g) / sine2
    if min(near, far) < 1e-9:
        return ahead
    here, there = a.position + near * f, b.position + far * g  # where they are closest to each other
    line = (1 - share) * here + share * there - position
    distance = float(np.linalg.norm(line))
    met = max(1 - float(np.linalg.norm(there - here)) / min(near, far), 0.0)
    met *= min(1.2 * distance / min(near, far), 1.0) ** 2  # who flies past it does not whirl around
    found = met * line / max(distance, 1e-12) + (1 - met) * ahead
    return found / max(float(np.linalg.norm(found)), 1e-12)


def curve(points: tuple[np.ndarray, ...], gaps: tuple[float, ...], share: float) -> np.ndarray:
    """The Catmull-Rom curve from the second of four points (3,) to the third, with knots at these distances."""
    p, (g0, g1, g2) = points, gaps
    out = g1 * ((p[1] - p[0]) / g0 - (p[2] - p[0]) / (g0 + g1) + (p[2] - p[1]) / g1)
    into = g1 * ((p[2] - p[1]) / g1 - (p[3] - p[1]) / (g1 + g2) + (p[3] - p[2]) / g2)
    s, s2, s3 = share, share**2, share**3
    return (2 * s3 - 3 * s2 + 1) * p[1] + (s3 - 2 * s2 + s) * out + (3 * s2 - 2 * s3) * p[2] + (s3 - s2) * into


def turntable(key: Key, centre: np.ndarray, up: str, frames: int) -> list[Key]:
    """`frames` views once around the scene, from this one on, to the right as `cameras.orbit` does."""
    from scipy.spatial.transform import Rotation

    axis, found = direction(up), []
    for frame in range(frames):
        turn = Rotation.from_rotvec(axis * 2 * math.pi * frame / frames).as_matrix()
        position, target = (centre + turn @ (point - centre) for point in (key.position, key.target))
        found.append(Key(position, target, turn @ key.up, key.fov))
    return found


# ------------------------------------------------------------------------------------------------------------- files
def save_path(keys: Sequence[Key], path: Path, frames: int, loop: bool, size: tuple[int, int]) -> None:
    """Write the film's views as cameras.json of INRIA's kind, one a frame, for `splatedit render --cameras`.

    Such a file is in the world of the splats whatever lies beside it. Views that are keyframes are named so.
    """
    from splatedit.camera_files import save_cameras

    views, (stops, gaps) = along(keys, frames, loop), laid_out(keys, loop)
    met = set(stops_at(gaps, frames, loop)[: len(stops) - loop]) if gaps else {0}
    names = [f"{index:05d}{KEY if index in met else ''}.png" for index in range(frames)]
    save_cameras(cameras_of(views, *size), path, names, form="inria")


def load_path(path: Path, centre: np.ndarray) -> tuple[list[Key], bool]:
    """The keyframes of a file of cameras, and whether the film ends where it begins; all views, if none is named so.

    centre: of the scene; the views turn around what lies as far ahead as it is. Raises InputError.
    """
    from splatedit.camera_files import read_cameras

    file = read_cameras(path)
    named = [view for view in file.views if KEY in Path(view.name).stem]
    views: Sequence[Any] = named or file.views
    if len(views) > MOST:
        raise InputError(f"{path}: holds {len(views)} views, expected at most {MOST} keyframes.")
    keys = []
    for view in views:
        fov = 2 * math.atan(view.lens.height / 2 / view.lens.fy)
        near = from_w2c(view.w2c, fov, 1.0)
        keys.append(from_w2c(view.w2c, fov, max(float(np.linalg.norm(near.position - centre)), 1e-9)))
    return keys, bool(named) and file.views[-1] is not named[-1]
