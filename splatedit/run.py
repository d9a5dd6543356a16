"""Config -> outputs folder: what `splatedit run` does between reading the words and printing the path."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rich.console import Console
from rich.markup import escape

from splatedit import __version__, folders, vram
from splatedit.checkpoints import Keeper, Log, check_cameras, check_same, patience, read_checkpoint
from splatedit.config import Config, check, colour, is_rig, rig, save_config
from splatedit.errors import InputError, Lost, OutOfMemory
from splatedit.folders import CHECKPOINT, clean, find, finished, in_use, locked, output_folder
from splatedit.model_files import first_line

if TYPE_CHECKING:
    from torch import Tensor

    from splatedit.cameras import Cameras
    from splatedit.captures import Capture
    from splatedit.editing import Step
    from splatedit.gaussians import Gaussians
    from splatedit.images import ImageStep
    from splatedit.metrics import Report
    from splatedit.priors import Prior, Savings
    from splatedit.regions import PixelChange

# Exit statuses of `splatedit run`; 2 is a mistake in what was asked.
DONE, NOT_CHANGED, INTERRUPTED = 0, 3, 130
VIEWS, ELEVATION = 8, 12.0  # of the before/after pairs and of the change report; degrees
FRAMES, FPS = 72, 24  # of turntable.mp4
LOST = 7.0  # dB to the source below which nothing is left of it
LESS = "a smaller model, a mask, or close what else uses the memory"


class Watch(Protocol):
    """Somebody who looks on while a run is under way, and may hold it up or end it."""

    def begin(self, work: Work) -> None:
        """Everything is loaded and settled; the first step comes next."""

    def step(self, step: Step) -> bool:
        """A step is done; False ends the edit early, as Ctrl-C does. The run waits for the answer."""
        ...


class Outcome(NamedTuple):
    """What a run leaves behind."""

    folder: Path
    edited: Path  # the splat file
    record: dict[str, Any]  # what run.json holds
    status: int  # DONE, NOT_CHANGED or INTERRUPTED


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


def run(
    config: Config,
    console: Console | None = None,
    command: Sequence[str] | None = None,
    resume: str | Path | None = None,
    watch: Watch | None = None,
    load: Callable[..., Prior] | None = None,
) -> Outcome:
    """Edit the scene of `config` and write the outputs folder; progress and messages go to `console` (stderr).

    command: the words that started the run, for cmd.txt. resume: the folder of a run that was cut off (or a checkpoint
    in it), to go on there; `checkpoints.FREE` says what of `config` may have changed. watch: looks on, see `Watch`.
    load: called instead of `priors.load_prior`. A KeyboardInterrupt after the first step ends the edit early and
    everything is written; before it, nothing is left behind. Raises InputError for a mistake in the settings, the
    scene, or a model that is not there, all before the first picture is drawn.
    """
    from splatedit import mask_settings

    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    started, clock = datetime.now().astimezone(), time.perf_counter()
    check_run(config, resume)
    with working_folder(config, resume, console) as folder:
        from splatedit.files import sha256

        digest = sha256(config.scene)
        saved = None if resume is None else recall(Path(resume), folder, config, digest, console)
        record = None if resume is None else finished(folder, config.steps)
        if record is not None:
            console.print(escape(f"{folder} is finished: {record['steps']} of {config.steps} steps."))
            return Outcome(folder, folder / "edited.ply", record, record["exit_status"])
        save_config(config, folder / "config.yaml")
        with open(folder / "cmd.txt", "a", encoding="utf-8") as stream:
            stream.write(shlex.join(command or sys.argv) + "\n")
        work = prepare(config, console, saved, load)._replace(folder=folder, saved=saved, sha256=digest)
        work = work._replace(mask=mask_settings.of(work, console))
        if saved is not None:
            check_cameras(saved, head(work)["cameras"])
        keeper = Keeper(folder / CHECKPOINT, head(work), config.checkpoint_every, partial(warn, console))
        if watch is not None:
            watch.begin(work)
        with kept(folder, console):
            work, log = within_memory(work, console, keeper, watch)
            record = write(work, console, folder, log, keeper)
            record["started"] = started.isoformat(timespec="seconds")
            record["wall_seconds"] = time.perf_counter() - clock
            write_json(record, folder / "run.json")
    return Outcome(folder, folder / "edited.ply", record, record["exit_status"])


# ---------------------------------------------------------------------------------------------------------- beforehand
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


@contextmanager
def working_folder(config: Config, resume: str | Path | None, console: Console) -> Iterator[Path]:
    """The outputs folder of this run, nobody else's while it lasts: a new one, or that of the run to go on with.

    A new one is taken away again if the body fails before there is a checkpoint or a result.
    """
    if resume is not None:
        folder = find(resume, config)
        with locked(folder):
            clean(folder)
            yield folder
        return
    if unfinished := [f for f in folders.runs(config) if not finished(f) and not in_use(f)]:
        console.print(escape(f"{unfinished[-1]} is unfinished; --resume goes on there. This is a new run."))
    with output_folder(config, lambda new: (new / CHECKPOINT).exists() or (new / "edited.ply").exists()) as folder:
        yield folder


def recall(given: Path, folder: Path, config: Config, sha256: str, console: Console) -> dict[str, Any] | None:
    """The checkpoint to go on from, None if the run came to none; raises InputError if it is of another edit."""
    path = given if given.suffix == ".pt" else folder / CHECKPOINT
    if not path.exists():
        if (folder / "run.json").exists() and not finished(folder, config.steps):
            raise InputError(f"--resume: {path} is not there any more; without it {folder} cannot go on, run anew.")
        console.print(escape(f"{folder} has no checkpoint yet: it begins at the first step."))
        return None
    saved = read_checkpoint(path)
    check_same(saved, config, sha256)
    for name, version in versions().items():
        if saved["versions"].get(name, version) != version:
            was = f"{name} was {saved['versions'][name]}, now {version}"
            warn(console, f"{was}; the result may differ in its last bits.")
    return saved


@contextmanager
def kept(folder: Path, console: Console) -> Iterator[None]:
    """If the body fails, say what is kept and how to go on."""
    try:
        yield
    except BaseException:
        if (folder / CHECKPOINT).exists():
            again = shlex.join(["splatedit", "run", "--resume", str(folder)])
            console.print(f"[bold yellow]The edit is kept[/] as of its last checkpoint; to go on: {escape(again)}")
        elif (folder / "edited.ply").exists():
            console.print(f"[bold yellow]The edit is kept:[/] {escape(str(folder))}/edited.ply is whole.")
        raise


def head(work: Work) -> dict[str, Any]:
    """What every checkpoint of a run holds beside the state of the edit."""
    from splatedit.source_cache import digest

    return {
        "config": asdict(work.config),
        "sha256": work.sha256,
        "source_prompt": work.source_prompt,
        "origin": work.origin,
        "up": work.up,
        "cameras": None if work.capture is None else digest(*cameras_of_edit(work)["cameras"]),
        "versions": versions(),
    }


def warn(console: Console, line: str) -> None:
    console.print(f"[bold yellow]Warning:[/] {escape(line)}")


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
    if config.viewer:
        console.print("[yellow]--viewer: the live viewer is not in this version yet; the edit runs without it.")
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


# ------------------------------------------------------------------------------------------------------------ the loop
def within_memory(work: Work, console: Console, keeper: Keeper, watch: Watch | None = None) -> tuple[Work, Log]:
    """The log of `optimise`; out of memory, once, it goes on from the last checkpoint with the next smaller settings.

    Raises OutOfMemory if that is not enough, or there are none.
    """
    try:
        return work, optimise(work, console, keeper, watch)
    except Exception as error:
        if not vram.out_of_memory(error):
            raise
        reason, room = first_line(error), vram.room(work.prior.device)
        smaller = vram.step_down(asdict(work.config), room)
        if smaller is None:
            raise OutOfMemory(f"out of memory ({reason}), with the smallest settings already; {LESS}.") from error
    # Only here has the exception let go of what the step had made.
    vram.release()
    work, fact = stepped_down(work, smaller, keeper, console)
    try:
        log = optimise(work, console, keeper, watch)
    except Exception as error:
        if not vram.out_of_memory(error):
            raise
        found = f"out of memory again ({first_line(error)}), with --vram {smaller.vram}"
        raise OutOfMemory(f"{found}; try a smaller --vram with --resume, or {LESS}.") from error
    log.stepped_down = fact
    return work, log


def stepped_down(work: Work, smaller: vram.Smaller, keeper: Keeper, console: Console) -> tuple[Work, dict[str, Any]]:
    """The work with smaller settings at its last checkpoint, and what run.json says of it."""
    config = replace(work.config, **smaller.changes)
    saved = read_checkpoint(keeper.path) if keeper.path.exists() else None
    done = saved["step"] if saved else 0
    said = ", ".join(f"{k}={json.dumps(v)}" for k, v in smaller.changes.items() if k != "vram")
    warn(console, f"out of memory; going on after {done} steps as with --vram {smaller.vram}: {said}.")
    work.prior.save_memory(savings(config))
    work = work._replace(config=config, saved=saved)
    keeper.head = head(work)
    save_config(config, keeper.path.parent.parent / "config.yaml")
    return work, {"after_steps": done, **smaller.changes}


def optimise(work: Work, console: Console, keeper: Keeper, watch: Watch | None = None) -> Log:
    """Run the edit under a progress bar; Ctrl-C after the first step ends it early and keeps what is done."""
    from splatedit import editing

    config, saved = work.config, work.saved
    log = Log(**saved["log"]) if saved else Log()
    done, spent, now = len(log.loss), log.wall, time.perf_counter()
    if saved is not None:
        console.print(f"going on after {done} of {config.steps} steps")
        log.resumed.append(done)
        if done == config.steps:
            return log  # edited.ply was written before that checkpoint
    steps = editing.edit(
        work.gaussians, config.prompt, work.source_prompt, model=work.prior, up=work.up, resume=saved, **options(work)
    )
    with progress_bar(console, config.steps) as show, patience() as stop:
        try:
            for step in steps:
                log.add(step, -now + (now := time.perf_counter()))
                show(step, (log.wall - spent) / (len(log.loss) - done))
                warn_early(console, step, work.inside)
                stop.armed = True
                if keeper.due(step.index + 1) and step.index + 1 < config.steps:
                    keeper.write(log)
                if watch is not None:
                    shown = time.perf_counter()
                    stop.asked |= not watch.step(step)
                    now += time.perf_counter() - shown  # the pace is that of the steps, not of who holds them up
                if stop.asked:
                    break
        except KeyboardInterrupt:
            stop.asked, log.whole = True, False
            if log.last is None:
                raise
        except Lost as error:
            log.whole = False
            if log.last is None:
                raise
            console.print(f"[bold red]The edit is lost:[/] {escape(str(error))} Writing what is left.")
    if stop.asked and len(log.loss) < config.steps:
        log.interrupted = True
        said = f"after {len(log.loss)} of {config.steps} steps; writing what is done."
        console.print(f"[bold yellow]Interrupted[/] {said}")
    return log


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


@contextmanager
def progress_bar(console: Console, steps: int) -> Iterator[Callable[[Step | ImageStep, float], None]]:
    """A function to call with each Step and the mean seconds per step: a live bar, or ten lines where there is none."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def words(step: Step | ImageStep, pace: float) -> str:
        return f"loss {step.loss:.3g}  {pace:.2f} s/step"

    def line(step: Step | ImageStep, pace: float) -> None:
        done = step.index + 1
        if done == steps or done % max(steps // 10, 1) == 0:
            console.print(f"step {done}/{steps}  {words(step, pace)}  {(steps - done) * pace:.0f} s left")

    if not console.is_terminal:
        yield line
        return
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console) as bar:
        task = bar.add_task("starting", total=steps)

        def move(step: Step | ImageStep, pace: float) -> None:
            bar.update(task, completed=step.index + 1, description=words(step, pace))

        yield move


