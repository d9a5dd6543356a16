"""Films and pictures of what is shown, drawn by our own renderer from any cameras."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from splatedit.errors import InputError
from splatedit.files import made

if TYPE_CHECKING:
    from splatedit.cameras import Cameras
    from splatedit.viewer.stage import Shown

SIDE_BY_SIDE = "before | after"
ENDINGS = (".mp4", ".gif", ".apng")
LARGEST = 4096  # pixels of an edge


def looks() -> tuple[str, ...]:
    """What a film can show."""
    from splatedit.viewer.looks import LOOKS

    return (*(name for name in LOOKS if name != "split"), SIDE_BY_SIDE)


def read_size(text: str) -> tuple[int, int]:
    """`640x480` or `512` as (width, height) in pixels; raises InputError."""
    found = re.fullmatch(r"\s*(\d{1,4})\s*(?:[x×*]\s*(\d{1,4})\s*)?", text.lower())
    size = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 16 <= min(size) <= max(size) <= LARGEST:
        raise InputError(f"size: found {text!r}, expected pixels from 16 to {LARGEST}, as in 640x480 or 512.")
    return size


def drawn(shown: Shown, cameras: Cameras, look: str, device: str = "cpu") -> Iterator[np.ndarray]:
    """Frames (h, w, 3) uint8 of one of `looks`; side by side they are twice as wide."""
    from splatedit import media
    from splatedit.viewer.looks import LOOKS

    kinds = ("before", "after") if look == SIDE_BY_SIDE else (look,)
    films = [media.draw(LOOKS[kind](shown).to(device), cameras, shown.background, chunk=1) for kind in kinds]
    return media.beside(*films) if len(films) == 2 else films[0]


def watched(
    frames: Iterator[np.ndarray], count: int, tell: Callable[[float], None], stop: Callable[[], bool]
) -> Iterator[np.ndarray]:
    """The same frames; `tell` hears the share that is done, 0 to 1. Raises InputError once `stop()` is true."""
    for index, frame in enumerate(frames):
        if stop():
            raise InputError(f"the film was cancelled after {index} of {count} frames; nothing is written.")
        yield frame
        tell((index + 1) / count)


def save_film(
    shown: Shown,
    cameras: Cameras,
    look: str,
    path: Path,
    fps: float,
    *,
    device: str = "cpu",
    tell: Callable[[float], None] = lambda share: None,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Write a film by the ending of `path`, whole or not at all; its folder is made. Raises InputError."""
    from splatedit import media

    media.check_target(path)
    made(path.parent)
    media.save_frames(watched(drawn(shown, cameras, look, device), cameras.n, tell, stop), path, fps)
    return path
