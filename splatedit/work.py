"""What a run works on, loaded and settled: scene, model, prompts, cameras; and what `edit` is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from splatedit import vram
from splatedit.config import Config, check, colour, is_rig, rig
from splatedit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from splatedit.cameras import Cameras
    from splatedit.captures import Capture
    from splatedit.gaussians import Gaussians
    from splatedit.priors import Prior, Savings

VIEWS, ELEVATION = 8, 12.0  # of the before/after pairs and of the change report; degrees
FRAMES = 72  # of turntable.mp4


class Work(NamedTuple):
    """What a run works on once everything is loaded and settled."""

    config: Config
    gaussians: Gaussians
    prior: Prior
    source_prompt: str
    origin: str  # of the source prompt: "option", "sidecar", "history", "model" or "none"
    up: str | None  # None: guessed by the rigs
    capture: Capture | None = None  # the cameras of a file; None: a rig
    sha256: str = ""  # of the scene's file
    folder: Path | None = None  # of this run
    saved: dict[str, Any] | None = None  # the checkpoint that it goes on from
    mask: Tensor | None = None  # (n,) bool, which splats may change; None: all

    @property
    def background(self) -> tuple[float, float, float]:
        return colour(self.config.background, "background")

    @property
    def inside(self) -> float:
        """Share of the splats that may change."""
        return 1.0 if self.mask is None else float(self.mask.float().mean())


def check_run(config: Config, resume: str | Path | None = None) -> None:
    """Raise InputError for what can be told to be wrong with a run before anything is loaded or made."""
    from splatedit import mask_settings
    from splatedit.priors import check_prior

    check(config)
    if not config.prompt.strip():
        raise InputError('prompt: it is empty; say what the scene shall show, as in "a pig".')
    if not config.scene or not Path(config.scene).exists():
        moved = "" if resume is None else f"; if it was moved, say where: splatedit run --resume {resume} SCENE"
        raise InputError(f"{config.scene or 'scene'}: no such file; expected a splat file, such as a .ply{moved}.")
    if resume is None:  # else the run has its mask already
        mask_settings.without_text(config)
    check_prior(config.model, config.offline)


def prepare(
    config: Config,
    console: Console,
    saved: dict[str, Any] | None = None,
    load_model: Callable[..., Prior] | None = None,
) -> Work:
    """Load the scene and the model and settle source prompt and up axis (those of `saved`, if given); or InputError."""
    from splatedit.editing import resolve_device
    from splatedit.files import load, sidecar
    from splatedit.priors import load_prior
    from splatedit.stack import introduce, shows

    device = resolve_device(config.device)
    gaussians, beside = load(config.scene), sidecar(config.scene)
    capture = find_views(config, gaussians, console)
    with console.status("loading the model"):
        prior = (load_model or load_prior)(config.model, device, offline=config.offline)
    prior.save_memory(savings(config))
    prior.text([config.prompt])  # a word the model does not know is told now, not after the first pictures
    console.print(escape(f"{gaussians.n:,} splats from {config.scene}, model {prior.name}, on {device}"))
    if line := introduce(config.scene):
        console.print(escape(line))
    work = Work(config, gaussians, prior, "", "none", config.up or beside.up, capture)
    if saved is not None:
        work = work._replace(source_prompt=saved["source_prompt"], origin=saved["origin"], up=saved["up"])
    elif config.source_prompt is not None:
        work = work._replace(source_prompt=config.source_prompt, origin="option")
    elif beside.source_prompt is not None:
        work = work._replace(source_prompt=beside.source_prompt, origin="sidecar")
    elif (shown := shows(config.scene)) is not None:
        work = work._replace(source_prompt=shown, origin="history")
    elif prior.vocabulary is not None:
        work = work._replace(source_prompt=ask_prior(work, console), origin="model")
    else:
        console.print(
            "[bold yellow]No source prompt:[/] the scene has no sidecar and this model no list of prompts to try, so "
            "the empty prompt is used. --source-prompt usually gives a much better edit."
        )
    prior.text([work.source_prompt])
    said = {
        "option": "as given",
        "sidecar": f"from {Path(config.scene).with_suffix('.yaml').name}",
        "history": "from its history; --source-prompt overrides it",
        "model": "found by the model; --source-prompt overrides it",
        "none": "empty",
    }
    console.print(
        escape(f"from {work.source_prompt!r} ({said[work.origin]}) to {config.prompt!r}, by {config.guidance}")
    )
    return work


def find_views(config: Config, gaussians: Gaussians, console: Console) -> Capture | None:
    """The cameras of the file that is asked for or lies beside the scene, said in a line; None for a rig."""
    from splatedit.captures import find_capture

    if config.cameras != "auto" and is_rig(config.cameras):
        return None
    limits = config.cameras_held_out, config.cameras_most
    capture, said = find_capture(config.cameras, config.scene, gaussians, *limits)
    if said:
        console.print(escape(said))
    return capture


def ask_prior(work: Work, console: Console) -> str:
    """The prompt of the model's vocabulary that explains a few views of the scene best."""
    import torch

    from splatedit.priors import find_prompt
    from splatedit.render import render

    prior = work.prior
    views = views_of_model(work, VIEWS // 2)
    with console.status("asking the model what the scene shows"), torch.no_grad():
        images = render(work.gaussians.to(prior.device), views, work.background).rgb
        generator = torch.Generator(prior.device).manual_seed(work.config.seed)
        prompt, _ = find_prompt(prior, prior.encode(images), generator)
    return prompt


def options(work: Work) -> dict[str, Any]:
    """The settings that `edit` takes, under its names and in its types."""
    from splatedit.growth import Growth
    from splatedit.scenes import Hold, Rates
    from splatedit.tuning import Tuning

    config = work.config
    begin, end = config.grow_range
    most = vram.cap(asdict(config), work.gaussians.n)
    growth = Growth(config.grow_percent, config.grow_every, (begin, end), most, config.prune_opacity)
    same = (
        "guidance",
        "guidance_scale",
        "steps",
        "seed",
        "solver",
        "fpr_iters",
        "fpr_lambda",
        "source_cache",
        "cache_refresh",
        "cache_mb",
        "views_per_step",
        "anneal",
        "timesteps",
    )
    same += ("final_rate", "average_last", "supersample", "neighbours", "device", "offline")
    return {
        **{k: getattr(config, k) for k in same},
        "cache_dir": str(work.folder / "source_cache")
        if config.cache_dir == "run" and work.folder
        else config.cache_dir,
        **cameras_of_edit(work),
        "t_range": (config.t_range[0], config.t_range[1]),
        "background": work.background,
        "mask": work.mask,
        "hold": Hold(config.anchor, config.outside),
        "growth": growth,
        "tuning": Tuning(**{k: getattr(config, k) for k in Tuning._fields}),
        "rates": Rates(**{k: getattr(config, f"lr_{k}") for k in Rates._fields}),
    }


def savings(config: Config) -> Savings:
    """What the settings ask of the model, to save memory."""
    from splatedit.priors import Savings

    return Savings(**{k: getattr(config, k) for k in Savings._fields})


def cameras_of_edit(work: Work) -> dict[str, Any]:
    """`cameras`, and `views` if the settings say how many."""
    if work.capture is not None:
        return {"cameras": work.capture.square(work.capture.edit, work.prior.image_size)}
    name, views = rig(work.config.cameras)
    return {"cameras": name} if views is None else {"cameras": name, "views": views}


def seen_from(work: Work) -> dict[str, Any]:
    """What run.json says of the cameras: where from, how many to edit from and held out, and what they see."""
    from splatedit.captures import MOST

    if work.capture is None:
        name, views = rig(work.config.cameras)
        return {"from": name, "edit": views or MOST, "held_out": 0}
    file = work.capture.file
    return {
        "from": str(file.path),
        "kind": file.kind,
        "edit": len(work.capture.edit),
        "held_out": work.capture.held_out,
        "missing_pictures": file.missing,
        "scene_in_view": work.capture.seen,
        "like_the_photographs": work.capture.alike,
        "world": work.capture.world or "as in the file",
    }


def views_of_model(work: Work, count: int, azimuth: float = 0.0) -> Cameras:
    """Square views that the model is asked about: of the file's, at most `count` of those held out, else an orbit."""
    from splatedit.cameras import orbit
    from splatedit.captures import spread

    size = work.prior.image_size
    if work.capture is not None:
        return work.capture.square(spread(work.capture.report, count), size)
    return orbit(work.gaussians, count, elevation=ELEVATION, azimuth=azimuth, size=size, up=work.up)


def view_names(work: Work, count: int, azimuth: float = 0.0) -> list[str]:
    """What `count` views of the report or the pictures are called: the file's names, or angles."""
    from splatedit.captures import spread

    if work.capture is not None:
        return [view.name for view in spread(work.capture.report, count)]
    return [f"{azimuth + 360 * index / count:g}° around" for index in range(count)]


def views_of_pictures(work: Work) -> tuple[Cameras, Cameras]:
    """Views of the pairs of pictures, and of the film: a turntable, or along the file's cameras in their own shape."""
    from splatedit.cameras import orbit
    from splatedit.captures import spread

    trained = work.prior.image_size
    size = max(trained, min(2 * trained, 512))  # larger than the model saw: shows what it could not see
    if work.capture is not None:
        chosen = spread(work.capture.report, VIEWS), spread(work.capture.views, FRAMES)
        return work.capture.whole(chosen[0], size), work.capture.whole(chosen[1], size)
    pictures, film = (orbit(work.gaussians, n, elevation=ELEVATION, size=size, up=work.up) for n in (VIEWS, FRAMES))
    return pictures, film
