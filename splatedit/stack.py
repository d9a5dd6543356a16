"""Edits as a stack: every edit of a file kept beside it, to be undone, redone, weakened.

On disk. `edited.ply` has its history in the folder `edited.ply.history` beside it:

    0001.npz, 0001.json    the first edit: what changed, bit for bit (`deltas`), and what is known of it (`records`)
    0002.npz, 0002.json    the next one
    index.json             a bookmark: where in the history the file stands, and where redo leads

A record says which record it builds on (`parent`; 0 is the scene before the first edit) and the sha256 of the file
before and after. So records make a tree. Its states are linked by differences, and the one that is in the file gives
all the others: nothing is stored twice, and a chain of records is complete without any other file. Records never change
once written (but for facts added by `note`). A new edit on an undone state becomes a second child: what was undone is
no longer where redo leads, as in any editor, but it stays, and `goto` reaches it.

The file is the truth. Where it stands is the state with its sha256; the bookmark only decides between equal ones and
says where redo leads. The order of writing is record, file, bookmark, each whole or not at all (temporary file, fsync,
rename): a process that is killed leaves the old state or the new one, at worst with a record that nobody asks for or a
bookmark that is one step behind, and both are seen through. A file with any other sha256 was changed by another
program, and nothing here touches it. Changes hold a lock on the folder, so that two processes take turns.

A run writes to a folder of its own. `push` copies the records that led to its scene into the history of its result,
under their numbers: they are small, and the earlier run's folder may then go. A scene that is no binary PLY, or whose
file changed during the run, is in the history as it was loaded, written as PLY. A file that was renamed is found by
its content: any history in the same folder that knows its sha256 is taken, and copied before something is added.

Strength is a property of each edit on the way from the first scene to the file: 1 when it is made. Setting it gives
a new record of its own (kind "strength"), undone like any other. The new state is composed anew: from the last state on
the way that has the strengths wanted so far, each later edit is applied again, at its strength, on what is there
(`blending.reapply`). So 0 and 1 for the last edit are the states before and after it, bit for bit, and with all
strengths as they were at some state that state is met. Rotations of later edits are applied as the same turn, all else
as the same difference; rows that an edit added or removed fade by opacity.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splatedit import __version__, blending, deltas
from splatedit.blending import Named
from splatedit.deltas import Side, State
from splatedit.errors import InputError, LossWarning
from splatedit.files import atomic, load, made, sha256
from splatedit.formats.ply import write_ply
from splatedit.gaussians import Gaussians
from splatedit.records import (
    Entry,
    copy_entries,
    history_folder,
    locked,
    read_arrays,
    read_bookmark,
    read_entries,
    sweep,
    write_bookmark,
    write_entry,
    write_facts,
)

if TYPE_CHECKING:
    from rich.table import Table


class Stack:
    """The history of one .ply file, as it is on disk; `Stack.open(path)`.

    entries: all records by number; at: the one whose state the file is in, 0 before the first edit, None if another
    program changed the file; tip: where redo leads. Methods that change the file first read all this anew.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()  # as errors name it
        self.file = Path(os.path.realpath(self.path))  # a link has the history of what it points to
        self.own = history_folder(self.file)
        self.stamp: tuple[int, int, int] | None = None
        self.read()

    @classmethod
    def open(cls, path: str | Path) -> Stack:
        """The history of a .ply file, without entries if there is none. Raises InputError if it cannot be read."""
        return cls(path)

    def read(self) -> None:
        """Take everything from disk again."""
        if not self.file.is_file():
            raise InputError(f"{self.path}: no such file; expected the .ply file whose edits are meant.")
        try:
            if self.stamp != (now := stamp(self.file)):
                self.sha256, self.stamp = sha256(self.file), now
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror or error}).") from error
        self.folder, self.entries = self.own, read_entries(self.own)
        if not self.own.is_dir():  # renamed? Then a history beside it knows the content
            for other in sorted(self.file.parent.glob("*.history")):
                found = read_entries(other)
                if self.sha256 in {sha for entry in found.values() for sha in (entry.before, entry.after)}:
                    self.folder, self.entries = other, found
                    break
        at, tip = read_bookmark(self.folder)
        self.at = self.find(self.sha256, at)
        self.tip = tip if tip in self.entries and self.at in self.numbers(tip) else self.newest(self.at or 0)

    # ------------------------------------------------------------------------------------------------------- looking
    def line(self, number: int) -> list[Entry]:
        """The entries that lead from the first scene to the state after `number`."""
        entries: list[Entry] = []
        while number:
            entries.insert(0, self.entries[number])
            number = entries[0].parent
        return entries

    def numbers(self, number: int) -> list[int]:
        """0 and the numbers of `line(number)`."""
        return [0, *(entry.number for entry in self.line(number))]

    @property
    def done(self) -> list[Entry]:
        """The entries that are in the file, oldest first."""
        return self.line(self.at or 0)

    @property
    def undone(self) -> list[Entry]:
        """The entries that redo would bring back, in that order."""
        return [] if self.at is None else self.line(self.tip)[len(self.done) :]

    def newest(self, number: int) -> int:
        """The newest state that builds on `number`, itself if there is none."""
        while children := [n for n, entry in self.entries.items() if entry.parent == number]:
            number = max(children)
        return number

    def digest(self, number: int) -> str:
        """The sha256 of the file after an entry; of 0, before the first."""
        if number:
            return self.entries[number].after
        return next((entry.before for entry in self.entries.values() if not entry.parent), self.sha256)

    def find(self, digest: str, near: int = 0) -> int | None:
        """The state with this sha256, of several the fewest steps from `near`; None if there is none."""
        way = set(self.numbers(near if near in self.entries else 0))
        states = [number for number in (0, *self.entries) if self.digest(number) == digest]
        return min(states, key=lambda number: (len(way ^ set(self.numbers(number))), -number), default=None)

    def gaussians(self, number: int | None = None) -> Gaussians:
        """The scene as it was after an entry (0: before the first), as it is now without a number."""
        return self.named(number).gaussians

    def named(self, number: int | None = None) -> Named:
        """As `gaussians`, with numbers that a Gaussian keeps through all entries."""
        state = self._walk(self._current(), self._known(self.at if number is None else number))
        return Named(scene_of(state), state.ids)

    def weakened(self, strength: float, edit: int | None = None) -> Named:
        """What `strength` with the same arguments would write, and nothing is written; or InputError."""
        self._known_file()
        now, edit = self._weak(strength, edit)
        state = self._compose(self._current(), now | {edit: float(strength)})
        return Named(scene_of(state), state.ids)

    # ------------------------------------------------------------------------------------------------------ changing
    def undo(self, count: int = 1) -> list[Entry]:
        """Take back the last `count` entries; returns them, the last one first. Raises InputError if there are less."""
        with self._changing():
            if not 1 <= count <= len(self.done):
                raise InputError(f"{self.path}: asked to undo {count}, but {len(self.done)} can be undone.")
            taken = self.done[::-1][:count]
            self._move(taken[-1].parent, self.tip)
            return taken

    def redo(self, count: int = 1) -> list[Entry]:
        """Bring back `count` undone entries; returns them, in order. Raises InputError if there are fewer."""
        with self._changing():
            if not 1 <= count <= len(self.undone):
                raise InputError(f"{self.path}: asked to redo {count}, but {len(self.undone)} can be redone.")
            taken = self.undone[:count]
            self._move(taken[-1].number, self.tip)
            return taken

    def goto(self, number: int) -> None:
        """Bring the file to the state after any entry, 0 before the first, by undo and redo as needed."""
        with self._changing():
            number = self._known(number)
            self._move(number, self.tip if number in self.numbers(self.tip) else self.newest(number))

    def strength(self, strength: float, edit: int | None = None) -> Entry | None:
        """Give an edit that is done (the last one, or by number) a strength from 0 to 1, with all later ones on top.

        Returns the new entry; None if the edit has that strength already. Raises InputError.
        """
        with self._changing():
            now, edit = self._weak(strength, edit)
            if now[edit] == strength:
                return None
            state = self._current()
            after = self._compose(state, now | {edit: float(strength)})
            return self._add("strength", state, after, {"edit": edit, "strength": float(strength)})

    def push(self, gaussians: Gaussians, rows: Tensor | None = None, record: dict[str, Any] | None = None) -> Entry:
        """Write an edited scene into the file, as a new entry. Raises InputError if the file is no binary PLY.

        rows: None if every row is still the row it was, else (m,) int64: which one each row continues, -1 for an added
        one. record: whatever shall be remembered, plain JSON values.
        """
        with self._changing(begin=True):
            before = self._current()
            after = written(gaussians, self.path, continued(before.ids, rows, gaussians.n, self._next_id(before)))
            return self._add("edit", before, after, record or {})

    def note(self, number: int, **facts: Any) -> None:
        """Add to the record of an entry what became known later; plain JSON values."""
        with owned(self.own, self.file):
            self.read()
            entry = self.entries[self._known(number)]
            write_facts(self.own, entry._replace(record={**entry.record, **facts}))

    # -------------------------------------------------------------------------------------------------------- within
    @contextmanager
    def _changing(self, begin: bool = False) -> Iterator[None]:
        """Own and lock the history and read it; the file must be in a state that it knows. Raises InputError."""
        self.read()
        self._known_file()
        if not self.entries and not begin:
            raise InputError(
                f"{self.path}: has no history {self.own.name} beside it, so there is nothing to undo, redo or weaken; "
                "if it was copied from elsewhere, copy the folder *.ply.history that lies beside the original too."
            )
        with owned(self.own, self.file):
            copy_entries(self.folder, self.own, self.entries.values())
            self.read()
            self._known_file()
            yield

    def _known_file(self) -> None:
        if self.at is None:
            raise InputError(
                f"{self.path}: changed by another program since splatedit wrote it (sha256 {self.sha256[:12]}... is "
                f"not in {self.folder.name}), so it is left as it is. Put the file back as it was; or move "
                f"{self.folder} away to keep the change and begin a new history."
            )

    def _weak(self, strength: float, edit: int | None) -> tuple[dict[int, float], int]:
        """The strengths there are, and the number of the edit that is meant; raises InputError for a mistake."""
        if not 0 <= strength <= 1:
            raise InputError(f"{self.path}: strength {strength:g}, expected a number from 0 (before the edit) to 1.")
        now = strengths(self.done)
        if not now:
            raise InputError(f"{self.path}: no edit is done, so there is none to weaken; redo or make one first.")
        edit = max(now) if edit is None else edit
        if edit not in now:
            raise InputError(f"{self.path}: {edit} is not an edit that is done; expected one of {listed(now)}.")
        return now, edit

    def _known(self, number: int | None) -> int:
        if number is None:
            self._known_file()
        if number is None or number and number not in self.entries:
            raise InputError(f"{self.path}: there is no entry {number}, only {listed([0, *self.entries])}.")
        return number

    def _current(self) -> State:
        """What is in the file; raises InputError if that is no longer what was read."""
        self._known_file()
        data = self.file.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256 or stamp(self.file) != self.stamp:
            raise InputError(f"{self.path}: changed by another program just now; nothing is done.")
        state = deltas.parse(data)
        if state is None:
            raise InputError(f"{self.path}: no binary PLY of splats, as edits in place need; save it as one first.")
        return state._replace(ids=self._ids(self.at or 0, len(state.rows)))

    def _ids(self, number: int, count: int) -> np.ndarray:
        """Which Gaussians the rows of a state are."""
        return deltas.ids_of(read_arrays(self.folder, self.entries[number]), "after") if number else np.arange(count)

    def _next_id(self, state: State) -> int:
        return self.entries[self.at].next_id if self.at else len(state.rows)

    def _step(self, state: State, entry: Entry, side: Side) -> State:
        """The state on one side of an entry, from the one on the other."""
        try:
            return deltas.apply(state, read_arrays(self.folder, entry), side)
        except (ValueError, KeyError, IndexError) as error:
            raise InputError(f"{self.folder}: record {entry.number} is damaged ({error}); nothing is done.") from error

    def _walk(self, state: State, number: int) -> State:
        """The state after `number`, from the one the file is in; checked."""
        here, there = self.done, self.line(number)
        shared = len(set(self.numbers(number)) & set(self.numbers(self.at or 0))) - 1
        for entry in reversed(here[shared:]):
            state = self._step(state, entry, "before")
        for entry in there[shared:]:
            state = self._step(state, entry, "after")
        if digest_of(state) != self.digest(number):
            raise InputError(
                f"{self.folder}: a record is damaged, it does not lead to entry {number}; nothing is done."
            )
        return state

    def _compose(self, state: State, wanted: dict[int, float]) -> State:
        """The file, now in `state`, if its edits had the strengths wanted: see the top of this module."""
        line = self.done
        start = max(n for n in range(len(line) + 1) if strengths(line[:n]).items() <= wanted.items())
        state = begin = self._walk(state, line[start - 1].number if start else 0)
        scene, comments = None, []
        for entry in line[start:]:
            after, share = self._step(state, entry, "after"), wanted.get(entry.number, 0.0)
            if entry.kind == "edit" and share > 0:
                old = Named(scene_of(state), state.ids)
                if scene is None:
                    scene = old if state is begin else Named(scene_of(begin), begin.ids)
                scene = blending.reapply(scene, old, Named(scene_of(after), after.ids), share)
                if share < 1:
                    comments.append(f"splatedit {__version__}: strength {share:g} of edit {entry.number}")
            state = after
        if scene is None:
            return begin
        gaussians = scene.gaussians._replace(comments=(*scene.gaussians.comments, *comments))
        return written(gaussians, self.path, scene.ids)

    def _move(self, number: int, tip: int) -> None:
        if number != self.at:
            self._replace(self._walk(self._current(), number), number, tip)

    def _add(self, kind: str, before: State, after: State, record: dict[str, Any], write: bool = True) -> Entry:
        """Record the way from the file's state to another, then put that into the file."""
        arrays = deltas.difference(before, after)
        number = max(self.entries, default=0) + 1
        entry = Entry(
            number=number,
            parent=self.at or 0,
            kind=kind,
            before=digest_of(before),
            after=digest_of(after),
            splats=len(after.rows),
            **deltas.counts(arrays),
            next_id=max(self._next_id(before), int(after.ids.max(initial=-1)) + 1),
            bytes=0,
            time=datetime.now().astimezone().isoformat(timespec="seconds"),
            record=record,
        )
        self.entries[number] = entry = write_entry(self.own, entry, arrays)
        if write:
            self._replace(after, number, number)
        return entry

    def made(self, after: State) -> Entry | None:
        """The edit of the file's state that gave just this: a run that was cut off and resumed pushes twice."""
        digest, own = digest_of(after), (e for e in self.entries.values() if e.kind == "edit")
        return next((e for e in own if e.parent == (self.at or 0) and e.after == digest), None)

    def _replace(self, state: State, at: int, tip: int) -> None:
        with atomic(self.file) as stream:
            for piece in state.pieces:
                stream.write(piece)
            if stamp(self.file) != self.stamp:
                raise InputError(f"{self.path}: changed by another program just now; it is left as it is.")
        self.sha256, self.stamp = self.digest(at), stamp(self.file)
        write_bookmark(self.own, at, tip)
        self.read()


