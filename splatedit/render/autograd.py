"""The compiled stages as two differentiable steps, from parameters to splats and from splats to pixels.

float32 tensors on the CPU; the kernels see flat numpy views of them.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from splatedit.render import binning, checks, compositing, memory, pool, projection
from splatedit.render.algebra import RECORD, F
from splatedit.render.constants import ALPHA_MAX, MIN_COMPENSATION, TILE
from splatedit.render.simd import LANES
from splatedit.render.twin import meta

MANY = 1 << 18  # Gaussians that are sorted on several threads
PAST_CACHE = 1 << 24  # bytes; gradients larger than this are written past the cache, which would lose them anyway


def rasterize(
    *,
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    eps2d: float,
    sh_degree: int | None,
    backgrounds: Tensor | None,
    render_mode: str,
    absgrad: bool,
    rasterize_mode: str,
    **_: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`backends.rasterization` with all its arguments given and checked."""
    divide = render_mode in ("ED", "RGB+ED")
    limits = (width, height, near_plane, far_plane, radius_clip, eps2d, rasterize_mode == "antialiased")
    with_sh = sh_degree is not None and render_mode not in ("D", "ED")
    degree, coefficients = (-1, None) if sh_degree is None or not with_sh else (sh_degree, colors)
    channels = 0 if not with_sh else 3 if render_mode == "RGB" else 4
    splats, odd = project(means, quats, scales, opacities, coefficients, viewmats, Ks, degree, channels, limits)
    if odd or not (with_sh or math.isfinite(colors.detach().numpy().sum())):
        parameters = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": colors}
        views = {"viewmats": viewmats, "Ks": Ks, "backgrounds": backgrounds}
        checks.values({**parameters, **views, "sh_degree": sh_degree})
    radii, means2d, depths, conics, dimmed, shaded = splats
    if with_sh:
        features = shaded
    elif render_mode in ("D", "ED"):
        features, backgrounds = depths[..., None], None
    else:
        features = colors.expand(len(viewmats), *colors.shape[-2:])
        if render_mode != "RGB":
            features = torch.cat([features, depths[..., None]], -1)
    if backgrounds is None:
        backgrounds = means.new_zeros(features.shape[0], features.shape[-1])
    elif render_mode not in ("RGB", "D", "ED"):
        backgrounds = nnf.pad(backgrounds, (0, 1))
    options = (width, height, divide, absgrad)
    splats = (means2d, conics, features, dimmed, backgrounds, radii, depths)
    image, alphas = _Composite.apply(*splats, options)  # pyright: ignore
    return image, alphas, meta(radii, means2d, depths, conics, dimmed, width, height)


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    coefficients: Tensor | None,
    viewmats: Tensor,
    Ks: Tensor,
    degree: int,
    channels: int,
    limits: tuple[Any, ...],
) -> tuple[tuple[Tensor, ...], bool]:
    """radii (c, n, 2) int32, means2d (c, n, 2), depths (c, n), conics (c, n, 3), dimmed opacities (c, n), see `twin`.

    And colours (c, n, channels) of harmonics up to `degree`: none if that is -1; depth is the last of four. And whether
    a parameter is perhaps not finite, or a quaternion 0: the kernel looks at them while it reads them.
    """
    if coefficients is None:
        coefficients = means.new_zeros(len(means), 1, 0)
    odd = np.zeros(1, np.bool_)
    options = (degree, channels, (*limits, MIN_COMPENSATION), odd)
    splats = _Project.apply(means, quats, scales, opacities, coefficients, viewmats, Ks, options)
    return splats, bool(odd[0])  # pyright: ignore


