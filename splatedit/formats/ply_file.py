"""The PLY container: its header, and its rows in and out in blocks; what the columns mean is none of its business.

Greg Turk's "The PLY Polygon File Format" (1994). A file is read and written by one thread, arranged by others.
"""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from splatedit.errors import InputError

TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
TYPES |= {"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"}
TYPES |= {f"{sign}int{8 * size}": f"{sign or 'i'}{size}" for sign in ("", "u") for size in (1, 2, 4)}
NAMES = {code: name for name, code in reversed(TYPES.items())}  # the oldest name of each
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}

# What people have instead of a PLY file, by its first bytes.
MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<": "a web page, perhaps a failed download; download the file again",
    b"\x1f\x8b": "gzip data; unpack it first",
    b"PK": "a zip archive; unpack it first",
    b"ply": "a damaged PLY header",
}
HEADER = 1 << 20  # bytes; a header of INRIA's is 1500
MOST = 4096  # elements and properties
BLOCK = 1 << 20  # bytes of rows handled at once: large enough for numpy's loops, small enough for a core's cache
FLOAT = np.dtype("<f4")  # what nearly all columns are; on a big-endian machine the fast ways are closed


class Element(NamedTuple):
    """One table of a PLY file."""

    name: str
    count: int  # rows
    columns: dict[str, str]  # property to numpy's code, "f4"
    lists: tuple[str, ...] = ()  # list properties; no such rows are ever read

    def dtype(self, order: str = "=") -> np.dtype:
        """Of one row, in a byte order."""
        return np.dtype([(name, order + code) for name, code in self.columns.items()])


class PlyFile(NamedTuple):
    """The header of a PLY file."""

    path: Path
    order: str  # a value of ORDERS
    elements: dict[str, Element]
    comments: tuple[str, ...]  # all of them, wherever they stand
    obj_info: tuple[str, ...]
    start: int  # byte at which the rows begin


def open_ply(path: Path) -> PlyFile:
    """Read a header and hold its counts against the size of the file; raises InputError, one line."""
    with open(path, "rb") as stream:
        head = stream.read(HEADER)
        size = os.fstat(stream.fileno()).st_size
    if head[:4] not in (b"ply\n", b"ply\r"):
        what = next((text for magic, text in MAGIC.items() if head.lstrip().startswith(magic)), None)
        what = what or (f"a file that starts with {head[:12]!r}" if head else "an empty file")
        raise InputError(f"{path}: not a PLY file: found {what}.")
    line_end = b"\r\n" if head[3:5] == b"\r\n" else head[3:4]
    end = re.search(line_end + rb"end_header[ \t]*" + line_end, head)
    if end is None:
        where = "end-of-file" if len(head) < HEADER else f"{HEADER} bytes"
        raise InputError(f"{path}: damaged PLY header: found {where} before end_header; copy or download it again.")
    lines = [line.decode("utf-8", "backslashreplace") for line in head[: end.start()].split(line_end)]
    ply = _parse(path, lines, end.end())
    _check_size(ply, size)
    return ply


def _parse(path: Path, lines: list[str], start: int) -> PlyFile:
    order, elements, comments, obj_info, entries = None, {}, [], [], 0
    for number, line in enumerate(lines[1:], 2):
        word, *words = line.split() or [""]
        try:
            if word in ("comment", "obj_info"):
                (comments if word == "comment" else obj_info).append(line.partition(" ")[2])
            elif (entries := entries + bool(word)) > MOST:
                raise ValueError(f"more than {MOST} elements and properties")
            elif word == "format":
                order = _order(words, order)
            elif word == "element":
                name, count = _element(words, elements)
                elements[name] = Element(name, count, {})
            elif word == "property":
                if not elements:
                    raise ValueError("property before the first element")
                last = next(reversed(elements))
                elements[last] = _property(elements[last], words)
            elif word:
                raise ValueError(f"found {line[:40]!r}, expected comment, element, property or end_header")
        except ValueError as error:
            raise InputError(f"{path}: damaged PLY header, line {number}: {error}.") from error
    if order is None:
        raise InputError(f"{path}: damaged PLY header: no line `format ... 1.0`.")
    return PlyFile(path, order, elements, tuple(comments), tuple(obj_info), start)


