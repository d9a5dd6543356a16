"""What the fuzz test mutates: sound files of every kind that splatedit reads, and the ways in which they are spoilt."""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from splatedit.formats import FORMATS
from splatedit.gaussians import Gaussians

Files = dict[str, bytes]  # name within a case's folder -> content
SECRET = "secret.webp"  # lies outside of the case's folder; opening it is a failure
CANARY = "canary"  # code that runs makes this file beside the case's folder

Mutator = Callable[[random.Random, Files], Files]


class Subject(NamedTuple):
    """One kind of input."""

    name: str
    given: str  # the path that `read` gets, within the case's folder; "." is the folder
    samples: Callable[[], list[Files]]  # sound ones
    read: Callable[[Path], Any]
    mutators: tuple[Mutator, ...]
    anywhere: bool = False  # whether it may name files outside of its folder, as transforms.json does pictures


# ----------------------------------------------------------------------------------------------------------- any bytes

EDGES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
FLOATS = (float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, 0.0, -1.0)


def spot(rng: random.Random, data: bytes) -> int:
    """A place in the data; every second one is among the first 64 bytes, where headers are."""
    return rng.randrange(min(len(data), 64) if rng.random() < 0.5 else len(data)) if data else 0


def flip(rng: random.Random, data: bytes) -> bytes:
    """Flip 1 to 8 bits."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        out[spot(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(rng: random.Random, data: bytes) -> bytes:
    """Cut the end off."""
    return data[: rng.choice((rng.randrange(len(data) + 1), max(len(data) - rng.randrange(9), 0), rng.randrange(40)))]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """Put an integer of 1 to 8 bytes that is likely to hurt somewhere, in either byte order."""
    size = rng.choice((1, 2, 4, 4, 8))
    number = rng.choice((*EDGES, rng.randrange(1 << 24), rng.getrandbits(64))) & ((1 << 8 * size) - 1)
    at = spot(rng, data) & ~(size - 1)
    return data[:at] + number.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def poison(rng: random.Random, data: bytes) -> bytes:
    """Put NaN, infinity or a huge float somewhere."""
    number = struct.pack(rng.choice(("<f", ">f", "<d")), rng.choice(FLOATS))
    at = spot(rng, data) & ~3
    return data[:at] + number + data[at + len(number) :]


def rearrange(rng: random.Random, data: bytes) -> bytes:
    """Drop, repeat, blank or move a piece."""
    a, b = sorted((spot(rng, data), spot(rng, data)))
    piece = data[a:b]
    return rng.choice(
        (
            data[:a] + data[b:],
            data[:b] + piece * rng.choice((1, 2, 9)) + data[b:],
            data[:a] + bytes(b - a) + data[b:],
            data[:a] + b"\xff" * (b - a) + data[b:],
            piece + data[:a] + data[b:],
        )
    )


def append(rng: random.Random, data: bytes) -> bytes:
    """Add bytes at the end, or at the start."""
    more = rng.choice(
        (rng.randbytes(rng.randrange(1, 400)), bytes(rng.randrange(1, 400)), data, b"\n", b"\xef\xbb\xbf")
    )
    return data + more if rng.random() < 0.7 else more + data


def replace(rng: random.Random, data: bytes) -> bytes:
    """Something else altogether."""
    return rng.choice(
        (
            b"",
            b"\0" * len(data),
            rng.randbytes(rng.randrange(1, 2000)),
            b"<!DOCTYPE html><html></html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            gzip.compress(data[: 1 << 16]),
            evil_pickle(),
            b"PK\x05\x06" + bytes(18),
            b"ply\n",
            data.decode("latin1").encode(rng.choice(("utf-16", "utf-8"))),
        )
    )


def damage(rng: random.Random, data: bytes) -> bytes:
    """One of the above."""
    ways = (flip, flip, truncate, overwrite, overwrite, poison, rearrange, append, replace)
    return rng.choice(ways)(rng, data)


def damaged(rng: random.Random, files: Files) -> Files:
    """Damage one or two files; seldom take one away."""
    out = dict(files)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(out))
        if len(out) > 1 and rng.random() < 0.05:
            del out[name]
        else:
            out[name] = damage(rng, out[name])
    return out


# ---------------------------------------------------------------------------------------------------------------- text

WORDS = (
    "nan inf -inf -1 0 1e999 1e38 99999999999999999999 0x10 1_000 1.5 -0 x true . é ½ ١ \x1b[31m \0 \u2028 ../x".split(
        " "
    )
)
WORDS += ["", "9" * 5000, "x" * 5000, "%s%n", "float", "list", "double", "uchar", "ascii", "1 2 3"]


def reword(rng: random.Random, text: bytes) -> bytes:
    """Exchange, drop or repeat words and lines; seldom another encoding."""
    lines = text.split(b"\n")
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(lines))
        words = lines[at].split(b" ")
        way = rng.random()
        if way < 0.5:
            words[rng.randrange(len(words))] = rng.choice(WORDS).encode()
            lines[at] = b" ".join(words)
        elif way < 0.65:
            del words[rng.randrange(len(words))]
            lines[at] = b" ".join(words)
        elif way < 0.75:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif way < 0.9 and len(lines) > 1:
            del lines[at]
        else:
            lines.insert(at, rng.choice((b"", b"x" * 100_000, lines[at] * 50, b"comment " + rng.randbytes(20))))
    out = b"\n".join(lines)
    if rng.random() < 0.1:
        out = out.decode("latin1").encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    return out.replace(b"\n", b"\r\n") if rng.random() < 0.05 else out


def reworded(rng: random.Random, files: Files) -> Files:
    """Reword one file; of a .ply the header alone."""
    name = rng.choice(sorted(files))
    head, mark, body = files[name].partition(b"end_header\n")
    return {**files, name: reword(rng, head) + mark + body}


COUNTS = (0, -1, 1, 10**5, 10**6, 10**9, 2**31 - 1, 2**32, 2**63, 10**30)


def lying(rng: random.Random, files: Files) -> Files:
    """A .ply whose header promises another number of rows, or other columns."""
    ((name, data),) = files.items()
    head, mark, body = data.partition(b"end_header\n")
    lines = head.split(b"\n")
    at = rng.choice([i for i, line in enumerate(lines) if line.startswith((b"element", b"property"))] or [0])
    words = lines[at].split()
    if words[:1] == [b"element"]:
        count = int(words[2]) if words[-1].isdigit() else 1
        words[2:] = [str(rng.choice((*COUNTS, count - 1, count + 1, 2 * count))).encode()]
    else:
        kind = rng.choice((b"double", b"uchar", b"int", b"list uchar int", b"list int double", b"half", b"float float"))
        words[1:2] = [kind]
    lines[at] = b" ".join(words)
    return {name: b"\n".join(lines) + mark + body}


YAML = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "up: *i\n",
    f"source_prompt: !!python/object/apply:os.system ['touch ../{CANARY}']\n",
    "source_prompt: " + "[" * 20_000,
    "source_prompt: " + "{a: " * 500 + "1" + "}" * 500,
    "source_prompt: &a [*a]\n",
    "a: &a\n  <<: *a\nup: -y\n",
    "up: 2026-11-21\n",
    "up: 2026-99-99\n",
    "up: !!binary x\n",
    "up: 1:60:60:60\n",
    "? [a, b]\n: c\n",
    "steps: ${steps}\nprompt: ${oc.env:HOME}\n",
    "? {}\n: 1\n",
)


def yamls(rng: random.Random, files: Files) -> Files:
    """What yaml can be that nobody writes as a setting."""
    ((name, data),) = files.items()
    return {name: rng.choice((b"", data)) + rng.choice(YAML).encode()}


# ---------------------------------------------------------------------------------------------------------------- JSON

ATOMS: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    0.5,
    2**31,
    2**63,
    10**30,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
)
ATOMS += (
    "",
    "nan",
    "é" * 9,
    "x" * 20_000,
    f"../{SECRET}",
    f"../../{SECRET}",
    "/etc/passwd",
    "..",
    ".",
    "\0",
    "\x1b[31m\n",
    "\u2028",
)
ATOMS += ([], {}, [[]], [None] * 4, [1.0] * 3, [[0.0] * 4] * 4, {"a": 1}, "\ud800")
RAW = {  # what json.dumps cannot write: placeholders, exchanged in the text
    "@deep": "[" * 3000 + "]" * 3000,
    "@deepest": "[" * 200_000,
    "@deepkeys": '{"a":' * 3000 + "1" + "}" * 3000,
    "@digits": "9" * 6000,
    "@huge": "1e999",
    "@many": "[" + ",".join(["0"] * 30_000) + "]",
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key or index) in a tree."""
    own = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [(value, key) for key, _ in own] + [place for _, inner in own for place in places(inner)]


