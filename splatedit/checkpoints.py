"""What a run keeps so that it can go on: `ckpts/last.pt`, written whole or not at all, and how often."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splatedit.config import Config
from splatedit.errors import InputError
from splatedit.vram import MEMORY

if TYPE_CHECKING:
    from torch import Tensor

    from splatedit.editing import Step

FORMAT = 1  # of the file; another number is refused
SECONDS, SHARE = 30.0, 0.02  # between two checkpoints at least, and of the run's time at most that they may take
# Settings that do not decide what an edit does, or (steps) that it can take up on its way. The scene is compared by its
# content.
FREE = ("scene", "steps", "device", "offline", "viewer", "cache_mb", "cache_dir", "checkpoint_every", "output_dir")
FREE += MEMORY  # so that a run that found no room can go on in less


@dataclass
class Log:
    """What the steps taken so far left behind, those before a resume included."""

    loss: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)  # dB to the source
    drift: list[list[float]] = field(default_factory=list)  # ids: posterior-mean drift after each FPR iteration
    rms: list[list[float]] = field(default_factory=list)  # ids: of the noise, likewise
    seconds: dict[str, float] = field(default_factory=dict)  # summed over the steps: render, prior, encode, optimise
    before: float = 0.0  # seconds before the first step: drawing and encoding the source
    wall: float = 0.0  # seconds of the steps themselves
    evaluations: int = 0  # network rows
    backwards: int = 0  # of them sent back
    cache: dict[str, int] = field(default_factory=dict)  # of the source cache, see Step
    resumed: list[int] = field(default_factory=list)  # steps that were done when the run was taken up again
    rows: Tensor | None = None  # of the result, see Step
    stepped_down: dict[str, Any] | None = None  # after an out-of-memory: after how many steps, to which settings
    # Of this sitting, and in no checkpoint:
    last: Step | None = None  # None if all steps had been taken before
    whole: bool = True  # whether the state of `last` can be had, which a step that was cut off has spoilt
    interrupted: bool = False

    def add(self, step: Step, spent: float) -> None:
        """Take in one step, there after `spent` seconds; of those before only the numbers are kept."""
        own = sum(step.seconds.values()) if self.last is None else spent
        self.before += spent - own
        self.wall += own
        self.loss.append(step.loss)
        self.psnr.append(step.psnr_to_source)
        self.drift.append(step.residuals)
        self.rms.append(step.fpr.rms.mean(1).tolist() if step.fpr else [])
        for part, spent in step.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + spent
        self.evaluations, self.backwards, self.cache = step.evaluations, step.backwards, dict(step.cache)
        self.rows, self.last = step.rows, step

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("last", "whole", "interrupted")}


# ------------------------------------------------------------------------------------------------------------ the file
def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values as `read_checkpoint` reads them; raises InputError, the old file then stays."""
    import torch

    from splatedit.files import atomic

    path.parent.mkdir(exist_ok=True)
    with atomic(path) as stream:
        try:
            torch.save({"format": FORMAT, **content}, stream)
        except RuntimeError as error:  # torch's own, on top of what the system said
            raise system_error(error) from None


def system_error(error: BaseException) -> OSError:
    """The OSError at the bottom of another exception; one of input and output if there is none."""
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__context__
    return below or OSError(errno.EIO, str(error).splitlines()[0])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given, on the CPU, without running any code of the file; raises InputError."""
    from splatedit.formats.checkpoints import load_tensors

    try:
        content = load_tensors(path, mapped=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except InputError:
        raise InputError(f"{path}: damaged, or not a checkpoint; delete it to begin at the first step again.") from None
    if not isinstance(content, dict) or not {"step", "config", "sha256", "log"} <= content.keys():
        raise InputError(f"{path}: not a checkpoint of `splatedit run`; expected ckpts/last.pt of an outputs folder.")
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise InputError(f"{path}: of format {found}, expected {FORMAT}; resume with the version that wrote it.")
    return content


def check_same(saved: dict[str, Any], config: Config, sha256: str) -> None:
    """Raise InputError, naming the first setting, if the run of a checkpoint was another than `config` describes."""
    for key, value in asdict(config).items():
        before = saved["config"].get(key, getattr(Config(), key))
        if key not in FREE and before != value:
            raise InputError(
                f"--resume: {key} was {before!r} when the run began, now it is {value!r}; leave it as it was (only "
                f"{', '.join(FREE[1:])} may change), or run anew."
            )
    if config.steps != saved["config"]["steps"] and config.steps <= saved["step"]:
        raise InputError(f"--resume: steps: found {config.steps}, but {saved['step']} are done already; give more.")
    if saved["sha256"] != sha256:
        raise InputError(
            f"--resume: {config.scene} has changed since the run began (sha256 {sha256[:12]}..., then "
            f"{saved['sha256'][:12]}...); give the file as it was, or run anew."
        )


def check_cameras(saved: dict[str, Any], cameras: str | None) -> None:
    """Raise InputError if the cameras that a file gives, by their digest, are others than when the run began."""
    if saved["cameras"] != cameras:
        raise InputError("--resume: the file of cameras has changed since the run began; restore it, or run anew.")


class Keeper:
    """Writes checkpoints while an edit runs, beginning with its first step.

    every: steps between two; None: SECONDS, or as much more as keeps them below SHARE of the time; 0: none until the
    end. head: what they hold beside the state and the log. tell: called with one line if one cannot be written; the
    edit goes on then, and the checkpoint before it stays.
    """

    def __init__(self, path: Path, head: dict[str, Any], every: int | None, tell: Callable[[str], None]):
        self.path, self.head, self.every, self.tell = path, head, every, tell
        self.cost = self.spent = 0.0  # seconds that the last one took, and all
        self.at = -float("inf")  # time.perf_counter() when it was there
        self.step = 0  # of it; 0: none by this keeper

    def due(self, done: int) -> bool:
        """Whether one is to be written after `done` steps."""
        if self.every is not None:
            return self.every > 0 and done % self.every == 0
        return time.perf_counter() - self.at >= max(SECONDS, self.cost / SHARE)

    def write(self, log: Log) -> None:
        """Write one, after the last step of `log`."""
        assert log.last is not None and log.whole
        start = time.perf_counter()
        try:
            write_checkpoint({**self.head, "log": log.state(), **log.last.state()}, self.path)
            self.step = len(log.loss)
        except InputError as error:
            self.tell(f"{error} The edit goes on; the checkpoint before this one is kept.")
        self.at = time.perf_counter()
        self.cost = self.at - start
        self.spent += self.cost


# ---------------------------------------------------------------------------------------------------------- interrupted
class Patience:
    """Whether somebody has asked the run to stop, and whether it may wait until the step is whole."""

    def __init__(self):
        self.asked = False
        self.armed = False  # by the loop, once there is something to keep

    def __call__(self, number: int, frame: Any) -> None:
        """Handle a signal: the first one waits, any other raises KeyboardInterrupt."""
        if self.asked or not self.armed:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nstopping after this step; once more to stop at once\n")


@contextmanager
def patience() -> Iterator[Patience]:
    """Ctrl-C and SIGTERM let the step that is under way end; a second one, or one before the first step, does not."""
    stop = Patience()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
