"""The live viewer and the progress of an edit in a notebook cell, each below a picture that stays when they are gone.

Not tested in Google Colab, see `in_colab`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from splatedit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from IPython.display import DisplayHandle

    from splatedit.gaussians import Gaussians
    from splatedit.jobs import Job
    from splatedit.viewer.app import App

BASE_URL = "SPLATEDIT_BASE_URL"  # environment: where the browser finds the Jupyter server, see `address`
HUB_PREFIX = "JUPYTERHUB_SERVICE_PREFIX"  # JupyterHub sets it for every server
MOST = 8  # viewers open at once; the oldest one is closed
EVERY = 1.0  # seconds between two pictures of the progress
VIEWERS: dict[tuple[Any, ...], tuple[tuple[Any, ...], App]] = {}  # by what they show, which is kept so that ids last


# --------------------------------------------------------------------------------------------------------------- viewer
def show_gaussians(gaussians: Gaussians, other: Gaussians | None = None, *, height: int = 480, **more: Any) -> None:
    """Show a picture, and below it the live viewer: of the scene, or of two to compare.

    other: the scene it is compared with, shown first. height: of the viewer, in pixels. more: as of `viewer.view`.
    Shown again, with the same options, it is the same viewer. Raises InputError outside of a notebook.
    """
    from splatedit.gaussians import Gaussians

    check_there("splatedit.view(gaussians).url")
    if not isinstance(other, Gaussians | None):
        raise InputError(f"show: found {type(other).__name__}, expected Gaussians; splatedit.load reads a file.")
    seen = [value for g in (gaussians, other) if g is not None for value in g.parameters.values()]
    app = viewer_of(tuple(seen), gaussians, other, **more)
    put(still(app))
    embed(app, height)


def show_job(job: Job, *, height: int = 480, **more: Any) -> None:
    """Show a picture, renewed when the edit has ended, and below it the live viewer of the edit; else as above."""
    check_there("splatedit.view(job).url")
    app = viewer_of((job,), job, None, **more)
    renew_at_the_end(job, put(still(app)))
    embed(app, height)


def check_there(otherwise: str) -> None:
    """Raise InputError where no picture is displayed."""
    ipython = sys.modules.get("IPython")  # somebody who sits in a notebook has imported it
    if ipython is None or ipython.get_ipython() is None or in_terminal():
        raise InputError(f"show: there is no notebook here; {otherwise} is the address of the viewer.")


def in_terminal() -> bool:
    """Whether this is IPython in a terminal, which shows but text, and cannot renew what it has shown."""
    terminal = sys.modules.get("IPython.terminal.interactiveshell")
    return terminal is not None and terminal.TerminalInteractiveShell.initialized()


def put(data: dict[str, Any]) -> DisplayHandle:
    """Show an output in the cell; the handle renews it."""
    from IPython.display import DisplayHandle

    handle = DisplayHandle()
    handle.display(data, raw=True)
    return handle


def viewer_of(seen: tuple[Any, ...], scene: Any, other: Any, **more: Any) -> App:
    """The viewer that shows this already, with these options, or a new one."""
    from splatedit.viewer import view

    key = (*map(id, seen), repr(sorted(more.items())))
    known = VIEWERS.get(key)
    if known is not None and not known[1].closed.is_set():
        return known[1]
    while len(VIEWERS) >= MOST:
        VIEWERS.pop(next(iter(VIEWERS)))[1].close()
    page = urlsplit(os.environ.get(BASE_URL, ""))
    if page.scheme in ("http", "https") and "{" not in page.netloc:  # pages from there are ours
        more.setdefault("origins", [f"{page.scheme}://{page.netloc}"])
    app = view(scene, other, **more)
    VIEWERS[key] = (seen, app)
    return app


def still(app: App) -> dict[str, Any]:
    """What the viewer shows as a picture: the scene, or before and after."""
    from splatedit.displays import as_png

    shown = app.stage.shown
    return as_png(before_after(shown.source, shown.current, shown.up))


def before_after(source: Gaussians, current: Gaussians, up: str | None = None) -> np.ndarray:
    """One picture of a scene, two of one that has changed, (h, w, 3) uint8."""
    from splatedit.displays import compare

    pair = compare(source, current, size=256, up=up)
    same = all(current.parameters[name] is value for name, value in source.parameters.items())
    return pair.before[0] if same else pair.picture


def embed(app: App, height: int) -> None:
    """Show the viewer in a frame of its own output, with a link beside it."""
    if in_colab():
        from google.colab import output  # pyright: ignore[reportMissingImports]

        output.serve_kernel_port_as_iframe(app.server.get_port(), path=f"/{app.token}/", height=str(height))
        return
    url = address(app.url, os.environ)
    link = f'<a href="{escape(url)}" target="_blank" rel="noreferrer">in a tab of its own</a>'
    html = (
        f'<iframe src="{escape(url)}" width="100%" height="{height}" style="border: 1px solid #8884" '
        f'allow="fullscreen"></iframe><div style="font-size: small">The viewer {link}. {missing(url)}</div>'
    )
    put({"text/html": html, "text/plain": f"<viewer at {url}>"})


def in_colab() -> bool:
    """Whether this is Google Colab, whose own function serves a port of the kernel. Never tried there."""
    return "google.colab" in sys.modules


def address(url: str, environment: Mapping[str, str]) -> str:
    """Where the browser finds a viewer that serves at `url` on the kernel's machine.

    By SPLATEDIT_BASE_URL, the base URL of the Jupyter server as the browser sees it ("/", "/user/ann/",
    "https://example.org/jupyter/"), or by JupyterHub's prefix, through jupyter-server-proxy; a SPLATEDIT_BASE_URL with
    {port} in it ("https://{port}.example.org/") is any other proxy. With neither, `url` itself: browser and kernel are
    on one machine.
    """
    parts = urlsplit(url)
    base = environment.get(BASE_URL) or environment.get(HUB_PREFIX)
    if not base:
        return url
    for mark in ("{{port}}", "{port}"):  # VS Code and code-server write it twice
        if mark in base:
            return base.replace(mark, str(parts.port)).rstrip("/") + parts.path
    return f"{base.rstrip('/')}/proxy/{parts.port}{parts.path}"


def missing(url: str) -> str:
    """What to do if the frame stays empty, as HTML."""
    if "/proxy/" not in url:
        return "Empty? If the kernel runs on another machine, see docs/notebooks.md."
    if find_spec("jupyter_server_proxy") is None:
        return "<b>It needs <code>pip install jupyter-server-proxy</code> where Jupyter runs, and a restart of it.</b>"
    return ""


# -------------------------------------------------------------------------------------------------------------- the end
def renew_at_the_end(job: Job, handle: DisplayHandle) -> None:
    """Put the result into that output once the edit has ended.

    Twice: by the edit, and by whoever waits for it; what runs notebooks unattended drops outputs that do not come from
    the cell that runs.
    """
    made: list[dict[str, Any]] = []

    def renew(job: Job) -> None:
        from splatedit.displays import as_png

        if job.ended and job.source is not None:
            if not made:
                made.append(as_png(before_after(job.source, job.snapshot(), up_of(job))))
            handle.update(made[0], raw=True)

    job.awaited.append(renew)
    job.listen(renew)


# ------------------------------------------------------------------------------------------------------------- progress
def display_job(job: Job) -> None:
    """What `job` shows as the last line of a cell: its picture, renewed when it has ended, and its progress."""
    if in_terminal():
        print(job)
        return
    if find_spec("ipywidgets") is None or job.ended:
        handle = put(job._repr_mimebundle_())
        follow(job, lambda: handle.update(job._repr_mimebundle_(), raw=True))
        return
    from splatedit.displays import as_png

    first = {"text/plain": repr(job)}  # of a run that has not loaded its scene yet
    if job.source is not None:
        first = as_png(before_after(job.source, job.source, up_of(job)))
    renew_at_the_end(job, put(first))
    put({**progress(job)._repr_mimebundle_(), "text/plain": "<progress of the edit>"})


def progress(job: Job) -> Any:
    """A widget with the progress of an edit, a picture of it, and buttons that hold, step and stop it.

    Raises InputError without ipywidgets.
    """
    try:
        import ipywidgets as widgets
    except ImportError:
        raise InputError('progress: needs ipywidgets; pip install "splatedit[notebook]"') from None
    from splatedit.displays import job_numbers, png, thumbnail

    bar = widgets.FloatProgress(min=0.0, max=1.0, layout=widgets.Layout(width="220px"))
    state, numbers, error = (widgets.HTML() for _ in range(3))
    picture = widgets.Image(format="png", layout=widgets.Layout(width="192px", height="192px"))
    buttons = {
        "Pause": (lambda: job.pause() if job.state == "running" else job.resume(), "pause"),
        "Step": (job.step, "step-forward"),
        "Stop": (job.stop, "stop"),
    }
    pressed = {}
    for name, (act, icon) in buttons.items():
        pressed[name] = widgets.Button(description=name, icon=icon, layout=widgets.Layout(width="92px"))
        pressed[name].on_click(lambda _, act=act: act())

    def look() -> None:
        bar.value = job.done / max(job.steps, 1)
        bar.bar_style = {"done": "success", "failed": "danger", "stopped": "warning"}.get(job.state, "")
        state.value, numbers.value = f"<b>{job.state}</b>", escape(job_numbers(job))
        if job.error is not None:
            error.value = f'<span style="color: #b3261e">{escape(complaint(job.error))}</span>'
        held = job.state == "paused"
        pressed["Pause"].description, pressed["Pause"].icon = ("Resume", "play") if held else ("Pause", "pause")
        for button in pressed.values():
            button.disabled = job.ended or job.state == "stopping"
        if job.source is not None and (seen := thumbnail(job.snapshot(), up=up_of(job))) is not None:
            picture.value = png(seen)

    look()
    follow(job, look)
    right = widgets.VBox([widgets.HBox([bar, state]), numbers, widgets.HBox(list(pressed.values())), error])
    return widgets.HBox([picture, right])


def up_of(job: Job) -> str | None:
    """The up axis that was asked for."""
    return job.config.up if job.config is not None else None


def complaint(error: BaseException) -> str:
    """An error in one line: a user's mistake as it stands, any other one with its kind."""
    if isinstance(error, InputError):
        return str(error)
    return f"{type(error).__name__}: {error}; job.result() raises it, with where it came from."


def follow(job: Job, look: Callable[[], None]) -> None:
    """Call `look` in a thread of its own when the job has changed, about once a second, and at its end."""
    changed = threading.Event()
    job.listen(lambda _: changed.set())
    if job.ended:
        return

    def work() -> None:
        ended = False
        while not ended:
            changed.wait()
            changed.clear()
            ended, begun = job.ended, time.monotonic()
            look()
            if not ended and not job.ended:
                job.wait(max(EVERY - (time.monotonic() - begun), 0.0))

    threading.Thread(target=work, name="splatedit-progress", daemon=True).start()
