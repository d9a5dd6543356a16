"""Train `pocket` from the CC0 meshes: `python -m splatedit.pocket.train --meshes FOLDER --work FOLDER`.

Stages, each resumable from its checkpoint in the work folder: pictures -> autoencoder -> latents -> denoiser (with its
text encoder) -> export as an ordinary diffusers folder. The learning rate of a stage follows the larger of two clocks,
steps done and minutes spent, so that a stage can be given a time budget on a slow machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splatedit.model_files import write_checksums
from splatedit.pocket import FOLDER
from splatedit.pocket.meshes import VIEWS
from splatedit.pocket.views import COLORS, Pictures, caption, make_pictures

SIZE = 128  # pixels of a picture
MAX_TOKENS = 16
DROP_PROMPT, DROP_ATTRIBUTE = 0.12, 0.5
WORDS = ("view", "on", "background", "photo", "of", "the", "and", "with", "picture", "toy", "animal")


# ------------------------------------------------------------------------------------------------ the parts, untrained
def new_vae() -> Any:
    """diffusers' AutoencoderTiny, factor 8, 4 channels: convolutions only, so its gradients stay local and cheap."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(48,) * 4,
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 2, 1, 0),
        latent_channels=4,
    )


def new_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=32,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def new_tokenizer(names: tuple[str, ...]):
    """A word-level tokenizer: lower case, punctuation dropped, <start> words <end>, padded to MAX_TOKENS."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "an", *VIEWS, *COLORS, *WORDS, *names]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_TOKENS,
    )


def new_text_encoder(tokens: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def new_scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# --------------------------------------------------------------------------------------------------------- the stages
class Clock:
    """How far a stage is, in [0, 1]: by steps or by minutes, whichever is further. Survives a restart."""

    def __init__(self, steps: int, minutes: float):
        self.steps, self.minutes, self.step, self.spent, self.last = steps, minutes, 0, 0.0, time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        self.step, self.spent, self.last = self.step + 1, self.spent + now - self.last, now
        return self.fraction

    @property
    def fraction(self) -> float:
        return min(1.0, max(self.step / self.steps, self.spent / 60 / self.minutes))


class Average:
    """Exponential moving average of the weights of some modules, with a warm-up."""

    def __init__(self, modules: list[nn.Module], decay: float = 0.999):
        self.modules, self.decay = [copy.deepcopy(m).requires_grad_(False) for m in modules], decay

    @torch.no_grad()
    def update(self, modules: list[nn.Module], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, module in zip(self.modules, modules, strict=True):
            for p, q in zip(mean.parameters(), module.parameters(), strict=True):
                p.lerp_(q, 1 - decay)


def save_checkpoint(path: Path, **state) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def pictures(work: Path, meshes: Path, per_mesh: int, seed: int) -> Pictures:
    path = work / f"pictures-{seed}.npz"
    if not path.exists():
        made = make_pictures(meshes, per_mesh, SIZE, seed)
        np.savez(path.with_suffix(".tmp.npz"), images=made.images, labels=made.labels, names=np.array(made.names))
        path.with_suffix(".tmp.npz").replace(path)
    with np.load(path) as file:
        return Pictures(file["images"], file["labels"], tuple(str(n) for n in file["names"]))


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (b, h, w, 3) -> float (b, 3, h, w) in [-1, 1], channels last."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return x.contiguous(memory_format=torch.channels_last)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]


def vae_loss(vae: Any, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """L1 + 0.5 L2 + L1 of the picture's gradients, and a weak pull of the latents to mean 0, size 1."""
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.encode(x).latents.float()
        back = vae.decode(z + 0.05 * torch.randn(z.shape, generator=generator)).sample
    back = back.float()
    edge = sum((a - b).abs().mean() for a, b in zip(edges(back), edges(x), strict=True))
    pull = 1e-3 * z.square().mean() + 1e-2 * z.mean((0, 2, 3)).square().mean()
    error = back - x
    return error.abs().mean() + 0.5 * error.square().mean() + edge + pull, error.detach().square().mean() / 4


