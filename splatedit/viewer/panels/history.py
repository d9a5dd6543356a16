"""The history tab: the edits that are in the shown file, taken back, brought back, weakened."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from splatedit.errors import InputError
from splatedit.viewer.places import editing, whenever

if TYPE_CHECKING:
    from torch import Tensor

    from splatedit.gaussians import Gaussians
    from splatedit.records import Entry
    from splatedit.stack import Stack
    from splatedit.viewer.app import App
    from splatedit.viewer.stage import Shown

DONE, UNDONE, ASIDE = "done", "undone", "set aside"  # as `stack.as_json` says
NONE: tuple[str, ...] = ("none",)  # of lists that are filled later
STYLE = "width:100%;border-collapse:collapse;font-size:0.75em;line-height:1.35"
CELL = "padding:0.15em 0.35em;border-bottom:1px solid rgba(128,128,128,0.3);text-align:left;vertical-align:top"


# -------------------------------------------------------------------------------------------------------------- values
class Moment(NamedTuple):
    """What is shown of a file with a history: the last edit that is in it."""

    before: Gaussians  # that edit; the file itself if none is done
    now: Gaussians  # the file
    rows: Tensor | None  # (m,) int64, row of `before` that each of `now` continues, -1 if added; None: its own
    ids: np.ndarray  # (n,) of `before`: numbers that a Gaussian keeps through all edits


def moment(stack: Stack) -> Moment:
    """The file as it is and as it was before the last edit that is done; raises InputError."""
    edits = [entry for entry in stack.done if entry.kind == "edit"]
    before, now = stack.named(edits[-1].parent if edits else stack.at), stack.named()
    return Moment(before.gaussians, now.gaussians, rows_of(before.ids, now.ids), before.ids)


def rows_of(before: np.ndarray, now: np.ndarray) -> Tensor | None:
    """Where in `before` (n,) each number of `now` (m,) is: (m,) int64, -1 where it is not; None if they are the same.

    The numbers are those that a Gaussian keeps through all edits, each one once.
    """
    import torch

    if np.array_equal(before, now):
        return None
    order = before.argsort(kind="stable")
    place = np.searchsorted(before, now, sorter=order).clip(max=len(before) - 1)
    found = order[place]
    return torch.from_numpy(np.where(before[found] == now, found, -1).astype(np.int64))


def why_not(path: Path | None, stack: Stack | None, under_way: bool) -> str:
    """In words why nothing can be undone, redone or weakened; empty if it can."""
    if path is None:
        return "The scene comes from no file, so there is no history."
    if stack is None or not stack.entries:
        return f"No history lies beside {path.name}. Every edit that is run leaves its result with one."
    if under_way:
        return "An edit is under way; its history can be changed once it has ended."
    if stack.at is None:
        return (
            f"{path.name} was changed by another program since splatedit wrote it, so it is left as it is. Put it back "
            f"as it was, or move {stack.folder.name} away to begin a new history."
        )
    return ""


def table(stack: Stack) -> str:
    """All states as an HTML table; the one in the file is marked, what is not done is dim."""
    from splatedit.stack import as_json

    first = next((entry.record.get("scene") for entry in stack.entries.values() if entry.record.get("scene")), None)
    rows = [row(stack.at == 0, 0, "the scene", Path(first).name if first else "", "", False)]
    for said in as_json(stack)["entries"]:
        entry = stack.entries[said["number"]]
        faint = said["place"] in (UNDONE, ASIDE)
        rows.append(row(stack.at == entry.number, entry.number, entry.title, how(entry), state(said), faint))
    head = "".join(f'<th style="{CELL}">{name}</th>' for name in ("", "#", "edit", "state"))
    return f'<table style="{STYLE}"><tr>{head}</tr>{"".join(rows)}</table>'


def row(here: bool, number: int, title: str, how: str, state: str, faint: bool) -> str:
    """One line of the table."""
    small = f'<br><span style="opacity:0.7">{escape(how)}</span>' if how else ""
    cells = ("▸" if here else "", str(number), escape(title) + small, escape(state))
    look = "opacity:0.5" if faint else "font-weight:600" if here else ""
    return f'<tr style="{look}">' + "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells) + "</tr>"


def how(entry: Entry) -> str:
    """Guidance, steps and seed of an edit."""
    record = entry.record
    words = [record.get("guidance"), f"{record['steps']} steps" if "steps" in record else None]
    words += [f"seed {record['seed']}" if "seed" in record else None]
    return ", ".join(str(word) for word in words if word is not None)


def state(said: dict[str, Any]) -> str:
    """What became of an entry of `stack.as_json`: its verdict, and whether it is done and how much of it."""
    words = [str(said["record"].get("verdict") or "")]
    if said["strength"] not in (None, 1.0):
        words.append(f"at strength {said['strength']:g}")
    if said["place"] != DONE:
        words.append(said["place"])
    return ", ".join(word for word in words if word)


def label(stack: Stack, number: int) -> str:
    """A state by number and words, unlike all others, short enough for a list."""
    title = stack.entries[number].title if number else "the scene before all edits"
    return f"{number}: {title if len(title) <= 48 else title[:47] + '…'}"


def number_of(label: str) -> int:
    """The number that a label begins with."""
    return int(label.partition(":")[0])


# --------------------------------------------------------------------------------------------------------------- panel
class Panel:
    """The elements of the tab, and the file they speak of."""

    def __init__(self, app: App):
        from viser import Icon

        self.app, gui = app, app.server.gui
        self.stack: Stack | None = None
        self.moment: Moment | None = None  # what a preview is made of, once one was asked for
        self.table = gui.add_html("")
        self.said = gui.add_markdown("")
        self.back = gui.add_button("Undo", icon=Icon.ARROW_BACK_UP, hint="Ctrl+Z or Cmd+Z")
        self.forth = gui.add_button("Redo", icon=Icon.ARROW_FORWARD_UP, hint="Ctrl+Shift+Z or Cmd+Shift+Z")
        self.states = gui.add_dropdown("State", NONE)
        self.jump = gui.add_button("Go to this state")
        self.edits = gui.add_dropdown("Edit", NONE)
        self.slider = gui.add_slider("Strength", 0.0, 1.0, 0.01, 1.0)
        self.apply = gui.add_button("Apply the strength", hint="Writes it into the file; it can be undone.")
        self.again = gui.add_button("Read the file again")
        self.connect()
        self.refresh()
        whenever(app, lambda: (app.stage.shown.path, editing(app)), self.refresh)
        app.act(self.compare)(None)

    def connect(self) -> None:
        """Say what the buttons do."""
        app = self.app
        self.back.on_click(app.act(lambda _: self.undo()))
        self.forth.on_click(app.act(lambda _: self.redo()))
        self.jump.on_click(app.act(lambda _: self.change(lambda stack: stack.goto(number_of(self.states.value)))))
        self.edits.on_update(app.act(self.choose))
        self.slider.on_update(app.act(self.preview, newest=True))
        self.apply.on_click(app.act(lambda _: self.change(self.weaken)))
        self.again.on_click(app.act(lambda _: self.reread()))
        app.hotkey("Undo the last edit", "Z", lambda _: self.undo(), "cmd/ctrl")
        app.hotkey("Redo the edit that was undone", "Z", lambda _: self.redo(), "cmd/ctrl+shift")

    def refresh(self, _: Any = None) -> None:
        """Say what is known of the shown file."""
        from splatedit.stack import Stack

        path = self.app.stage.shown.path
        self.stack = self.moment = None
        if path is not None and path.is_file():
            self.stack = Stack.open(path)
        why = why_not(path, self.stack, editing(self.app))
        self.table.content = table(self.stack) if self.stack and self.stack.entries else ""
        self.said.content = why
        self.fill(bool(why))

    def fill(self, off: bool) -> None:
        """What can be chosen and pressed."""
        from splatedit.stack import strengths

        stack = self.stack
        done = {} if off or stack is None else strengths(stack.done)
        for element in (self.states, self.jump):
            element.disabled = off
        self.again.disabled = self.app.stage.shown.path is None or editing(self.app)
        for element in (self.edits, self.slider, self.apply):
            element.disabled = not done
        self.back.disabled = off or stack is None or not stack.done
        self.forth.disabled = off or stack is None or not stack.undone
        if off or stack is None or stack.at is None:
            return
        self.states.options = tuple(label(stack, number) for number in (0, *stack.entries))
        self.states.value = label(stack, stack.at)
        if done:
            self.edits.options = tuple(label(stack, number) for number in done)
            self.edits.value = label(stack, max(done))
            self.slider.value = done[max(done)]

    def undo(self) -> None:
        self.change(lambda stack: stack.undo())

    def redo(self) -> None:
        self.change(lambda stack: stack.redo())

    def weaken(self, stack: Stack) -> None:
        """Write the strength of the slider."""
        if stack.strength(self.slider.value, number_of(self.edits.value)) is None:
            raise InputError(f"This edit has strength {self.slider.value:g} already.")

    def ready(self) -> Stack:
        """The history of the shown file, if it may be changed and is the one on the screen; raises InputError."""
        from splatedit.stack import Stack

        path, old = self.app.stage.shown.path, self.stack
        stack = Stack.open(path) if path is not None else None
        if why := why_not(path, stack, editing(self.app)):
            raise InputError(why)
        assert stack is not None
        if old is None or old.file != stack.file or old.sha256 != stack.sha256:
            self.show(stack)
            raise InputError(f"{path}: was changed since it was read; the screen now shows it as it is. Press again.")
        return stack

    def change(self, action: Callable[[Stack], Any]) -> None:
        """Do something to the history of the shown file, and show what came of it."""
        stack = self.ready()
        action(stack)
        self.show(stack)

    def show(self, stack: Stack) -> None:
        """Put the state of the file onto the stage."""
        self.app.stage.change(**fields(self.app.stage.shown, moment(stack)))
        self.refresh()

    def reread(self) -> None:
        """Show the file as it is now, whoever changed it."""
        from splatedit.stack import Stack

        path = self.app.stage.shown.path
        self.app.check_idle()
        if path is None:
            raise InputError(why_not(path, None, False))
        stack = Stack.open(path) if path.is_file() else None
        if stack is not None and stack.entries and stack.at is not None:
            self.show(stack)
        else:
            self.app.open_file(path)
            self.refresh()

    def compare(self, _: Any) -> None:
        """A file that was opened with its history, and with nothing to compare it with: with what its edit began."""
        shown = self.app.stage.shown
        if shown.source is shown.current and self.stack is not None and self.stack.entries and self.stack.done:
            self.app.stage.change(**fields(shown, moment(self.stack)))

    def choose(self, event: Any) -> None:
        """Another edit: the slider says its strength, the screen shows the file again if it showed a preview."""
        from splatedit.stack import strengths

        if event.client is not None and self.stack is not None:
            self.slider.value = strengths(self.stack.done)[number_of(self.edits.value)]
            self.show(self.stack)

    def preview(self, event: Any) -> None:
        """What the strength of the slider would give, on the screen alone."""
        if event.client is None:  # it was set by us
            return
        stack, shown = self.ready(), self.app.stage.shown
        self.moment = self.moment or moment(stack)
        seen = stack.weakened(self.slider.value, number_of(self.edits.value))
        rows = rows_of(self.moment.ids, seen.ids)
        self.app.stage.change(**fields(shown, self.moment._replace(now=seen.gaussians, rows=rows)))


def fields(shown: Shown, found: Moment) -> dict[str, Any]:
    """What changes on the stage; a selection stays if the rows it is of stay."""
    changed: dict[str, Any] = {"source": found.before, "current": found.now, "rows": found.rows, "pull": None}
    if found.before.n != shown.source.n:
        changed["selection"] = None
    return changed


def build(app: App) -> None:
    """Build the tab."""
    Panel(app)
