"""Settings: one flat dataclass. Defaults < yaml file < command-line options < `key=value` words; a typo stops at once.

Only run.py and cli.py see a Config; the code below them takes ordinary arguments. The defaults of the edit are those of
`editing.edit`, repeated here so that `splatedit --help` need not import torch (a test compares them).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from splatedit.errors import InputError
from splatedit.tuning import RANGES
from splatedit.vram import VRAM

GUIDANCES = ("ids", "dds", "cds", "pds", "dreamcatalyst", "sds", "vsd", "sdi")  # the keys of guidance.GUIDANCE
TIMESTEPS = ("uniform", "stratified", "annealed")  # of timesteps.TIMESTEPS
SOLVERS = ("grad", "grad_polyak", "picard_null", "picard", "anderson", "by_level")  # of fpr.SOLVERS
WEIGHTS = ("uniform", "sigma2", "fantasia3d", "x0")  # of score.WEIGHTS
RIGS = ("orbit", "dome")  # the keys of cameras.RIGS
UPS = ("+x", "-x", "+y", "-y", "+z", "-z")  # cameras.UPS
TEXT = ("scene", "prompt", "source_prompt", "guidance", "model", "output_dir", "device", "cameras", "up")
TEXT += ("weight", "timesteps", "solver", "cache_dir")
TEXT += ("mask", "mask_box", "mask_sphere", "mask_rule", "mask_text", "mask_text_by", "preset")
# Settings that are options of `splatedit run` too, --with-hyphens.
OPTIONS = ("source_prompt", "guidance", "guidance_scale", "model", "steps", "seed", "preset", "solver", "fpr_iters")
OPTIONS += ("fpr_lambda", "source_cache", "cache_mb", "output_dir", "device", "cameras", "up", "mask", "mask_box")
OPTIONS += ("mask_sphere", "mask_rule", "mask_text", "grow_percent", "max_gaussians", "vram", "offline", "viewer")
MASK_BY = ("scores", "attention")  # the keys of relevance.MAPS


def key(default: Any, help: str) -> Any:
    """A field of Config with the sentence that the help prints."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Everything that decides what a run does. Fields are the keys of config.yaml and of `key=value` words."""

    scene: str = key("", "splat file to edit (.ply); it is only read")
    prompt: str = key("", "what the scene shall show")
    source_prompt: str | None = key(None, "what the scene shows now; else its sidecar says, else the model finds it")
    guidance: str = key("ids", ", ".join(GUIDANCES))
    guidance_scale: float | None = key(None, "classifier-free guidance, 1 is off; null: what suits model and guidance")
    model: str = key("pocket", "pocket (bundled), a Stable Diffusion hub id, or a diffusers folder")
    offline: bool = key(False, "never ask the hub; use what is in the cache")
    device: str = key("auto", "auto, cpu, cuda or cuda:N")
    steps: int = key(300, "optimisation steps")
    seed: int = key(0, "seed of all randomness")
    preset: str = key("paper", "paper (as published) or fast: solver, fpr_iters and source_cache by one word")
    solver: str = key("grad", "ids: how the noise is refined: " + ", ".join(SOLVERS))
    fpr_iters: int = key(3, "ids: fixed-point iterations of a step")
    fpr_lambda: float = key(1.0, "ids: step size of these iterations, in the solver's own unit")
    fpr_t_range: list[float] = key([0.0, 1.0], "ids: noise levels at which noise is refined, fractions of the schedule")
    fpr_sphere: bool = key(False, "ids: after each iteration the noise gets back the length it was drawn with")
    fpr_keep_best: bool = key(False, "ids: a view whose residual rises goes back one iteration and stops")
    fpr_stop: float = key(0.0, "ids: a view stops once its residual is below this share of the source's latents")
    cameras: str = key(
        "auto", "a file or folder of cameras, or orbit, dome, dome:48; auto: those beside the scene, else dome"
    )
    cameras_held_out: int = key(8, "files of cameras: each so-manyeth view is kept for the report; 0: none")
    cameras_most: int = key(48, "files of cameras: views to edit from, evenly over all there are")
    up: str | None = key(None, "up axis of the scene, +x -x +y -y +z or -z; null: its sidecar says, else guessed")
    views_per_step: int = key(2, "cameras drawn in each step")
    t_range: list[float] = key([0.05, 0.95], "noise levels drawn from, fractions of the schedule")
    timesteps: str | None = key(
        None, "uniform, stratified or annealed: how they are drawn; null: what the guidance takes"
    )
    anneal: float = key(0.5, "how far the upper noise level falls by the last step: 0 not, 1 to the lower one")
    weight: str | None = key(None, "w(t): uniform, sigma2, fantasia3d or x0; null: what the guidance's paper takes")
    identity_weight: float = key(1.0, "pds, dreamcatalyst: factor on what holds the edit at the source")
    pds_stride: int = key(2, "pds: 2 is the official code, 1 is weighted dds, more holds the source harder")
    source_cache: int = key(
        0, "records of the source kept for each camera, so that a step evaluates the edit alone; 0: off"
    )
    cache_refresh: int = key(0, "uses after which a record gives way to a new draw; 0: never")
    cache_mb: float = key(256.0, "MiB of records in memory; the least recently used go first")
    cache_dir: str | None = key(None, "folder that keeps the records too; run: in the run's own; null: memory only")
    cds_weight: float = key(3.0, "cds: weight of the contrastive loss")
    sdi_steps: int = key(10, "sdi: steps of an inversion through the whole schedule")
    sdi_scale: float | None = key(None, "sdi: guidance scale of the inversion; null: minus guidance_scale")
    sdi_eta: float = key(0.3, "sdi: fresh noise in the inversion")
    vsd_rank: int = key(4, "vsd: rank of the LoRA that learns the renders")
    vsd_rate: float = key(1e-4, "vsd: its learning rate")
    lr_means: float = key(1.5e-3, "learning rate of positions, in scene radii; 0 freezes them (so for each lr_*)")
    lr_quats: float = key(1e-3, "learning rate of rotations")
    lr_scales: float = key(3e-3, "learning rate of log sizes")
    lr_opacities: float = key(2e-2, "learning rate of logit opacities")
    lr_sh0: float = key(3e-2, "learning rate of colours")
    lr_shN: float = key(0.0, "learning rate of view-dependent colours")
    final_rate: float = key(0.1, "learning rates fall to this share of themselves")
    average_last: float = key(0.25, "share of the steps, from the last, whose splats are averaged into the result")
    supersample: int = key(2, "pictures are drawn this many times larger, then averaged down")
    neighbours: int = key(16, "each gradient is averaged over this many nearest splats; 0 is off")
    anchor: float = key(0.0, "share of the way back to the source that a splat is taken in each step; 0 is off")
    outside: float = key(0.0, "pull of pixels outside the mask back to the source's, 1: as the model pulls; 0 is off")
    grow_percent: float = key(0.0, "splats added: percent, those the edit pulls at hardest, halved each time; 0 is off")
    grow_every: int = key(25, "steps from one time to the next")
    grow_range: list[float] = key([0.1, 0.6], "share of the steps after which splats begin to be added, and end")
    max_gaussians: int | None = key(None, "most splats the scene may come to have; null: twice as many as it has")
    prune_opacity: float = key(0.005, "where splats are added, fainter ones are removed; 0 is off")
    mask: str | None = key(None, "only these splats may change: a mask, list of rows or second splat file")
    mask_box: str | None = key(None, "only splats in this box, world units: cx,cy,cz,sx,sy,sz")
    mask_sphere: str | None = key(None, "only splats in this ball, world units: x,y,z,r")
    mask_rule: str | None = key(None, "only splats like this: opacity > 0.5 and x < 1")
    mask_text: str | None = key(None, "only splats that the edit is about: auto, or words of the source prompt")
    mask_text_by: str = key("scores", "mask_text=auto: where from: " + ", ".join(MASK_BY))
    mask_threshold: float | None = key(None, "mask_text: relevance from which a splat may change; null: found")
    mask_grow: float = key(0.0, "and splats so near to the mask, world units; negative shrinks it")
    mask_invert: bool = key(False, "the splats outside the mask may change instead")
    background: list[float] = key([1.0, 1.0, 1.0], "red, green, blue behind the splats, in [0, 1]")
    output_dir: str = key("outputs", "folder that gets <scene>/<prompt>@<time>/")
    checkpoint_every: int | None = key(
        None, "steps between checkpoints; null: about 30 s, more where one takes long; 0: only at the end"
    )
    vram: int | None = key(None, "settings for a GPU of so many GB: " + ", ".join(map(str, sorted(VRAM))))
    checkpointing: bool = key(False, "gradients of the model take one more forward pass, and much less memory")
    rows_at_once: int | None = key(None, "at most so many pictures go through the denoiser in one call; null: all")
    vae_slicing: bool = key(False, "the autoencoder takes one picture at a time")
    vae_tiling: bool = key(False, "and large ones in overlapping tiles, which shows a little")
    attention_slicing: bool = key(False, "attention one head at a time, where torch has no fused attention")
    viewer: bool = key(False, "watch and steer the edit in a browser")


