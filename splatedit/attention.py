"""What the self-attention layers of a diffusers UNet put out, read through its attention processors."""

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


@contextmanager
def self_attention(unet: Any, part: str = "up_blocks") -> Iterator[list[Tensor]]:
    """A list that receives, at each call of `unet`, the outputs of the self-attention layers of one part of it.

    Each is (rows, tokens, channels) after the output projection, in the network's type, in the order of the layers, and
    part of the graph if gradients are on. Afterwards, also after an exception, the UNet has its own processors back.
    Raises InputError if that part has no self-attention.
    """
    before = unet.attn_processors
    chosen = [name for name in before if name.startswith(f"{part}.") and name.endswith("attn1.processor")]
    if not chosen:
        raise InputError(f"unet: no self-attention in its {part}; cds compares what comes out of it, use dds or ids.")
    outputs: list[Tensor] = []
    try:
        unet.set_attn_processor({k: Recorder(p, outputs) if k in chosen else p for k, p in before.items()})
        yield outputs
    finally:
        unet.set_attn_processor(dict(before))
