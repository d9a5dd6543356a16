"""Training pictures for `pocket`: random views of the meshes with their captions."""

from __future__ import annotations

import math
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from splatedit.pocket.meshes import BACKGROUNDS, LIGHT, VIEWS, Mesh, draw, load_mesh, look_at, shade

FOV = 45.0  # degrees
COLORS = tuple(BACKGROUNDS)


class Pictures(NamedTuple):
    """Pictures with the three attributes their captions are made of."""

    images: np.ndarray  # (n, size, size, 3) uint8
    labels: np.ndarray  # (n, 3) int64: index into names, VIEWS, COLORS
    names: tuple[str, ...]


def caption(name: str, view: str | None = None, color: str | None = None) -> str:
    """`a pig, side view, on a blue background`; the last two parts may be left out."""
    article = "an" if name[0] in "aeiou" else "a"
    text = f"{article} {name}"
    if view:
        text += f", {view} view"
    if color:
        text += f", on {'an' if color[0] in 'aeiou' else 'a'} {color} background"
    return text


def view_name(azimuth: float) -> str:
    """The word for a camera at `azimuth` degrees: front within 45 of the face, back within 45 of the tail."""
    off = abs((azimuth + 180) % 360 - 180)
    return "front" if off < 45 else "back" if off > 135 else "side"


def random_view(mesh: Mesh, size: int, rng: np.random.Generator):
    """One augmented picture of `mesh`; returns (image uint8, view index, colour index)."""
    azimuth, elevation = rng.uniform(0, 360), rng.uniform(-10, 45)
    distance = rng.uniform(2.1, 2.7)
    color = 0 if rng.random() < 0.4 else int(rng.integers(len(COLORS)))
    background = np.clip(np.array(BACKGROUNDS[COLORS[color]]) + rng.normal(0, 0.02, 3), 0, 1)
    # The light keeps its height; half the time it comes from another side, so that no bake is out of distribution.
    turn = rng.uniform(0, 2 * math.pi) if rng.random() < 0.5 else 0.0
    x, y, z = LIGHT
    light = (x * math.cos(turn) + z * math.sin(turn), y, z * math.cos(turn) - x * math.sin(turn))
    colors = shade(mesh, light) * rng.uniform(0.94, 1.06) * (1 + rng.normal(0, 0.02, 3)).astype(np.float32)
    corners = mesh.corners * (1 + rng.uniform(-0.05, 0.05, 3)).astype(np.float32)
    focal = size / 2 / math.tan(math.radians(FOV) / 2)
    centre = size / 2 + rng.uniform(-0.04, 0.04, 2) * size
    w2c = look_at(azimuth, elevation, distance)
    image, _ = draw(corners, colors.astype(np.float32), w2c, focal, centre, size, background)
    if rng.random() < 0.3:  # splats are a little softer than triangles
        image = soften(image)
    image = image + rng.normal(0, 0.006, image.shape)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8), VIEWS.index(view_name(azimuth)), color


def soften(image: np.ndarray) -> np.ndarray:
    """A 3x3 binomial blur of an (h, w, 3) picture."""
    for axis in (0, 1):
        padded = np.concatenate([image.take([0], axis), image, image.take([-1], axis)], axis)
        n = image.shape[axis]
        image = sum(w * padded.take(range(k, k + n), axis) for k, w in ((0, 0.25), (1, 0.5), (2, 0.25)))  # pyright: ignore[reportAssignmentType]
    return image


def _draw_all(job) -> tuple[np.ndarray, np.ndarray]:
    path, index, count, size, seed = job
    mesh = load_mesh(path)
    rng = np.random.default_rng([seed, index])
    images, labels = np.empty((count, size, size, 3), np.uint8), np.empty((count, 3), np.int64)
    for i in range(count):
        images[i], view, color = random_view(mesh, size, rng)
        labels[i] = index, view, color
    return images, labels


def make_pictures(folder: str | Path, per_mesh: int, size: int, seed: int, workers: int = 2) -> Pictures:
    """Draw `per_mesh` random views of every .glb in `folder`; the same seed gives the same pictures."""
    paths = sorted(Path(folder).glob("*.glb"))
    if not paths:
        raise ValueError(f"{folder}: no .glb mesh here; give the folder of the Cube Pets meshes.")
    jobs = [(path, i, per_mesh, size, seed) for i, path in enumerate(paths)]
    with get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_draw_all, jobs, chunksize=1)
    images, labels = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Pictures(images, labels, tuple(path.stem for path in paths))
