""".spz as Niantic's library writes it: fixed-point and 8-bit columns, packed with gzip (2, 3) or zstd (4).

Spec: https://github.com/nianticlabs/spz, README.md and src/cc/load-spz.cc; extensions/README.md for the extensions.

Axes. The spec stores RUB axes (y up), but its own ply_to_spz and splat-transform 3 store those of the .ply untouched,
while splat-transform 2 turns .ply files from RDF (y down) to RUB and back. Here nothing is turned, and the extension
SPZ_ADOBE_coordinate_system says RDF, which is what tools that do turn take a .ply for: so a .spz written here opens in
each of them as the .ply would.
"""

from __future__ import annotations

import gzip
import struct
import warnings
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from splatedit.errors import InputError, LossWarning
from splatedit.formats.checks import check_write
from splatedit.formats.limits import check_count, check_unpacked, head
from splatedit.formats.packing import (
    ANTIALIASED,
    assemble,
    comment_losses,
    from_smallest_three,
    normalized,
    opacity_bytes,
    opacity_logits,
    render_mode,
    smallest_three,
    to_bytes,
)
from splatedit.gaussians import SH_REST, Gaussians

MAGIC = b"NGSP"
GZIP = b"\x1f\x8b"
VERSION = 3  # what is written by default: every tool reads it; 2 has coarser rotations, 4 is of 2026
VERSIONS = (2, 3, 4)
HEADER = struct.Struct("<4sIIBBBB")  # magic, version, count, SH degree, fractional bits, flags, streams (4) or 0
HEADER_4 = struct.Struct("<4sIIBBBBI12x")  # ... and where the table of streams starts
STREAM = struct.Struct("<QQ")  # packed and unpacked bytes
EXTENSION = struct.Struct("<II")  # type and bytes that follow

ANTIALIASED_FLAG, EXTENSIONS_FLAG, TREE_FLAG = 1, 2, 0x80  # the last one is Spark's
AXES = 0xADBE0003  # SPZ_ADOBE_coordinate_system: one uint32, an index into AXIS_NAMES
AXIS_NAMES = ("unspecified", "LDB", "RDB", "LUB", "RUB", "LDF", "RDF", "LUF", "RUF")
MAX_EXTENSIONS = 1 << 16  # bytes behind the columns that are looked at
MAX_BITS = 23  # of the 24 of a coordinate, behind the point

COLOUR = 0.15  # of 255 for one unit of sh0: wider than 0 to 1, so that higher degrees may bring it back
BITS = 12  # behind the point of a coordinate, what Niantic writes
SH_BITS = (8, 8)  # of 8, kept of degree 1 and of the higher ones; Niantic's (5, 4) pack better and are seen


