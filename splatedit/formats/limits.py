"""What a file may make us allocate: counts held against bytes, bounded unpacking, zip and JSON that cannot hurt.

A header is a claim. Every reader asks here before it allocates for one, so that a lying file costs what it weighs.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from splatedit.errors import InputError

RATIO = 200  # unpacked bytes per packed one; splats pack 2 to 10 times, a bomb 1000 times and more
FREE = 1 << 20  # bytes anything may unpack to, however small it is: a few thousand equal Gaussians pack very well
MEMBERS = 1000  # files in a zip; a .sog has about ten


def check_count(path: Path, count: int, bytes_each: float, available: int, what: str = "Gaussians") -> None:
    """Raise InputError unless 1 or more items of `bytes_each` fit into the `available` bytes that the file has."""
    if count < 1:
        raise InputError(f"{path}: the header promises {count} {what}, expected at least 1; the scene is empty.")
    if count * bytes_each > available:
        raise InputError(
            f"{path}: the header promises {count} {what} ({count * bytes_each:.0f} bytes), the file holds {available} "
            "bytes for them; it is cut short or damaged, copy or download it again."
        )


def check_unpacked(path: Path, packed: int, unpacked: int, what: str = "it") -> None:
    """Raise InputError if `packed` bytes claim to unpack to more than splats ever do: a decompression bomb."""
    if unpacked > max(FREE, RATIO * packed):
        raise InputError(
            f"{path}: {what} would unpack from {packed} to {unpacked} bytes, expected at most {RATIO} times; "
            "the file is damaged or made to exhaust the memory, do not use it."
        )


def unpack(path: Path, packed: bytes, size: int, method: str, what: str = "the packed data") -> bytes:
    """Exactly `size` bytes out of `packed`; `method` is a key of UNPACKERS.

    Raises InputError for damaged data, for less or more than `size` bytes and for a ratio no splat reaches.
    """
    check_unpacked(path, len(packed), size, what)
    out = head(path, packed, size + 1, method, what)
    if len(out) != size:
        found = f"only {len(out)}" if len(out) < size else "more than that"
        raise InputError(
            f"{path}: {what} should unpack to {size} bytes, found {found}; it is cut short or damaged, "
            "copy or download it again."
        )
    return out


def head(path: Path, packed: bytes, size: int, method: str, what: str = "the packed data") -> bytes:
    """The first `size` unpacked bytes, or fewer where there are no more; nothing beyond them is unpacked.

    Raises InputError for damaged data.
    """
    try:
        return UNPACKERS[method](packed, size)
    except ImportError as error:
        raise InputError(f"{path}: {what} is packed with {method}; install the package {error.name}.") from error
    except Exception as error:  # zlib.error, ZstdError: the unpackers share no other base class
        text = " ".join(str(error).split())
        raise InputError(
            f"{path}: {what} is not sound {method} data ({text}); copy or download the file again."
        ) from error


def _zlib(packed: bytes, size: int, wbits: int = zlib.MAX_WBITS) -> bytes:
    return zlib.decompressobj(wbits).decompress(packed, size) if size else b""


def _gzip(packed: bytes, size: int) -> bytes:
    """All members of a gzip file, as gunzip reads them; each checks its CRC when it ends within `size`."""
    out = b""
    while packed and len(out) < size:
        stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
        out += stream.decompress(packed, size - len(out))
        if not stream.eof:
            break
        packed = stream.unused_data.lstrip(b"\0")
    return out


def _zstd(packed: bytes, size: int) -> bytes:
    """The first frame. Its window is allocated before the data is seen: no more than the data may need."""
    import zstandard

    window = max(1 << 10, 1 << (max(size, 1) - 1).bit_length())
    stream = zstandard.ZstdDecompressor(max_window_size=max(window, 1 << 23)).stream_reader(packed)
    return stream.read(size) if size else b""


UNPACKERS: dict[str, Callable[[bytes, int], bytes]] = {"zlib": _zlib, "gzip": _gzip, "zstd": _zstd}


def read_zip(path: Path) -> dict[str, bytes]:
    """All files of a zip archive by name, in memory: nothing is written to disk.

    Raises InputError for a damaged or encrypted archive, for names that lead out of it or come twice, for more than
    MEMBERS files and for a ratio no splat reaches.
    """
    packed = path.stat().st_size
    check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            check_unpacked(path, packed, sum(info.file_size for info in infos), "the zip archive")
            names = [member_name(path, info.filename) for info in infos]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise InputError(f"{path}: the zip archive holds {twice!r} twice; pack it again.")
            return {name: archive.read(info) for name, info in zip(names, infos, strict=True)}
    except (InputError, OSError):
        raise
    except (
        Exception
    ) as error:  # BadZipFile, zlib.error, NotImplementedError, RuntimeError (encrypted), struct.error ...
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: damaged zip archive ({text}); copy or download it again.") from error


def check_directory(path: Path, most: int = MEMBERS) -> None:
    """Raise InputError for a zip that lists more than `most` files: `zipfile` reads the whole list before one can look.

    The end record is the last one with its signature, at most 64 KiB before the end of the file (APPNOTE.TXT 4.3.16);
    the larger numbers of Zip64 stand in a record before it (4.3.14).
    """
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - (1 << 16) - 98))
        tail = stream.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        raise InputError(f"{path}: damaged zip archive (its end is missing); copy or download it again.")
    entries, size = struct.unpack_from("<HI", tail, at + 10)
    wide = tail.rfind(b"PK\6\6", 0, at)
    if wide >= 0 and len(tail) >= wide + 56:
        entries, size = struct.unpack_from("<QQ", tail, wide + 32)
    if entries > most or size > most * 300:
        raise InputError(
            f"{path}: the zip archive lists {entries} files in {size} bytes, expected at most {most} files."
        )


def member_name(path: Path, name: str) -> str:
    """The name of a file inside an archive or a folder, checked; raises InputError if it leads out of it."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or "\0" in name or ".." in parts or parts[0] == "/" or ":" in parts[0]:
        raise InputError(
            f"{path}: names the file {name[:80]!r}, which lies outside of it; the file is damaged or malicious."
        )
    return "/".join(parts)


def parse_json(path: Path, data: bytes | str, what: str = "") -> Any:
    """JSON from UTF-8 with or without a byte-order mark; `what` names the part of the file it is, if not all.

    Raises InputError with line and column, also for a nesting too deep for the parser and numbers too long for it.
    """
    where = f"{path}: {what}" if what else f"{path}:"
    try:
        return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where} not valid JSON, {place}: {error.msg}; repair it or export it again.") from error
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1]
        raise InputError(
            f"{where} holds the byte {found!r} at {error.start}, expected JSON in UTF-8; export it again."
        ) from error
    except RecursionError as error:
        raise InputError(f"{where} is nested too deep for JSON that describes a scene; export it again.") from error
    except ValueError as error:
        raise InputError(f"{where} not valid JSON ({' '.join(str(error).split())}); export it again.") from error
