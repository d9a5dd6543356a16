"""Config -> outputs folder: what `splatedit run` does between reading the words and printing the path."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from splatedit import __version__
from splatedit.config import Config, check, colour, rig, save_config
from splatedit.errors import InputError, Lost

if TYPE_CHECKING:
    from splatedit.editing import Step
    from splatedit.gaussians import Gaussians
    from splatedit.images import ImageStep
    from splatedit.metrics import Report
    from splatedit.priors import Prior

# Exit statuses of `splatedit run`; 2 is a mistake in what was asked.
DONE, NOT_CHANGED, INTERRUPTED = 0, 3, 130
VIEWS, ELEVATION = 8, 12.0  # of the before/after pairs and of the change report; degrees
FRAMES, FPS = 72, 24  # of turntable.mp4
STILL, LOST = 45.0, 7.0  # dB to the source: above the first nothing is changing, below the second nothing is left


class Outcome(NamedTuple):
    """What a run leaves behind."""

    folder: Path
    edited: Path  # the splat file
    record: dict[str, Any]  # what run.json holds
    status: int  # DONE, NOT_CHANGED or INTERRUPTED


class Job(NamedTuple):
    """What a run works on once everything is loaded and settled."""

    config: Config
    gaussians: Gaussians
    prior: Prior
    source_prompt: str
    origin: str  # of the source prompt: "option", "sidecar", "model" or "none"
    up: str | None  # None: guessed by the rigs
    folder: Path | None = None  # of this run

    @property
    def background(self) -> tuple[float, float, float]:
        return colour(self.config.background, "background")


class Log(NamedTuple):
    """The steps that were taken: the last one whole, of the others only numbers."""

    last: Step
    loss: list[float]
    psnr: list[float]  # dB to the source
    drift: list[list[float]]  # ids: posterior-mean drift after each FPR iteration
    rms: list[list[float]]  # ids: of the noise, likewise
    seconds: dict[str, float]  # summed over the steps: render, prior, encode, optimise
    before: float  # seconds before the first step: drawing and encoding the source
    wall: float  # seconds of the steps themselves
    interrupted: bool


def run(config: Config, console: Console | None = None, command: Sequence[str] | None = None) -> Outcome:
    """Edit the scene of `config` and write the outputs folder; progress and messages go to `console` (stderr).

    command: the words that started the run, for cmd.txt. A KeyboardInterrupt after the first step ends the edit early
    and everything is written; before it, nothing is left behind. Raises InputError for a mistake in the settings, the
    scene, or a model that is not there, all before the first picture is drawn.
    """
    from splatedit.priors import check_prior

    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    started, clock = datetime.now().astimezone(), time.perf_counter()
    check(config)
    if not config.prompt.strip():
        raise InputError('prompt: it is empty; say what the scene shall show, as in "a pig".')
    if not Path(config.scene).is_file():
        raise InputError(f"{config.scene or 'scene'}: no such file; expected a splat file (.ply).")
    check_prior(config.model, config.offline)
    with output_folder(config) as folder:
        save_config(config, folder / "config.yaml")
        (folder / "cmd.txt").write_text(shlex.join(command or sys.argv) + "\n", encoding="utf-8")
        job = prepare(config, console)._replace(folder=folder)
        log = optimise(job, console)
    record = write(job, console, folder, log)
    record["started"] = started.isoformat(timespec="seconds")
    record["wall_seconds"] = time.perf_counter() - clock
    write_json(record, folder / "run.json")
    return Outcome(folder, folder / "edited.ply", record, record["exit_status"])


# ---------------------------------------------------------------------------------------------------------- beforehand
@contextmanager
def output_folder(config: Config) -> Iterator[Path]:
    """Make a new outputs/<scene>/<prompt>@<time>; taken away again if the body fails. Raises InputError."""
    top = Path(config.output_dir)
    parent = top / slug(Path(config.scene).stem)
    new = [p for p in (parent, top) if not p.exists()]
    name = f"{slug(config.prompt)}@{datetime.now():%Y%m%d-%H%M%S}"
    folder, count = parent / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # two runs in one second
            count += 1
            folder = parent / f"{name}-{count}"
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"output_dir: {top} cannot be written to ({reason}); choose another with -o.") from None
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        for path in new:
            with suppress(OSError):  # another run has put something there
                path.rmdir()
        raise


def slug(text: str, longest: int = 48) -> str:
    """Text as a file name: letters and digits of any script, the rest as single hyphens."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:longest].rstrip("-") or "edit"


