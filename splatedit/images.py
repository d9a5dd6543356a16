"""`edit_images(pictures, prompt)`: pictures edited in latent space by any guidance, as a generator of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from splatedit.distilling import Distiller, Method
from splatedit.editing import drift, resolve_device
from splatedit.errors import InputError
from splatedit.fpr import FPR

if TYPE_CHECKING:
    from splatedit.priors import Prior

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FITS = ("crop", "stretch")
SMALLEST_SIDE = 8  # pixels
# The official codes of DDS, CDS and IDS minimise 2000 <g, z> / (h w) by SGD at 0.1: one step is z - 0.0488 g on the
# 64x64 latents they were written for, and that is the step taken here on latents of any size.
SGD_STEP = 0.1 * 2000 / 64**2


class Preset(NamedTuple):
    """How a guidance edits a picture: plain gradient descent on its latents."""

    steps: int = 200
    rate: float = SGD_STEP  # latents move by this times the gradient
    t_range: tuple[float, float] = (0.05, 0.948)  # fractions of the schedule: steps 50 to 948 of 1000
    guidance_scale: float | None = None  # None, or a model with a vocabulary: what suits model and guidance
    source: str = "not published for pictures: the descent of dds"


PRESETS: dict[str, Preset] = {
    "ids": Preset(guidance_scale=7.5, source="arXiv 2502.19930, github.com/shhh0620/IDS; 3 iterations of lambda 1"),
    "dds": Preset(guidance_scale=7.5, source="arXiv 2304.07090, the notebook in github.com/google/prompt-to-prompt"),
    "cds": Preset(guidance_scale=7.5, source="arXiv 2311.18608, github.com/HyelinNAM/ContrastiveDenoisingScore"),
}
OTHERS = Preset(t_range=(0.02, 0.98))


class ImageStep(NamedTuple):
    """What one step of an edit of pictures leaves behind."""

    index: int  # from 0
    steps: int  # how many there will be
    loss: float  # rms of the guidance gradient
    latents: Tensor  # (b, c, h, w) after this step, detached
    pictures: Callable[[], Tensor]  # decodes them to (b, 3, H, W) in [0, 1]
    seconds: float  # of this step
    evaluations: int  # network rows evaluated so far
    backwards: int  # network rows through which gradients were sent back so far
    residuals: list[float]  # posterior-mean drift after each FPR iteration; empty but for ids
    fpr: FPR | None = None  # None but for ids


class LatentImage:
    """Pictures as free latents (b, c, h, w), moved by gradient descent. A scene: it knows nothing of diffusion."""

    def __init__(self, latents: Tensor, rate: float = SGD_STEP):
        self.source, self.rate = latents.detach().clone(), rate
        self.latents = self.source.clone().requires_grad_()
        self.optimizer = torch.optim.SGD([self.latents], lr=rate)

    def __call__(self, views: Tensor | list[int] | None = None) -> Tensor:
        """The current latents of the given pictures (indices), or of all; differentiable."""
        return self.latents if views is None else self.latents[views]

    def step(self, fraction: float = 0.0, final_rate: float = 1.0) -> None:
        """One step on the gradients left by backward(); the rate falls exponentially to `final_rate` of the first."""
        self.optimizer.param_groups[0]["lr"] = self.rate * final_rate**fraction
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def result(self) -> Tensor:
        """A detached copy of the current latents."""
        return self.latents.detach().clone()


def edit_images(
    pictures: Tensor | Sequence[Tensor],
    prompt: str,
    source: str | None = None,
    *,
    model: str | Prior = "pocket",
    guidance: str = "ids",
    guidance_scale: float | None = None,
    steps: int | None = None,
    rate: float | None = None,
    t_range: tuple[float, float] | None = None,
    seed: int = 0,
    device: str = "auto",
    offline: bool = False,
    **more: Any,
) -> Iterator[ImageStep]:
    """Edit pictures by score distillation on their latents; iterate to make it happen, keep the last step.

    pictures: (b, 3, h, w) in [0, 1], or a list of (3, h, w) of one size, best the prior's own. prompt, source: what all
    of them shall show, and show now; without `source` the prior looks for it. guidance: a key of `guidance.GUIDANCE`,
    whose preset (`preset`) gives guidance_scale, steps, rate and t_range where these are None. more: other fields of
    `distilling.Method`; noise levels are not annealed unless asked. A picture's noise depends on the seed and on its
    place in the batch. Raises InputError.
    """
    from splatedit.priors import Prior, find_prompt, load_prior

    settings = preset(guidance)
    count = settings.steps if steps is None else steps
    rate = settings.rate if rate is None else rate
    if count < 1 or not rate > 0:
        raise InputError(f"steps, rate: found {count} and {rate:g}, expected 1 or more steps and a rate above 0.")
    method = Method(guidance, guidance_scale, t_range or settings.t_range, **{"anneal": 0.0, **more})
    method.check()
    batch = one_batch(pictures)
    prior = model if isinstance(model, Prior) else load_prior(model, resolve_device(device), offline=offline)
    method = method._replace(guidance_scale=suited_scale(prior, guidance, guidance_scale))
    latents = encode(prior, batch)
    generator = torch.Generator(prior.device).manual_seed(seed)
    if source is None:
        source, _ = find_prompt(prior, latents, generator)
    distiller = Distiller(prior, method, prompt, source, latents, generator, seed)
    scene, views = LatentImage(latents, rate), list(range(len(latents)))
    for index in range(count):
        start = time.perf_counter()
        pull = distiller(scene().detach(), views, index / max(count - 1, 1))
        scene().backward(pull.gradient)
        scene.step()
        result = scene.result()
        yield ImageStep(
            index=index,
            steps=count,
            loss=float(pull.gradient.square().mean().sqrt()),
            latents=result,
            pictures=partial(decode, prior, result),
            seconds=time.perf_counter() - start,
            evaluations=prior.evaluations,
            backwards=distiller.backwards,
            residuals=drift(pull.fpr.residuals, latents) if pull.fpr else [],
            fpr=pull.fpr,
        )


def preset(guidance: str) -> Preset:
    """The settings for a key of `guidance.GUIDANCE`: published ones where there are any (see PRESETS)."""
    return PRESETS.get(guidance, OTHERS)


def suited_scale(prior: Prior, guidance: str, given: float | None = None) -> float:
    """The guidance scale of an edit: the given one, else that of the preset, which full models were published with."""
    published = preset(guidance).guidance_scale
    if given is None and published is not None and prior.vocabulary is None and prior.has_null:
        return published
    return prior.default_scale(guidance) if given is None else given


def one_batch(pictures: Tensor | Sequence[Tensor]) -> Tensor:
    """Pictures as one float32 tensor (b, 3, h, w); raises InputError for several sizes, or what is no picture."""
    if not isinstance(pictures, Tensor):
        sizes = sorted({"x".join(map(str, picture.shape)) for picture in pictures})
        if len(sizes) != 1:
            raise InputError(
                f"pictures: found {len(sizes)} sizes ({', '.join(sizes) or 'no picture'}), expected one; "
                "images.read_picture cuts them to one size."
            )
        pictures = torch.stack(list(pictures))
    if pictures.ndim != 4 or pictures.shape[1] != 3 or len(pictures) == 0:
        raise InputError(f"pictures: found shape {list(pictures.shape)}, expected [b, 3, h, w], b at least 1.")
    if not bool(pictures.isfinite().all()) or float(pictures.min()) < 0 or float(pictures.max()) > 1:
        raise InputError("pictures: found values outside [0, 1] or not finite, expected colours in [0, 1].")
    return pictures.float()


@torch.no_grad()
def encode(prior: Prior, pictures: Tensor) -> Tensor:
    """Latents of pictures (b, 3, h, w); raises InputError for a size that the autoencoder does not give back."""
    pictures = pictures.to(prior.device)
    height, width = pictures.shape[-2:]
    unit = 2 ** (len(prior.vae.config.block_out_channels) - 1)
    if height % unit or width % unit:
        raise InputError(f"pictures: found {width}x{height} pixels, expected multiples of {unit} for {prior.name}.")
    return prior.encode(pictures)


@torch.no_grad()
def decode(prior: Prior, latents: Tensor) -> Tensor:
    """Pictures (b, 3, h, w) in [0, 1] of latents."""
    return prior.decode(latents)


# --------------------------------------------------------------------------------------------------- pictures from disk
def find_pictures(path: str | Path) -> list[Path]:
    """A picture, or the pictures in a folder by name; raises InputError if there are none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; expected a picture ({', '.join(ENDINGS)}) or a folder.")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS and p.is_file() and p.name[0] != ".")
    if not found:
        raise InputError(f"{path}: holds no picture; expected files that end in {', '.join(ENDINGS)}.")
    return found


def read_picture(path: str | Path, size: int, fit: str = "crop") -> Tensor:
    """A picture as (3, size, size) in [0, 1]: turned upright, laid on white, cut and resized to a square.

    fit: `crop` keeps the middle square (as DDS did), `stretch` the whole picture (as IDS and CDS do). Raises InputError
    for what is no picture, and for one of less than 8 pixels a side.
    """
    if fit not in FITS:
        raise InputError(f"fit: found {fit!r}, expected one of {', '.join(FITS)}.")
    try:
        with Image.open(path) as opened:
            picture = on_white(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not a whole picture of a known format"
        raise InputError(f"{path}: cannot be read ({reason}); expected {', '.join(ENDINGS)}.") from None
    if min(picture.size) < SMALLEST_SIDE:
        found = "{}x{}".format(*picture.size)
        raise InputError(f"{path}: found {found} pixels, expected at least {SMALLEST_SIDE} a side.")
    if fit == "crop":
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    else:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1).contiguous()


def on_white(picture: Image.Image) -> Image.Image:
    """As RGB of 8 bits: transparent parts become white, 16-bit grey keeps its upper bits."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray((values / (65535 if values.max() > 255 else 255) * 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
