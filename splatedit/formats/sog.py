""".sog, Spatially Ordered Gaussians of PlayCanvas: pictures of 8 bits and meta.json, as one zip or as a folder.

Spec of version 2: https://developer.playcanvas.com/user-manual/gaussian-splatting/formats/sog; version 1 as
splat-transform's read-sog-v1.ts reads it. Axes are those of the .ply: nothing is turned. splat-transform sorts by
Morton code, which packs better; the format does not ask for it, and here the order stays.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from splatedit.errors import InputError
from splatedit.formats.checks import check_write
from splatedit.formats.codebooks import codebook, palette
from splatedit.formats.limits import check_count, check_unpacked, member_name, parse_json, read_zip
from splatedit.formats.packing import (
    RENDER_MODE,
    assemble,
    comment_losses,
    from_smallest_three,
    normalized,
    opacity_bytes,
    opacity_logits,
    render_mode,
    smallest_three,
)
from splatedit.gaussians import SH_REST, Gaussians

META = "meta.json"
MAX_META = 1 << 22  # bytes
PALETTE = 1 << 16  # rows of higher harmonics at most: labels have 16 bits
ACROSS = 64  # palette rows side by side in their picture
QUATS = 252  # in the last channel, plus which of w x y z is the largest
MODELS = {"antialiased": "mip", "2dgs": "2dgs"}  # meta.json's `model`, and the same in the comment of a .ply
WORDS = {word: model for model, word in MODELS.items()}


class Picture(NamedTuple):
    """A picture that is not unpacked yet."""

    path: Path  # of the scene
    name: str
    data: bytes
    width: int  # as its header says
    height: int

    def pixels(self) -> np.ndarray:
        """(width x height, 4) uint8, row by row; raises InputError for a damaged one."""
        from PIL import Image

        try:
            image = Image.open(io.BytesIO(self.data), formats=("WEBP", "PNG"))
            if image.size != (self.width, self.height):
                raise ValueError("two sizes")
            return np.asarray(image.convert("RGBA")).reshape(-1, 4)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            text = "cut short or damaged; copy or download it again"
            raise InputError(f"{self.path}: the picture {self.name} is {text}.") from error


Pictures = dict[tuple[str, int], Picture]  # by the part of meta.json and which of its files


# ----------------------------------------------------------------------------------------------------------------- read


def read_sog(path: Path) -> Gaussians:
    """Read a .sog file, a folder with meta.json, or that meta.json; version 2, and 1, which has no version in it.

    Nothing is unpacked to disk. Raises InputError for whatever does not fit together.
    """
    get, available = _opened(path)
    meta = parse_json(path, get(META), META)
    if not isinstance(meta, dict):
        raise InputError(f"{path}: {META} holds {type(meta).__name__}, expected an object; export it again.")
    version = meta.get("version", 1)
    if version not in (1, 2):
        raise InputError(f"{path}: found version {version!r} of SOG, expected 1 or 2; convert it with splat-transform.")
    if version == 1:
        means = _part(path, meta, "means")
        count = means.get("count", (means.get("shape") or [None])[0])
    else:
        count = meta.get("count")
    if not isinstance(count, int) or isinstance(count, bool):
        raise InputError(f"{path}: {META}: found the count {count!r}, expected a whole number; export it again.")
    check_count(path, count, 0, 0)
    pictures = _pictures(path, meta, count, get, available)
    values = {"means": _means(path, meta, count, pictures), "quats": _quats(pictures["quats", 0].pixels()[:count])}
    values |= (_version_1 if version == 1 else _version_2)(path, meta, count, pictures)
    model = MODELS.get(str(meta.get("model")).lower())
    return assemble(path, values, (f"{RENDER_MODE} {model}",) if model else ())


def _opened(path: Path) -> tuple[Callable[[str], bytes], int]:
    """How to get a file of the scene by its name, and how many bytes all have together."""
    _check_name(path)
    if path.name == META or path.is_dir():
        folder = path if path.is_dir() else path.parent
        size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
        return lambda name: _from_folder(path, folder, name), size
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start != b"PK\3\4":
        found = f"a file that starts with {start!r}" if start else "an empty file"
        raise InputError(f"{path}: found {found}, expected a zip archive; this is not a .sog file.")
    files = read_zip(path)
    return lambda name: _from_zip(path, files, name), path.stat().st_size


def _check_name(path: Path) -> None:
    if path.suffix.lower() == ".json" and path.name != META:
        raise InputError(
            f"{path}: expected the name {META} for an unbundled SOG; of a streamed one (lod-meta.json) give one of the "
            "folders beside it."
        )


def _from_folder(path: Path, folder: Path, name: str) -> bytes:
    file = folder / member_name(path, name)
    if not file.is_file():
        raise InputError(f"{path}: no file {name!r}, which {META} names, in {folder}; copy or export it again.")
    if name == META and file.stat().st_size > MAX_META:
        raise InputError(f"{path}: {META} has {file.stat().st_size} bytes, expected at most {MAX_META}.")
    return file.read_bytes()


def _from_zip(path: Path, files: dict[str, bytes], name: str) -> bytes:
    data = files.get(member_name(path, name))
    if data is None:
        raise InputError(f"{path}: no file {name!r} in the archive, found {', '.join(sorted(files)[:9])}.")
    if name == META and len(data) > MAX_META:
        raise InputError(f"{path}: {META} has {len(data)} bytes, expected at most {MAX_META}.")
    return data


def _pictures(path: Path, meta: dict, count: int, get: Callable[[str], bytes], available: int) -> Pictures:
    """All pictures that meta.json names; raises InputError for one too small, and for more than the file can hold."""
    pictures = {}
    for part, files in {"means": 2, "scales": 1, "quats": 1, "sh0": 1, "shN": 2}.items():
        if part == "shN" and not meta.get("shN"):
            continue
        names = _part(path, meta, part).get("files")
        if not isinstance(names, list) or len(names) != files or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: {META}: {part}.files is {names!r:.80}, expected {files} file names.")
        for i, name in enumerate(names):
            data = get(name)
            width, height = _extent(data)
            if not width:
                raise InputError(f"{path}: {name} is not a WebP or PNG picture; export it again.")
            if (part, i) != ("shN", 0) and width * height < count:
                found = f"{width}x{height} pixels"
                raise InputError(f"{path}: {name} has {found}, expected one for each of {count} Gaussians.")
            pictures[part, i] = Picture(path, name, data, width, height)
    check_unpacked(path, available, sum(4 * p.width * p.height for p in pictures.values()), "all pictures together")
    return pictures


def _extent(data: bytes) -> tuple[int, int]:
    """Width and height by the header of a WebP or PNG picture, before a decoder allocates for it; 0 and 0 for others.

    https://developers.google.com/speed/webp/docs/riff_container; the 14-bit fields of VP8L hold the number less 1.
    """
    kind = data[12:16]
    if data[:8] == b"\x89PNG\r\n\x1a\n" and kind == b"IHDR":
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or kind not in (b"VP8L", b"VP8X", b"VP8 "):
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    bits = int.from_bytes(data[21:25] if kind == b"VP8L" else data[26:30], "little")
    if kind == b"VP8L":
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return bits & 0x3FFF, bits >> 16 & 0x3FFF


def _part(path: Path, meta: dict, name: str) -> dict[str, Any]:
    part = meta.get(name)
    if not isinstance(part, dict):
        raise InputError(f"{path}: {META}: {name} is {part!r:.80}, expected an object; export it again.")
    return part


def _numbers(path: Path, meta: dict, part: str, key: str, least: int, most: int | None = None) -> np.ndarray:
    """A list of finite numbers out of meta.json, float64; a single one counts as a list."""
    found = _part(path, meta, part).get(key)
    numbers = found if isinstance(found, list) else [found]
    good = all(isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < 1e30 for n in numbers)
    if not good or not least <= len(numbers) <= (most or least):
        expected = f"{least} numbers" if most is None else f"{least} to {most} numbers"
        raise InputError(f"{path}: {META}: {part}.{key} is {found!r:.80}, expected {expected}; export it again.")
    return np.array(numbers, np.float64)


def _look_up(path: Path, meta: dict, part: str, index: np.ndarray) -> np.ndarray:
    """The numbers of a codebook that bytes name."""
    book = _numbers(path, meta, part, "codebook", 1, 256)
    if index.size and int(index.max()) >= len(book):
        raise InputError(
            f"{path}: the codebook of {part} has {len(book)} entries, and entry {int(index.max())} is used; export it "
            "again."
        )
    return book.astype(np.float32)[index]


def _means(path: Path, meta: dict, count: int, pictures: Pictures) -> np.ndarray:
    """Positions: 16 bits between two ends of sign(x) log(1 + |x|)."""
    low, high = (_numbers(path, meta, "means", key, 3) for key in ("mins", "maxs"))
    fine, coarse = (pictures["means", i].pixels()[:count, :3].astype(np.uint16) for i in range(2))
    folded = low + (high - low) * ((fine | coarse << 8) / 65535.0)
    with np.errstate(over="ignore"):  # Inf is reported as such
        return np.sign(folded) * np.expm1(np.abs(folded))


def _quats(pixels: np.ndarray) -> np.ndarray:
    """w x y z from three bytes and a fourth that says which is missing; a fourth below QUATS is no rotation."""
    three = (pixels[:, :3] / 255.0 * 2 - 1) * np.sqrt(0.5)
    known = pixels[:, 3] >= QUATS
    quats = from_smallest_three(np.where(known, pixels[:, 3].astype(int) - QUATS, 0), three)
    return np.where(known[:, None], quats, [1.0, 0.0, 0.0, 0.0])


def _version_2(path: Path, meta: dict, count: int, pictures: Pictures) -> dict[str, np.ndarray]:
    """Codebooks, and opacities as such."""
    sh0 = pictures["sh0", 0].pixels()[:count]
    shN = _palette_rows(path, meta, count, pictures)
    return {
        "scales": _look_up(path, meta, "scales", pictures["scales", 0].pixels()[:count, :3]),
        "opacities": opacity_logits(sh0[:, 3]),
        "sh0": _look_up(path, meta, "sh0", sh0[:, None, :3]),
        "shN": _look_up(path, meta, "shN", shN) if shN.size else shN,
    }


def _version_1(path: Path, meta: dict, count: int, pictures: Pictures) -> dict[str, np.ndarray]:
    """Evenly spaced levels between two ends; opacities are logits."""

    def levels(part: str, raw: np.ndarray, numbers: int) -> np.ndarray:
        low, high = (_numbers(path, meta, part, key, numbers) for key in ("mins", "maxs"))
        return low + (high - low) * (raw / 255.0)

    sh0 = levels("sh0", pictures["sh0", 0].pixels()[:count], 4)
    shN = _palette_rows(path, meta, count, pictures)
    return {
        "scales": levels("scales", pictures["scales", 0].pixels()[:count, :3], 3),
        "opacities": sh0[:, 3],
        "sh0": sh0[:, None, :3],
        "shN": levels("shN", shN, 1) if shN.size else shN,
    }


def _palette_rows(path: Path, meta: dict, count: int, pictures: Pictures) -> np.ndarray:
    """Bytes of the higher harmonics of each Gaussian, (count, k, 3): its row of the palette; k is 0 without one."""
    if ("shN", 0) not in pictures:
        return np.zeros((count, 0, 3), np.uint8)
    name, width = pictures["shN", 0].name, pictures["shN", 0].width
    bands = {ACROSS * k: degree for degree, k in SH_REST.items()}.get(width)
    if not bands or meta["shN"].get("bands", bands) != bands:
        raise InputError(
            f"{path}: {name} is {width} pixels wide for {meta['shN'].get('bands', 'unknown')} bands, expected "
            f"{ACROSS} times 3, 8 or 15 for 1, 2 or 3; export it again."
        )
    k = SH_REST[bands]
    palette_rows = pictures["shN", 0].pixels()[:, :3].reshape(-1, k, 3)
    labels = pictures["shN", 1].pixels()[:count].astype(np.int64)
    index = labels[:, 0] | labels[:, 1] << 8
    if int(index.max()) >= len(palette_rows):
        raise InputError(
            f"{path}: {name} has {len(palette_rows)} rows, and row {index.max()} is used; export it again."
        )
    return palette_rows[index]


# ---------------------------------------------------------------------------------------------------------------- write


def write_sog(gaussians: Gaussians, stream: IO[bytes], path: Path) -> None:
    """Write version 2 to a stream, in the order of the Gaussians: a zip, or meta.json if that is the path's name.

    Then the pictures are written beside it; they replace those that were there once all are complete, meta.json last.
    """
    _check_name(path)
    files = _packed(gaussians, path)
    if path.name != META:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name), data)  # of 1980: the same scene makes the same file
        return
    from splatedit.files import atomic  # files lists the formats

    stream.write(files.pop(META))
    with ExitStack() as pictures:
        for name, data in files.items():
            pictures.enter_context(atomic(path.parent / name)).write(data)


def sog_losses(gaussians: Gaussians) -> list[str]:
    """What of these Gaussians a .sog file cannot hold, as noun phrases."""
    losses = ["precision (16 bits for positions, 8 for rotations and opacities, 256 different scales, and colours)"]
    if gaussians.sh_degree:
        losses += [f"more than {palette_size(gaussians.n)} different sets of harmonics, of 256 different numbers"]
    return losses + comment_losses(gaussians)


def palette_size(n: int) -> int:
    """Rows of the palette for n Gaussians: the largest power of 2 up to n, PALETTE at most, as splat-transform has."""
    return min(PALETTE, 1 << (n.bit_length() - 1))


def _packed(gaussians: Gaussians, path: Path) -> dict[str, bytes]:
    """All files by name, meta.json first."""
    values = check_write(gaussians, path)
    n = gaussians.n
    width = 4 * math.ceil(math.sqrt(n) / 4)  # multiples of 4, as splat-transform writes
    height = 4 * math.ceil(n / width / 4)
    low, high, levels = _levels(values["means"])
    largest, three = smallest_three(normalized(values["quats"]))
    scales, scale_index = codebook(values["scales"])
    colours, colour_index = codebook(values["sh0"][:, 0])
    planes = {
        "means_l": levels & 255,
        "means_u": levels >> 8,
        "quats": np.column_stack([np.rint(255 * (three * np.sqrt(0.5) + 0.5)), QUATS + largest]),
        "scales": scale_index,
        "sh0": np.column_stack([colour_index, opacity_bytes(values["opacities"])]),
    }
    mode = render_mode(gaussians.comments)
    meta: dict[str, Any] = {
        "version": 2,
        "asset": {"generator": "splatedit"},
        "count": n,
        "means": {"mins": low.tolist(), "maxs": high.tolist(), "files": ["means_l.webp", "means_u.webp"]},
        "scales": {"codebook": scales.tolist(), "files": ["scales.webp"]},
        "quats": {"files": ["quats.webp"]},
        "sh0": {"codebook": colours.tolist(), "files": ["sh0.webp"]},
    }
    if mode in WORDS:
        meta["model"] = WORDS[mode]
    pictures = {f"{name}.webp": _webp(plane, width, height) for name, plane in planes.items()}
    if gaussians.sh_degree:
        meta["shN"], planes = _harmonics(values["shN"])
        centroids, labels = planes
        across = ACROSS * values["shN"].shape[1]
        pictures["shN_centroids.webp"] = _webp(centroids, across, math.ceil(len(centroids) / across))
        pictures["shN_labels.webp"] = _webp(labels, width, height)
    return {META: json.dumps(meta).encode(), **pictures}


def _levels(means: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both ends of sign(x) log(1 + |x|), (3,) each, and which of 65536 steps between them each position is at."""
    folded = np.sign(means) * np.log1p(np.abs(means.astype(np.float64)))
    low, high = folded.min(0), folded.max(0)
    return low, high, np.rint(65535 * (folded - low) / np.where(high > low, high - low, 1)).astype(np.uint16)


def _harmonics(shN: np.ndarray) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Of (n, k, 3): what meta.json says, the pixels of the palette (rows x k, 3), and those of the labels (n, 2)."""
    n, k, _ = shN.shape
    rows, labels = palette(shN.reshape(n, -1), palette_size(n))
    book, index = codebook(rows)
    meta = {
        "count": len(rows),
        "bands": {k: degree for degree, k in SH_REST.items()}[k],
        "codebook": book.tolist(),
        "files": ["shN_centroids.webp", "shN_labels.webp"],
    }
    return meta, (index.reshape(-1, 3), np.column_stack([labels & 255, labels >> 8]))


def _webp(pixels: np.ndarray, width: int, height: int) -> bytes:
    """A lossless WebP of (n, 1 to 4) bytes, row by row; colour that is missing is 0, and alpha 255."""
    from PIL import Image

    full = np.zeros((width * height, 4), np.uint8)
    full[:, 3] = 255
    full[: len(pixels), : pixels.shape[1]] = pixels
    out = io.BytesIO()
    # Without `exact`, colour under an alpha of 0 is thrown away.
    Image.fromarray(full.reshape(height, width, 4)).save(out, "WEBP", lossless=True, exact=True, quality=75, method=4)
    return out.getvalue()
