"""Scenes for the tests of packed formats, and how far two of them are apart."""

import warnings
from pathlib import Path

import pytest
import torch

from splatedit.errors import InputError, LossWarning
from splatedit.files import load, save
from splatedit.gaussians import SH_REST, Gaussians

FIXTURES = Path(__file__).parents[2] / "shared" / "data" / "splats"


def scene(n=40, degree=0, seed=0, **fields):
    """Gaussians that every packed format can hold: the extremes of its ranges lie outside."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=draw)

    return Gaussians(
        means=uniform(-3, 3, n, 3),
        quats=torch.randn(n, 4, generator=draw),
        scales=uniform(-9.5, 3, n, 3),
        opacities=uniform(-6, 6, n),
        sh0=uniform(-1.7, 1.7, n, 1, 3),
        shN=uniform(-0.9, 0.9, n, SH_REST[degree], 3),
        **fields,
    )


def trip(gaussians, path):
    """Saved and loaded, without the warning of what is lost."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        save(gaussians, path)
        return load(path)


def turned(a, b):
    """The angle between two rotations, degrees, (n,)."""
    a, b = (torch.nn.functional.normalize(q.double(), dim=1) for q in (a, b))
    return torch.rad2deg(2 * torch.asin(torch.minimum((a - b).norm(dim=1), (a + b).norm(dim=1)).clamp(max=2) / 2))


def fails(path, *parts):
    """The one line that a wrong file gets; every part must be in it, the path too."""
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    for part in parts:
        assert part in message
    return message