# docs/usage.md says what decided about `fast`.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"solver": "grad", "fpr_iters": 3, "source_cache": 0},  # as published
    "fast": {"solver": "picard_null", "fpr_iters": 2, "source_cache": 2},
}

# Settings that stand for several others, over all that came earlier, under what is given beside them.
BUNDLES: dict[str, dict[Any, dict[str, Any]]] = {"preset": PRESETS, "vram": VRAM}

NOUNS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list[float]": "numbers in brackets, [a, b]",
}
KEYS = {f.name: f.metadata["help"] for f in fields(Config)}


def load_config(
    file: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    words: Iterable[str] = (),
    defaults: Config | None = None,
) -> Config:
    """Merge defaults, a yaml `file`, `options` (None means not given) and `key=value` `words`; later ones win.

    Raises InputError for an unknown key (naming the nearest), a value of the wrong type or out of range.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        layers.append((str(file), read_yaml(Path(file))))
    layers.append(("", {k: v for k, v in (options or {}).items() if v is not None}))
    layers.append(("", {k: v for word in words for k, v in parse_word(word).items()}))
    layers = [part for where, layer in layers for part in (*bundled(layer), (where, layer))]
    merged: dict[str, Any] = asdict(defaults or Config())
    for where, layer in layers:
        for name, value in layer.items():
            known(name, where)
            merged[name] = typed(name, value, where)
    config = Config(**merged)
    check(config)
    return config


def bundled(layer: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What goes below a layer: the settings that those of BUNDLES stand for which it chooses.

    A file that a run has written holds them all beside the choice, and so repeats that run whatever they stand for by
    then. A choice that is not known is left to `check`.
    """
    for name, table in BUNDLES.items():
        chosen = layer.get(name)
        if isinstance(chosen, (int, str)) and chosen in table:
            yield name, table[chosen]