def retree(rng: random.Random, text: bytes) -> bytes:
    """Exchange, drop, repeat or rename nodes of a JSON text."""
    try:
        box = [json.loads(text)]
    except ValueError:
        return damage(rng, text)
    for _ in range(rng.choice((1, 1, 1, 3))):
        inside, key = rng.choice(places(box))
        way = rng.random()
        if way < 0.7:
            inside[key] = copy.deepcopy(rng.choice((*ATOMS, *RAW)))
        elif way < 0.85 and inside is not box:
            del inside[key]
        elif way < 0.95 and isinstance(inside, list):
            inside.insert(key, copy.deepcopy(rng.choice(inside)))
        elif isinstance(inside, dict):
            inside[rng.choice(("", "x", key.upper(), "frames", "version"))] = inside.pop(key)
    out = json.dumps(box[0])
    for word, raw in RAW.items():
        out = out.replace(f'"{word}"', raw)
    return out.encode(rng.choice(("utf-16", "utf-8-sig", "latin1"))) if rng.random() < 0.05 else out.encode()


def retreed(rng: random.Random, files: Files) -> Files:
    """Change the tree of one JSON file."""
    name = rng.choice([name for name in sorted(files) if name.endswith(".json")])
    return {**files, name: retree(rng, files[name])}


