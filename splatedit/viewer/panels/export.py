"""The export tab: what is shown as a file of any kind, here or through the browser; and the report of the last run."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from splatedit.errors import InputError, LossWarning
from splatedit.files import made
from splatedit.viewer.places import editing, folder_of, stem, whenever

if TYPE_CHECKING:
    from splatedit.formats import Format
    from splatedit.gaussians import Gaussians
    from splatedit.viewer.app import App
    from splatedit.viewer.stage import Shown

WHAT = ("current", "before", "selection", "all but the selection")
AS_IT_IS = "as it is"
DEGREES = (AS_IT_IS, "3", "2", "1", "0")


# -------------------------------------------------------------------------------------------------------------- values
class Wish(NamedTuple):
    """What shall be written, and how."""

    what: str  # one of WHAT
    format: str  # a key of formats.FORMATS that can be written
    degree: int | None  # of the spherical harmonics, None: as it is


def writable() -> tuple[str, ...]:
    """The formats that can be written, by name."""
    from splatedit.formats import FORMATS

    return tuple(name for name, form in FORMATS.items() if form.write is not None)


def chosen(shown: Shown, what: str) -> Gaussians:
    """The splats of one of WHAT; raises InputError if none is selected, or all are."""
    import torch

    if what in ("current", "before"):
        return shown.current if what == "current" else shown.source
    if shown.selection is None or not bool(shown.selection.any()):
        raise InputError("export: nothing is selected; the Select tab selects.")
    inside = shown.selection.cpu()
    if shown.rows is not None:  # what was added since belongs to no selection
        inside = torch.where(shown.rows >= 0, inside[shown.rows.clamp(min=0)], False)
    elif shown.current.n != len(inside):
        raise InputError("export: nothing says which of these splats are the selected ones; select again.")
    rows = inside if what == "selection" else ~inside
    if not bool(rows.any()):
        raise InputError(f"export: no splat is left of {shown.current.n:,}; select other ones.")
    return shown.current.select(rows)


def prepared(shown: Shown, wish: Wish) -> Gaussians:
    """The splats as they will be written."""
    from splatedit.conversion import with_degree

    gaussians = chosen(shown, wish.what)
    return gaussians if wish.degree is None else with_degree(gaussians, wish.degree)


def losses(shown: Shown, wish: Wish) -> list[str]:
    """What the file will not hold of the splats that are chosen, as noun phrases."""
    from splatedit.formats import FORMATS
    from splatedit.gaussians import SH_REST

    gaussians = chosen(shown, wish.what)
    dropped = wish.degree is not None and bool(gaussians.shN[:, SH_REST[wish.degree] :].any())
    lost = [f"spherical harmonics above degree {wish.degree}"] * dropped
    return lost + FORMATS[wish.format].losses(prepared(shown, wish))


def told(shown: Shown, wish: Wish) -> str:
    """What will be written, and what is lost, for people."""
    try:
        gaussians = prepared(shown, wish)
        lost = losses(shown, wish)
    except InputError as error:
        return str(error)
    said = f"{gaussians.n:,} splats, SH degree {gaussians.sh_degree}."
    return f"{said} **Lost:** {', '.join(lost)}." if lost else f"{said} Nothing is lost."


def ending(format: str) -> str:
    """What names of a format end in."""
    from splatedit.formats import FORMATS

    return FORMATS[format].suffixes[0]


def default_path(folder: Path, name: str, wish: Wish) -> Path:
    """Where a file goes if nobody says otherwise: never the name of a file that a run writes."""
    extra = {"current": "", "before": "-before", "selection": "-selection", "all but the selection": "-rest"}
    return folder / f"{name}-export{extra[wish.what]}{ending(wish.format)}"


def check_place(path: Path, shown: Shown, form: Format, overwrite: bool) -> None:
    """Raise InputError unless a file of this kind may be written there."""
    from splatedit.formats import format_of

    if not path.name:
        raise InputError("export: say where the file shall go.")
    found = format_of(path)
    if found is None or found.name != form.name:
        endings = " or ".join(form.suffixes)
        raise InputError(f"{path}: the name of a {form.name} file ends in {endings}; choose another name or format.")
    if not path.exists():
        return
    if shown.path is not None and shown.path.exists() and os.path.samefile(path, shown.path):
        raise InputError(f"{path}: is the file that is shown, and its history speaks of it; choose another name.")
    if not overwrite:
        raise InputError(f'{path}: is there already; tick "Overwrite", or choose another name.')


def save_as(shown: Shown, wish: Wish, path: Path, overwrite: bool = False) -> int:
    """Write the file, whole or not at all, into a folder that is made if need be; its size in bytes, or InputError."""
    from splatedit.files import save
    from splatedit.formats import FORMATS

    check_place(path, shown, FORMATS[wish.format], overwrite)
    gaussians = prepared(shown, wish)
    made(path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)  # the tab says it
        save(gaussians, path)
    return path.stat().st_size


def as_bytes(shown: Shown, wish: Wish, name: str) -> bytes:
    """The file's content; `name` is only named in errors."""
    from splatedit.formats import FORMATS

    write, stream = FORMATS[wish.format].write, io.BytesIO()
    assert write is not None
    write(prepared(shown, wish), stream, Path(name))
    return stream.getvalue()


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def report_of(app: App) -> Path | None:
    """The report.html of the last run: of this viewer, else of the run that wrote the shown file."""
    outcome = app.job.outcome if app.job is not None else None
    folders = [outcome.folder] if outcome is not None else []
    folders += [app.stage.shown.path.parent] if app.stage.shown.path is not None else []
    return next((path for folder in folders if (path := folder / "report.html").is_file()), None)