def push(
    path: str | Path,
    before: Gaussians,
    rows: Tensor | None = None,
    record: dict[str, Any] | None = None,
    *,
    scene: str | Path | None = None,
) -> Entry:
    """Begin or continue the history of an edited .ply file that was just written, from what it was made of.

    before: the scene as it was loaded; scene: the file it came from, whose history goes on in this one. rows, record:
    as of `Stack.push`. A history of `path` that does not know the scene is set aside, as NAME.ply.history.1 and so on.
    Raises InputError if the history cannot be written; the edited file is complete all the same.
    """
    edited = deltas.parse(Path(path).expanduser().read_bytes())
    if edited is None:
        raise InputError(f"{path}: no binary PLY of splats, so its edits cannot be kept.")
    state = source_state(before, scene)
    stack = Stack(path)
    with owned(stack.own, stack.file):
        stack.folder, stack.entries = stack.own, read_entries(stack.own)
        known = stack.find(digest_of(edited)) if stack.entries else None
        if known:  # the very same edit: a run that was cut off after this
            return stack.entries[known]
        stack.at = stack.find(digest_of(state)) if stack.entries else None
        if stack.at is None:
            set_aside(stack.own)
            stack.entries = {}
            stack.at = inherit(stack, scene, digest_of(state))
        state = state._replace(ids=stack._ids(stack.at, len(state.rows)))
        ids = continued(state.ids, rows, len(edited.rows), stack._next_id(state))
        entry = stack.made(edited._replace(ids=ids))
        if entry is None:
            entry = stack._add("edit", state, edited._replace(ids=ids), record or {}, write=False)
        write_bookmark(stack.own, entry.number, entry.number)
    return entry


