"""Which display draws: splats that the browser draws, up to a budget, or frames drawn here; and the View folder."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image

from splatedit.gaussians import Gaussians
from splatedit.viewer.looks import LOOKS
from splatedit.viewer.stage import Shown
from splatedit.viewer.wire import SPLATS

if TYPE_CHECKING:
    import viser

    from splatedit.viewer.app import App

DISPLAYS = ("auto", "splats", "frames")
PAIRS = {"split": ("before", "after")}  # looks of two pictures, left and right: only frames can show them
SEEN = ("source", "current", "rows", "pull", "selection", "marked")  # what the looks are made of
NEEDED = {"before": ("source", "selection", "marked")}  # of which looks ask for less


class Pictures:
    """What the looks make of the stage, made once for all displays."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: dict[str, tuple[Shown, Gaussians]] = {}

    def of(self, shown: Shown, look: str | None = None) -> Gaussians:
        """What is drawn: the same object as before as long as nothing that it is made of has changed."""
        look = look or shown.look
        with self.lock:
            past = self.made.get(look)
            if past is None or not alike(look, past[0], shown):
                past = (shown, LOOKS[look](shown))
                both = {name: entry for name, entry in self.made.items() if name in ("before", "after")}
                self.made = both | {look: past}
            return past[1]


def alike(look: str, one: Shown, other: Shown) -> bool:
    """Whether this look shows the same of both; tensors are replaced on the stage, not changed, so `is` tells."""
    return all(getattr(one, name) is getattr(other, name) for name in NEEDED.get(look, SEEN))


def in_use(shown: Shown, pictures: Pictures) -> Literal["splats", "frames"]:
    """Which display shows this."""
    if shown.look in PAIRS or shown.display == "frames":
        return "frames"
    if shown.display == "splats":
        return "splats"
    return "splats" if pictures.of(shown).n <= SPLATS else "frames"


# ------------------------------------------------------------------------------------------------------- what is told
class Told(NamedTuple):
    """What a display has drawn last."""

    display: Literal["splats", "frames"]
    total: int  # Gaussians
    undrawable: int = 0
    spared: int = 0  # left out because the budget is smaller
    wider: float = 1.0  # how many times as wide as they are the others are drawn in exchange
    size: tuple[int, int] | None = None  # pixels of the last sharp frame
    seconds: float = 0.0  # that it took


def words(told: Told) -> str:
    """One line for the panel."""
    drawn = told.total - told.undrawable - told.spared
    if told.spared:
        parts = [f"**{drawn:,} of {told.total:,} splats**, a sample, each {told.wider:.1f} times as wide"]
    else:
        parts = [f"**{drawn:,} splats**"]
    if told.display == "splats":
        parts.append("drawn by your browser, each in one colour")
    else:
        parts.append("drawn here, in true colours")
        if told.size:
            parts.append(f"{told.size[0]} x {told.size[1]} pixels in {told.seconds * 1000:.0f} ms")
    if told.undrawable:
        parts.append(f"{told.undrawable:,} left out: not finite")
    return " · ".join(parts)


# ------------------------------------------------------------------------------------------------------------ starting
class Displays:
    """Both displays of a viewer, at work."""

    def __init__(self, app: App, say: Callable[[Told], None]):
        from splatedit.viewer.frame_display import FrameDisplay
        from splatedit.viewer.pace import Loop
        from splatedit.viewer.splat_display import SplatDisplay

        pictures = Pictures()
        self.splats = SplatDisplay(app.server, app.stage, pictures, busy(app), say, first=app.served.first)
        self.frames = FrameDisplay(app.server, app.stage, pictures, busy(app), say)
        self.loops = [Loop("splats", self.splats.serve, failed(app)), Loop("frames", self.frames.serve, failed(app))]
        self.app, self.background = app, None
        app.stage.listeners.append(self.changed)
        app.server.on_client_connect(self.joined)
        app.server.on_client_disconnect(self.left)
        self.changed(app.stage.shown)
        for loop in self.loops:
            loop.start()

    def changed(self, shown: Shown, fields: frozenset[str] = frozenset()) -> None:
        """The stage has changed."""
        if shown.background != self.background:  # behind splats; frames bring their own
            self.background = shown.background
            lay(self.app.server.scene, "png", coded(plain(shown.background), "PNG"))
        for loop in self.loops:
            loop.wake()

    # Coroutines, as viser calls them in its own thread at once; they only ring.
    async def joined(self, client) -> None:
        client.camera.on_update(self.moved)
        self.frames.join(client)
        for loop in self.loops:
            loop.wake()

    async def left(self, client) -> None:
        self.frames.leave(client)
        for loop in self.loops:
            loop.wake()

    async def moved(self, camera) -> None:
        self.loops[1].wake()

    def close(self) -> None:
        """Draw no more; returns at once."""
        for loop in self.loops:
            loop.close()