def save_config(config: Config, path: str | Path) -> None:
    """Write config.yaml: every key, so that `--config` repeats the run."""
    from omegaconf import OmegaConf

    from splatedit.files import atomic

    with atomic(path) as stream:
        stream.write(OmegaConf.to_yaml(OmegaConf.create(asdict(config))).encode())


def as_command(config: Config) -> list[str]:
    """The words of `splatedit run` that give these settings: what differs from the defaults; `shlex.join` quotes them.

    Options where there are any, else key=value; the scene and the prompt first, unless they would be taken for options.
    """
    usual = asdict(load_config(options={name: getattr(config, name) for name in BUNDLES}))
    usual |= {name: getattr(Config, name) for name in BUNDLES}
    flags, words = [], []
    for name, value in asdict(config).items():
        if name in ("scene", "prompt") or value == usual[name]:
            continue
        text = written(value)
        if name not in OPTIONS or value is None or value is False or text.startswith("-"):
            words.append(f"{name}={text}")
        else:
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
    subject = [config.scene, config.prompt]
    if any(text.startswith("-") for text in subject):
        return ["splatedit", "run", *flags, "--", *subject, *words]
    return ["splatedit", "run", *subject, *flags, *words]


def written(value: Any) -> str:
    """A value of a setting as the command line reads it."""
    if isinstance(value, list):
        return f"[{', '.join(written(part) for part in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a yaml settings file; raises InputError if it cannot be read or is not a mapping."""
    import yaml
    from omegaconf import OmegaConf

    from splatedit.yaml_files import check_yaml

    try:
        check_yaml(path)
        loaded = OmegaConf.load(path)
    except InputError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"{path}: cannot be read ({reason}); expected a yaml file of key: value lines.") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise InputError(f"{path}:{line} not valid yaml; expected key: value lines, as in config.yaml.") from None
    content = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected key: value lines, as in a run's config.yaml.")
    return {str(k): v for k, v in content.items()}