def strengths(line: Sequence[Entry]) -> dict[int, float]:
    """The strength of each edit of a line, by number."""
    edits = {entry.number: 1.0 for entry in line if entry.kind == "edit"}
    return edits | {entry.record["edit"]: entry.record["strength"] for entry in line if entry.kind == "strength"}


def continued(ids: np.ndarray, rows: Tensor | None, count: int, next_id: int) -> np.ndarray:
    """Which Gaussians the rows of an edited scene are; a row continued twice is continued once, the others are new."""
    if rows is None:
        if count != len(ids):
            raise InputError(f"rows: {len(ids)} Gaussians became {count}; say which row each of them continues.")
        return ids
    source = rows.detach().cpu().numpy()
    if source.shape != (count,) or source.dtype.kind != "i" or (source < -1).any() or (source >= len(ids)).any():
        raise InputError(f"rows: expected {count} whole numbers from -1 to {len(ids) - 1}, one for each Gaussian.")
    old = np.zeros(count, bool)
    old[np.unique(source, return_index=True)[1]] = True
    old &= source >= 0
    new = next_id + np.arange(count)
    return np.where(old, ids[source], new)


def written(gaussians: Gaussians, path: str | Path, ids: np.ndarray | None = None) -> State:
    """Gaussians as the state of a file; `path` is only named in errors."""
    stream = io.BytesIO()
    write_ply(gaussians, stream, Path(path))
    state = deltas.parse(stream.getbuffer(), ids)
    assert state is not None
    return state


