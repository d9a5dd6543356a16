"""Splat files in and out: `load(path)`, `save(gaussians, path)`, the sidecar beside a scene, sha256."""

from __future__ import annotations

import difflib
import hashlib
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from splatedit.errors import InputError, LossWarning
from splatedit.formats import FORMATS, Format, endings, format_of
from splatedit.formats.checkpoints import newest_checkpoint
from splatedit.gaussians import Gaussians
from splatedit.sidecars import Sidecar, sidecar

__all__ = ["Sidecar", "atomic", "check_target", "load", "save", "sha256", "sidecar", "sync_folder"]
ELSEWHERE = {".lcc"}  # what splat-transform turns into .ply


def load(path: str | Path) -> Gaussians:
    """Read a splat file; raises InputError, one line, for anything that is not a sound splat scene.

    The ending says what it is, see `formats.FORMATS`. Of a .ply doubles become float32, values are otherwise kept bit
    for bit: other columns in `extra` with their dtype, header comments in `comments`, other elements in `elements`, the
    order of all columns in `layout`.
    """
    path = Path(path).expanduser()
    try:
        path = _existing(path)
        form = format_of(path)
        if form is None or form.read is None:
            suffix = path.suffix.lower()
            found = f"a {suffix} file" if suffix else "a file without extension"
            hint = f"convert it, e.g. `splat-transform {path.name} {path.with_suffix('.ply').name}`"
            advice = hint if suffix in ELSEWHERE else "give a splat file"
            raise InputError(f"{path}: found {found}, expected {_list(endings(read=True))}; {advice}.")
        return form.read(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


def save(gaussians: Gaussians, path: str | Path) -> None:
    """Write a splat file of the kind its ending says, atomically: the target is either untouched or complete.

    A .ply is little-endian and binary, its columns in the order of the file they came from, else in INRIA's. What the
    format cannot hold is said by a LossWarning. Raises InputError if the target cannot be written or the scene is
    unsound.
    """
    path = Path(path).expanduser()
    form, write = check_target(path)
    with atomic(path) as stream:
        write(gaussians, stream, path)
    if losses := form.losses(gaussians):
        warnings.warn(f"{path}: {form.name} cannot hold {_list(losses)}.", LossWarning, stacklevel=2)


def check_target(path: Path) -> tuple[Format, Callable[[Gaussians, IO[bytes], Path], None]]:
    """The format of a file to be written and its writer; raises InputError if there is none."""
    form = format_of(path)
    if form is None or form.write is None:
        found = path.suffix.lower() or "nameless"
        raise InputError(f"{path}: cannot write a {found} file, only {_list(endings(write=True))}; rename the target.")
    return form, form.write


def made(folder: Path, setting: str = "") -> Path:
    """The folder, made if it is not there; raises InputError, which begins with the `setting` that chose it, if any."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"{setting}: {folder}" if setting else folder
        raise InputError(f"{where}: cannot be made ({error.strerror or error}); choose another place.") from None
    return folder


@contextmanager
def atomic(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary stream that becomes `path` only when the block ends without an error; raises InputError if it cannot."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file in it.")
    final = Path(os.path.realpath(path))  # a link stays a link to the new content
    if not final.parent.is_dir():
        raise InputError(f"{path}: the folder {final.parent} does not exist; make it first.")
    part = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if final.exists():
            os.chmod(part, final.stat().st_mode & 0o777)
        os.replace(part, final)
        sync_folder(final.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, so that a power cut does not bring back the old file."""
    with suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content; of a scene that is a folder, of the files that `load` reads from it."""
    path = Path(path)
    if path.is_dir():
        _existing(path)
        files = [newest_checkpoint(path)] if format_of(path) is FORMATS["checkpoint"] else sorted(path.iterdir())
    else:
        files = [path]
    digest = hashlib.sha256()
    for file in files:
        if file is not None and not file.is_dir():
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _existing(path: Path) -> Path:
    """The path, if it is a file; else an InputError that suggests one."""
    if path.is_dir() and format_of(path) is None:
        inside = sorted(p.name for p in path.iterdir() if _readable(p))
        trained = sorted(path.glob("point_cloud/iteration_*/point_cloud.ply"), key=lambda p: (len(p.parts[-2]), p))
        if trained:
            advice = f"give the splat in it: {trained[-1]}"
        else:
            advice = f"give one of its splat files: {_list(inside[:5])}" if inside else "it holds no splat file"
        raise InputError(f"{path}: is a folder, expected a splat file; {advice}.")
    if path.exists():
        return path
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such file, and no folder {path.parent}; check the path.")
    names = {p.name.lower(): p.name for p in path.parent.iterdir() if p.is_file()}
    splats = sorted(name for name in names.values() if _readable(Path(name)))
    near = [names[m] for m in difflib.get_close_matches(path.name.lower(), names, 3, 0.6)]
    if near:
        advice = f"did you mean {' or '.join(str(path.parent / name) for name in near)}?"
    else:
        advice = f"{path.parent} holds {_list(splats[:5])}." if splats else f"{path.parent} holds no splat file."
    raise InputError(f"{path}: no such file; {advice}")


def _readable(path: Path) -> bool:
    form = format_of(path)
    return form is not None and form.read is not None


def _list(words: Iterable[Any]) -> str:
    return ", ".join(map(str, words))
