"""Gaussians as a browser draws them: viser's arrays, in units in which its half-precision covariances hold them.

All of it is numpy: torch would hand the work to threads that an edit needs, and wait for them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from splatedit.cameras import Bounds
from splatedit.gaussians import SH_C0, Gaussians

BYTES = 32  # that viser sends for each splat
RADIUS = 32.0  # of the scene, in the units of its node: keeps what is between a 4000th of it and seven times it
SMALLEST, LARGEST = 2.0**-11, 240.0  # standard deviations whose squares a float16 holds, in these units
THINNEST = 2.0**-5  # least to largest one: rounding to float16 would make thinner splats' covariances indefinite


class Place(NamedTuple):
    """Where a node of the browser's scene stands: world = position + scale * its own coordinates."""

    position: tuple[float, float, float]
    scale: float


class Encoded(NamedTuple):
    """What viser's `add_gaussian_splats` and `set_gaussians` take, of m splats, in the order of the Gaussians."""

    centers: np.ndarray  # (m, 3) float32, in the coordinates of the place
    covariances: np.ndarray  # (m, 3, 3) float32, likewise
    rgbs: np.ndarray  # (m, 3) uint8, of the constant spherical harmonic
    opacities: np.ndarray  # (m, 1) uint8
    undrawable: int  # how many were left out because a number of theirs is infinite or NaN
    spared: int  # how many were left out because the budget is smaller
    wider: float  # how many times as wide as they are the others are drawn in exchange

    @property
    def n(self) -> int:
        """How many splats there are."""
        return len(self.centers)


def place(extent: Bounds) -> Place:
    """Where the node of a scene of this extent stands, so that its radius is RADIUS there."""
    x, y, z = extent.centre.tolist()
    return Place((x, y, z), extent.radius / RADIUS)


def encode(gaussians: Gaussians, at: Place, budget: int | None = None) -> Encoded:
    """The splats as the browser draws them; budget: at most so many, see `sample`.

    Standard deviations are held between SMALLEST and LARGEST and at least THINNEST of the largest of their splat.
    """
    sound, undrawable = drawable(gaussians)
    kept, wider = (sound, 1.0) if budget is None else sample(sound, budget)
    means, quats, scales, opacities, sh0 = (
        value.detach().numpy() for value in (kept.means, kept.quats, kept.scales, kept.opacities, kept.sh0[:, 0])
    )
    with np.errstate(over="ignore"):
        deviations = np.clip(np.exp(scales) / np.float32(at.scale), SMALLEST, LARGEST)
        hidden = 1 + np.exp(-opacities)
    deviations = np.maximum(deviations, THINNEST * deviations.max(1, keepdims=True))
    return Encoded(
        (means - np.array(at.position, np.float32)) / np.float32(at.scale),
        covariances(quats, deviations),
        as_bytes(0.5 + SH_C0 * sh0),
        as_bytes(1 / hidden)[:, None],
        undrawable,
        sound.n - kept.n,
        wider,
    )


def covariances(quats: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """R diag(s^2) R^T, (n, 3, 3), of quaternions (n, 4) wxyz of any length but 0 and standard deviations (n, 3)."""
    columns = np.array(quats.T, order="C")  # a copy; whole vectors are several times as fast as every fourth number
    columns /= np.abs(columns).max(0)  # squares of tiny ones would be 0
    w, x, y, z = columns / np.sqrt((columns * columns).sum(0))
    rotation = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    axes = np.stack([np.stack(row) for row in rotation]) * np.ascontiguousarray(deviations.T)  # (3, 3, n)
    found = np.empty((len(quats), 3, 3), np.float32)
    for i in range(3):
        for j in range(i, 3):
            found[:, i, j] = found[:, j, i] = (axes[i] * axes[j]).sum(0)
    return found


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8, rounded; others are clipped."""
    return np.clip(values * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)


def drawable(gaussians: Gaussians) -> tuple[Gaussians, int]:
    """Those that can be drawn, and how many cannot: see `Gaussians.drawable`; a quaternion of length 0 is no turn."""
    numbers = [value.detach().numpy() for value in gaussians.parameters.values()]
    turned = gaussians.quats.detach().numpy().any(1)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = [value.sum() for value in numbers] + [np.exp(gaussians.scales.detach().numpy()).sum()]
    if np.isfinite(sums).all() and turned.all():  # a sum of finite numbers that overflows costs time only
        return gaussians, 0
    fine = gaussians.drawable().numpy() & turned
    missing = gaussians.n - int(fine.sum())
    return (gaussians if missing == 0 else gaussians.select(fine)), missing


def sample(gaussians: Gaussians, budget: int) -> tuple[Gaussians, float]:
    """`budget` of the Gaussians, in their order, and how many times as wide they are as they were, to fill the gaps.

    Always the same ones, the more visible the likelier: the most visible alone would be a few walls and nothing fine.
    Together they are as visible as all were. Weighted sampling without replacement: Efraimidis and Spirakis 2006.
    """
    if gaussians.n <= budget:
        return gaussians, 1.0
    seen = visibility(gaussians)
    chance = np.random.default_rng(0).standard_exponential(gaussians.n, dtype=np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        keys = np.nan_to_num(seen / chance)
    kept = np.zeros(gaussians.n, bool)
    kept[np.argpartition(keys, gaussians.n - budget)[gaussians.n - budget :]] = True
    left = seen[kept].sum(dtype=np.float64)
    wider = math.sqrt(seen.sum(dtype=np.float64) / left) if left > 0 else 1.0
    chosen = gaussians.select(kept)
    return chosen._replace(scales=chosen.scales + math.log(wider)), wider


def visibility(gaussians: Gaussians) -> np.ndarray:
    """Opacity times area of the largest section of each one, (n,) float32, world units squared.

    The area is capped at its 90th percentile, so that a sky-sized blob does not outweigh the rest.
    """
    scales, opacities = gaussians.scales.detach().numpy(), gaussians.opacities.detach().numpy()
    with np.errstate(over="ignore"):
        logarithms = scales.sum(1) - scales.min(1)
        area = np.exp(np.minimum(logarithms, np.quantile(logarithms, 0.9)).clip(-87, 87))
        return area / (1 + np.exp(-opacities))
