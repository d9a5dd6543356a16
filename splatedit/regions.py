"""What an edit changed in the whole scene, and inside and outside the mask: of Gaussians, and of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from splatedit.gaussians import SH_C0, Gaussians
from splatedit.metrics import changed, ssim_map


class SplatChange(NamedTuple):
    """Of the Gaussians in one region; means are over those that are still there, None where there are none."""

    splats: int  # of the source
    changed: int  # of those still there, by a visible amount (`metrics.CHANGED`)
    added: int
    removed: int
    changed_share: float | None  # changed, added or removed, of all there were or are; 0 to 1
    mean_displacement: float | None  # of centres, in scene radii
    mean_colour_change: float | None  # of red, green, blue of the base colour, each in [0, 1]
    mean_opacity_change: float | None  # 0 to 1
    bit_identical: bool | None  # every number of every Gaussian is the source's, none is added or removed


class PixelChange(NamedTuple):
    """Of the pixels in one region; None where there are none, and PSNR if they are equal."""

    pixels: float  # share of all, 0 to 1
    psnr: float | None  # dB
    ssim: float | None


def splat_changes(
    source: Gaussians, edited: Gaussians, radius: float, rows: Tensor | None = None, inside: Tensor | None = None
) -> dict[str, SplatChange]:
    """Changes of "whole" and, with a mask, "inside" and "outside".

    rows: (m,) int64 source row that each edited one continues, -1 if it was added; None: edited has the source's rows.
    inside: (n,) bool, of the source; what is added counts as inside. radius: of the scene.
    """
    stayed = None if rows is None else rows >= 0
    kept = torch.arange(source.n) if rows is None or stayed is None else rows[stayed]
    old, new = (source, edited) if stayed is None else (source.select(kept), edited.select(stayed))
    colour = ((new.sh0 - old.sh0) * SH_C0).abs().flatten(1).mean(1)
    each = {
        "mean_displacement": (new.means - old.means).norm(dim=1) / radius,
        "mean_colour_change": colour,
        "mean_opacity_change": (new.opacities.sigmoid() - old.opacities.sigmoid()).abs(),
    }
    different, same = changed(old, new, radius), identical(old, new)
    born = edited.n - len(kept)
    regions = {"whole": torch.ones(source.n, dtype=torch.bool)}
    if inside is not None:
        regions |= {"inside": inside.cpu(), "outside": ~inside.cpu()}
    found = {}
    for name, region in regions.items():
        part = region[kept]
        splats, added = int(region.sum()), 0 if name == "outside" else born
        count, removed = int(different[part].sum()), splats - int(part.sum())
        found[name] = SplatChange(
            splats=splats,
            changed=count,
            added=added,
            removed=removed,
            changed_share=(count + added + removed) / (splats + added) if splats + added else None,
            bit_identical=bool(same[part].all()) and not added and not removed if splats else None,
            **{key: float(value[part].mean()) if part.any() else None for key, value in each.items()},
        )
    return found


def identical(a: Gaussians, b: Gaussians) -> Tensor:
    """Which rows, (n,) bool, are the same bit for bit in all six parameters: -0 is not 0, a NaN is itself."""
    same = torch.ones(a.n, dtype=torch.bool)
    for name, value in a.parameters.items():
        bits = [v.detach().contiguous().view(torch.int32) for v in (value, b.parameters[name])]
        same &= torch.eq(*bits).reshape(a.n, math.prod(value.shape[1:])).all(1)
    return same


def pixel_changes(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], inside: Sequence[np.ndarray] | None = None
) -> tuple[dict[str, PixelChange], list[dict[str, PixelChange]]]:
    """Changes of the same regions in pictures (h, w, 3) uint8: of all together, and of each one.

    inside: (h, w, 3) uint8, 255 where a pixel of the source is all of Gaussians inside the mask.
    """
    a, b = (torch.from_numpy(np.stack(list(x))).permute(0, 3, 1, 2).float() / 255 for x in (before, after))
    error, alike = (a - b).square().mean(1), ssim_map(a, b).mean(1)
    weights = {"whole": torch.ones_like(error)}
    if inside is not None:
        cover = torch.from_numpy(np.stack(list(inside)))[..., 0].float() / 255
        weights |= {"inside": cover, "outside": 1 - cover}
    one = [{k: pixels(error[i], alike[i], w[i]) for k, w in weights.items()} for i in range(len(error))]
    return {k: pixels(error, alike, w) for k, w in weights.items()}, one


def pixels(error: Tensor, alike: Tensor, weight: Tensor) -> PixelChange:
    """PSNR and SSIM from squared errors and structural similarities, with a weight in [0, 1] for each pixel."""
    total = float(weight.sum())
    if total == 0:
        return PixelChange(0.0, None, None)
    mse = float((error * weight).sum()) / total
    similarity = float((alike * weight).sum()) / total
    return PixelChange(float(weight.mean()), -10 * math.log10(mse) if mse > 0 else None, similarity)


def as_dicts(splats: dict[str, SplatChange], pixels: dict[str, PixelChange]) -> dict[str, dict[str, Any]]:
    """Both for each region, as plain values; without pixels where there are none."""
    return {k: {**s._asdict(), **(pixels[k]._asdict() if k in pixels else {})} for k, s in splats.items()}
