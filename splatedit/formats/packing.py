"""What the packed formats share: opacities as bytes, quaternions by their smallest three, how a scene is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

from splatedit.formats.checks import check_read, unnamed_losses
from splatedit.gaussians import PARAMETERS, Gaussians

# A byte of 0 or 255 would be a logit of minus or plus infinity; splat-transform keeps the same distance.
CLEAR = 1e-6
FLAT = float(np.finfo(np.float32).tiny)  # stands for a standard deviation of 0, which has no logarithm

# The header comment by which Brush and splat-transform say that a scene was trained with Mip-Splatting's filter.
RENDER_MODE = "SplatRenderMode:"
ANTIALIASED = f"{RENDER_MODE} mip"


def to_bytes(values: np.ndarray) -> np.ndarray:
    """The nearest of 0 to 255, uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def opacity_bytes(logits: np.ndarray) -> np.ndarray:
    """Logit opacities as bytes: 0 is clear, 255 opaque."""
    return to_bytes(255 * expit(logits.astype(np.float64)))


def opacity_logits(packed: np.ndarray) -> np.ndarray:
    """The logits of such bytes, float32; 0 and 255 become CLEAR from the ends."""
    alpha = np.clip(packed / 255.0, CLEAR, 1 - CLEAR)
    return np.log(alpha / (1 - alpha)).astype(np.float32)


def normalized(quats: np.ndarray) -> np.ndarray:
    """Quaternions (n, 4) at length 1, float64; those of length 0 become 1 0 0 0."""
    quats = quats.astype(np.float64)
    quats /= np.maximum(np.abs(quats).max(1, keepdims=True), np.finfo(np.float32).tiny)  # squares must not vanish
    length = np.linalg.norm(quats, axis=1, keepdims=True)
    return np.where(length > 0, quats / np.maximum(length, 1e-30), [1.0, 0.0, 0.0, 0.0])


def smallest_three(quats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which number of each unit quaternion is the largest, (n,), and the three others in order, (n, 3).

    The sign is turned so that the largest is positive; then the others tell it, and lie within 1/sqrt(2) of 0.
    """
    largest = np.abs(quats).argmax(1)
    turned = quats * np.where(np.take_along_axis(quats, largest[:, None], 1) < 0, -1.0, 1.0)
    return largest, turned[np.arange(4) != largest[:, None]].reshape(-1, 3)


def from_smallest_three(largest: np.ndarray, three: np.ndarray) -> np.ndarray:
    """The quaternions (n, 4) again."""
    quats = np.empty((len(largest), 4))
    quats[np.arange(4) != largest[:, None]] = three.ravel()
    rest = np.sqrt(np.maximum(0.0, 1.0 - (three**2).sum(1)))
    np.put_along_axis(quats, largest[:, None], rest[:, None], 1)
    return quats


def assemble(path: Path, values: dict[str, np.ndarray], comments: tuple[str, ...] = ()) -> Gaussians:
    """Gaussians from the six parameters by name, as float32; raises InputError if they are not sound."""
    with np.errstate(over="ignore"):  # a number beyond float32 becomes Inf and is reported as such
        means, quats, scales, opacities, sh0, shN = (
            torch.from_numpy(np.ascontiguousarray(values[name], np.float32)) for name in PARAMETERS
        )
    return check_read(Gaussians(means, quats, scales, opacities, sh0, shN, comments=comments), path)


def render_mode(comments: tuple[str, ...]) -> str | None:
    """What follows RENDER_MODE in the last header comment that has it, e.g. `mip`; None if none has."""
    found = [c.strip()[len(RENDER_MODE) :].strip().lower() for c in comments if _is_render_mode(c)]
    return found[-1] if found else None


def comment_losses(gaussians: Gaussians) -> list[str]:
    """What only a plain .ply holds; the comment RENDER_MODE has a place of its own and is not lost."""
    rest = tuple(c for c in gaussians.comments if not _is_render_mode(c))
    return unnamed_losses(gaussians._replace(comments=rest))


def _is_render_mode(comment: str) -> bool:
    return comment.strip().lower().startswith(RENDER_MODE.lower())