def scene_of(state: State) -> Gaussians:
    """The Gaussians of a state. Through a file: the readers want one."""
    with tempfile.TemporaryDirectory(prefix="splatedit-") as folder:
        path = Path(folder) / "scene.ply"
        with open(path, "wb") as stream:
            stream.writelines(state.pieces)
        return load(path)


def source_state(before: Gaussians, scene: str | Path | None) -> State:
    """The state of the file a scene was loaded from, or of the PLY it makes if that is no plain PLY or has changed."""
    with suppress(InputError, OSError):
        state = deltas.parse(Path(scene).expanduser().read_bytes()) if scene is not None else None
        if state is not None and {"x", "opacity"} <= set(state.rows.dtype.names or ()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LossWarning)  # given when the run loaded it
                loaded = load(scene or "").parameters
            if all(torch.equal(value.cpu(), loaded[name]) for name, value in before.parameters.items()):
                return state
    return written(before, scene or "scene")


def inherit(stack: Stack, scene: str | Path | None, digest: str) -> int:
    """Copy what led to the scene into a new history; returns the number of its last entry, 0 if it has none."""
    if scene is None or not Path(scene).expanduser().is_file():
        return 0
    with suppress(InputError):  # a damaged history of the scene is no reason to keep none of the edit
        origin = Stack(scene)
        number = origin.find(digest) if origin.entries else None
        copy_entries(origin.folder, stack.own, origin.line(number or 0))
        stack.entries = read_entries(stack.own)
        return number or 0
    return 0


