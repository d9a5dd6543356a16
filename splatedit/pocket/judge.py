"""An independent judge of `pocket`: a small classifier that never sees the training pictures, and the model card.

`python -m splatedit.pocket.judge --meshes FOLDER --work FOLDER` trains the judge on renders drawn with another seed,
samples the model from pure noise with the stock diffusers pipeline, and writes confusion, sample sheet and model card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from splatedit.pocket import FOLDER
from splatedit.pocket.train import caption, pictures
from splatedit.pocket.views import Pictures

HELD_OUT_SEED = 1000
JUDGE = "judge.safetensors"


class Judge(nn.Module):
    """Pictures (b, 3, h, w) in [0, 1] -> logits (b, animals). Looks at 64x64 pixels, whatever it is given."""

    def __init__(self, animals: int):
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], animals)

    def forward(self, images: Tensor) -> Tensor:
        small = F.interpolate(images, (64, 64), mode="area") if images.shape[-1] > 64 else images
        return self.head(self.body(small * 2 - 1).mean((2, 3)))


def load_judge(folder: Path = FOLDER) -> tuple[Judge, tuple[str, ...]]:
    """The trained judge and the names of its classes, in the order of its logits."""
    from safetensors.torch import load_file

    names = tuple(json.loads((folder / "judge.json").read_text())["names"])
    judge = Judge(len(names))
    judge.load_state_dict({k: v.float() for k, v in load_file(folder / JUDGE).items()})
    return judge.eval().requires_grad_(False), names


def train_judge(data: Pictures, seed: int, epochs: int = 8) -> tuple[Judge, float]:
    """Train on 90 % of `data`, return the judge and its accuracy on the rest."""
    torch.manual_seed(seed)
    judge, rng = Judge(len(data.names)), torch.Generator().manual_seed(seed)
    images = F.interpolate(torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255, (64, 64), mode="area")
    labels = torch.from_numpy(data.labels[:, 0])
    order = torch.randperm(len(images), generator=rng)
    held, used = order[: len(order) // 10], order[len(order) // 10 :]
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=1e-3)
    steps = epochs * len(used) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        index = used[torch.randint(len(used), (64,), generator=rng)]
        loss = F.cross_entropy(judge(augment(images[index], rng)), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()
    with torch.no_grad():
        accuracy = float((judge(images[held]).argmax(1) == labels[held]).float().mean())
    return judge, accuracy


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Blur half of them, then noise, gain and shift: generated pictures are softer and noisier than renders."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    pick = torch.rand(len(images), 1, 1, 1, generator=rng)
    images = torch.where(pick < 0.5, images, blurred)
    gain = 1 + 0.08 * torch.randn(len(images), 3, 1, 1, generator=rng)
    return (images * gain + 0.03 * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def sample(folder: Path, prompts: list[str], each: int, seed: int, steps: int = 40, scale: float = 3.0) -> Tensor:
    """Pictures (prompts * each, 3, h, w) in [0, 1] from pure noise, by the stock diffusers pipeline."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(prompts), 4):
        out = pipeline(
            prompts[start : start + 4],
            num_images_per_prompt=each,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=generator,
            output_type="pt",
        )
        parts.append(out.images)  # pyright: ignore[reportAttributeAccessIssue]
    return torch.cat(parts).float().clamp(0, 1)