# ------------------------------------------------------------------------------------------------------ gzip and zip


def regzipped(rng: random.Random, files: Files) -> Files:
    """Damage what is packed inside a gzip stream, and pack it again; sometimes as a bomb with a fitting header."""
    ((name, data),) = files.items()
    if data.startswith(b"NGSP"):
        return {name: restreamed(rng, data)}
    inner = gzip.decompress(data)
    if rng.random() < 0.1:
        many = rng.choice((10**5, 10**6, 10**7, 2**32 - 1))
        bomb = zlib.compressobj(1, zlib.DEFLATED, 31)
        return {name: bomb.compress(inner[:8] + struct.pack("<I", many) + inner[12:16] + zeros()) + bomb.flush()}
    return {name: gzip.compress(damage(rng, inner), 1)}


def restreamed(rng: random.Random, data: bytes) -> bytes:
    """Damage what is packed in the zstd streams of an .spz of version 4, or make them a bomb that fits its header."""
    import zstandard

    count, streams, table = (struct.unpack_from(code, data, at)[0] for code, at in (("<I", 8), ("B", 15), ("<I", 16)))
    sizes = [struct.unpack_from("<QQ", data, table + 16 * i) for i in range(streams)]
    many, at, head, body = count, table + 16 * streams, bytearray(data[:table]), []
    bomb = rng.random() < 0.2
    if bomb:
        many = rng.choice((10**5, 10**6))
        struct.pack_into("<I", head, 8, many)
    chosen, lengths = rng.randrange(streams), []
    for i, (packed, unpacked) in enumerate(sizes):
        piece = zeros()[: unpacked // count * many] if bomb else zstandard.decompress(data[at : at + packed])
        piece = damage(rng, piece) if i == chosen and not bomb else piece
        body.append(zstandard.compress(piece, rng.choice((1, 3))))
        lengths.append(struct.pack("<QQ", len(body[-1]), len(piece) if rng.random() < 0.9 else unpacked))
        at += packed
    return bytes(head) + b"".join(lengths) + b"".join(body)


@functools.cache
def zeros() -> bytes:
    """64 MiB, much more than any file here may take."""
    return bytes(1 << 26)


@functools.cache
def bomb_zip() -> bytes:
    """A zip archive of 64 KiB that unpacks to 64 MiB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("means_l.webp", zeros())
    return out.getvalue()


@functools.cache
def bomb_picture() -> bytes:
    """A lossless WebP of a few KiB and 4096 x 4096 pixels."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGBA", (4096, 4096)).save(out, "WEBP", lossless=True, quality=0, method=0)
    return out.getvalue()


