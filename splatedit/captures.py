"""Where a scene was photographed from: its cameras found, brought into its world, split, and held against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from splatedit.camera_files import WORLD, CameraFile, View, beside, fit, moved, read_cameras, read_dataparser, size_of
from splatedit.cameras import Bounds, Cameras, bounds, visible
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.render import render

EVERY, MOST = 8, 48  # every 8th view is held out, as everywhere; as many views as the dome has
FEW, SOME = 0.05, 0.5  # of the scene in view: below the first it is not the scene of these cameras, below the other odd
SMALL = 0.02  # of the picture's edge that the whole scene fills: below, the scales differ
ALIKE = 0.25  # correlation of renders with photographs: below, the cameras are not those of the scene
NOT_ONE_WORLD = (
    "Scene and cameras are not of one world: give the cameras that the scene was trained with (a nerfstudio scene also "
    "needs the dataparser_transforms.json of its training run beside it; gsplat's simple_trainer keeps COLMAP's world "
    "only with --no-normalize-world-space), or --cameras dome."
)
Item = TypeVar("Item")


class Capture(NamedTuple):
    """The views of a scene, in its own world."""

    file: CameraFile
    views: tuple[View, ...]  # all, by name
    edit: tuple[View, ...]  # what an edit looks from
    report: tuple[View, ...]  # what it is judged from: held out, or where nothing is, those of the edit
    held_out: int  # how many
    seen: float  # share of the scene in the picture of at least one of `edit`, 0 to 1
    alike: float | None = None  # how much renders are like the photographs (`likeness`); None without photographs
    world: str = ""  # what was done to bring the cameras into the world of the scene; empty: nothing

    def square(self, views: Sequence[View], size: int) -> Cameras:
        """Cameras with square pictures: the middle of each view, what a prior looks at."""
        return fit(views, size, size)

    def whole(self, views: Sequence[View], size: int) -> Cameras:
        """Cameras with pictures in the shape that most views have, `size` pixels along the shorter edge."""
        width, height = size_of(self.views)
        return fit(views, *(round(size * edge / min(width, height)) for edge in (width, height)))


def find_capture(
    cameras: str, scene: str | Path, gaussians: Gaussians, every: int = EVERY, most: int = MOST
) -> tuple[Capture | None, str]:
    """The capture that a run takes, None for a rig, and a line that says so; raises InputError.

    cameras: "auto", which takes the file found beside the scene (`camera_files.beside`) if it can be read and fits, or
    the path of a file or folder, which has to.
    """
    if cameras != "auto":
        capture = load_capture(cameras, gaussians, scene, every, most)
        return capture, describe(capture)
    found = beside(scene)
    if found is None:
        return None, ""
    try:
        capture = load_capture(found, gaussians, scene, every, most)
    except InputError as error:
        return None, f"cameras: those found beside the scene are not used, but dome: {error}"
    if capture.alike is not None and capture.alike < ALIKE:
        return None, f"cameras: those found beside the scene are not used, but dome: {describe(capture)}"
    return capture, f"{describe(capture)} Found beside the scene; --cameras dome looks from all around instead."


def load_capture(
    path: str | Path, gaussians: Gaussians, scene: str | Path | None = None, every: int = EVERY, most: int = MOST
) -> Capture:
    """Read cameras for these splats; raises InputError if they see next to nothing of them.

    every: each so-manyeth view is held out, unless the file has its own split; 0: none, nor with fewer views than that.
    most: views to edit from, spread evenly over those there are.
    """
    file = read_cameras(path)
    found, failed = [], []
    for views, world in worlds(file, scene, gaussians.comments):
        training, held = split(file, views, every)
        chosen = tuple(spread(training, most))
        try:
            seen = check(file, chosen, gaussians)
        except InputError as error:
            failed.append(error)
            continue
        found.append(Capture(file, views, chosen, held or chosen, len(held), seen, likeness(gaussians, views), world))
        if found[0].alike is None or found[0].alike >= ALIKE:
            break
    if not found:
        raise failed[0]
    return max(found, key=lambda capture: capture.alike or 0.0)


def worlds(
    file: CameraFile, scene: str | Path | None, comments: Sequence[str] = ()
) -> Iterator[tuple[tuple[View, ...], str]]:
    """The views in each world that the scene may be in, the likeliest first, and what was done to them.

    With a dataparser_transforms.json, or a comment of the scene that repeats it, there is one. Else the file's own, and
    that from which nerfstudio made the file: COLMAP's, in which other trainers leave a scene.
    """
    told = next((text for text in comments if text.startswith(WORLD) and " transform " in text), None)
    trained = None if file.trained else dataparser_of(file, scene) or told
    if trained is not None:
        by = trained.name if isinstance(trained, Path) else "what the scene's header says"
        yield moved(file.views, *read_dataparser(trained, file)), f"moved into the training world by {by}"
        return
    yield file.views, ""
    if file.applied is not None:
        back = np.linalg.inv(file.applied)
        yield moved(file.views, back, 1 / file.applied_scale), "applied_transform undone, as the scene is without it"


def dataparser_of(file: CameraFile, scene: str | Path | None) -> Path | None:
    """The dataparser_transforms.json of the training run: beside the scene, a folder up, or beside the cameras."""
    folders = [file.path if file.path.is_dir() else file.path.parent]
    if scene is not None:
        folder = Path(scene).expanduser().absolute().parent
        folders = [folder, folder.parent, *folders]
    return next((f for folder in folders if (f := folder / "dataparser_transforms.json").is_file()), None)


def split(file: CameraFile, views: Sequence[View], every: int) -> tuple[tuple[View, ...], tuple[View, ...]]:
    """Views to edit from and views held out: by the file's own lists, else each `every`-th from the first, as usual."""
    if file.held_out:
        held = [view.name in file.held_out for view in views]
    else:
        held = [every > 0 and len(views) >= max(every, 2) and index % every == 0 for index in range(len(views))]
    if all(held):
        held = [False] * len(views)
    training = tuple(view for view, out in zip(views, held, strict=True) if not out)
    return training, tuple(view for view, out in zip(views, held, strict=True) if out)


def spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most `most` of the items, evenly over all of them, in order."""
    if len(items) <= most:
        return items
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]


def in_view(gaussians: Gaussians, cameras: Cameras) -> tuple[float, np.ndarray]:
    """Share of the scene in the picture of at least one camera, and of each (c,); by opacity and area, 0 to 1.

    What hides behind something else counts as in view: centres are projected, nothing is drawn.
    """
    points, mass = visible(gaussians)
    w2c, K = cameras.w2c.cpu().double().numpy(), cameras.K.cpu().double().numpy()
    anywhere, shares = np.zeros(len(points), bool), []
    for pose, k in zip(w2c, K, strict=True):
        x, y, z = (points @ pose[:3, :3].T + pose[:3, 3]).T
        z = np.where(z > 1e-6, z, np.nan)
        u, v = k[0, 0] * x / z + k[0, 2], k[1, 1] * y / z + k[1, 2]
        inside = (u >= 0) & (u < cameras.width) & (v >= 0) & (v < cameras.height)
        anywhere |= inside
        shares.append(mass[inside].sum() / mass.sum())
    return float(mass[anywhere].sum() / mass.sum()), np.array(shares)


def check(file: CameraFile, views: Sequence[View], gaussians: Gaussians) -> float:
    """The share of the scene in view; raises InputError, with numbers and what to do, for cameras of another scene."""
    cameras = fit(views, *size_of(views))
    seen, shares = in_view(gaussians, cameras)
    blind = int((shares < 1e-4).sum())
    ball = bounds(gaussians)
    size = apparent_size(ball, cameras)
    if seen >= FEW and blind <= len(views) / 2 and size >= SMALL:
        return seen
    if seen < FEW or blind > len(views) / 2:
        found = f"the {len(views)} cameras have {seen:.1%} of the scene in view, {blind} of them nothing"
    else:
        found = f"in the {len(views)} cameras the whole scene is {size:.2%} of a picture wide"
    eyes = centres(cameras)
    middle, reach = eyes.mean(0), np.linalg.norm(eyes - eyes.mean(0), axis=1).max()
    where = f"the scene is around {_point(ball.centre.tolist())}, radius {ball.radius:.3g}"
    raise InputError(
        f"{file.path}: {found}: {where}; the cameras around {_point(middle)}, up to {reach:.3g} away. {NOT_ONE_WORLD}"
    )


def apparent_size(ball: Bounds, cameras: Cameras) -> float:
    """Diameter of the scene as a share of the picture's longer edge, in the view in which it is largest; inf inside."""
    distance = np.linalg.norm(centres(cameras) - ball.centre.cpu().double().numpy(), axis=1)
    if (distance <= ball.radius).any():
        return math.inf
    focal = cameras.K[:, 0, 0].cpu().double().numpy()
    return float((2 * ball.radius * focal / distance).max() / max(cameras.width, cameras.height))


