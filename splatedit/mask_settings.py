"""From the settings mask_* to a mask, for `splatedit run` and `splatedit mask`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from splatedit.config import Config
from splatedit.errors import InputError
from splatedit.mask_files import load, save
from splatedit.masks import All, Mask, Not, box, describe, rule, sphere

if TYPE_CHECKING:
    from torch import Tensor

    from splatedit.work import Work


def without_text(config: Config) -> list[Mask]:
    """The masks that need no model; raises InputError for one that cannot be read."""
    given = ((load, config.mask), (box, config.mask_box), (sphere, config.mask_sphere), (rule, config.mask_rule))
    masks = [read(text) for read, text in given if text is not None]
    changed = {"mask_grow": config.mask_grow != 0, "mask_invert": config.mask_invert}
    lonely = [name for name, set_ in changed.items() if set_]
    if lonely and not masks and config.mask_text is None:
        raise InputError(f"{lonely[0]}: there is no mask to change; give one, such as --mask-box or --mask-text auto.")
    return masks


def build(work: Work, console: Console) -> Mask | None:
    """What all of the settings together ask for: all masks at once, then grown or shrunk, then inverted; None: nothing.

    Raises InputError for a mask that cannot be read or found.
    """
    config = work.config
    masks = without_text(config)
    if config.mask_text is not None:
        from splatedit.relevance import ask

        masks.append(ask(work, console))
    if not masks:
        return None
    mask = masks[0] if len(masks) == 1 else All(tuple(masks))
    if config.mask_grow:
        mask = mask.grow(config.mask_grow) if config.mask_grow > 0 else mask.shrink(-config.mask_grow)
    return Not(mask) if config.mask_invert else mask


def of(work: Work, console: Console) -> Tensor | None:
    """Which Gaussians of the work may change, (n,) bool on the CPU; None: all, for there is no mask.

    Says how many. The mask is kept as mask.json in the run's folder; one that lies there already, of the run that is
    being resumed, is taken as it is. Raises InputError for a mask that holds none.
    """
    kept = Path(work.folder) / "mask.json" if work.folder else None
    mask = load(kept) if kept and kept.is_file() else build(work, console)
    if mask is None:
        return None
    chosen = mask(work.gaussians)
    tell(mask, chosen, work, console)
    if kept and not kept.is_file():
        save(mask, kept)
    return chosen.cpu()


def tell(mask: Mask, chosen: Tensor, work: Work, console: Console) -> None:
    """Say how many Gaussians a mask holds, `chosen` in all, part by part; raises InputError if it is none."""
    n, lines, inside = work.gaussians.n, describe(mask, work.gaussians), int(chosen.sum())
    if not inside:
        raise InputError(f"mask: it holds none of the {n:,} splats, so nothing could change ({'; '.join(lines)}).")
    console.print(escape(f"{inside:,} of {n:,} splats may change ({inside / n:.1%}), by mask:"))
    for line in lines:
        console.print(escape(f"  {line}"))
    if inside == n:
        console.print("[yellow]The mask holds every splat: the edit is the same as without one.")
