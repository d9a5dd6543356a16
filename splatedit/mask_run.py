"""What `splatedit mask` does: settings and a scene in; counts, mask files, pictures and selections out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from splatedit import mask_files, media
from splatedit.cameras import orbit
from splatedit.config import Config, check, colour
from splatedit.errors import InputError
from splatedit.files import atomic, load, save, sidecar
from splatedit.formats import endings
from splatedit.gaussians import SH_C0, Gaussians
from splatedit.mask_settings import build, tell, without_text
from splatedit.masks import Mask
from splatedit.work import Work, prepare

HIGHLIGHT = (0.93, 0.0, 0.55)  # of the splats inside
VIEWS, FRAMES, FPS, ELEVATION, SIZE = 8, 72, 24, 15.0, 320


class Made(NamedTuple):
    """A mask, and the Gaussians it was made for."""

    mask: Mask
    chosen: Tensor  # (n,) bool
    work: Work


def highlight(gaussians: Gaussians, chosen: Tensor) -> Gaussians:
    """The scene in light grey with the chosen ones (n,) bool in a signal colour, shading kept."""
    colors = (0.5 + SH_C0 * gaussians.sh0[:, 0]).clamp(0, 1)
    grey = (colors @ colors.new_tensor([0.299, 0.587, 0.114]))[:, None]
    signal = colors.new_tensor(HIGHLIGHT) * (0.5 + 0.5 * grey)
    shown = torch.where(chosen.to(colors.device)[:, None], signal, 0.55 + 0.4 * grey)
    return gaussians._replace(sh0=((shown - 0.5) / SH_C0)[:, None], shN=gaussians.shN[:, :0])


# ----------------------------------------------------------------------------------------------------------- outputs
def save_json(made: Made, path: Path) -> None:
    mask_files.save(made.mask, path)


def save_npy(made: Made, path: Path) -> None:
    """One truth value for each splat."""
    with atomic(path) as stream:
        np.save(stream, made.chosen.cpu().numpy())


def save_selection(made: Made, path: Path) -> None:
    """The splats inside, a file of their own."""
    save(made.work.gaussians.select(made.chosen.cpu()), path)


def save_sheet(made: Made, path: Path) -> None:
    """Views all around, the mask in colour."""
    with atomic(path) as stream:
        media.save_png(media.sheet(pictures(made, VIEWS), VIEWS // 2), stream)


def save_film(made: Made, path: Path) -> None:
    """A turntable, the mask in colour."""
    media.save_frames(pictures(made, FRAMES), path, FPS)


def pictures(made: Made, count: int):
    """Frames (h, w, 3) uint8 of the highlighted scene."""
    from splatedit.editing import resolve_device

    work = made.work
    cameras = orbit(work.gaussians, count, elevation=ELEVATION, size=SIZE, up=work.up)
    shown = highlight(work.gaussians, made.chosen.to(work.gaussians.means.device))
    return media.draw(shown.to(resolve_device(work.config.device)), cameras, work.background)


WRITERS: dict[str, Callable[[Made, Path], None]] = {
    ".json": save_json,
    ".npy": save_npy,
    ".png": save_sheet,
    ".mp4": save_film,
    ".gif": save_film,
    ".apng": save_film,
}


def writer(path: Path) -> Callable[[Made, Path], None]:
    """What writes this kind of output; raises InputError for another kind, or a place that cannot be written."""
    known = (*WRITERS, *endings(write=True))
    name = path.name.lower()
    ending = max((end for end in known if name.endswith(end)), key=len, default=None)
    if ending is None:
        raise InputError(f"{path}: cannot write {path.suffix or 'this'!r}; expected one of {', '.join(known)}.")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; make it first.")
    return WRITERS.get(ending, save_selection)


def make(config: Config, outputs: Sequence[str], console: Console) -> list[Path]:
    """Build the mask of `config` for its scene, say what it holds, and write the outputs; raises InputError."""
    check(config)
    paths = [Path(name).expanduser() for name in outputs]
    writers = [writer(path) for path in paths]
    if not without_text(config) and config.mask_text is None:
        raise InputError("mask: none is given; give --mask, --mask-box, --mask-sphere, --mask-rule or --mask-text.")
    made = masked(config, console)
    for path, write in zip(paths, writers, strict=True):
        if path.resolve() == Path(config.scene).resolve():
            raise InputError(f"{path}: is the scene itself; give the selection another name.")
        write(made, path)
    return paths


def masked(config: Config, console: Console) -> Made:
    """The mask of `config` for its scene; only one that is asked of the model loads one."""
    colour(config.background, "background")
    if config.mask_text is not None:
        from splatedit.priors import check_prior

        check_prior(config.model, config.offline)
        work = prepare(config, console)
    else:
        beside = sidecar(config.scene)
        work = Work(config, load(config.scene), None, "", "none", config.up or beside.up)  # type: ignore[arg-type]
    mask = build(work, console)
    assert mask is not None
    chosen = mask(work.gaussians)
    tell(mask, chosen, work, console)
    return Made(mask, chosen, work)