def warn_early(console: Console, step: Step, inside: float = 1.0) -> None:
    """Say while there is time that nothing is changing, or that nothing is left; inside: share that may change."""
    from splatedit.metrics import still

    done = step.index + 1
    if not math.isfinite(step.loss):
        if done == 1 or done % 50 == 0:
            console.print(f"[bold red]Step {done}: the loss is {step.loss};[/] the edit is lost. Try lower lr_* rates.")
    elif done == max(step.steps // 4, 2):
        if still(step.psnr_to_source, inside):
            console.print(
                f"[bold yellow]Nothing is changing:[/] after {done} steps the renders still equal the source "
                f"({step.psnr_to_source:.0f} dB). Is the target the source prompt? A higher --guidance-scale may help."
            )
        elif step.psnr_to_source < LOST:
            console.print(
                f"[bold yellow]Little is left of the source[/] after {done} steps ({step.psnr_to_source:.1f} dB); "
                "if it turns to noise, lower --guidance-scale or the lr_* rates."
            )


# ----------------------------------------------------------------------------------------------------------- afterwards
def write(work: Work, console: Console, folder: Path, log: Log, keeper: Keeper) -> dict[str, Any]:
    """Write everything but run.json, the edited splats first; return what run.json shall hold."""
    from splatedit.report import write_report

    raw, edited, lost = write_splats(work, folder, log)
    if log.last is not None and log.whole:
        keeper.write(log)
    record, report, regions, pictures = facts(work, log), None, {}, []
    if log.rows is not None:
        console.print(f"{record['splats_added']:,} splats added, {record['splats_removed']:,} removed")
    number = None
    try:
        number = remember(work, folder, log, record, console)
        with console.status("measuring the change"):
            report = measure(work, raw, log.rows)
        with console.status("drawing"):
            pictures, pixels = draw_pairs(work, folder, edited)
        regions = measure_regions(work, edited, log.rows, pixels)
    except KeyboardInterrupt:  # the splats are safe; the pictures are given up
        console.print("[bold yellow]Interrupted[/] while writing: the report and pictures not yet done are left out.")
    interrupted = log.interrupted or not pictures
    changed = report is not None and report.verdict == "changed"
    record["interrupted"] = interrupted
    record["exit_status"] = INTERRUPTED if interrupted else DONE if changed else NOT_CHANGED
    record["mended_splats"] = lost
    record["change"] = report.as_dict() if report else None
    record["network_evaluations"] = {
        "edit": log.evaluations,
        "all": work.prior.evaluations,
        "backward": log.backwards,
    }
    record["source_cache"] = log.cache
    record["peak_memory_mib"] = peak_memory()
    metrics = {
        "change": record["change"],
        "regions": regions,
        "views": views_of_report(work, report) if report else [],
        "pictures": pictures,
        "curve": curve(log),
    }
    write_json(metrics, folder / "metrics.json")
    history = note(folder, number, record) if number else []
    if pictures:
        write_report(record, metrics, work.config, folder, history)
    if report:
        tell(console, report, work.config.prompt, min(VIEWS, len(work.capture.report)) if work.capture else VIEWS)
    return record


def write_splats(work: Work, folder: Path, log: Log) -> tuple[Gaussians, Gaussians, int]:
    """Write edited.ply; return the splats as they came out of the edit, as they were written, and how many differ.

    If all steps had been taken before this run was resumed, the file is there, and is read.
    """
    from splatedit.files import load, save

    if log.last is None:
        edited = load(folder / "edited.ply")
        return edited, edited, 0
    raw, log.rows = without_lost(log.last.gaussians.to("cpu"), log.rows)
    edited, lost = mend(raw, work.gaussians, log.rows)
    save(edited._replace(comments=(*work.gaussians.comments, signature(work))), folder / "edited.ply")
    return raw, edited, lost


def remember(work: Work, folder: Path, log: Log, record: dict[str, Any], console: Console) -> int | None:
    """Record the edit in the history of edited.ply, on top of the scene's own; return its number, if that works."""
    from splatedit.stack import push

    facts = {**record, "config": asdict(work.config)}
    try:
        return push(folder / "edited.ply", work.gaussians, log.rows, facts, scene=work.config.scene).number
    except (InputError, OSError) as error:
        warn(console, f"{error} So this edit cannot be undone; edited.ply is complete all the same.")
        return None


def note(folder: Path, number: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Add to the history what came of the edit; return the history, see `stack.as_json`."""
    from splatedit.stack import Stack, as_json

    with suppress(InputError):
        stack = Stack(folder / "edited.ply")
        stack.note(number, verdict=(record["change"] or {}).get("verdict"), change=record["change"])
        stack.read()
        return as_json(stack)["entries"]
    return []


def without_lost(edited: Gaussians, rows: Tensor | None) -> tuple[Gaussians, Tensor | None]:
    """Leave out added splats that cannot be drawn, for which no source has values; rows as in `Step`."""
    if rows is None:
        return edited, None
    rows = rows.to("cpu")
    good = edited.drawable() | (rows >= 0)
    return (edited, rows) if good.all() else (edited.select(good), rows[good])


def mend(edited: Gaussians, source: Gaussians, rows: Tensor | None = None) -> tuple[Gaussians, int]:
    """Put back the source's values where a splat cannot be drawn, so that the file can be opened; and how many.

    rows: the source row that each splat continues, see `Step`; None: its own.
    """
    bad = ~edited.drawable()
    if not bad.any():
        return edited, 0
    fixed = {k: v.clone() for k, v in edited.parameters.items()}
    for name, value in fixed.items():
        value[bad] = source.parameters[name][bad if rows is None else rows[bad]]
    return edited._replace(**fixed), int(bad.sum())


def signature(work: Work) -> str:
    """One line for the header of edited.ply. No time of day: the same run gives the same file."""
    config = work.config
    how = f"{config.guidance}, {work.prior.name}, {config.steps} steps, seed {config.seed}"
    return f"splatedit {__version__}: {work.source_prompt!r} to {config.prompt!r}, {how}"


def measure(work: Work, edited: Gaussians, rows: Tensor | None) -> Report:
    """The change report over views held out, or of a rig such that lie between those of the pictures."""
    from splatedit.cameras import bounds
    from splatedit.metrics import change_report

    source, prior = work.gaussians, work.prior
    return change_report(
        source.to(prior.device),
        edited.to(prior.device),
        prior,
        views_of_model(work, VIEWS, azimuth=180 / VIEWS),
        work.config.prompt,
        work.source_prompt,
        bounds(source).radius,
        seed=work.config.seed,
        background=work.background,
        rows=rows,
        inside=work.inside,
    )


def measure_regions(
    work: Work, edited: Gaussians, rows: Tensor | None, pixels: dict[str, PixelChange]
) -> dict[str, dict[str, Any]]:
    """What metrics.json says of the whole scene and, with a mask, of its inside and outside."""
    from splatedit.cameras import bounds
    from splatedit.regions import as_dicts, splat_changes

    radius = bounds(work.gaussians).radius
    return as_dicts(splat_changes(work.gaussians, edited.to("cpu"), radius, rows, work.mask), pixels)


def views_of_report(work: Work, report: Report) -> list[dict[str, Any]]:
    """What metrics.json says of each view of the change report."""
    names = view_names(work, len(report.views), azimuth=180 / VIEWS)
    return [{"view": name, **numbers} for name, numbers in zip(names, report.view_dicts(), strict=True)]


def draw_pairs(work: Work, folder: Path, edited: Gaussians) -> tuple[list[dict[str, Any]], dict[str, PixelChange]]:
    """Write renders/*.png, before and after, and turntable.mp4.

    Returns what metrics.json says of each pair, its paths within the folder, and how all pairs changed, by region.
    """
    from splatedit import media
    from splatedit.regions import pixel_changes
    from splatedit.scenes import marked

    both = work.gaussians.to(work.prior.device), edited.to(work.prior.device)
    cameras, turn = views_of_pictures(work)
    before, after = (list(media.draw(g, cameras, work.background)) for g in both)
    inside = None if work.mask is None else list(media.draw(marked(both[0], work.mask), cameras, (0.0, 0.0, 0.0)))
    together, each = pixel_changes(before, after, inside)
    (folder / "renders").mkdir(exist_ok=True)
    pictures = []
    for index, name in enumerate(view_names(work, cameras.n)):
        paths = {when: f"renders/{index:02d}_{when}.png" for when in ("before", "after")}
        media.save_png(before[index], folder / paths["before"])
        media.save_png(after[index], folder / paths["after"])
        pictures.append({"view": name, **paths, **{region: c._asdict() for region, c in each[index].items()}})
    media.save_png(media.sheet([*before, *after], cameras.n), folder / "renders" / "sheet.png")
    film = media.beside(*(media.draw(g, turn, work.background) for g in both))
    media.save_frames(film, folder / "turntable.mp4", max(FPS * turn.n / FRAMES, 2))
    return pictures, together


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


def facts(work: Work, log: Log) -> dict[str, Any]:
    """What run.json says of the run itself."""
    from splatedit.cameras import guess_up
    from splatedit.metrics import count_rows

    config, prior, done = work.config, work.prior, len(log.loss)
    added, removed = count_rows(log.rows, work.gaussians.n)
    scale = prior.default_scale(config.guidance) if config.guidance_scale is None else config.guidance_scale
    return {
        "scene": config.scene,
        "sha256": work.sha256,
        "splats": work.gaussians.n,
        "splats_that_may_change": work.gaussians.n if work.mask is None else int(work.mask.sum()),
        "splats_added": added,
        "splats_removed": removed,
        "sh_degree": work.gaussians.sh_degree,
        "up": work.up or guess_up(work.gaussians),
        "cameras": seen_from(work),
        "prompt": config.prompt,
        "source_prompt": work.source_prompt,
        "source_prompt_from": work.origin,
        "model": prior.name,
        "guidance": config.guidance,
        "guidance_scale": scale,
        "seed": config.seed,
        "steps": done,
        "steps_asked": config.steps,
        "resumed_after": log.resumed,
        "stepped_down": log.stepped_down,
        "seconds_per_step": {"all": log.wall / done, **{k: v / done for k, v in log.seconds.items()}},
        "source_seconds": log.before,
        "edit_seconds": log.wall,
        "device": device_name(prior.device),
        "versions": versions(),
    }


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


def versions() -> dict[str, str]:
    """Of Python, splatedit and what decides its numbers."""
    found = {"splatedit": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in ("torch", "numpy", "numba", "diffusers", "transformers", "gsplat"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device_name(device) -> str:
    """The GPU's name, or the CPU's kind with cores and threads."""
    import torch

    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"


def peak_memory() -> dict[str, int | None]:
    """MiB: the largest resident size of the process so far, and the most that torch held on the GPU."""
    import resource

    import torch

    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    gpu = torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else None
    return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit, "gpu": gpu}


def json_number(value: float) -> float | None:
    """The number, or None, JSON's null, for what JSON has no number for."""
    return value if math.isfinite(value) else None


def curve(log: Log) -> dict[str, list]:
    """Loss, PSNR to the source and (ids) drift and rms of the noise in every step; what is not finite becomes null."""
    lines: dict[str, list] = {"loss": [json_number(v) for v in log.loss], "psnr": [json_number(v) for v in log.psnr]}
    if any(log.drift):
        lines["fpr_drift"] = [[json_number(v) for v in row] for row in log.drift]
        lines["fpr_rms"] = [[json_number(v) for v in row] for row in log.rms]
    return lines


def rounded(value: Any) -> Any:
    """The same plain value with every float at six significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_json(content: Any, path: Path) -> None:
    """Write JSON that any parser reads (no NaN, no infinity), floats to six significant digits."""
    from splatedit.files import atomic

    with atomic(path) as stream:
        stream.write((json.dumps(rounded(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def tell(console: Console, report: Report, prompt: str, count: int) -> None:
    """The change report, over `count` views, in a line, or a loud box with what to try."""
    from rich.panel import Panel

    views = round(report.prefers_target * count)
    line = (
        f"{report.changed_share:.0%} of the splats changed, {report.psnr_to_source:.1f} dB to the source, "
        f"the model prefers {prompt!r} in {views} of {count} views"
    )
    if report.verdict == "changed":
        console.print(escape(f"changed: {line}"))
        for hint in report.advice:
            console.print(f"[yellow]{escape(hint)}")
        return
    title = {"unchanged": "NOTHING CHANGED", "noise": "THE EDIT WENT TO NOISE"}[report.verdict]
    text = "\n".join([line, *(f"  try {hint}" for hint in report.advice)])
    console.print(Panel(escape(text), title=f"[bold red]{title}", border_style="red", expand=False), soft_wrap=False)
