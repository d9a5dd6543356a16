"""Noise schedules, prediction types and guidance scale, turned once into one callable: (x_t, t, text) -> noise.

Notation: x_t = a z + s noise with a = sqrt(alphas_cumprod[t]) and s = sqrt(1 - alphas_cumprod[t]).
A network's answer is the pair (ehat, zhat), predicted noise and predicted clean latents, with x_t = a zhat + s ehat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from splatedit.errors import InputError

SMALLEST = 1e-4  # a and s are never divided by when below this; alphas_cumprod below it carries no picture
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


class Text(NamedTuple):
    """What the network is told, one row for each row of x_t."""

    embeds: Tensor  # (b, l, d) token embeddings
    pooled: Tensor | None = None  # (b, p) pooled embedding, SDXL
    ids: Tensor | None = None  # (b, 6) original size, crop and target size in pixels, SDXL


Denoise = Callable[[Tensor, Tensor, Text], Tensor]  # x_t (b, c, h, w), t (b,) int64, text of b rows -> ehat like x_t


def stack(*texts: Text) -> Text:
    """The rows of all `texts`, one after another."""

    def join(column: tuple[Tensor | None, ...]) -> Tensor | None:
        given = [part for part in column if part is not None]
        assert len(given) in (0, len(column)), "texts with and without pooled embeddings do not mix"
        return torch.cat(given) if given else None

    embeds, pooled, ids = zip(*texts, strict=True)
    return Text(torch.cat(embeds), join(pooled), join(ids))


def repeat(text: Text, b: int) -> Text:
    """A text of one row as one of `b` equal rows (a view, no copy); a text of `b` rows as it is."""
    rows = len(text.embeds)
    assert rows in (1, b), f"a text of {rows} rows cannot serve {b} rows"
    embeds, pooled, ids = (None if part is None else part.expand(b, *part.shape[1:]) for part in text)
    assert embeds is not None
    return Text(embeds, pooled, ids)


def pick(text: Text, rows: Tensor) -> Text:
    """The given rows (indices) of a text."""
    embeds, pooled, ids = (None if part is None else part[rows] for part in text)
    assert embeds is not None
    return Text(embeds, pooled, ids)


class Draw(NamedTuple):
    """One random draw of noise level and noise, shared by every branch of a score."""

    t: Tensor  # (b,) int64
    a: Tensor  # (b, 1, 1, 1) signal scale
    s: Tensor  # (b, 1, 1, 1) noise scale
    noise: Tensor  # (b, c, h, w)

    def noised(self, z: Tensor) -> Tensor:
        """Clean latents z (b, c, h, w) at this noise level; raises InputError for latents of another size."""
        if z.shape[1:] != self.noise.shape[1:]:
            found, expected = ("x".join(map(str, part.shape[1:])) for part in (z, self.noise))
            raise InputError(f"latents: found {found}, expected {expected}; pictures of several sizes go one by one.")
        return self.a * z + self.s * self.noise

    def pick(self, rows: Tensor) -> Draw:
        """The given rows (indices) of the draw."""
        return Draw(*(part[rows] for part in self))


def scaled_linear(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """The alphas_cumprod of Stable Diffusion, (steps,) float64, in (0, 1), falling."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def scales(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise scales (a, s) at steps t (b,), each (b, 1, 1, 1) in the dtype and on the device of `like`."""
    power = alphas_cumprod.to(like.device)[t].view(-1, 1, 1, 1)
    return power.sqrt().to(like.dtype), (1 - power).sqrt().to(like.dtype)


def check_range(t_range: tuple[float, float]) -> None:
    """Raise InputError for what are no two fractions of a schedule."""
    low, high = t_range
    if not 0 <= low <= high <= 1:
        raise InputError(f"t_range: found {[low, high]}, expected fractions of the schedule, 0 <= low <= high <= 1.")


def step_range(alphas_cumprod: Tensor, t_range: tuple[float, float]) -> tuple[int, int]:
    """First and last step of `t_range`, fractions of the schedule, both included; raises InputError if outside [0, 1].

    Steps of a zero-terminal-SNR schedule at which nothing is left of the picture are never in it: a score there says
    nothing about z, and a division by a = 0 would follow.
    """
    check_range(t_range)
    low, high = t_range
    last = int((alphas_cumprod >= SMALLEST).sum()) - 1
    return min(round(low * len(alphas_cumprod)), last), min(round(high * len(alphas_cumprod)), last)