def train_vae(data: Pictures, work: Path, steps: int, minutes: float, seed: int) -> Any:
    path, clock = work / "vae.pt", Clock(steps, minutes)
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    average, optimizer = Average([vae], 0.998), torch.optim.AdamW(vae.parameters(), 1e-3, weight_decay=1e-4)
    rng = torch.Generator().manual_seed(seed)
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.modules[0].load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"])
        clock.step, clock.spent = state["step"], state["spent"]
    mse = 0.0
    while clock.fraction < 1:
        index = torch.randint(len(data.images), (16,), generator=rng).numpy()
        loss, error = vae_loss(vae, to_tensor(data.images[index]), rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        fraction = clock.tick()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, clock.step / 100) * (1 - fraction) ** 0.8 + 1e-6
        optimizer.step()
        average.update([vae], clock.step)
        mse = 0.98 * mse + 0.02 * float(error) if clock.step > 1 else float(error)
        if clock.step % 100 == 0:
            print(f"vae {clock.step} {clock.spent:.0f}s psnr {-10 * math.log10(mse):.2f}", flush=True)
        if clock.step % 500 == 0 or fraction >= 1:
            mean = average.modules[0].state_dict()
            state = {"vae": vae.state_dict(), "mean": mean, "optimizer": optimizer.state_dict()}
            save_checkpoint(path, **state, rng=rng.get_state(), step=clock.step, spent=clock.spent)
    return average.modules[0].eval()


@torch.no_grad()
def encode_all(vae, images: np.ndarray) -> Tensor:
    parts = [vae.encode(to_tensor(images[i : i + 64])).latents.half() for i in range(0, len(images), 64)]
    return torch.cat(parts)


def random_captions(labels: np.ndarray, names: tuple[str, ...], rng: torch.Generator) -> list[str]:
    """Captions of a batch: view and background each left out half the time, everything one time in eight."""
    chance = torch.rand(len(labels), 3, generator=rng)
    prompts = []
    for (animal, view, color), (all_, v, c) in zip(labels.tolist(), chance.tolist(), strict=True):
        view_word = VIEWS[view] if v > DROP_ATTRIBUTE else None
        color_word = COLORS[color] if c > DROP_ATTRIBUTE else None
        prompts.append("" if all_ < DROP_PROMPT else caption(names[animal], view_word, color_word))
    return prompts


def embed(text_encoder, tokenizer, prompts: list[str]) -> Tensor:
    words = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return text_encoder(words.input_ids)[0]


@torch.no_grad()
def draw_samples(unet, text, tokenizer, vae, scale: float, prompts: list[str], path: Path, steps: int = 20) -> None:
    """A sample sheet to look at while training: one picture of each prompt from the same noise, guidance scale 3."""
    from PIL import Image

    schedule, side = new_scheduler(), unet.config.sample_size
    schedule.set_timesteps(steps)
    told = embed(text, tokenizer, [""] * len(prompts) + prompts)
    z = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(0))
    for t in schedule.timesteps:
        free, asked = unet(torch.cat([z, z]), t, told).sample.chunk(2)
        z = schedule.step(free + 3 * (asked - free), t, z).prev_sample
    pictures = vae.decode(z / scale).sample.clamp(-1, 1)
    sheet = torch.cat(list(pictures), 2).permute(1, 2, 0).add(1).mul(127.5)
    Image.fromarray(sheet.byte().numpy()).save(path)


