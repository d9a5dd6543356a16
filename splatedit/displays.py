"""What a notebook shows of a value: thumbnails, frusta, strips, tables, before/after sliders, films.

All of it is plain HTML with the pictures inside, or a picture: JupyterLab shows no script and no SVG of a notebook that
it does not trust, and a bundle of HTML and PNG as nothing at all, but pictures inside HTML stay.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from splatedit import slider
from splatedit.cameras import Cameras, bounds, explain_up, orbit
from splatedit.errors import InputError
from splatedit.files import atomic, load
from splatedit.formats import format_of
from splatedit.gaussians import Gaussians
from splatedit.media import draw, save_apng, save_png, sheet, to_bytes
from splatedit.page import address, facts, show, table
from splatedit.render import WHITE

if TYPE_CHECKING:
    from splatedit.editing import Step
    from splatedit.jobs import Job
    from splatedit.metrics import Report

Bundle = dict[str, Any]  # media type to content, as Jupyter takes it
THUMBNAIL = 192  # pixels a side
AZIMUTH, ELEVATION = 30.0, 15.0  # degrees, of a picture that shows a scene at a glance
MOST_DRAWN = 100_000  # Gaussians of a thumbnail; of more a sample is drawn, each the larger
MOST_BYTES = 300_000  # of a film in a notebook
CARD = "display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start"


def bundle(text: str, html: str) -> Bundle:
    """One value as plain text and as HTML."""
    return {"text/plain": text, "text/html": html}


def png(picture: np.ndarray) -> bytes:
    """A picture (h, w, 3) uint8 as the bytes of a PNG."""
    stream = io.BytesIO()
    save_png(picture, stream)
    return stream.getvalue()


def to_the_left(table: str) -> str:
    """The table with its words at the left; Jupyter puts everything at the right."""
    return table.replace("<td>", '<td style="text-align: left">')


def image(picture: np.ndarray, alt: str) -> str:
    """A picture (h, w, 3) uint8 inside HTML."""
    height, width = picture.shape[:2]
    return (
        f'<img src="{address("image/png", png(picture))}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}" style="max-width: 100%; border-radius: 4px">'
    )


def as_png(picture: np.ndarray) -> Bundle:
    """A picture (h, w, 3) uint8 as an output of its own, which is shown everywhere."""
    height, width = picture.shape[:2]
    return {"image/png": base64.b64encode(png(picture)).decode(), "text/plain": f"<picture of {width}x{height} pixels>"}


# ----------------------------------------------------------------------------------------------------------- Gaussians
def gaussians_bundle(gaussians: Gaussians) -> Bundle:
    """A thumbnail beside count, degree, bounds and up axis."""
    picture = thumbnail(gaussians)
    rows: dict[str, Any] = {"Gaussians": gaussians.n, "SH degree": gaussians.sh_degree}
    if picture is not None:
        (centre, radius), (up, why) = bounds(gaussians), explain_up(gaussians)
        rows["centre"] = ", ".join(f"{v:.4g}" for v in centre.tolist())
        rows |= {"radius": float(radius), "up": f"{up} ({why})"}
    if gaussians.extra:
        rows["extra columns"] = ", ".join(gaussians.extra)
    if gaussians.comments:
        rows["comments"] = "; ".join(gaussians.comments)
    shown = image(picture, repr(gaussians)) if picture is not None else "nothing in it can be drawn"
    words = (
        f'<div style="flex: 1; min-width: 300px">{to_the_left(facts(rows))}</div>'  # beside it, however long they are
    )
    return bundle(repr(gaussians), f'<div style="{CARD}">{shown}{words}</div>')


def thumbnail(gaussians: Gaussians, size: int = THUMBNAIL, up: str | None = None) -> np.ndarray | None:
    """The scene at a glance, (size, size, 3) uint8, quickly; None if nothing in it can be drawn."""
    drawable = gaussians.drawable()
    if not drawable.any():
        return None
    few = thinned(gaussians.select(drawable) if not drawable.all() else gaussians, MOST_DRAWN)
    return next(draw(few, orbit(few, 1, azimuth=AZIMUTH, elevation=ELEVATION, size=size, up=up)))


def thinned(gaussians: Gaussians, most: int) -> Gaussians:
    """At most so many of the Gaussians, drawn at random; each is enlarged so that they cover what all did."""
    if gaussians.n <= most:
        return gaussians
    rows = torch.randperm(gaussians.n, generator=torch.Generator().manual_seed(0))[:most]
    few = gaussians.select(rows)
    return few._replace(scales=few.scales + 0.5 * math.log(gaussians.n / most))


# ------------------------------------------------------------------------------------------------------------- cameras
def cameras_bundle(cameras: Cameras) -> Bundle:
    """The frusta in space, and what the pictures measure."""
    fov = 2 * torch.atan(cameras.width / 2 / cameras.K[:, 0, 0]).rad2deg()
    rows = {
        "cameras": cameras.n,
        "pictures": f"{cameras.width}x{cameras.height} pixels",
        "field of view": f"{fov.min():.4g}° to {fov.max():.4g}° across" if cameras.n else "–",
    }
    shown = image(frusta(cameras), repr(cameras)) if cameras.n else ""
    return bundle(repr(cameras), f'<div style="{CARD}">{shown}{to_the_left(facts(rows))}</div>')


def frusta(cameras: Cameras, size: int = 240, azimuth: float = 25.0, elevation: float = 25.0) -> np.ndarray:
    """The cameras as pyramids, first blue and last orange, seen from aside, (h, size, 3) uint8, h <= size.

    Upright is what the cameras take for it on average; the cross in the middle shows +x red, +y green, +z blue.
    """
    c2w = torch.linalg.inv(cameras.w2c.detach().cpu().double()).numpy()
    eyes, right, down, ahead = c2w[:, :3, 3], c2w[:, :3, 0], c2w[:, :3, 1], c2w[:, :3, 2]
    target = meeting_point(eyes, ahead)
    spread = float(np.linalg.norm(eyes - target, axis=1).mean())
    spread = spread if spread > 1e-9 else 1.0  # one camera alone, or all at one place
    deep = 0.22 * spread
    half = deep * np.array([cameras.width, cameras.height]) / 2 / cameras.K[:, [0, 1], [0, 1]].cpu().double().numpy()
    corners = [
        eyes + deep * ahead + x * half[:, :1] * right + y * half[:, 1:] * down
        for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]
    seen = aside(-down.mean(0), azimuth, elevation)
    flat = [(points - target) @ seen.T for points in (eyes, *corners)]
    cross = np.eye(3) * 0.25 * spread @ seen.T
    reach = max(np.abs(np.concatenate([*flat, cross])[:, :2]).max(), 1e-9)
    scale = 4 if size <= 512 else 2  # drawn larger and shrunk, for smooth lines
    page = Image.new("RGB", (size * scale, size * scale), "white")
    pen = ImageDraw.Draw(page)

    def at(point: np.ndarray) -> tuple[float, float]:
        return tuple((0.5 + 0.46 * v / reach) * size * scale for v in point[:2])  # type: ignore[return-value]

    for end, colour in zip(cross, ("#d33", "#2a2", "#36c"), strict=True):
        pen.line([at(np.zeros(3)), at(end)], fill=colour, width=2 * scale)
    for index in np.argsort(-flat[0][:, 2]):  # far ones first
        tip, *rim = (at(points[index]) for points in flat)
        share = index / max(cameras.n - 1, 1)
        tint = tuple(round(a + (b - a) * share) for a, b in zip((40, 90, 200), (230, 120, 20), strict=True))
        for corner in rim:
            pen.line([tip, corner], fill=tint, width=scale)
        pen.line([*rim, rim[0], rim[1]], fill=tint, width=scale, joint="curve")
        pen.line([rim[0], rim[1]], fill=tint, width=3 * scale)  # the upper edge
    picture = np.asarray(page.resize((size, size), Image.Resampling.LANCZOS))
    used = np.flatnonzero((picture < 255).any((1, 2)))
    return picture[max(used[0] - 4, 0) : used[-1] + 5]


def meeting_point(eyes: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """The point (3,) nearest to all lines of sight, which start at eyes (n, 3); of parallel ones the eyes' middle."""
    across = np.eye(3) - ahead[:, :, None] * ahead[:, None]
    total = across.sum(0)
    if np.linalg.cond(total) > 1e6:
        return eyes.mean(0)
    return np.linalg.solve(total, (across @ eyes[:, :, None]).sum(0)[:, 0])