def contributions(
    *,
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
    """`lifting.contributions` with all its arguments given, checked and without a graph."""
    limits = (width, height, near_plane, far_plane, radius_clip, eps2d, rasterize_mode == "antialiased")
    splats, _ = project(means, quats, scales, opacities, None, viewmats, Ks, -1, 0, limits)
    radii, means2d, depths, conics, dimmed, colors = splats
    paired = _pair_up(means2d, conics, dimmed, colors, radii, depths, (width, height))
    (cameras, n), size = depths.shape, (len(depths), height, width)
    best, hits = memory.empty((*size, 2)), np.zeros(len(paired.masks), np.int32)
    alphas, transmittances, ends = (memory.empty(size) for _ in range(3))
    _draw(paired, np.zeros(2 * cameras, F), best, alphas, transmittances, ends, hits=hits)
    grid = paired.starts[:-1].reshape(cameras, paired.grid[1], paired.grid[0])
    start = grid.repeat(TILE, 1).repeat(TILE, 2)[:, :height, :width]  # where the list of a pixel's tile begins
    hit, of_pair = best[..., 0] > 0, paired.pairs[::2]
    ids = np.full(size, -1, np.int64)
    ids[hit] = of_pair[start[hit] + best[hit, 1].astype(np.int64)] % n
    pixels = np.bincount(of_pair, hits, cameras * n).astype(np.int64).reshape(cameras, n)
    return torch.from_numpy(ids), torch.from_numpy(best[..., 0].copy()), torch.from_numpy(pixels)


def probe() -> None:
    """Draw one Gaussian; raises whatever numba raises where it cannot make vector code."""
    point, view = torch.tensor([[0.0, 0.0, 2.0]]), torch.eye(4)[None]
    quat, scale, opacity = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.full((1, 3), 0.1), torch.ones(1)
    rasterize(
        means=point, quats=quat, scales=scale, opacities=opacity, colors=point, viewmats=view, Ks=view[:, :3, :3],
        width=16, height=16, near_plane=0.01, far_plane=1e10, radius_clip=0.0, eps2d=0.3, sh_degree=None,
        backgrounds=None, render_mode="RGB", absgrad=False, rasterize_mode="classic",
    )  # fmt: skip


# ---------------------------------------------------------------- numpy and the kernels


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [_array(t) for t in tensors]


def _by_blocks(
    kernel: Any, n: int, inputs: list[np.ndarray], outputs: list[np.ndarray], *shared: object, fill: float = 0.0
) -> None:
    """Run a kernel that takes LANES rows at a time over arrays of n rows.

    What is left over of n / LANES goes through copies, filled up with harmless numbers, as one chunk more.
    """
    whole, rest = divmod(n, LANES)
    pool.run(kernel, whole, pool.chunks_of(n), *(a.reshape(-1) for a in (*inputs, *outputs)), *shared)
    if rest:
        filled = _filled(LANES, (*inputs, *outputs), fill)
        for a, b in zip((*inputs, *outputs), filled, strict=True):
            b[:rest] = a[n - rest :]
        kernel(0, 1, pool.chunks_of(n), *(b.reshape(-1) for b in filled), *shared)
        for a, b in zip(outputs, filled[len(inputs) :], strict=True):
            a[n - rest :] = b[:rest]


def _filled(rows: int, like: tuple[np.ndarray, ...], fill: float) -> list[np.ndarray]:
    """So many rows for each array, all on one piece of memory, each from the start of a cache line on."""
    sizes = [rows * a.itemsize * math.prod(a.shape[1:]) for a in like]
    starts = list(itertools.accumulate((-(-size // 64) * 64 for size in sizes), initial=0))
    whole = memory.empty(starts[-1] // 4, aligned=True)
    whole.fill(fill)
    content = whole.view(np.uint8)
    pieces = (content[start : start + size] for start, size in zip(starts, sizes, strict=False))
    return [p.view(a.dtype).reshape(rows, *a.shape[1:]) for p, a in zip(pieces, like, strict=True)]


def _chunk_sums(n: int) -> np.ndarray:
    """One row of 16 sums for each chunk of `_by_blocks`, to be added in this order."""
    sums = memory.empty((pool.chunks_of(n) + 1, RECORD), aligned=True)
    sums[:] = 0
    return sums


# ---------------------------------------------------------------- the two steps


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, coefficients, viewmats, Ks, options):
        degree, channels, (width, height, near, far, clip, eps2d, antialiased, least), odd = options
        n, cameras = means.shape[0], viewmats.shape[0]
        inputs = _arrays(means, quats, scales, opacities, coefficients)
        results = [memory.empty((cameras, n, 2), np.int32)]
        results += [memory.empty((cameras, n, *k)) for k in ((2,), (), (3,), (), (channels,))]
        found = np.zeros(pool.chunks_of(n) + 1, np.bool_)
        inverses = np.linalg.inv(_array(viewmats))
        for c, (view, K, inverse) in enumerate(zip(*_arrays(viewmats, Ks), inverses, strict=True)):
            camera = (
                found,
                view,
                K,
                inverse[:3, 3].copy(),
                F(width),
                F(height),
                F(eps2d),
                F(near),
                F(far),
                F(clip),
                antialiased,
            )
            harmonics = (F(least), degree, 3 * coefficients.shape[1], channels)
            _by_blocks(projection.project, n, inputs, [a[c] for a in results], *camera, *harmonics, fill=1.0)
        odd[0] = found.any()
        tensors = [torch.from_numpy(a) for a in results]
        ctx.save_for_backward(means, quats, scales, opacities, coefficients, viewmats, Ks, tensors[0], tensors[5])
        ctx.options, ctx.inverses = options, inverses
        ctx.mark_non_differentiable(tensors[0])
        ctx.set_materialize_grads(False)
        return tuple(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *upstream):
        means, quats, scales, opacities, coefficients, viewmats, Ks, radii, colors = _arrays(*ctx.saved_tensors)
        degree, channels, (width, height, *_, eps2d, antialiased, least), _ = ctx.options
        cameras, n = radii.shape[:2]
        shapes = ((cameras, n, 2), (cameras, n), (cameras, n, 3), (cameras, n), (cameras, n, channels))
        v_splats = [np.zeros(s, F) if v is None else _array(v) for v, s in zip(upstream, shapes, strict=True)]
        results = [memory.empty(a.shape) for a in (means, quats, scales, opacities, coefficients)]
        v_views, inverses = np.zeros_like(viewmats), ctx.inverses
        needs = ctx.needs_input_grad
        floats = 3 * coefficients.shape[1]
        wanted, bend = bool(degree >= 0 and needs[4]), bool(needs[0] or needs[5])
        stream = floats % 16 == 0 and results[4].nbytes > PAST_CACHE
        for c in range(cameras):
            inputs = [means, quats, scales, opacities, coefficients, radii[c], colors[c], *(v[c] for v in v_splats)]
            sums = _chunk_sums(n)
            camera = (
                sums.reshape(-1),
                viewmats[c],
                Ks[c],
                inverses[c, :3, 3].copy(),
                F(width),
                F(height),
                F(eps2d),
                antialiased,
            )
            flags = (F(least), degree, floats, channels, c > 0, wanted, bend, stream)
            _by_blocks(projection.project_backward, n, inputs, results, *camera, *flags)
            total = sums.sum(0)
            v_views[c, :3] = total[:12].reshape(3, 4)
            # the eye is the last column of the inverse W, and dW = -W dV W
            v_views[c] -= np.outer(total[12:15] @ inverses[c, :3], inverses[c, :, 3])
        gradients = [torch.from_numpy(a) for a in results]
        return *gradients[:4], gradients[4] if wanted else None, torch.from_numpy(v_views), None, None


class _Pairs(NamedTuple):
    """The records, and for each tile of each camera the Gaussians that touch it, nearest first."""

    records: np.ndarray  # (c n 16,)
    touched: np.ndarray  # (c n,) number of tiles
    start: np.ndarray  # (c n + 1,) where the backward records of a Gaussian begin
    pairs: np.ndarray  # (2 pairs,) Gaussian of each pair, and its backward record, tile by tile
    masks: np.ndarray  # of each pair, the blocks of its tile that it reaches: written by compositing
    starts: np.ndarray  # (tiles + 1,) where the pairs of a tile begin
    tiles: np.ndarray  # (tiles,) fullest first, to share them out evenly
    grid: tuple[int, int, int, int]  # columns and rows of tiles, width and height in pixels

    @property
    def chunks(self) -> int:
        """In how many parts the tiles are shared out."""
        return pool.chunks_of(len(self.masks), 1024)


def _pair_up(
    means2d: Tensor, conics: Tensor, opacities: Tensor, colors: Tensor, radii: Tensor, depths: Tensor, size: Any
) -> _Pairs:
    cameras, n = radii.shape[:2]
    width, height = size
    columns, rows = -(-width // TILE), -(-height // TILE)
    tiles, total, channels = columns * rows, cameras * n, colors.shape[-1]

    inputs = [_array(t.flatten(0, 1)) for t in (means2d, conics, opacities, colors, radii)]
    records, touched = memory.empty(total * RECORD, aligned=True), memory.empty(total, np.int32)
    boxes = memory.empty(total * 4, np.int16)
    outputs = [records.reshape(total, RECORD), boxes.reshape(total, 4), touched]
    _by_blocks(binning.pack, total, inputs, outputs, channels, columns, rows)
    order, first, past = _sort(_array(depths).reshape(-1), touched, cameras)

    start = memory.empty(total + 1, np.int64)
    start[0] = 0
    touched.cumsum(out=start[1:])
    parts = pool.chunks_of(int((past - first).max()), 4096, 4)  # of a camera, each with its own counts
    ranges = _parts(first, past, parts)
    pair_counts = np.zeros((cameras * parts, tiles), np.int64)
    pool.run(binning.count_pairs, len(ranges), len(ranges), ranges, order, boxes, pair_counts, columns)
    by_part = pair_counts.reshape(cameras, parts, tiles)
    per_tile = by_part.sum(1).reshape(-1)
    starts = np.zeros(cameras * tiles + 1, np.int64)
    per_tile.cumsum(out=starts[1:])
    place = starts[:-1].reshape(cameras, 1, tiles) + (by_part.cumsum(1) - by_part if parts > 1 else 0)
    pairs = memory.empty(2 * int(starts[-1]), np.int32)
    place = np.ascontiguousarray(place.reshape(cameras * parts, tiles))
    pool.run(binning.list_pairs, len(ranges), len(ranges), ranges, order, boxes, start, place, pairs, columns)
    fullest_first = np.argsort(-per_tile, kind="stable").astype(np.int32)
    masks = memory.empty(len(pairs) // 2, np.uint16)
    return _Pairs(records, touched, start, pairs, masks, starts, fullest_first, (columns, rows, width, height))


def _parts(first: np.ndarray, past: np.ndarray, parts: int) -> np.ndarray:
    """(k parts, 2): each of k ranges cut into so many."""
    if parts == 1:
        return np.array((first, past)).T.copy()
    cuts = first[:, None] + (past - first)[:, None] * np.arange(parts + 1) // parts
    return np.stack([cuts[:, :-1], cuts[:, 1:]], -1).reshape(-1, 2)


def _sort(depths: np.ndarray, touched: np.ndarray, cameras: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of what is seen, nearest first, those of camera c at order[first[c] : past[c]]; order, first, past."""
    bits, n = depths.view(np.uint32), len(depths) // cameras
    order, counts = memory.empty(len(depths), np.int32), np.zeros(cameras, np.int64)
    if n < MANY:
        pool.run(binning.sort_by_depth, cameras, cameras, bits, touched, order, counts, n)
    else:
        for c in range(cameras):
            counts[c] = _sort_many(bits, touched, order, c * n, (c + 1) * n)
    first = np.arange(cameras) * n
    return order, first, first + counts


def _sort_many(bits: np.ndarray, touched: np.ndarray, order: np.ndarray, first: int, past: int) -> int:
    """The same for the Gaussians first .. past - 1, one camera, on several threads; returns how many are seen."""
    count, buckets = 16, 256
    parts = _parts(np.array([first]), np.array([past]), count)
    bounds = np.empty((count, 3), np.int64)
    pool.run(binning.depth_bounds, count, count, parts, bits, touched, bounds)
    low, high = bounds[:, 1].min(), bounds[:, 2].max()
    shift = max(0, int(high - low).bit_length() - 8) if high >= low else 0
    counts = np.zeros((count, buckets), np.int64)
    cut = (np.uint32(low), np.uint32(shift))
    pool.run(binning.count_buckets, count, count, parts, bits, touched, *cut, counts)
    ends = counts.T.reshape(-1).cumsum()  # places in the order of buckets, within one of parts
    places = np.ascontiguousarray((ends - counts.T.reshape(-1)).reshape(buckets, count).T)
    starts = np.concatenate([places[0], ends[-1:]])
    keys, sorted_ = memory.empty(int(ends[-1]), np.uint32), order[first : first + int(ends[-1])]
    pool.run(binning.fill_buckets, count, count, parts, bits, touched, *cut, places, keys, sorted_)
    pool.run(binning.sort_buckets, buckets, 16, starts, keys, sorted_, shift)
    return int(ends[-1])


def _draw(
    paired: _Pairs,
    backgrounds: np.ndarray,
    image: np.ndarray,
    alphas: np.ndarray,
    transmittances: np.ndarray,
    ends: np.ndarray,
    first: int = 0,
    divide: bool = False,
    hits: np.ndarray | None = None,
) -> None:
    """`compositing.composite` for all tiles; with `hits` it looks for the largest weight instead of the colour."""
    flat = (a.reshape(-1) for a in (backgrounds, image, alphas, transmittances, ends))
    pool.run(
        compositing.composite, len(paired.tiles), paired.chunks, paired.tiles, paired.records,
        paired.pairs, paired.starts, paired.masks, *flat, *paired.grid, image.shape[-1], first, F(ALPHA_MAX), divide,
        hits,
    )  # fmt: skip


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means2d, conics, colors, opacities, backgrounds, radii, depths, options):
        width, height, divide, absgrad = options
        cameras, channels = colors.shape[0], colors.shape[-1]
        paired = _pair_up(means2d, conics, opacities, colors, radii, depths, (width, height))
        image, alphas = memory.empty((cameras, height, width, channels)), memory.empty((cameras, height, width, 1))
        transmittances = memory.empty(cameras * height * width)
        ends = memory.empty(cameras * height * width)
        for first in range(0, channels, 4):
            if first:
                _recolor(paired, colors, first)
            _draw(paired, _array(backgrounds), image, alphas, transmittances, ends, first, divide)
        result = torch.from_numpy(image)
        ctx.save_for_backward(means2d, colors, opacities, backgrounds, result if divide else None)
        ctx.paired, ctx.pixels, ctx.options = paired, (transmittances, ends), options
        return result, torch.from_numpy(alphas)

    @staticmethod
    @once_differentiable
    def backward(ctx, v_image, v_alphas):
        means2d, colors, opacities, backgrounds, image = ctx.saved_tensors
        paired, (transmittances, ends) = ctx.paired, ctx.pixels
        width, height, divide, absgrad = ctx.options
        (cameras, n, channels), v = colors.shape, _array(v_image).reshape(-1)
        divided = _array(image).reshape(-1) if divide else np.empty(0, F)
        gradients = memory.empty(len(paired.masks) * RECORD, aligned=True)
        v_means2d, v_conics = memory.empty((cameras, n, 2)), memory.empty((cameras, n, 3))
        v_opacities, v_colors = memory.empty((cameras, n)), memory.empty((cameras, n, channels))
        v_abs = memory.empty((cameras, n, 2) if absgrad else (0,))
        for first in range(0, channels, 4):
            if channels > 4:
                _recolor(paired, colors, first)
            pool.run(
                compositing.composite_backward, len(paired.tiles), paired.chunks, paired.tiles,
                paired.records, paired.pairs, paired.starts, paired.masks, _array(backgrounds).reshape(-1), divided,
                transmittances, ends, v, _array(v_alphas).reshape(-1), gradients, *paired.grid, channels, first,
                F(ALPHA_MAX), divide, absgrad,
            )  # fmt: skip
            pool.run(
                compositing.add_pairs, cameras * n, pool.chunks_of(cameras * n), paired.touched, paired.start,
                paired.records, gradients, _array(opacities).reshape(-1), v_means2d.reshape(-1), v_conics.reshape(-1),
                v_opacities.reshape(-1), v_colors.reshape(-1), v_abs.reshape(-1), channels, first, absgrad,
            )  # fmt: skip
        if absgrad:
            means2d.absgrad = torch.from_numpy(v_abs)
        v_backgrounds = None
        if ctx.needs_input_grad[4]:
            v_rows = np.empty((cameras, height, channels), F)
            pool.run(compositing.background_backward, cameras * height, pool.chunks_of(cameras * height, 32), v,
                     transmittances, v_rows.reshape(-1), width, channels)  # fmt: skip
            v_backgrounds = torch.from_numpy(v_rows.sum(1))
        geometry = map(torch.from_numpy, (v_means2d, v_conics, v_colors, v_opacities))
        return *geometry, v_backgrounds, None, None, None


def _recolor(paired: _Pairs, colors: Tensor, first: int) -> None:
    total, channels = len(paired.touched), colors.shape[-1]
    pool.run(binning.recolor, total, pool.chunks_of(total), _array(colors).reshape(-1), paired.touched,
             paired.records, channels, first)  # fmt: skip
