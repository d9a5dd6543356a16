"""Masks on disk: `save` as JSON; `load` from that, from a list of rows or from a second splat file."""

from __future__ import annotations

import base64
import binascii
import json
import math
import operator
import re
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from splatedit.errors import InputError
from splatedit.files import atomic
from splatedit.formats import endings, format_of
from splatedit.masks import KINDS, NAMES, Indices, Mask, Matching

VERSION = 1  # of the files that `save` writes
DEEPEST = 100  # masks within masks that a file may hold
LARGEST = 2**30  # bytes of an array in a file
SHORT = 64  # numbers of an array that a file shows as a list


def save(mask: Mask, path: str | Path) -> None:
    """Write a mask as JSON, one file that needs no other; written whole or not at all. Raises InputError."""
    text = json.dumps({"splatedit_mask": VERSION, "mask": encode(mask)}, indent=1, allow_nan=False)
    with atomic(path) as stream:
        stream.write(text.encode() + b"\n")


def load(path: str | Path) -> Mask:
    """A mask from a file of `save`, a list of rows (.npy, .npz, .txt, .json) or a second splat file; raises InputError.

    Rows are whole numbers from 0, or one truth value for each Gaussian; .txt holds numbers between blanks, commas or
    line ends, `#` begins a comment; an .npz holds one array. A splat file stands for the Gaussians that it holds.
    """
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    form, splats = format_of(path), suffix not in ROWS or path.name.lower() == "meta.json"  # of a .sog folder
    if splats and (form is None or form.read is None):
        kinds = ", ".join((*ROWS, *endings(read=True)))
        raise InputError(f"{path}: cannot be a mask; expected a file that ends in one of {kinds}.")
    if splats:
        from splatedit.files import load as load_splats

        assert form is not None
        return Matching.of(load_splats(path), inside(path, form.name), path.name)
    try:
        content = ROWS[suffix](path)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except Exception as error:  # numpy's reader of .npy passes on what Python's tokenizer says of its header
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: not a sound {suffix} file ({reason}); expected a mask or a list of rows.") from None
    return content if isinstance(content, Mask) else rows_of(content, path)


def inside(path: Path, kind: str) -> str:
    """The format of a splat file that is there, by what is in it: a plain .ply may be a compressed one."""
    if kind != "ply":
        return kind
    with open(path, "rb") as stream:
        return "compressed_ply" if b"packed_position" in stream.read(4096) else kind


def rows_of(content: np.ndarray, path: Path) -> Indices:
    """Rows from whole numbers or truth values (k,); raises InputError for anything else."""
    if content.ndim == 1 and content.dtype == bool:
        return Indices(np.flatnonzero(content), len(content), path.name)
    if content.size == 0:
        content = content.reshape(-1).astype(np.int64)
    return Indices(content, None, path.name)


def read_numpy(path: Path) -> np.ndarray:
    content = np.load(path, allow_pickle=False, mmap_mode="r")  # mapped: the header cannot promise more than there is
    if isinstance(content, np.ndarray):
        return content
    with content as archive:
        if len(archive.files) != 1:
            raise ValueError(f"it holds {len(archive.files)} arrays, not one")
        return archive[archive.files[0]]


def read_txt(path: Path) -> np.ndarray:
    words = [w for line in path.read_text("utf-8").splitlines() for w in re.split(r"[\s,]+", line.split("#")[0]) if w]
    wrong = next((word for word in words if not word.isdecimal()), None)
    if wrong is not None:
        raise ValueError(f"found {wrong[:40]!r} where a row, a whole number from 0, was expected")
    return np.array([int(word) if len(word) < 12 else 2**40 for word in words], np.int64)


def read_json(path: Path) -> Mask | np.ndarray:
    content = json.loads(path.read_text("utf-8"))
    if isinstance(content, dict) and "splatedit_mask" in content:
        version = content["splatedit_mask"]
        if version != VERSION:
            raise InputError(
                f"{path}: a mask of version {version!r}, this splatedit reads {VERSION}; update splatedit."
            )
        try:
            return decode(content.get("mask"))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    if not isinstance(content, list) or not all(isinstance(v, int) for v in content):
        raise ValueError("neither a mask of splatedit nor a list of rows")
    if any(isinstance(v, bool) for v in content) and not all(isinstance(v, bool) for v in content):
        raise ValueError("rows and truth values together")
    return np.array([v if isinstance(v, bool) else max(-1, min(v, 2**40)) for v in content])


ROWS: dict[str, Callable[[Path], Mask | np.ndarray]] = {
    ".json": read_json,
    ".npy": read_numpy,
    ".npz": read_numpy,
    ".txt": read_txt,
}


def encode(value: Any) -> Any:
    """A mask, or what it is made of, as JSON knows it: every field by name, long arrays packed."""
    if isinstance(value, Mask):
        content = {f.name: encode(getattr(value, f.name)) for f in fields(value)}  # type: ignore[arg-type]
        return {"kind": NAMES[type(value)], **content}
    if isinstance(value, np.ndarray):
        if value.size <= SHORT:
            return {"type": value.dtype.str, "shape": list(value.shape), "list": value.ravel().tolist()}
        packed = base64.b64encode(zlib.compress(value.tobytes(), 6)).decode()
        return {"type": value.dtype.str, "shape": list(value.shape), "zlib": packed}
    return [encode(part) for part in value] if isinstance(value, (list, tuple)) else value


def decode(value: Any, depth: int = 0) -> Mask:
    """The mask of `encode`; raises InputError for what is none."""
    if depth > DEEPEST:
        raise InputError(f"masks lie in each other more than {DEEPEST} deep.")
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        found = value.get("kind") if isinstance(value, dict) else type(value).__name__
        raise InputError(f"mask: found {found!r}, expected one of {', '.join(KINDS)}.")
    kind = KINDS[value["kind"]]
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    given = {k: v for k, v in value.items() if k != "kind"}
    if given.keys() - known:
        raise InputError(f"{value['kind']}: unknown {', '.join(sorted(given.keys() - known))}.")
    for name, part in given.items():
        if isinstance(part, dict):
            given[name] = unpack(part, f"{value['kind']}: {name}") if "type" in part else decode(part, depth + 1)
        elif isinstance(part, list) and name == "masks":
            given[name] = [decode(p, depth + 1) for p in part]
    try:
        return kind(**given)
    except TypeError as error:
        raise InputError(f"{value['kind']}: {error}.") from None


def unpack(value: dict[str, Any], where: str) -> np.ndarray:
    """An array as `encode` wrote it; never larger than it says it is, never more than its bytes can hold."""
    try:
        kind, shape = np.dtype(value["type"]), [operator.index(side) for side in value["shape"]]
        count = math.prod(shape)
        if kind.kind not in "iuf" or min(shape, default=0) < 0 or count * kind.itemsize > LARGEST:
            raise ValueError("not an array of numbers of a sensible size")
        if "list" in value:
            return np.array(value["list"], kind).reshape(shape)
        unzip = zlib.decompressobj()
        data = unzip.decompress(base64.b64decode(value["zlib"], validate=True), count * kind.itemsize + 1)
        return np.frombuffer(data, kind).reshape(shape)
    except (KeyError, TypeError, ValueError, OverflowError, zlib.error, binascii.Error) as error:
        raise InputError(f"{where}: not a sound array ({error}).") from None
