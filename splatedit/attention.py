"""What the attention layers of a diffusers UNet put out or look at, read through its attention processors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from splatedit.errors import InputError


class Recorder:
    """An attention processor that does what another one does and keeps what comes out."""

    def __init__(self, processor: Any, outputs: list[Tensor]):
        self.processor, self.outputs = processor, outputs

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.processor(attn, hidden_states, *args, **kwargs)
        self.outputs.append(output)
        return output


class Watcher:
    """An attention processor that does what another one does and keeps where cross-attention looks."""

    def __init__(self, processor: Any, weights: list[Tensor]):
        self.processor, self.weights = processor, weights

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        text = encoder_hidden_states
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query, key = (attn.head_to_batch_dim(part) for part in (attn.to_q(hidden_states), attn.to_k(text)))
        looks = attn.get_attention_scores(query, key, attention_mask)
        self.weights.append(looks.unflatten(0, (len(hidden_states), attn.heads)).mean(1))
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


@contextmanager
def cross_attention(unet: Any) -> Iterator[list[Tensor]]:
    """A list that receives, at each call of `unet`, where each of its cross-attention layers looks.

    Each is (rows, places, tokens), the mean over heads, adding up to 1 over the tokens. Afterwards, also after an
    exception, the UNet has its own processors back. Raises InputError if it has no cross-attention.
    """
    chosen = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    if not chosen:
        raise InputError("unet: no cross-attention, so no word has a place in the picture; use mask_text_by=scores.")
    with replaced(unet, chosen, Watcher) as weights:
        yield weights


@contextmanager
def self_attention(unet: Any, part: str = "up_blocks") -> Iterator[list[Tensor]]:
    """A list that receives, at each call of `unet`, the outputs of the self-attention layers of one part of it.

    Each is (rows, tokens, channels) after the output projection, in the network's type, in the order of the layers, and
    part of the graph if gradients are on. Afterwards, also after an exception, the UNet has its own processors back.
    Raises InputError if that part has no self-attention.
    """
    chosen = [name for name in unet.attn_processors if name.startswith(f"{part}.") and name.endswith("attn1.processor")]
    if not chosen:
        raise InputError(f"unet: no self-attention in its {part}; cds compares what comes out of it, use dds or ids.")
    with replaced(unet, chosen, Recorder) as outputs:
        yield outputs


@contextmanager
def replaced(unet: Any, chosen: list[str], kind: type[Recorder] | type[Watcher]) -> Iterator[list[Tensor]]:
    """The list that processors of this kind fill in the place of the chosen ones; afterwards all are as before."""
    before, kept = unet.attn_processors, []
    try:
        unet.set_attn_processor({k: kind(p, kept) if k in chosen else p for k, p in before.items()})
        yield kept
    finally:
        unet.set_attn_processor(dict(before))