def introduce(scene: str | Path) -> str | None:
    """What a run says of the history of its scene, in a line; None if there is none."""
    try:
        stack = Stack(scene) if history_folder(Path(os.path.realpath(scene))).is_dir() else None
    except InputError as error:
        return f"{error} A new history begins."
    if stack is None or not stack.entries:
        return None
    if stack.at is None:
        return f"{scene} was changed by another program since its last edit: a new history begins."
    edits = sum(entry.kind == "edit" for entry in stack.done)
    last = f", the last {stack.done[-1].title}" if stack.done else ""
    return f"{edits} edit{'s' if edits != 1 else ''} in its history{last}"


def shows(scene: str | Path) -> str | None:
    """What an edited file shows now: the prompt of the last edit that the model saw in most views, else its source.

    An edit below half strength does not count. None if nothing says so.
    """
    with suppress(InputError):
        done = Stack(scene).done if history_folder(Path(os.path.realpath(scene))).is_dir() else []
        share = strengths(done)
        edits = [entry for entry in done if entry.kind == "edit"]
        for entry in reversed(edits):
            seen = (entry.record.get("change") or {}).get("prefers_target") or 0
            if seen > 0.5 and share[entry.number] >= 0.5 and entry.record.get("prompt"):
                return entry.record["prompt"]
        return edits[0].record.get("source_prompt") or None if edits else None
    return None


