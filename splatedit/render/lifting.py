"""From pixels back to Gaussians: what 2D maps say about each Gaussian, and which Gaussian a pixel shows.

A picture is linear in the colours: pixel p is the sum over i of w_ip colour_i, with the blending weights
w_ip = alpha_ip T_ip. Hence the derivative of sum_p M(p) picture(p) with respect to colour_i is sum_p w_ip M(p): one
backward pass with M as the upstream gradient lifts M to the Gaussians, and one with 1 gives the sum of weights to
divide by. That is exact and needs no kernel of its own on any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.render import backends, checks, twin
from splatedit.render.backends import rasterization
from splatedit.render.constants import ALPHA_MAX, TILE
from splatedit.render.pictures import seen_by

MEMORY = 2**28  # bytes of intermediate results that decide how many cameras are drawn at once
CHANNELS = 32  # channels drawn at once
PAIRS = 2**25  # pairs of a Gaussian and a pixel that gsplat may list at once


class Lifted(NamedTuple):
    """Sums of 2D maps over all pixels of all cameras, by blending weight. Results of several calls may be added."""

    total: Tensor  # (n, k) sum of weight times map
    weight: Tensor  # (n,) sum of weights, pixels; exactly 0 for a Gaussian that no camera sees

    @property
    def seen(self) -> Tensor:
        """(n,) bool: the Gaussians that colour at least one pixel."""
        return self.weight > 0

    def mean(self, unseen: float = 0.0) -> Tensor:
        """(n, k): the mean of the maps over the pixels that show a Gaussian; `unseen` where none does. Never NaN."""
        mean = self.total / torch.where(self.seen, self.weight, 1.0)[:, None]
        return torch.where(self.seen[:, None], mean, unseen)


class Picked(NamedTuple):
    """Which Gaussian contributes most to a pixel."""

    ids: Tensor  # (c, h, w) int64, number of the Gaussian; -1 where nothing is hit
    weight: Tensor  # (c, h, w) its blending weight alpha T, in [0, 1]


# ---------------------------------------------------------------- of a scene


def lift(
    gaussians: Gaussians, cameras: Cameras, maps: Tensor, *, antialiased: bool = True, backend: str = "auto"
) -> Lifted:
    """Carry 2D maps over to the Gaussians: each gets the mean of the map over the pixels that show it.

        relevance = lift(gaussians, cameras, masks).mean()  # (n, k)

    maps: (c, k, h, w), k maps or channels per camera, of any real type, bool included, at the cameras' size. They may
    lie elsewhere than the Gaussians and are moved a few cameras at a time. The result is detached. Everything else as
    in `render`. Raises InputError for maps of another shape or with values that are not finite.
    """
    expected = (cameras.n, "k", cameras.height, cameras.width)
    _check_maps(maps, expected, ", the size of the cameras; Cameras.resized makes cameras of another size")
    return Lifted(*backprojection(**seen_by(gaussians, cameras, antialiased=antialiased), maps=maps, backend=backend))


def pick(gaussians: Gaussians, cameras: Cameras, *, antialiased: bool = True, backend: str = "auto") -> Picked:
    """For each pixel the Gaussian with the largest blending weight, the nearest of several; as in `render`."""
    ids, weight, _ = contributions(**_picture(gaussians, cameras, antialiased), backend=backend)
    return Picked(ids, weight)


def visibility(gaussians: Gaussians, cameras: Cameras, *, antialiased: bool = True, backend: str = "auto") -> Tensor:
    """(c, n) int64: in how many pixels of each camera each Gaussian contributes; as in `render`."""
    return contributions(**_picture(gaussians, cameras, antialiased), backend=backend)[2]


def fill_unseen(values: Tensor, seen: Tensor, means: Tensor, neighbours: int = 8) -> Tensor:
    """`values` (n, ...) with each row not `seen` replaced by the mean of the nearest seen rows; a detached copy.

        lifted = lift(gaussians, cameras, masks)
        relevance = fill_unseen(lifted.mean(), lifted.seen, gaussians.means)

    seen: (n,) bool. means: (n, 3), where the Gaussians are. neighbours: how many seen ones, at least 1. If none is seen
    the values stay as they are. Raises InputError for shapes that do not fit.
    """
    n = means.shape[0]
    if seen.shape != (n,) or seen.dtype != torch.bool or values.shape[:1] != (n,):
        found = f"values {checks.shape_of(values)} and seen {checks.shape_of(seen)} {seen.dtype}"
        raise InputError(
            f"fill_unseen: {found} where ({n}, ...) and ({n}) torch.bool are expected, "
            f"as the means are {checks.shape_of(means)}."
        )
    if neighbours < 1:
        raise InputError(f"fill_unseen: neighbours {neighbours} where at least 1 is expected.")
    values = values.detach().clone()
    if not seen.any() or seen.all():
        return values
    from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  (scipy ships no stubs)

    points, known = means.detach().cpu().numpy(), seen.cpu().numpy()
    count = min(neighbours, int(known.sum()))
    _, near = cKDTree(points[known]).query(points[~known], k=count)
    index = torch.from_numpy(near.reshape(-1, count)).to(values.device)
    values[~seen] = values[seen][index].mean(1).to(values.dtype)
    return values


# ---------------------------------------------------------------- of plain tensors


def backprojection(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    maps: Tensor,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    rasterize_mode: str = "classic",
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sums over all pixels of all cameras of blending weight times map (n, k), and of the weights alone (n,).

    The transpose of `rasterization` without a background, which takes colours (n, k) to pictures (c, h, w, k). The
    arguments are its, but for maps: (c, k, h, w), of any real type and on any device. Cameras and channels are drawn in
    groups that keep the intermediate results near MEMORY bytes. Detached, whatever the arguments require.

    Raises InputError, naming the argument, for what is wrong or what the backend cannot do.
    """
    splats = {"means": means, "quats": quats, "scales": scales, "opacities": opacities}
    options = {"near_plane": near_plane, "far_plane": far_plane, "radius_clip": radius_clip, "eps2d": eps2d}
    options |= {"rasterize_mode": rasterize_mode}
    _given(**splats, viewmats=viewmats, Ks=Ks, width=1, height=1, **options)
    _check_maps(maps, (len(viewmats), "k", "h", "w"))
    options |= {"backend": backends.chosen(backend, means)}
    k, height, width = maps.shape[1:]
    n = means.shape[0]
    with torch.inference_mode(False), torch.enable_grad():
        splats = {name: _constant(t) for name, t in splats.items()}
        viewmats, Ks = _constant(viewmats), _constant(Ks)
        sums = splats["means"].new_zeros(n, k + 1)  # the last column is the weight
        for views in _batches(len(viewmats) if n else 0, height * width, n, k + 1, sums.element_size()):
            shared = {**splats, "viewmats": viewmats[views], "Ks": Ks[views], **options}
            for first in range(0, k + 1, CHANNELS):
                columns = slice(first, min(first + CHANNELS, k + 1))
                sums[:, columns] += _transpose(_upstream(maps[views, columns], columns.stop > k, sums), **shared)
    return sums[:, :k].contiguous(), sums[:, k].contiguous()


