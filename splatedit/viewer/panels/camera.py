"""The camera tab: views, the cameras of the edit, keyframes, and films of them."""

from __future__ import annotations

import io
import math
import shlex
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from splatedit.errors import InputError
from splatedit.extents import direction
from splatedit.files import made
from splatedit.viewer import films, framing, paths
from splatedit.viewer.places import folder_of, stem, unused, whenever

if TYPE_CHECKING:
    import viser

    from splatedit.cameras import Cameras
    from splatedit.config import Config
    from splatedit.viewer.app import App
    from splatedit.viewer.paths import Key
    from splatedit.viewer.stage import Shown

# Azimuth and elevation in degrees, as of cameras.orbit; a browser cannot turn on from exactly above.
VIEWS = {"front": (0.0, 0.0), "left": (-90.0, 0.0), "back": (180.0, 0.0), "right": (90.0, 0.0), "top": (0.0, 89.9)}
RESET = "reset"
TURNTABLE, CIRCLE, KEYFRAMES = "turntable from here", "circle as of `render`", "keyframes"
WAYS = (TURNTABLE, CIRCLE, KEYFRAMES)
PLAYED = 30.0  # frames a second in the browser
FRUSTUM = 0.1  # radii of the scene
EDIT, KEY = (66, 99, 235), (230, 119, 0)  # colours of cameras
NONE: tuple[str, ...] = ("none",)


# -------------------------------------------------------------------------------------------------------------- values
class Named(NamedTuple):
    """Cameras and what they are called."""

    cameras: Cameras
    names: tuple[str, ...]


def cameras_of_edit(shown: Shown, config: Config) -> Named:
    """The cameras that an edit of the shown scene looks from by these settings; raises InputError."""
    from dataclasses import replace

    from rich.console import Console

    from splatedit.config import rig
    from splatedit.editing import rig_for
    from splatedit.work import find_views

    config = replace(config, scene=str(shown.path)) if shown.path is not None else config
    capture = find_views(config, shown.source, Console(file=io.StringIO()))
    if capture is not None:
        return Named(capture.square(capture.edit, 64), tuple(view.name for view in capture.edit))
    name, count = rig(config.cameras)
    cameras = rig_for(shown.source, name, count or 48, 64, config.up or shown.up)
    return Named(cameras, tuple(f"{name} {index}" for index in range(cameras.n)))


def keys_of(cameras: Cameras, centre: np.ndarray) -> list[Key]:
    """The cameras as views of the browser, which turn around what lies as far ahead as the centre of the scene."""
    found = []
    for w2c, K in zip(cameras.w2c.double().numpy(), cameras.K.double().numpy(), strict=True):
        fov = 2 * math.atan(cameras.height / 2 / K[1, 1])
        place = -w2c[:3, :3].T @ w2c[:3, 3]
        found.append(paths.from_w2c(w2c, fov, max(float(np.linalg.norm(place - centre)), 1e-9)))
    return found


def seen_from(name: str, now: Key, shown: Shown) -> Key:
    """One of VIEWS, as far from the middle of the scene as the camera is now."""
    centre = shown.extent.centre.double().numpy()
    distance = float(np.linalg.norm(now.position - centre)) or shown.extent.radius
    return paths.around(centre, distance, *VIEWS[name], shown.up, now.fov)


def way(kind: str, frames: int, now: Key | None, keys: list[Key], loop: bool, shown: Shown) -> list[Key]:
    """The views of a film; now: what the browser that asked looks at, None: nobody did. Raises InputError."""
    centre = shown.extent.centre.double().numpy()
    if kind == KEYFRAMES:
        if not keys:
            raise InputError("film: there are no keyframes; add some views first, or choose a turntable.")
        return paths.along(keys, frames, loop)
    if kind == CIRCLE or now is None:
        from splatedit.cameras import orbit

        return keys_of(orbit(shown.source, frames, up=shown.up), centre)
    return paths.turntable(now, centre, shown.up, frames)


def length(seconds: float, fps: float) -> int:
    """How many frames that is."""
    return max(1, round(seconds * fps))


