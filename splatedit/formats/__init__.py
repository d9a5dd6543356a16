"""Splat file formats: one module each, and `FORMATS`, the list of all with the endings they go by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from splatedit.formats.checkpoints import newest_checkpoint, read_checkpoint
from splatedit.formats.compressed_ply import compressed_ply_losses, write_compressed_ply
from splatedit.formats.ksplat import read_ksplat
from splatedit.formats.ply import ply_losses, read_ply, write_ply
from splatedit.formats.sog import read_sog, sog_losses, write_sog
from splatedit.formats.splat import read_splat, splat_losses, write_splat
from splatedit.formats.spz import read_spz, spz_losses, write_spz
from splatedit.gaussians import Gaussians


class Format(NamedTuple):
    """One kind of splat file."""

    name: str
    suffixes: tuple[str, ...]  # endings, lower case with the dot; the longest one that matches wins
    read: Callable[[Path], Gaussians] | None
    write: Callable[[Gaussians, IO[bytes], Path], None] | None  # to a stream; the path is only named in errors
    losses: Callable[[Gaussians], list[str]]  # what a file of this kind cannot hold of these Gaussians, noun phrases


# The one place that knows them all; a new format is a line here and a module beside this file.
FORMATS: dict[str, Format] = {
    "ply": Format("ply", (".ply",), read_ply, write_ply, ply_losses),
    "compressed_ply": Format(
        "compressed_ply", (".compressed.ply",), read_ply, write_compressed_ply, compressed_ply_losses
    ),
    "sog": Format("sog", (".sog", "meta.json"), read_sog, write_sog, sog_losses),
    "splat": Format("splat", (".splat",), read_splat, write_splat, splat_losses),
    "ksplat": Format("ksplat", (".ksplat",), read_ksplat, None, lambda _: []),
    "spz": Format("spz", (".spz",), read_spz, write_spz, spz_losses),
    "checkpoint": Format("checkpoint", (".pt", ".ckpt", ".pth", "config.yml"), read_checkpoint, None, lambda _: []),
}


def format_of(path: str | Path) -> Format | None:
    """The format a path goes by: the longest ending that fits; None if none.

    A folder with meta.json is `sog`, the folder of a gsplat or nerfstudio run is `checkpoint`.
    """
    path = Path(path)
    if "sog" in FORMATS and (path / "meta.json").is_file():
        return FORMATS["sog"]
    if path.is_dir() and newest_checkpoint(path):
        return FORMATS["checkpoint"]
    name = path.name.lower()
    fitting = [(len(end), form) for form in FORMATS.values() for end in form.suffixes if name.endswith(end)]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def endings(*, read: bool = False, write: bool = False) -> list[str]:
    """All endings that can be read, or written."""
    chosen = (f for f in FORMATS.values() if (f.read or not read) and (f.write or not write))
    return [end for form in chosen for end in form.suffixes]
