"""The difference between two states of a binary PLY file, bit for bit, in either direction.

Both states are known once one of them and their XOR are: for rows that both have, only the XOR of their bits is kept,
of the columns and rows in which there is any. It takes half the room of the values before and after, which it yields
exactly. What only one state has (rows added or removed, columns, header, other elements) is kept as it stands.
"""

from __future__ import annotations

import re
from typing import IO, Literal, NamedTuple

import numpy as np

from splatedit.formats.ply_file import ORDERS, TYPES

Side = Literal["before", "after"]
HEADER = re.compile(rb"ply\r?\n(?:[^\r\n]*\r?\n)*?end_header\r?\n")  # https://paulbourke.net/dataformats/ply/


class State(NamedTuple):
    """A binary PLY file in three pieces, and which Gaussian each row is."""

    head: bytes  # all before the first Gaussian: the header, and elements that come earlier
    rows: np.ndarray  # (n,) structured, as the file has them
    tail: bytes  # all after the last Gaussian
    ids: np.ndarray  # (n,) int64, no two alike; a Gaussian keeps its number through all edits

    @property
    def pieces(self) -> tuple[bytes | memoryview, ...]:
        """What follows one another in the file."""
        return self.head, np.ascontiguousarray(self.rows).view(np.uint8).data, self.tail


class Layout(NamedTuple):
    """Where the Gaussians of a PLY file lie."""

    start: int  # bytes before the first
    count: int
    dtype: np.dtype


def layout(data: bytes | memoryview) -> Layout | None:
    """Where element 'vertex' lies; None if the file is not binary or a list stands in its way."""
    match = HEADER.match(data, 0, 1 << 20)
    lines = [line.split() for line in bytes(match[0]).decode("latin-1").splitlines()] if match else []
    order = next((ORDERS.get(words[1]) for words in lines if words[:1] == ["format"] and len(words) > 1), None)
    if match is None or not order:
        return None
    elements: list[tuple[str, int, list[tuple[str, str]]]] = []
    for words in lines:
        if words[:1] == ["element"] and len(words) == 3 and words[2].isdecimal():
            elements.append((words[1], int(words[2]), []))
        elif words[:1] == ["property"] and elements and len(words) > 2:
            elements[-1][2].append((words[-1], order + TYPES.get(words[1], "?")))
    start = match.end()
    for name, count, columns in elements:
        if any(kind.endswith("?") for _, kind in columns) or len(dict(columns)) < len(columns):
            return None
        dtype = np.dtype(columns)
        if name == "vertex":
            return Layout(start, count, dtype) if columns else None
        start += count * dtype.itemsize
    return None


def parse(data: bytes | memoryview, ids: np.ndarray | None = None) -> State | None:
    """The file as a State that looks into `data`; without `ids` rows are numbered from 0. None as of `layout`."""
    where = layout(data)
    if where is None or where.start + where.count * where.dtype.itemsize > len(data):
        return None
    rows = np.frombuffer(data, where.dtype, where.count, where.start)
    ids = np.arange(where.count) if ids is None else ids
    return State(bytes(data[: where.start]), rows, bytes(data[where.start + rows.nbytes :]), ids)


def difference(before: State, after: State) -> dict[str, np.ndarray]:
    """All that `apply` needs to make either state from the other: small integer arrays by name."""
    states = {"before": before, "after": after}
    arrays = {f"head_{side}": _bytes(state.head) for side, state in states.items()}
    if before.tail != after.tail:
        arrays |= {f"tail_{side}": _bytes(state.tail) for side, state in states.items()}
    if not all(np.array_equal(state.ids, np.arange(len(state.ids))) for state in states.values()):
        arrays |= {f"ids_{side}": np.diff(state.ids, prepend=0) for side, state in states.items()}
    both = pairs(before.ids, after.ids)
    shared = _shared(before.rows.dtype, after.rows.dtype)
    xor = {name: _bits(before.rows[name][both[0]]) ^ _bits(after.rows[name][both[1]]) for name in shared}
    changed = np.zeros(len(before.ids[both[0]]), bool)
    for bits in xor.values():
        changed |= bits != 0
    if not changed.all():
        arrays["changed"] = np.packbits(changed)
    for index, name in enumerate(shared):
        if xor[name].any():
            arrays[f"xor_{index}"] = _planes(xor[name][changed])
    for side, state, own in zip(states, states.values(), both, strict=True):
        alone = _others(len(state.rows), own)
        for index, name in enumerate(state.rows.dtype.names or ()):
            if name not in shared:
                arrays[f"whole_{side}_{index}"] = _planes(_bits(state.rows[name]))
            elif len(alone):
                arrays[f"alone_{side}_{index}"] = _planes(_bits(state.rows[name][alone]))
    return arrays


