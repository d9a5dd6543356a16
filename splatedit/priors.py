"""One adapter for every text-to-image model of the Stable Diffusion family: `load_prior(model)` -> Prior.

A model is `pocket` (bundled), a diffusers folder, or a hub id. torch and diffusers are imported when a model is loaded,
not when this file is: `check_prior` answers before they would have been read from disk.
"""

from __future__ import annotations

import difflib
import re
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from splatedit.errors import InputError
from splatedit.model_files import (
    EXAMPLE,
    FAMILY,
    NETWORKS,
    UNUSED,
    check_folder,
    fetch,
    first_line,
    hub_is_off,
    locate,
    read_json,
    variant,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from splatedit.diffusion import Text
    from splatedit.variational import Particle

SCALES = {"sds": 100.0, "pds": 100.0}  # of a full model, where the papers' code does not say 7.5
SMALL_SCALES = {"sds": 7.5, "pds": 7.5}  # where not 3, of a model with a vocabulary, unless its vocabulary.json says


class Savings(NamedTuple):
    """What a model can take more time for in order to take less memory; but for tiling it says the same to rounding."""

    checkpointing: bool = False  # one more forward pass for each gradient, through the unet and the autoencoder
    attention_slicing: bool = False  # attention one head at a time; less only where torch has no fused attention
    vae_slicing: bool = False  # the autoencoder takes one picture at a time
    vae_tiling: bool = False  # and pictures larger than it was trained on in overlapping tiles, blended
    rows_at_once: int | None = None  # at most so many rows go through the denoiser in one call


class Prior:
    """A pretrained pipeline as plain functions: encode, decode, text, and `denoise`, which is a `diffusion.Denoise`.

    The network computes in `dtype`; what goes in and comes out is float32. No parameter takes part in gradients, but
    gradients flow through: to the pixels through `encode`, to the latents through `denoise`.
    """

    name: str  # as given to load_prior
    image_size: int  # pixels, the side of the square pictures the model was trained on
    latent_channels: int
    alphas_cumprod: Tensor  # (T,) float32 on `device`, falling; the last may be 0
    vocabulary: tuple[str, ...] | None  # the prompts it was trained on, None if it takes any text
    evaluations: int  # rows sent through the network so far
    words: dict[str, Any] | None = None  # its vocabulary.json
    savings: Savings = Savings()
    rows_at_once: int | None = None  # see Savings; None while somebody looks at all rows together

    def __init__(
        self,
        pipeline: Any,
        name: str = "",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        vocabulary: dict[str, Any] | None = None,
    ):
        """pipeline: a diffusers pipeline with unet, vae, tokenizer and text encoder. vocabulary: as vocabulary.json."""
        import torch

        self.name, self.device, self.evaluations = name or type(pipeline).__name__, torch.device(device), 0
        self.dtype = dtype or default_dtype(self.device)
        self.pipeline, self.unet, self.vae = pipeline, *(require(pipeline, part, self.name) for part in ("unet", "vae"))
        if getattr(pipeline, "text_encoder_2", None) is None:
            require(pipeline, "text_encoder", self.name)
        check_dtype(self.device, self.dtype)
        self.words = vocabulary
        self.vocabulary = tuple(vocabulary["prompts"]) if vocabulary else None
        self.alphas_cumprod, self.prediction_type = schedule(pipeline.scheduler, self.name)
        self.alphas_cumprod = self.alphas_cumprod.to(self.device, torch.float32)
        self.latent_channels = self.vae.config.latent_channels
        found = (self.unet.config.in_channels, self.unet.config.out_channels)
        if found != (self.latent_channels,) * 2:
            raise InputError(
                f"{self.name}: its unet maps {found[0]} channels to {found[1]}, expected {self.latent_channels} to "
                f"{self.latent_channels}; inpainting, instruction and depth models do not fit, use their base model."
            )
        self.image_size = picture_size(self.unet, self.vae, vocabulary)
        self.large = getattr(self.unet.config, "addition_embed_type", None) == "text_time"  # SDXL
        if self.large and pipeline.config.get("requires_aesthetics_score"):
            raise InputError(f"{self.name}: a refiner; use the base model of Stable Diffusion XL.")
        with quiet():
            for part in NETWORKS:
                module = getattr(pipeline, part, None)
                if module is not None:
                    module.to(self.device, self.dtype).eval().requires_grad_(False)
                    module.to(memory_format=torch.channels_last)  # a tenth faster on a CPU, more on a GPU
            # The autoencoder of SDXL overflows in float16 and says so in its config.
            if self.dtype == torch.float16 and self.vae.config.get("force_upcast"):
                self.vae.to(dtype=torch.float32)

    def save_memory(self, savings: Savings) -> None:
        """Turn each of these on or off, as far as the pipeline's classes can."""
        before, self.savings, self.rows_at_once = self.savings, savings, savings.rows_at_once
        switch(self.unet, "gradient_checkpointing", savings.checkpointing)
        if type(self.vae).__name__ != "AutoencoderTiny":  # small; diffusers (0.42) forgets to scale its input then
            switch(self.vae, "gradient_checkpointing", savings.checkpointing)
        switch(self.vae, "slicing", savings.vae_slicing)
        switch(self.vae, "tiling", savings.vae_tiling)
        if savings.attention_slicing != before.attention_slicing:  # it replaces the attention processors
            self.unet.set_attention_slice("max" if savings.attention_slicing else None)

    def default_scale(self, guidance: str) -> float:
        """The classifier-free guidance scale that suits this model and a key of `guidance.GUIDANCE`."""
        if not self.has_null:
            return 1.0
        if self.words is None:
            return SCALES.get(guidance, 7.5)
        return float({**SMALL_SCALES, **self.words.get("guidance_scale", {})}.get(guidance, 3.0))

    @property
    def has_null(self) -> bool:
        """Whether the model knows the empty prompt, which classifier-free guidance leads away from.

        Not if its guidance was distilled into the network (latent consistency models take the scale as an input), or if
        its vocabulary.json says `"null": false`.
        """
        distilled = getattr(getattr(self, "unet", None), "config", {}).get("time_cond_proj_dim") is not None
        return not distilled and bool((self.words or {}).get("null", True))

    def check_scale(self, scale: float) -> None:
        """Raise InputError for a guidance scale that this model cannot be asked for."""
        if scale != 1 and not self.has_null:
            raise InputError(
                f"guidance_scale: found {scale}, but {self.name} was trained without an empty prompt to be led away "
                "from; use 1 (no guidance), or the base model that it was distilled from."
            )

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in [0, 1] -> latents (b, c, h', w') float32, scaled to size 1; differentiable.

        The mode of the encoder's distribution, not a sample: the same picture always gives the same latents.
        """
        out = self.vae.encode((images * 2 - 1).to(self.vae.dtype))
        latents = (out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents).float()
        scale, shift = self.latent_scale(latents)
        return (latents - shift) * scale

    def decode(self, z: Tensor) -> Tensor:
        """Latents (b, c, h', w') -> pictures (b, 3, h, w) float32 in [0, 1]; differentiable."""
        scale, shift = self.latent_scale(z)
        pictures = self.vae.decode((z / scale + shift).to(self.vae.dtype), return_dict=False)[0]
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def latent_scale(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Factor and offset between the autoencoder's latents and those the unet knows."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return config.scaling_factor, config.get("shift_factor") or 0.0
        mean, std = (like.new_tensor(list(values)).view(1, -1, 1, 1) for values in (mean, std))
        return config.scaling_factor / std, mean

    @contextmanager
    def self_attention(self) -> Iterator[list[Tensor]]:
        """What comes out of self-attention on the network's way up, as a list filled at each call of `denoise`."""
        from splatedit.attention import self_attention

        with self.in_one_call(), self_attention(self.unet, "up_blocks") as outputs:
            yield outputs

    @contextmanager
    def cross_attention(self) -> Iterator[list[Tensor]]:
        """Where the network's cross-attention looks, as a list filled at each call of `denoise`."""
        from splatedit.attention import cross_attention

        with self.in_one_call(), cross_attention(self.unet) as weights:
            yield weights

    @contextmanager
    def in_one_call(self) -> Iterator[None]:
        """All rows go through the denoiser in one call, for who reads what its layers say of all of them."""
        before, self.rows_at_once = self.rows_at_once, None
        try:
            yield
        finally:
            self.rows_at_once = before

    def text(self, prompts: list[str]) -> Text:
        """Embeddings of `prompts`, one row each, float32. The empty prompt is the null text.

        Raises InputError if the model has a vocabulary and a prompt a word outside it.
        """
        from splatedit.diffusion import stack

        for prompt in prompts:
            self.check_words(prompt)
        return stack(*(self.embed(prompt) for prompt in prompts))

    def null(self, b: int = 1) -> Text:
        """The text of no prompt at all, `b` equal rows: what classifier-free guidance leads away from."""
        from splatedit.diffusion import repeat

        return repeat(self.embed(""), b)

    def embed(self, prompt: str) -> Text:
        """One row of text embeddings (plus, for SDXL, pooled embedding and sizes)."""
        import torch

        from splatedit.diffusion import Text

        with torch.no_grad(), quiet():
            self.check_length(prompt)
            encoded = self.pipeline.encode_prompt(
                prompt=[prompt], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if not self.large:
            return Text(encoded[0].float())
        embeds, _, pooled, _ = encoded
        if not prompt.strip() and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        side = float(self.image_size)
        ids = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=self.device)
        return Text(embeds.float(), pooled.float(), ids)

    def check_words(self, prompt: str) -> None:
        """Raise InputError for a word that a model with a vocabulary has never seen."""
        if self.words is None:
            return
        # As its tokenizer reads them: see pocket.train.new_tokenizer.
        words = re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFKC", prompt).lower()).split()
        unknown = [w for w in dict.fromkeys(words) if w not in self.words["words"]]
        if unknown:
            known = sorted(self.words["words"])
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(
                f"prompt {prompt!r}: the model {self.name!r} does not know {', '.join(map(repr, unknown))}{hint}; it "
                f"knows these words: {', '.join(known)}. For any other use a full model, --model {EXAMPLE}."
            )

    def check_length(self, prompt: str) -> None:
        """Raise InputError for a prompt whose end the text encoder would not see."""
        tokenizer = getattr(self.pipeline, "tokenizer", None) or self.pipeline.tokenizer_2
        found, longest = len(tokenizer(prompt).input_ids), tokenizer.model_max_length
        if found > longest:
            raise InputError(f"prompt {prompt!r}: {found} tokens long, {self.name} reads {longest}; shorten it.")

    def particle(self, generator: torch.Generator, rank: int, rate: float) -> Particle:
        """A second denoiser that learns what renders look like, for vsd; see `variational.LoraDenoiser`."""
        from splatedit.variational import LoraDenoiser

        return LoraDenoiser(self, generator, rank, rate)

    def denoise(self, x: Tensor, t: Tensor, text: Text, unet: Any = None, class_labels: Tensor | None = None) -> Tensor:
        """Predicted noise ehat (b, c, h, w) in x's dtype, of noised latents x at steps t (b,), one row of text each.

        One network call (or, with `Savings.rows_at_once`, several), whatever the pipeline's scheduler: x = a z +
        s noise with a^2 = alphas_cumprod[t]. unet: another network of the same kind, with labels for the rows if it
        takes them.
        """
        import torch

        from splatedit.diffusion import pick, scales, to_eps_x0

        assert len(x) == len(t) == len(text.embeds), "one step and one row of text for each row of x"
        most = self.rows_at_once
        if most is not None and len(x) > most:
            parts = torch.arange(len(x), device=x.device).split(most)
            labels = [None if class_labels is None else class_labels[rows] for rows in parts]
            told = zip(parts, labels, strict=True)
            return torch.cat([self.denoise(x[rows], t[rows], pick(text, rows), unet, label) for rows, label in told])
        self.evaluations += len(x)
        more = None
        if text.pooled is not None and text.ids is not None:
            more = {"text_embeds": text.pooled.to(self.dtype), "time_ids": text.ids.to(self.dtype)}
        output = (self.unet if unet is None else unet)(
            x.to(self.dtype),
            t,
            class_labels=class_labels,
            encoder_hidden_states=text.embeds.to(self.dtype),
            added_cond_kwargs=more,
            return_dict=False,
        )[0]
        a, s = scales(self.alphas_cumprod, t, x)
        return to_eps_x0(output.to(x.dtype), x, a, s, self.prediction_type)[0]


# -------------------------------------------------------------------------------------------------------------- loading
def check_prior(model: str = "pocket", offline: bool = False) -> None:
    """Raise InputError, within a second and without importing torch, if a model is not there or not whole.

    A hub id that is not in the cache passes unless `offline`: whether the hub has it is known when it is loaded.
    """
    folder = locate(model, offline)
    if folder is not None:
        check_folder(folder, model)
    elif offline or hub_is_off():
        raise InputError(
            f"{model}: no such folder here, and not in the cache of the hub, which may not be asked (offline); load it "
            "once with a network, or give a folder or `pocket`."
        )


def load_prior(
    model: str = "pocket",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    offline: bool = False,
    checkpointing: bool = False,
) -> Prior:
    """Load a model by name ("pocket"), diffusers folder or hub id, which is fetched unless the cache has it whole.

    dtype: of the networks; None is float16 on CUDA and float32 elsewhere, where half precision works but is slow.
    offline: never ask the hub. checkpointing: spend one more forward pass on each gradient to save most of its memory;
    `Prior.save_memory` knows more ways. Raises InputError, in one line, for a model that is not there, not whole, or
    not of the family.
    """
    import torch

    check_prior(model, offline)
    device = torch.device(device)
    dtype = dtype or default_dtype(device)
    half = dtype in (torch.float16, torch.bfloat16)
    folder = locate(model, offline) or fetch(model, half)
    check_folder(folder, model)
    try:
        prior = Prior(read_pipeline(folder, dtype), str(model), device, dtype, read_vocabulary(folder))
        if checkpointing:
            prior.save_memory(Savings(checkpointing=True))
        return prior
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise InputError(
            f"{model}: cannot be loaded as a diffusers pipeline ({first_line(error)}); expected {FAMILY}."
        ) from error


KEPT: dict[tuple[Any, ...], Prior] = {}  # at most one, which nobody uses
LOADING = threading.Lock()  # diffusers changes torch itself while it loads: a second one then fails


@contextmanager
def borrowed(model: str, device: str | torch.device, offline: bool = False) -> Iterator[Prior]:
    """What `load_prior` gives, nobody else's in the body; it is kept then for whoever asks for the same next.

    Two edits never share a Prior: it counts evaluations, and some guidances hook into its network.
    """
    check_prior(model, offline)
    folder = locate(model, offline)
    files = [] if folder is None else [p for p in folder.rglob("*") if p.is_file()]
    key = (model, str(device), max((p.stat().st_mtime_ns for p in files), default=0))
    prior = KEPT.pop(key, None)
    if prior is None:
        with LOADING:
            KEPT.clear()  # first, for two may not fit into memory
            prior = load_prior(model, device, offline=offline)
    try:
        yield prior
    finally:
        prior.evaluations = 0
        prior.save_memory(Savings())
        KEPT.clear()
        KEPT[key] = prior


def read_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline in `folder`, without the parts that no edit needs, read without a word."""
    import importlib.util

    with quiet():
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        index = read_json(folder / "model_index.json")
        unused: dict[str, Any] = {name: None for name in UNUSED if name in index}
        if "requires_safety_checker" in index:
            unused["requires_safety_checker"] = False
        return DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=dtype,
            local_files_only=True,
            variant=variant(folder, index, half=dtype.itemsize == 2),
            low_cpu_mem_usage=importlib.util.find_spec("accelerate") is not None,
            **unused,
        )


def read_vocabulary(folder: Path) -> dict[str, Any] | None:
    """vocabulary.json: "prompts", "words"; perhaps "image_size" (pixels), "guidance_scale" (by guidance), "null"."""
    path = folder / "vocabulary.json"
    if not path.is_file():
        return None
    vocabulary = read_json(path)
    missing = {"prompts", "words"} - set(vocabulary)
    if missing:
        raise InputError(f"{path}: {' and '.join(sorted(missing))} missing, expected lists of text.")
    return vocabulary


def default_dtype(device: torch.device) -> torch.dtype:
    """Half precision where it is fast."""
    import torch

    return torch.float16 if device.type == "cuda" else torch.float32


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError if this torch cannot compute networks of that type on that device.

    Half precision on a CPU means what it means on a GPU, only more slowly than single; older releases cannot do it.
    """
    import torch

    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return
    try:
        torch.nn.functional.conv2d(torch.zeros(1, 1, 3, 3, dtype=dtype), torch.zeros(1, 1, 3, 3, dtype=dtype))
    except RuntimeError as error:
        found = f"torch {torch.__version__} cannot compute {str(dtype).removeprefix('torch.')} networks on a CPU"
        raise InputError(f"dtype: {found} ({first_line(error)}); use float32.") from error


def switch(module: Any, what: str, on: bool) -> None:
    """Call `enable_<what>` or `disable_<what>` of a diffusers model that has it."""
    if on and what == "gradient_checkpointing" and not getattr(module, "_supports_gradient_checkpointing", False):
        return
    call = getattr(module, f"{'enable' if on else 'disable'}_{what}", None)
    if call is not None:
        call()


def require(pipeline: Any, part: str, name: str) -> Any:
    """A component of a pipeline; raises InputError if it has none of that name."""
    component = getattr(pipeline, part, None)
    if component is None:
        raise InputError(f"{name}: a {type(pipeline).__name__} without {part}; expected {FAMILY}.")
    return component


def schedule(scheduler: Any, name: str) -> tuple[Tensor, str]:
    """alphas_cumprod (T,) and prediction type of any diffusers scheduler; raises InputError for another kind of model.

    Only these two are taken: what a scheduler does with them when sampling (k-diffusion's scaling of the input, say)
    is not part of what the network was trained on.
    """
    from splatedit.diffusion import PREDICTIONS

    table = getattr(scheduler, "alphas_cumprod", None)
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if table is None or kind not in PREDICTIONS or getattr(scheduler.config, "use_flow_sigmas", False):
        found = f"prediction_type {kind!r}" if table is not None else "no alphas_cumprod"
        raise InputError(f"{name}: its scheduler {type(scheduler).__name__} has {found}; expected {FAMILY}.")
    return table, kind


def picture_size(unet: Any, vae: Any, vocabulary: dict[str, Any] | None) -> int:
    """Side in pixels of the pictures a model was trained on."""
    if vocabulary and "image_size" in vocabulary:
        return int(vocabulary["image_size"])
    size = unet.config.sample_size or 64
    size = size if isinstance(size, int) else min(size)
    return size * 2 ** (len(vae.config.block_out_channels) - 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, warnings and advice of diffusers and transformers, then put them back as they were."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers.utils.logging as d  # which warns in a notebook without ipywidgets
        import transformers.utils.logging as t

        libraries = (d, t)
        before = [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
        try:
            for lib in libraries:
                lib.set_verbosity(lib.CRITICAL)
                lib.disable_progress_bar()
            yield
        finally:
            for lib, (verbosity, bar) in zip(libraries, before, strict=True):
                lib.set_verbosity(verbosity)
                if bar:
                    lib.enable_progress_bar()


# --------------------------------------------------------------------------------------------------- what a scene shows
VIEWS = 8  # looked at; each has a noise level of its own in every draw
ROUNDS = ((None, 1), (8, 3), (3, 4))  # prompts kept, draws of each view: of 24 prompts 192 + 192 + 96 evaluations


def find_prompt(prior: Prior, z: Tensor, generator: torch.Generator) -> tuple[str, dict[str, float]]:
    """The prompt of the prior's vocabulary that best explains latents z (views, c, h, w), and a table of all of them.

    A diffusion classifier (arXiv 2303.16203) on at most VIEWS of the views, in rounds: prompts that fall behind get no
    more evaluations. The table holds each prompt's mean denoising error, best first; errors of prompts that left in an
    earlier round average fewer draws. A model without vocabulary gives "" and an empty table.
    """
    import torch

    from splatedit.diffusion import denoising_errors

    if prior.vocabulary is None:
        return "", {}
    views = z[torch.randperm(len(z), generator=generator, device=generator.device)[:VIEWS].to(z.device)]
    often = -(-VIEWS // len(views))  # few views: each is drawn more often
    left = list(prior.vocabulary)
    total, drawn = dict.fromkeys(left, 0.0), dict.fromkeys(left, 0)
    for keep, draws in ROUNDS:
        left = sorted(left, key=lambda prompt: total[prompt])[:keep]
        texts = [prior.text([prompt]) for prompt in left]
        errors = denoising_errors(prior.denoise, views, texts, prior.alphas_cumprod, generator, draws * often)
        for prompt, error in zip(left, errors.mean(0).tolist(), strict=True):
            total[prompt] += error * draws
            drawn[prompt] += draws
    ranked = sorted(total, key=lambda prompt: (-drawn[prompt], total[prompt]))
    return ranked[0], {prompt: total[prompt] / drawn[prompt] for prompt in ranked}
