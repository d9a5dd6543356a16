"""Which Gaussians an edit is about, found by the model itself: `measure(...)` gives each one's relevance.

Where the model answers differently to the two prompts, or where a word's attention lies, is a map of each view; the
maps are carried over to the Gaussians by `render.lift`, one backward pass of the rasteriser, and no further network is
asked. In 2D the first is DiffEdit (arXiv 2210.11427), in 3D Watch Your Steps (arXiv 2308.08947) with a model that
follows instructions; the second is of Prompt-to-Prompt (arXiv 2208.01626) and DAAM (arXiv 2210.04885).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.diffusion import Denoise, Draw, Text, repeat, sample_draw, stack
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.masks import Relevance
from splatedit.render import fill_unseen, lift, render
from splatedit.scenes import nearest

if TYPE_CHECKING:
    from rich.console import Console

    from splatedit.priors import Prior
    from splatedit.work import Work

VIEWS = 24  # cameras looked through
DRAWS = 6  # noise levels at which each view is looked at, at least 2
T_RANGE = (0.4, 0.7)  # fractions of the schedule; benchmarks/relevance.py compares others
BLUR = 0.6  # standard deviation in pixels of the latents
NEIGHBOURS = 16  # Gaussians that a relevance is averaged over
ROWS = 32  # pictures that go through the network at once
GRID = 16  # side of the attention maps that are read, where a network has several (arXiv 2208.01626)
AGREE, STAND_OUT = 0.5, 1.15  # below these a relevance is noise, or flat: see `threshold`


class Measured(NamedTuple):
    """What the views say about each Gaussian, and how far to trust it."""

    values: Tensor  # (n,) float32, at least 0; 1 is the 95th percentile
    agreement: float  # of two halves of the draws: correlation, stepped up to all of them (Spearman-Brown); up to 1
    cut: float  # by Otsu
    contrast: float  # mean above the cut over mean below


# --------------------------------------------------------------------------------------------------- maps of the views
def each_draw(z: Tensor, table: Tensor, generator: torch.Generator, look: Callable[[Draw, Tensor], Tensor]) -> Tensor:
    """Maps (v, DRAWS, h, w) of z (v, c, h, w): `look` at noised latents, a few rows at a time.

    The draws of a view come one from each equal part of T_RANGE. Each draw is divided by its mean over all views,
    because what is looked at grows many times over along the schedule.
    """
    low, high = T_RANGE
    maps = []
    for i in range(DRAWS):
        part = (low + (high - low) * i / DRAWS, low + (high - low) * (i + 1) / DRAWS)
        draw = sample_draw(table, z, part, generator)
        rows = torch.arange(len(z), device=z.device).split(ROWS // 2)
        seen = torch.cat([look(draw.pick(some), some) for some in rows]).float()
        maps.append(seen / seen.mean().clamp_min(torch.finfo(seen.dtype).tiny))
    return torch.stack(maps, 1)


@torch.no_grad()
def score_maps(
    denoise: Denoise, z: Tensor, target: Text, source: Text, table: Tensor, generator: torch.Generator
) -> Tensor:
    """|ehat(target) - ehat(source)| over the channels at the same noised latents: (v, DRAWS, h, w).

    z: (v, c, h, w). target, source: one row each. denoise: without guidance, which only scales the difference. table:
    alphas_cumprod.
    """

    def look(draw: Draw, rows: Tensor) -> Tensor:
        x = draw.noised(z[rows])
        text = stack(repeat(target, len(x)), repeat(source, len(x)))
        one, other = denoise(torch.cat([x, x]), torch.cat([draw.t, draw.t]), text).chunk(2)
        return (one - other).norm(dim=1)

    return each_draw(z, table, generator, look)


@torch.no_grad()
def attention_maps(prior: Prior, z: Tensor, prompt: str, tokens: list[int], generator: torch.Generator) -> Tensor:
    """How much each place of the latents z (v, c, h, w) attends to some tokens of a prompt: (v, DRAWS, h, w).

    Mean over heads and over the cross-attention layers whose grid is nearest GRID a side, brought to the latents' size.
    """
    text, (height, width) = prior.text([prompt]), z.shape[-2:]

    def look(draw: Draw, rows: Tensor) -> Tensor:
        with prior.cross_attention() as layers:
            prior.denoise(draw.noised(z[rows]), draw.t, repeat(text, len(rows)))
        near = min((abs(math.log(math.sqrt(layer.shape[1]) / GRID)), layer.shape[1]) for layer in layers)[1]
        seen = torch.stack([layer[:, :, tokens].sum(2) for layer in layers if layer.shape[1] == near]).mean(0)
        shrunk = math.sqrt(height * width / near)
        grid = seen.float().view(len(rows), 1, round(height / shrunk), round(width / shrunk))
        return F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)[:, 0]

    return each_draw(z, prior.alphas_cumprod, generator, look)


def by_scores(prior: Prior, z: Tensor, prompt: str, source: str, generator: torch.Generator) -> Tensor:
    """Where the model's answers to the two prompts differ: (v, DRAWS, h, w)."""
    texts = prior.text([prompt]), prior.text([source])
    return score_maps(prior.denoise, z, *texts, prior.alphas_cumprod, generator)


