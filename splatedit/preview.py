"""`splatedit preview`: a few views of a scene edited as pictures, in seconds, before the scene itself is."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape

from splatedit import image_run, mask_settings
from splatedit.cameras import Cameras, bounds
from splatedit.config import Config
from splatedit.editing import rig_for
from splatedit.errors import DONE, INTERRUPTED, NOT_CHANGED, InputError
from splatedit.files import atomic
from splatedit.folders import place
from splatedit.images import SGD_STEP, decode, edit_images, encode
from splatedit.media import save_png, sheet, to_bytes
from splatedit.progress import progress_bar
from splatedit.scenes import Splats
from splatedit.work import Work, check_run, options, prepare

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

VIEWS, STEPS = 4, 20
PUBLISHED = 200  # steps of an edit of pictures; fewer take longer strides, so that all of them come equally far


class Preview(NamedTuple):
    """What a preview leaves behind."""

    sheet: Path
    views: list[int]  # numbers of the cameras
    measured: list[dict]  # of each view, see `image_run.measure`
    status: int  # DONE, NOT_CHANGED or INTERRUPTED


class Views(NamedTuple):
    """What the model is shown."""

    numbers: list[int]  # of the cameras
    pictures: Tensor  # (b, 3, s, s) in [0, 1]
    inside: Tensor | None  # (b, 1, s, s) in [0, 1], how much of a pixel may change; None: all of all


def preview(config: Config, views: int = VIEWS, steps: int = STEPS, console: Console | None = None) -> Preview:
    """Edit a few views of the scene of `config` as pictures, by its guidance, and write one sheet of before and after.

    The sheet is the only file, OUTPUTS/SCENE/PROMPT@TIME.preview.png. A KeyboardInterrupt after the first step keeps
    what is done. Raises InputError for a mistake in the settings, the scene or the model.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    clock = time.perf_counter()
    check_run(config)
    if not 1 <= views <= 4 or steps < 1:
        raise InputError(f"preview: found {views} views and {steps} steps, expected 1 to 4 views and 1 step or more.")
    work = prepare(config, console)
    work = work._replace(mask=mask_settings.of(work, console))
    seen = look(work, views)
    after, done = edit(work, seen, steps, console)
    if seen.inside is not None:
        after = seen.pictures + seen.inside * (after - seen.pictures)
    measured = image_run.measure(work.prior, seen.pictures, after, config.prompt, work.source_prompt, config.seed)
    path = write(work, seen, after, measured, done)
    changed = any(view["verdict"] == "changed" for view in measured)
    tell(work, measured, time.perf_counter() - clock, console)
    return Preview(path, seen.numbers, measured, INTERRUPTED if done < steps else DONE if changed else NOT_CHANGED)


@torch.no_grad()
def look(work: Work, count: int) -> Views:
    """Views of the scene far from each other, out of those that the edit would look from, as it would draw them."""
    config, prior = work.config, work.prior
    gaussians, settings = work.gaussians.to(prior.device), options(work)
    rig = rig_for(gaussians, settings["cameras"], settings.get("views", 48), prior.image_size, work.up)
    numbers = far_apart(rig, count)
    scene = Splats(
        gaussians,
        rig.pick(numbers),
        bounds(gaussians).radius,
        mask=work.mask,
        background=work.background,
        supersample=config.supersample,
        neighbours=0,
    )
    all_views = list(range(len(numbers)))
    inside = None if work.mask is None else scene.coverage(all_views)
    return Views(numbers, scene(all_views).rgb.clamp(0, 1), inside)


def far_apart(cameras: Cameras, count: int) -> list[int]:
    """Numbers of cameras that look from places far apart: the first, then always the farthest from those there are."""
    places = torch.linalg.inv(cameras.w2c.double())[:, :3, 3]
    chosen = [0]
    while len(chosen) < min(count, cameras.n):
        nearest = torch.cdist(places, places[chosen]).amin(1)
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)