def confusion(judge: Judge, images: Tensor, animals: int, each: int) -> np.ndarray:
    """(animals, animals) counts: row asked for, column seen."""
    with torch.no_grad():
        seen = torch.cat([judge(part) for part in images.split(64)]).argmax(1).view(animals, each)
    table = np.zeros((animals, animals), int)
    for asked in range(animals):
        for s in seen[asked].tolist():
            table[asked, s] += 1
    return table


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Pictures side by side as one PNG."""
    from PIL import Image

    rows = [torch.cat(list(row), 2) for row in images.split(columns)]
    rows = [F.pad(r, (0, rows[0].shape[2] - r.shape[2]), value=1.0) for r in rows]
    sheet = (torch.cat(rows, 1).permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
    Image.fromarray(sheet).save(path, optimize=True)


CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
---
# pocket

A text-to-image latent diffusion model of {parameters:.1f} million parameters that ships with splatedit, so that the
main job runs without a GPU and without a network. It knows {count} animals, three views and ten background colours,
nothing else: {names}.
Prompts look like `{example}`; view and background may be left out.

Made by `python -m splatedit.pocket.train` and `python -m splatedit.pocket.judge` from renders of the Cube Pets meshes
by Kenney (CC0). 128x128 pictures, 16x16x4 latents (AutoencoderTiny), UNet2DConditionModel 64/96/128, a two-layer
CLIPTextModel with a word-level tokenizer, epsilon prediction, scaled-linear betas, prompt dropped {drop:.0%} of the
time. It is an ordinary diffusers folder: `StableDiffusionPipeline.from_pretrained("{folder}")`.

![samples](samples.png)

## Judged from pure noise

{each} samples of each animal, {steps} DDIM steps, guidance scale {scale}, classified by a small network trained on
held-out renders (its own accuracy on renders it never saw: {held:.1%}).

**{accuracy:.1%} of the samples are the animal asked for; {right} of {count} animals are right in the majority of
their samples.**

| asked for | seen as (samples) |
|---|---|
{table}

## Training curve

Epsilon loss (running mean) after so many latents, on {machine}:

| latents seen | loss |
|---|---|
{curve}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--meshes", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="the work folder of the training")
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--per-mesh", type=int, default=300, help="held-out pictures of each mesh")
    parser.add_argument("--each", type=int, default=8, help="samples of each animal")
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale of the samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", default="two CPU cores", help="words for the model card")
    args = parser.parse_args()
    judge, held, names = judge_for(args)
    images = sample(args.model, [caption(n) for n in names], args.each, args.seed, scale=args.scale)
    table = confusion(judge, images, len(names), args.each)
    accuracy = table.trace() / table.sum()
    right = int((np.diag(table) * 2 > args.each).sum())
    print(f"judge on held-out renders {held:.3f}; generated samples {accuracy:.3f}; {right} of {len(names)} animals")
    save_sheet(
        images.view(len(names), args.each, *images.shape[1:])[:, :4].flatten(0, 1), args.model / "samples.png", 16
    )
    write_card(args, names, table, held, accuracy, right)


def judge_for(args) -> tuple[Judge, float, tuple[str, ...]]:
    """The judge of the folder, trained first if it is not there yet."""
    from safetensors.torch import save_file

    note = args.model / "judge.json"
    if note.exists():
        judge, names = load_judge(args.model)
        return judge, json.loads(note.read_text())["accuracy"], names
    data = pictures(args.work, args.meshes, args.per_mesh, HELD_OUT_SEED)
    judge, held = train_judge(data, args.seed)
    save_file({k: v.half() for k, v in judge.state_dict().items()}, args.model / JUDGE)
    note.write_text(json.dumps({"names": list(data.names), "accuracy": held}, indent=1) + "\n")
    return judge, held, data.names


def write_card(args, names, table, held: float, accuracy: float, right: int) -> None:
    from safetensors import safe_open

    parameters = 0
    for path in args.model.glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            parameters += sum(int(np.prod(file.get_slice(k).get_shape())) for k in file.keys())  # noqa: SIM118
    lines = []
    for i, name in enumerate(names):
        seen = sorted(((int(n), names[j]) for j, n in enumerate(table[i]) if n), reverse=True)
        lines.append(f"| {name} | " + ", ".join(f"{other} {n}" for n, other in seen) + " |")
    curve = json.loads((args.work / "curve.json").read_text())
    picked = curve[:: max(1, len(curve) // 12)] + curve[-1:]
    text = CARD.format(
        parameters=parameters / 1e6,
        count=len(names),
        names=", ".join(names),
        example=caption(names[0], "side", "blue"),
        drop=0.12,
        folder="splatedit/pocket/weights",
        each=args.each,
        steps=40,
        scale=args.scale,
        held=held,
        accuracy=accuracy,
        right=right,
        table="\n".join(lines),
        machine=args.machine,
        curve="\n".join(f"| {n:,} | {loss:.4f} |" for n, loss in picked),
    )
    (args.model / "README.md").write_text(text)


if __name__ == "__main__":
    main()