# --------------------------------------------------------------------------------------------------------------- panel
class Panel:
    """The elements of the tab."""

    def __init__(self, app: App):
        from viser import Icon

        self.app, gui = app, app.server.gui
        self.what = gui.add_dropdown("What", WHAT, hint="During an edit: the newest step.")
        self.format = gui.add_dropdown("Format", writable())
        self.degree = gui.add_dropdown("SH degree", DEGREES, hint="Of the colours that depend on the view.")
        self.said = gui.add_markdown("")
        self.path = gui.add_text("File", "")
        self.over = gui.add_checkbox("Overwrite", False, hint="Replace a file of this name.")
        self.save = gui.add_button("Save on the server", icon=Icon.DEVICE_FLOPPY)
        self.load = gui.add_button("Download", icon=Icon.DOWNLOAD)
        self.done = gui.add_markdown("")
        gui.add_divider()
        self.report = gui.add_markdown("")
        self.fetch = gui.add_button("Download the report", icon=Icon.FILE_ANALYTICS)
        self.suggested = ""
        for element in (self.what, self.format, self.degree):
            element.on_update(app.act(self.refresh, newest=True, slow=True))  # of a million splats it takes a while
        self.save.on_click(app.act(self.save_file, slow=True))
        self.load.on_click(app.act(self.send_file, slow=True))
        self.fetch.on_click(app.act(self.send_report, slow=True))
        self.refresh()
        whenever(app, self.key, self.refresh, slow=True)

    def key(self) -> Any:
        """What the tab speaks of, as far as it changes what is said; not each step of an edit."""
        shown = self.app.stage.shown
        return shown.path, id(shown.selection), id(shown.source), shown.current.n, editing(self.app)

    @property
    def wish(self) -> Wish:
        degree = self.degree.value
        return Wish(self.what.value, self.format.value, None if degree == AS_IT_IS else int(degree))

    def refresh(self, _: Any = None) -> None:
        """Say what would be written, and suggest where, unless a place was typed in."""
        app, wish = self.app, self.wish
        self.said.content = told(app.stage.shown, wish)
        if self.path.value == self.suggested:
            folder = folder_of(app.stage.shown, app.config)
            self.suggested = self.path.value = str(default_path(folder, stem(app.stage.shown), wish))
        report = report_of(app)
        self.report.content = f"Report of the last run: `{report}`" if report else "No run has written a report yet."
        self.fetch.disabled = report is None

    def save_file(self, event: Any) -> None:
        """Write what is shown now."""
        path = Path(self.path.value).expanduser()
        count = save_as(self.app.stage.shown, self.wish, path, self.over.value)
        self.over.value = False
        self.done.content = f"`{path}`: {size(count)}"
        self.app.notify("Saved", f"{path}: {size(count)}", color="green", client=event.client)

    def send_file(self, event: Any) -> None:
        """Hand the file to the browser that asked."""
        wish = self.wish
        name = default_path(Path(), stem(self.app.stage.shown), wish).name
        content = as_bytes(self.app.stage.shown, wish, name)
        self.done.content = f"{name}: {size(len(content))}"
        event.client.send_file_download(name, content)

    def send_report(self, event: Any) -> None:
        """Hand the report to the browser that asked: a page may not open a file by its path."""
        path = report_of(self.app)
        if path is None:
            raise InputError("No run has written a report yet.")
        event.client.send_file_download(path.name, path.read_bytes())


def build(app: App) -> None:
    """Build the tab."""
    Panel(app)