def _order(words: list[str], before: str | None) -> str:
    if before is not None:
        raise ValueError("a second format")
    if not words or words[0] not in ORDERS:
        raise ValueError(f"found format {' '.join(words)[:40]!r}, expected one of {', '.join(ORDERS)}")
    if words[1:] != ["1.0"]:
        raise ValueError(f"found version {' '.join(words[1:])[:40]!r}, expected version '1.0'")
    return ORDERS[words[0]]


def _element(words: list[str], known: dict[str, Element]) -> tuple[str, int]:
    if len(words) != 2 or not (words[1].isascii() and words[1].isdecimal() and len(words[1]) < 20):
        raise ValueError(f"found element {' '.join(words)[:40]!r}, expected a name and a count of rows")
    if words[0] in known:
        raise ValueError(f"two elements with the same name {words[0]!r}")
    return words[0], int(words[1])


def _property(element: Element, words: list[str]) -> Element:
    is_list = words[:1] == ["list"]
    if len(words) != (4 if is_list else 2) or not all(word in TYPES for word in words[is_list:-1]):
        raise ValueError(f"found property {' '.join(words)[:40]!r}, expected a type and a name, as in `float x`")
    name = words[-1]
    if name in element.columns or name in element.lists:
        raise ValueError(f"two properties with the same name {name!r}")
    if not name.isascii():
        raise ValueError(f"found property {name[:40]!r}, expected a name in plain ASCII")
    if is_list:
        return element._replace(lists=(*element.lists, name))
    return element._replace(columns={**element.columns, name: TYPES[words[0]]})