def unzip(data: bytes) -> Files:
    """All files of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rezip(members: list[tuple[str, bytes]], packed: bool = False) -> bytes:
    """An archive of these, in this order, names given twice included."""
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name or "x")
            info.filename, info.compress_type = name, kind
            try:
                archive.writestr(info, content)
            except (ValueError, IndexError, UnicodeError, UserWarning):
                continue  # a name that cannot even be written
    return out.getvalue()


def rezipped(rng: random.Random, files: Files) -> Files:
    """Damage a file inside a zip archive, its name or the archive; or make a bomb of it."""
    ((name, data),) = files.items()
    members = list(unzip(data).items())
    at = rng.randrange(len(members))
    inner, content = members[at]
    way = rng.random()
    if way < 0.5:
        inside = retree if inner.endswith(".json") and rng.random() < 0.8 else damage
        members[at] = (inner, inside(rng, content))
    elif way < 0.65:
        bad = rng.choice(
            (f"../{SECRET}", "/etc/passwd", "..", "C:\\x", "a\\..\\..\\b", "", ".", "x/" + inner, "é\0x", "/" + inner)
        )
        members[at] = (bad, content)
    elif way < 0.7:
        members.append((inner, damage(rng, content)))
    elif way < 0.75:
        del members[at]
    elif way < 0.8:
        members += [(f"{i}", b"") for i in range(3000)]
    elif way < 0.85:
        members[at] = (inner, rng.choice((bomb_picture(), zeros())))
        return {name: rezip(members, packed=True)}
    elif way < 0.9:
        members[at] = (inner, bomb_picture())
    else:
        return {name: rng.choice((bomb_zip(), overwrite(rng, rezip(members)[-80 * len(members) :]), damage(rng, data)))}
    return {name: rezip(members, packed=rng.random() < 0.3)}


# ------------------------------------------------------------------------------------------------------------- pickles


class Evil:
    """Unpickled, it would make the canary."""

    def __reduce__(self) -> tuple:
        return exec, (f"open('../{CANARY}', 'w')",)


def evil_pickle() -> bytes:
    """A pickle that makes the canary."""
    return pickle.dumps(Evil(), 2)


def dotted(module: str, name: str, argument: bytes) -> bytes:
    """A pickle that calls module.name(argument), the argument pickled already."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


EVIL = (
    evil_pickle,
    lambda: b"\x80\x02c__builtin__\nexec\n" + pickle.dumps((f"open('../{CANARY}', 'w')",), 2)[2:-1] + b"R.",
    lambda: pickle.dumps({"splats": Evil()}, 4),
    lambda: dotted("posix", "system", pickle.dumps(f"touch ../{CANARY}", 2)[2:-1]),
    lambda: dotted("__builtin__", "bytearray", pickle.dumps(10**9, 2)[2:-1]),
    lambda: dotted("torch", "load", pickle.dumps(f"../{SECRET}", 2)[2:-1]),
    lambda: dotted(
        "numpy.core.multiarray", "scalar", b"cnumpy\ndtype\n" + pickle.dumps("V1000000000", 2)[2:-1] + b"\x85R"
    ),
    lambda: b"\x80\x02)" + b"\x85" * 200_000 + b"}q\x00j\x00\x00\x00\x00s.",
    lambda: b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    lambda: b"\x80\x02X\xff\xff\xff\x7fabc.",
    lambda: b"\x80\x04\x95" + b"\xff" * 8 + b".",
    lambda: b"(dp0\nS'splats'\nV" + b"x" * 1000 + b"\ns.",
)


