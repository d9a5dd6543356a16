"""Differentiable rendering of 3D Gaussians, on its own: no diffusion model is imported from here.

    from splatedit.render import rasterization, render

    image, alphas, meta = rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height)
    picture = render(splatedit.load("scene.ply"), cameras).rgb

`rasterization` is gsplat's call: CUDA tensors go to gsplat, CPU tensors to compiled kernels.
`render` draws splats as a splat file holds them.
"""

from splatedit.render.backends import BACKENDS, rasterization
from splatedit.render.pictures import WHITE, Rendering, render

__all__ = ["BACKENDS", "WHITE", "Rendering", "rasterization", "render"]
