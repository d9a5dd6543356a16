"""Edits that run in a thread of their own: `job = splatedit.start(...)`, and what holds, steps and stops them.

A job calls the same code as `editing.edit` and `splatedit run`, and gives the same bits.
"""

from __future__ import annotations

import atexit
import difflib
import inspect
import io
import logging
import math
import os
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control

from splatedit.config import KEYS, RIGS, Config, as_command, load_config, typed
from splatedit.errors import InputError

if TYPE_CHECKING:
    from splatedit.editing import Step
    from splatedit.gaussians import Gaussians
    from splatedit.priors import Prior
    from splatedit.run import Outcome
    from splatedit.work import Work

LOG = logging.getLogger(__name__)
STATES = ("starting", "running", "paused", "stopping", "done", "stopped", "failed")
ENDED = ("done", "stopped", "failed")
RECENT = 20  # steps over which the pace is taken
FAREWELL = 5.0  # seconds that the end of the program waits for the steps under way
WIDTH = 120  # characters of the messages that are not soft-wrapped
LIVE: weakref.WeakSet[Job] = weakref.WeakSet()


class Abandoned(BaseException):
    """The program ends: the edit leaves its step, and writes nothing more."""


class Job:
    """An edit under way in its own thread; every method may be called from any thread.

    `state` is one of STATES; a run that has taken its last step is "running" until all is written. Pausing holds the
    edit between two steps, where it costs nothing.
    """

    steps: int  # how many were asked for
    config: Config | None  # of a run
    asked: dict[str, Any]  # of an edit in memory: its settings as far as Config has them, prompt and source included
    last: Step | None  # the newest step
    source: Gaussians | None  # what is edited, once it is loaded
    curve: dict[str, list[float]]  # of every step so far: loss, psnr, drift, drift_before; see `taken`
    lines: list[str]  # what the run has to say, without colours
    folder: Path | None  # of a run, once it is made
    outcome: Outcome | None  # of a run that has ended and has written its folder
    error: BaseException | None

    def __init__(
        self,
        edit: Callable[[Job], None],
        steps: int,
        config: Config | None = None,
        source: Gaussians | None = None,
        asked: dict[str, Any] | None = None,
    ):
        """A job that calls `edit` with itself; `launch` starts it."""
        self.steps, self.config, self.source, self.asked = steps, config, source, asked or {}
        self.last = self.folder = self.outcome = self.error = None
        self.curve = {"loss": [], "psnr": [], "drift": [], "drift_before": []}
        self.lines = []
        self.done = 0  # steps, those before a resume included
        self._state = "starting"
        self._changed = threading.Condition()
        self._until = math.inf  # steps after which to hold
        self._ending = self._leaving = self._stepping = False
        self._spent: deque[float] = deque(maxlen=RECENT)
        self._listeners: list[Callable[[Job], None]] = []
        self._result: Gaussians | None = None
        self.awaited: list[Callable[[Job], None]] = []  # called by whoever has waited for the end, in his thread
        self.thread = threading.Thread(target=self._work, args=(edit,), name="splatedit-edit", daemon=True)

    # ------------------------------------------------------------------------------------------------------- to ask
    @property
    def state(self) -> str:
        """One of STATES."""
        state = self._state
        return "stopping" if self._ending and state not in ENDED else state

    @property
    def ended(self) -> bool:
        """Whether it is done, stopped or failed, and everything written."""
        return self._state in ENDED

    @property
    def holds_after(self) -> int | None:
        """The number of steps after which it will be held; None: it is not going to be."""
        return None if self._until == math.inf or self._ending or self._until >= self.steps else int(self._until)

    @property
    def pace(self) -> float | None:
        """Mean seconds of the newest steps, without what they were held; None before the second."""
        spent = tuple(self._spent)
        return sum(spent) / len(spent) if spent else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, if it is not held; None while that is not known."""
        if self.ended:
            return 0.0
        return None if self.pace is None else self.pace * (self.steps - self.done)

    def snapshot(self) -> Gaussians:
        """The splats as they are now; raises InputError before they are loaded."""
        last = self.last
        if last is not None:
            return last.gaussians
        if self.source is None:
            raise InputError("snapshot: the scene is not loaded yet; wait for the first step.")
        return self.source

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the job has ended, after `timeout` seconds at most (None: as long as it takes)."""
        with self._changed:
            ended = self._changed.wait_for(lambda: self.ended, timeout)
        for callback in tuple(self.awaited) if ended else ():
            callback(self)
        return ended

    def settle(self, timeout: float | None = None) -> bool:
        """Whether the job is held or has ended, as `pause` and `step` make it, after `timeout` seconds at most."""
        with self._changed:
            held = lambda: self.ended or (self._state == "paused" and self._held())  # noqa: E731
            return self._changed.wait_for(held, timeout)

    def result(self, timeout: float | None = None) -> Gaussians:
        """Wait for the end and return the edited splats: after a stop what was done until then.

        Raises what the edit raised, InputError if it was stopped before its first step, TimeoutError after `timeout`
        seconds. Ctrl-C ends the waiting alone.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"the edit is {self.state} after {self.done} of {self.steps} steps.")
        if self.error is not None:
            raise self.error
        if self._result is None:
            if self.outcome is not None:
                from splatedit.files import load

                self._result = load(self.outcome.edited)
            else:
                self._result = self.snapshot()
        return self._result

    def listen(self, callback: Callable[[Job], None]) -> None:
        """Call back after every step and change of state, at once if the job has ended.

        In the thread that caused it, mostly the edit's, which waits: it must return at once.
        """
        with self._changed:
            self._listeners.append(callback)
            ended = self.ended
        if ended:
            callback(self)

    # ---------------------------------------------------------------------------------------------------- in a notebook
    def __repr__(self) -> str:
        from splatedit.displays import job_numbers

        return f"Job({self.state}, {job_numbers(self)})"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        from splatedit.displays import job_bundle

        return job_bundle(self)

    def _ipython_display_(self) -> None:
        from splatedit.notebook import display_job

        display_job(self)

    def show(self, **more: Any) -> None:
        """Open the live viewer of the edit in the cell, below a picture that stays; see `notebook.show_job`."""
        from splatedit.notebook import show_job

        show_job(self, **more)

    def progress(self) -> Any:
        """A widget with the progress and buttons, see `notebook.progress`."""
        from splatedit.notebook import progress

        return progress(self)

    # ------------------------------------------------------------------------------------------------------- to steer
    def pause(self) -> None:
        """Hold after the step that is under way; before the first one if none is."""
        with self._changed:
            self._let(self.done + self._stepping)

    def resume(self) -> None:
        """Go on to the end."""
        self._let(math.inf)

    def step(self, n: int = 1) -> None:
        """Take n steps more, then hold; the one under way counts unless `pause` or `step` has claimed it."""
        if n < 1:
            raise InputError(f"step: found {n}, expected 1 or more steps.")
        with self._changed:
            self._let(n + (self.done if self._until == math.inf else max(self._until, self.done)))

    def _let(self, until: float) -> None:
        with self._changed:
            self._until = until
            self._changed.notify_all()

    def stop(self) -> None:
        """End after the step that is under way; what is done is kept (and written, if this is a run)."""
        with self._changed:
            if self._ending or self.ended:
                return
            self._ending = True
            self._changed.notify_all()
        self._tell()

    # ------------------------------------------------------------------------------------------- in the edit's thread
    @property
    def writing(self) -> bool:
        """Whether no step will follow: what there is is being written."""
        last = self.done >= self.steps or (self._ending and not self._stepping)
        return last and self.last is not None and not self.ended

    def abandon(self) -> None:
        """Have the edit leave between two steps, and write nothing more."""
        with self._changed:
            self._leaving = True
            self._changed.notify_all()

    def _work(self, edit: Callable[[Job], None]) -> None:
        """Run the edit to one of its ends."""
        import torch

        torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps the number for each thread: take the process's
        ended = "done"
        try:
            edit(self)
            if self._ending and self.done < self.steps:
                ended = "stopped"
        except (KeyboardInterrupt, Abandoned):
            ended = "stopped"
            self.error = InputError("stopped before the first step: nothing was done, and nothing written.")
            if self.last is not None:
                self.error = InputError(f"cut off after {self.done} of {self.steps} steps by the end of the program.")
        except BaseException as error:
            ended, self.error = "failed", error
            forget(error)
        if self.error is not None:
            self.lines.append(str(self.error) or type(self.error).__name__)
        self._become(ended)

    def _become(self, state: str) -> None:
        with self._changed:
            if state == self._state:
                return
            self._state = state
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(self)
            except Exception:
                LOG.exception("job: a listener failed")

    def _held(self) -> bool:
        return self._until <= self.done < self.steps and not self._ending and not self._leaving

    def _gate(self) -> bool:
        """Hold between two steps as long as somebody wants; whether the next one shall be taken."""
        self._stepping = False
        if self._held():
            self._become("paused")
            with self._changed:
                self._changed.wait_for(lambda: not self._held())
        self.check_leaving()
        with self._changed:
            self._stepping = not self._ending
        self._become("running")
        return not self._ending

    def check_leaving(self) -> None:
        """Raise Abandoned if the program ends."""
        if self._leaving:
            raise Abandoned

    def _go_on(self, done: int) -> None:
        """So many steps were done before a resume; what was ordered while it was loading is meant from there on."""
        with self._changed:
            self.done, self._until = done, self._until + done

    def _let_go(self, failed: type[BaseException] | None, *_: object) -> None:
        """The model is given back: the newest step keeps its state, but not the model that made it."""
        if self.last is None:
            return
        if failed is None:
            state = {**self.last.state(), "evaluations": self.last.evaluations}
            self.last = self.last._replace(state=lambda: state)
        else:
            self.last = self.last._replace(state=spoilt)

    def _begin(self) -> None:
        """All is loaded, the first step comes next; raises KeyboardInterrupt if it shall not."""
        if not self._gate():
            raise KeyboardInterrupt
        self._since = time.perf_counter()

    def _taken(self, step: Step) -> bool:
        """Take in a step; whether there shall be another."""
        now = time.perf_counter()
        if self.last is not None:  # the first one has drawn the source, too
            self._spent.append(now - self._since)
        self.curve["loss"].append(step.loss)
        self.curve["psnr"].append(step.psnr_to_source)
        self.curve["drift"].append(step.residuals[-1] if step.residuals else math.nan)
        self.curve["drift_before"].append(step.residuals[0] if step.residuals else math.nan)
        with self._changed:
            self.last, self.done = step, step.index + 1
        self._tell()
        going = self._gate()
        self._since = time.perf_counter()
        return going


class Onlooker(NamedTuple):
    """A job as what `run.run` calls."""

    job: Job

    def begin(self, work: Work) -> None:
        self.job.source, self.job.folder, self.job.steps = work.gaussians, work.folder, work.config.steps
        if work.saved is not None:
            self.job._go_on(work.saved["step"])
        self.job._begin()

    def step(self, step: Step) -> bool:
        return self.job._taken(step)


def spoilt() -> dict[str, Any]:
    """The state of a step that another one has begun to change."""
    raise InputError("state: the edit was cut off in the middle of a step; go on from a step before, or a checkpoint.")


def forget(error: BaseException | None) -> None:
    """Drop what the frames of an exception hold, the model and all the memory of a step; its traceback stays."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


