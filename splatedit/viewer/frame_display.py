"""Frames drawn here by our own renderer, a browser's background: true colours of any number of Gaussians.

While the camera moves they are as coarse as it takes to keep up, and sharp when it stands still. One thread draws for
all browsers; what it draws next is always for the newest camera and the newest state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.gaussians import Gaussians
from splatedit.viewer import display
from splatedit.viewer.encoding import drawable, sample
from splatedit.viewer.pace import CLOCK, Clock, Pace
from splatedit.viewer.stage import Shown, Stage

if TYPE_CHECKING:
    import viser

RATE = 2e6  # bytes a second, to each browser
LEAST = 1 / 15  # seconds between two frames for a browser
MOVING = 1 / 12  # seconds that a frame may take while the camera moves
STILL = 0.25  # likewise the first one after that, and each at the most four times as fine
LIVE = 0.15  # likewise while an edit is at work and nobody moves the camera
REST = 20.0  # while an edit is at work: seconds of rest for each second that such a frame took
STANDS = 0.25  # seconds after its last move from which on a camera stands still
LARGEST, FEWEST = 2_100_000, 40_000  # pixels of a frame: a full HD window; as coarse as it gets
ENOUGH = 100_000  # Gaussians that are not halved to be faster: fewer leave holes
QUALITY = {"moving": 50, "live": 80, "still": 92}  # of JPEG


# ------------------------------------------------------------------------------------------------------------- cameras
class Eye(NamedTuple):
    """What a browser looks with: a pinhole camera, OpenCV axes."""

    wxyz: tuple[float, ...]  # unit quaternion, camera to world
    position: tuple[float, ...]
    fov: float  # vertical, radians
    width: int  # of the window, pixels
    height: int


def eye_of(camera: viser.CameraHandle) -> Eye:
    """The camera of a browser now."""
    wxyz, position = (tuple(map(float, values)) for values in (camera.wxyz, camera.position))
    return Eye(wxyz, position, float(camera.fov), int(camera.image_width), int(camera.image_height))


def cameras_of(eye: Eye, width: int, height: int) -> Cameras:
    """The same view as a picture of this size, in pixels."""
    w, x, y, z = (part / math.hypot(*eye.wxyz) for part in eye.wxyz)
    turn = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3, :3] = turn.T
    w2c[:3, 3] = -turn.T @ torch.tensor(eye.position, dtype=torch.float64)
    focal = eye.height / 2 / math.tan(eye.fov / 2)
    K = torch.tensor([[[focal, 0, eye.width / 2], [0, focal, eye.height / 2], [0, 0, 1]]])
    return Cameras(w2c[None].float(), K, eye.width, eye.height).resized(width, height)


# -------------------------------------------------------------------------------------------------------- how much work
class Speed(NamedTuple):
    """What a frame costs, from what the last ones did."""

    splat: float = 1.5e-7  # seconds for each Gaussian
    pixel: float = 4e-8  # seconds for each pixel
    byte: float = 0.1  # bytes for each pixel while moving

    def seconds(self, splats: float, pixels: float) -> float:
        """How long a frame should take."""
        return self.splat * splats + self.pixel * pixels

    def learned(self, splats: int, pixels: int, seconds: float) -> Speed:
        """Half the way to what was measured, or all of it if it is far; each price bears its part of the blame."""
        expected = self.seconds(splats, pixels)
        ratio = max(seconds, 1e-6) / expected
        part = self.splat * splats / expected
        way = 0.5 if 0.5 < ratio < 2 else 1.0
        return self._replace(splat=self.splat * ratio ** (part * way), pixel=self.pixel * ratio ** ((1 - part) * way))


class Plan(NamedTuple):
    """How a frame is to be drawn."""

    kind: str  # a key of QUALITY
    pixels: int
    splats: int  # at most so many, a sample


def plan(full: int, splats: int, speed: Speed, moving: bool, busy: bool, drawn: int) -> Plan:
    """How to draw a frame for a window of `full` pixels.

    moving: the camera moves. busy: an edit is at work. drawn: pixels of what the window shows of this very view, 0 if
    it shows another.
    """
    if moving:
        return moving_plan(full, splats, speed, MOVING / 2 if busy else MOVING)
    if busy:
        pixels = (LIVE - speed.splat * splats) / speed.pixel
        return Plan("live", round(min(max(pixels, FEWEST, drawn), full)), splats)
    pixels = (STILL - speed.splat * splats) / speed.pixel
    if max(pixels, 4 * drawn) >= full:
        return Plan("still", full, splats)
    if drawn == 0 and pixels < FEWEST:  # so many that even a coarse frame takes long: first one of fewer
        return moving_plan(full, splats, speed, STILL)
    return Plan("still", round(max(pixels, FEWEST, 4 * drawn)), splats)


def moving_plan(full: int, splats: int, speed: Speed, seconds: float) -> Plan:
    """As many pixels as fit into the time and the bytes; half, a quarter, ... of the Gaussians if they are too many."""
    while splats > ENOUGH and speed.splat * splats > 0.6 * seconds:
        splats = -(-splats // 2)
    pixels = min((seconds - speed.splat * splats) / speed.pixel, RATE * LEAST / 2 / speed.byte)
    return Plan("moving", round(min(max(pixels, FEWEST), full)), splats)


# ------------------------------------------------------------------------------------------------------------- drawing
class Scene(NamedTuple):
    """What is to be drawn; compare with `same`."""

    pictures: tuple[Gaussians, ...]  # one, or the left and the right one
    split: float  # share of the width for the left one
    background: tuple[float, float, float]


def scene_of(shown: Shown, pictures: display.Pictures) -> Scene:
    """What a stage shows."""
    looks = display.PAIRS.get(shown.look, (shown.look,))
    return Scene(tuple(pictures.of(shown, look) for look in looks), shown.split, shown.background)


def same(one: Scene | None, other: Scene) -> bool:
    """Whether both look the same."""
    if one is None or len(one.pictures) != len(other.pictures) or one.background != other.background:
        return False
    return all(map(lambda a, b: a is b, one.pictures, other.pictures)) and (
        one.split == other.split or len(one.pictures) == 1
    )


def beside(left: np.ndarray, right: np.ndarray, split: float) -> np.ndarray:
    """Two pictures (h, w, 3) as one, parted by a thin line at the share `split` of the width."""
    width = left.shape[1]
    at, half = round(split * width), max(1, round(width / 640))
    out = right.copy()
    out[:, :at] = left[:, :at]
    out[:, max(at - half, 0) : at + half] = 64
    out[:, max(at - half // 2, 0) : at + half - half // 2] = 255
    return out


def as_picture(rgb: Tensor) -> np.ndarray:
    """One picture (1, 3, h, w) as uint8 (h, w, 3), as `media.to_bytes` of finite numbers in a fifth of the time."""
    return (rgb[0].permute(1, 2, 0) * 255).add_(0.5).clamp_(0, 255).to(torch.uint8).cpu().numpy()


def jpeg(picture: np.ndarray, quality: int) -> bytes:
    """A picture (h, w, 3) uint8 as JPEG; colours are as fine as brightness from quality 80 on."""
    return display.coded(picture, "JPEG", quality=quality, subsampling=0 if quality >= 80 else 2)


class Painter:
    """Draws pictures on a device; keeps what it has prepared as long as it is asked for."""

    def __init__(self, device: str | torch.device | None = None):
        self.device = device
        self.ready: dict[tuple[int, int], tuple[Gaussians, Gaussians]] = {}  # by identity and number: picture, prepared
        self.undrawable = 0

    def warm(self) -> None:
        """Choose the device, and get the kernels ready, once."""
        if self.device is None:
            from importlib.util import find_spec

            self.device = "cuda" if torch.cuda.is_available() and find_spec("gsplat") else "cpu"
            if self.device == "cpu":
                from splatedit.render import warm

                warm(backward=False)

    def prepared(self, picture: Gaussians, splats: int) -> Gaussians:
        """At most so many Gaussians of the picture, on the device."""
        key = (id(picture), splats if splats < picture.n else picture.n)
        if key not in self.ready:
            sound, self.undrawable = drawable(picture)
            self.ready[key] = (picture, sample(sound, splats)[0].to(self.device or "cpu"))
        return self.ready[key][1]

    def forget(self, scene: Scene) -> None:
        """Drop what was prepared for other pictures."""
        kept = {id(picture) for picture in scene.pictures}
        self.ready = {key: value for key, value in self.ready.items() if key[0] in kept}

    @torch.inference_mode()
    def draw(self, scene: Scene, eye: Eye, plan: Plan) -> np.ndarray:
        """The picture (h, w, 3) uint8 that the eye sees."""
        from splatedit.render import render

        factor = math.sqrt(plan.pixels / (eye.width * eye.height))
        size = (max(1, round(eye.width * factor)), max(1, round(eye.height * factor)))
        cameras = cameras_of(eye, *size)
        drawn = []
        for picture in scene.pictures:
            gaussians = self.prepared(picture, plan.splats)
            if gaussians.n == 0:
                drawn.append(np.broadcast_to(display.plain(scene.background), (size[1], size[0], 3)))
                continue
            here = cameras._replace(w2c=cameras.w2c.to(gaussians.means), K=cameras.K.to(gaussians.means))
            drawn.append(as_picture(render(gaussians, here, scene.background).rgb))
        return drawn[0] if len(drawn) == 1 else beside(drawn[0], drawn[1], scene.split)


# ------------------------------------------------------------------------------------------------------------ browsers
class Seat:
    """One browser."""

    def __init__(self, client: Any):
        self.client, self.pace = client, Pace(RATE, LEAST)
        self.eye: Eye | None = None
        self.moved = -math.inf  # when its camera last did
        self.scene: Scene | None = None  # what its window shows; None: nothing of ours
        self.seen: Eye | None = None  # from where
        self.pixels = 0  # how finely
        self.kind = ""  # a key of QUALITY
        self.rough = False  # not as well as it can be


class FrameDisplay:
    """Keeps the pictures in all browsers as the stage and their cameras are; `serve` is called by one thread."""

    def __init__(
        self,
        server: viser.ViserServer,
        stage: Stage,
        pictures: display.Pictures,
        busy: Callable[[], bool],
        say: Callable[[display.Told], None] = lambda told: None,
        clock: Clock = CLOCK,
        painter: Painter | None = None,
    ):
        self.server, self.stage, self.pictures = server, stage, pictures
        self.busy, self.say, self.clock = busy, say, clock
        self.painter, self.speed = painter or Painter(), Speed()
        self.seats: dict[int, Seat] = {}

    def join(self, client: Any) -> None:
        """A browser has come; called from any thread, as `leave`."""
        self.seats[client.client_id] = Seat(client)

    def leave(self, client: Any) -> None:
        self.seats.pop(client.client_id, None)

    def serve(self) -> float | None:
        """Draw the one frame that is most urgent; seconds until the next one is, None: not before something changes."""
        seats, shown = list(self.seats.values()), self.stage.shown
        if display.in_use(shown, self.pictures) != "frames":
            for seat in seats:
                self.clear(seat, shown)
            return None
        if not seats:
            return None
        scene, now, busy = scene_of(shown, self.pictures), self.clock(), self.busy()
        waiting = []
        for seat in seats:
            self.look(seat, now)
            due = self.due(seat, scene, now, busy)
            if due is not None:
                waiting.append((due, -seat.moved, seat))
        if not waiting:
            return None
        due, _, seat = min(waiting, key=lambda entry: entry[:2])
        if due > now:
            return due - now
        self.paint(seat, scene, busy)
        return 0.0

    def look(self, seat: Seat, now: float) -> None:
        """See where the camera of a browser is."""
        eye = eye_of(seat.client.camera)
        if seat.eye is not None and eye != seat.eye:
            seat.moved = now
        seat.eye = eye

    def due(self, seat: Seat, scene: Scene, now: float, busy: bool) -> float | None:
        """When this browser should get its next frame; None: it has the best there is."""
        if seat.eye is None or seat.eye.width < 1 or seat.eye.height < 1:
            return None
        if seat.eye != seat.seen or not same(seat.scene, scene):
            return seat.pace.ready
        if seat.kind == "live" and busy:  # nobody tells when the edit holds
            return now + 0.5
        return max(seat.pace.ready, seat.moved + STANDS) if seat.rough else None

    def paint(self, seat: Seat, scene: Scene, busy: bool) -> None:
        """Draw and send one frame."""
        eye = seat.eye
        assert eye is not None
        self.painter.warm()
        self.painter.forget(scene)
        begun = self.clock()
        total = max(picture.n for picture in scene.pictures)
        full = min(eye.width * eye.height, LARGEST)
        moving = begun - seat.moved < STANDS
        known = seat.pixels if eye == seat.seen and same(seat.scene, scene) else 0
        how = plan(full, total * len(scene.pictures), self.speed, moving, busy, known)
        how = how._replace(splats=-(-how.splats // len(scene.pictures)))
        for picture in scene.pictures:
            self.painter.prepared(picture, how.splats)
        started = self.clock()
        picture = self.painter.draw(scene, eye, how)
        taken = self.clock() - started
        self.speed = self.speed.learned(how.splats * len(scene.pictures), how.pixels * len(scene.pictures), taken)
        if seat.client.client_id not in self.seats:
            return
        if how.kind == "still" and eye_of(seat.client.camera) != eye:  # large, and of where nobody looks any more
            return
        sent = self.send(seat, picture, how)
        if how.kind == "moving":
            self.speed = self.speed._replace(byte=(self.speed.byte + sent / how.pixels) / 2)
        now = self.clock()
        busily = busy or self.busy()
        rest = (1.0 if moving else REST) * (now - begun) if busily else 0.0
        seat.pace.spend(begun, now, sent, rest)
        seat.scene, seat.seen, seat.pixels, seat.kind = scene, eye, how.pixels, how.kind
        seat.rough = how.splats < total or how.pixels < full or how.kind != "still"
        if how.kind != "moving":
            size = (picture.shape[1], picture.shape[0])
            self.say(display.Told("frames", total, self.painter.undrawable, size=size, seconds=taken))

    def send(self, seat: Seat, picture: np.ndarray, how: Plan) -> int:
        """Put the picture behind everything in this browser; returns its bytes."""
        coded = jpeg(picture, QUALITY[how.kind])
        display.lay(seat.client.scene, "jpeg", coded)
        seat.client.flush()
        return len(coded)

    def clear(self, seat: Seat, shown: Shown) -> None:
        """Take our picture out of a browser: the splats take over."""
        if seat.scene is not None:
            seat.scene, seat.seen = None, None
            display.lay(seat.client.scene, "png", display.coded(display.plain(shown.background), "PNG"))