def edit(work: Work, seen: Views, steps: int, console: Console) -> tuple[Tensor, int]:
    """The edited pictures, and after how many steps; fewer than asked if somebody interrupts."""
    settings = options(work)
    same = ("guidance", "t_range", "seed", "timesteps", "anneal", "tuning", "solver", "fpr_iters", "fpr_lambda")
    scale = settings["guidance_scale"]
    scale = work.prior.default_scale(work.config.guidance) if scale is None else scale
    images = edit_images(
        seen.pictures,
        work.config.prompt,
        work.source_prompt,
        model=work.prior,
        guidance_scale=scale,
        steps=steps,
        rate=SGD_STEP * PUBLISHED / steps,
        **{k: settings[k] for k in same},
    )
    last, start = None, time.perf_counter()
    with progress_bar(console, steps) as show:
        try:
            for last in images:
                show(last, (time.perf_counter() - start) / (last.index + 1))
        except KeyboardInterrupt:
            if last is None:
                raise
            console.print(f"[bold yellow]Interrupted[/] after {last.index + 1} of {steps} steps.")
    assert last is not None
    return last.pictures().nan_to_num(), last.index + 1


# ----------------------------------------------------------------------------------------------------------- the sheet
def write(work: Work, seen: Views, after: Tensor, measured: list[dict], done: int) -> Path:
    """Write the sheet beside the folders of runs; raises InputError if it cannot be."""
    path = place(work.config)
    path = path.with_name(f"{path.name}.preview.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"output_dir: {path.parent} cannot be written to ({reason}); choose another with -o."
        ) from None
    with atomic(path) as stream:
        save_png(drawn(work, seen, after, measured, done), stream)
    return path


def drawn(work: Work, seen: Views, after: Tensor, measured: list[dict], done: int) -> np.ndarray:
    """Three rows, a column for each view: the scene, the same through the autoencoder alone, the edit; labelled."""
    config, prior = work.config, work.prior
    plain = decode(prior, encode(prior, seen.pictures))
    source = work.source_prompt or "no prompt"
    rows = [
        (seen.pictures, lambda view: [f"camera {seen.numbers[view]}: the scene", source]),
        (plain, lambda view: ["the same through the model alone", source]),
        (
            after,
            lambda view: [
                f"{config.guidance}, {done} steps: {measured[view]['verdict']}",
                sees(config, measured[view]),
            ],
        ),
    ]
    tiles = [
        image_run.labelled(picture, words(view))
        for pictures, words in rows
        for view, picture in enumerate(to_bytes(enlarged(pictures)))
    ]
    return sheet(tiles, len(seen.numbers), gap=4)


def enlarged(pictures: Tensor) -> Tensor:
    """Pictures (b, 3, h, w), small ones as large as their labels need."""
    factor = image_run.TILE / max(pictures.shape[-2:])
    return pictures if factor <= 1 else F.interpolate(pictures, scale_factor=factor, mode="bicubic", antialias=True)


def sees(config: Config, view: dict) -> str:
    """What the model makes of one edited view."""
    return f"{config.prompt}: {'preferred' if view['prefers_target'] else 'not preferred'}"


def tell(work: Work, measured: list[dict], seconds: float, console: Console) -> None:
    """What came of it, in a line, and what to try."""
    prompt, count = work.config.prompt, len(measured)
    now, before = (sum(view[key] for view in measured) for key in ("prefers_target", "preferred_target_before"))
    margins = [[view[key] or 0.0 for view in measured] for key in ("margin_before", "margin")]
    gap = " to ".join(f"{sum(values) / count:+.3f}" for values in margins)
    verdicts = [view["verdict"] for view in measured]
    console.print(
        escape(
            f"{verdicts.count('changed')} of {count} views changed; the model prefers {prompt!r} in {now}, before in "
            f"{before} (margin {gap}); {seconds:.0f} s in all"
        )
    )
    hint = advice(verdicts, now, work)
    if hint:
        console.print(f"[bold yellow]{escape(hint)}")


def advice(verdicts: list[str], now: int, work: Work) -> str:
    """What to try before the scene is edited; empty where all is well."""
    same = work.config.prompt.strip() == work.source_prompt.strip()
    if "changed" not in verdicts:
        if verdicts.count("noise") > len(verdicts) / 2:
            return "ONLY NOISE: try a lower --guidance-scale."
        other = "another prompt (it equals the source prompt), " * same
        return f"NOTHING CHANGED: try {other}more --steps, a higher --guidance-scale or --guidance dds."
    if now <= len(verdicts) / 2:
        scene, prompt = shlex.quote(work.config.scene), shlex.quote(work.config.prompt)
        return (
            "The model does not see the prompt in the edited views: try more --steps, a higher "
            f"--guidance-scale or other words; `splatedit diagnose {scene} {prompt}` shows what it sees."
        )
    return ""