# -------------------------------------------------------------------------------------------------------------- started
def start(scene: str | Path | Gaussians, prompt: str, source: str | None = None, **settings: Any) -> Job:
    """Begin an edit and return at once.

    scene: a splat file, edited as by `splatedit run`, with its settings (see `config.Config`), into an outputs folder;
    or Gaussians, edited in memory, with the keyword arguments of `edit`. source: what the scene shows now. What can be
    told to be wrong is raised here, as InputError; what goes wrong later by `Job.result`.
    """
    if isinstance(scene, (str, os.PathLike)):
        given = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in settings.items()}
        words = {"scene": os.fspath(scene), "prompt": prompt, "source_prompt": source}
        if twice := words.keys() & given.keys():
            raise InputError(f"start: {min(twice)!r} is given twice; it has a place of its own before the settings.")
        return start_run(load_config(options={**given, **words}))
    from splatedit.gaussians import Gaussians

    if not isinstance(scene, Gaussians):
        raise InputError(f"start: found a {type(scene).__name__}, expected the path of a splat file or Gaussians.")
    return start_edit(scene, prompt, source, settings)


def start_run(
    config: Config,
    *,
    console: Console | None = None,
    command: Sequence[str] | None = None,
    resume: str | Path | None = None,
) -> Job:
    """`run.run` in a thread; raises InputError for what can be told to be wrong before anything is loaded.

    console: where progress and messages go as well, None: to `Job.lines` alone. command: the words for cmd.txt, None:
    those that would repeat it.
    """
    from splatedit.run import run
    from splatedit.work import check_run

    check_run(config, resume)
    # In a notebook rich would display every line in the cell, quiet or not.
    said = console or Console(file=io.StringIO(), width=WIDTH, soft_wrap=True, quiet=True, force_jupyter=False)

    def edit(job: Job) -> None:
        with ExitStack() as held:
            held.enter_context(heard(said, job.lines))
            words = command or as_command(config)
            job.outcome = run(config, said, words, resume, watch=Onlooker(job), load=lender(job, held))
            job.folder = job.outcome.folder

    return launch(Job(edit, config.steps, config))


