"""The compiled kernels as three differentiable steps: project, colour, composite. float32 tensors on the CPU.

The kernels see flat numpy views of the tensors. Large outputs are made by numpy, which asks the system for huge pages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from splatedit.render import kernels, pool
from splatedit.render.constants import ALPHA_MAX, MIN_COMPENSATION
from splatedit.render.kernels import LANES, RECORD, TILE
from splatedit.render.twin import meta

F = np.float32


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
    antialiased = rasterize_mode == "antialiased"
    limits = (near_plane, far_plane, radius_clip, eps2d, antialiased)
    radii, means2d, depths, conics, compensations = project(
        means, quats, scales, opacities, viewmats, Ks.detach(), width, height, *limits
    )
    dimmed = opacities * compensations if antialiased else opacities.expand(depths.shape)
    if render_mode in ("D", "ED"):
        colors, backgrounds = depths[..., None], None
    else:
        if sh_degree is not None:
            eyes = torch.linalg.inv(viewmats)[:, :3, 3]
            colors = color(sh_degree, means, eyes, colors, radii)
        colors = colors.expand(len(viewmats), *colors.shape[-2:])
        if render_mode != "RGB":
            colors = torch.cat([colors, depths[..., None]], -1)
            backgrounds = None if backgrounds is None else nnf.pad(backgrounds, (0, 1))
    divide = render_mode in ("ED", "RGB+ED")
    image, alphas = composite(
        means2d, conics, colors, dimmed, backgrounds, radii, depths, width, height, divide, absgrad
    )
    return image, alphas, meta(radii, means2d, depths, conics, dimmed, width, height)


def project(
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
    antialiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """radii (c, n, 2) int32, means2d (c, n, 2), depths (c, n), conics (c, n, 3), compensations (c, n); see `twin`."""
    options = (F(width), F(height), F(eps2d), antialiased)
    limits = (F(near_plane), F(far_plane), F(radius_clip))
    return _Project.apply(means, quats, scales, opacities, viewmats, Ks, options, limits)  # pyright: ignore


def color(degree: int, means: Tensor, eyes: Tensor, coefficients: Tensor, radii: Tensor) -> Tensor:
    """max(SH + 1/2, 0) seen from eyes (c, 3): (c, n, 3), 0 where radii are 0. coefficients (n, k, 3)."""
    return _Color.apply(degree, means, eyes, coefficients, radii)  # pyright: ignore


def composite(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    backgrounds: Tensor | None,
    radii: Tensor,
    depths: Tensor,
    width: int,
    height: int,
    divide: bool,
    absgrad: bool,
) -> tuple[Tensor, Tensor]:
    """image (c, h, w, d) and alphas (c, h, w, 1); `divide` divides the last channel by alpha."""
    if backgrounds is None:
        backgrounds = colors.new_zeros(colors.shape[0], colors.shape[-1])
    options = (width, height, divide, absgrad)
    return _Composite.apply(means2d, conics, colors, opacities, backgrounds, radii, depths, options)  # pyright: ignore


def probe() -> None:
    """Draw one Gaussian; raises whatever numba raises where it cannot make vector code."""
    point, view = torch.tensor([[0.0, 0.0, 2.0]]), torch.eye(4)[None]
    quat, scale, opacity = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.full((1, 3), 0.1), torch.ones(1)
    options = (0.01, 1e10, 0.0, 0.3, False)
    radii, means2d, depths, conics, _ = project(point, quat, scale, opacity, view, view[:, :3, :3], 16, 16, *options)
    composite(means2d, conics, point[None], opacity[None], None, radii, depths, 16, 16, False, False)


# ---------------------------------------------------------------- numpy and the kernels


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _aligned(size: int) -> np.ndarray:
    """Floats at an address that a cache line begins with, so that a record is one line."""
    memory = np.empty(size + LANES, F)
    skip = -memory.ctypes.data % 64 // 4
    return memory[skip : skip + size]


def _by_blocks(kernel: Any, n: int, inputs: list[np.ndarray], outputs: list[np.ndarray], *shared: object) -> None:
    """Run a kernel that takes 16 rows at a time over arrays of n rows.

    What is left over of n / 16 goes through copies, filled up with zeros, as one chunk more.
    """
    whole, rest = divmod(n, LANES)
    pool.run(kernel, whole, pool.chunks_of(n), *(a.reshape(-1) for a in (*inputs, *outputs)), *shared)
    if rest:
        filled = [np.zeros((LANES, *a.shape[1:]), a.dtype) for a in (*inputs, *outputs)]
        for a, b in zip((*inputs, *outputs), filled, strict=True):
            b[:rest] = a[n - rest :]
        kernel(0, 1, pool.chunks_of(n), *(b.reshape(-1) for b in filled), *shared)
        for a, b in zip(outputs, filled[len(inputs) :], strict=True):
            a[n - rest :] = b[:rest]


def _chunk_sums(n: int) -> np.ndarray:
    """One row of 16 sums for each chunk of `_by_blocks`, to be added in this order."""
    return np.zeros((pool.chunks_of(n) + 1, LANES), F)


# ---------------------------------------------------------------- the three steps


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, viewmats, Ks, options, limits):
        n, cameras = means.shape[0], viewmats.shape[0]
        inputs = [_array(t) for t in (means, quats, scales, opacities)]
        radii = np.empty((cameras, n, 2), np.int32)
        means2d, depths = np.empty((cameras, n, 2), F), np.empty((cameras, n), F)
        conics, compensations = np.empty((cameras, n, 3), F), np.empty((cameras, n), F)
        width, height, eps2d, antialiased = options
        for c, (view, K) in enumerate(zip(_array(viewmats), _array(Ks), strict=True)):
            outputs = [radii[c], means2d[c], depths[c], conics[c], compensations[c]]
            shared = (view, K, width, height, eps2d, *limits, antialiased, F(MIN_COMPENSATION))
            _by_blocks(kernels.project, n, inputs, outputs, *shared)
        tensors = [torch.from_numpy(a) for a in (radii, means2d, depths, conics, compensations)]
        ctx.save_for_backward(means, quats, scales, viewmats, Ks, tensors[0], tensors[4])
        ctx.options = options
        ctx.mark_non_differentiable(tensors[0])
        ctx.set_materialize_grads(False)
        return tuple(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *upstream):
        means, quats, scales, viewmats, Ks, radii, compensations = map(_array, ctx.saved_tensors)
        cameras, n = radii.shape[:2]
        shapes = ((cameras, n, 2), (cameras, n), (cameras, n, 3), (cameras, n))
        v_means2d, v_depths, v_conics, v_compensations = (
            np.zeros(shape, F) if v is None else _array(v) for v, shape in zip(upstream, shapes, strict=True)
        )
        outputs = [np.zeros_like(means), np.zeros_like(quats), np.zeros_like(scales)]
        v_viewmats = np.zeros_like(viewmats)
        for c in range(cameras):
            inputs = [means, quats, scales, radii[c], compensations[c]]
            inputs += [v_means2d[c], v_depths[c], v_conics[c], v_compensations[c]]
            sums = _chunk_sums(n)
            _by_blocks(kernels.project_backward, n, inputs, outputs, sums.reshape(-1), viewmats[c], Ks[c], *ctx.options)
            v_viewmats[c] = sums.sum(0).reshape(4, 4)
        v_means, v_quats, v_scales = map(torch.from_numpy, outputs)
        return v_means, v_quats, v_scales, None, torch.from_numpy(v_viewmats), None, None, None


class _Color(torch.autograd.Function):
    @staticmethod
    def forward(ctx, degree, means, eyes, coefficients, radii):
        cameras, n = radii.shape[:2]
        colors = np.empty((cameras, n, 3), F)
        width = 3 * coefficients.shape[1]
        seen, inputs = _array(radii), [_array(means), _array(coefficients)]
        for c, eye in enumerate(_array(eyes)):
            _by_blocks(kernels.color, n, [*inputs, seen[c]], [colors[c]], eye, degree, width)
        result = torch.from_numpy(colors)
        ctx.save_for_backward(means, eyes, coefficients, radii, result)
        ctx.degree = degree
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, v_colors):
        means, eyes, coefficients, radii, colors = map(_array, ctx.saved_tensors)
        cameras, n = radii.shape[:2]
        v = _array(v_colors)
        v_means, v_eyes = np.zeros_like(means), np.zeros_like(eyes)
        v_coefficients = np.empty_like(coefficients)  # the first camera writes it
        bend = bool(ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        width = 3 * coefficients.shape[1]
        for c in range(cameras):
            inputs = [means, coefficients, radii[c], colors[c], v[c]]
            sums = _chunk_sums(n)
            shared = (sums.reshape(-1), eyes[c], ctx.degree, width, c > 0, bend)
            _by_blocks(kernels.color_backward, n, inputs, [v_means, v_coefficients], *shared)
            v_eyes[c] = sums.sum(0)[:3]
        return None, *map(torch.from_numpy, (v_means, v_eyes, v_coefficients)), None


class _Pairs(NamedTuple):
    """The records, and for each tile of each camera the Gaussians that touch it, nearest first."""

    records: np.ndarray  # (c n 16,)
    touched: np.ndarray  # (c n,) number of tiles
    start: np.ndarray  # (c n + 1,) where the backward records of a Gaussian begin
    pairs: np.ndarray  # Gaussian of each pair, tile by tile
    slots: np.ndarray  # backward record of each pair
    starts: np.ndarray  # (tiles + 1,) where the pairs of a tile begin
    tiles: np.ndarray  # (tiles,) fullest first, to share them out evenly
    grid: tuple[int, int, int, int]  # columns and rows of tiles, width and height in pixels


def _pair_up(
    means2d: Tensor, conics: Tensor, opacities: Tensor, colors: Tensor, radii: Tensor, depths: Tensor, size: Any
) -> _Pairs:
    cameras, n = radii.shape[:2]
    width, height = size
    columns, rows = -(-width // TILE), -(-height // TILE)
    tiles, total, channels = columns * rows, cameras * n, colors.shape[-1]

    inputs = [_array(t.flatten(0, 1)) for t in (means2d, conics, opacities, colors, radii)]
    records, touched = _aligned(total * RECORD), np.empty(total, np.int32)
    outputs = [records.reshape(total, RECORD), touched]
    _by_blocks(kernels.pack, total, inputs, outputs, channels, 0, columns, rows)
    order, counts = np.empty(total, np.int32), np.zeros(cameras, np.int64)
    pool.run(kernels.sort_by_depth, cameras, cameras, _array(depths).reshape(-1), touched, order, counts, n)

    start = np.zeros(total + 1, np.int64)
    np.cumsum(touched, out=start[1:])
    parts = pool.chunks_of(int(counts.max()), 4096, 4)  # of the Gaussians of a camera, each with its own counts
    ranges = np.array([[c * n + counts[c] * p // parts, c * n + counts[c] * (p + 1) // parts]
                       for c in range(cameras) for p in range(parts)])  # fmt: skip
    pair_counts = np.zeros((cameras * parts, tiles), np.int64)
    pool.run(kernels.count_pairs, len(ranges), len(ranges), ranges, order, records, pair_counts, columns)
    by_part = pair_counts.reshape(cameras, parts, tiles)
    per_tile = by_part.sum(1).reshape(-1)
    starts = np.zeros(cameras * tiles + 1, np.int64)
    np.cumsum(per_tile, out=starts[1:])
    place = starts[:-1].reshape(cameras, 1, tiles) + np.cumsum(by_part, 1) - by_part
    pairs, slots = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.int32)
    place = np.ascontiguousarray(place.reshape(cameras * parts, tiles))
    pool.run(kernels.list_pairs, len(ranges), len(ranges), ranges, order, records, start, place, pairs, slots, columns)
    fullest_first = np.argsort(-per_tile, kind="stable").astype(np.int32)
    return _Pairs(records, touched, start, pairs, slots, starts, fullest_first, (columns, rows, width, height))


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means2d, conics, colors, opacities, backgrounds, radii, depths, options):
        width, height, divide, absgrad = options
        cameras, channels = colors.shape[0], colors.shape[-1]
        paired = _pair_up(means2d, conics, opacities, colors, radii, depths, (width, height))
        image, alphas = np.empty((cameras, height, width, channels), F), np.empty((cameras, height, width, 1), F)
        transmittances = np.empty(cameras * height * width, F)
        lasts = np.empty(cameras * height * width, np.int32)
        for first in range(0, channels, 4):
            if first:
                _recolor(paired, colors, first)
            pool.run(
                kernels.composite, len(paired.tiles), pool.chunks_of(len(paired.tiles), 1), paired.tiles,
                paired.records, paired.pairs, paired.starts, _array(backgrounds).reshape(-1), image.reshape(-1),
                alphas.reshape(-1), transmittances, lasts, *paired.grid, channels, first, F(ALPHA_MAX), divide,
            )  # fmt: skip
        result = torch.from_numpy(image)
        ctx.save_for_backward(means2d, colors, backgrounds, result if divide else None)
        ctx.paired, ctx.pixels, ctx.options = paired, (transmittances, lasts), options
        return result, torch.from_numpy(alphas)

    @staticmethod
    @once_differentiable
    def backward(ctx, v_image, v_alphas):
        means2d, colors, backgrounds, image = ctx.saved_tensors
        paired, (transmittances, lasts) = ctx.paired, ctx.pixels
        width, height, divide, absgrad = ctx.options
        (cameras, n, channels), v = colors.shape, _array(v_image).reshape(-1)
        divided = _array(image).reshape(-1) if divide else np.empty(0, F)
        gradients = _aligned(len(paired.pairs) * RECORD)
        v_means2d, v_conics = np.empty((cameras, n, 2), F), np.empty((cameras, n, 3), F)
        v_opacities, v_colors = np.empty((cameras, n), F), np.empty((cameras, n, channels), F)
        v_abs = np.empty((cameras, n, 2) if absgrad else (0,), F)
        for first in range(0, channels, 4):
            if channels > 4:
                _recolor(paired, colors, first)
            pool.run(
                kernels.composite_backward, len(paired.tiles), pool.chunks_of(len(paired.tiles), 1), paired.tiles,
                paired.records, paired.pairs, paired.slots, paired.starts, _array(backgrounds).reshape(-1), divided,
                transmittances, lasts, v, _array(v_alphas).reshape(-1), gradients, *paired.grid, channels, first,
                F(ALPHA_MAX), divide, absgrad,
            )  # fmt: skip
            pool.run(
                kernels.add_pairs, cameras * n, pool.chunks_of(cameras * n), paired.touched, paired.start,
                paired.records, gradients, v_means2d.reshape(-1), v_conics.reshape(-1), v_opacities.reshape(-1),
                v_colors.reshape(-1), v_abs.reshape(-1), channels, first, absgrad,
            )  # fmt: skip
        if absgrad:
            means2d.absgrad = torch.from_numpy(v_abs)
        v_backgrounds = None
        if ctx.needs_input_grad[4]:
            v_rows = np.empty((cameras, height, channels), F)
            pool.run(kernels.background_backward, cameras * height, pool.chunks_of(cameras * height, 32), v,
                     transmittances, v_rows.reshape(-1), width, channels)  # fmt: skip
            v_backgrounds = torch.from_numpy(v_rows.sum(1))
        geometry = map(torch.from_numpy, (v_means2d, v_conics, v_colors, v_opacities))
        return *geometry, v_backgrounds, None, None, None


def _recolor(paired: _Pairs, colors: Tensor, first: int) -> None:
    total, channels = len(paired.touched), colors.shape[-1]
    pool.run(kernels.recolor, total, pool.chunks_of(total), _array(colors).reshape(-1), paired.touched,
             paired.records, channels, first)  # fmt: skip
