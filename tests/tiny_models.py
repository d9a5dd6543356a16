"""Untrained pipelines of the real diffusers classes, made on the fly and small enough for a test."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

SIDE, LONGEST = 16, 24  # pixels of a picture, tokens of a prompt
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter, so that every prompt has its own embeddings."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    letters = {c: i + 3 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<start>": 1, "<end>": 2, **letters}, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<start>", eos_token="<end>", pad_token="<pad>", model_max_length=LONGEST
    )


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=30,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        projection_dim=width,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def unet(**more: Any) -> UNet2DConditionModel:
    options: dict[str, Any] = {
        "sample_size": SIDE // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**{**options, **more})


def autoencoder(kind: str = "kl", **more: Any):
    """Factor 2, four latent channels; kind: "kl" or "tiny"."""
    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            **more,
        )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=SIDE, **{**blocks, **more})


def sd(prediction: str = "epsilon", scheduler: type = DDIMScheduler, vae: Any = None, seed: int = 0, **schedule: Any):
    """A StableDiffusionPipeline; the same seed gives the same networks whatever the other arguments."""
    torch.manual_seed(seed)
    net, text = unet(), CLIPTextModel(text_config(16))
    return StableDiffusionPipeline(
        unet=net,
        text_encoder=text,
        vae=vae or autoencoder(),
        tokenizer=tokenizer(),
        scheduler=scheduler(**{**SCHEDULE, "prediction_type": prediction, **schedule}),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def sdxl(seed: int = 0, scheduler: type = DDIMScheduler, **pipeline: Any) -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline: two text encoders, pooled embedding, six sizes."""
    torch.manual_seed(seed)
    net = unet(
        cross_attention_dim=16 + 32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return StableDiffusionXLPipeline(
        unet=net,
        text_encoder=CLIPTextModel(text_config(16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(32)),
        vae=autoencoder(force_upcast=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=scheduler(**SCHEDULE),
        **pipeline,
    )


def pocket_folder(folder: Path, names: tuple[str, ...] = ("cat", "pig", "elephant"), seed: int = 0) -> Path:
    """A folder as `splatedit.pocket.train` exports it, with untrained networks of the real size."""
    from splatedit.pocket.train import export, new_text_encoder, new_tokenizer, new_unet, new_vae

    torch.manual_seed(seed)
    words = new_tokenizer(names)
    export(folder, new_vae(), new_unet(), new_text_encoder(len(words)), words, 1.25, names)
    return folder