def spoilt_tensor(rng: random.Random, value: torch.Tensor) -> Any:
    """Something else in the place of a tensor."""
    bad = value.clone()
    if bad.numel() and bad.is_floating_point():
        bad.view(-1)[rng.randrange(bad.numel())] = rng.choice(FLOATS)
    ways: tuple[Callable[[], Any], ...] = (
        lambda: bad,
        lambda: value[:-1],
        lambda: value[:0],
        lambda: value[None],
        lambda: value.to(
            rng.choice((torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.uint8))
        ),
        lambda: value.to(torch.complex64),
        lambda: value[:1].expand(rng.choice((10**6, 10**9, 10**12)), *value.shape[1:]) if len(value) else value,
        lambda: value.to_sparse(),
        lambda: torch.empty(rng.choice((value.shape, (10**12, 3))), device="meta"),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda: torch.nn.Parameter(value.float()),
        lambda: value.t() if value.ndim == 2 else value,
        lambda: value.reshape(-1),
        lambda: value.tolist()[:5],
        lambda: torch.tensor(3.0),
        lambda: rng.choice((None, "x", 5, [], {}, (), b"abc", np.float32(1), np.zeros(3), Evil())),
    )
    return rng.choice(ways)()


def resaved(rng: random.Random, files: Files) -> Files:
    """Exchange tensors in a checkpoint, or its pickle, or its records."""
    name = rng.choice(sorted(files))
    way = rng.random()
    if way < 0.5:
        content = torch.load(io.BytesIO(files[name]), weights_only=False)
        inside, key = rng.choice(
            [(c, k) for c, k in places(content) if isinstance(c[k], torch.Tensor)] or places(content)
        )
        inside[key] = (
            spoilt_tensor(rng, inside[key])
            if isinstance(inside[key], torch.Tensor)
            else copy.deepcopy(rng.choice(ATOMS))
        )
        if rng.random() < 0.1:
            inside.pop(key)
        return {**files, name: torch_bytes(content)}
    members = unzip(files[name])
    data = next(key for key in members if key.endswith("data.pkl"))
    if way < 0.7:
        members[data] = rng.choice(EVIL)()
    elif way < 0.9:
        members[data] = damage(rng, members[data])
    else:
        key = rng.choice(sorted(members))
        members[key] = damage(rng, members[key])
    return {**files, name: rezip(list(members.items()), packed=rng.random() < 0.1)}


def torch_bytes(content: Any) -> bytes:
    """What torch.save writes."""
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


# ----------------------------------------------------------------------------------------------------- sound files


def gaussians(n: int, k: int, seed: int = 0, **more: Any) -> Gaussians:
    """A sound scene."""
    make = torch.Generator().manual_seed(seed)
    shapes = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh0": (1, 3), "shN": (k, 3)}
    return Gaussians(**{name: 0.5 * torch.randn(n, *shape, generator=make) for name, shape in shapes.items()}, **more)


SIZES = ((1, 0), (7, 3), (300, 0), (300, 15), (60, 8))  # Gaussians, rows of SH
LARGE = (4000, 15)  # enough for memory to be seen


def written(kind: str, scene: Gaussians, **options: Any) -> bytes:
    """The scene as a file of FORMATS."""
    out, write = io.BytesIO(), FORMATS[kind].write
    assert write is not None
    write(scene, out, Path(f"x.{kind}"), **options)
    return out.getvalue()


def splat_files(kind: str) -> list[Files]:
    """Scenes of several sizes and degrees in one format."""
    name = "scene" + FORMATS[kind].suffixes[0]
    return [{name: written(kind, gaussians(n, k))} for n, k in (*SIZES, LARGE)]


def ply_files() -> list[Files]:
    """Ours, and ascii, big-endian and decorated ones."""
    from plyfile import PlyData

    rich = gaussians(
        50, 3, comments=("a", "b"), obj_info=("c",), extra={"id": np.arange(50), "w": np.ones(50, np.uint8)}
    )
    camera = np.zeros(2, [("fx", "f4"), ("id", "i4")])
    files = [*splat_files("ply"), {"scene.ply": written("ply", rich._replace(extra={}, elements={"camera": camera}))}]
    for text, order in ((True, "="), (False, ">")):
        ply = PlyData.read(io.BytesIO(files[1]["scene.ply"]))
        ply.text, ply.byte_order = text, order
        out = io.BytesIO()
        ply.write(out)
        files.append({"scene.ply": out.getvalue()})
    return files


