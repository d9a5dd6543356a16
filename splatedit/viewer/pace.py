"""How often: bytes a second on the wire, a share of the time where others have to get on, a thread that waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

LOG = logging.getLogger(__name__)


class Pace:
    """What was sent says when the next may be begun: so many bytes a second, at least `least` seconds apart."""

    def __init__(self, rate: float, least: float):
        self.rate, self.least = rate, least
        self.ready = 0.0  # from when on the next may be begun, on the clock that `spend` is told

    def spend(self, begun: float, now: float, sent: int, rest: float = 0.0) -> None:
        """Note that `sent` bytes, begun then, went out now; rest: seconds to leave to others after that."""
        self.ready = max(begun + self.least, now + sent / self.rate, now + rest)


class Loop:
    """A thread that calls `serve` when woken, and again after as many seconds as it returns; None: when woken."""

    def __init__(self, name: str, serve: Callable[[], float | None], failed: Callable[[BaseException], None]):
        self.serve, self.failed = serve, failed
        self.bell, self.closed = threading.Event(), False
        self.thread = threading.Thread(target=self.work, name=f"splatedit-{name}", daemon=True)

    def start(self) -> None:
        """Begin, with a first call."""
        self.thread.start()

    def wake(self, *_: object) -> None:
        """Something has changed; may be called from any thread, and returns at once."""
        self.bell.set()

    def work(self) -> None:
        wait: float | None = 0.0
        told = ""
        while not self.closed:
            if wait is None or wait > 0:
                self.bell.wait(wait)
            self.bell.clear()
            if self.closed:
                return
            try:
                wait, told = self.serve(), ""
            except Exception as error:  # a display that stops would look as if the edit had
                LOG.exception("viewer: %s failed", self.thread.name)
                if str(error) != told:
                    self.failed(error)
                wait, told = 5.0, str(error)

    def close(self) -> None:
        """End after what is under way; returns at once."""
        self.closed = True
        self.bell.set()


Clock = Callable[[], float]
CLOCK: Clock = time.monotonic