def aside(up: np.ndarray, azimuth: float, elevation: float) -> np.ndarray:
    """Rows right, down, forward (3, 3) of a view in which `up` (3,) points upwards; angles in degrees."""
    size = float(np.linalg.norm(up))
    up = up / size if size > 1e-6 else np.array([0.0, -1.0, 0.0])
    first = np.cross(np.eye(3)[np.abs(up).argmin()], up)
    first /= np.linalg.norm(first)
    a, e = math.radians(azimuth), math.radians(elevation)
    level = math.cos(a) * first + math.sin(a) * np.cross(up, first)
    forward = math.cos(e) * level - math.sin(e) * up
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward])


# ------------------------------------------------------------------------------------------------------ steps, reports
def step_bundle(step: Step) -> Bundle:
    """The pictures that the step saw, above its numbers."""
    line = f"{escape(repr(step)[5:-1])}, {sum(step.seconds.values()):.2f} s"
    strip = sheet(to_bytes(step.image), len(step.image))
    return bundle(repr(step), f'<div>{image(strip, repr(step))}<div style="margin-top: 4px">{line}</div></div>')


def job_bundle(job: Job) -> Bundle:
    """How far an edit is, with a picture of it."""
    from splatedit.notebook import complaint

    share = job.done / max(job.steps, 1)
    bar = (
        '<div style="width: 220px; height: 10px; background: #8884; border-radius: 5px">'
        f'<div style="width: {share:.1%}; height: 10px; background: #2a6fc9; border-radius: 5px"></div></div>'
    )
    said = [f"<b>{job.state}</b>", bar, escape(job_numbers(job))]
    if job.error is not None:
        said.append(f'<span style="color: #b3261e">{escape(complaint(job.error))}</span>')
    picture = thumbnail(job.snapshot(), up=job.config.up if job.config else None) if job.source is not None else None
    shown = image(picture, repr(job)) if picture is not None else ""
    lines = "".join(f'<div style="margin: 4px 0">{line}</div>' for line in said)
    return bundle(repr(job), f'<div style="{CARD}">{shown}<div>{lines}</div></div>')