def start_edit(gaussians: Gaussians, prompt: str, source: str | None, settings: dict[str, Any]) -> Job:
    """`editing.edit` in a thread, with these keyword arguments of it."""
    from splatedit.editing import edit as run_edit
    from splatedit.editing import resolve_device

    known = inspect.signature(run_edit).parameters
    for name in settings.keys() - (known.keys() - {"gaussians", "prompt", "source"}):
        matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {matches[0]!r}?" if matches else "help(splatedit.edit) lists them."
        raise InputError(f"start: {name!r} is not an argument of splatedit.edit; {hint}")
    check_edit(gaussians, prompt, source, {name: each.default for name, each in known.items()} | settings)
    asked = as_settings(prompt, source, settings)
    ranges = {name: typed(name, asked[name]) for name in ("t_range", "fpr_t_range") if name in asked}
    load_config(options={name: value for name, value in asked.items() if name not in ranges})  # those may be one number

    def edit(job: Job) -> None:
        model = settings.get("model", known["model"].default)
        with ExitStack() as held:
            if isinstance(model, str):
                device = resolve_device(settings.get("device", known["device"].default))
                model = lender(job, held)(model, device, offline=settings.get("offline", False))
            job._begin()
            for step in run_edit(gaussians, prompt, source, **{**settings, "model": model}):
                if not job._taken(step):
                    return

    return launch(Job(edit, settings.get("steps", known["steps"].default), source=gaussians, asked=asked))


