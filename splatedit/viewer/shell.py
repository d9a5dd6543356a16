"""What `splatedit view` and `splatedit run --viewer` do: open a viewer, say where, and wait."""

from __future__ import annotations

import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from splatedit.errors import DONE, INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from splatedit.config import Config
    from splatedit.jobs import Job
    from splatedit.run import Outcome
    from splatedit.viewer.app import App


def show(
    scene: str,
    other: str | None,
    tell: Callable[[str], None],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    up: str | None = None,
    open_browser: bool | None = None,
) -> None:
    """Show one or two splat files until Ctrl-C; `tell` is called with the address. Raises InputError.

    open_browser: None opens one if there is a screen and somebody at a terminal. A file that a first look is enough for
    is on its way to the browser while torch is still being imported; the address of others is told once they are read.
    """
    from splatedit.viewer import first_look
    from splatedit.viewer.server import serve

    def told(url: str) -> None:
        tell(url)
        if may_open() if open_browser is None else open_browser:
            visit(url)

    def begin() -> App:
        served = serve(host, port)
        seen = None if other is not None else first_look.glance(scene, up)
        if seen is not None:
            served = first_look.show(served, seen)
            told(served.url)
        from splatedit.viewer import view

        app = view(scene, other, up=up, served=served)
        if seen is None:
            told(served.url)
        return app

    with leaving():
        try:
            app = begin()
        except KeyboardInterrupt:
            stderr().print("Interrupted before the scene was open.")
            raise SystemExit(INTERRUPTED) from None
        with app:
            stderr().print("Ctrl-C ends.")
            linger(app)
            close(app, DONE)


def watch(
    config: Config,
    tell: Callable[[str], None],
    *,
    command: Sequence[str] | None = None,
    resume: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
) -> Outcome:
    """`run.run` with a viewer; `tell` is called with the path of the result. Ctrl-C as without one.

    The viewer stays until Ctrl-C if somebody is at the terminal. Raises what the run raises.
    """
    from splatedit.jobs import start_run
    from splatedit.viewer import view
    from splatedit.work import check_run

    check_run(config, resume)
    console = stderr()
    with view(config.scene, config=config, host=host, port=port, up=config.up) as app, leaving():
        console.print(f"viewer: {app.url}", markup=False)
        job = start_run(config, console=console, command=command, resume=resume)
        app.follow(job)
        attend(job, console)
        if job.error is not None:
            raise KeyboardInterrupt if job.state == "stopped" else job.error
        assert job.outcome is not None
        tell(str(job.outcome.edited))
        if sys.stdin is not None and sys.stdin.isatty():
            console.print("The viewer stays open; Ctrl-C ends.")
            linger(app)
        close(app, job.outcome.status)
        return job.outcome


def attend(job: Job, console: Console) -> None:
    """Wait for the end of an edit; the first Ctrl-C ends it early and what is done is written, the second leaves it."""
    try:
        job.wait()
    except KeyboardInterrupt:
        end(job, console)


def end(job: Job, console: Console) -> None:
    """Stop an edit and wait until what is done is written; Ctrl-C does not wait."""
    from splatedit.jobs import FAREWELL

    job.stop()
    console.print("stopping after this step, then writing; once more to leave at once")
    try:
        job.wait()
    except KeyboardInterrupt:
        console.print("[bold yellow]Left[/] before all was written; if there is a checkpoint, --resume goes on there.")
        job.abandon()
        with suppress(KeyboardInterrupt):
            job.thread.join(FAREWELL)
        if job.thread.is_alive():
            cut_off(INTERRUPTED)
        raise SystemExit(INTERRUPTED) from None


def close(app: App, status: int) -> None:
    """Close the viewer, and the program if a thread of it goes on in what takes long."""
    from splatedit.viewer.app import FAREWELL

    app.close()
    with suppress(KeyboardInterrupt):
        if app.at_rest(FAREWELL):
            return
    cut_off(status)


def cut_off(status: int) -> NoReturn:
    """End the program here: a thread that the interpreter cuts off inside torch would take the exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def linger(app: App) -> None:
    """Wait for Ctrl-C, and then for the end of an edit that was begun in the viewer."""
    with suppress(KeyboardInterrupt):
        app.wait()
    if app.job is not None and not app.job.ended:
        end(app.job, stderr())


def stderr() -> Console:
    """Where messages go."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def may_open() -> bool:
    """Whether to open a browser unasked: only on a screen, for somebody at a terminal."""
    screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(screen) and sys.stdout.isatty() and "SSH_CONNECTION" not in os.environ


def visit(url: str) -> None:
    """Open a browser, however long that takes it."""
    threading.Thread(target=webbrowser.open, args=(url,), name="splatedit-browser", daemon=True).start()


@contextmanager
def leaving() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
