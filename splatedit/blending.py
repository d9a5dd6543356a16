"""Edits at part strength: `blend` between a scene and its edit, `reapply` an edit to a scene that has moved on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from splatedit.deltas import pairs
from splatedit.errors import InputError
from splatedit.gaussians import PARAMETERS, Gaussians


class Named(NamedTuple):
    """Gaussians and which ones they are."""

    gaussians: Gaussians
    ids: np.ndarray  # (n,) int64, as in deltas.State


class Match(NamedTuple):
    """Row numbers by which an edit meets a scene."""

    scene: Tensor  # what scene, before and after all have, in the same order
    before: Tensor
    after: Tensor
    added: Tensor  # of after: what the edit added
    stay: Tensor  # of scene: what after has not, and the result has
    going: Tensor  # (len(stay),) bool: which of these the edit removed
    order: Tensor  # puts these three parts, one after another, into the order of the result


def blend(before: Gaussians, after: Gaussians, strength: float) -> Gaussians:
    """Gaussians of the same rows between `before` (0) and `after` (1), both met exactly; what is equal stays so.

    Straight lines in what files store: positions, log scales, logit opacities, harmonics. Rotations go the shorter way
    round by normalised interpolation, their lengths in a straight line.
    """
    new = after.parameters
    return after._replace(**{k: _blend(k, v, new[k], strength) for k, v in before.parameters.items()})


def fade(opacities: Tensor, share: float) -> Tensor:
    """Logit opacities of Gaussians whose opacity is `share` of what it was, share in (0, 1]."""
    if share == 1:
        return opacities
    logit = opacities.double()
    opacity = share * logit.sigmoid()
    return (np.log(share) + F.logsigmoid(logit) - torch.log1p(-opacity)).float()


def reapply(scene: Named, before: Named, after: Named, strength: float) -> Named:
    """The edit that led from `before` to `after`, applied at `strength` in (0, 1] to another state of the same scene.

    A value that is still as it was before the edit becomes `blend(before, after, strength)` exactly. A value that is
    not moves by as much: by the same difference, rotations by the same turn. Gaussians that the edit added appear with
    that share of their opacity, those it removed keep the rest of theirs. What the edit did not know stays as it is.
    Rows come in the order of `after`, then what it has not. Header comments and extra columns are those of the edit.
    Raises InputError if the edit changed the degree of the spherical harmonics.
    """
    if len({g.gaussians.sh_degree for g in (scene, before, after)}) > 1:
        raise InputError("strength: an edit that changes the degree of the spherical harmonics has no part strength.")
    at = _match(scene.ids, before.ids, after.ids, strength)
    values = {}
    for name in PARAMETERS:  # one after another, since scenes are large
        here, old, new = (getattr(named.gaussians, name) for named in (scene, before, after))
        target = _blend(name, old[at.before], new[at.after], strength)
        moved = _move(name, here[at.scene], old[at.before], target)
        appearing, staying = new[at.added], here[at.stay]
        if name == "opacities":
            appearing = fade(appearing, strength)
            staying = torch.where(at.going, fade(staying, 1 - strength), staying) if strength < 1 else staying
        values[name] = torch.cat([moved, appearing, staying])[at.order]
    new, here = torch.from_numpy(after.ids), torch.from_numpy(scene.ids)
    ids = torch.cat([new[at.after], new[at.added], here[at.stay]])[at.order].numpy()
    known = before.gaussians.comments
    comments = scene.gaussians.comments + tuple(c for c in after.gaussians.comments if c not in known)
    extra = _extra(scene.gaussians, after.gaussians, at)
    return Named(after.gaussians._replace(**values, extra=extra, comments=comments), ids)


def _match(scene: np.ndarray, before: np.ndarray, after: np.ndarray, strength: float) -> Match:
    in_after, in_scene = _rows(after, scene)
    in_before = _find(before, after[in_after])
    kept = in_before >= 0
    in_after, in_scene, in_before = in_after[kept], in_scene[kept], in_before[kept]
    added = (_find(before, after) < 0).nonzero()[0]
    left = _find(after, scene) < 0
    going = left & (_find(before, scene) >= 0)
    stay = (left & ~going if strength == 1 else left).nonzero()[0]
    order = np.argsort(np.concatenate([in_after, added, len(after) + stay]), kind="stable")
    return Match(*map(torch.from_numpy, (in_scene, in_before, in_after, added, stay, going[stay], order)))


def _extra(scene: Gaussians, after: Gaussians, at: Match) -> dict[str, np.ndarray]:
    """The extra columns: the edit's, for rows it has not the scene's; zeros where neither says anything."""
    common, kept, added, stay, order = (t.numpy() for t in (at.after, at.scene, at.added, at.stay, at.order))
    columns = {}
    for name, column in {**scene.extra, **after.extra}.items():
        theirs, mine = scene.extra.get(name), after.extra.get(name)
        none = np.zeros(max(after.n, scene.n), column.dtype)
        first = column[kept] if mine is None else mine[common]
        parts = [first, (none if mine is None else mine)[added], (none if theirs is None else theirs)[stay]]
        columns[name] = np.concatenate(parts).astype(column.dtype)[order]
    return columns


def _blend(name: str, before: Tensor, after: Tensor, strength: float) -> Tensor:
    """`blend` of one parameter."""
    same = _same(before, after)
    if strength in (0, 1) or same.all():
        return after if strength else before
    a, b = before.double(), after.double()
    value = _rotate_part(a, b, strength) if name == "quats" else torch.lerp(a, b, strength)
    return torch.where(same, before, value.float())


def _move(name: str, scene: Tensor, before: Tensor, target: Tensor) -> Tensor:
    """One parameter moved as `before` moves to become `target`; exactly `target` where it still is as before."""
    same = _same(scene, before)
    if same.all():
        return target
    a, b, x = before.double(), target.double(), scene.double()
    moved = _turn(_turn(b, _inverse(a)), x) if name == "quats" else x + (b - a)
    moved = torch.where(_same(target, before), scene, moved.float())
    return torch.where(same, target, moved)


def _rotate_part(a: Tensor, b: Tensor, strength: float) -> Tensor:
    """Normalised linear interpolation of quaternions (n, 4) of any length, on the side of `a`."""
    first, second = F.normalize(a, dim=1), F.normalize(b, dim=1)
    second = torch.where((first * second).sum(1, keepdim=True) < 0, -second, second)
    length = torch.lerp(a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True), strength)
    return F.normalize(torch.lerp(first, second, strength), dim=1) * length


def _turn(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product of quaternions (n, 4), wxyz."""
    w, v, x, u = a[:, :1], a[:, 1:], b[:, :1], b[:, 1:]
    scalar = w * x - (v * u).sum(1, keepdim=True)
    return torch.cat([scalar, w * u + x * v + torch.linalg.cross(v, u, dim=1)], 1)


def _inverse(a: Tensor) -> Tensor:
    sign = torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=a.dtype)
    return a * sign / a.square().sum(1, keepdim=True)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Which rows are equal bit for bit, shaped to select among rows."""
    equal = a.view(torch.int32) == b.view(torch.int32)
    return equal if a.ndim == 1 else equal.flatten(1).all(1).reshape(-1, *[1] * (a.ndim - 1))


def _rows(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the ids that both hold, never slices."""
    left, right = pairs(first, second)
    return np.arange(len(first))[left], np.arange(len(second))[right]


def _find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted id its row in `ids`, -1 where it is not there."""
    order = np.argsort(ids, kind="stable")
    if not len(ids):
        return np.full(len(wanted), -1)
    place = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return np.where(ids[place] == wanted, place, -1)
