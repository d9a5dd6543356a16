"""The splats in the browsers: sent when they have changed, the newest only, as fast as a budget of bytes allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from splatedit.gaussians import Gaussians
from splatedit.viewer import display
from splatedit.viewer.encoding import Encoded, encode, place
from splatedit.viewer.pace import CLOCK, Clock, Pace
from splatedit.viewer.stage import Shown, Stage
from splatedit.viewer.wire import BYTES, First, Place, path_of, same

if TYPE_CHECKING:
    import viser

RATE = 8e6  # bytes a second, to all browsers together
LEAST = 0.25  # seconds between two updates
REST = 20.0  # while an edit is at work: seconds of rest for each second that an update took
SETTLED = 2.0  # seconds without a change, after which the node is made anew
LINGER = 20.0  # seconds that a node stays hidden before it is dropped: hidden splats cost the browser as much as others


class Node:
    """Splats in the browser's scene."""

    def __init__(self, handle: Any, picture: Gaussians | None, at: Place, encoded: Encoded, visible: bool):
        self.handle, self.picture, self.at, self.encoded, self.visible = handle, picture, at, encoded, visible
        self.updated = False  # since it was made: who joins then gets the splats twice, as made and as updated
        self.used = 0.0  # when it was last looked at


class SplatDisplay:
    """Keeps the splats in all browsers as the stage has them; `serve` is called by one thread.

    Two nodes at most, source and the rest, of which one is visible: a look back and forth costs no splats. While no
    browser is there nothing is encoded until the scene has settled; the server keeps that for who comes.
    """

    def __init__(
        self,
        server: viser.ViserServer,
        stage: Stage,
        pictures: display.Pictures,
        busy: Callable[[], bool],
        say: Callable[[display.Told], None] = lambda told: None,
        clock: Clock = CLOCK,
        rate: float = RATE,
        first: First | None = None,
    ):
        self.server, self.stage, self.pictures = server, stage, pictures
        self.busy, self.say, self.clock = busy, say, clock
        self.pace = Pace(rate, LEAST)
        self.nodes: dict[str, Node] = {}
        self.newest: Gaussians | None = None
        self.changed = -SETTLED  # when the newest picture was first seen; the first one counts as settled
        self.given = (stage.shown.extent, first.at) if first is not None else None
        if first is not None:  # sent already; of what picture is found out when there is one
            encoded = Encoded(*first.splats, 0, 0, 1.0)
            self.nodes["after"] = Node(first.handle, None, first.at, encoded, visible=True)

    def serve(self) -> float | None:
        """Do what is due; returns the seconds until something else is, None: nothing until the stage changes."""
        shown, now = self.stage.shown, self.clock()
        if display.in_use(shown, self.pictures) != "splats":
            self.reveal(None)
            return self.tidy(now)
        picture = self.pictures.of(shown)
        if picture is not self.newest:
            first = self.newest is None
            self.newest, self.changed = picture, now - SETTLED * first
        name = self.name(shown, picture)
        node, at = self.nodes.get(name), self.place(shown)
        if node is None or node.picture is not picture or node.at != at:
            if wait := self.held(name, now):
                return wait
            self.send(name, picture, at)
        self.reveal(name)
        if node := self.nodes.get(name):
            node.used = now
            self.say(display.Told("splats", picture.n, *node.encoded[-3:]))
        return self.tidy(self.clock())

    def place(self, shown: Shown) -> Place:
        """Where the nodes of this scene stand: the first one where it was found to stand before there was a display."""
        if self.given is not None and self.given[0] is shown.extent:
            return self.given[1]
        return place(shown.extent)

    def name(self, shown: Shown, picture: Gaussians) -> str:
        """The node for a picture: one that holds it already, or that of its look."""
        for name, node in self.nodes.items():
            if node.picture is picture:
                return name
        return "before" if shown.look == "before" else "after"

    def held(self, name: str, now: float) -> float:
        """Seconds that sending has to wait; 0: it may be done."""
        if self.server.get_clients():
            return max(self.pace.ready - now, 0.0)
        wait = max(self.changed + SETTLED - now, 0.0)
        if wait and name in self.nodes:  # else who comes would be sent what is old, and then what is new
            self.nodes.pop(name).handle.remove()
        return wait

    def send(self, name: str, picture: Gaussians, at: Place) -> None:
        """Make the node hold this picture, in place if it can, and show it; without splats there is no node.

        What the browsers have already is not sent.
        """
        begun = self.clock()
        encoded = encode(picture, at, display.SPLATS)
        old = self.nodes.get(name)
        if old and old.at == at and same(old.encoded.splats, encoded.splats):
            old.picture, old.encoded = picture, encoded
            self.spent(0, begun)
            return
        with self.server.atomic():
            if encoded.n == 0:
                if old:
                    self.nodes.pop(name).handle.remove()
            elif old and old.at == at:
                old.handle.set_gaussians(*encoded.splats)
                old.picture, old.encoded, old.updated = picture, encoded, True
            else:
                self.make(name, picture, at, encoded)
            self.reveal(name)
        self.spent(encoded.n, begun)

    def make(self, name: str, picture: Gaussians | None, at: Place, encoded: Encoded) -> None:
        """Add the node, or put another in its place."""
        add = self.server.scene.add_gaussian_splats
        handle = add(path_of(name), **encoded.splats._asdict(), scale=at.scale, position=at.position)
        self.nodes[name] = Node(handle, picture, at, encoded, visible=True)

    def spent(self, splats: int, begun: float) -> None:
        """Note what an update that sent so many has cost."""
        now = self.clock()
        sent = splats * BYTES * len(self.server.get_clients())
        self.pace.spend(begun, now, sent, rest=REST * (now - begun) if self.busy() else 0.0)

    def reveal(self, name: str | None) -> None:
        """Show this node and hide the other, in one step."""
        turned = [(key, node) for key, node in self.nodes.items() if node.visible != (key == name)]
        if turned:
            with self.server.atomic():
                for key, node in turned:
                    node.handle.visible = node.visible = key == name

    def tidy(self, now: float) -> float | None:
        """Drop nodes that nobody looks at any more, make one anew that was updated in place; seconds to the next."""
        due: list[float] = []
        for name, node in list(self.nodes.items()):
            if not node.visible:
                due.append(node.used + LINGER)
                if due[-1] <= now:
                    self.nodes.pop(name).handle.remove()
            elif node.updated:
                due.append(max(self.changed + SETTLED, self.pace.ready))
                if due[-1] <= now:
                    self.make(name, node.picture, node.at, node.encoded)
                    self.spent(node.encoded.n, now)
        return max(min(due) - now, 0.05) if due else None
