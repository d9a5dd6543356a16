"""Where a cloud of weighted points is, and which way is up in it: robust, in numpy alone, which is there at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

UPS = ("+x", "-x", "+y", "-y", "+z", "-z")
DEFAULT_UP = "-y"  # COLMAP's first camera stands upright in most captures, and its y axis points down


def direction(up: str) -> np.ndarray:
    """(3,) the direction that one of cameras.UPS names."""
    above = np.zeros(3)
    above["xyz".index(up[1])] = 1.0 if up[0] == "+" else -1.0
    return above


def weigh(scales: np.ndarray, opacities: np.ndarray) -> np.ndarray:
    """How much each Gaussian can be seen (m,): opacity times the area of its largest section.

    scales (m, 3): logarithms; opacities (m,): logits. The area is capped at its 90th percentile, so that no sky-sized
    blob outvotes the rest.
    """
    area = np.exp(np.clip(scales.sum(1) - scales.min(1), -60, 60))
    area = np.minimum(area, np.quantile(area, 0.9))
    return area / (1 + np.exp(-np.clip(opacities, -30, 30)))


def ball(points: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre (3,) and radius of the ball that holds the points (m, 3) but not the far ones; see `cameras.bounds`."""
    points, mass = core(points, mass)
    low, high = box(points, mass, 0.005)
    centre = (low + high) / 2
    return centre, quantile(np.linalg.norm(points - centre, axis=1), mass, 0.995)


def core(points: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points (m, 3) and weights (m,) that are left when the far ones are gone."""
    for _ in range(20):  # two or three rounds do in practice
        middle = np.array([quantile(points[:, axis], mass, 0.5) for axis in range(3)])
        distance = np.linalg.norm(points - middle, axis=1)
        near = distance <= 2.5 * quantile(distance, mass, 0.9)
        if near.all():
            break
        points, mass = points[near], mass[near]
    return points, mass


def box(points: np.ndarray, mass: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners (3,), (3,) of the box that leaves out `tail` of the weight at either side of each axis."""
    low, high = ([quantile(points[:, axis], mass, q) for axis in range(3)] for q in (tail, 1 - tail))
    return np.array(low), np.array(high)


def quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    """The smallest value with at least the share `q` of the weight at or below it."""
    order = values.argsort()
    total = weights[order].cumsum()
    index = min(int(np.searchsorted(total, q * total[-1])), len(values) - 1)
    return float(values[order[index]])


# ------------------------------------------------------------------------------------------------------------------ up


def up_in_header(comments: Iterable[str], obj_info: Iterable[str] = ()) -> tuple[str, str] | None:
    """The axis that the first comment to name one says is up, and that comment; None if none does."""
    comments = tuple(comments)
    brush = any("Exported from Brush" in comment for comment in comments)
    for comment in (*comments, *obj_info):
        if up := up_in_text(comment, brush):
            return up, comment
    return None


def up_in_text(text: str, brush: bool = False) -> str | None:
    """The axis, one of UPS, that a header comment says is up; None if it says nothing of the kind."""
    said = re.search(r"(?<![\w])([+-]?)([xyz])[ _-]?up\b", text, re.I)  # "Y-up"
    if said:
        return f"{said[1] or '+'}{said[2].lower()}"
    found = re.search(
        r"\b(?:(?:vertical|up)[ _-]?(?:axis|vector)|world[ _-]?up|up(?=\s*[:=]))\s*[:=]?\s*(.+)", text, re.I
    )
    if not found:
        return None
    value = found[1].strip().lower()
    letter = re.match(r"([+-]?)([xyz])\b", value)
    if letter:
        if brush and not letter[1]:  # Brush writes the bare letter by rote; its own reader takes y as down
            return {"y": "-y"}.get(letter[2])
        return f"{letter[1] or '+'}{letter[2]}"
    try:
        vector = [float(word) for word in re.split(r"[\s,;\[\]()]+", value) if word][:3]
    except ValueError:
        return None
    size = max(map(abs, vector), default=0.0)
    if len(vector) != 3 or not 0 < size < math.inf:
        return None
    axis = max(range(3), key=lambda i: abs(vector[i]))
    return ("+" if vector[axis] > 0 else "-") + "xyz"[axis]


def up_of_ground(points: np.ndarray, mass: np.ndarray) -> str | None:
    """The axis opposite to a ground, see `cameras.explain_up`; None if there is none."""
    scores = ground_scores(points, mass)
    best, rival = sorted(UPS, key=lambda up: -scores[up])[:2]
    return best if best in ("-y", "+y", "+z") and scores[best] > max(0.6, 1.5 * scores[rival]) else None


def ground_scores(points: np.ndarray, mass: np.ndarray, cells: int = 10, layer: float = 0.06) -> dict[str, float]:
    """For each of UPS: the share of the scene's shadow along it that a thin layer at its foot fills, 0 to 1.

    The shadow is a grid of `cells` squared over the horizontal box of the scene; the layer is `layer` times the longest
    side of the box thick. A floor scores near 1, the side of a crate too, four feet or the tip of a ball near 0.
    """
    points, mass = core(points, mass)
    low, high = box(points, mass, 0.01)
    size = np.maximum(high - low, 1e-12)
    square = ((points - low) / size * cells).astype(int).clip(0, cells - 1)
    least = 0.02 * mass.sum() / cells**2
    scores = {}
    for axis in range(3):
        a, b = (i for i in range(3) if i != axis)
        cell = square[:, a] * cells + square[:, b]
        shadow = np.bincount(cell, mass, cells**2) > least
        for sign, height in (("+", points[:, axis] - low[axis]), ("-", high[axis] - points[:, axis])):
            floor = np.bincount(cell, mass * (height <= layer * size.max()), cells**2) > least
            scores[sign + "xyz"[axis]] = float((floor & shadow).sum() / max(shadow.sum(), 1))
    return scores
