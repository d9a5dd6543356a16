"""Edits at part strength: `blend` between a scene and its edit, `reapply` an edit to a scene that has moved on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from splatedit.deltas import pairs
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians

Parameters = dict[str, Tensor]


class Named(NamedTuple):
    """Gaussians and which ones they are."""

    gaussians: Gaussians
    ids: np.ndarray  # (n,) int64, as in deltas.State


def blend(before: Parameters, after: Parameters, strength: float) -> Parameters:
    """Parameters of the same rows between `before` (0) and `after` (1), both met exactly; what is equal stays so.

    Straight lines in what files store: positions, log scales, logit opacities, harmonics. Rotations go the shorter way
    round by normalised interpolation, their lengths in a straight line.
    """
    if strength in (0.0, 1.0):
        return dict(after if strength else before)
    mixed = {}
    for name, first in before.items():
        a, b = first.double(), after[name].double()
        value = _rotate_part(a, b, strength) if name == "quats" else torch.lerp(a, b, strength)
        same = _same(first, after[name])
        mixed[name] = torch.where(same, first, value.float())
    return mixed


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
    in_after, in_scene = _rows(after.ids, scene.ids)
    in_before = _find(before.ids, after.ids[in_after])
    kept = in_before >= 0
    in_after, in_scene, in_before = in_after[kept], in_scene[kept], in_before[kept]
    old, new = _take(before.gaussians, in_before), _take(after.gaussians, in_after)
    moved = _move(_take(scene.gaussians, in_scene), old, blend(old, new, strength))

    added = (_find(before.ids, after.ids) < 0).nonzero()[0]
    appearing = _take(after.gaussians, added)
    appearing["opacities"] = fade(appearing["opacities"], strength)

    left = _find(after.ids, scene.ids) < 0
    going = left & (_find(before.ids, scene.ids) >= 0)
    stay = (left & ~going if strength == 1 else left).nonzero()[0]
    staying = _take(scene.gaussians, stay)
    if strength < 1:
        share = fade(staying["opacities"], 1 - strength)
        staying["opacities"] = torch.where(torch.from_numpy(going[stay]), share, staying["opacities"])

    order = np.argsort(np.concatenate([in_after, added, len(after.ids) + stay]), kind="stable")
    parts = moved, appearing, staying
    values = {k: torch.cat([part[k] for part in parts])[torch.from_numpy(order)] for k in moved}
    sources = ((after, in_after), (after, added), (scene, stay))
    ids = np.concatenate([named.ids[rows] for named, rows in sources])[order]
    extra = _extra(after.gaussians, scene.gaussians, in_after, in_scene, added, stay, order)
    said = before.gaussians.comments
    comments = scene.gaussians.comments + tuple(c for c in after.gaussians.comments if c not in said)
    return Named(after.gaussians._replace(**values, extra=extra, comments=comments), ids)


def _extra(after: Gaussians, scene: Gaussians, in_after, in_scene, added, stay, order) -> dict[str, np.ndarray]:
    """The extra columns: the edit's, for rows it has not the scene's; zeros where neither says anything."""
    columns = {}
    for name, column in {**scene.extra, **after.extra}.items():
        mine, theirs = after.extra.get(name), scene.extra.get(name)
        none = np.zeros(max(after.n, scene.n), column.dtype)
        first = theirs[in_scene] if mine is None and theirs is not None else column[in_after]
        parts = [first, (none if mine is None else mine)[added], (none if theirs is None else theirs)[stay]]
        columns[name] = np.concatenate(parts).astype(column.dtype)[order]
    return columns


def _move(scene: Parameters, before: Parameters, target: Parameters) -> Parameters:
    """`scene` moved as `before` has to move to become `target`; exactly `target` where it still is as before."""
    moved = {}
    for name, value in scene.items():
        a, b, x = before[name].double(), target[name].double(), value.double()
        away = _turn(_turn(b, _inverse(a)), x) if name == "quats" else x + (b - a)
        away = torch.where(_same(target[name], before[name]), value, away.float())
        moved[name] = torch.where(_same(value, before[name]), target[name], away)
    return moved


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
    equal = (a.view(torch.int32) == b.view(torch.int32)).reshape(len(a), -1).all(1)
    return equal.reshape(-1, *[1] * (a.ndim - 1))


def _take(gaussians: Gaussians, rows: np.ndarray) -> Parameters:
    index = torch.from_numpy(rows)
    return {name: value[index].contiguous() for name, value in gaussians.parameters.items()}


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
