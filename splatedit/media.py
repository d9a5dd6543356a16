"""Pictures and films on disk: PNG, animated PNG, GIF, mp4, a folder of frames; and the turntables that fill them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.files import atomic
from splatedit.gaussians import Gaussians
from splatedit.render import WHITE, render


def to_bytes(images: Tensor) -> np.ndarray:
    """Pictures (b, 3, h, w) in [0, 1] as uint8 (b, h, w, 3); values outside are clipped, NaN becomes 0."""
    return (images.detach().nan_to_num().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def draw(gaussians: Gaussians, cameras: Cameras, background=WHITE, chunk: int = 4) -> Iterator[np.ndarray]:
    """Frames (h, w, 3) uint8 from each camera in turn, a few at a time to keep memory small."""
    for start in range(0, cameras.n, chunk):
        views = cameras.pick(list(range(start, min(start + chunk, cameras.n))))
        yield from to_bytes(render(gaussians, views, background).rgb)


def beside(left: Iterable[np.ndarray], right: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames of two films side by side."""
    for a, b in zip(left, right, strict=True):
        yield np.concatenate([a, b], axis=1)


def sheet(images: Iterable[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Pictures (h, w, 3) of one size on a white grid with `gap` pixels between them."""
    tiles = list(images)
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        y, x = index // columns * (height + gap), index % columns * (width + gap)
        page[y : y + height, x : x + width] = tile
    return page


def save_png(image: np.ndarray, path: str | Path | IO[bytes]) -> None:
    """Write one picture (h, w, 3) uint8, to a stream, or as a file that appears whole or not at all."""
    if isinstance(path, (str, Path)):
        with atomic(path) as stream:
            save_png(image, stream)
    else:
        Image.fromarray(image).save(path, format="PNG")


def save_first(frames: Iterable[np.ndarray], stream: IO[bytes], fps: float) -> None:
    """Write the first frame as a PNG."""
    save_png(next(iter(frames)), stream)


def save_gif(frames: Iterable[np.ndarray | Image.Image], stream: IO[bytes], fps: float, format: str = "GIF") -> None:
    """Write an endlessly repeating GIF; frames that are PIL images keep their mode, such as a palette."""
    first, *rest = (frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in frames)
    first.save(stream, format=format, save_all=True, append_images=rest, duration=1000 / fps, loop=0)


def save_apng(frames: Iterable[np.ndarray | Image.Image], stream: IO[bytes], fps: float) -> None:
    """Write an endlessly repeating animated PNG: larger than GIF, all colours."""
    save_gif(frames, stream, fps, format="PNG")


def save_mp4(frames: Iterable[np.ndarray], stream: IO[bytes], fps: float, crf: int = 18) -> None:
    """Write an H.264 film that browsers play; an odd edge is padded by one pixel, as the format wants even sizes.

    crf: how coarse, 0 (nothing lost) to 51; 18 looks like the pictures.
    """
    import av

    with av.open(stream, "w", format="mp4") as container:
        film = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": str(crf)})
        film.pix_fmt = "yuv420p"
        for index, frame in enumerate(frames):
            frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            if index == 0:
                film.height, film.width = frame.shape[:2]
            container.mux(film.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(film.encode())


def first_frame(path: str | Path) -> np.ndarray:
    """The first frame (h, w, 3) uint8 of a film."""
    import av

    with av.open(str(path)) as film:
        return next(film.decode(video=0)).to_ndarray(format="rgb24")


def smaller_mp4(path: str | Path, most: int) -> bytes | None:
    """A film's bytes if there are at most so many, else those of a coarser copy of it; None if that is not enough."""
    import av

    if Path(path).stat().st_size <= most:
        return Path(path).read_bytes()
    for crf in (26, 34):
        copy = io.BytesIO()
        with av.open(str(path)) as film:
            rate = float(film.streams.video[0].average_rate or 24)
            frames = (frame.to_ndarray(format="rgb24") for frame in film.decode(video=0))
            save_mp4(frames, copy, rate, crf)
        if copy.tell() <= most:
            return copy.getvalue()
    return None


WRITERS: dict[str, Callable[[Iterable[np.ndarray], IO[bytes], float], None]] = {
    ".mp4": save_mp4,
    ".gif": save_gif,
    ".apng": save_apng,
    ".png": save_first,
}


def check_target(path: str | Path) -> None:
    """Raise InputError unless `path` is a folder, a name without ending, or ends in a key of WRITERS."""
    path = Path(path)
    if path.suffix.lower() not in WRITERS and path.suffix and not path.is_dir():
        raise InputError(f"{path}: cannot write {path.suffix!r}; end it in {', '.join(WRITERS)}, or name a folder.")
    if not path.suffix and path.is_file():
        raise InputError(f"{path}: is a file; end the name in {', '.join(WRITERS)}, or name a folder.")


def save_frames(frames: Iterable[np.ndarray], path: str | Path, fps: float = 24) -> None:
    """Write frames (h, w, 3) uint8 by the ending of `path`: a film, the first picture, or a folder of all pictures.

    A file appears whole or not at all. Raises InputError for an unknown ending or a place that cannot be written, and
    for a folder that holds pictures already: a shorter film would leave the tail of a longer one behind.
    """
    path = Path(path)
    check_target(path)
    if path.suffix.lower() in WRITERS and not path.is_dir():
        with atomic(path) as stream:
            WRITERS[path.suffix.lower()](frames, stream, fps)
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.glob("*.png")):
            raise InputError(f"{path}: the folder holds .png files already; name a new one.")
        for index, frame in enumerate(frames):
            save_png(frame, path / f"{index:03d}.png")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from None