def spz_files() -> list[Files]:
    """All versions."""
    return splat_files("spz") + [
        {"scene.spz": written("spz", gaussians(n, k), version=version)}
        for version in (2, 4)
        for n, k in (*SIZES, LARGE)
    ]


def sog_folder_files() -> list[Files]:
    """Unpacked .sog files."""
    return [unzip(files["scene.sog"]) for files in samples("sog")]


def ksplat_files() -> list[Files]:
    """All levels, with and without harmonics."""
    from test_formats_ksplat import by_hand

    return [{"scene.ksplat": by_hand(level, degree)[0]} for level in (0, 1, 2) for degree in (0, 1, 2)]


def gsplat_files() -> list[Files]:
    """Checkpoints of gsplat: one rank, and two."""
    one = [
        {"ckpt_9_rank0.pt": torch_bytes({"step": 9, "splats": gaussians(n, k).parameters})} for n, k in (*SIZES, LARGE)
    ]
    return [*one, {f"ckpt_9_rank{i}.pt": torch_bytes({"splats": gaussians(9, 3, i).parameters}) for i in range(2)}]


def nerfstudio_files() -> list[Files]:
    """Runs of nerfstudio, with the state of optimisers."""
    out = []
    for n, k in (*SIZES, LARGE):
        scene = gaussians(n, k).parameters
        names = {"sh0": "features_dc", "shN": "features_rest"}
        state = {f"_model.gauss_params.{names.get(name, name)}": value for name, value in scene.items()}
        state["_model.gauss_params.features_dc"] = scene["sh0"][:, 0]
        state["_model.gauss_params.opacities"] = scene["opacities"][:, None]
        moments = {"state": {0: {"exp_avg": scene["means"]}}, "param_groups": [{"lr": np.float64(0.1), "params": [0]}]}
        content = {"step": 9, "pipeline": state, "optimizers": {"means": moments}}
        placed = {"transform": [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0.5]], "scale": 0.5}
        out.append(
            {"step-000000009.ckpt": torch_bytes(content), "dataparser_transforms.json": json.dumps(placed).encode()}
        )
    return out


def resaved_ckpt(rng: random.Random, files: Files) -> Files:
    """`resaved` for the one checkpoint among other files."""
    name = next(name for name in files if name.endswith(".ckpt"))
    return {**files, **resaved(rng, {name: files[name]})}


# ------------------------------------------------------------------------------------------------------ sound cameras


def poses(n: int) -> list[np.ndarray]:
    """Camera-to-world matrices (4, 4) on a ring."""
    out = []
    for angle in np.linspace(0, 6, n):
        c, s = float(np.cos(angle)), float(np.sin(angle))
        out.append(np.array([[c, 0, s, 3 * s], [0, 1, 0, 0.1], [-s, 0, c, 3 * c], [0, 0, 0, 1.0]]))
    return out


def inria_cameras() -> list[Files]:
    """cameras.json of INRIA's trainer."""
    size = {"width": 64, "height": 48, "fx": 60.0, "fy": 60.0}
    entries = [
        {"id": i, "img_name": f"{i:03d}", **size, "position": m[:3, 3].tolist(), "rotation": m[:3, :3].tolist()}
        for i, m in enumerate(poses(60))
    ]
    return [{"cameras.json": json.dumps(entries[:n]).encode()} for n in (1, 60)]


def nerfstudio_cameras() -> list[Files]:
    """transforms.json: one lens for all, one for each frame, distorted ones, with and without pictures."""
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "PNG")
    lens = {"fl_x": 60.0, "fl_y": 60.0, "cx": 32.0, "cy": 24.0, "w": 64, "h": 48}
    bent = {**lens, "k1": -0.1, "k2": 0.02, "p1": 1e-3, "p2": -1e-3, "camera_model": "OPENCV"}
    fish = {**lens, "k1": 0.05, "k2": 0.0, "k3": 0.0, "k4": 0.0, "camera_model": "OPENCV_FISHEYE"}
    frames = [{"file_path": f"images/{i}.png", "transform_matrix": m.tolist()} for i, m in enumerate(poses(40))]
    out = [{"transforms.json": json.dumps({**kind, "frames": frames[:5]}).encode()} for kind in (lens, bent, fish)]
    out.append({"transforms.json": json.dumps({"frames": [{**f, **lens} for f in frames]}, indent=1).encode()})
    blender = {"camera_angle_x": 0.9, "frames": frames[:3], "applied_transform": np.eye(4)[:3].tolist()}
    return [*out, {"transforms.json": json.dumps(blender).encode(), "images/0.png": picture.getvalue()}]


