"""Splats as viser sends them, in units in which its half-precision covariances hold them.

All of it is numpy: it is there before torch is imported, and torch would hand the work to threads that an edit needs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

SPLATS = 200_000  # that a browser is sent at most, 6.4 MB at BYTES each
BYTES = 32  # that viser sends for each splat
RADIUS = 32.0  # of the scene, in the units of its node: keeps what is between a 4000th of it and seven times it
SMALLEST, LARGEST = 2.0**-11, 240.0  # standard deviations whose squares a float16 holds, in these units
THINNEST = 2.0**-5  # least to largest one: rounding to float16 would make thinner splats' covariances indefinite
SH_C0 = 0.5 / math.sqrt(math.pi)  # gaussians.SH_C0


class Place(NamedTuple):
    """Where a node of the browser's scene stands: world = position + scale * its own coordinates."""

    position: tuple[float, float, float]
    scale: float


class Splats(NamedTuple):
    """What viser's `add_gaussian_splats` and `set_gaussians` take, of m splats."""

    centers: np.ndarray  # (m, 3) float32, in the coordinates of the place
    covariances: np.ndarray  # (m, 3, 3) float32, likewise
    rgbs: np.ndarray  # (m, 3) uint8, of the constant spherical harmonic
    opacities: np.ndarray  # (m, 1) uint8


class First(NamedTuple):
    """Splats that are in the browser before there is a display: its node "after"."""

    handle: Any
    splats: Splats
    at: Place


def path_of(name: str) -> str:
    """What viser calls the node that the display calls `name`."""
    return f"/splats/{name}"


def place(centre: np.ndarray, radius: float) -> Place:
    """Where the node of a scene stands, so that its radius is RADIUS there."""
    x, y, z = centre.tolist()
    return Place((x, y, z), radius / RADIUS)


def splats(
    means: np.ndarray, quats: np.ndarray, scales: np.ndarray, opacities: np.ndarray, sh0: np.ndarray, at: Place
) -> Splats:
    """Gaussians as a file stores them, (m, 3), (m, 4), (m, 3), (m,), (m, 3) float32, all drawable, at this place.

    Standard deviations are held between SMALLEST and LARGEST and at least THINNEST of the largest of their splat.
    """
    with np.errstate(over="ignore"):
        deviations = np.clip(np.exp(scales) / np.float32(at.scale), SMALLEST, LARGEST)
        hidden = 1 + np.exp(-opacities)
    deviations = np.maximum(deviations, THINNEST * deviations.max(1, keepdims=True))
    return Splats(
        (means - np.array(at.position, np.float32)) / np.float32(at.scale),
        covariances(quats, deviations),
        as_bytes(0.5 + SH_C0 * sh0),
        as_bytes(1 / hidden)[:, None],
    )


def same(one: Splats, other: Splats) -> bool:
    """Whether both are the same to the bit."""
    return all(map(np.array_equal, one, other))


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