def _check_size(ply: PlyFile, size: int) -> None:
    """Raise InputError if the rows that are promised are more than the file can hold; nothing is allocated before."""
    at = ply.start
    for element in ply.elements.values():
        if element.lists and element.count:
            return  # rows of any length; such files are refused by whoever wants a splat
        each = element.dtype().itemsize if ply.order else max(1, 2 * len(element.columns))
        spare = 0 if ply.order else 1  # the last line may lack its end
        if at + element.count * each > size + spare:
            raise short(ply, element, max(0, size - at) // each)
        at += element.count * each


def short(ply: PlyFile, element: Element, row: int) -> InputError:
    """The error of a file that ends before an element does; `row` is the first one that is not whole."""
    return InputError(
        f"{ply.path}: element {element.name!r}, row {row}: early end-of-file, expected {element.count} complete rows; "
        "the file is cut short; copy or download it again."
    )


# ---------------------------------------------------------------------------------------------------------------- in


def table(ply: PlyFile, name: str) -> np.ndarray:
    """All rows of an element as a structured array in this machine's byte order."""
    element = ply.elements[name]
    out = np.empty(element.count, element.dtype())
    for first, rows in read_rows(ply, name):
        out[first : first + len(rows)] = rows
    return out


def read_rows(ply: PlyFile, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of an element block by block: (number of the first, structured array in the file's byte order).

    A block is overwritten later: copy what is kept. Raises InputError with element, row and property.
    """
    element = ply.elements[name]
    if not element.columns or not element.count:
        return iter(())
    return _binary_rows(ply, element) if ply.order else _ascii_rows(ply, element)


def _binary_rows(ply: PlyFile, element: Element) -> Iterator[tuple[int, np.ndarray]]:
    """While one block is worked on, the next one is read."""
    dtype = element.dtype(ply.order)
    before = list(ply.elements.values())[: list(ply.elements).index(element.name)]
    step = max(1, BLOCK // dtype.itemsize)
    firsts = range(0, element.count, step)
    buffers = [np.empty(min(step, element.count), dtype) for _ in range(min(2, len(firsts)))]

    def read(index: int) -> np.ndarray:
        first = firsts[index]
        rows = buffers[index % 2][: element.count - first]
        got = stream.readinto(rows.view(np.uint8))  # pyright: ignore[reportArgumentType]
        if got < rows.nbytes:  # somebody writes to the file right now
            raise short(ply, element, first + got // dtype.itemsize)
        return rows

    with open(ply.path, "rb", buffering=0) as stream, Ahead(len(firsts) > 1) as ahead:
        stream.seek(ply.start + sum(e.count * e.dtype().itemsize for e in before))
        coming = ahead.submit(read, 0)
        for index, first in enumerate(firsts):
            rows = coming.result()
            if index + 1 < len(firsts):
                coming = ahead.submit(read, index + 1)
            yield first, rows


class Ahead:
    """One thread for reading or writing while the caller computes; without it, calls are made at once."""

    def __init__(self, threaded: bool) -> None:
        self.pool = ThreadPoolExecutor(1) if threaded else None

    def submit(self, f: Callable[..., Any], *args: Any) -> Future:
        """The result of `f(*args)`, later."""
        if self.pool is not None:
            return self.pool.submit(f, *args)
        done: Future = Future()
        done.set_result(f(*args))
        return done

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()


def _ascii_rows(ply: PlyFile, element: Element) -> Iterator[tuple[int, np.ndarray]]:
    """One line is one row. Numbers are read as doubles, which hold every number of every other type exactly."""
    step = max(1, BLOCK // (8 * len(element.columns)))
    with open(ply.path, "rb") as stream:
        stream.seek(ply.start)
        for other in ply.elements.values():
            if other.name == element.name:
                break
            deque(islice(stream, other.count), maxlen=0)
        for first in range(0, element.count, step):
            lines = list(islice(stream, min(step, element.count - first)))
            yield first, _numbers(ply, element, lines, first)
            if len(lines) < min(step, element.count - first):
                raise short(ply, element, first + len(lines))


def _numbers(ply: PlyFile, element: Element, lines: list[bytes], first: int) -> np.ndarray:
    columns = element.columns
    try:
        with np.errstate(all="ignore"):
            numbers = np.loadtxt(lines, np.float64, comments=None, ndmin=2) if any(lines) else np.empty((0, 0))
        if numbers.shape != (len(lines), len(columns)):
            raise ValueError("a line of another length")
    except (ValueError, UnicodeDecodeError) as error:
        raise _odd_line(ply, element, lines, first) from error
    rows = np.empty(len(lines), element.dtype())
    for i, (name, code) in enumerate(columns.items()):
        with np.errstate(all="ignore"):
            rows[name] = numbers[:, i]
        if code[0] != "f" and (wrong := rows[name] != numbers[:, i]).any():
            raise _odd_number(ply, element, first + int(wrong.argmax()), name, str(numbers[wrong.argmax(), i]))
    return rows


def _odd_line(ply: PlyFile, element: Element, lines: list[bytes], first: int) -> InputError:
    """What is wrong with the first line that is not a row of numbers."""
    for row, line in enumerate(lines, first):
        words = line.split()
        for name, word in zip(element.columns, words, strict=False):
            try:
                np.loadtxt([word], np.float64, comments=None)
            except (ValueError, UnicodeDecodeError):
                return _odd_number(ply, element, row, name, ascii(word[:40])[1:])
        if len(words) < len(element.columns) and not line.endswith(b"\n"):
            return short(ply, element, row)
        if len(words) != len(element.columns):
            return InputError(
                f"{ply.path}: element {element.name!r}, row {row}: found {len(words)} numbers, expected "
                f"{len(element.columns)}; repair it or export it again."
            )
    return short(ply, element, first + len(lines))


def _odd_number(ply: PlyFile, element: Element, row: int, name: str, found: str) -> InputError:
    kind = NAMES[element.columns[name]]
    return InputError(
        f"{ply.path}: element {element.name!r}, row {row}, property {name!r}: found {found}, expected a number that "
        f"fits the type {kind}; repair it or export it again."
    )


# --------------------------------------------------------------------------------------------------------------- out


class Table(NamedTuple):
    """An element to write: columns side by side in arrays, and the order in which they are written."""

    parts: list[tuple[Sequence[str], np.ndarray]]  # names of the columns, (n, columns)
    order: list[str]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Each column by name in the order of the file, (n,) views."""
        found = {name: part[:, i] for names, part in self.parts for i, name in enumerate(names)}
        return {name: found[name] for name in self.order}


def table_of(columns: Mapping[str, np.ndarray]) -> Table:
    """A table from single columns, (n,) each."""
    return Table([((name,), column[:, None]) for name, column in columns.items()], list(columns))


def write_tables(
    stream: IO[bytes], tables: Mapping[str, Table], comments: Sequence[str], obj_info: Sequence[str] = ()
) -> None:
    """Write little-endian binary PLY; names have to be legal already, comments are made so."""
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {_plain(text)}" for text in comments]
    lines += [f"obj_info {_plain(text)}" for text in obj_info]
    for name, element in tables.items():
        lines += [f"element {name} {len(element.parts[0][1]) if element.parts else 0}"]
        lines += [f"property {NAMES[column.dtype.str[1:]]} {key}" for key, column in element.columns.items()]
    header = "\n".join([*lines, "end_header\n"]).encode("ascii")
    _reserve(stream, len(header) + sum(len(t.parts[0][1]) * _dtype(t).itemsize for t in tables.values() if t.parts))
    stream.write(header)
    for element in tables.values():
        _write_rows(stream, element)


def _reserve(stream: IO[bytes], size: int) -> None:
    """Ask for the whole room at once: a full disk is told before anything is written, and writing is far faster."""
    if size < BLOCK or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # other errors only say that this cannot be asked of such a stream


def _dtype(element: Table) -> np.dtype:
    """A row as it is in the file."""
    return np.dtype([(name, column.dtype.newbyteorder("<")) for name, column in element.columns.items()])


def _write_rows(stream: IO[bytes], element: Table) -> None:
    """While one block is written, the next one is arranged."""
    count = len(element.parts[0][1]) if element.parts else 0
    dtype = _dtype(element)
    step = max(1, BLOCK // max(1, dtype.itemsize))
    firsts = range(0, count, step)
    buffers = [np.empty(min(step, count), dtype) for _ in range(min(2, len(firsts)))]
    arrange = _arrangement(element, dtype)
    with Ahead(len(firsts) > 1) as ahead:
        written = None
        for index, first in enumerate(firsts):
            block = buffers[index % 2][: count - first]
            arrange(first, block)
            if written is not None:
                written.result()
            written = ahead.submit(stream.write, block.view(np.uint8))
        if written is not None:
            written.result()


def _arrangement(element: Table, dtype: np.dtype) -> Callable[[int, np.ndarray], None]:
    """The function that fills a block with the rows from a given one on; floats alone go the fast way."""

    def by_column(first: int, block: np.ndarray) -> None:
        for name, column in element.columns.items():
            block[name] = column[first : first + len(block)]

    if any(part.dtype != FLOAT for _, part in element.parts):
        return by_column
    moves = _moves(element)

    def by_row(first: int, block: np.ndarray) -> None:
        rows = block.view(FLOAT).reshape(len(block), -1)
        for at, part, columns in moves:
            rows[:, at] = part[first : first + len(block), columns]

    return by_row


def _moves(element: Table) -> list[tuple[slice, np.ndarray, slice]]:
    """Runs of columns of the file that lie evenly spaced in one part: where they go, from which, and where there."""
    places = {name: (part, k) for names, part in element.parts for k, name in enumerate(names)}
    moves, at = [], 0
    while at < len(element.order):
        (part, first), following = places[element.order[at]], [places[name] for name in element.order[at + 1 :]]
        step = following[0][1] - first if following and following[0][0] is part and following[0][1] > first else 1
        count = 1
        while count <= len(following):
            owner, column = following[count - 1]
            if owner is not part or column != first + count * step:
                break
            count += 1
        moves.append((slice(at, at + count), part, slice(first, first + (count - 1) * step + 1, step)))
        at += count
    return moves


def _plain(text: str) -> str:
    """One line of plain ASCII, as a PLY header demands; anything else is escaped, not lost."""
    return " ".join(text.splitlines()).encode("ascii", "backslashreplace").decode()
