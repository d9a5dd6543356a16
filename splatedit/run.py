"""Config -> outputs folder: what `splatedit run` does between reading the words and printing the path."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rich.console import Console
from rich.markup import escape

from splatedit import folders, vram
from splatedit.checkpoints import Keeper, Log, check_cameras, check_same, patience, read_checkpoint
from splatedit.config import Config, save_config
from splatedit.errors import InputError, Lost, OutOfMemory
from splatedit.folders import CHECKPOINT, clean, find, finished, in_use, locked, output_folder
from splatedit.json_files import write_json
from splatedit.machine import versions
from splatedit.model_files import first_line
from splatedit.progress import progress_bar, warn
from splatedit.results import write
from splatedit.work import Work, cameras_of_edit, check_run, options, prepare, savings

if TYPE_CHECKING:
    from splatedit.editing import Step
    from splatedit.priors import Prior

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