def prepare(config: Config, console: Console) -> Job:
    """Load the scene and the model and settle source prompt and up axis; raises InputError."""
    from splatedit.editing import resolve_device
    from splatedit.files import load, sidecar
    from splatedit.priors import load_prior

    device = resolve_device(config.device)
    gaussians, beside = load(config.scene), sidecar(config.scene)
    if config.viewer:
        console.print("[yellow]--viewer: the live viewer is not in this version yet; the edit runs without it.")
    with console.status("loading the model"):
        prior = load_prior(config.model, device, offline=config.offline)
    prior.text([config.prompt])  # a word the model does not know is told now, not after the first pictures
    console.print(escape(f"{gaussians.n:,} splats from {config.scene}, model {prior.name}, on {device}"))
    job = Job(config, gaussians, prior, "", "none", config.up or beside.up)
    if config.source_prompt is not None:
        job = job._replace(source_prompt=config.source_prompt, origin="option")
    elif beside.source_prompt is not None:
        job = job._replace(source_prompt=beside.source_prompt, origin="sidecar")
    elif prior.vocabulary is not None:
        job = job._replace(source_prompt=ask_prior(job, console), origin="model")
    else:
        console.print(
            "[bold yellow]No source prompt:[/] the scene has no sidecar and this model no list of prompts to try, so "
            "the empty prompt is used. --source-prompt usually gives a much better edit."
        )
    prior.text([job.source_prompt])
    said = {
        "option": "as given",
        "sidecar": f"from {Path(config.scene).with_suffix('.yaml').name}",
        "model": "found by the model; --source-prompt overrides it",
        "none": "empty",
    }
    console.print(escape(f"from {job.source_prompt!r} ({said[job.origin]}) to {config.prompt!r}, by {config.guidance}"))
    return job


