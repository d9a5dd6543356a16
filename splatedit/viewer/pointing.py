"""From places in a browser's window to splats: a rectangle that was drawn, a point that was clicked.

Only what can be seen is meant. A splat can be seen if light of it reaches the eye, or if it is part of a surface that
can be seen, be it covered by others of it. The first is its mean transmittance, the light that comes through over what
would without the others. With w_p = alpha_p T_p that is the sum of w over the sum of alpha; the one is the derivative
of the picture with respect to the splat's colour, the other the integral of its ellipse.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.render import rasterization
from splatedit.render.pictures import seen_by
from splatedit.render.twin import rotation

SEEN = 0.05  # transmittance from which on a splat counts as seen
DEEP = 2.0  # standard deviations of its own that a splat of a surface may lie behind it
LEAST, MOST = 64, 512  # pixels of the longer side of the picture that is drawn of a rectangle
AROUND = 4  # pixels around the one that was clicked
SOLID = 0.3  # alpha from which on a pixel shows a surface
CUT = 1 / 255  # alpha below which nothing is drawn


class Rectangle(NamedTuple):
    """A part of a window; 0 to 1 from its left upper corner."""

    left: float
    top: float
    right: float
    bottom: float


def rectangle(one: tuple[float, float], other: tuple[float, float]) -> Rectangle:
    """What lies between two corners, within the window; raises InputError if that is nothing."""
    (left, right), (top, bottom) = (
        sorted(min(max(v, 0.0), 1.0) for v in pair) for pair in zip(one, other, strict=True)
    )
    if right <= left or bottom <= top:
        raise InputError("the rectangle is empty; drag from one corner to the opposite one, with shift held.")
    return Rectangle(left, top, right, bottom)


def cut(camera: Cameras, part: Rectangle, least: int = LEAST, most: int = MOST) -> Cameras:
    """The same view, of a part of the window alone; its longer side has `least` to `most` pixels."""
    wide, high = (part.right - part.left) * camera.width, (part.bottom - part.top) * camera.height
    scale = min(max(1.0, least / max(wide, high)), most / max(wide, high))
    width, height = max(round(wide * scale), 1), max(round(high * scale), 1)
    fine = camera.K.new_tensor([width / wide, height / high, 1.0])
    K = camera.K.clone()
    K[:, 0, 2] -= part.left * camera.width
    K[:, 1, 2] -= part.top * camera.height
    return Cameras(camera.w2c, K * fine[:, None], width, height)


class Sight(NamedTuple):
    """Where and how well each splat is seen by a camera."""

    centres: Tensor  # (n, 2) pixels; NaN for what is not in the picture
    transmittance: Tensor  # (n,) about 0 to 1; 0 for what is not in the picture
    depth: Tensor  # (n,) of the centre behind the surface there, in standard deviations of its own; NaN: no surface


def look(gaussians: Gaussians, camera: Cameras) -> Sight:
    """How one camera sees the splats; those that cannot be drawn are not seen, and hide nothing."""
    sound = gaussians.drawable()
    n = gaussians.n
    centres, light, depth = torch.full((n, 2), math.nan), torch.zeros(n), torch.full((n,), math.nan)
    if not sound.any():
        return Sight(centres, light, depth)
    with torch.no_grad():
        seen = seen_by(gaussians.select(sound), camera, antialiased=False)
    colors = seen["means"].new_zeros(len(seen["means"]), 1, requires_grad=True)
    picture, alphas, meta = rasterization(
        **seen, colors=colors, width=camera.width, height=camera.height, render_mode="RGB+ED"
    )
    (came,) = torch.autograd.grad(picture[..., 0].sum(), colors)
    xx, xy, yy = meta["conics"][0].detach().unbind(-1)
    whole = 2 * math.pi * (seen["opacities"] - CUT).clamp(min=0) / (xx * yy - xy * xy).clamp(min=1e-12).sqrt()
    drawn = (meta["radii"][0] > 0).all(-1) & (whole > 0)
    light[sound] = torch.where(drawn, came[:, 0] / whole, 0.0)
    at = meta["means2d"][0].detach()
    centres[sound] = torch.where(drawn[:, None], at, math.nan)
    x, y = (at[:, i].nan_to_num(0).long().clamp(0, size - 1) for i, size in enumerate((camera.width, camera.height)))
    ahead = camera.w2c[0, 2, :3]
    thick = ((rotation(seen["quats"]) * seen["scales"][:, None, :]).mT @ ahead).norm(dim=1)
    behind = (meta["depths"][0] - picture[0, y, x, 1]).detach() / thick
    depth[sound] = torch.where(drawn & (alphas[0, y, x, 0] >= SOLID), behind, math.nan)
    return Sight(centres, light, depth)


def within(gaussians: Gaussians, camera: Cameras, part: Rectangle) -> Tensor:
    """Which splats (n,) bool have their centre in a part of the window and can be seen there, not through others."""
    view = cut(camera, part)
    sight = look(gaussians, view)
    inside = ((sight.centres >= 0) & (sight.centres <= sight.centres.new_tensor([view.width, view.height]))).all(1)
    return inside & ((sight.transmittance >= SEEN) | (sight.depth <= DEEP))


def surface(gaussians: Gaussians, camera: Cameras, place: tuple[float, float]) -> Tensor:
    """The point (3,) of the surface seen at a place of the window, 0 to 1 each; raises InputError for empty space."""
    from splatedit.render import render

    across, down = AROUND / camera.width, AROUND / camera.height
    x, y = place
    part = Rectangle(x - across, y - down, x + across, y + down)
    view = cut(camera, part, least=2 * AROUND, most=2 * AROUND)
    with torch.no_grad():
        drawn = render(gaussians.select(gaussians.drawable()), view, antialiased=False)
    middle = (0, 0, view.height // 2, view.width // 2)
    if float(drawn.alpha[middle]) < SOLID:
        raise InputError("nothing is there; click at the scene.")
    focal = view.K[0].diagonal()[:2]
    at = (torch.tensor([view.width / 2, view.height / 2]) - view.K[0, :2, 2]) / focal
    depth = drawn.depth[middle]
    turn, shift = view.w2c[0, :3, :3], view.w2c[0, :3, 3]
    return turn.T @ (torch.cat([at, at.new_ones(1)]) * depth - shift)
