"""The records of a history on disk: what lies in `edited.ply.history`, read, and written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from splatedit import deltas
from splatedit.errors import InputError
from splatedit.files import atomic

FORMAT = 1
WAIT = 10.0  # seconds for another process to finish


class Entry(NamedTuple):
    """One edit, or one change of an edit's strength."""

    number: int  # from 1; the name of its record
    parent: int  # the number it builds on; 0 is the scene before the first edit
    kind: str  # "edit" or "strength"
    before: str  # sha256 of the file
    after: str
    splats: int  # after it
    changed: int  # rows that both states have, with other bits
    added: int
    removed: int
    next_id: int  # the first number that no Gaussian has had yet, for those that a later edit adds
    bytes: int  # of the difference on disk
    time: str  # ISO 8601
    record: dict[str, Any]  # what is known of it: prompt, config, verdict ...; of a strength: edit, strength

    @property
    def title(self) -> str:
        """What it did, in a few words."""
        if self.kind == "strength":
            return f"strength {self.record['strength']:g} of edit {self.record['edit']}"
        source, prompt = self.record.get("source_prompt"), self.record.get("prompt")
        return (f"{source!r} to {prompt!r}" if source else repr(prompt)) if prompt else "an edit"


def history_folder(file: Path) -> Path:
    """Where the history of a file lies."""
    return file.with_name(f"{file.name}.history")


def read_entries(folder: Path) -> dict[int, Entry]:
    """All records by number, none if there is no such folder. Raises InputError for a damaged one."""
    found = sorted(p for p in folder.glob("*.json") if re.fullmatch(r"\d{4,}", p.stem))
    entries = {entry.number: entry for entry in map(read_facts, found)}
    for entry in entries.values():
        if not (entry.parent == 0 or 0 < entry.parent < entry.number and entry.parent in entries):
            raise InputError(f"{folder}: record {entry.number} builds on record {entry.parent}, which is missing.")
    return entries


def read_facts(path: Path) -> Entry:
    """What one record says of itself; raises InputError."""
    content = read_json(path)
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise InputError(f"{path}: a record of format {found!r}, expected {FORMAT}; update splatedit.")
    wrong = [k for k, kind in FIELDS.items() if not isinstance(content.get(k), kind)]
    if wrong or content["number"] != int(path.stem):
        raise InputError(f"{path}: damaged ({wrong[0] if wrong else 'number'}); restore it from a copy.")
    return Entry(**{k: content[k] for k in Entry._fields})


FIELDS: dict[str, type] = dict.fromkeys(("number", "parent", "splats", "changed", "added", "removed"), int)
FIELDS |= {"next_id": int, "bytes": int, "kind": str, "before": str, "after": str, "time": str, "record": dict}


def write_entry(folder: Path, entry: Entry, arrays: dict[str, np.ndarray]) -> Entry:
    """Write a new record, the facts last, since it exists from then on; returns it with its size."""
    facts_text(entry)  # whatever cannot be written is told before anything is
    path = folder / f"{entry.number:04}.npz"
    with atomic(path) as stream:
        deltas.dump(arrays, stream)
    entry = entry._replace(bytes=path.stat().st_size)
    write_facts(folder, entry)
    return entry


def write_facts(folder: Path, entry: Entry) -> None:
    """Write what is known of a record, in place of what was."""
    text = facts_text(entry)
    with atomic(folder / f"{entry.number:04}.json") as stream:
        stream.write(text.encode())


def facts_text(entry: Entry) -> str:
    """The facts as JSON; raises InputError for what JSON cannot hold."""
    try:
        return json.dumps({"format": FORMAT, **entry._asdict()}, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"record: {error}; expected finite numbers, text, lists and dictionaries.") from None


def read_arrays(folder: Path, entry: Entry) -> dict[str, np.ndarray]:
    """The difference of a record; raises InputError."""
    path = folder / f"{entry.number:04}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise InputError(f"{path}: missing, so that entry {entry.number} can be neither undone nor redone.") from None
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())}); nothing is done.") from error


def read_bookmark(folder: Path) -> tuple[int, int]:
    """Where the file stood and where redo led when last written: (at, tip), (0, 0) if nothing says so."""
    try:
        content = read_json(folder / "index.json")
        return int(content["at"]), int(content["tip"])
    except (InputError, KeyError, TypeError, ValueError):
        return 0, 0  # the sha256 of the file says the same, in all but rare cases


def write_bookmark(folder: Path, at: int, tip: int) -> None:
    """Remember the place. A failure is let pass: the file is already what it shall be, and `read_bookmark` copes."""
    with suppress(InputError), atomic(folder / "index.json") as stream:
        stream.write((json.dumps({"format": FORMAT, "at": at, "tip": tip}) + "\n").encode())


def copy_entries(source: Path, target: Path, entries: Iterable[Entry]) -> None:
    """Copy records into another history, the differences first; raises InputError."""
    if source == target:
        return
    for name in (f"{entry.number:04}.{end}" for entry in entries for end in ("npz", "json")):
        try:
            with open(source / name, "rb") as content, atomic(target / name) as stream:
                shutil.copyfileobj(content, stream)
        except OSError as error:
            raise InputError(f"{source / name}: cannot be copied ({error.strerror or error}).") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes; waits for them a while, then raises InputError."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise InputError(f"{folder}: another process is changing it; try again when it is done.") from None
                time.sleep(0.02)
            except OSError:  # some network file systems have no locks
                break
        yield
    finally:
        os.close(handle)


def sweep(folder: Path, file: Path) -> None:
    """Remove what killed processes left half-written. Only for the holder of the lock."""
    for part in (*folder.glob(".*.part"), *file.parent.glob(f".{file.name}.*.part")):
        with suppress(OSError):
            part.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged; restore it from a copy.")
    return content