def wxyz(key: Key) -> np.ndarray:
    """The rotation of a view as a quaternion (4,)."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(paths.axes(key)).as_quat()
    return np.array([w, x, y, z])


def draw_frusta(app: App, name: str, keys: list[Key], names: tuple[str, ...], color: tuple[int, int, int]) -> list[Any]:
    """A frustum in the scene for each view; a click looks through it. The handles remove them."""
    radius, handles = app.stage.shown.extent.radius, []
    for key, label in zip(keys, names, strict=True):
        handle = app.server.scene.add_camera_frustum(
            f"/{name}/{label.replace('/', '_')}",
            key.fov,
            1.0,
            scale=FRUSTUM * radius,
            thickness=1.5,
            thickness_units="screen",  # who looks through a camera sees its lines from nearby
            color=color,
            wxyz=wxyz(key),
            position=key.position,
        )
        handle.on_click(app.act(lambda event, key=key: paths.go(event.client, key)))
        handles.append(handle)
    return handles


# --------------------------------------------------------------------------------------------------------------- panel
class Views:
    """Where to look from, and how wide; the cameras of the edit."""

    def __init__(self, app: App):
        from viser import Icon

        self.app, gui = app, app.server.gui
        self.views = gui.add_button_group("Look from", (*VIEWS, RESET))
        self.fov = gui.add_slider("Field of view", 10.0, 120.0, 1.0, framing.FOV, hint="Degrees from top to bottom.")
        self.shot = gui.add_button("Screenshot", icon=Icon.CAMERA, hint="What you see, drawn by our renderer, as PNG.")
        with gui.add_folder("Cameras of the edit", expand_by_default=False):
            self.show = gui.add_checkbox("Show them", False)
            self.pick = gui.add_dropdown("Camera", NONE)
            self.through = gui.add_button("Look through it", icon=Icon.EYE, hint="Or click one in the scene.")
        self.keys: dict[str, Key] = {}
        self.frusta: list[Any] = []
        self.views.on_click(app.act(self.turn))
        self.fov.on_update(app.act(self.widen, newest=True))
        self.shot.on_click(app.act(self.screenshot, slow=True))
        self.show.on_update(app.act(self.refresh, slow=True))  # which may read and check a file of cameras
        self.pick.on_update(app.act(self.look, slow=True))
        self.through.on_click(app.act(self.look, slow=True))
        whenever(app, self.key, self.refresh, slow=True)

    def key(self) -> Any:
        """What decides about the cameras of the edit."""
        shown, config = self.app.stage.shown, self.app.config
        return id(shown.source), shown.path, shown.up, config.cameras, config.up

    def turn(self, event: Any) -> None:
        """Look from the front, the left ..."""
        shown, client, name = self.app.stage.shown, event.client, event.target.value
        if name == RESET:
            centre = shown.extent.centre.double().numpy()
            framing.move(client, centre, shown.extent.radius, shown.up)
            self.fov.value = framing.FOV
        else:
            paths.go(client, seen_from(name, paths.key_of(client.camera), shown))

    def widen(self, event: Any) -> None:
        if event.client is not None:
            event.client.camera.fov = math.radians(self.fov.value)

    def screenshot(self, event: Any) -> None:
        """What the browser that asked sees now, drawn here, to keep."""
        from splatedit.editing import resolve_device
        from splatedit.media import save_png

        camera, shown = event.client.camera, self.app.stage.shown
        cameras = paths.cameras_of([paths.key_of(camera)], camera.image_width, camera.image_height)
        look = films.SIDE_BY_SIDE if shown.look == "split" else shown.look
        picture = next(films.drawn(shown, cameras, look, resolve_device(self.app.config.device)))
        path = unused(made(folder_of(shown, self.app.config)) / f"{stem(shown)}-view.png")
        save_png(picture, path)
        event.client.send_file_download(path.name, path.read_bytes())
        self.app.notify("Screenshot", str(path), color="green", client=event.client)

    def refresh(self, _: Any = None) -> None:
        """Have the cameras of the edit in the list and, if wanted, in the scene."""
        for handle in self.frusta:
            handle.remove()
        self.frusta, self.keys = [], {}
        if not self.show.value:
            return
        shown = self.app.stage.shown
        named = cameras_of_edit(shown, self.app.config)
        keys = keys_of(named.cameras, shown.extent.centre.double().numpy())
        self.keys = dict(zip(named.names, keys, strict=True))
        self.frusta = draw_frusta(self.app, "edit_cameras", keys, named.names, EDIT)
        self.pick.options = named.names

    def look(self, event: Any) -> None:
        """Look through the camera of the list."""
        if event.client is None:
            return
        if not self.keys:
            self.show.value = True  # which fills the list
            self.refresh()
        paths.go(event.client, self.keys.get(self.pick.value) or next(iter(self.keys.values())))


class Keyframes:
    """Views kept one after another, played, written and read."""

    def __init__(self, app: App, views: Views):
        from viser import Icon

        self.app, self.fov, gui = app, views.fov, app.server.gui
        self.keys: list[Key] = []
        self.drawn: list[Any] = []
        self.settings: Callable[[], tuple[tuple[int, int], float]] = lambda: ((640, 480), 24.0)  # size and fps of films
        self.stop = threading.Event()
        self.stop.set()
        with gui.add_folder("Keyframes"):
            self.add = gui.add_button("Add this view", icon=Icon.PLUS)
            self.pick = gui.add_dropdown("Keyframe", NONE)
            self.change = gui.add_button_group("", ("look", "replace", "earlier", "later", "delete"))
            self.loop = gui.add_checkbox("Loop", True, hint="From the last keyframe on to the first.")
            self.seconds = gui.add_slider("Seconds", 1.0, 30.0, 0.5, 6.0)
            self.play = gui.add_button("Play", icon=Icon.PLAYER_PLAY)
            self.path = gui.add_text("File", "", hint="cameras.json, transforms.json, or one that was saved here.")
            self.files = gui.add_button_group("", ("save", "load", "clear"))
        self.add.on_click(app.act(self.append))
        self.change.on_click(app.act(self.edit))
        self.play.on_click(app.act(self.start))
        self.files.on_click(app.act(self.store))
        self.suggest()
        whenever(app, lambda: app.stage.shown.path, self.suggest)

    def suggest(self, _: Any = None) -> None:
        """The place of a camera file that nobody has named."""
        self.path.value = str(folder_of(self.app.stage.shown, self.app.config) / "path-cameras.json")

    @property
    def at(self) -> int:
        """The chosen keyframe, from 0; raises InputError if there is none."""
        if not self.keys:
            raise InputError("There are no keyframes yet: add a view.")
        return min(int(self.pick.value) - 1 if self.pick.value.isdecimal() else 0, len(self.keys) - 1)

    def append(self, event: Any) -> None:
        """Keep the view of the browser that asked, after the chosen one."""
        at = self.at + 1 if self.keys else 0
        self.keys.insert(at, paths.key_of(event.client.camera))
        self.refresh(at)

    def edit(self, event: Any) -> None:
        """What the buttons do to the chosen keyframe."""
        at, what, keys = self.at, event.target.value, self.keys
        if what == "look":
            paths.go(event.client, keys[at])
        elif what == "replace":
            keys[at] = paths.key_of(event.client.camera)
        elif what == "delete":
            del keys[at]
        else:
            to = min(max(at + (1 if what == "later" else -1), 0), len(keys) - 1)
            keys.insert(to, keys.pop(at))
            at = to
        self.refresh(at)

    def refresh(self, at: int) -> None:
        """The list, and the way in the scene."""
        count = len(self.keys)
        self.pick.options = tuple(str(number + 1) for number in range(count)) or NONE
        self.pick.value = str(min(at, count - 1) + 1) if count else NONE[0]
        for handle in self.drawn:
            handle.remove()
        self.drawn = draw_frusta(self.app, "keyframes", self.keys, tuple(f"key {n + 1}" for n in range(count)), KEY)
        if count > 1:
            views = paths.along(self.keys, 20 * count, self.loop.value)
            dots = np.stack([view.position for view in [*views, *(views[:1] if self.loop.value else [])]])
            line = np.stack([dots[:-1], dots[1:]], 1).astype(np.float32)
            add = self.app.server.scene.add_line_segments
            self.drawn.append(add("/keyframes/way", line, KEY, thickness=1.5, thickness_units="screen"))

    def start(self, event: Any) -> None:
        """Play the keyframes in the browser that asked, or stop."""
        from viser import Icon

        if not self.stop.is_set():
            self.stop.set()
            return
        if len(self.keys) < 2:
            raise InputError("Playing needs two keyframes or more: add views.")
        views = paths.along(self.keys, length(self.seconds.value, PLAYED), self.loop.value)
        self.stop.clear()
        self.play.label, self.play.icon = "Stop", Icon.PLAYER_STOP
        threading.Thread(target=self.run, args=(event.client, views), name="splatedit-play", daemon=True).start()

    def run(self, client: viser.ClientHandle, views: list[Key]) -> None:
        """Move the browser's camera along, once, or until it is stopped if the film is a loop."""
        from viser import Icon

        above, server = direction(self.app.stage.shown.up), self.app.server
        try:
            going = True
            while going:
                for view in views:
                    if self.stop.wait(1 / PLAYED) or client.client_id not in server.get_clients():
                        return
                    paths.go(client, view)
                going = self.loop.value
        finally:
            if client.client_id in server.get_clients():
                client.camera.up_direction = above  # else the mouse would turn around the last view's own
            self.stop.set()
            self.play.label, self.play.icon = "Play", Icon.PLAYER_PLAY

    def store(self, event: Any) -> None:
        """Save, load, clear."""
        path, what = Path(self.path.value).expanduser(), event.target.value
        if what == "load":
            centre = self.app.stage.shown.extent.centre.double().numpy()
            self.keys, self.loop.value = paths.load_path(path, centre)
        elif what == "clear":
            self.keys = []
        else:
            self.save(path, event)
            return
        self.refresh(0)

    def save(self, path: Path, event: Any) -> None:
        """Write the film's cameras, and say how the command line draws it."""
        if not self.keys:
            raise InputError("There are no keyframes to save: add views.")
        (width, height), fps = self.settings()
        made(path.parent)
        paths.save_path(self.keys, path, length(self.seconds.value, fps), self.loop.value, (width, height))
        again = ["splatedit", "render", str(self.app.stage.shown.path or "SCENE"), "-o", "film.mp4"]
        again += ["--cameras", str(path), "--size", f"{width}x{height}", "--fps", f"{fps:g}"]
        self.app.notify(
            "Saved", f"{path}; this draws the same film: {shlex.join(again)}", client=event.client, color="green"
        )