def set_aside(folder: Path) -> None:
    """Move the records of a history that no longer belongs to its file into a folder within."""
    old = [path for path in folder.iterdir() if path.is_file()]
    if old:
        aside = next(p for p in (folder / f"aside-{n}" for n in itertools.count(1)) if not p.exists())
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)


@contextmanager
def owned(folder: Path, file: Path) -> Iterator[None]:
    """Make and lock the history of a file; an empty one does not stay. Raises InputError."""
    made(folder)
    try:
        with locked(folder):
            sweep(folder, file)
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def digest_of(state: State) -> str:
    """The sha256 of a state's file."""
    digest = hashlib.sha256()
    for piece in state.pieces:
        digest.update(piece)
    return digest.hexdigest()


def stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def listed(words: Iterable[Any]) -> str:
    return ", ".join(map(str, words))


# -------------------------------------------------------------------------------------------------------- to look at


def as_json(stack: Stack) -> dict[str, Any]:
    """The history as plain values: what `splatedit history --json` prints."""
    current = {entry.number for entry in stack.done}
    ahead = {entry.number for entry in stack.undone}
    place = {n: "done" if n in current else "undone" if n in ahead else "set aside" for n in stack.entries}
    factor = strengths(stack.done)
    return {
        "file": str(stack.path),
        "sha256": stack.sha256,
        "history": str(stack.folder) if stack.entries else None,
        "at": stack.at,
        "changed_by_another_program": stack.at is None,
        "entries": [
            {
                **entry._asdict(),
                "title": entry.title,
                "place": "unknown" if stack.at is None else place[number],
                "strength": factor.get(number),
            }
            for number, entry in stack.entries.items()
        ],
    }


def table(stack: Stack) -> Table:
    """The history as `splatedit history` prints it."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "#", "edit", "how", "verdict", "splats", "size", "made", ""):
        shown.add_column(name, justify="right" if name in ("#", "size") else "left", overflow="fold")
    facts = as_json(stack)
    first = next((entry.record.get("scene") for entry in stack.entries.values() if entry.record.get("scene")), None)
    shown.add_row("▸" if stack.at == 0 else "", "0", escape(f"the scene{f' {first}' if first else ''}"))
    for entry, said in zip(stack.entries.values(), facts["entries"], strict=True):
        record, place = entry.record, said["place"]
        how = [record.get("guidance"), f"{record['steps']} steps" if "steps" in record else None]
        how += [f"seed {record['seed']}" if "seed" in record else None]
        numbers = {"changed": entry.changed, "added": entry.added, "removed": entry.removed}
        weak = said["strength"] not in (None, 1.0)
        state = f"at strength {said['strength']:g}" if weak else "" if place == "done" else place
        if place == "set aside" and entry.parent != entry.number - 1:
            state += f", on {entry.parent}"
        shown.add_row(
            "▸" if stack.at == entry.number else "",
            str(entry.number),
            escape(entry.title),
            escape(", ".join(str(word) for word in how if word is not None)),
            escape(str(record.get("verdict") or "")),
            ", ".join(f"{count:,} {what}" for what, count in numbers.items() if count) or "0 changed",
            f"{entry.bytes / 1e6:.1f} MB" if entry.bytes >= 1e5 else f"{entry.bytes / 1e3:.1f} kB",
            entry.time[:16].replace("T", " "),
            state,
            style=None if place == "done" else "dim",
        )
    return shown
