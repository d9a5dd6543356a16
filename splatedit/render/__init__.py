"""Differentiable rendering of 3D Gaussians, on its own: no diffusion model is imported from here.

    from splatedit.render import rasterization, render

    image, alphas, meta = rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height)
    picture = render(splatedit.load("scene.ply"), cameras).rgb

`rasterization` is gsplat's call: CUDA tensors go to gsplat, CPU tensors to compiled kernels.
`render` draws splats as a splat file holds them. `lift` goes the other way, from maps to Gaussians; `pick` and
`visibility` tell which Gaussian a pixel shows. `backprojection` and `contributions` are these on plain tensors.
`densify` adds, splits, moves and removes Gaussians between two optimiser steps.
"""

from splatedit.render import densify
from splatedit.render.backends import BACKENDS, rasterization, warm
from splatedit.render.lifting import (
    Lifted,
    Picked,
    backprojection,
    contributions,
    fill_unseen,
    lift,
    pick,
    visibility,
)
from splatedit.render.pictures import WHITE, Rendering, render

__all__ = [
    "BACKENDS",
    "WHITE",
    "Lifted",
    "Picked",
    "Rendering",
    "backprojection",
    "contributions",
    "densify",
    "fill_unseen",
    "lift",
    "pick",
    "rasterization",
    "render",
    "visibility",
    "warm",
]