def with_noise(alphas_cumprod: Tensor, t: Tensor, z: Tensor, generator: torch.Generator) -> Draw:
    """Steps t (b,) as a Draw for z (b, c, h, w), with Gaussian noise of z's dtype."""
    noise = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype).to(z.device)
    return Draw(t.to(z.device), *scales(alphas_cumprod, t, z), noise)


def sample_draw(alphas_cumprod: Tensor, z: Tensor, t_range: tuple[float, float], generator: torch.Generator) -> Draw:
    """Draw t for each row of z (b, c, h, w), uniform in `t_range` (see `step_range`), and Gaussian noise."""
    low, high = step_range(alphas_cumprod, t_range)
    t = torch.randint(low, high + 1, (len(z),), generator=generator, device=generator.device).to(z.device)
    return with_noise(alphas_cumprod, t, z, generator)


def to_eps_x0(output: Tensor, x: Tensor, a: Tensor, s: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(ehat, zhat) from a network's output at x = a z + s noise, whatever it predicts.

    prediction_type: one of PREDICTIONS; `v_prediction` is v = a noise - s z with a^2 + s^2 = 1 (arXiv 2202.00512),
    `flow` is v = noise - z with a + s = 1. Finite also where a or s is 0 (the divided part then means nothing).
    """
    if prediction_type == "epsilon":
        return output, (x - s * output) / a.clamp_min(SMALLEST)
    if prediction_type == "v_prediction":
        return s * x + a * output, a * x - s * output
    if prediction_type == "sample":
        return (x - a * output) / s.clamp_min(SMALLEST), output
    if prediction_type == "flow":
        return x + a * output, x - s * output
    raise ValueError(f"prediction_type: found {prediction_type!r}, expected one of {', '.join(PREDICTIONS)}.")


class Guided(NamedTuple):
    """A network under classifier-free guidance, and the unguided halves that some methods ask for. It is a Denoise."""

    network: Denoise
    null: Text  # one row
    scale: float

    @property
    def rows(self) -> int:
        """Rows that the network sees for each row of x_t."""
        return 1 if self.scale in (0, 1) else 2

    def __call__(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        if self.scale == 1:
            return self.network(x, t, text)
        if self.scale == 0:
            return self.unconditional(x, t)
        return self.mix(*self.halves(x, t, text))

    def unconditional(self, x: Tensor, t: Tensor) -> Tensor:
        """ehat under the null text alone: one row of the network for each row of x."""
        return self.network(x, t, repeat(self.null, len(x)))

    def halves(self, x: Tensor, t: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """ehat under the null text and under `text`, in one network call of 2b rows, null rows first."""
        both = self.network(torch.cat([x, x]), torch.cat([t, t]), stack(repeat(self.null, len(x)), text))
        free, told = both.chunk(2)
        return free, told

    def mix(self, free: Tensor, told: Tensor) -> Tensor:
        """The guided ehat of two halves."""
        return free + self.scale * (told - free)


def guided(denoise: Denoise, null: Text, scale: float) -> Guided:
    """Classifier-free guidance (arXiv 2207.12598): eps_null + scale (eps_text - eps_null), in one network call.

    This is the convention everywhere in splatedit: scale 1 is off, 0 is the null text. Papers that write
    (1 + omega) eps_text - omega eps_null mean scale = 1 + omega. null: one row. The network sees 2b rows, null rows
    first; at scale 1 or 0 only the b rows that count.
    """
    return Guided(denoise, null, scale)


@torch.no_grad()
def denoising_errors(
    denoise: Denoise,
    z: Tensor,
    texts: Sequence[Text],
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    draws: int = 8,
    t_range: tuple[float, float] = (0.2, 0.8),
    rows: int = 32,
) -> Tensor:
    """How badly each text explains each view: mean |noise - ehat|^2, (views, texts). "Diffusion classifier".

    z: (views, c, h, w). texts: one row each. Source: arXiv 2303.16203. The draws of a view, one from each of `draws`
    equal parts of `t_range`, are the same for every text, so that differences along a row are not drowned in noise.
    rows: at most so many go through the network at once.
    """
    errors = z.new_zeros(len(z), len(texts))
    text = stack(*(repeat(one, len(z)) for one in texts))  # text-major: all views of the first text, of the second, ...
    low, high = t_range
    for i in range(draws):
        part = (low + (high - low) * i / draws, low + (high - low) * (i + 1) / draws)
        draw = sample_draw(alphas_cumprod, z, part, generator)
        x, t = draw.noised(z).repeat(len(texts), 1, 1, 1), draw.t.repeat(len(texts))
        pieces = zip(x.split(rows), t.split(rows), *(split(column, rows, len(x)) for column in text), strict=True)
        ehat = torch.cat([denoise(x_, t_, Text(*columns)) for x_, t_, *columns in pieces])
        error = (ehat - draw.noise.repeat(len(texts), 1, 1, 1)).square().flatten(1).mean(1)
        errors += error.view(len(texts), len(z)).T
    return errors / draws


def split(column: Tensor | None, rows: int, total: int) -> Sequence[Tensor | None]:
    """One column of a Text in pieces of `rows`; as many Nones where the column is not there."""
    return [None] * -(-total // rows) if column is None else column.split(rows)


class MixtureDenoiser:
    """The exact denoiser of a mixture of Gaussians: a prior whose every answer is known, with nothing to download.

    p(z | text) = sum_k weight_k N(means_k, U_k diag(v_k) U_k^T + floor I). A text is a set of weights, so classifier-
    free guidance, posterior means and covariances and their gradients are all exact. It is a Denoise.
    means: (k, c, h, w). floor: variance in every direction. directions: (k, c h w, r), orthonormal columns U_k;
    variances: (k, r). Computes in the dtype of `means`.
    """

    def __init__(
        self,
        means: Tensor,
        alphas_cumprod: Tensor | None = None,
        floor: float = 1.0,
        directions: Tensor | None = None,
        variances: Tensor | None = None,
    ):
        self.shape, self.means, self.floor = means.shape[1:], means.flatten(1), floor
        components, size = self.means.shape
        self.directions = means.new_zeros(components, size, 0) if directions is None else directions
        self.variances = means.new_zeros(components, 0) if variances is None else variances
        self.alphas_cumprod = scaled_linear() if alphas_cumprod is None else alphas_cumprod

    def text(self, weights: Sequence[float] | Tensor) -> Text:
        """One row that means these weights of the components, (k,), not all 0; they need not add up to 1."""
        weights = torch.as_tensor(weights, dtype=self.means.dtype)
        assert weights.shape == self.means.shape[:1] and bool((weights >= 0).all()) and float(weights.sum()) > 0
        return Text((weights / weights.sum()).log()[None, None])

    def __call__(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        _, s, share, pull = self.terms(x, t, text)
        return (s * torch.einsum("bk,bkd->bd", share, pull)).view_as(x)

    def posterior(self, x: Tensor, t: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """Mean (b, c, h, w) and covariance (b, d, d), d = c h w, of the clean latents given x = x_t."""
        a, s, share, pull = self.terms(x, t, text)
        along = torch.einsum("bkd,kdr->bkr", pull, self.directions) * self.variances
        centres = self.means + a[..., None] * (torch.einsum("bkr,kdr->bkd", along, self.directions) + self.floor * pull)
        mean = torch.einsum("bk,bkd->bd", share, centres)
        off = self.floor * s**2 / (a**2 * self.floor + s**2)  # (b, 1) variance left outside the directions
        wide = self.variances + self.floor
        on = wide * s[..., None] ** 2 / (a[..., None] ** 2 * wide + s[..., None] ** 2) - off[..., None]
        spread = centres - mean[:, None]
        covariance = torch.einsum("bk,bkr,kdr,ker->bde", share, on, self.directions, self.directions)
        covariance = covariance + torch.einsum("bk,bkd,bke->bde", share, spread, spread)
        return mean.view_as(x), covariance + off[..., None] * torch.eye(mean.shape[1], dtype=mean.dtype)

    def terms(self, x: Tensor, t: Tensor, text: Text) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, s (b, 1), each component's share (b, k) and its P_k^-1 (x - a mean_k) (b, k, d), P_k its covariance."""
        assert x.shape[1:] == self.shape and len(t) == len(x) == len(text.embeds)
        a, s = (scale.view(-1, 1) for scale in scales(self.alphas_cumprod, t, self.means))
        offset = x.flatten(1)[:, None] - a[..., None] * self.means
        base = (a**2 * self.floor + s**2)[..., None]  # (b, 1, 1)
        stretched = a[..., None] ** 2 * self.variances + base  # (b, k, r)
        along = torch.einsum("bkd,kdr->bkr", offset, self.directions) * (1 - base / stretched)
        pull = (offset - torch.einsum("bkr,kdr->bkd", along, self.directions)) / base
        rest = self.means.shape[1] - self.variances.shape[1]
        volume = stretched.log().sum(-1) + rest * base[..., 0].log()
        likelihood = -0.5 * ((offset * pull).sum(-1) + volume)
        return a, s, torch.softmax(likelihood + text.embeds[:, 0], -1), pull
