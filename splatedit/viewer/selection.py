"""What is selected: rows of the source, how they combine, and the mask of the next edit that they become."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splatedit.config import Config
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.masks import Box, Indices, Mask, Relevance, Sphere
from splatedit.viewer import looks
from splatedit.viewer.stage import Shown

COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "replace": lambda old, new: new,
    "add": lambda old, new: old | new,
    "subtract": lambda old, new: old & ~new,
    "intersect": lambda old, new: old & new,
}
# The settings of a mask; what is not named here (mask_text_by, mask_threshold) is not of one without mask_text.
NO_MASK: dict[str, Any] = {
    "mask": None,
    "mask_box": None,
    "mask_sphere": None,
    "mask_rule": None,
    "mask_text": None,
    "mask_grow": 0.0,
    "mask_invert": False,
}


class Selected(NamedTuple):
    """A selection, and the one mask that it is, if it is of a single one."""

    chosen: Tensor  # (n,) bool, rows of the source
    alone: Mask | None = None


# ------------------------------------------------------------------------------------------------------------- of rows
def drawn(shown: Shown) -> Gaussians:
    """The splats that are pointed at: those on the screen."""
    return shown.source if shown.look == "before" else shown.current


def of_source(shown: Shown, chosen: Tensor) -> Tensor:
    """Rows of the source (n,) bool that the chosen ones of `drawn` continue; raises InputError if nobody knows."""
    if shown.look == "before" or (shown.rows is None and shown.current.n == shown.source.n):
        return chosen
    if looks.incomparable(shown):
        raise InputError(f"select: {looks.incomparable(shown)}; select in the look 'before', or open one file alone.")
    assert shown.rows is not None
    rows = shown.rows[chosen & (shown.rows >= 0)]
    return torch.zeros(shown.source.n, dtype=torch.bool).index_fill_(0, rows, True)


def masked(shown: Shown, mask: Mask) -> Tensor:
    """Rows of the source (n,) bool that a mask of what is on the screen selects."""
    return of_source(shown, mask(drawn(shown)))


def combined(shown: Shown, new: Tensor, how: str) -> Tensor:
    """What is selected, and rows of the source `new` (n,) bool, by a key of COMBINE."""
    old = shown.selection
    if old is None or len(old) != len(new):
        old = torch.zeros_like(new)
    return COMBINE[how](old, new)


def grown(shown: Shown, radius: float) -> Tensor:
    """What is selected and what lies within `radius` of it in the source, world units; less than 0: it shrinks."""
    chosen = current_selection(shown)
    rows = Indices(chosen.nonzero()[:, 0].numpy(), len(chosen))
    return (rows.grow(radius) if radius >= 0 else rows.shrink(-radius))(shown.source)


def current_selection(shown: Shown) -> Tensor:
    """The selection; raises InputError if nothing is selected."""
    if shown.selection is None or not shown.selection.any():
        raise InputError("nothing is selected; drag a rectangle with shift held, or choose another tool.")
    return shown.selection


def carried(past: Shown, now: Shown) -> Tensor | None:
    """The selection of `past` once its newest state has become the source: as rows of that; else that of `now`."""
    became = past.current
    if past.selection is None or now.source.n != became.n or not torch.equal(now.source.means, became.means):
        return now.selection
    return looks.selected(past, became.n, past.rows)


def counted(shown: Shown) -> str:
    """How many are selected, as markdown."""
    n, chosen = shown.source.n, shown.selection
    return f"**{0 if chosen is None else int(chosen.sum()):,}** of {n:,} splats selected"


# ------------------------------------------------------------------------------------------------------------- a mask
def written(values: Iterable[float]) -> str:
    """Numbers as the settings have them, to the last bit."""
    return ",".join(repr(float(value)).removesuffix(".0") for value in values)


def box_text(box: Box) -> str:
    """As --mask-box takes it."""
    turned = () if tuple(box.rotation[1:]) == (0, 0, 0) else box.rotation
    return written((*box.centre, *box.size, *turned))


def sphere_text(sphere: Sphere) -> str:
    """As --mask-sphere takes it."""
    return written((*sphere.centre, sphere.radius))


def as_settings(shown: Shown, alone: Mask | None, folder: Path) -> dict[str, Any]:
    """The settings by which an edit of the newest state changes what is selected, and no more.

    A box or a sphere stands in the settings itself; anything else is written into `folder`, by the rows of the newest
    state, under a name of its own. Splats that were added since the source are inside a box or a sphere that holds them
    and else outside. Raises InputError if nothing is selected, or nothing of it is left.
    """
    current_selection(shown)
    chosen = looks.selected(shown, shown.current.n, shown.rows)
    if chosen is None:
        raise InputError(f"mask: {looks.incomparable(shown)}; open one file alone.")
    if not chosen.any():
        raise InputError("mask: nothing of what is selected is left in the newest state.")
    if isinstance(alone, Box | Sphere):
        known = torch.ones_like(chosen) if shown.rows is None else shown.rows >= 0
        if torch.equal(alone(shown.current) & known, chosen):
            name, text = (
                ("mask_box", box_text(alone)) if isinstance(alone, Box) else ("mask_sphere", sphere_text(alone))
            )
            return {**NO_MASK, name: text}
    return {**NO_MASK, "mask": str(save(chosen, folder))}


def save(chosen: Tensor, folder: Path) -> Path:
    """Write a mask (m,) bool into a folder, made if need be; the same rows have the same name, others another."""
    from splatedit import mask_files
    from splatedit.files import made

    digest = hashlib.sha256(len(chosen).to_bytes(8, "little") + chosen.numpy().tobytes()).hexdigest()
    path = made(folder) / f"mask-{digest[:10]}.json"
    try:
        mask_files.save(Indices(chosen.nonzero()[:, 0].numpy(), len(chosen)), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from None
    return path


def relevant(shown: Shown, config: Config, words: str, threshold: float | None) -> Relevance:
    """Which splats of the newest state the words, or "auto" the edit of `config`, are about; asks the model, slowly.

    threshold: relevance, 1 is the 95th percentile; None: found. Raises InputError if the model cannot tell.
    """
    from rich.console import Console

    from splatedit import files
    from splatedit.priors import borrowed, check_prior
    from splatedit.relevance import ask
    from splatedit.work import prepare

    if not words.strip():
        raise InputError("mask_text: it is empty; say auto, or words of the source prompt.")
    if words.strip() == "auto" and not config.prompt.strip():
        raise InputError("mask_text: auto compares two prompts; say in the Edit tab what the scene shall show.")
    check_prior(config.model, config.offline)
    with ExitStack() as held:
        path = shown.path
        if path is None or not path.is_file():
            path = Path(held.enter_context(TemporaryDirectory())) / "scene.ply"
            files.save(shown.current, path)
        settings = {**NO_MASK, "scene": str(path), "mask_text": words, "mask_threshold": threshold}
        settings |= {"viewer": False, "up": config.up or shown.up}
        quiet = Console(file=io.StringIO(), quiet=True)
        work = prepare(
            replace(config, **settings), quiet, load_model=lambda *a, **k: held.enter_context(borrowed(*a, **k))
        )
        if work.gaussians.n != shown.current.n:
            raise InputError(
                f"{path}: has {work.gaussians.n:,} splats, the screen shows {shown.current.n:,}; read it again."
            )
        return ask(work, quiet)