def by_attention(prior: Prior, z: Tensor, prompt: str, source: str, generator: torch.Generator) -> Tensor:
    """Where the attention to those words lies in which the two prompts differ: (v, DRAWS, h, w); raises InputError."""
    maps = []
    for text, other in ((source, prompt), (prompt, source)):
        own = different(*(token_ids(prior, one) for one in (text, other)))
        if own:
            maps.append(attention_maps(prior, z, text, own, generator))
    if not maps:
        raise InputError(f"mask_text: {prompt!r} and {source!r} are the same to the model; nothing is to change.")
    return torch.stack(maps).mean(0)


MAPS: dict[str, Callable[..., Tensor]] = {"scores": by_scores, "attention": by_attention}


# -------------------------------------------------------------------------------------------------------------- tokens
def token_ids(prior: Prior, prompt: str, special: bool = True) -> list[int]:
    """The tokens of a prompt; special: with those that open and end it, as the model sees them."""
    tokenizer = getattr(prior.pipeline, "tokenizer", None) or prior.pipeline.tokenizer_2
    return list(tokenizer(prompt, add_special_tokens=special).input_ids)


def different(tokens: list[int], other: list[int]) -> list[int]:
    """Places in `tokens` of what is not in `other`, both aligned as in arXiv 2208.01626."""
    steps = difflib.SequenceMatcher(None, tokens, other, autojunk=False).get_opcodes()
    return [place for kind, low, high, *_ in steps if kind != "equal" for place in range(low, high)]


def places(prior: Prior, prompt: str, words: str) -> list[int]:
    """Places of all occurrences of words, several parted by commas, among the tokens of a prompt; raises InputError."""
    tokens, found = token_ids(prior, prompt), []
    for word in filter(None, map(str.strip, words.split(","))):
        wanted = token_ids(prior, word, special=False)
        starts = [i for i in range(len(tokens)) if wanted and tokens[i : i + len(wanted)] == wanted]
        if not starts:
            raise InputError(
                f"mask_text: {word!r} is not in the source prompt {prompt!r}; name words of it, or say auto. "
                "--source-prompt may describe the scene in more words."
            )
        found += [i + k for i in starts for k in range(len(wanted))]
    if not found:
        raise InputError("mask_text: it is empty; say auto, or words of the source prompt.")
    return sorted(set(found))


# --------------------------------------------------------------------------------------------------------- to Gaussians
@torch.no_grad()
def measure(gaussians: Gaussians, cameras: Cameras, maps: Tensor) -> Measured:
    """Relevance of each Gaussian from maps (v, draws, h, w) of all cameras, two draws at least, of any size.

    The maps are blurred, brought to the cameras' size and lifted; Gaussians that no camera sees take the mean of the
    nearest that are seen; each is averaged over its neighbours.
    """
    halves = torch.stack([maps[:, ::2].mean(1), maps[:, 1::2].mean(1)], 1)
    size = (cameras.height, cameras.width)
    halves = F.interpolate(blurred(halves, BLUR), size=size, mode="bilinear", align_corners=False)
    lifted = lift(gaussians, cameras, halves)
    values = fill_unseen(lifted.mean(), lifted.seen, gaussians.means)
    values = values[nearest(gaussians.means, NEIGHBOURS)].mean(1) if gaussians.n > 1 else values
    spread = values.std(0, correction=0)
    together = values - values.mean(0)
    halved = float(together.prod(1).mean() / spread.prod()) if bool((spread > 0).all()) else 0.0
    mean = values.mean(1).float().cpu()
    mean = mean / max(float(np.quantile(mean.numpy(), 0.95)), torch.finfo(mean.dtype).tiny)
    return Measured(mean, 2 * halved / (1 + halved) if halved > -0.3 else -1.0, *otsu(mean))


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """Maps (v, k, h, w) under a Gaussian of standard deviation `sigma` pixels, edges continued."""
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device) / sigma) ** 2)
    weights = (weights / weights.sum()).expand(maps.shape[1], 1, -1)
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, weights[:, :, None], groups=maps.shape[1])
    return F.conv2d(across, weights[..., None], groups=maps.shape[1])