def likeness(gaussians: Gaussians, views: Sequence[View], most: int = 6, size: int = 48) -> float | None:
    """Mean correlation of small renders with the photographs of at most `most` views, -1 to 1; None without any.

    Over the pixels that the splats cover. A trained scene has 0.8 and more from its own cameras, about 0 from any
    others; photographs through strong lenses are left out.
    """
    found = []
    for view in spread([v for v in views if v.picture is not None and v.lens.kind in ("pinhole", "brown")], most):
        photo = photograph(view, size)
        drawn = render(gaussians.detach(), fit([view], size, size))
        covered = drawn.alpha[0, 0].cpu().numpy() > 0.5
        if photo is not None and covered.mean() > 0.1:
            pair = drawn.rgb[0].cpu().numpy()[:, covered].ravel(), photo[:, covered].ravel()
            if min(np.std(pair[0]), np.std(pair[1])) > 1e-3:
                found.append(np.corrcoef(*pair)[0, 1])
    return float(np.mean(found)) if found else None


def photograph(view: View, size: int) -> np.ndarray | None:
    """The middle square of a view's picture as (3, size, size) in [0, 1]; None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(view.picture) as image:  # pyright: ignore[reportArgumentType]
            image.draft("RGB", (2 * size, 2 * size))  # a large JPEG need not be decoded whole
            edge = min(image.size)
            left, top = (image.width - edge) // 2, (image.height - edge) // 2
            square = image.convert("RGB").resize(
                (size, size), Image.Resampling.BOX, (left, top, left + edge, top + edge)
            )
    except Exception:  # Pillow's readers raise whatever they like, and the cameras do without
        return None
    return np.asarray(square).transpose(2, 0, 1) / 255


def centres(cameras: Cameras) -> np.ndarray:
    """Where the cameras are, (c, 3) float64."""
    w2c = cameras.w2c.cpu().double().numpy()
    return -np.einsum("cji,cj->ci", w2c[:, :3, :3], w2c[:, :3, 3])


def describe(capture: Capture) -> str:
    """One line: how many cameras from where, how they are used, what was done to them."""
    file, count = capture.file, len(capture.views)
    width, height = size_of(capture.views)
    words = [f"cameras: {count} of {file.path} ({file.kind}, {width}x{height}): "]
    of = "" if len(capture.edit) == count - capture.held_out else f" of {count - capture.held_out}"
    words.append(f"{len(capture.edit)}{of} to edit from, ")
    words.append(f"{capture.held_out} held out for the report" if capture.held_out else "none held out")
    if any(view.lens.kind != "pinhole" for view in capture.views):
        words.append("; lens distortion undone")
    if file.missing:
        words.append(f"; {file.missing} more left out, their pictures are missing")
    if capture.world:
        words.append(f"; {capture.world}")
    words.append(f"; {capture.seen:.0%} of the scene in view")
    if capture.seen < SOME:
        words.append(" (little: what no camera sees is not edited; are these the cameras of this scene?)")
    if capture.alike is not None and capture.alike < ALIKE:
        words.append(f"; but renders of the scene are not like the photographs (correlation {capture.alike:.2f}). ")
        return "".join(words) + NOT_ONE_WORLD
    return "".join(words) + "."


def _point(numbers: Sequence[float] | np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in numbers) + ")"
