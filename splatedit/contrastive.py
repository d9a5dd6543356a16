"""Contrastive denoising score: DDS, and patches of the edit that shall find their own place in the source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from splatedit.diffusion import Draw, Guided
from splatedit.score import Request, slope, target_and_source, weighed

Record = Callable[[], AbstractContextManager[list[Tensor]]]  # see attention.self_attention


def cds(
    denoise: Guided,
    z: Tensor,
    draw: Draw,
    request: Request,
    *,
    record: Record,
    generator: torch.Generator,
    weight: str = "uniform",
    contrast: float = 3.0,
    patches: int = 256,
    temperature: float = 0.07,
) -> Tensor:
    """Contrastive denoising score (arXiv 2311.18608): DDS plus `contrast` h w / 2000 times the gradient of `patch_nce`.

    record: collects features while the denoiser's network runs. Those of the source come out of the DDS call, those of
    the edit from one more pass under the target text, unguided, with gradients. The factor is that of the official
    code, which multiplies its DDS loss by 2000 / (h w). generator: draws the patches.
    """
    b = len(z)
    with record() as seen:
        target, source = target_and_source(denoise, z, draw, request)
        if request.source_score is not None:  # then the source was not in that call
            denoise.network(draw.noised(request.z_source), draw.t, request.source)
    with torch.enable_grad():
        edited = z.detach().requires_grad_()
        with record() as features:
            denoise.network(draw.noised(edited), draw.t, request.target)
        reference = [layer[-b:] for layer in seen[-len(features) :]]  # rows of the source under its text come last
        loss = patch_nce(reference, features, (z.shape[-2], z.shape[-1]), generator, patches, temperature)
        pull = slope(loss, edited)
    return weighed(target - source, draw, weight) + contrast * z.shape[-2] * z.shape[-1] / 2000 * pull


def patch_nce(
    reference: Sequence[Tensor],
    features: Sequence[Tensor],
    size: tuple[int, int],
    generator: torch.Generator,
    patches: int = 256,
    temperature: float = 0.07,
) -> Tensor:
    """PatchNCE (CUT, arXiv 2007.15651) of each sample, (b,): summed over layers and patches of 1x1 and 2x2 tokens.

    reference, features: layers (b, tokens, channels) on maps that come from a latent of `size` (h, w) by halving. Up to
    `patches` places of each map are drawn, the same for all samples. A place of the reference, which gets no gradient,
    has to single out the same place of `features` among all of them. Computed in float32 (or better).
    """
    total = features[0].new_zeros(len(features[0]), dtype=torch.float32)
    for old, new in zip(reference, features, strict=True):
        h, w = map_size(new.shape[1], size)
        for side in (1, 2):
            if side > min(h, w):
                continue
            query, keys = (pooled(part, h, w, side) for part in (old.detach(), new))
            count = query.shape[1]
            if count > patches:
                chosen = torch.randperm(count, generator=generator, device=generator.device)[:patches].to(query.device)
                query, keys = query[:, chosen], keys[:, chosen]
            logits = keys @ query.mT / temperature  # (b, keys, queries): a query chooses among the keys
            same = torch.arange(logits.shape[2], device=logits.device).expand(len(logits), -1)
            total = total + F.cross_entropy(logits, same, reduction="none").mean(1)
    return total


def pooled(layer: Tensor, h: int, w: int, side: int) -> Tensor:
    """Means over squares of side x side tokens of (b, h w, c), as unit vectors (b, places, c)."""
    image = layer.to(torch.promote_types(layer.dtype, torch.float32)).mT.unflatten(2, (h, w))
    return F.normalize(F.avg_pool2d(image, side).flatten(2).mT, dim=2)


def map_size(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer of so many tokens, in a network that halves latents of `size` (rounding up)."""
    h, w = size
    while h * w > tokens:
        h, w = -(-h // 2), -(-w // 2)
    assert h * w == tokens, f"{tokens} tokens are no map of latents {size[0]}x{size[1]}"
    return h, w
