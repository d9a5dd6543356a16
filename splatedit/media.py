"""Pictures and films on disk: PNG, animated PNG, GIF, mp4, a folder of frames; and the turntables that fill them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.rendering import WHITE, render


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


def save_png(image: np.ndarray, path: str | Path) -> None:
    """Write one picture (h, w, 3) uint8."""
    Image.fromarray(image).save(path, format="PNG")


def save_folder(frames: Iterable[np.ndarray], path: str | Path, fps: float = 24) -> None:
    """Write frames as 000.png, 001.png, ...; raises InputError if the folder holds pictures already."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.png")):  # a shorter film would leave the tail of a longer one behind
        raise InputError(f"{path}: the folder holds .png files already; name a new one.")
    for index, frame in enumerate(frames):
        save_png(frame, folder / f"{index:03d}.png")


def save_first(frames: Iterable[np.ndarray], path: str | Path, fps: float = 24) -> None:
    """Write the first frame as a PNG."""
    save_png(next(iter(frames)), path)


def save_animation(frames: Iterable[np.ndarray], path: str | Path, fps: float = 24) -> None:
    """Write an endlessly repeating GIF or animated PNG, by the ending of `path`."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    kind = "GIF" if Path(path).suffix.lower() == ".gif" else "PNG"
    first.save(path, format=kind, save_all=True, append_images=rest, duration=1000 / fps, loop=0)


def save_mp4(frames: Iterable[np.ndarray], path: str | Path, fps: float = 24) -> None:
    """Write an H.264 film that browsers play; an odd edge is padded by one pixel, as the format wants even sizes."""
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = None
        for frame in frames:
            frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            if stream is None:
                stream = container.add_stream("libx264", rate=round(fps), options={"crf": "18", "preset": "medium"})
                stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], "yuv420p"
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        if stream is not None:
            for packet in stream.encode():
                container.mux(packet)


WRITERS: dict[str, Callable[..., None]] = {
    ".mp4": save_mp4,
    ".png": save_first,
    ".apng": save_animation,
    ".gif": save_animation,
    "": save_folder,
}


def writer(path: str | Path) -> Callable[..., None]:
    """The function that writes frames to `path`, by its ending; raises InputError for an ending it does not know."""
    suffix = "" if Path(path).is_dir() else Path(path).suffix.lower()
    if suffix not in WRITERS:
        endings = ", ".join(s for s in WRITERS if s)
        raise InputError(f"{path}: cannot write {suffix!r}; choose an ending of {endings}, or a folder (no ending).")
    return WRITERS[suffix]


def save_frames(frames: Iterable[np.ndarray], path: str | Path, fps: float = 24) -> None:
    """Write frames (h, w, 3) uint8 to `path` by its ending: a film, one picture, or a folder of pictures.

    A file appears whole or not at all. Raises InputError for an unknown ending or a place that cannot be written.
    """
    path, save = Path(path), writer(path)
    partial = path if save is save_folder else path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(frames, partial, fps)
        if partial != path:
            os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from None
    finally:
        if partial != path:
            partial.unlink(missing_ok=True)