def apply(source: State, arrays: dict[str, np.ndarray], side: Side) -> State:
    """The state on one side of a difference, from the one on the other. Raises ValueError, KeyError if they clash."""
    other: Side = "before" if side == "after" else "after"
    head = arrays[f"head_{side}"].tobytes()
    where = layout(head)
    if where is None or len(source.rows) != len(ids_of(arrays, other)):
        raise ValueError("the difference belongs to another file")
    ids = ids_of(arrays, side)
    mine, theirs = pairs(ids, ids_of(arrays, other))
    dtypes = {side: where.dtype, other: source.rows.dtype}
    shared = _shared(dtypes["before"], dtypes["after"])
    alike = where.dtype == source.rows.dtype and isinstance(mine, slice)
    rows = source.rows.copy() if alike else np.empty(where.count, where.dtype)
    pair_count, alone = len(ids[mine]), _others(where.count, mine)
    changed = np.unpackbits(arrays["changed"], count=pair_count).astype(bool) if "changed" in arrays else slice(None)
    for index, name in enumerate(where.dtype.names or ()):
        kind = where.dtype[name]
        if name not in shared:
            rows[name] = _joined(arrays[f"whole_{side}_{index}"], kind)
            continue
        xor = arrays.get(f"xor_{shared.index(name)}")
        if alike and xor is None:
            continue
        column = source.rows[name][theirs]
        if xor is not None:
            bits = _bits(column).copy()
            bits[changed] ^= _bits(_joined(xor, kind))
            column = bits.view(kind)
        rows[name][mine] = column
        if len(alone):
            rows[name][alone] = _joined(arrays[f"alone_{side}_{index}"], kind)
    tail = arrays[f"tail_{side}"].tobytes() if f"tail_{side}" in arrays else source.tail
    return State(head, rows, tail, ids)


def ids_of(arrays: dict[str, np.ndarray], side: Side) -> np.ndarray:
    """The ids of the rows on one side of a difference."""
    if f"ids_{side}" in arrays:
        return np.cumsum(arrays[f"ids_{side}"])
    where = layout(arrays[f"head_{side}"].tobytes())
    return np.arange(where.count if where else 0)


def counts(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """How many rows a difference changed, added, removed."""
    before, after = ids_of(arrays, "before"), ids_of(arrays, "after")
    paired = len(before[pairs(before, after)[0]])
    any_xor = any(name.startswith("xor_") for name in arrays)
    changed = int(np.unpackbits(arrays["changed"]).sum()) if "changed" in arrays else paired * any_xor
    return {"changed": changed, "added": len(after) - paired, "removed": len(before) - paired}


def pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray | slice, np.ndarray | slice]:
    """Row numbers in both of the ids that both hold, in the same order; slices where all ids are the same."""
    if np.array_equal(first, second):
        return slice(None), slice(None)
    _, left, right = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    return left, right


def dump(arrays: dict[str, np.ndarray], stream: IO[bytes]) -> None:
    """Write arrays as .npz, which `numpy.load` reads. Compressed fast: the low bits of an edit are noise anyway."""
    import zipfile

    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _shared(before: np.dtype, after: np.dtype) -> list[str]:
    """Columns of the same name and type, in the order of `before`."""
    kept = set(after.names or ())
    return [name for name in before.names or () if name in kept and before[name] == after[name]]


def _others(count: int, chosen: np.ndarray | slice) -> np.ndarray:
    """Row numbers below `count` that are not chosen."""
    left = np.ones(count, bool)
    left[chosen] = False
    return left.nonzero()[0]


def _bits(column: np.ndarray) -> np.ndarray:
    """A column as unsigned integers of its width, byte order aside."""
    return np.ascontiguousarray(column).view(f"u{column.dtype.itemsize}")


def _planes(bits: np.ndarray) -> np.ndarray:
    """(m,) integers as (bytes, m) uint8: all first bytes, then all second ones; alike bytes side by side compress."""
    return np.ascontiguousarray(bits.view(np.uint8).reshape(-1, bits.itemsize).T)


def _joined(planes: np.ndarray, kind: np.dtype) -> np.ndarray:
    """The inverse of `_planes`, as a column of type `kind`."""
    return np.ascontiguousarray(planes.T).view(kind)[:, 0]


def _bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)
