"""Which rows of a scene a second splat file holds: a selection that was saved apart, perhaps rounded by its format."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from splatedit.gaussians import SH_C0, Gaussians

CANDIDATES = 8  # nearest rows of the scene that are looked at for each row of the selection
ULPS = 8 * 2.0**-24  # float32 positions survive a viewer's arithmetic to a few units in the last place
CHUNK = 256  # Gaussians that share one box in a compressed.ply
# What one unit of a row's cost is, beside one tolerance of position: two steps of 8 bits, a tenth of a log size.
UNITS = np.array([2 / 255] * 4 + [0.1] * 3)


class Print(NamedTuple):
    """What a Gaussian is told apart by."""

    points: np.ndarray  # (n, 3) float64, world units
    looks: np.ndarray  # (n, 7) float32: red, green, blue, opacity in [0, 1]; log sizes, ascending


def fingerprint(gaussians: Gaussians) -> Print:
    """Positions and looks of all rows."""
    colors = (0.5 + SH_C0 * gaussians.sh0[:, 0].detach().double()).clamp(0, 1)
    opacity = gaussians.opacities.detach().double().sigmoid()[:, None]
    sizes = (
        gaussians.scales.detach().double().sort(1).values
    )  # some formats swap axes and turn the quaternion with them
    looks = np.concatenate([part.cpu().numpy() for part in (colors, opacity, sizes)], 1)
    return Print(gaussians.means.detach().double().cpu().numpy(), looks.astype(np.float32))


# -------------------------------------------------------------------------------- what a format does to positions
def as_float32(points: np.ndarray) -> np.ndarray:
    """Tolerance (n,) of positions (n, 3) kept as float32."""
    return np.full(len(points), ULPS * np.abs(points).max(initial=0.0))


def as_fixed_point(points: np.ndarray) -> np.ndarray:
    """Of .spz: whole multiples of a power of two, found from the numbers themselves."""
    for bits in range(24):
        if not (points * 2.0**bits % 1).any():
            return np.full(len(points), np.sqrt(3) * 2.0**-bits) + as_float32(points)
    return as_float32(points)


def as_chunks(points: np.ndarray) -> np.ndarray:
    """Of .compressed.ply: 11, 10 and 11 bits across the box of each 256 rows."""
    steps = np.empty(len(points))
    for first in range(0, len(points), CHUNK):
        part = points[first : first + CHUNK]
        steps[first : first + CHUNK] = np.linalg.norm(np.ptp(part, axis=0) / (2047, 1023, 2047))
    return steps + as_float32(points)


def as_blocks(points: np.ndarray) -> np.ndarray:
    """Of .ksplat: 2.5 world units in 32767 steps, the usual block of GaussianSplats3D; also if it keeps float32."""
    return np.full(len(points), np.sqrt(3) * 2.5 / 32767) + as_float32(points)


def as_log_steps(points: np.ndarray) -> np.ndarray:
    """Of .sog: 16 bits across the box of sign(x) log(1 + |x|)."""
    log = np.sign(points) * np.log1p(np.abs(points))
    return np.linalg.norm(np.ptp(log, axis=0) / 65535 * (1 + np.abs(points)), axis=1) + as_float32(points)


# One step of the grid that a format rounds to, by keys of formats.FORMATS; all others keep float32.
TOLERANCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "compressed_ply": as_chunks,
    "ksplat": as_blocks,
    "spz": as_fixed_point,
    "sog": as_log_steps,
}


# -------------------------------------------------------------------------------- pairing
def match(scene: Print, selection: Print, tolerance: np.ndarray) -> np.ndarray:
    """The row of the scene (m,) int64 that each row of the selection is, -1 where there is none; no row twice.

    tolerance: (m,), how far a row may lie from where the selection has it. Of several rows within it the one that also
    looks most alike is taken; where two rows of the selection want the same, the better match gets it.
    """
    from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  (scipy ships no stubs)

    n, m = len(scene.points), len(selection.points)
    if not n or not m:
        return np.full(m, -1)
    k = min(CANDIDATES, n)
    distance, near = cKDTree(scene.points).query(selection.points, k=k, workers=-1)
    distance, near = distance.reshape(m, k), near.reshape(m, k)
    apart = (scene.looks[near] - selection.looks[:, None]) / UNITS
    cost = (distance / np.maximum(tolerance, 1e-300)[:, None]) ** 2 + (apart**2).sum(2)
    return assign(near, np.where(distance <= tolerance[:, None], cost, np.inf), n)


def assign(near: np.ndarray, cost: np.ndarray, n: int) -> np.ndarray:
    """One of its candidates `near` (m, k) for each row, -1 for none; each of the n at most once.

    cost: (m, k), infinite for a candidate that is none. Deferred acceptance (Gale and Shapley, 1962), all rows of a
    round at once: nobody ends without a candidate that he would have served better than who has it.
    """
    order = cost.argsort(1, kind="stable")
    near, cost = np.take_along_axis(near, order, 1), np.take_along_axis(cost, order, 1)
    usable = np.isfinite(cost).sum(1)
    found, turn = np.full(len(near), -1), np.zeros(len(near), int)  # of each row: what it has, whom it asks next
    holder, held = np.full(n, -1), np.full(n, np.inf)  # of each candidate: who has it, at which cost
    while (asking := np.flatnonzero((found < 0) & (turn < usable))).size:
        wanted, price = near[asking, turn[asking]], cost[asking, turn[asking]]
        turn[asking] += 1
        by = np.lexsort((price, wanted))
        _, first = np.unique(wanted[by], return_index=True)
        best = by[first]  # of those who ask for the same
        best = best[price[best] < held[wanted[best]]]
        asking, wanted, price = asking[best], wanted[best], price[best]
        left = holder[wanted]
        found[left[left >= 0]] = -1
        found[asking], holder[wanted], held[wanted] = wanted, asking, price
    return found
