"""Edits that run in a thread of their own: `job = splatedit.start(...)`, and what holds, steps and stops them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from splatedit.config import Config
    from splatedit.editing import Step
    from splatedit.gaussians import Gaussians
    from splatedit.run import Outcome

STATES = ("starting", "running", "paused", "stopping", "done", "stopped", "failed")


class Job:
    """An edit under way; every method may be called from any thread."""

    state: str  # one of STATES
    steps: int  # how many were asked for
    last: Step | None  # the newest step
    source: Gaussians | None  # what is edited, once it is loaded
    curve: dict[str, list]  # loss, psnr, drift (of ids: the last residual) of every step so far
    outcome: Outcome | None  # of a run that has ended and has written a folder
    error: BaseException | None

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def step(self, n: int = 1) -> None:
        """Take n steps, then hold."""

    def stop(self) -> None:
        """End after the step that is under way; what is done is kept (and written, if this is a run)."""

    def snapshot(self) -> Gaussians:
        """The splats as they are now."""
        ...

    def result(self, timeout: float | None = None) -> Gaussians:
        """Wait for the end and return the edited splats; raises what the edit raised."""
        ...

    def listen(self, callback: Callable[[Job], None]) -> None:
        """Call back in the edit's thread after every step and change of state; it must return at once."""


def start(scene: str | Path | Gaussians, prompt: str, source: str | None = None, **settings: Any) -> Job:
    """Begin an edit and return at once."""
    ...


def start_run(config: Config, **more: Any) -> Job:
    """`run.run` in a thread."""
    ...