def path_cameras() -> list[Files]:
    """A camera path of nerfstudio's viewer."""
    cameras = [{"camera_to_world": m.ravel().tolist(), "fov": 60.0, "aspect": 1.3} for m in poses(9)]
    return [{"path.json": json.dumps({"render_width": 64, "render_height": 48, "camera_path": cameras}).encode()}]


LENSES = {0: [60.0, 32, 24], 1: [60.0, 60, 32, 24], 2: [60.0, 32, 24, -0.05], 4: [60.0, 60, 32, 24, -0.1, 0.01, 0, 0]}


def colmap_text() -> list[Files]:
    """COLMAP's text files."""
    names = {0: "SIMPLE_PINHOLE", 1: "PINHOLE", 2: "SIMPLE_RADIAL", 4: "OPENCV"}
    cameras = [f"{i} {names[i]} 64 48 {' '.join(map(str, values))}" for i, values in LENSES.items()]
    images = [f"{i} 1 0.1 0 0 0 0 {i} {sorted(LENSES)[i % 4]} {i:03d}.png\n1.5 2.5 -1 3 4 7" for i in range(20)]
    text = {
        "cameras.txt": "# Camera list\n" + "\n".join(cameras) + "\n",
        "images.txt": "# Images\n" + "\n".join(images) + "\n",
    }
    return [{name: content.encode() for name, content in text.items()}]


def colmap_binary() -> list[Files]:
    """COLMAP's binary files."""
    cameras = struct.pack("<Q", len(LENSES))
    for i, values in LENSES.items():
        cameras += struct.pack(f"<iiQQ{len(values)}d", i, i, 64, 48, *values)
    images = struct.pack("<Q", 20)
    for i in range(20):
        images += struct.pack("<i7di", i, 1, 0.1, 0, 0, 0, 0, i, sorted(LENSES)[i % 4]) + f"{i:03d}.png\0".encode()
        images += struct.pack("<Q", 2) + struct.pack("<ddqddq", 1, 2, -1, 3, 4, 7)
    return [{"cameras.bin": cameras, "images.bin": images}]


def read_views(path: Path) -> Any:
    """The cameras of a file, made pinholes of one size."""
    from splatedit.camera_files import fit, read_cameras

    return fit(read_cameras(path).views, 64, 48)


# ----------------------------------------------------------------------------------------------------------- the rest


def mask_files() -> list[Files]:
    """Masks as `masks.save` writes them, and lists of rows."""
    from splatedit.mask_files import encode
    from splatedit.masks import box, rule, sphere

    masks = [box("-1,-1,-1,1,1,1") & ~sphere("0,0,0,0.5"), rule("opacity>0.2") | box("0,0,0,1,1,1")]
    out = [{"mask.json": json.dumps({"splatedit_mask": 1, "mask": encode(mask)}).encode()} for mask in masks]
    return [*out, {"mask.json": json.dumps(list(range(200))).encode()}]


def row_files() -> list[Files]:
    """Rows as numpy writes them."""
    out = []
    for rows in (np.arange(200), np.arange(300) % 2 == 0):
        stream = io.BytesIO()
        np.save(stream, rows)
        out.append({"rows.npy": stream.getvalue()})
    return out


def read_mask(path: Path) -> Any:
    """The rows that a mask chooses in a scene of 300 Gaussians."""
    from splatedit.mask_files import load

    return load(path)(gaussians(300, 0))


def read_splats(path: Path) -> Any:
    """What `splatedit` does first with any scene."""
    from splatedit.files import load

    return load(path)


