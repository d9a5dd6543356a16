"""Small scenes for the tests of the rasteriser, each a dictionary of arguments of `rasterization`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Scene = dict[str, Any]
LEAVES = ("means", "quats", "scales", "opacities", "colors", "viewmats", "backgrounds")


def cameras(count: int, width: int, height: int, distance: float = 3.0) -> tuple[Tensor, Tensor]:
    """viewmats and Ks on a circle around the origin, looking at it from a little above; 50 degrees wide."""
    views = []
    for turn in torch.arange(count, dtype=torch.float64) * (6.283185 / max(count, 1)) + 0.3:
        eye = distance * torch.stack([turn.cos() * 0.95, turn.sin() * 0.95, torch.tensor(0.3, dtype=torch.float64)])
        z = -eye / eye.norm()
        x = torch.linalg.cross(z, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        x = x / x.norm()
        rotation = torch.stack([x, torch.linalg.cross(z, x), z])
        view = torch.eye(4, dtype=torch.float64)
        view[:3, :3], view[:3, 3] = rotation, -rotation @ eye
        views.append(view)
    K = torch.tensor([[1.07 * width, 0, 0.52 * width], [0, 1.1 * width, 0.47 * height], [0, 0, 1]])
    return torch.stack(views).float(), K.expand(count, 3, 3).contiguous()


def cloud(
    seed: int, n: int, *, views: int = 2, width: int = 40, height: int = 34, sh_degree: int = 3, size: float = 0.15
) -> Scene:
    """n Gaussians in the unit ball, of all opacities, sizes around `size`."""
    g = torch.Generator().manual_seed(seed)
    viewmats, Ks = cameras(views, width, height)
    direction = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1)
    colors = 0.3 * torch.randn(n, (sh_degree + 1) ** 2, 3, generator=g)
    colors[:, 0] += torch.rand(n, 3, generator=g)
    return {
        "means": direction * torch.rand(n, 1, generator=g),
        "quats": torch.randn(n, 4, generator=g),
        "scales": size * torch.exp(0.5 * torch.randn(n, 3, generator=g)),
        "opacities": torch.sigmoid(1.5 * torch.randn(n, generator=g)),
        "colors": colors,
        "viewmats": viewmats,
        "Ks": Ks,
        "width": width,
        "height": height,
        "sh_degree": sh_degree,
        "backgrounds": torch.rand(views, 3, generator=g),
    }


def empty() -> Scene:
    return cloud(0, 0)


def one() -> Scene:
    return cloud(1, 1, size=0.4)


def sixteen() -> Scene:
    """A whole block of 16 and no rest."""
    return cloud(2, 16)


def behind() -> Scene:
    """Nothing to see: all behind both cameras."""
    scene = cloud(3, 20)
    scene["viewmats"] = scene["viewmats"].clone()
    scene["viewmats"][:, 2, 3] -= 6.0
    return scene


def around() -> Scene:
    """The cameras stand within the cloud: points on all sides, many far outside the image."""
    scene = cloud(4, 60)
    scene["viewmats"], _ = cameras(2, 40, 34, distance=0.4)
    return scene


def huge() -> Scene:
    scene = cloud(5, 12)
    scene["scales"] = scene["scales"] * 300
    return scene


def tiny() -> Scene:
    scene = cloud(6, 50)
    scene["scales"] = scene["scales"] * 1e-3
    return scene


def needles() -> Scene:
    scene = cloud(7, 40)
    scene["scales"] = torch.tensor([3e-3, 1.0, 3e-3]).expand(40, 3).contiguous()
    return scene


def clear_and_solid() -> Scene:
    """Opacities 0 and 1: nothing, and pixels that end at the first Gaussians."""
    scene = cloud(8, 60, size=0.4)
    scene["opacities"] = torch.where(torch.arange(60) % 3 == 0, 0.0, 1.0)
    return scene


def twins() -> Scene:
    """Four times the same place, so the same depth: order is by number."""
    scene = cloud(9, 40)
    scene["means"] = scene["means"][:10].repeat(4, 1)
    return scene


def sliver() -> Scene:
    """An image of one pixel by thirty-three."""
    return cloud(10, 30, width=1, height=33, views=1)


SCENES = {
    "empty": empty,
    "one": one,
    "sixteen": sixteen,
    "behind": behind,
    "around": around,
    "huge": huge,
    "tiny": tiny,
    "needles": needles,
    "clear_and_solid": clear_and_solid,
    "twins": twins,
    "sliver": sliver,
}


def to(scene: Scene, *args: Any) -> Scene:
    """All tensors moved by Tensor.to(*args)."""
    return {k: v.to(*args) if isinstance(v, Tensor) else v for k, v in scene.items()}
