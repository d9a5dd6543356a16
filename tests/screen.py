"""What tests see of a page in the browser: pixels, polled until they are as expected; pictures kept to be looked at."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

KEPT = Path(os.environ.get("SPLATEDIT_SCREENSHOTS", "screenshots"))  # git ignores it; CI keeps it
HARMLESS = ("computeBoundingSphere(): Computed radius is NaN",)  # viser 1.1 says it of every scene of splats
T = TypeVar("T")


def open_page(browser: Any, url: str, width: int = 640, height: int = 400) -> Any:
    """A page of its own session; what goes wrong in it is in `page.errors`."""
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.errors = []
    page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" and not harmless(m.text) else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(url)
    return page


def harmless(text: str) -> bool:
    return any(words in text for words in HARMLESS)


def pixels(page: Any) -> np.ndarray:
    """What the scene's canvas shows, (h, w, 3) int; plots have canvases of their own."""
    # A screenshot of the element itself waits for two frames that are alike, which takes long on a busy machine.
    shot = page.screenshot(clip=page.locator("canvas[data-engine]").bounding_box())
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def until(page: Any, look: Callable[[], T], what: str, seconds: float = 60.0) -> T:
    """The first true answer of `look`, asked again and again while the page lives; fails with `what` if none comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := look():
            return answer
        page.wait_for_timeout(150)
    keep(page, "timed-out")
    raise AssertionError(f"not within {seconds:g} s: {what}")


def keep(page: Any, name: str) -> Path:
    """Save a picture of the page to be looked at."""
    KEPT.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=KEPT / f"{name}.png")
    return KEPT / f"{name}.png"
