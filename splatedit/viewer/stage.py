"""What the viewer shows, as one value that is replaced whole: panels and edits change it, displays wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splatedit.cameras import Bounds, bounds, check_up, guess_up
from splatedit.gaussians import Gaussians


class Shown(NamedTuple):
    """Everything that decides what is on the screen; a display that has drawn `version` is up to date."""

    source: Gaussians  # as they were before the edit; on the CPU, as all that follows
    current: Gaussians  # the newest state
    extent: Bounds  # of the source: what the cameras turn around
    up: str  # one of cameras.UPS
    path: Path | None = None  # the file that holds `current` when no edit is under way
    rows: Tensor | None = None  # (m,) source row that each current splat continues, -1 if added; None: its own
    pull: Tensor | None = None  # (m,) how hard the newest step pulled at each current splat, at least 0
    selection: Tensor | None = None  # (n,) bool, rows of the source that are selected
    marked: bool = True  # whether these are marked in what is shown
    look: str = "after"  # a key of looks.LOOKS
    split: float = 0.5  # look "split": share of the width, from the left, that shows the source
    display: str = "auto"  # auto, splats (drawn by the browser) or frames (drawn here, true colours)
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    version: int = 0


def opened(
    source: Gaussians,
    current: Gaussians | None = None,
    *,
    path: Path | None = None,
    up: str | None = None,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Shown:
    """The first state for a scene; current: what it is compared with, None: the scene itself."""
    source = source.detach().to("cpu")
    up = check_up(up) if up else guess_up(source)
    if current is None:
        return Shown(source, source, bounds(source), up, path, background=background)
    current = current.detach().to("cpu")
    rows = continued(source, current)
    return Shown(source, current, bounds(source), up, path, rows, background=background)


def continued(source: Gaussians, current: Gaussians) -> Tensor | None:
    """Rows, as of `Shown`, of two scenes of which no more is known: of equal length they are one by one the same."""
    return None if source.n == current.n else torch.full((current.n,), -1)


class Stage:
    """The newest `Shown`; any thread reads and changes it, and nobody who changes it waits for a display."""

    def __init__(self, shown: Shown):
        self.shown = shown
        self.clients = 0  # browsers that look on
        self.closed = False  # the threads of displays end when it is
        self.changed = threading.Condition()
        self.listeners: list[Callable[[Shown, frozenset[str]], None]] = []

    def change(self, **fields: Any) -> Shown:
        """Replace some fields of what is shown; the listeners are called here, and must return at once."""
        with self.changed:
            self.shown = shown = self.shown._replace(**fields, version=self.shown.version + 1)
            self.changed.notify_all()
        for listener in tuple(self.listeners):
            listener(shown, frozenset(fields))
        return shown

    def wait(self, version: int, timeout: float | None = None) -> Shown:
        """The newest state, once newer than `version`; whatever it is after `timeout` seconds, or when `closed`."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.shown.version > version, timeout)
            return self.shown

    def close(self) -> None:
        """Nothing will be shown any more: wake all who wait."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