def parse_word(word: str) -> dict[str, Any]:
    """`key=value` as a one-entry dictionary. The value of a text key is taken as it stands, others are read as yaml."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name, equals, value = word.partition("=")
    if not equals:
        raise InputError(f"{word!r}: expected key=value (a prompt of several words needs quotes); {near(word)}")
    known(name)
    if name in TEXT:
        optional = getattr(Config, name) is None
        return {name: None if optional and value == "null" else value}
    try:
        return {name: OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=False)[name]}  # type: ignore
    except (OmegaConfBaseException, yaml.YAMLError, ValueError):
        raise InputError(f"{name}: {value!r} cannot be read; write a number, true, false, null or [a, b].") from None


def typed(name: str, value: Any, where: str = "") -> Any:
    """`value` as the type of the field, checked by omegaconf; raises InputError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    place = f"{where}: {name}" if where else name
    if isinstance(value, str):
        if name in TEXT:
            return value  # never through omegaconf, which would read ${...} in a prompt as its own
        if "${" in value:
            raise InputError(f"{place}: {value!r} is not understood; settings know no interpolation.")
    try:
        merged = OmegaConf.merge(alone(name), {name: value})
        return OmegaConf.to_container(merged)[name]  # type: ignore
    except (OmegaConfBaseException, ValueError, TypeError):
        kind, _, optional = str(Config.__annotations__[name]).partition(" | ")
        wanted = NOUNS[kind] + (" or null" if optional else "")
        raise InputError(f"{place}: found {value!r}, expected {wanted} ({KEYS[name]}).") from None


@cache
def alone(name: str) -> Any:
    """One field of Config as omegaconf's typed mapping: merging into all of them takes a hundred times as long."""
    from omegaconf import OmegaConf

    default = getattr(Config(), name)
    one = (name, hints()[name], field(default_factory=lambda: default))
    return OmegaConf.structured(make_dataclass("Setting", [one]))


@cache
def hints() -> dict[str, Any]:
    """The types of all settings."""
    return get_type_hints(Config)


def known(name: str, where: str = "") -> None:
    """Raise InputError, naming the nearest key, unless `name` is a key."""
    if name not in KEYS:
        place = f"{where}: " if where else ""
        raise InputError(f"{place}{name!r} is not a setting; {near(name)}")


def near(name: str) -> str:
    """What to do about an unknown key."""
    matches = difflib.get_close_matches(name.strip("-").replace("-", "_"), KEYS, n=1, cutoff=0.5)
    if matches:
        return f"did you mean {matches[0]!r}?"
    return "`splatedit run --help` lists them."


