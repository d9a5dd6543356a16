"""Gaussian splatting in plain torch: the definition that the compiled kernels and gsplat are tested against.

Any float type, any device, any derivative; slow. Written from the formulas of EWA splatting (Zwicker et al. 2001),
3D Gaussian splatting (arXiv 2308.04079) and Mip-Splatting's compensation (arXiv 2311.16493), with gsplat's constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from splatedit.render.constants import ALPHA_MAX, ALPHA_MIN, EXTEND, MIN_COMPENSATION, T_STOP, TILE


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
    parameters = (means, quats, scales, opacities)
    radii, means2d, depths, conics, dimmed = splats(*parameters, viewmats, Ks.detach(), width, height, *limits)
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


def meta(
    radii: Tensor, means2d: Tensor, depths: Tensor, conics: Tensor, opacities: Tensor, width: int, height: int
) -> dict[str, Any]:
    """The third result of `rasterization`."""
    return {
        "radii": radii,
        "means2d": means2d,
        "depths": depths,
        "conics": conics,
        "opacities": opacities,
        "width": width,
        "height": height,
        "n_cameras": len(radii),
        "tile_size": TILE,
        "tile_width": -(-width // TILE),
        "tile_height": -(-height // TILE),
        "gaussian_ids": None,
        "camera_ids": None,
    }


def rotation(quats: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), wxyz, of any length but 0."""
    largest = quats.detach().abs().amax(-1, keepdim=True)  # the squares of 1e-25 or 1e25 have no float32
    w, x, y, z = nnf.normalize(quats / largest, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def splats(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, *view: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `project`, with the opacities (c, n) that are drawn, which "antialiased" dims, for the compensations."""
    radii, means2d, depths, conics, compensations = project(means, quats, scales, opacities, *view)
    antialiased = view[-1]
    dimmed = opacities * compensations if antialiased else opacities.expand(depths.shape)
    return radii, means2d, depths, conics, dimmed


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
    """The ellipses of n Gaussians in c cameras.

    radii (c, n, 2) int32: half the bounding box in pixels, 0 for a Gaussian that is not drawn. means2d (c, n, 2) in
    pixels; depths (c, n); conics (c, n, 3): xx, xy, yy of the inverse covariance; compensations (c, n): the factor by
    which the blur of eps2d square pixels thins the Gaussian out.
    """
    shape = rotation(quats) * scales[:, None, :]
    world_to_camera = viewmats[:, None, :3, :3]
    x, y, z = (means @ viewmats[:, :3, :3].mT + viewmats[:, None, :3, 3]).unbind(-1)
    fx, fy, cx, cy = (Ks[:, None, i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    in_front = (z >= near_plane) & (z <= far_plane)
    z_safe = torch.where(in_front, z, 1.0)
    u, v = x / z_safe, y / z_safe
    # the Jacobian is that of the point moved into the frustum and 15 % of the image around it
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    uc = u.clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    vc = v.clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    rows = [[fx / z_safe, zero, -fx * uc / z_safe], [zero, fy / z_safe, -fy * vc / z_safe]]
    jacobian = torch.stack([torch.stack(row, -1) for row in rows], -2)
    b = jacobian @ world_to_camera @ shape
    det = _ellipse(b.detach(), eps2d)[3]
    drawable = in_front & (det > 0) & (det < 1e38)
    # what is not drawn must not bring the NaN of infinity minus infinity into the gradients, hence 0 before any square
    cxx, cxy, cyy, det, sharp = _ellipse(torch.where(drawable[..., None, None], b, 0.0), eps2d)
    det = torch.where(drawable, det, 1.0)
    square = sharp / det
    # gsplat's gradient does not know of this bound, hence detach; 1e-12 keeps the root's gradient finite
    least = max(MIN_COMPENSATION**2, 1e-12)
    square = torch.where(square < least, least + (square - square.detach()), square)
    compensations = square.sqrt()
    means2d = torch.stack([fx * u + cx, fy * v + cy], -1)
    conics = torch.stack([cyy / det, -cxy / det, cxx / det], -1)
    with torch.no_grad():
        opacity = opacities * compensations if antialiased else opacities.expand_as(z)
        extend = (2 * (opacity / ALPHA_MIN).clamp_min(1).log()).sqrt().clamp_max(EXTEND)
        radii = (extend[..., None] * torch.stack([cxx, cyy], -1).sqrt()).ceil().clamp_max(2.0**30)
        seen = drawable & (opacity >= ALPHA_MIN) & (radii > radius_clip).any(-1)
        size = torch.tensor([width, height], dtype=z.dtype, device=z.device)
        seen &= ((means2d + radii > 0) & (means2d - radii < size)).all(-1)
        radii = torch.where(seen[..., None], radii, 0.0).int()
    return radii, means2d, z, conics, compensations


def _ellipse(b: Tensor, eps2d: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """xx, xy, yy and determinant of b b^T + eps2d 1, and the determinant of b b^T."""
    covariance = b @ b.mT
    xx, xy, yy = covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1]
    sharp = xx * yy - xy * xy
    xx, yy = xx + eps2d, yy + eps2d
    return xx, xy, yy, xx * yy - xy * xy, sharp


def basis(degree: int, directions: Tensor) -> Tensor:
    """Real spherical harmonics (..., (degree + 1)^2) of unit vectors (..., 3), in gsplat's order and signs."""
    x, y, z = directions.unbind(-1)
    values = [torch.full_like(x, 0.2820947917738781)]
    if degree >= 1:
        values += [-0.48860251190292 * y, 0.48860251190292 * z, -0.48860251190292 * x]
    if degree >= 2:
        values += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.9461746957575601 * z * z - 0.3153915652525201,
            -1.0925484305920792 * x * z,
            0.5462742152960395 * (x * x - y * y),
        ]
    if degree >= 3:
        values += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            y * (0.4570457994644658 - 2.285228997322329 * z * z),
            z * (1.865881662950577 * z * z - 1.119528997770346),
            x * (0.4570457994644658 - 2.285228997322329 * z * z),
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return torch.stack(values, -1)


def color(degree: int, means: Tensor, eyes: Tensor, coefficients: Tensor, radii: Tensor) -> Tensor:
    """max(SH + 1/2, 0) seen from eyes (c, 3): (c, n, 3). coefficients (n, k, 3) or (c, n, k, 3); radii are not used."""
    b = basis(degree, nnf.normalize(means - eyes[:, None], dim=-1))
    return (torch.einsum("cnk,...nkd->cnd", b, coefficients[..., : b.shape[-1], :]) + 0.5).clamp_min(0)


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
    """image (c, h, w, d) and alphas (c, h, w, 1): front to back, image = sum of alpha T colour + T_end background."""
    if absgrad:
        means2d.absgrad = torch.zeros_like(means2d)  # pyright: ignore[reportAttributeAccessIssue]
    images, alphas = [], []
    for c in range(len(means2d)):
        absolute = means2d.absgrad[c] if absgrad else None  # pyright: ignore[reportAttributeAccessIssue]
        splats = (means2d[c], conics[c], colors[c], opacities[c])
        image, alpha = _composite_camera(splats, radii[c], depths[c], width, height, absolute)
        if backgrounds is not None:
            image = image + (1 - alpha) * backgrounds[c]
        if divide:
            image = torch.cat([image[..., :-1], image[..., -1:] / alpha.clamp_min(1e-10)], -1)
        images.append(image)
        alphas.append(alpha)
    return torch.stack(images), torch.stack(alphas)


def _composite_camera(
    splats: tuple[Tensor, ...], radii: Tensor, depths: Tensor, width: int, height: int, absolute: Tensor | None
) -> tuple[Tensor, Tensor]:
    pieces = [_composite_tile(splats, tile, absolute) for tile in tiles(splats[0], radii, depths, width, height)]
    columns = -(-width // TILE)
    image = torch.cat([torch.cat(pieces[i : i + columns], 1) for i in range(0, len(pieces), columns)], 0)
    return image[..., :-1], image[..., -1:]


class Tile(NamedTuple):
    """A rectangle of pixels and what may be seen in it."""

    near: Tensor  # numbers of the Gaussians whose box touches it, nearest first, equal depths by number
    x: int  # first column, pixels
    y: int  # first row
    wide: int  # pixels
    high: int


def tiles(means2d: Tensor, radii: Tensor, depths: Tensor, width: int, height: int) -> Iterator[Tile]:
    """The tiles of one camera's picture, row by row. means2d (n, 2), radii (n, 2), depths (n,)."""
    order = torch.argsort(depths.detach().float(), stable=True)
    order = order[(radii[order] > 0).all(-1)]
    low, high = means2d.detach()[order] - radii[order], means2d.detach()[order] + radii[order]
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            corner = torch.tensor([x, y], dtype=low.dtype, device=low.device)
            near = order[((high > corner) & (low < corner + TILE)).all(-1)]
            yield Tile(near, x, y, min(TILE, width - x), min(TILE, height - y))


def blend(
    means2d: Tensor, conics: Tensor, opacities: Tensor, tile: Tile, absolute: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Blending weights alpha T (m, p) of the m Gaussians near a tile in its p pixels, row by row; T (p,) at the end.

    absolute: (n, 2), to which backward adds the absolute gradients of means2d.
    """
    options: Any = dict(dtype=means2d.dtype, device=means2d.device)
    rows = torch.arange(tile.y, tile.y + tile.high, **options)
    columns = torch.arange(tile.x, tile.x + tile.wide, **options)
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).reshape(-1, 2) + 0.5
    offset = means2d[tile.near, None] - pixels  # (m, p, 2)
    if absolute is not None and offset.requires_grad:
        offset.register_hook(lambda v: _collect(absolute, tile.near, v))
    dx, dy = offset.unbind(-1)
    a, b, c = conics[tile.near, None].unbind(-1)
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alpha = (opacities[tile.near, None] * torch.exp(-sigma.clamp_min(0))).clamp_max(ALPHA_MAX)
    alpha = torch.where((sigma >= 0) & (alpha >= ALPHA_MIN), alpha, 0.0)
    # T only falls, so "at or below T_STOP after this one" holds for the one that ends the pixel and all behind it
    alpha = torch.where((1 - alpha).cumprod(0) > T_STOP, alpha, 0.0)
    after = torch.cat([torch.ones_like(pixels[None, :, 0]), (1 - alpha).cumprod(0)])
    return alpha * after[:-1], after[-1]


def _composite_tile(splats: tuple[Tensor, ...], tile: Tile, absolute: Tensor | None) -> Tensor:
    """(high, wide, d + 1): the channels of a tile without background, and alpha."""
    means2d, conics, colors, opacities = splats
    weights, end = blend(means2d, conics, opacities, tile, absolute)
    image = torch.einsum("np,nd->pd", weights, colors[tile.near])
    return torch.cat([image, 1 - end[:, None]], -1).reshape(tile.high, tile.wide, -1)


def _collect(absolute: Tensor, near: Tensor, v: Tensor) -> None:
    absolute.index_add_(0, near, v.detach().abs().sum(1))