def resume_files() -> list[Files]:
    """ckpts/last.pt of an unfinished edit."""
    content = {"step": 3, "config": {"prompt": "a pig", "steps": 9}, "sha256": "0" * 64, "log": {"loss": [0.5] * 3}}
    content |= {"format": 1, "parameters": gaussians(60, 3).parameters, "generator": torch.Generator().get_state()}
    return [{"last.pt": torch_bytes(content)}]


def read_resume(path: Path) -> Any:
    from splatedit.checkpoints import read_checkpoint

    return read_checkpoint(path)


def sidecar_files() -> list[Files]:
    """The yaml file beside a scene."""
    return [{"scene.yaml": b"# what it is\nsource_prompt: a cat\nup: -y\n"}]


def config_files() -> list[Files]:
    """Settings of a run."""
    return [
        {"run.yaml": b"steps: 100\nguidance: ids\nfpr_lambda: 0.5\nbackground: [1, 1, 0.5]\nprompt: a pig\nseed: 3\n"}
    ]


def read_config(path: Path) -> Any:
    from splatedit.config import load_config

    return load_config(path)


def read_sidecar(path: Path) -> Any:
    from splatedit.files import sidecar

    return sidecar(path)


ANY = (damaged, damaged)
SPLATS = {
    "ply": Subject("ply", "scene.ply", ply_files, read_splats, (*ANY, reworded, lying)),
    "compressed_ply": Subject(
        "compressed_ply",
        "scene.compressed.ply",
        lambda: splat_files("compressed_ply"),
        read_splats,
        (*ANY, reworded, lying),
    ),
    "splat": Subject("splat", "scene.splat", lambda: splat_files("splat"), read_splats, ANY),
    "spz": Subject("spz", "scene.spz", spz_files, read_splats, (*ANY, regzipped)),
    "ksplat": Subject("ksplat", "scene.ksplat", ksplat_files, read_splats, ANY),
    "sog": Subject("sog", "scene.sog", lambda: splat_files("sog"), read_splats, (damaged, rezipped, rezipped)),
    "sog_folder": Subject("sog_folder", ".", sog_folder_files, read_splats, (*ANY, retreed)),
    "checkpoint": Subject("checkpoint", "ckpt_9_rank0.pt", gsplat_files, read_splats, (damaged, resaved, resaved)),
    "nerfstudio": Subject("nerfstudio", ".", nerfstudio_files, read_splats, (damaged, resaved_ckpt, retreed)),
}
CAMERAS = {
    "inria_cameras": Subject("inria_cameras", "cameras.json", inria_cameras, read_views, (damaged, retreed, retreed)),
    "transforms": Subject(
        "transforms", "transforms.json", nerfstudio_cameras, read_views, (damaged, retreed, retreed), True
    ),
    "camera_path": Subject("camera_path", "path.json", path_cameras, read_views, (damaged, retreed, retreed)),
    "colmap_text": Subject("colmap_text", ".", colmap_text, read_views, (damaged, reworded, reworded)),
    "colmap_binary": Subject("colmap_binary", ".", colmap_binary, read_views, ANY),
}
OTHERS = {
    "mask": Subject("mask", "mask.json", mask_files, read_mask, (damaged, retreed, retreed)),
    "rows": Subject("rows", "rows.npy", row_files, read_mask, ANY),
    "resume": Subject("resume", "last.pt", resume_files, read_resume, (damaged, resaved, resaved)),
    "sidecar": Subject("sidecar", "scene.ply", sidecar_files, read_sidecar, (damaged, reworded, yamls)),
    "config": Subject("config", "run.yaml", config_files, read_config, (damaged, reworded, yamls)),
}
SUBJECTS: dict[str, Subject] = {**SPLATS, **CAMERAS, **OTHERS}


@functools.cache
def samples(subject: str) -> list[Files]:
    """The sound files of one subject."""
    return SUBJECTS[subject].samples()


def mutated(subject: str, seed: int, index: int) -> tuple[int, Files]:
    """Mutated file number `index` of a subject, and the number of the sample it was: the same for the same seed."""
    rng = random.Random(f"{seed}/{subject}/{index}")
    chosen = rng.randrange(len(samples(subject)))
    return chosen, rng.choice(SUBJECTS[subject].mutators)(rng, samples(subject)[chosen])
