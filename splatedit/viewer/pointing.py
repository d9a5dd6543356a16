"""From places in a browser's window to splats: a rectangle that was drawn, a point that was clicked.

Only what can be seen is meant. How well a splat is seen is its mean transmittance: the light of it that reaches the
eye, over what would without the others in front. With w_p = alpha_p T_p that is the sum of w over the sum of alpha; the
first is the derivative of the picture with respect to the splat's colour, the second the integral of its ellipse.
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

SEEN = 0.05  # transmittance from which on a splat counts as seen: what lies within a surface, not behind it
LEAST, MOST = 64, 512  # pixels of the longer side of the picture that is drawn of a rectangle
AROUND = 4  # pixels around the one that was clicked
SOLID = 0.3  # alpha from which on a pixel shows something
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


def seen(gaussians: Gaussians, camera: Cameras) -> tuple[Tensor, Tensor]:
    """Where and how well each splat is seen by one camera: centre in pixels (n, 2), transmittance (n,) of about 0 to 1.

    NaN and 0 for what is not in the picture. Splats that cannot be drawn are not seen, and hide nothing.
    """
    sound = gaussians.drawable()
    centres, transmittance = torch.full((gaussians.n, 2), math.nan), torch.zeros(gaussians.n)
    if not sound.any():
        return centres, transmittance
    some = {name: value.detach()[sound] for name, value in gaussians.parameters.items()}
    colors = some["means"].new_zeros(int(sound.sum()), 1, requires_grad=True)
    picture, _, meta = rasterization(
        some["means"],
        some["quats"],
        some["scales"].exp(),
        some["opacities"].sigmoid(),
        colors,
        camera.w2c,
        camera.K,
        camera.width,
        camera.height,
    )
    (light,) = torch.autograd.grad(picture.sum(), colors)
    xx, xy, yy = meta["conics"][0].detach().unbind(-1)
    opacity = some["opacities"].sigmoid()
    whole = 2 * math.pi * (opacity - CUT).clamp(min=0) / (xx * yy - xy * xy).clamp(min=1e-12).sqrt()
    drawn = (meta["radii"][0] > 0).all(-1) & (whole > 0)
    transmittance[sound] = torch.where(drawn, light[:, 0] / whole, 0.0)
    centres[sound] = torch.where(drawn[:, None], meta["means2d"][0].detach(), math.nan)
    return centres, transmittance


def within(gaussians: Gaussians, camera: Cameras, part: Rectangle) -> Tensor:
    """Which splats (n,) bool have their centre in a part of the window and can be seen there, not through others."""
    view = cut(camera, part)
    centres, transmittance = seen(gaussians, view)
    size = centres.new_tensor([view.width, view.height])
    return ((centres >= 0) & (centres <= size)).all(1) & (transmittance >= SEEN)


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
