"""The compare tab: how the newest state is set against the source, what the colours say, the difference in numbers."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from splatedit.errors import InputError
from splatedit.gaussians import SH_C0
from splatedit.viewer import looks
from splatedit.viewer.looks import LOOKS, RAMP
from splatedit.viewer.stage import Shown

if TYPE_CHECKING:
    import viser

    from splatedit.cameras import Cameras
    from splatedit.viewer.app import App

KEYS = {"before": "B", "split": "X", "ghost": "G", "difference": "C", "gradient": "H"}  # again: back; WASDQE move
SAYS = {
    "after": "The newest state.",
    "before": "The source.",
    "split": "The source on the left, the newest state on the right.",
    "ghost": "The newest state, and the source as a pale ghost.",
    "difference": "The newest state: how far each splat is from the source. Grey: no visible change.",
    "gradient": "The newest state: how hard the newest step pulled at each splat. Grey: not at all.",
}
STRANGE = 0.25  # scene radii: rows of two files that lie farther apart, most of them, are not the same splats
ENOUGH = 0.5  # share of the splats that has to be found again
LONGEST = 480  # pixels of the pictures that are compared


# -------------------------------------------------------------------------------------------- which belongs to which
def strange(shown: Shown) -> bool:
    """Whether splats of equal row number are not the same ones: rows of two files in another order each."""
    if shown.rows is not None or shown.source.n != shown.current.n:
        return False
    apart = (shown.current.means - shown.source.means).square().sum(1).sqrt().nan_to_num(0.0)
    return float(apart.median()) > STRANGE * shown.extent.radius


def correspondence(shown: Shown) -> Tensor | None:
    """Rows, as of `Shown`, of two states of which it is not known, by place and looks; None: row by row the same.

    Raises InputError if too few are found again.
    """
    if not looks.incomparable(shown) and not strange(shown):
        return shown.rows
    from splatedit.formats import format_of
    from splatedit.mask_files import inside
    from splatedit.masks import Matching

    form = format_of(shown.path) if shown.path is not None and shown.path.is_file() else None
    kind = "ply" if form is None or shown.path is None else inside(shown.path, form.name)
    rows = torch.from_numpy(Matching.of(shown.current, kind).found(shown.source))
    found, fewer = int((rows >= 0).sum()), min(shown.source.n, shown.current.n)
    if found < ENOUGH * fewer:
        raise InputError(
            f"difference: cannot be shown, only {found:,} of {shown.current.n:,} splats lie where one of the source's "
            f"{shown.source.n:,} does; look at before and after, split or ghost."
        )
    return rows


# ------------------------------------------------------------------------------------------------------- in numbers
def numbers(shown: Shown) -> list[tuple[str, str]]:
    """The difference, name and value; of states that cannot be compared only how many splats there are."""
    from splatedit.metrics import changed_share, count_rows

    source, current, radius = shown.source, shown.current, shown.extent.radius
    lines = [("splats", f"{current.n:,}" if current.n == source.n else f"{source.n:,} → {current.n:,}")]
    if looks.incomparable(shown):
        return lines
    added, removed = count_rows(shown.rows, source.n)
    lines += [("changed visibly", f"{changed_share(source, current, radius, shown.rows):.1%}")]
    if added or removed:
        lines += [("added, removed", f"{added:,}, {removed:,}")]
    rows = torch.arange(source.n) if shown.rows is None else shown.rows
    stayed = rows >= 0
    if not stayed.any():
        return lines
    then, now = source.select(rows[stayed]), current.select(stayed)
    colour = ((now.sh0 - then.sh0) * SH_C0).flatten(1).abs().amax(1).nan_to_num(1.0).mean()
    moved = (now.means - then.means).norm(dim=1).nan_to_num(0.0).mean() / radius
    faded = (now.opacities.sigmoid() - then.opacities.sigmoid()).nan_to_num(0.0).abs().mean()
    return [
        *lines,
        ("mean change of colour", f"{float(colour) * 255:.1f} of 255"),
        ("of place", f"{float(moved):.2%} of the radius"),
        ("of opacity", f"{float(faded):.1%}"),
    ]


def view_psnr(shown: Shown, cameras: Cameras) -> float:
    """PSNR in dB of the two states as these cameras see them; infinite if they look the same."""
    from splatedit.metrics import psnr
    from splatedit.render import render

    states = [g.select(g.drawable()) for g in (shown.source, shown.current)]
    with torch.no_grad():
        before, after = (render(g, cameras, shown.background).rgb for g in states)
    return psnr(before, after)


def table(lines: list[tuple[str, str]]) -> str:
    """HTML of names and values."""
    rows = "".join(
        f'<tr><td style="padding-right:1em;opacity:0.7">{escape(name)}</td><td>{escape(value)}</td></tr>'
        for name, value in lines
    )
    return f'<table style="font-size:0.85em;margin:0 0.9em 0.5em">{rows}</table>'


def legend(shown: Shown) -> str:
    """HTML: what is to be seen, and which colour stands for which number."""
    why = looks.incomparable(shown) if shown.look == "difference" else ""
    why = looks.unpulled(shown) if shown.look == "gradient" else why
    said = f"Cannot be shown yet: {why}." if why else SAYS[shown.look]
    text = f'<div style="font-size:0.85em;margin:0 0.9em 0.5em">{escape(said)}'
    if scale := looks.scale(shown):
        stops = ", ".join("rgb({},{},{})".format(*(round(255 * c) for c in colour)) for colour in RAMP)
        bar = f'<div style="height:0.8em;margin-top:0.4em;background:linear-gradient(to right, {stops})"></div>'
        ends = f"<span>{escape(scale.low)}</span><span>{escape(scale.high)}</span>"
        ends = f'<div style="display:flex;justify-content:space-between">{ends}</div>'
        text += f"{bar}{ends}{escape(scale.unit)}"
    return text + "</div>"


# -------------------------------------------------------------------------------------------------------- the panel
class Panel:
    """The elements of the tab."""

    def __init__(self, app: App):
        self.app, gui, shown = app, app.server.gui, app.stage.shown
        self.last = "after"  # what a second press of a key goes back to
        self.toggle = gui.add_button("Before / after", hint="B")
        self.look = gui.add_dropdown("Look", tuple(LOOKS), initial_value=shown.look, hint="keys: " + keys())
        self.split = gui.add_slider("Split at", 0.0, 1.0, 0.01, shown.split, visible=shown.look == "split")
        self.legend = gui.add_html(legend(shown))
        self.measure = gui.add_button("Difference in numbers")
        self.numbers = gui.add_html("", visible=False)
        self.refreshing = app.act(self.refresh, newest=True)
        self.toggle.on_click(app.act(lambda event: self.press("before", event)))
        self.look.on_update(app.act(lambda event: self.show(self.look.value, event)))
        self.split.on_update(app.act(lambda _: self.move(), newest=True))
        self.measure.on_click(app.act(self.count, slow=True))
        for look, key in KEYS.items():
            label = "before and after" if look == "before" else look
            app.hotkey(f"Compare: {label}", key, lambda event, look=look: self.press(look, event))
        app.stage.listeners.append(self.follow)

    def press(self, look: str, event: Any) -> None:
        """Show this look, or what was shown before if it is shown already."""
        now = self.app.stage.shown.look
        if now == look:
            self.show(self.last if self.last != look else "after", event)
        else:
            self.show(look, event)

    def show(self, look: str, event: Any) -> None:
        """Show this look; of two files, the difference only once it is known which splat is which."""
        shown = self.app.stage.shown
        if look == shown.look:
            return
        if look == "difference" and (looks.incomparable(shown) or strange(shown)):
            self.look.value = shown.look  # until it is known
            self.app.act(self.pair, slow=True)(event)
        else:
            self.change(look)

    def pair(self, event: Any) -> None:
        """Find out which splat continues which, then show the difference."""
        self.app.stage.change(rows=correspondence(self.app.stage.shown))
        self.change("difference")

    def change(self, look: str) -> None:
        now = self.app.stage.shown.look
        if now != look:
            self.last = now
            self.app.stage.change(look=look)

    def move(self) -> None:
        if self.split.value != self.app.stage.shown.split:
            self.app.stage.change(split=float(self.split.value))

    def count(self, event: Any) -> None:
        """Tell the difference in numbers, with the PSNR in the view of the browser that asks."""
        shown, client = self.app.stage.shown, getattr(event, "client", None)
        lines = numbers(shown)
        if client is not None:
            lines += [("PSNR in this view", decibels(view_psnr(shown, small_view(client))))]
        self.numbers.content, self.numbers.visible = table(lines), True

    def follow(self, shown: Shown, fields: frozenset[str]) -> None:
        """Something else is shown."""
        if fields & {"look", "split", "rows", "source"} or (shown.look == "gradient" and "pull" in fields):
            self.refreshing(None)

    def refresh(self, _: Any) -> None:
        """Let the elements say what is shown."""
        shown = self.app.stage.shown
        if self.look.value != shown.look:
            self.look.value = shown.look
        if self.split.value != shown.split:
            self.split.value = shown.split
        self.split.visible = shown.look == "split"
        if self.legend.content != (text := legend(shown)):
            self.legend.content = text


def keys() -> str:
    """The hotkeys in words."""
    return ", ".join(f"{key} {look}" for look, key in KEYS.items())


def decibels(value: float) -> str:
    """A PSNR in words."""
    return f"{value:.1f} dB" if value < float("inf") else "no difference"


def small_view(client: viser.ClientHandle) -> Cameras:
    """What a browser sees, as a picture of at most LONGEST pixels a side."""
    from splatedit.viewer.frame_display import cameras_of, eye_of

    eye = eye_of(client.camera)
    share = min(1.0, LONGEST / max(eye.width, eye.height))
    return cameras_of(eye, max(round(eye.width * share), 1), max(round(eye.height * share), 1))


def build(app: App) -> None:
    """Build the tab."""
    Panel(app)
