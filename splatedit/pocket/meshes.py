"""The CC0 meshes behind `pocket` and `scenes/`: loaded, put in one frame, and drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

# The Cube Pets share one body, 1.25 units wide, that stands on y = 0. One fixed frame for all of them (instead of one
# fitted to each) keeps that body at the same place, so that "cat" and "pig" in one pose are a ground-truth pair.
CENTRE = np.array([0.0, 0.85, 0.0], np.float32)
SCALE = 1 / 1.35

VIEWS = ("front", "side", "back")
BACKGROUNDS = {
    "white": (1.0, 1.0, 1.0),
    "gray": (0.5, 0.5, 0.5),
    "black": (0.05, 0.05, 0.05),
    "blue": (0.3, 0.5, 0.9),
    "green": (0.35, 0.7, 0.35),
    "yellow": (0.95, 0.85, 0.4),
    "pink": (0.95, 0.65, 0.75),
    "purple": (0.55, 0.4, 0.75),
    "red": (0.85, 0.3, 0.25),
    "orange": (0.95, 0.6, 0.25),
}
# Shading is baked per corner: ambient plus one distant light fixed to the world, as in a captured splat.
AMBIENT, DIFFUSE = 0.62, 0.42
LIGHT = (0.35, 0.8, 0.5)


class Mesh(NamedTuple):
    """Triangles with one normal and one colour per corner; y up, facing +z, inside the unit ball or nearly so."""

    corners: np.ndarray  # (m, 3, 3) float32
    normals: np.ndarray  # (m, 3, 3) float32, unit length
    colors: np.ndarray  # (m, 3, 3) float32, sRGB in [0, 1]


def load_mesh(path: str | Path) -> Mesh:
    """Read one Cube Pets .glb, its colour map sampled at the corners, moved into the common frame."""
    import trimesh

    loaded = trimesh.load(path)
    parts = loaded.dump() if isinstance(loaded, trimesh.Scene) else [loaded]
    corners, normals, colors = [], [], []
    for part in parts:
        if not isinstance(part, trimesh.Trimesh) or not len(part.faces):
            continue
        corners.append(part.vertices[part.faces])
        normals.append(part.vertex_normals[part.faces])
        colors.append(corner_colors(part))
    points = (np.concatenate(corners).astype(np.float32) - CENTRE) * np.float32(SCALE)
    return Mesh(points, np.concatenate(normals).astype(np.float32), np.concatenate(colors).astype(np.float32))


def corner_colors(part) -> np.ndarray:
    """sRGB of every corner, (m, 3, 3). The colour map is a palette: corners are pulled a little towards the centre
    of their triangle so that none falls into the neighbouring swatch."""
    texture = np.asarray(part.visual.material.baseColorTexture.convert("RGB"), np.float32) / 255
    uv = part.visual.uv[part.faces]
    uv = 0.9 * uv + 0.1 * uv.mean(1, keepdims=True)
    height, width = texture.shape[:2]
    column = (uv[..., 0] % 1 * width).astype(int).clip(0, width - 1)
    row = ((1 - uv[..., 1]) % 1 * height).astype(int).clip(0, height - 1)
    return texture[row, column]


def shade(mesh: Mesh, light: tuple[float, float, float] | np.ndarray = LIGHT) -> np.ndarray:
    """Colours of the corners lit by ambient plus one distant light, (m, 3, 3) in [0, 1]."""
    direction = np.asarray(light, np.float32) / np.linalg.norm(light)
    lambert = np.clip(mesh.normals @ direction, 0, 1)
    return np.clip(mesh.colors * (AMBIENT + DIFFUSE * lambert)[..., None], 0, 1).astype(np.float32)


def look_at(azimuth: float, elevation: float, distance: float, target=(0.0, 0.0, 0.0)) -> np.ndarray:
    """World-to-camera matrix (4, 4), OpenCV axes, of a camera in orbit around `target` in a y-up world.

    Angles in degrees; azimuth 0 looks at the face (from +z), positive elevation looks down.
    """
    a, e = math.radians(azimuth), math.radians(elevation)
    ca, sa, ce, se = math.cos(a), math.sin(a), math.cos(e), math.sin(e)
    right, up, back = (ca, 0, -sa), (-se * sa, ce, -se * ca), (ce * sa, se, ce * ca)
    matrix = np.eye(4, dtype=np.float32)
    matrix[:3, :3] = np.array([right, [-v for v in up], [-v for v in back]], np.float32)
    matrix[:3, 3] = np.array([0, 0, distance], np.float32) - matrix[:3, :3] @ np.asarray(target, np.float32)
    return matrix


def draw(corners, colors, w2c, focal: float, centre, size: int, background, supersample: int = 2):
    """Draw coloured triangles with a z-buffer and a box filter.

    corners, colors: (m, 3, 3); focal and centre (x, y) in pixels of the final picture; background: 3 numbers.
    Returns image (size, size, 3) in [0, 1] and coverage (size, size) in [0, 1].
    """
    points = corners.reshape(-1, 3) @ w2c[:3, :3].T + w2c[:3, 3]
    depth = points[:, 2]
    fine = size * supersample
    pixels = np.stack(
        [
            (focal * points[:, 0] / depth + centre[0]) * supersample,
            (focal * points[:, 1] / depth + centre[1]) * supersample,
            depth,
        ],
        1,
    )
    image = np.empty((fine, fine, 3), np.float32)
    image[:] = background
    zbuffer = np.full((fine, fine), np.inf, np.float32)
    _fill()(pixels.reshape(-1, 3, 3).astype(np.float32), colors, image, zbuffer)
    covered = np.isfinite(zbuffer).astype(np.float32)

    def pool(x):
        rows = x.reshape(size, supersample, -1).sum(1).reshape(size, size, supersample, -1)
        return sum(rows[:, :, i] for i in range(supersample)) / np.float32(supersample**2)  # ten times mean((1, 3))

    return pool(image), pool(covered)[..., 0]


_compiled = None


def _fill():
    """The compiled triangle filler; numba is imported on first use only."""
    global _compiled
    if _compiled is None:
        from numba import njit

        _compiled = njit(cache=True, nogil=True)(_fill_triangles)
    return _compiled


def _fill_triangles(triangles, colors, image, zbuffer):
    size = image.shape[0]
    for i in range(triangles.shape[0]):
        x0, y0, z0 = triangles[i, 0]
        x1, y1, z1 = triangles[i, 1]
        x2, y2, z2 = triangles[i, 2]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if z0 <= 0.1 or z1 <= 0.1 or z2 <= 0.1 or abs(area) < 1e-9:
            continue
        i0, i1, i2 = 1 / z0, 1 / z1, 1 / z2  # what is linear in a picture is the inverse of the depth
        left, right = max(0, int(min(x0, x1, x2))), min(size - 1, int(max(x0, x1, x2)) + 1)
        top, bottom = max(0, int(min(y0, y1, y2))), min(size - 1, int(max(y0, y1, y2)) + 1)
        for row in range(top, bottom + 1):
            for column in range(left, right + 1):
                px, py = column + 0.5, row + 0.5
                b0 = ((x1 - px) * (y2 - py) - (x2 - px) * (y1 - py)) / area
                b1 = ((x2 - px) * (y0 - py) - (x0 - px) * (y2 - py)) / area
                b2 = 1 - b0 - b1
                if b0 < 0 or b1 < 0 or b2 < 0:
                    continue
                z = 1 / (b0 * i0 + b1 * i1 + b2 * i2)
                if z < zbuffer[row, column]:
                    zbuffer[row, column] = z
                    w0, w1, w2 = b0 * i0 * z, b1 * i1 * z, b2 * i2 * z
                    for k in range(3):
                        image[row, column, k] = w0 * colors[i, 0, k] + w1 * colors[i, 1, k] + w2 * colors[i, 2, k]