def ask_prior(job: Job, console: Console) -> str:
    """The prompt of the model's vocabulary that explains a few views of the scene best."""
    import torch

    from splatedit.cameras import orbit
    from splatedit.priors import find_prompt
    from splatedit.render import render

    prior = job.prior
    views = orbit(job.gaussians, VIEWS // 2, elevation=ELEVATION, size=prior.image_size, up=job.up)
    with console.status("asking the model what the scene shows"), torch.no_grad():
        images = render(job.gaussians.to(prior.device), views, job.background).rgb
        generator = torch.Generator(prior.device).manual_seed(job.config.seed)
        prompt, _ = find_prompt(prior, prior.encode(images), generator)
    return prompt


# ------------------------------------------------------------------------------------------------------------ the loop
def optimise(job: Job, console: Console) -> Log:
    """Run the edit under a progress bar; Ctrl-C after the first step ends it early and keeps what is done."""
    from splatedit import editing

    config = job.config
    steps = editing.edit(job.gaussians, config.prompt, job.source_prompt, model=job.prior, up=job.up, **options(job))
    loss, distance, drift, rms, seconds = [], [], [], [], {}
    last, interrupted, before, start = None, False, 0.0, time.perf_counter()
    with progress_bar(console, config.steps) as show:
        try:
            for last in steps:
                if not loss:
                    before = time.perf_counter() - start - sum(last.seconds.values())
                loss.append(last.loss)
                distance.append(last.psnr_to_source)
                drift.append(last.residuals)
                rms.append(last.fpr.rms.mean(1).tolist() if last.fpr else [])
                for part, spent in last.seconds.items():
                    seconds[part] = seconds.get(part, 0.0) + spent
                show(last, (time.perf_counter() - start - before) / len(loss))
                warn_early(console, last)
        except KeyboardInterrupt:
            if last is None:
                raise
            interrupted = True
            done = f"after {len(loss)} of {config.steps} steps; writing what is done."
            console.print(f"[bold yellow]Interrupted[/] {done}")
        except Lost as error:
            if last is None:
                raise
            console.print(f"[bold red]The edit is lost:[/] {escape(str(error))} Writing what is left.")
    assert last is not None
    wall = time.perf_counter() - start - before
    return Log(last, loss, distance, drift, rms, seconds, before, wall, interrupted)


def options(job: Job) -> dict[str, Any]:
    """The settings that `edit` takes, under its names and in its types."""
    from splatedit.scenes import Rates
    from splatedit.tuning import Tuning

    config = job.config
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
    name, views = rig(config.cameras)
    return {
        **{k: getattr(config, k) for k in same},
        "cache_dir": str(job.folder / "source_cache") if config.cache_dir == "run" and job.folder else config.cache_dir,
        "cameras": name,
        **({} if views is None else {"views": views}),
        "t_range": (config.t_range[0], config.t_range[1]),
        "background": job.background,
        "tuning": Tuning(**{k: getattr(config, k) for k in Tuning._fields}),
        "rates": Rates(**{k: getattr(config, f"lr_{k}") for k in Rates._fields}),
    }


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


def warn_early(console: Console, step: Step) -> None:
    """Say while there is time that nothing is changing, or that nothing is left."""
    done = step.index + 1
    if not math.isfinite(step.loss):
        if done == 1 or done % 50 == 0:
            console.print(f"[bold red]Step {done}: the loss is {step.loss};[/] the edit is lost. Try lower lr_* rates.")
    elif done == max(step.steps // 4, 2):
        if step.psnr_to_source > STILL:
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
def write(job: Job, console: Console, folder: Path, log: Log) -> dict[str, Any]:
    """Write everything but run.json, the edited splats first; return what run.json shall hold."""
    from splatedit.files import save
    from splatedit.report import write_report

    raw = log.last.gaussians.to("cpu")
    edited, lost = mend(raw, job.gaussians)
    save(edited._replace(comments=(*job.gaussians.comments, signature(job))), folder / "edited.ply")
    write_checkpoint(log.last, job.config, folder / "ckpts" / "last.pt")
    record, report, pairs = facts(job, log), None, []
    try:
        with console.status("measuring the change"):
            report = measure(job, raw)
        with console.status("drawing"):
            pairs = draw_pairs(job, folder, edited)
    except KeyboardInterrupt:  # the splats are safe; the pictures are given up
        console.print("[bold yellow]Interrupted[/] while writing: the report and pictures not yet done are left out.")
    interrupted = log.interrupted or not pairs
    changed = report is not None and report.verdict == "changed"
    record["interrupted"] = interrupted
    record["exit_status"] = INTERRUPTED if interrupted else DONE if changed else NOT_CHANGED
    record["mended_splats"] = lost
    record["change"] = report.as_dict() if report else None
    record["network_evaluations"] = {
        "edit": log.last.evaluations,
        "all": job.prior.evaluations,
        "backward": log.last.backwards,
    }
    record["source_cache"] = dict(log.last.cache)
    record["peak_memory_mib"] = peak_memory()
    write_json({"change": record["change"], "curve": curve(log)}, folder / "metrics.json")
    if pairs:
        write_report(record, pairs, folder / "report.html")
    if report:
        tell(console, report, job.config.prompt)
    return record


def write_checkpoint(step: Step, config: Config, path: Path) -> None:
    """The state of the edit after `step`, as `torch.load(path, weights_only=True)` reads it; written whole or not."""
    import torch

    from splatedit.files import atomic

    path.parent.mkdir()
    with atomic(path) as stream:
        torch.save({**step.state(), "config": asdict(config)}, stream)


def mend(edited: Gaussians, source: Gaussians) -> tuple[Gaussians, int]:
    """Put back the source's values where a splat cannot be drawn, so that the file can be opened; and how many."""
    bad = ~edited.drawable()
    if not bad.any():
        return edited, 0
    fixed = {k: v.clone() for k, v in edited.parameters.items()}
    for name, value in fixed.items():
        value[bad] = source.parameters[name][bad]
    return edited._replace(**fixed), int(bad.sum())


def signature(job: Job) -> str:
    """One line for the header of edited.ply. No time of day: the same run gives the same file."""
    config = job.config
    how = f"{config.guidance}, {job.prior.name}, {config.steps} steps, seed {config.seed}"
    return f"splatedit {__version__}: {job.source_prompt!r} to {config.prompt!r}, {how}"


def measure(job: Job, edited: Gaussians) -> Report:
    """The change report over views that lie between those of the pictures."""
    from splatedit.cameras import bounds, orbit
    from splatedit.metrics import change_report

    source, prior = job.gaussians, job.prior
    cameras = orbit(source, VIEWS, elevation=ELEVATION, azimuth=180 / VIEWS, size=prior.image_size, up=job.up)
    return change_report(
        source.to(prior.device),
        edited.to(prior.device),
        prior,
        cameras,
        job.config.prompt,
        job.source_prompt,
        bounds(source).radius,
        seed=job.config.seed,
        background=job.background,
    )


def draw_pairs(job: Job, folder: Path, edited: Gaussians) -> list[tuple[str, str]]:
    """Write renders/*.png, before and after, and turntable.mp4; return the paths of the pairs, within the folder."""
    from splatedit import media
    from splatedit.cameras import orbit

    trained = job.prior.image_size
    size = max(trained, min(2 * trained, 512))  # larger than the model saw: shows what it could not see
    both = job.gaussians.to(job.prior.device), edited.to(job.prior.device)
    cameras = orbit(job.gaussians, VIEWS, elevation=ELEVATION, size=size, up=job.up)
    before, after = (list(media.draw(g, cameras, job.background)) for g in both)
    (folder / "renders").mkdir()
    pairs = []
    for index in range(VIEWS):
        names = f"renders/{index:02d}_before.png", f"renders/{index:02d}_after.png"
        media.save_png(before[index], folder / names[0])
        media.save_png(after[index], folder / names[1])
        pairs.append(names)
    media.save_png(media.sheet([*before, *after], VIEWS), folder / "renders" / "sheet.png")
    turn = orbit(job.gaussians, FRAMES, elevation=ELEVATION, size=size, up=job.up)
    film = media.beside(*(media.draw(g, turn, job.background) for g in both))
    media.save_frames(film, folder / "turntable.mp4", FPS)
    return pairs


def facts(job: Job, log: Log) -> dict[str, Any]:
    """What run.json says of the run itself."""
    from splatedit.cameras import guess_up
    from splatedit.files import sha256

    config, prior, done = job.config, job.prior, len(log.loss)
    scale = prior.default_scale(config.guidance) if config.guidance_scale is None else config.guidance_scale
    return {
        "scene": config.scene,
        "sha256": sha256(config.scene),
        "splats": job.gaussians.n,
        "sh_degree": job.gaussians.sh_degree,
        "up": job.up or guess_up(job.gaussians),
        "prompt": config.prompt,
        "source_prompt": job.source_prompt,
        "source_prompt_from": job.origin,
        "model": prior.name,
        "guidance": config.guidance,
        "guidance_scale": scale,
        "seed": config.seed,
        "steps": done,
        "steps_asked": config.steps,
        "seconds_per_step": {"all": log.wall / done, **{k: v / done for k, v in log.seconds.items()}},
        "source_seconds": log.before,
        "edit_seconds": log.wall,
        "device": device_name(prior.device),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python, splatedit and what decides its numbers."""
    found = {"splatedit": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in ("torch", "numpy", "numba", "diffusers", "transformers", "gsplat", "plyfile"):
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


def write_json(content: Any, path: Path) -> None:
    """Write JSON that any parser reads (no NaN, no infinity), floats to six significant digits."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        if isinstance(value, list):
            return [short(v) for v in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    path.write_text(json.dumps(short(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def tell(console: Console, report: Report, prompt: str) -> None:
    """The change report in a line, or a loud box with what to try."""
    from rich.panel import Panel

    views = round(report.prefers_target * VIEWS)
    line = (
        f"{report.changed_share:.0%} of the splats changed, {report.psnr_to_source:.1f} dB to the source, "
        f"the model prefers {prompt!r} in {views} of {VIEWS} views"
    )
    if report.verdict == "changed":
        console.print(escape(f"changed: {line}"))
        for hint in report.advice:
            console.print(f"[yellow]{escape(hint)}")
        return
    title = {"unchanged": "NOTHING CHANGED", "noise": "THE EDIT WENT TO NOISE"}[report.verdict]
    text = "\n".join([line, *(f"  try {hint}" for hint in report.advice)])
    console.print(Panel(escape(text), title=f"[bold red]{title}", border_style="red", expand=False), soft_wrap=False)
