"""The live viewer: one server, what it shows, its panels and the edit that runs behind them."""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from splatedit.config import Config
from splatedit.errors import InputError
from splatedit.viewer.server import serve
from splatedit.viewer.stage import Shown, Stage

if TYPE_CHECKING:
    import viser

    from splatedit.jobs import Job

LOG = logging.getLogger(__name__)


class App:
    """A viewer that is open: what it shows is `stage.shown`, what its Edit panel asks for is `config`."""

    def __init__(self, shown: Shown, config: Config | None = None, *, host: str = "127.0.0.1", port: int = 0):
        from splatedit.viewer.panels import PANELS

        self.stage = Stage(shown)
        self.config = config or Config(scene=str(shown.path or ""))
        self.job: Job | None = None
        self.server, self.token = serve(host, port)
        self.quick, self.slow = Worker("actions"), Worker("background")
        tabs = self.server.gui.add_tab_group()
        for name, build in PANELS.items():
            with tabs.add_tab(name):
                build(self)

    @property
    def url(self) -> str:
        """The secret address."""
        return f"http://127.0.0.1:{self.server.get_port()}/{self.token}/"

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
        """Call the handler; what it raises is shown to the one who asked."""
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
    ) -> None:
        """Show a message to one browser, or to all."""
        clients = [client] if client is not None else list(self.server.get_clients().values())
        for each in clients:
            each.add_notification(title, body, color=color, auto_close_seconds=None if color == "red" else 5.0)

    def hotkey(self, label: str, key: str, handler: Callable[[Any], None], modifier: str | None = None) -> None:
        """A command of the palette (Ctrl+K) that `key` triggers too; modifier: held with it, as "cmd/ctrl+shift"."""
        command = self.server.gui.add_command(label, hotkey=key, modifier=modifier)  # type: ignore[arg-type]
        command.on_trigger(self.act(handler))

    def open_file(self, path: Path) -> None:
        """Show another splat file, as source and as current state."""

    def follow(self, job: Job) -> None:
        """Show an edit as it goes on: each of its steps becomes the current state."""

    def close(self) -> None:
        """Stop serving; returns at once."""
        threading.Thread(target=self.server.stop, daemon=True).start()  # takes seconds once a browser has been here


class Worker:
    """A thread that runs what it is given, one after the other."""

    def __init__(self, name: str):
        self.waiting: queue.Queue[object] = queue.Queue()
        self.newest: dict[object, Callable[[], None]] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self.work, name=f"splatedit-{name}", daemon=True).start()

    def put(self, call: Callable[[], None], key: object = None) -> None:
        """Run `call` when its turn comes; one of the same key that still waits is replaced, and keeps its place."""
        if key is None:
            self.waiting.put(call)
            return
        with self.lock:
            first = key not in self.newest
            self.newest[key] = call
        if first:
            self.waiting.put(key)

    def work(self) -> None:
        while True:
            item = self.waiting.get()
            if not callable(item):
                with self.lock:
                    item = self.newest.pop(item)
            item()
