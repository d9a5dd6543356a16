"""Output folders: made, locked against a second run, found again, cleaned of what a killed run left."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from splatedit.config import Config, read_yaml
from splatedit.errors import InputError

CHECKPOINT = Path("ckpts") / "last.pt"  # within the folder of a run


# ---------------------------------------------------------------------------------------------------------- made, taken
@contextmanager
def output_folder(config: Config, keep: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """Make and lock a new outputs/<scene>/<prompt>@<time>; taken away again if the body fails, unless `keep` says no.

    Raises InputError if it cannot be made.
    """
    top, first = Path(config.output_dir), place(config)
    parent = first.parent
    new = [p for p in (parent, top) if not p.exists()]
    folder, count = first, 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # two runs in one second
            count += 1
            folder = parent / f"{first.name}-{count}"
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"output_dir: {top} cannot be written to ({reason}); choose another with -o.") from None
    try:
        with locked(folder):
            yield folder
    except BaseException:
        if not keep(folder):
            shutil.rmtree(folder)
            for path in new:
                with suppress(OSError):  # another run has put something there
                    path.rmdir()
        raise


def place(config: Config) -> Path:
    """Where a run begun now puts its results: outputs/<scene>/<prompt>@<time>."""
    when = f"{datetime.now():%Y%m%d-%H%M%S}"
    return Path(config.output_dir) / slug(Path(config.scene).stem) / f"{slug(config.prompt)}@{when}"


def slug(text: str, longest: int = 48) -> str:
    """Text as a file name: letters and digits of any script, the rest as single hyphens."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:longest].rstrip("-") or "edit"


def nearest(path: Path) -> Path:
    """The path itself or the first folder above it that is there."""
    path = path.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.exists())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` alone; raises InputError if another process does.

    The lock is the operating system's, on the folder itself: it ends with the process, however that ends. Where a file
    system knows no locks the folder is taken without one.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"{folder}: another run is working in this folder; wait for it to end, or stop it.") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


def clean(folder: Path) -> None:
    """Remove what `files.atomic` had begun when a run was killed. Only for who holds the lock."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- found again
def find(path: str | Path | None, config: Config) -> Path:
    """The folder of the run to go on with; raises InputError if there is none.

    path: an outputs folder or a checkpoint in it. None: the newest unfinished run in `config.output_dir`, of the
    scene and the prompt of `config`, as far as these are given.
    """
    if path is None:
        return newest(config)
    path = Path(path).expanduser()
    folder = path.parent.parent if path.suffix == ".pt" else path
    if not path.exists():
        raise InputError(f"--resume: {path}: not there; expected the outputs folder of a run, or its {CHECKPOINT}.")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"--resume: {path} is not the outputs folder of a run: {folder} has no config.yaml.")
    return folder


def newest(config: Config) -> Path:
    """The unfinished run of this scene and prompt that was begun or taken up last; raises InputError."""
    found = runs(config)
    open_ = [folder for folder in found if not finished(folder)]
    if open_:
        return open_[-1]
    of = f" of {config.scene}" * bool(config.scene) + f" to {config.prompt!r}" * bool(config.prompt)
    last = f"; the newest, {found[-1]}, is finished" if found else ""
    place = f"in {config.output_dir}{last}"
    raise InputError(f"--resume: there is no unfinished run{of} {place}; name a folder, or run without --resume.")


def runs(config: Config) -> list[Path]:
    """Folders of runs of this scene and prompt, as far as these are given, the newest last."""
    scene, prompt = (slug(text) if text else "*" for text in (Path(config.scene).stem, config.prompt))
    found = []
    for file in Path(config.output_dir).glob(f"{scene}/{prompt}@*/config.yaml"):
        with suppress(OSError, InputError):
            if not config.prompt or read_yaml(file).get("prompt") == config.prompt:
                found.append((file.stat().st_mtime_ns, file.parent))
    return [folder for _, folder in sorted(found)]


def finished(folder: Path, steps: int | None = None) -> dict[str, Any] | None:
    """run.json, if the run in `folder` has done so many steps (None: as its config.yaml asks for), or is lost."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        steps = read_yaml(folder / "config.yaml")["steps"] if steps is None else steps
        return None if record["interrupted"] or record["steps_asked"] != steps else record
    except (OSError, ValueError, KeyError, TypeError):
        return None


def in_use(folder: Path) -> bool:
    """Whether another process works in `folder`."""
    try:
        with locked(folder):
            return False
    except InputError:
        return True