def check(config: Config) -> None:
    """Raise InputError for a value out of range; what only torch knows (a GPU, say) is checked by the run."""
    choose("guidance", config.guidance, GUIDANCES)
    choose("solver", config.solver, SOLVERS)
    choose("preset", config.preset, PRESETS)
    choose("mask_text_by", config.mask_text_by, MASK_BY)
    for name, choices in (("up", UPS), ("weight", WEIGHTS), ("timesteps", TIMESTEPS)):
        if getattr(config, name) is not None:
            choose(name, getattr(config, name), choices)
    if config.vram is not None and config.vram not in VRAM:
        raise InputError(f"vram: found {config.vram}, expected the GB of a GPU: {', '.join(map(str, sorted(VRAM)))}.")
    if is_rig(config.cameras):
        rig(config.cameras)
    elif not Path(config.cameras).expanduser().exists():
        raise InputError(
            f"cameras: {config.cameras!r}: no such file, and not a rig; "
            "choose orbit, dome, dome:N or a file of cameras."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise InputError(f"device: {config.device!r} is not known; choose auto, cpu, cuda or cuda:N.")
    for name, low, high in (
        ("steps", 1, math.inf),
        ("seed", 0, 2**63 - 1),
        ("fpr_iters", 0, math.inf),
        ("fpr_lambda", 0.0, math.inf),
        ("source_cache", 0, 1000),
        ("cache_refresh", 0, math.inf),
        ("cache_mb", 0.0, math.inf),
        ("views_per_step", 1, math.inf),
        ("cameras_held_out", 0, math.inf),
        ("cameras_most", 1, 1000),
        ("anneal", 0.0, 1.0),
        ("final_rate", 0.0, 1.0),
        ("average_last", 0.0, 1.0),
        ("supersample", 1, 8),
        ("neighbours", 0, math.inf),
        ("mask_grow", -math.inf, math.inf),
        ("anchor", 0.0, 1.0),
        ("outside", 0.0, math.inf),
        ("grow_percent", 0.0, 100.0),
        ("grow_every", 1, math.inf),
        ("prune_opacity", 0.0, 0.999),
        *((k, *span) for k, span in RANGES.items()),
        *((f"lr_{k}", 0.0, math.inf) for k in ("means", "quats", "scales", "opacities", "sh0", "shN")),
    ):
        within(name, getattr(config, name), low, high)
    if config.final_rate == 0:
        raise InputError("final_rate: found 0, expected more than 0 and at most 1.")
    lowest = {"guidance_scale": 0.0, "sdi_scale": -math.inf, "mask_threshold": 0.0, "checkpoint_every": 0}
    lowest |= {"max_gaussians": 1, "rows_at_once": 1}
    for name, low in lowest.items():
        if getattr(config, name) is not None:
            within(name, getattr(config, name), low, math.inf)
    colour(config.background, "background")
    for name in ("t_range", "fpr_t_range", "grow_range"):
        span = getattr(config, name)
        if len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
            raise InputError(f"{name}: found {span}, expected two numbers, 0 <= low < high <= 1.")


def within(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        span = f"from {low} to {high}" if math.isfinite(high) else f"{low} or more"
        raise InputError(f"{name}: found {value}, expected {span}.")


def choose(name: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        matches = difflib.get_close_matches(value, choices, n=1)
        hint = f" (did you mean {matches[0]!r}?)" if matches else ""
        raise InputError(f"{name}: {value!r} is not known{hint}; choose one of {', '.join(choices)}.")


def colour(value: Iterable[float], name: str) -> tuple[float, float, float]:
    """Three numbers in [0, 1] as a tuple; raises InputError."""
    numbers = tuple(float(v) for v in value)
    if len(numbers) != 3 or not all(0 <= v <= 1 for v in numbers):
        raise InputError(f"{name}: found {list(numbers)}, expected red, green, blue in [0, 1].")
    return numbers


def is_rig(text: str) -> bool:
    """Whether the setting names a rig, or leaves it open, and not a file of cameras."""
    return text == "auto" or text.partition(":")[0] in RIGS


def rig(text: str) -> tuple[str, int | None]:
    """`dome:48` as ("dome", 48), `dome` and `auto` as ("dome", None); raises InputError."""
    name, colon, count = text.partition(":")
    if text == "auto":
        return "dome", None
    if name not in RIGS:
        raise InputError(f"cameras: {text!r} is not a rig; choose orbit, dome or dome:N.")
    if not colon:
        return name, None
    if not count.isdecimal() or not 1 <= int(count) <= 1000:
        raise InputError(f"cameras: {text!r} wants a number of views from 1 to 1000, as in {name}:48.")
    return name, int(count)