class Header(NamedTuple):
    """What stands before the columns."""

    version: int
    count: int
    degree: int
    bits: int  # behind the point of a coordinate
    flags: int

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each column that is not empty, in the order of the file."""
        each = {
            "means": 9,
            "opacities": 1,
            "sh0": 3,
            "scales": 3,
            "quats": 3 if self.version == 2 else 4,
            "shN": 3 * SH_REST[self.degree],
        }
        return {name: self.count * size for name, size in each.items() if size}


# ----------------------------------------------------------------------------------------------------------------- read


def read_spz(path: Path) -> Gaussians:
    """Read a .spz file of version 2, 3 or 4; raises InputError for anything else, SH degree 4 too.

    Coordinates are kept as stored, whatever axes an extension names; that, and every other extension, is skipped and
    said by a LossWarning.
    """
    data = path.read_bytes()
    if data.startswith(GZIP) or data.startswith(MAGIC) and data[4:8] in (b"\2\0\0\0", b"\3\0\0\0"):
        header, columns, extensions = _read_stream(path, data)
    elif data.startswith(MAGIC):
        header, columns, extensions = _read_streams(path, data)
    else:
        found = f"a file that starts with {data[:12]!r}" if data else "an empty file"
        raise InputError(f"{path}: found {found}, expected gzip data or NGSP; this is not a .spz file.")
    _tell_extensions(path, extensions)
    comments = (ANTIALIASED,) if header.flags & ANTIALIASED_FLAG else ()
    return assemble(path, _unpacked(header, columns), comments)


def _header(path: Path, data: bytes, versions: tuple[int, ...]) -> Header:
    """The 16 bytes that all versions share, checked."""
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise InputError(
            f"{path}: found {data[:4]!r} ({len(data)} bytes), expected the 16 bytes of a header with NGSP."
        )
    _, version, count, degree, bits, flags, _ = HEADER.unpack_from(data)
    if version not in versions:
        expected = " or ".join(map(str, versions))
        raise InputError(f"{path}: found version {version}, expected {expected}; convert it with splat-transform.")
    if degree not in SH_REST:
        advice = f"drop the higher ones, e.g. `splat-transform {path.name} -H 3 {path.stem}.ply`"
        raise InputError(f"{path}: found spherical harmonics of degree {degree}, expected 0 to 3; {advice}.")
    if bits > MAX_BITS:
        raise InputError(f"{path}: found {bits} fractional bits, expected 0 to {MAX_BITS}; the header is damaged.")
    if flags & TREE_FLAG:
        raise InputError(
            f"{path}: found levels of detail as Spark builds them, coarse copies among the splats, expected a plain "
            "scene; give the file it was built from."
        )
    return Header(version, count, degree, bits, flags)


def _read_stream(path: Path, data: bytes) -> tuple[Header, dict[str, bytes], bytes]:
    """Header, columns and what lies behind them of versions 2 and 3: one gzip stream, or the same unpacked."""
    packed = data.startswith(GZIP)
    header = _header(path, head(path, data, HEADER.size, "gzip") if packed else data, (2, 3))
    size = HEADER.size + sum(header.sizes.values())
    if packed:
        check_unpacked(path, len(data), size)
        data = head(path, data, size + (MAX_EXTENSIONS if header.flags & EXTENSIONS_FLAG else 0), "gzip")
    check_count(path, header.count, (size - HEADER.size) / max(header.count, 1), len(data) - HEADER.size)
    columns, at = {}, HEADER.size
    for name, length in header.sizes.items():
        columns[name], at = data[at : at + length], at + length
    return header, columns, data[at:] if header.flags & EXTENSIONS_FLAG else b""


def _read_streams(path: Path, data: bytes) -> tuple[Header, dict[str, bytes], bytes]:
    """The same of version 4: a plain header, extensions, a table, and one zstd stream for each column."""
    header = _header(path, data, (4,))
    if len(data) < HEADER_4.size:
        raise InputError(f"{path}: found {len(data)} bytes, expected a header of {HEADER_4.size}; it is cut short.")
    *_, streams, table = HEADER_4.unpack_from(data)
    sizes = header.sizes
    check_unpacked(path, len(data), sum(sizes.values()))
    at = table + STREAM.size * streams
    if streams != len(sizes) or not HEADER_4.size <= table <= len(data) or at > len(data):
        raise InputError(
            f"{path}: the header promises {streams} streams, listed from byte {table} on; expected {len(sizes)} for "
            f"degree {header.degree} within the {len(data)} bytes of the file; it is damaged or cut short."
        )
    columns = {}
    for i, (name, size) in enumerate(sizes.items()):
        packed, unpacked = STREAM.unpack_from(data, table + STREAM.size * i)
        if unpacked != size or packed > len(data) - at:
            raise InputError(
                f"{path}: stream {i} ({name}) promises {unpacked} bytes in {packed}; expected {size} bytes for "
                f"{header.count} Gaussians in the {len(data) - at} that are left; it is damaged or cut short."
            )
        # Not limits.unpack: the file as a whole was checked, and one column of equal numbers may well pack better.
        columns[name] = head(path, data[at : at + packed], size + 1, "zstd", f"the stream of {name}")
        if len(columns[name]) != size:
            found = "more" if len(columns[name]) > size else len(columns[name])
            raise InputError(
                f"{path}: stream {i} ({name}) should unpack to {size} bytes, found {found}; it is damaged, copy or "
                "download it again."
            )
        at += packed
    check_count(path, header.count, 1, len(columns["opacities"]))
    return header, columns, data[HEADER_4.size : table] if header.flags & EXTENSIONS_FLAG else b""


def _tell_extensions(path: Path, data: bytes) -> None:
    """Warn of each extension record; what is not one ends the list."""
    skipped = []
    while len(data) >= EXTENSION.size:
        kind, size = EXTENSION.unpack_from(data)
        content, data = data[EXTENSION.size : EXTENSION.size + size], data[EXTENSION.size + size :]
        if kind == AXES and len(content) == 4:
            index = int.from_bytes(content, "little")
            axes = AXIS_NAMES[index] if index < len(AXIS_NAMES) else f"number {index}"
            if axes not in ("unspecified", "RDF"):
                skipped.append(f"the coordinate system {axes} (positions stay as stored; see --up)")
        elif kind:
            skipped.append(f"the extension {kind:#010x} ({size} bytes)")
    if skipped:
        warnings.warn(f"{path}: skipped {', '.join(skipped[:10])}.", LossWarning, stacklevel=3)


def _unpacked(header: Header, columns: dict[str, bytes]) -> dict[str, np.ndarray]:
    """The six parameters out of the columns."""
    n = header.count
    raw = {name: np.frombuffer(data, np.uint8).reshape(n, -1) for name, data in columns.items()}
    sh = raw.get("shN", np.empty((n, 0), np.uint8)).reshape(n, -1, 3)
    return {
        "means": _fixed(raw["means"]) / float(1 << header.bits),
        "quats": _first_three(raw["quats"]) if header.version == 2 else _ten_bits(columns["quats"]),
        "scales": raw["scales"] / 16.0 - 10.0,
        "opacities": opacity_logits(raw["opacities"][:, 0]),
        "sh0": ((raw["sh0"] / 255.0 - 0.5) / COLOUR)[:, None],
        "shN": (sh.astype(np.float32) - 128) / 128,
    }


def _fixed(raw: np.ndarray) -> np.ndarray:
    """Signed numbers of 24 bits, little-endian, (n, 9) bytes to (n, 3) int32."""
    wide = np.zeros((len(raw), 3, 4), np.uint8)
    wide[..., 1:] = raw.reshape(-1, 3, 3)
    return wide.view("<i4")[..., 0] >> 8  # the shift carries the sign along


def _first_three(raw: np.ndarray) -> np.ndarray:
    """x y z as bytes; w is positive and follows. (n, 3) to (n, 4), w x y z."""
    xyz = raw / 127.5 - 1
    w = np.sqrt(np.maximum(0.0, 1 - (xyz**2).sum(1, keepdims=True)))
    return np.concatenate([w, xyz], 1)


def _ten_bits(raw: bytes) -> np.ndarray:
    """The smallest three of x y z w: 2 bits say which is missing, then sign and 9 bits of each. (n, 4), w x y z."""
    words = np.frombuffer(raw, "<u4")[:, None] >> np.array([20, 10, 0], np.uint32)
    three = (words & 511) * (np.sqrt(0.5) / 511) * np.where(words & 512, -1, 1)
    return np.roll(from_smallest_three(words[:, 0] >> 10 & 3, three), 1, 1)


# ---------------------------------------------------------------------------------------------------------------- write


def write_spz(
    gaussians: Gaussians,
    stream: IO[bytes],
    path: Path,
    *,
    version: int = VERSION,
    bits: int | None = None,
    sh_bits: tuple[int, int] = SH_BITS,
) -> None:
    """Write a .spz file to a stream, in the order of the Gaussians; `path` is only named in errors.

    version: 2, 3 or 4. bits: how many of a coordinate's 24 stand behind the point, 0 to 23; None chooses by `bits_for`.
    sh_bits: how many of 8 are kept of degree 1 and of the higher ones, 1 to 8 each; fewer pack better.
    """
    if version not in VERSIONS:
        raise InputError(f"{path}: cannot write version {version} of .spz, expected one of 2, 3, 4; not written.")
    values = check_write(gaussians, path)
    reach = float(np.abs(values["means"]).max())
    bits = bits_for(reach) if bits is None else bits
    if reach * (1 << bits) > (1 << 23) - 1:
        raise InputError(
            f"{path}: the farthest coordinate is {reach:g}, expected at most {((1 << 23) - 1) / (1 << bits):g}, which "
            "is what .spz holds; remove Gaussians that lie so far out, or write another format; not written."
        )
    flags = EXTENSIONS_FLAG | (ANTIALIASED_FLAG if render_mode(gaussians.comments) == "mip" else 0)
    header = Header(version, gaussians.n, gaussians.sh_degree, bits, flags)
    columns = {name: column for name, column in _packed(header, values, sh_bits).items() if column}
    axes = EXTENSION.pack(AXES, 4) + AXIS_NAMES.index("RDF").to_bytes(4, "little")
    write = _write_streams if version == 4 else _write_stream
    stream.write(write(path, header, columns, axes))


def bits_for(reach: float) -> int:
    """How many bits stand behind the point where the farthest coordinate is `reach`.

    12 as Niantic writes, a step of 1/4096; more for a small scene, so that the step stays below 1/65536 of its width;
    fewer for one that reaches farther than 2048.
    """
    most = max((bits for bits in range(MAX_BITS + 1) if reach * (1 << bits) <= (1 << 23) - 1), default=0)
    fine = next((bits for bits in range(BITS, MAX_BITS) if reach * (1 << bits) >= 1 << 15), BITS)
    return min(most, fine)


def spz_losses(gaussians: Gaussians) -> list[str]:
    """What of these Gaussians a .spz file cannot hold, as noun phrases."""
    scales, sh0, shN = (value.detach() for value in (gaussians.scales, gaussians.sh0, gaussians.shN))
    reach = float(gaussians.means.detach().abs().max()) if gaussians.n else 0.0
    outside = {
        "scales below -10 or above 5.94": (scales < -10 - 1 / 32) | (scales > 255 / 16 - 10 + 1 / 32),
        "colours beyond the range": sh0.abs() > (0.5 + 0.5 / 255) / COLOUR,
        "spherical harmonics below -1 or above 1": shN.abs() > 1 + 1 / 256,
    }
    counts = {name: int(mask.reshape(gaussians.n, -1).any(1).sum()) for name, mask in outside.items()}
    steps = f"positions to 1/{1 << bits_for(reach)}, scales to 1/16; 10 bits for rotations, 8 for all else"
    return [
        *(f"{name} ({count} of {gaussians.n} Gaussians)" for name, count in counts.items() if count),
        f"precision ({steps})",
        *comment_losses(gaussians),
    ]


def _packed(header: Header, values: dict[str, np.ndarray], sh_bits: tuple[int, int]) -> dict[str, bytes]:
    """The columns in the order of the file."""
    n = header.count
    fixed = np.rint(values["means"].astype(np.float64) * (1 << header.bits)).astype("<i4")
    buckets = np.repeat([1 << (8 - b) for b in sh_bits], [3, 12])[: SH_REST[header.degree], None]
    # Every bucket is named by its lower edge, and 0, which is 128, is always one.
    level = np.rint(values["shN"] * 128).astype(np.int32) + 128
    quats = normalized(values["quats"])
    columns = {
        "means": fixed.view(np.uint8).reshape(n, 3, 4)[..., :3],
        "opacities": opacity_bytes(values["opacities"]),
        "sh0": to_bytes(255 * (0.5 + COLOUR * values["sh0"].astype(np.float64))),
        "scales": to_bytes(16 * (values["scales"].astype(np.float64) + 10)),
        "quats": _to_first_three(quats) if header.version == 2 else _to_ten_bits(quats),
        "shN": np.clip((level + buckets // 2) // buckets * buckets, 0, 255).astype(np.uint8),
    }
    return {name: column.tobytes() for name, column in columns.items()}


def _to_first_three(quats: np.ndarray) -> np.ndarray:
    turned = quats * np.where(quats[:, :1] < 0, -127.5, 127.5)
    return to_bytes(turned[:, 1:] + 127.5)


def _to_ten_bits(quats: np.ndarray) -> np.ndarray:
    largest, three = smallest_three(np.roll(quats, -1, 1))
    numbers = np.rint(np.abs(three) * (511 * np.sqrt(2))).astype(np.uint32) | (three < 0).astype(np.uint32) << 9
    words = largest.astype(np.uint32) << 30 | numbers[:, 0] << 20 | numbers[:, 1] << 10 | numbers[:, 2]
    return words.astype("<u4")


def _write_stream(path: Path, header: Header, columns: dict[str, bytes], extensions: bytes) -> bytes:
    start = HEADER.pack(MAGIC, header.version, header.count, header.degree, header.bits, header.flags, 0)
    return gzip.compress(b"".join([start, *columns.values(), extensions]), 6, mtime=0)


def _write_streams(path: Path, header: Header, columns: dict[str, bytes], extensions: bytes) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"{path}: version 4 of .spz is packed with zstd; `pip install 'splatedit[spz]'`.") from error
    packer = zstandard.ZstdCompressor(level=12)  # Niantic's level
    packed = [packer.compress(column) for column in columns.values()]
    table = HEADER_4.size + len(extensions)
    start = HEADER_4.pack(MAGIC, 4, header.count, header.degree, header.bits, header.flags, len(packed), table)
    sizes = [STREAM.pack(len(p), len(c)) for p, c in zip(packed, columns.values(), strict=True)]
    return b"".join([start, extensions, *sizes, *packed])