def contributions(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    rasterize_mode: str = "classic",
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Which Gaussian contributes most to each pixel, by what weight, and to how many pixels each Gaussian contributes.

    The arguments are those of `rasterization`, and a contribution is what it draws: alpha of at least 1/255, in front
    of the Gaussian that ends the pixel. Returns ids (c, h, w) int64, the number of the Gaussian with the largest
    blending weight, the nearest of several, -1 where nothing is hit; those weights (c, h, w); pixels (c, n) int64.

    Raises InputError, naming the argument, for what is wrong or what the backend cannot do.
    """
    arguments = {k: v for k, v in locals().items() if k != "backend"}
    checks.values(_given(**arguments))
    find = CONTRIBUTIONS[backends.chosen(backend, means)]
    with torch.inference_mode(False), torch.no_grad():
        arguments = {k: _constant(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        if means.shape[0] == 0:
            ids = torch.full((len(viewmats), height, width), -1, device=means.device)
            return ids, means.new_zeros(ids.shape), ids.new_zeros(len(viewmats), 0)
        parts = []
        for views in _batches(len(viewmats), width * height, means.shape[0], 3, means.element_size()):
            parts.append(find(**arguments | {"viewmats": arguments["viewmats"][views], "Ks": arguments["Ks"][views]}))
    ids, weights, pixels = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids, weights, pixels


def _batches(cameras: int, pixels: int, n: int, channels: int, size: int) -> Iterator[slice]:
    """Cameras to draw at once: an image, its gradient and the map; records of the Gaussians and their gradients."""
    step = max(1, MEMORY // (size * (3 * pixels * min(channels, CHANNELS) + 48 * n)))
    return (slice(first, first + step) for first in range(0, cameras, step))


# ---------------------------------------------------------------- backward passes


def _upstream(maps: Tensor, ones: bool, like: Tensor) -> Tensor:
    """Maps (c, k, h, w) as the upstream gradient (c, h, w, k) of a picture; with a last channel of 1 if `ones`."""
    maps = maps.to(like)
    if not torch.isfinite(maps).all():
        raise InputError("maps: found NaN or infinite values, expected finite ones only.")
    if ones:
        maps = torch.cat([maps, maps.new_ones(maps.shape[0], 1, *maps.shape[2:])], 1)
    return maps.permute(0, 2, 3, 1).contiguous()


def _transpose(upstream: Tensor, **arguments: Any) -> Tensor:
    """(n, d): the derivative of the sum of picture times upstream (c, h, w, d) with respect to colours (n, d)."""
    height, width, d = upstream.shape[1:]
    colors = upstream.new_zeros(arguments["means"].shape[0], d, requires_grad=True)
    image, _, _ = rasterization(colors=colors, width=width, height=height, **arguments)
    return torch.autograd.grad(image, colors, upstream)[0]


# ---------------------------------------------------------------- contributions by backend


def _by_twin(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    eps2d: float,
    rasterize_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    limits = (near_plane, far_plane, radius_clip, eps2d, rasterize_mode == "antialiased")
    radii, means2d, depths, conics, dimmed = twin.splats(
        means, quats, scales, opacities, viewmats, Ks, width, height, *limits
    )
    ids = torch.full((len(viewmats), height, width), -1, device=means.device)
    weights, pixels = means.new_zeros(ids.shape), ids.new_zeros(depths.shape)
    for c in range(len(viewmats)):
        for tile in twin.tiles(means2d[c], radii[c], depths[c], width, height):
            if not len(tile.near):
                continue
            blended, _ = twin.blend(means2d[c], conics[c], dimmed[c], tile)
            best, place = blended.max(0)
            box = (c, slice(tile.y, tile.y + tile.high), slice(tile.x, tile.x + tile.wide))
            weights[box] = best.reshape(tile.high, tile.wide)
            ids[box] = torch.where(best > 0, tile.near[place], -1).reshape(tile.high, tile.wide)
            pixels[c, tile.near] += (blended > 0).sum(1)
    return ids, weights, pixels


def _by_kernels(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backends._compiled().contributions(**arguments)


def _by_gsplat(viewmats: Tensor, Ks: Tensor, width: int, height: int, **others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """By gsplat.rasterize_to_indices_in_range, which lists the Gaussians of each pixel, nearest first.

    It is asked for all depths at once, since between two ranges it would forget which pixels have ended; instead the
    picture is cut into stretches of tiles, by the length of their lists.
    """
    colors = others["means"].new_zeros(others["means"].shape[0], 1)
    results = []
    for c in range(len(viewmats)):
        camera = {"viewmats": viewmats[c : c + 1], "Ks": Ks[c : c + 1], "width": width, "height": height}
        _, _, meta = rasterization(colors=colors, **camera, **others, backend="gsplat")
        results.append(_listed(meta, width, height))
    ids, weights, pixels = (torch.stack(r) for r in zip(*results, strict=True))
    return ids, weights, pixels


def _listed(meta: dict[str, Any], width: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (h, w), weights (h, w) and pixels (n,) of the one camera that gsplat's meta describes."""
    from gsplat import rasterize_to_indices_in_range  # pyright: ignore[reportMissingImports]

    means2d, conics, opacities = meta["means2d"], meta["conics"], meta["opacities"]
    offsets, flatten_ids = meta["isect_offsets"], meta["flatten_ids"]
    ids = torch.full((height * width,), -1, device=means2d.device)
    weights, pixels = means2d.new_zeros(ids.shape), ids.new_zeros(means2d.shape[1])
    for begin, end in _stretches(offsets, len(flatten_ids)):
        # the tiles outside get empty lists
        found, at, _ = rasterize_to_indices_in_range(
            0, 2**30, means2d.new_ones(1, height, width), means2d, conics, opacities, width, height,
            meta["tile_size"], offsets.clamp(begin, end) - begin, flatten_ids[begin:end].contiguous(),
        )  # fmt: skip
        pixels += torch.bincount(found, minlength=len(pixels))
        blended = _blended(found, at, means2d[0], conics[0], opacities[0], width)
        hit, length = torch.unique_consecutive(at, return_counts=True)
        run = torch.repeat_interleave(length)
        best = blended.new_zeros(len(hit)).scatter_reduce_(0, run, blended, "amax")
        place = torch.arange(len(at), device=at.device).where(blended == best[run], len(at))
        first = place.new_full((len(hit),), len(at)).scatter_reduce_(0, run, place, "amin")
        ids[hit], weights[hit] = found[first], best
    return ids.view(height, width), weights.view(height, width), pixels


def _stretches(offsets: Tensor, total: int) -> Iterator[tuple[int, int]]:
    """Parts of the list of (tile, Gaussian) pairs, each of whole tiles, at most PAIRS pixels long where possible."""
    starts = [*offsets.flatten().tolist(), total]
    begin = 0
    for end, next_end in zip(starts[1:], [*starts[2:], None], strict=True):
        if next_end is None or (next_end - begin) * TILE**2 > PAIRS:
            if end > begin:
                yield begin, end
            begin = end


def _blended(ids: Tensor, at: Tensor, means2d: Tensor, conics: Tensor, opacities: Tensor, width: int) -> Tensor:
    """alpha T of lists of Gaussians and pixels; all entries of a pixel lie together, nearest first."""
    centre = torch.stack([at % width, at // width], -1).to(means2d) + 0.5
    dx, dy = (means2d[ids] - centre).unbind(-1)
    a, b, c = conics[ids].unbind(-1)
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alpha = (opacities[ids] * torch.exp(-sigma)).clamp_max(ALPHA_MAX).double()
    passed = torch.log1p(-alpha)
    before = passed.cumsum(0) - passed  # ln T, and what the pixels listed earlier have lost
    _, length = torch.unique_consecutive(at, return_counts=True)
    begin = length.cumsum(0) - length
    return (alpha * torch.exp(before - before[begin].repeat_interleave(length))).to(means2d)


CONTRIBUTIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "cpu": _by_kernels,
    "torch": _by_twin,
    "gsplat": _by_gsplat,
}


# ---------------------------------------------------------------- arguments


def _picture(gaussians: Gaussians, cameras: Cameras, antialiased: bool) -> dict[str, Any]:
    return {**seen_by(gaussians, cameras, antialiased=antialiased), "width": cameras.width, "height": cameras.height}


def _constant(tensor: Tensor) -> Tensor:
    """Cut from the graph, and fit for a backward pass of our own where the caller works in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _given(**arguments: Any) -> dict[str, Any]:
    """All that `checks` looks at, with one channel of colour; checked but for what is in the tensors."""
    means = arguments["means"]
    colors = means.new_zeros(len(means), 1) if isinstance(means, Tensor) and means.dim() else means
    neutral = {"backgrounds": None, "sh_degree": None, "render_mode": "RGB", "packed": False, "sparse_grad": False}
    given = {**arguments, "colors": colors, **neutral}
    checks.arguments(given)
    return given


def _check_maps(maps: Tensor, expected: tuple[int | str, ...], why: str = "") -> None:
    """`expected`: (c, k, h, w), a letter for a number that may be any, but h and w not 0."""
    wanted = f"({', '.join(map(str, expected))})"
    if not isinstance(maps, Tensor):
        raise InputError(f"maps: found a {type(maps).__name__}, expected a tensor {wanted}{why}.")
    fits = maps.dim() == 4 and all(isinstance(e, str) or e == m for e, m in zip(expected, maps.shape, strict=True))
    if not fits or not maps.shape[2] or not maps.shape[3]:
        raise InputError(f"maps: found {checks.shape_of(maps)}, expected {wanted}{why}.")
    if maps.is_complex():
        raise InputError(f"maps: found {maps.dtype}, expected a real type.")