def start(app: App) -> Displays:
    """Draw what is on the stage, in every browser, until closed; a line and the View folder go on top of the panel."""
    return Displays(app, controls(app))


def busy(app: App) -> Callable[[], bool]:
    """Whether an edit is at work and needs the processor more than we do."""
    return lambda: app.job is not None and app.job.state in ("starting", "running", "stopping")


def failed(app: App) -> Callable[[BaseException], None]:
    """Tell everybody that nothing could be drawn."""
    return lambda error: app.notify("Not drawn", f"{type(error).__name__}: {error}")


# -------------------------------------------------------------------------------------------------------- View folder
def controls(app: App) -> Callable[[Told], None]:
    """Build the line that says what is drawn and the View folder; returns what tells the line."""
    shown = app.stage.shown
    line = app.server.gui.add_markdown("", order=-2)
    with app.server.gui.add_folder("View", order=-1, expand_by_default=False):
        choice = app.server.gui.add_dropdown(
            "Display",
            DISPLAYS,
            initial_value=shown.display,
            hint=f"auto: up to {SPLATS:,} splats are drawn by your browser, more of them, and what needs two pictures, "
            "here and sent as frames. Frames have view-dependent colours.",
        )
        colour = app.server.gui.add_rgb("Background", rgb_bytes(shown.background))

    def choose(_) -> None:
        if choice.value != app.stage.shown.display:  # viser calls back for what `follow` sets as well
            app.stage.change(display=choice.value)

    def paint(_) -> None:
        if tuple(colour.value) != rgb_bytes(app.stage.shown.background):
            red, green, blue = (part / 255 for part in colour.value)
            app.stage.change(background=(red, green, blue))

    choice.on_update(app.act(choose))
    colour.on_update(app.act(paint, newest=True))

    def follow(shown: Shown, fields: frozenset[str]) -> None:
        """What others changed stands in the panel too."""
        if "display" in fields and choice.value != shown.display:
            choice.value = shown.display
        if "background" in fields and tuple(colour.value) != rgb_bytes(shown.background):
            colour.value = rgb_bytes(shown.background)

    app.stage.listeners.append(follow)

    def say(told: Told) -> None:
        if line.content != (text := words(told)):
            line.content = text

    return say


def plain(colour: tuple[float, float, float]) -> np.ndarray:
    """One pixel (1, 1, 3) uint8 of this colour."""
    return np.array(rgb_bytes(colour), np.uint8)[None, None]


def coded(picture: np.ndarray, format: str, **options: int) -> bytes:
    """A picture (h, w, 3) uint8 as a file of this format, as Pillow names it and its options."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format, **options)
    return stream.getvalue()


def lay(scene: viser.SceneApi, format: Literal["png", "jpeg"], data: bytes) -> None:
    """Put a picture behind everything in one browser, or in all of them.

    `set_background_image` would encode it, to a size that nobody is told, and import what takes a while for it.
    """
    from viser._messages import BackgroundImageMessage

    scene._websock_interface.queue_message(BackgroundImageMessage(format, data, None))


def rgb_bytes(colour: tuple[float, float, float]) -> tuple[int, int, int]:
    """A colour of numbers in [0, 1] in numbers from 0 to 255."""
    red, green, blue = (round(255 * min(max(part, 0.0), 1.0)) for part in colour)
    return red, green, blue