def check_edit(gaussians: Gaussians, prompt: str, source: str | None, given: dict[str, Any]) -> None:
    """Raise InputError for what can be told to be wrong with arguments of `editing.edit`, but numbers and choices."""
    from splatedit.distilling import Method
    from splatedit.editing import resolve_device
    from splatedit.formats.checks import check_read
    from splatedit.growth import Growth
    from splatedit.priors import Prior, check_prior
    from splatedit.scenes import Hold, Rates, check_mask
    from splatedit.tuning import Tuning

    kinds = {"prompt": str, "source": (str, type(None)), "model": (str, Prior)}
    kinds |= {"tuning": Tuning, "rates": Rates, "hold": Hold, "growth": Growth}
    for name, kind in kinds.items():
        found = {**given, "prompt": prompt, "source": source}[name]
        if not isinstance(found, kind):
            wanted = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise InputError(f"{name}: found a {type(found).__name__}, expected {wanted}.")
    if not prompt.strip():
        raise InputError('prompt: it is empty; say what the scene shall show, as in "a pig".')
    Method(**{name: given[name] for name in Method._fields}).check()
    check_read(gaussians, "scene")
    if given["mask"] is not None:
        check_mask(given["mask"], gaussians)
    if isinstance(given["model"], str):
        resolve_device(given["device"])
        check_prior(given["model"], given["offline"])


def as_settings(prompt: str, source: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `editing.edit` as keys of Config; what no setting can say (a mask, cameras) is left out."""
    flat: dict[str, Any] = dict(given)
    names = {"percent": "grow_percent", "every": "grow_every", "window": "grow_range"}
    for name, prefix in (("tuning", ""), ("rates", "lr_"), ("hold", ""), ("growth", "")):
        if name in flat:
            flat |= {prefix + (names.get(key) or key): value for key, value in flat.pop(name)._asdict().items()}
    if flat.get("cameras", "dome") in RIGS and "views" in flat:
        flat["cameras"] = f"{flat.get('cameras', 'dome')}:{flat['views']}"
    flat = {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}
    plain = (str, int, float, list, type(None))
    said = {key: value for key, value in flat.items() if key in KEYS and isinstance(value, plain)}
    return {**said, "prompt": prompt, "source_prompt": source}


def launch(job: Job) -> Job:
    """Start the job's thread."""
    LIVE.add(job)
    job.thread.start()
    return job


@atexit.register
def leave() -> None:
    """Let every edit leave between two steps: a daemon thread that is cut off inside torch can take the exit status.

    What only writes its results, after its last step, is waited for.
    """
    jobs = [job for job in LIVE if not job.ended]
    for job in jobs:
        job.abandon()
    end = time.monotonic() + FAREWELL
    for job in jobs:
        job.thread.join(None if job.writing else max(end - time.monotonic(), 0.0))


def lender(job: Job, held: ExitStack) -> Callable[..., Prior]:
    """`load_prior`, of models that are kept from one job to the next; they are given back when `held` is closed."""
    from splatedit.priors import borrowed

    def load(model: str, device: Any, *, offline: bool = False) -> Prior:
        if job.state == "stopping":
            raise KeyboardInterrupt
        job.check_leaving()
        prior = held.enter_context(borrowed(model, device, offline))
        held.push(job._let_go)
        return prior

    return load


# ---------------------------------------------------------------------------------------------------------------- heard
class Ear(RenderHook):
    """Keeps the plain text of what is printed to a console."""

    def __init__(self, lines: list[str]):
        self.lines = lines
        self.plain = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_jupyter=False)

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        told = [part for part in renderables if not isinstance(part, Control)]
        if told:
            with self.plain.capture() as text:
                self.plain.print(*told, soft_wrap=True)
            self.lines += [line.rstrip() for line in text.get().splitlines() if line.strip()]
        return renderables


@contextmanager
def heard(console: Console, lines: list[str]) -> Iterator[None]:
    """What is printed to the console in the body is added to `lines` too."""
    console.push_render_hook(Ear(lines))
    try:
        yield
    finally:
        console.pop_render_hook()