def job_numbers(job: Job) -> str:
    """Where an edit is, in a line: steps, loss, distance to the source, drift, pace and what is left."""
    said = [f"{job.done} of {job.steps} steps"]
    if (last := job.last) is not None:
        said += [f"loss {last.loss:.4g}", f"{last.psnr_to_source:.1f} dB to the source"]
        said += [f"drift {last.residuals[-1]:.3g}"] if last.residuals else []
    if job.pace is not None:
        said.append(f"{job.pace:.2f} s a step")
    if not job.ended and job.seconds_left is not None:
        left = job.seconds_left
        said.append(f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left")
    return ", ".join(said)


def report_bundle(report: Report) -> Bundle:
    """The verdict, what to try, and the numbers."""
    from splatedit.report import CHANGE, VERDICTS, show_psnr

    numbers = report.as_dict()
    rows = [[label, show_psnr(key, numbers[key]), says] for key, (label, says) in CHANGE.items()]
    advice = "".join(f"<li>{escape(hint)}</li>" for hint in report.advice)
    html = f"<b>{escape(VERDICTS[report.verdict])}</b>{f'<ul>{advice}</ul>' if advice else ''}"
    said = table(["", "value", "what it says"], rows)
    text = [VERDICTS[report.verdict], *report.advice, *(f"{label}: {show(value)}" for label, value, _ in rows)]
    return bundle("\n".join(text), f"<div>{html}{to_the_left(said)}</div>")


# ------------------------------------------------------------------------------------------------------- before, after
class Comparison(NamedTuple):
    """Pairs of pictures; in a notebook a picture of all pairs, then the same with a handle to drag."""

    before: list[np.ndarray]  # (h, w, 3) uint8 each
    after: list[np.ndarray]
    words: tuple[str, str] = ("before", "after")

    @property
    def picture(self) -> np.ndarray:
        """The pairs one above the other, (h, w, 3) uint8, named above, each picture at most 256 pixels a side."""
        return sheet([t for pair in zip(*self[:2], strict=True) for t in map(titled, pair, self.words)], 2)

    def __repr__(self) -> str:
        return f"<{self.words[0]} and {self.words[1]}, pictures: {len(self.before)}>"

    def save(self, path: str | Path) -> None:
        """Write `picture` as a PNG; `before` and `after` hold the pictures in their own size."""
        save_png(self.picture, path)

    def _repr_mimebundle_(self, include=None, exclude=None) -> Bundle:
        return bundle(repr(self), self.html())

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(as_png(self.picture), raw=True)  # what survives where no script runs
        display(self._repr_mimebundle_(), raw=True)

    def html(self) -> str:
        """The pairs with their handles; nothing where no script runs."""
        from splatedit.page import picture

        pairs = []
        for number, images in enumerate(zip(self.before, self.after, strict=True), 1):
            height, width = images[0].shape[:2]
            alt = [f"view {number}, {word}" for word in self.words]
            label = f"view {number}: how much of it is {self.words[0]}, in percent"
            pair = slider.pair(list(map(picture, images)), (width, height), alt=alt, label=label, words=self.words)
            pairs.append(f'<div style="width: {width}px; max-width: 100%">{pair}</div>')
        body = f'<style>{slider.STYLE}</style><div style="{CARD}">{"".join(pairs)}</div>'
        return built_by_script(body, slider.SCRIPT)


def built_by_script(body: str, script: str) -> str:
    """HTML that stays empty where no script runs: the pictures would else lie about beside a dead handle."""
    name = hashlib.sha256(body.encode()).hexdigest()[:12]
    content = json.dumps(body).replace("</", "<\\/")
    fill = f"for (const place of document.querySelectorAll(\"[data-splatedit='{name}']\")) place.innerHTML = {content};"
    return f'<div data-splatedit="{name}"></div><script>{fill}{script}</script>'


def compare(
    before: Any,
    after: Any,
    *,
    views: int = 1,
    cameras: Cameras | None = None,
    size: int = 320,
    up: str | None = None,
    background: tuple[float, float, float] = WHITE,
    words: tuple[str, str] = ("before", "after"),
) -> Comparison:
    """Two things over one another with a handle to drag: Gaussians, or pictures.

    A picture is a tensor (3, h, w) or (b, 3, h, w) in [0, 1], an array (h, w, 3) or (b, h, w, 3) of uint8 or in [0, 1],
    a PIL image, or the path of a picture; a path of a splat file is loaded. Gaussians are drawn from `views` places
    around the first of the two, `size` pixels a side, or from `cameras`. Raises InputError if the two cannot be laid
    over one another.
    """
    sides = [scene_or_pictures(before), scene_or_pictures(after)]
    scenes = [side for side in sides if isinstance(side, Gaussians)]
    if scenes and cameras is None:
        cameras = orbit(scenes[0], views, azimuth=AZIMUTH, elevation=ELEVATION, size=size, up=up)
    drawn = [list(draw(s, cameras, background)) if isinstance(s, Gaussians) and cameras else s for s in sides]
    left, right = ([np.asarray(tile) for tile in side] for side in drawn)
    if len(left) != len(right) or any(a.shape != b.shape for a, b in zip(left, right, strict=True)):
        found = " and ".join(f"{len(s)} of {s[0].shape[1]}x{s[0].shape[0]}" if s else "none" for s in (left, right))
        raise InputError(f"compare: found pictures of two kinds, {found} pixels; expected as many of the same size.")
    return Comparison(left, right, words)


def scene_or_pictures(thing: Any) -> Gaussians | list[np.ndarray]:
    """The Gaussians, or the pictures (h, w, 3) uint8, that `compare` and `animate` take; raises InputError."""
    if isinstance(thing, Gaussians):
        return thing
    if isinstance(thing, (str, Path)):
        if format_of(thing):
            return load(thing)
        try:
            thing = Image.open(Path(thing).expanduser())
        except OSError as error:
            raise InputError(f"{thing}: cannot be read as a picture or a splat file ({error}).") from None
    if isinstance(thing, Image.Image):
        return [np.asarray(thing.convert("RGB"))]
    if isinstance(thing, Tensor) and thing.ndim in (3, 4) and thing.shape[-3] == 3:
        return list(to_bytes(thing.float() if thing.ndim == 4 else thing[None].float()))
    if isinstance(thing, np.ndarray) and thing.ndim in (3, 4) and thing.shape[-1] == 3:
        if thing.dtype != np.uint8:
            thing = (np.nan_to_num(thing).clip(0, 1) * 255).round().astype(np.uint8)
        return list(thing if thing.ndim == 4 else thing[None])
    shape = f" of shape {tuple(thing.shape)}" if hasattr(thing, "shape") else ""
    expected = "Gaussians, a tensor (3, h, w), an array (h, w, 3), a PIL image or a path"
    raise InputError(f"picture: found {type(thing).__name__}{shape}, expected {expected}.")


def titled(picture: np.ndarray, line: str) -> np.ndarray:
    """The picture (h, w, 3) uint8 below a line of text."""
    from splatedit.image_run import labelled

    return labelled(picture, [line])


# --------------------------------------------------------------------------------------------------------------- films
class Animation(NamedTuple):
    """A film that repeats, as an animated PNG: it plays in notebooks, trusted or not, and in pages made of them."""

    apng: bytes
    frames: int
    fps: float
    size: tuple[int, int]  # width, height in pixels

    def __repr__(self) -> str:
        width, height = self.size
        return f"Animation({self.frames} frames of {width}x{height}, {self.fps:g} a second, {len(self.apng):,} bytes)"

    def save(self, path: str | Path) -> None:
        """Write the animated PNG."""
        with atomic(path) as stream:
            stream.write(self.apng)

    def _repr_mimebundle_(self, include=None, exclude=None) -> Bundle:
        return {"text/plain": repr(self), "image/png": base64.b64encode(self.apng).decode()}


def animate(
    what: Any,
    cameras: Cameras | None = None,
    *,
    frames: int = 24,
    size: int = 192,
    fps: float = 12.0,
    up: str | None = None,
    background: tuple[float, float, float] = WHITE,
    most: int = MOST_BYTES,
) -> Animation:
    """A film: of Gaussians a turntable; of Steps, or of several Gaussians, how they change; of pictures, these.

    A path stands for what is in the file, a single Step for its splats. Gaussians are drawn `size` pixels a side from
    `frames` places around them, or from `cameras`, one a frame; several ones all from one place, or each from its own
    camera if there are as many. Pictures: see `compare`. most: bytes; a film that needs more is given fewer colours,
    then fewer pixels. Raises InputError for what is none of this.
    """
    what = getattr(what, "gaussians", what)
    if isinstance(what, (str, Path)) or not isinstance(what, Iterable):
        what = scene_or_pictures(what)
    if isinstance(what, Gaussians):
        if cameras is None:
            cameras = orbit(what, frames, azimuth=AZIMUTH, elevation=ELEVATION, size=size, up=up)
        return film(list(draw(what, cameras, background)), fps, most)
    scenes = [getattr(thing, "gaussians", thing) for thing in what]
    if not scenes:
        raise InputError("animate: found nothing, expected at least one frame.")
    if not isinstance(scenes[0], Gaussians):
        return film([frame for thing in scenes for frame in pictures_alone(thing)], fps, most)
    if cameras is None:
        cameras = orbit(scenes[0], 1, azimuth=AZIMUTH, elevation=ELEVATION, size=size, up=up)
    if cameras.n not in (1, len(scenes)):
        raise InputError(f"cameras: found {cameras.n} for {len(scenes)} frames, expected one, or one for each.")
    views = [cameras.pick(index % cameras.n) for index in range(len(scenes))]
    return film([next(draw(g, view, background)) for g, view in zip(scenes, views, strict=True)], fps, most)


def pictures_alone(thing: Any) -> list[np.ndarray]:
    """Pictures (h, w, 3) uint8; raises InputError for a scene."""
    found = scene_or_pictures(thing)
    if isinstance(found, Gaussians):
        raise InputError("animate: found pictures and Gaussians together, expected one kind.")
    return found


def film(frames: Sequence[np.ndarray], fps: float, most: int = MOST_BYTES) -> Animation:
    """Frames (h, w, 3) uint8 of one size as an Animation of at most so many bytes, if it can be with 32 pixels a side.

    Raises InputError if the frames differ in size, or if `fps` is not above 0.
    """
    if not 0 < fps < math.inf:
        raise InputError(f"fps: found {fps}, expected a number of frames a second above 0.")
    if len({frame.shape for frame in frames}) != 1:
        raise InputError("animate: the frames differ in size, or there are none.")
    content, tiles = coded(frames, fps), list(frames)
    if len(content) > most:
        content = coded(few_colours(tiles), fps)
    width, height = frames[0].shape[1], frames[0].shape[0]
    while len(content) > most and min(width, height) > 32:
        shrink = max(math.sqrt(most / len(content)) * 0.97, 32 / min(width, height))
        width, height = round(width * shrink), round(height * shrink)
        tiles = [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS)) for f in frames]
        content = coded(few_colours(tiles), fps)
    return Animation(content, len(frames), fps, (width, height))


def coded(frames: Iterable[np.ndarray | Image.Image], fps: float) -> bytes:
    """An animated PNG."""
    stream = io.BytesIO()
    save_apng(frames, stream, fps)
    return stream.getvalue()


def few_colours(frames: Sequence[np.ndarray]) -> list[Image.Image]:
    """The frames with 256 colours, the same for all."""
    palette = Image.fromarray(sheet(frames, max(round(math.sqrt(len(frames))), 1), 0)).quantize(256)
    colours = np.reshape(palette.getpalette() or [0, 0, 0], (-1, 3))
    corner = frames[0][0, 0]
    index = int(np.abs(colours - corner).sum(1).argmin())
    colours[index] = corner
    tiles = []
    for frame in frames:  # Pillow takes a colour that is near; of the background it shall be that very one
        nearest = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
        nearest[(frame == corner).all(2)] = index
        tiles.append(Image.fromarray(nearest))
        tiles[-1].putpalette(colours.astype(np.uint8).tobytes())
    return tiles
