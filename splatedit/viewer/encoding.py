"""Gaussians as a browser draws them: those that can be drawn, a sample if they are too many; see `wire`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from splatedit.cameras import Bounds
from splatedit.gaussians import Gaussians
from splatedit.viewer import wire
from splatedit.viewer.wire import Place, Splats


class Encoded(NamedTuple):
    """What the browser is sent, in the order of the Gaussians, and what it is not."""

    centers: np.ndarray  # (m, 3) ... as of wire.Splats
    covariances: np.ndarray
    rgbs: np.ndarray
    opacities: np.ndarray
    undrawable: int  # how many were left out because a number of theirs is infinite or NaN
    spared: int  # how many were left out because the budget is smaller
    wider: float  # how many times as wide as they are the others are drawn in exchange

    @property
    def splats(self) -> Splats:
        """What is sent."""
        return Splats(*self[:4])

    @property
    def n(self) -> int:
        """How many splats there are."""
        return len(self.centers)


def place(extent: Bounds) -> Place:
    """Where the node of a scene of this extent stands, see `wire.place`."""
    return wire.place(extent.centre.numpy(), extent.radius)


def encode(gaussians: Gaussians, at: Place, budget: int | None = None) -> Encoded:
    """The splats as the browser draws them; budget: at most so many, see `sample`."""
    sound, undrawable = drawable(gaussians)
    kept, wider = (sound, 1.0) if budget is None else sample(sound, budget)
    means, quats, scales, opacities, sh0 = (
        value.detach().numpy() for value in (kept.means, kept.quats, kept.scales, kept.opacities, kept.sh0[:, 0])
    )
    splats = wire.splats(means, quats, scales, opacities, sh0, at)
    return Encoded(*splats, undrawable, sound.n - kept.n, wider)


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