def otsu(values: Tensor) -> tuple[float, float]:
    """The cut of values (n,) that parts them best in two (Otsu 1979), and the mean above it over the mean below.

    Exact, no histogram. The best cut has the largest variance between the two parts and lies half way between two
    values. Equal values cannot be parted: the cut is then their own, the ratio 1.
    """
    ordered = values.double().sort().values
    n = len(ordered)
    below = torch.arange(1, n, dtype=torch.float64)
    total = ordered.cumsum(0)[:-1]
    low, high = total / below, (ordered.sum() - total) / (n - below)
    between = below * (n - below) * (high - low).square()
    if n < 2 or float(between.max()) <= 1e-12 * float(ordered.square().sum()) * n:
        return float(ordered[-1]), 1.0
    best = int(between.argmax())
    return float(ordered[best] + ordered[best + 1]) / 2, float(high[best] / low[best].clamp_min(1e-12))


def threshold(measured: Measured, given: float | None = None) -> float:
    """The relevance above which a Gaussian may change: the one that is given, else `measured.cut`.

    Raises InputError where a cut would mean nothing: if the halves of the draws do not agree (below AGREE), what was
    measured is noise; if the parts differ by less than STAND_OUT times, nothing stands out, as where all of the scene
    has to change.
    """
    if given is not None:
        return given
    advice = "say where yourself, by --mask-box, say, or set mask_threshold (1 is the 95th percentile)"
    if measured.agreement < AGREE:
        found = f"two halves of the looks agree by {max(measured.agreement, 0):.2f} only, expected {AGREE} of 1 or more"
        raise InputError(f"mask_text: the model does not say where the edit is ({found}); {advice}.")
    if measured.contrast < STAND_OUT:
        found = f"{measured.contrast:.2f} times as relevant as the rest, expected {STAND_OUT} or more"
        raise InputError(
            f"mask_text: nothing stands out, the edit is about all of the scene (the best part is {found}); leave the "
            f"mask out, or {advice}."
        )
    return measured.cut


# ------------------------------------------------------------------------------------------------------------- of a run
def ask(work: Work, console: Console) -> Relevance:
    """The mask that mask_text of a work's settings asks for; raises InputError if the model cannot tell."""
    config, prior = work.config, work.prior
    words = (config.mask_text or "").strip()
    if words == "auto" and not config.prompt.strip():
        raise InputError("mask_text: auto compares two prompts; say what the scene shall show (--prompt).")
    chosen = None if words == "auto" else places(prior, work.source_prompt, words)
    gaussians, cameras = work.gaussians.to(prior.device), views(work)
    with console.status("asking the model what the edit is about"), torch.no_grad():
        generator = torch.Generator(prior.device).manual_seed(config.seed)
        pictures = [render(gaussians, cameras.pick([i]), work.background).rgb for i in range(cameras.n)]
        z = torch.cat([prior.encode(picture) for picture in pictures])
        if chosen is None:
            maps = MAPS[config.mask_text_by](prior, z, config.prompt, work.source_prompt, generator)
        else:
            maps = attention_maps(prior, z, work.source_prompt, chosen, generator)
        measured = measure(gaussians, cameras, maps)
    what = words if chosen is not None else f"{work.source_prompt!r} to {config.prompt!r}"
    return Relevance(measured.values.numpy(), threshold(measured, config.mask_threshold), what)


def views(work: Work) -> Cameras:
    """At most VIEWS of the run's cameras, evenly chosen."""
    from splatedit.editing import rig_for
    from splatedit.work import cameras_of_edit

    cameras = rig_for(work.gaussians, cameras_of_edit(work)["cameras"], VIEWS, work.prior.image_size, work.up)
    return cameras.pick(torch.linspace(0, cameras.n - 1, min(VIEWS, cameras.n)).round().long())