class Film:
    """Films of a turntable or of the keyframes."""

    def __init__(self, app: App, keyframes: Keyframes):
        from viser import Icon

        self.app, self.keyframes, gui = app, keyframes, app.server.gui
        self.stop = threading.Event()
        with gui.add_folder("Film"):
            self.way = gui.add_dropdown("Way", WAYS)
            self.look = gui.add_dropdown("Look", films.looks())
            self.size = gui.add_text("Size", "640x480")
            self.fps = gui.add_slider("Frames a second", 1, 60, 1, 24)
            self.seconds = gui.add_slider("Seconds", 0.5, 30.0, 0.5, 3.0, hint="Of a turntable; keyframes have theirs.")
            self.kind = gui.add_dropdown("Kind", films.ENDINGS)
            self.make = gui.add_button("Make the film", icon=Icon.MOVIE)
            self.bar = gui.add_progress_bar(0.0, visible=False, animated=True)
            self.cancel = gui.add_button("Cancel", visible=False)
            self.said = gui.add_markdown("")
        self.look.value = "after"
        keyframes.settings = self.settings
        self.make.on_click(app.act(self.film, slow=True))
        self.cancel.on_click(app.act(lambda _: self.stop.set()))

    def settings(self) -> tuple[tuple[int, int], float]:
        """Size in pixels, frames a second."""
        return films.read_size(self.size.value), float(self.fps.value)

    def film(self, event: Any) -> None:
        """Draw the film, write it, hand it to the browser that asked."""
        from splatedit.editing import resolve_device

        app, kind, (size, fps) = self.app, self.way.value, self.settings()
        shown = app.stage.shown._replace(selection=None)  # which would tint the film
        seconds = self.keyframes.seconds.value if kind == KEYFRAMES else self.seconds.value
        now = paths.key_of(event.client.camera) if event.client is not None else None
        views = way(kind, length(seconds, fps), now, list(self.keyframes.keys), self.keyframes.loop.value, shown)
        name = "path" if kind == KEYFRAMES else "turntable"
        place = folder_of(shown, app.config) / f"{name}@{datetime.now():%Y%m%d-%H%M%S}{self.kind.value}"
        self.stop.clear()
        self.busy(True)
        try:
            path = films.save_film(
                shown,
                paths.cameras_of(views, *size),
                self.look.value,
                unused(place),
                fps,
                device=resolve_device(app.config.device),
                tell=self.tell,
                stop=lambda: self.stop.is_set() or app.stage.closed,
            )
        except InputError as error:
            if not self.stop.is_set():
                raise
            app.notify("Cancelled", str(error), color="blue", client=event.client)
            return
        finally:
            self.busy(False)
        self.said.content = f"`{path}`: {len(views)} frames"
        if event.client is not None:  # under a name that fits into the message, and says something among others
            event.client.send_file_download(f"{stem(shown)}-{name}{self.kind.value}", path.read_bytes())

    def tell(self, share: float) -> None:
        self.bar.value = 100 * share

    def busy(self, yes: bool) -> None:
        """Show what there is to see while a film is made."""
        self.bar.value = 0.0
        self.bar.visible = self.cancel.visible = yes
        self.make.disabled = yes


def build(app: App) -> None:
    """Build the tab."""
    views = Views(app)
    Film(app, Keyframes(app, views))