def train_denoiser(
    data: Pictures, latents: Tensor, work: Path, steps: int, minutes: float, seed: int, every: float, show=None
):
    """Epsilon prediction on latents scaled to size 1; AdamW, EMA, a checkpoint every `every` minutes.

    show: called with the averaged unet, text encoder, tokenizer and the step at each checkpoint.
    """
    path, clock = work / "denoiser.pt", Clock(steps, minutes)
    torch.manual_seed(seed)
    tokenizer, schedule = new_tokenizer(data.names), new_scheduler()
    unet, text = new_unet().to(memory_format=torch.channels_last), new_text_encoder(len(tokenizer))
    modules: list[nn.Module] = [unet, text]
    parameters = [p for m in modules for p in m.parameters()]
    average, optimizer = Average(modules), torch.optim.AdamW(parameters, 5e-4, weight_decay=1e-4)
    rng = torch.Generator().manual_seed(seed)
    curve: list[tuple[int, float]] = []
    if path.exists():
        state = torch.load(path, weights_only=True)
        for m, s in zip([*modules, *average.modules], state["modules"], strict=True):
            m.load_state_dict(s)
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"])
        clock.step, clock.spent, curve = state["step"], state["spent"], [tuple(c) for c in state["curve"]]
    batch, smooth, saved = 48, curve[-1][1] if curve else 1.0, time.monotonic()
    while clock.fraction < 1:
        index = torch.randint(len(latents), (batch,), generator=rng)
        z = latents[index].float()
        prompts = random_captions(data.labels[index.numpy()], data.names, rng)
        t = torch.randint(0, 1000, (batch,), generator=rng)
        noise = torch.randn(z.shape, generator=rng)
        noised = schedule.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(unet(noised, t, embed(text, tokenizer, prompts)).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        fraction = clock.tick()
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1, clock.step / 200) * (1 - fraction) ** 0.7 + 1e-6
        optimizer.step()
        average.update(modules, clock.step)
        smooth = 0.98 * smooth + 0.02 * float(loss.detach())
        if clock.step % 50 == 0:
            curve.append((clock.step * batch, round(smooth, 5)))
            print(f"unet {clock.step} {clock.spent:.0f}s loss {smooth:.4f}", flush=True)
        if time.monotonic() - saved > every * 60 or fraction >= 1:
            saved = time.monotonic()
            states = [m.state_dict() for m in [*modules, *average.modules]]
            state = {"modules": states, "optimizer": optimizer.state_dict(), "rng": rng.get_state()}
            save_checkpoint(path, **state, step=clock.step, spent=clock.spent, curve=curve)
            if show is not None:
                show(*average.modules, tokenizer, clock.step)
    return average.modules[0].eval(), average.modules[1].eval(), tokenizer, curve


# -------------------------------------------------------------------------------------------------------- the product
def export(folder: Path, vae, unet, text, tokenizer, scale: float, names: tuple[str, ...]) -> None:
    """Write an ordinary diffusers folder in half precision, with the vocabulary beside it."""
    from diffusers import StableDiffusionPipeline

    vae.register_to_config(scaling_factor=scale)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        image_encoder=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    copy.deepcopy(pipeline).to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    vocabulary = {"prompts": [caption(n) for n in names], "words": words, "image_size": SIZE}
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary, indent=1) + "\n")
    write_checksums(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--meshes", type=Path, required=True, help="folder of the 24 Cube Pets .glb files (CC0)")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and pictures; resumes from here")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the diffusers folder to write")
    parser.add_argument("--per-mesh", type=int, default=1400, help="pictures of each mesh")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--vae-minutes", type=float, default=24)
    parser.add_argument("--unet-steps", type=int, default=20000)
    parser.add_argument("--unet-minutes", type=float, default=80)
    parser.add_argument("--every", type=float, default=10, help="minutes between checkpoints of the denoiser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    data = pictures(args.work, args.meshes, args.per_mesh, args.seed)
    print(f"{len(data.images)} pictures of {len(data.names)} animals", flush=True)
    vae = train_vae(data, args.work, args.vae_steps, args.vae_minutes, args.seed)
    latents = encode_all(vae, data.images).float()
    scale = float(1 / latents.std())
    print(f"latents: mean {latents.mean((0, 2, 3)).tolist()}, scaling factor {scale:.4f}", flush=True)
    latents = (latents * scale).half()

    def show(unet, text, tokenizer, step: int) -> None:
        prompts, path = [caption(n) for n in data.names], args.work / f"samples-{step:06d}.png"
        draw_samples(unet, text, tokenizer, vae, scale, prompts, path)

    unet, text, tokenizer, curve = train_denoiser(
        data, latents, args.work, args.unet_steps, args.unet_minutes, args.seed, args.every, show
    )
    (args.work / "curve.json").write_text(json.dumps(curve))
    export(args.output, vae, unet, text, tokenizer, scale, data.names)


if __name__ == "__main__":
    main()
