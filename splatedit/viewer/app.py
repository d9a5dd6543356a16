"""The live viewer: one server, what it shows, its panels and the edit that runs behind them."""

from __future__ import annotations

import atexit
import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from splatedit.config import Config
from splatedit.errors import InputError
from splatedit.viewer import display, framing
from splatedit.viewer.server import Served, serve
from splatedit.viewer.stage import Shown, Stage, continued, opened

if TYPE_CHECKING:
    import viser

    from splatedit.gaussians import Gaussians
    from splatedit.jobs import Job

LOG = logging.getLogger(__name__)
FAREWELL = 2.0  # seconds that the end of the program waits for what a thread is at
OPEN: weakref.WeakSet[App] = weakref.WeakSet()  # or closed a moment ago


class App:
    """A viewer that is open: what it shows is `stage.shown`, what its Edit panel asks for is `config`.

    Leave it open as long as it shall be looked at; `close` it, or use it as a context manager.
    """

    def __init__(
        self,
        shown: Shown,
        config: Config | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        origins: Sequence[str] = (),
        served: Served | None = None,
    ):
        """Open a viewer; host, port, origins: as of `server.serve`; served: a server that runs already."""
        from splatedit.viewer.panels import PANELS

        self.stage = Stage(shown)
        self.config = config or Config(scene=str(shown.path or ""))
        self.job: Job | None = None
        self.begun: Gaussians | None = None  # the source of the newest one that has begun
        self.finished: Job | None = None  # the newest one whose end was told
        self.unseen: deque[tuple[str, str, Literal["red", "green", "blue"]]] = deque(maxlen=20)
        self.closed = threading.Event()
        self.moved: set[int] = set()  # browsers that look from farther away
        self.served = served or serve(host, port, origins=origins)
        self.server, self.token, _ = self.served
        self.quick, self.slow = Worker("actions"), Worker("background")
        self.aim(shown)
        self.stage.listeners.append(self.turn)
        self.displays = display.start(self)
        OPEN.add(self)
        tabs = self.server.gui.add_tab_group()
        try:
            for name, build in PANELS.items():
                with tabs.add_tab(name):
                    build(self)
        except BaseException:
            self.close()
            raise
        self.hotkey("Open another file", "O", self.ask_file)
        self.name(shown)
        self.server.on_client_connect(self.act(self.welcome))
        self.server.on_client_disconnect(self.act(lambda _: self.count()))

    @property
    def url(self) -> str:
        """The secret address."""
        return self.served.url

    # ------------------------------------------------------------------------------------------------------- callbacks
    def act(self, handler: Callable[[Any], None], *, newest: bool = False, slow: bool = False) -> Callable[[Any], None]:
        """A viser callback that hands its event to `handler` on one thread, in order; errors become notifications.

        newest: events that wait when a newer one of this handler arrives are dropped, as a slider's. slow: on the
        thread of what takes longer than a moment, so that Stop never waits behind it.
        """
        worker, key = (self.slow if slow else self.quick), object()

        @functools.wraps(handler)
        def callback(event: Any) -> None:
            worker.put(lambda: self.guard(handler, event), key if newest else None)

        return callback

    def guard(self, handler: Callable[[Any], None], event: Any) -> None:
        """Call the handler, while the viewer is open; what it raises is shown to the one who asked."""
        if self.closed.is_set():
            return
        try:
            handler(event)
        except InputError as error:
            self.notify("Not done", str(error), client=getattr(event, "client", None))
        except Exception as error:
            LOG.exception("viewer: an action failed")
            self.notify("Failed", f"{type(error).__name__}: {error}", client=getattr(event, "client", None))

    def notify(
        self,
        title: str,
        body: str,
        *,
        color: Literal["red", "green", "blue"] = "red",
        client: viser.ClientHandle | None = None,
        stay: bool = False,
    ) -> None:
        """Show a message to one browser, or to all if it is gone; if there is none, to the next one that comes.

        stay: until it is closed, as what is red does; else for a few seconds.
        """
        there = self.server.get_clients()
        asked = None if client is None else there.get(client.client_id)
        told = list(there.values()) if asked is None else [asked]
        if not told:
            self.unseen.append((title, body, color))
        for each in told:
            each.add_notification(title, body, color=color, auto_close_seconds=None if stay or color == "red" else 5.0)

    def hotkey(self, label: str, key: str, handler: Callable[[Any], None], modifier: str | None = None) -> None:
        """A command of the palette (Ctrl+K) that `key` triggers too; modifier: held with it, as "cmd/ctrl+shift"."""
        command = self.server.gui.add_command(label, hotkey=key, modifier=modifier)  # type: ignore[arg-type]
        command.on_trigger(self.act(handler))

    # -------------------------------------------------------------------------------------------------------- browsers
    def welcome(self, client: viser.ClientHandle) -> None:
        """A browser has come, or come back."""
        self.count()
        self.fit(client)
        fit = self.act(lambda _: self.fit(client), newest=True)

        async def moved(camera: viser.CameraHandle) -> None:
            if camera.aspect < 1:
                fit(camera)

        client.camera.on_update(moved)  # the panel takes its part of the window a moment later
        while self.unseen:
            title, body, color = self.unseen.popleft()
            self.notify(title, body, color=color, stay=True)

    def fit(self, client: viser.ClientHandle) -> None:
        """Look from farther away in a window that is higher than wide, once, unless somebody has moved the camera.

        The camera may come back to that very place later, as one of the edit's.
        """
        if client.camera.aspect >= 1 or client.client_id in self.moved:
            return
        first = framing.place(*frame(self.stage.shown))
        if np.allclose(client.camera.position, first.position, rtol=1e-4):
            self.moved.add(client.client_id)
            framing.move(client, *frame(self.stage.shown))

    def count(self) -> None:
        self.stage.clients = len(self.server.get_clients())

    def aim(self, shown: Shown) -> None:
        """Browsers that come look at the whole scene."""
        framing.aim(self.server, *frame(shown))

    def name(self, shown: Shown) -> None:
        """The panel, and the tab of the browser, say which file is shown."""
        self.server.gui.set_panel_label("splatedit" if shown.path is None else f"{shown.path.name} - splatedit")

    def turn(self, shown: Shown, fields: frozenset[str]) -> None:
        """Follow the stage: another scene is looked at from where all of it is seen."""
        if "path" in fields:
            self.name(shown)
        if fields & {"extent", "up"}:
            self.aim(shown)
            for client in self.server.get_clients().values():
                framing.move(client, *frame(shown))

    # ---------------------------------------------------------------------------------------------------- what is shown
    def ask_file(self, event: Any) -> None:
        """Ask the one who wants to see another scene which."""
        gui = event.client.gui
        with gui.add_modal("Open another splat file") as window:
            field = gui.add_text(
                "File", str(self.stage.shown.path or ""), hint="a path on the machine that runs splatedit"
            )
            chosen, never_mind = gui.add_button("Open"), gui.add_button("Cancel", color="gray")

        def choose(_: Any) -> None:
            window.close()
            self.open_file(Path(field.value))

        chosen.on_click(self.act(choose))
        never_mind.on_click(self.act(lambda _: window.close()))

    def open_file(self, path: Path) -> None:
        """Show another splat file, as source and as current state; returns at once, what goes wrong is notified."""
        self.act(self.replace_scene, slow=True)(path)

    def replace_scene(self, path: Path) -> None:
        """Load a splat file and show it; raises InputError if it cannot be read, or an edit is under way."""
        self.check_idle()
        up = self.config.up if path == self.stage.shown.path else None  # what was said of another scene
        shown = read(path, up=up, background=self.stage.shown.background)
        self.check_idle()
        self.config = replace(self.config, scene=str(shown.path), source_prompt=None, up=up)
        self.stage.change(
            **{name: getattr(shown, name) for name in ("source", "current", "extent", "up", "path")},
            rows=None,
            pull=None,
            selection=None,
        )

    def check_idle(self) -> None:
        """Raise InputError while an edit is under way, or what it has written is not shown yet."""
        if self.job is not None and not (self.job.ended and self.job is self.finished):
            raise InputError("an edit is under way; stop it first, or wait for its end.")

    def follow(self, job: Job) -> None:
        """Show an edit as it goes on: each of its steps becomes the current state, its settings those of the panel.

        Raises InputError during another.
        """
        if job is not self.job:
            self.check_idle()
        self.job = job
        self.config = job.config or replace(self.config, **job.asked)
        job.listen(self.act(self.take, newest=True))

    def take(self, job: Job) -> None:
        """Show how far the edit has come, and its end, once."""
        if job is not self.job:
            return
        try:
            self.advance(job)
        finally:  # an end is one, also if what there was cannot be shown
            if job.ended and job is not self.finished:
                try:
                    self.finish(job)  # here, not behind what is slow: the next edit begins with the file of this one
                finally:
                    self.finished = job

    def advance(self, job: Job) -> None:
        """Show the newest step."""
        shown, fields = self.stage.shown, {}
        if job.source is not None and job.source is not self.begun:
            self.begun = job.source
            fields |= begun(job, shown)
        if (step := job.last) is not None:
            rows, pull = (None if part is None else part.to("cpu") for part in (step.rows, step.pull))
            fields |= {"current": step.gaussians.to("cpu"), "rows": rows, "pull": pull}
        if fields:
            self.stage.change(**fields)

    def finish(self, job: Job) -> None:
        """Say how the edit ended, and show what it has written; what was the source before is not what is shown now."""
        if job.error is not None and not isinstance(job.error, InputError):
            LOG.error("viewer: the edit failed", exc_info=job.error)
            self.notify("The edit failed", f"{type(job.error).__name__}: {job.error}")
        elif job.error is not None:
            stopped = job.state == "stopped"
            self.notify("The edit was stopped" if stopped else "The edit failed", str(job.error), color=CALM[stopped])
        else:
            where = "" if job.outcome is None else f"; written to {job.outcome.edited}"
            self.notify(f"The edit is {job.state}", f"after {job.done} of {job.steps} steps{where}.", color="green")
        if job.outcome is None:
            if job.config is None and job.done:
                self.config = replace(self.config, source_prompt=job.asked.get("prompt"))
            return
        if job.done:
            self.config = replace(self.config, source_prompt=None)  # its history knows
        result, shown = job.result(), self.stage.shown
        rows = shown.rows if shown.current.n == result.n else continued(shown.source, result)
        self.stage.change(current=result, rows=rows, path=Path(job.outcome.edited))

    # -------------------------------------------------------------------------------------------------------- lifetime
    def wait(self, timeout: float | None = None) -> bool:
        """Whether the viewer is closed, after `timeout` seconds at most (None: as long as it takes)."""
        return self.closed.wait(timeout)

    def close(self) -> None:
        """Stop serving, and the threads; returns at once. An edit that is under way goes on."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.stage.close()
        self.displays.close()
        self.quick.close()
        self.slow.close()
        # Once a browser has been here this takes six seconds.
        threading.Thread(target=self.server.stop, name="splatedit-stop", daemon=True).start()

    def at_rest(self, timeout: float) -> bool:
        """Whether the threads of a closed viewer have ended, after `timeout` seconds at most."""
        end, threads = time.monotonic() + timeout, [x.thread for x in (self.quick, self.slow, *self.displays.loops)]
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in threads)

    def __enter__(self) -> App:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


@atexit.register
def leave() -> None:
    """The program ends: let threads come out of torch, in which a thread that is cut off can crash the process."""
    apps, end = tuple(OPEN), time.monotonic() + FAREWELL
    for app in apps:
        app.close()
    for app in apps:
        app.at_rest(end - time.monotonic())


CALM: dict[bool, Literal["red", "blue"]] = {True: "blue", False: "red"}


def frame(shown: Shown) -> tuple[Any, float, str]:
    """What `framing` asks for: centre, radius and up of a scene."""
    return shown.extent.centre.numpy(), shown.extent.radius, shown.up


def begun(job: Job, shown: Shown) -> dict[str, Any]:
    """The fields that an edit changes when it begins; what stays the same scene keeps its place and its selection.

    A run that goes on with what is shown, or with what its part so far began with, begins with that.
    """
    assert job.source is not None
    up, scene = (None, None) if job.config is None else (job.config.up, Path(job.config.scene))
    new = opened(job.source, up=up or shown.up)
    fields: dict[str, Any] = {"source": new.source}
    goes_on = job.done > len(job.curve["loss"])
    if not (goes_on and job.folder is not None and shown.path in (scene, job.folder / "edited.ply")):
        fields |= {"current": new.source, "rows": None, "pull": None}
        fields |= {"path": scene} if scene != shown.path else {}
    same = bool((new.extent.centre == shown.extent.centre).all()) and new.extent.radius == shown.extent.radius
    if not same or new.up != shown.up:
        fields |= {"extent": new.extent, "up": new.up}
    if new.source.n != shown.source.n:
        fields["selection"] = None
    return fields


def read(
    scene: str | Path | Gaussians,
    other: str | Path | Gaussians | None = None,
    *,
    up: str | None = None,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Shown:
    """What to show of a scene, or of two: the second one is the current state. Raises InputError."""
    from splatedit.files import load, sidecar
    from splatedit.gaussians import Gaussians

    source = scene if isinstance(scene, Gaussians) else load(scene)
    current = other if other is None or isinstance(other, Gaussians) else load(other)
    if up is None and not isinstance(scene, Gaussians):
        up = sidecar(scene).up
    newest = scene if other is None else other
    path = None if isinstance(newest, Gaussians) else Path(newest).expanduser()
    return opened(source, current, path=path, up=up, background=background)


class Worker:
    """A thread that runs what it is given, one after the other."""

    def __init__(self, name: str):
        self.waiting: deque[object] = deque()
        self.newest: dict[object, Callable[[], None]] = {}
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.work, name=f"splatedit-{name}", daemon=True)
        self.thread.start()

    def put(self, call: Callable[[], None], key: object = None) -> None:
        """Run `call` when its turn comes; one of the same key that still waits is replaced, and keeps its place."""
        with self.changed:
            if key is None:
                self.waiting.append(call)
            else:
                if key not in self.newest:
                    self.waiting.append(key)
                self.newest[key] = call
            self.changed.notify_all()

    def close(self) -> None:
        """End the thread after what it is at; what waits is dropped."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting)
                if self.closed:
                    return
                item = self.waiting.popleft()
                call = item if callable(item) else self.newest.pop(item)
            try:
                call()
            except Exception:  # App.guard lets none through; whatever else does must not end the thread
                LOG.exception("viewer: %s", self.thread.name)
