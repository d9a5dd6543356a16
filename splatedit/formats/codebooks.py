"""Many numbers by few: a codebook for single numbers, a palette for rows, both by k-means and the same for one seed."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

BINS = 4096  # of equal mass, to see the density by
LLOYD = 30  # rounds of k-means on single numbers, which cost next to nothing
ROUNDS = 8  # on rows
SAMPLE = 1 << 15  # rows that the coarse cells of a palette are found from
CHUNK = 1 << 24  # distances held at a time


def codebook(values: np.ndarray, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The `size` numbers that stand for `values` with the least squared error, and which one stands for each.

    float32 in ascending order, the last repeated if there are fewer; indices of the shape of `values`. Up to `size`
    different values are kept exactly. k-means started where the density to the power 1/3 says (Panter and Dite 1951).
    """
    distinct, index = np.unique(values, return_inverse=True)
    if len(distinct) <= size:
        return np.pad(distinct, (0, size - len(distinct)), "edge").astype(np.float32), index.reshape(values.shape)
    ordered = np.sort(values, axis=None).astype(np.float64)
    totals = np.concatenate([[0.0], np.cumsum(ordered)])
    squares = np.concatenate([[0.0], np.cumsum(ordered**2)])
    # In bins of equal mass the density is 1 / width, and so width^(2/3) what a bin gets of the centres.
    edges = ordered[np.linspace(0, len(ordered) - 1, min(len(ordered), BINS)).astype(int)]
    share = np.concatenate([[0.0], np.cumsum(np.diff(edges) ** (2 / 3))])
    centres = np.interp((np.arange(size) + 0.5) / size * share[-1], share, edges)
    for _ in range(LLOYD):
        ends = np.concatenate([[0], np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2), [len(ordered)]])
        count = np.maximum(np.diff(ends), 1)
        centres = np.where(np.diff(ends), np.diff(totals[ends]) / count, centres)
        empty = np.flatnonzero(np.diff(ends) == 0)
        error = np.maximum(np.diff(squares[ends]) - np.diff(totals[ends]) ** 2 / count, 0)
        worst = np.argsort(error)[len(error) - len(empty) :]  # split by those that nothing came to
        centres[empty] = centres[worst] + np.sqrt(error[worst] / count[worst])
        centres.sort()
    book = centres.astype(np.float32)
    return book, nearest(values, book)


def nearest(values: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Which of the ascending numbers of a codebook is nearest to each value."""
    return np.searchsorted((book[1:].astype(np.float64) + book[:-1]) / 2, values)


def palette(rows: np.ndarray, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """At most `size` rows that stand for all (n, d) float32, and which one stands for each: (m, d) and (n,).

    Up to `size` different rows are kept exactly. Else k-means in two levels: about sqrt(size) cells, then each by
    itself with its share of the palette, which needs sqrt(size) times fewer distances than one level.
    """
    distinct, index = _distinct(rows)
    if len(distinct) <= size:
        return distinct, index
    draw = np.random.default_rng(seed)
    cells = max(1, round(np.sqrt(size)))
    sample = rows[np.sort(draw.permutation(len(rows))[: max(SAMPLE, 8 * cells)])]
    cell = assign(rows, kmeans(sample, cells, draw))
    members = np.split(np.argsort(cell, kind="stable"), np.cumsum(np.bincount(cell, minlength=cells))[:-1])
    colours, labels, used = [], np.empty(len(rows), np.int64), 0
    for inside, share in zip(members, _shares([len(m) for m in members], size), strict=True):
        if len(inside):
            centres = kmeans(rows[inside], share, draw)
            labels[inside] = used + assign(rows[inside], centres)
            colours.append(centres)
            used += len(centres)
    return np.concatenate(colours), labels


def kmeans(rows: np.ndarray, size: int, draw: np.random.Generator) -> np.ndarray:
    """Centres (min(size, n), d) of n rows by Lloyd's rounds from rows drawn at random; an empty one stays."""
    centres = rows[np.sort(draw.permutation(len(rows))[:size])]
    if size >= len(rows):
        return centres
    for _ in range(ROUNDS):
        label = assign(rows, centres)
        ones = np.ones(len(rows), np.float32)
        member = csr_matrix((ones, (label, np.arange(len(rows)))), shape=(len(centres), len(rows)))
        count = np.bincount(label, minlength=len(centres))[:, None]
        centres = np.where(count, (member @ rows) / np.maximum(count, 1), centres).astype(np.float32)
    return centres


def assign(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Which centre is nearest to each row; (n,), the first of equals."""
    half = 0.5 * (centres**2).sum(1)
    step = max(1, CHUNK // len(centres))
    parts = [(half - rows[i : i + step] @ centres.T).argmin(1) for i in range(0, len(rows), step)]
    return np.concatenate(parts)


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that differ in any bit, and where each is among them."""
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]
    _, first, index = np.unique(whole, return_index=True, return_inverse=True)
    return rows[first], index


def _shares(counts: list[int], size: int) -> list[int]:
    """`size` split by how many rows each cell has; none gets more than it has, none that has any gets nothing."""
    filled = sum(count > 0 for count in counts)
    spare, total = size - filled, sum(counts)
    return [min(count, 1 + spare * count // total) if count else 0 for count in counts]
