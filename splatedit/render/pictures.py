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
    colors = torch.as_tensor(background, dtype=means.dtype, device=means.device).expand(cameras.n, 3)
    image, alpha, meta = rasterization(
        means,
        gaussians.quats,
        gaussians.scales.exp(),
        gaussians.opacities.sigmoid(),
        gaussians.sh,
        cameras.w2c.to(means),
        cameras.K.to(means),
        cameras.width,
        cameras.height,
        sh_degree=gaussians.sh_degree,
        backgrounds=colors,
        render_mode="RGB+ED",
        rasterize_mode="antialiased" if antialiased else "classic",
        backend=backend,
    )
    image = image.permute(0, 3, 1, 2)
    return Rendering(image[:, :3], alpha.permute(0, 3, 1, 2), image[:, 3:], meta["means2d"], meta)
