"""Denoisers of Gaussian mixtures with known scores, in double precision, and small words for tests of guidances."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from splatedit.diffusion import Draw, MixtureDenoiser, guided, repeat, scaled_linear, scales
from splatedit.score import Request

F64 = torch.float64
SHAPE = (2, 2, 3)
SIZE = math.prod(SHAPE)
SCALE = 7.5
WIDTH = 0.3  # variance of the components of the affine prior


def exact(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=seeded(seed))


def draw_at(t, noise):
    t = torch.tensor(t)
    return Draw(t, *scales(scaled_linear(), t, noise), noise)


class Affine:
    """One Gaussian for each text, all of variance WIDTH: every guided score is affine."""

    def __init__(self):
        means = normal(3, *SHAPE, seed=1)
        self.null_mean, self.source_mean, self.target_mean = means
        self.mixture = MixtureDenoiser(means, floor=WIDTH)
        self.null, self.source, self.target = (self.mixture.text(row) for row in torch.eye(3).tolist())
        self.denoise = guided(self.mixture, self.null, SCALE)

    def mean(self, mean):
        """The centre that guidance at SCALE moves `mean` to."""
        return self.null_mean + SCALE * (mean - self.null_mean)

    def request(self, z_source):
        return Request(repeat(self.target, len(z_source)), repeat(self.source, len(z_source)), z_source)


class Modes:
    """Two texts of two components each, of different shapes: scores bend, as those of a real prior do."""

    def __init__(self):
        directions = torch.linalg.qr(normal(4, SIZE, 2, seed=3)).Q
        variances = torch.rand(4, 2, dtype=F64, generator=seeded(4))
        self.mixture = MixtureDenoiser(0.6 * normal(4, *SHAPE, seed=2), None, 0.1, directions, variances)
        texts = ([0.4, 0.1, 0.1, 0.4], [0.8, 0.2, 0, 0], [0, 0, 0.2, 0.8])
        self.null, self.source, self.target = (self.mixture.text(row) for row in texts)
        self.denoise = guided(self.mixture, self.null, SCALE)

    request = Affine.request


class Seen:
    """A network whose noised input, through a fixed random layer, stands in for what self-attention puts out."""

    def __init__(self, network):
        self.network, self.lists = network, []

    def __call__(self, x, t, text):
        for seen in self.lists:
            layer = torch.randn(8, x.shape[1], generator=seeded(0)).to(x)
            seen.append(torch.einsum("oc,bchw->bhwo", layer, x).flatten(1, 2).tanh())
        return self.network(x, t, text)

    @contextmanager
    def self_attention(self):
        self.lists.append([])
        try:
            yield self.lists[-1]
        finally:
            self.lists.pop()


def toy_prior(seen, table=None):
    """As much of a Prior as `tuning.bind` asks for, around a Seen MixtureDenoiser."""
    table = seen.network.alphas_cumprod if table is None else table
    return SimpleNamespace(
        alphas_cumprod=table, self_attention=seen.self_attention, particle=lambda *_: OneGaussian(table, 0.02)
    )


class OneGaussian:
    """A particle of vsd that learns at once: the renders are one Gaussian around the last of them."""

    def __init__(self, alphas_cumprod, variance):
        self.alphas_cumprod, self.variance, self.mean = alphas_cumprod, variance, None

    def __call__(self, x, t, text, camera):
        a, s = scales(self.alphas_cumprod, t, x)
        mean = x / a if self.mean is None else self.mean
        return s * (x - a * mean) / (a**2 * self.variance + s**2)

    def learn(self, z, text, camera, generator):
        self.mean = z
        return 0.0

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]
