"""`render(gaussians, cameras)`: the one call that turns splats into pictures, on CUDA and on a CPU alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.gaussians import Gaussians
from splatedit.render.backends import rasterization

WHITE = (1.0, 1.0, 1.0)
NEAR = 0.01  # gsplat's near plane, scene units
SAMPLE = 500


class Rendering(NamedTuple):
    """What a batch of cameras sees."""

    rgb: Tensor  # (c, 3, h, w); at least 0, may exceed 1 where the splats do
    alpha: Tensor  # (c, 1, h, w) in [0, 1]
    depth: Tensor  # (c, 1, h, w) expected distance along the view axis, scene units; 0 where nothing is hit
    means2d: Tensor  # (c, n, 2) pixels; call retain_grad() before backward to read its gradient
    meta: Mapping[str, Any] = {}  # all that `rasterization` tells; what `densify.screen_gradients` reads


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    background: Sequence[float] | Tensor = WHITE,
    *,
    antialiased: bool = True,
    backend: str = "auto",
) -> Rendering:
    """Draw the splats from every camera, differentiable in all six parameters and the camera matrices.

    background: three numbers in [0, 1], or a (c, 3) tensor with one colour per camera. antialiased: compensate the
    0.3 px blur as Mip-Splatting does (arXiv 2311.16493). backend: a key of `splatedit.render.BACKENDS`; "auto" is
    gsplat for CUDA tensors and the compiled kernels for CPU tensors.
    """
    means = gaussians.means
    image, alpha, meta = rasterization(
        **seen_by(gaussians, cameras, antialiased=antialiased),
        colors=gaussians.sh,
        sh_degree=gaussians.sh_degree,
        width=cameras.width,
        height=cameras.height,
        backgrounds=torch.as_tensor(background, dtype=means.dtype, device=means.device).expand(cameras.n, 3),
        render_mode="RGB+ED",
        backend=backend,
    )
    image = image.permute(0, 3, 1, 2)
    return Rendering(image[:, :3], alpha.permute(0, 3, 1, 2), image[:, 3:], meta["means2d"], meta)


def seen_by(gaussians: Gaussians, cameras: Cameras, *, antialiased: bool) -> dict[str, Any]:
    """What `rasterization` is told of splats and cameras, as a dictionary of its arguments, by all that draws both."""
    means = gaussians.means
    return {
        "means": means,
        "quats": gaussians.quats,
        "scales": gaussians.scales.exp(),
        "opacities": gaussians.opacities.sigmoid(),
        "viewmats": cameras.w2c.to(means),
        "Ks": cameras.K.to(means),
        "near_plane": near_plane(gaussians),
        "rasterize_mode": "antialiased" if antialiased else "classic",
    }


def near_plane(gaussians: Gaussians) -> float:
    """How near to a camera splats are drawn, scene units: gsplat's 0.01, and less for a scene that is small itself.

    A scene of a thousandth of a unit, as one in metres of a thing in millimetres, would otherwise lie in front of the
    near plane of all its cameras. Taken from the middle 80 % of some hundred splats, alike for every camera.
    """
    sample = slice(None, None, max(1, gaussians.n // SAMPLE))
    means, scales = (p.detach()[sample] for p in (gaussians.means, gaussians.scales))
    if not means.numel():
        return NEAR
    low, high = means.quantile(means.new_tensor([0.1, 0.9]), 0)
    size = float((high - low).max() / 2 + scales.amax(1).median().exp())
    return NEAR * min(size, 1.0) if 0 < size else NEAR
