"""Checkpoints of training programs: gsplat `.pt`, nerfstudio splatfacto `.ckpt`, INRIA `.pth` and our own. Read only.

A checkpoint is a pickle, and a pickle is a program. Here it is first looked through, not run (`_check_pickle`):
whatever needs more than tensors and plain values is refused. Then `torch.load(weights_only=True)` maps it into memory,
so that the state of optimisers, two thirds of such a file, is never read.
"""

from __future__ import annotations

import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splatedit.errors import InputError
from splatedit.formats.checks import check_read
from splatedit.formats.limits import check_directory, parse_json
from splatedit.gaussians import SH_C0, SH_REST, Gaussians

# What a pickle of tensors and plain values names; numpy's scalars are passed over, see `_passed_over`.
NUMPY = {"numpy.core.multiarray scalar", "numpy._core.multiarray scalar", "numpy dtype"}
NAMES = NUMPY | {
    "_codecs encode",
    "builtins set",
    "__builtin__ set",
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch.nn.parameter Parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    *(f"torch {kind}Storage" for kind in "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()),
    *(f"torch {kind}" for kind in "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()),
}
RECORDS = 20_000  # files in the zip that torch.save writes: one for each tensor
PICKLE = 1 << 24  # bytes of the pickle itself, which holds no tensor
TUPLES = 50_000  # in one pickle: hashing a tuple nested 100,000 deep overflows the stack

# The rest of each parameter's shape behind the number of Gaussians; None is any whole SH degree.
SHAPES: dict[str, tuple[tuple[int | None, ...], ...]] = {
    "means": ((3,),),
    "quats": ((4,),),
    "scales": ((3,),),
    "opacities": ((), (1,)),
    "sh0": ((1, 3), (3,)),
    "shN": ((None, 3),),
}


class Found(NamedTuple):
    """The six parameters as a checkpoint holds them."""

    tensors: dict[str, Any]  # parameter -> what the file holds there
    keys: dict[str, str]  # parameter -> its key in the file, for messages


def read_checkpoint(path: Path) -> Gaussians:
    """Read a checkpoint: gsplat (every rank found beside it), nerfstudio, INRIA, ours; or the newest one of a run.

    `path` may be a nerfstudio run's folder or its config.yml, or gsplat's result folder. Coordinates stay as trained.
    For nerfstudio that is its own normalised frame, as `ns-export gaussian-splat` writes it; the numbers of
    dataparser_transforms.json, if it is found beside the run, become a header comment.
    """
    path = newest_checkpoint(path) or path
    parts = [_read_part(part) for part in _ranks(path)]
    degrees = sorted({part.sh_degree for part in parts})
    if len(degrees) > 1:
        raise InputError(f"{path}: its ranks hold the SH degrees {degrees}, expected one; they are of different runs.")
    comments = _comments(path)
    if len(parts) == 1:
        return parts[0]._replace(comments=comments)
    names = parts[0].parameters
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return parts[0]._replace(**joined, comments=comments)


def newest_checkpoint(path: Path) -> Path | None:
    """The checkpoint of most steps that a run's folder, or the config.yml in it, stands for; None if it is no run.

    Looks where nerfstudio and gsplat's simple_trainer put them. The yaml is not read: it is a pickle in disguise.
    """
    folder = path.parent if path.name == "config.yml" else path
    if not folder.is_dir():
        return None
    for pattern in ("nerfstudio_models/step-*.ckpt", "step-*.ckpt", "ckpts/ckpt_*_rank0.pt", "ckpt_*_rank0.pt"):
        found = {_step(file): file for file in folder.glob(pattern) if _step(file) >= 0}
        if found:
            return found[max(found)]
    return None


def _comments(path: Path) -> tuple[str, ...]:
    """What dataparser_transforms.json of the run says, for who has the splats alone; `camera_files` uses the file."""
    folder = next((f for f in (path.parent, path.parent.parent) if (f / "dataparser_transforms.json").is_file()), None)
    if folder is None:
        return ()
    file = folder / "dataparser_transforms.json"
    content = parse_json(file, file.read_bytes())
    try:
        scale, rows = float(content["scale"]), [[float(x) for x in row] for row in content["transform"]]
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        scale, rows = math.nan, []
    if [len(row) for row in rows] != [4, 4, 4] or not all(map(math.isfinite, (scale, *sum(rows, [])))):
        raise InputError(
            f'{file}: expected {{"transform": 3 rows of 4 numbers, "scale": a number}}; remove or mend it.'
        )
    text = " / ".join(" ".join(f"{x:.9g}" for x in row) for row in rows)
    return (f"nerfstudio dataparser_transforms: scale {scale:.9g} transform {text}",)


def _step(file: Path) -> int:
    """The step in a checkpoint's name, -1 if there is none."""
    match = re.match(r"(?:step-|ckpt_)(\d{1,18})(?:_rank\d+)?\.\w+$", file.name)
    return int(match[1]) if match else -1


def _ranks(path: Path) -> list[Path]:
    """All parts of the scene this checkpoint is of: gsplat saves one file for each GPU it trained on."""
    match = re.fullmatch(r"(.*_rank)\d+(\.\w+)", path.name)
    if not match or not path.is_file():
        return [path]
    beside = re.compile(re.escape(match[1]) + r"(\d{1,6})" + re.escape(match[2]))
    found = {int(m[1]): file for file in path.parent.iterdir() if (m := beside.fullmatch(file.name))}
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        name = f"{match[1]}{missing[0]}{match[2]}"
        raise InputError(
            f"{path}: part of a scene saved by several GPUs, but {name} is missing beside it; copy it too."
        )
    return [found[rank] for rank in sorted(found)]


# ---------------------------------------------------------------------------------------------------------- one file


def _read_part(path: Path) -> Gaussians:
    """The Gaussians of one file, all shapes, types and numbers checked."""
    found = _find(path, load_tensors(path))
    n = _count(path, found)
    plain = {name: _parameter(path, found.keys[name], found.tensors[name], n, SHAPES[name]) for name in SHAPES}
    total, size = sum(value.numel() for value in plain.values()) * 2, path.stat().st_size
    if total > size:  # a tensor may repeat one number a billion times, an honest file stores each: 2 bytes at least
        raise InputError(f"{path}: promises {n} Gaussians, but holds only {size} bytes; it is damaged.")
    own = {name: value.to(torch.float32, copy=True).contiguous() for name, value in plain.items()}
    n_rest = own["shN"].shape[1]
    if n_rest not in SH_REST.values():
        expected = ", ".join(map(str, SH_REST.values()))
        raise InputError(f"{path}: key {found.keys['shN']!r} has {n_rest} rows of SH, expected one of {expected}.")
    sh0 = own["sh0"].reshape(n, 1, 3)
    if n_rest == 0 and "features_dc" in found.keys["sh0"] and "pipeline" in found.keys["sh0"]:
        sh0 = (sh0.sigmoid() - 0.5) / SH_C0  # splatfacto without SH trains the logit of the colour
    opacities = own["opacities"].reshape(n)
    gaussians = Gaussians(own["means"], own["quats"], own["scales"], opacities, sh0, own["shN"])
    return check_read(gaussians, path, found.keys)


def _count(path: Path, found: Found) -> int:
    means = found.tensors["means"]
    if not isinstance(means, Tensor) or means.ndim != 2:
        raise InputError(f"{path}: key {found.keys['means']!r} is {_kind(means)}, expected a tensor of shape (n, 3).")
    return len(means)


def _parameter(path: Path, key: str, value: Any, n: int, shapes: tuple[tuple[int | None, ...], ...]) -> Tensor:
    """The tensor at a key, if it is a plain one of floats and of n rows in one of these shapes."""
    wanted = " or ".join(f"({', '.join(['n'] + ['k' if s is None else str(s) for s in shape])})" for shape in shapes)
    if not isinstance(value, Tensor):
        raise InputError(f"{path}: key {key!r} is {_kind(value)}, expected a tensor of shape {wanted}.")
    if (
        value.layout != torch.strided
        or value.is_quantized
        or value.device.type != "cpu"
        or not value.is_floating_point()
    ):
        raise InputError(f"{path}: key {key!r} is {_kind(value)}, expected dense float16, float32 or float64.")
    shape = tuple(value.shape)
    fits = any(
        len(shape) == 1 + len(s) and all(b in (None, a) for a, b in zip(shape[1:], s, strict=True)) for s in shapes
    )
    if not fits or shape[0] != n:
        raise InputError(f"{path}: key {key!r} has shape {shape}, expected {wanted} with n = {n} as the means have.")
    return value.detach()


def _kind(value: Any) -> str:
    """What a value is, in words; not its content, which may be anything."""
    if isinstance(value, Tensor):
        kind = f"{value.layout}".removeprefix("torch.")
        return f"a {kind} tensor of {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"
    return {dict: "a dictionary", list: "a list", tuple: "a tuple", type(None): "missing"}.get(
        type(value), f"of type {type(value).__name__}"
    )


# --------------------------------------------------------------------------------------------------- who wrote it


def _find(path: Path, content: Any) -> Found:
    """The six parameters in whatever one of LAYOUTS finds first; InputError if none does."""
    for layout in LAYOUTS.values():
        found = layout(content)
        if found is not None:
            missing = [key for name, key in found.keys.items() if name not in found.tensors]
            if missing:
                raise InputError(f"{path}: has no key {missing[0]!r}, {_advice(content)}.")
            return found
    keys = [str(key)[:40] for key in content][:8] if isinstance(content, Mapping) else []
    holds = f"a dictionary with {', '.join(keys) or 'nothing'}" if isinstance(content, Mapping) else _kind(content)
    raise InputError(
        f"{path}: holds {holds}, expected a checkpoint of gsplat ('splats'), nerfstudio's splatfacto ('pipeline'), "
        "INRIA or splatedit ('parameters'); convert it to .ply with the program that wrote it."
    )


def _advice(content: Any) -> str:
    splats = content.get("splats") if isinstance(content, Mapping) else None
    if isinstance(splats, Mapping) and "features" in splats:
        return "it was trained with app_opt, whose colours need a network; export a .ply with gsplat (--save_ply)"
    return "expected one for each of the six parameters; export a .ply with the program that wrote it"


def _gsplat(content: Any) -> Found | None:
    """gsplat/examples/simple_trainer.py: {"step", "splats": state dict}; the means were once `means3d`."""
    return _nested(content, "splats")


def _ours(content: Any) -> Found | None:
    """`ckpts/last.pt` of an unfinished edit."""
    return _nested(content, "parameters")


def _bare(content: Any) -> Found | None:
    """The dictionary of the parameters alone."""
    return _named(content, "") if isinstance(content, Mapping) and "means" in content else None


def _nested(content: Any, key: str) -> Found | None:
    inner = content.get(key) if isinstance(content, Mapping) else None
    return _named(inner, f"{key}.") if isinstance(inner, Mapping) else None


def _named(splats: Mapping[str, Any], prefix: str) -> Found:
    keys = {name: name for name in SHAPES}
    if "means" not in splats and "means3d" in splats:
        keys["means"] = "means3d"
    return Found(
        {name: splats[key] for name, key in keys.items() if key in splats},
        {name: f"{prefix}{key}" for name, key in keys.items()},
    )


def _nerfstudio(content: Any) -> Found | None:
    """splatfacto's state dict: `_model.gauss_params.means`, at first `_model.means`; colours once in `colors_all`."""
    state = content.get("pipeline") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        return None
    means = next((k for k in state if isinstance(k, str) and re.fullmatch(r"_model\.(.+\.)?means", k)), None)
    if means is None:
        return None
    prefix = means.removesuffix("means")
    theirs = {**{name: name for name in SHAPES}, "sh0": "features_dc", "shN": "features_rest"}
    keys = {name: prefix + key for name, key in theirs.items()}
    tensors = {name: state[key] for name, key in keys.items() if key in state}
    colours = state.get(f"{prefix}colors_all")
    if isinstance(colours, Tensor) and colours.ndim == 3:
        keys |= {"sh0": f"{prefix}colors_all", "shN": f"{prefix}colors_all"}
        tensors |= {"sh0": colours[:, :1], "shN": colours[:, 1:]}
    return Found(tensors, {name: f"pipeline.{key}" for name, key in keys.items()})


def _inria(content: Any) -> Found | None:
    """gaussian-splatting/train.py: (GaussianModel.capture(), iteration), the tuple in the order of `names`."""
    inner = content[0] if isinstance(content, tuple) and content else None
    names = ("means", "sh0", "shN", "scales", "quats", "opacities")
    if not isinstance(inner, tuple) or len(inner) < 1 + len(names):
        return None
    places = {name: 1 + i for i, name in enumerate(names)}
    return Found({n: inner[i] for n, i in places.items()}, {n: f"[0][{i}]" for n, i in places.items()})


LAYOUTS: dict[str, Callable[[Any], Found | None]] = {
    "gsplat": _gsplat,
    "nerfstudio": _nerfstudio,
    "splatedit": _ours,
    "inria": _inria,
    "bare": _bare,
}


# ------------------------------------------------------------------------------------------------------- the pickle


def load_tensors(path: Path, mapped: bool = True) -> Any:
    """What torch.save wrote; raises InputError for whatever is not tensors and plain values.

    mapped: tensors are read where they are used, and only then; else at once, and their checksums are checked.
    """
    _check_archive(path)
    try:
        with warnings.catch_warnings(), _passed_over():
            warnings.simplefilter("ignore")  # of other pickle protocols; what they cannot do is an error
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # UnpicklingError, RuntimeError, and whatever a damaged pickle provokes in either
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: cannot be read as a checkpoint ({text}); copy or save it again.") from error


def _check_archive(path: Path) -> None:
    """Raise InputError unless this is the zip of stored files that torch.save writes, with a harmless pickle in it."""
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start != b"PK\3\4":
        found = f"a file that starts with {start!r}" if start else "an empty file"
        raise InputError(
            f"{path}: found {found}, expected a checkpoint as torch.save writes it since version 1.6: a zip archive."
        )
    check_directory(path, RECORDS)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            pickles = [info for info in infos if info.filename.rsplit("/", 1)[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise InputError(
                    f"{path}: a zip archive with {len(pickles)} files data.pkl, expected one; no checkpoint."
                )
            if any(info.compress_type or info.file_size != info.compress_size for info in infos):
                raise InputError(f"{path}: a zip archive with packed files, which torch.save never writes; not read.")
            if pickles[0].file_size > min(PICKLE, path.stat().st_size):
                raise InputError(f"{path}: its pickle takes {pickles[0].file_size} bytes; it is damaged.")
            data = archive.read(pickles[0])
    except (InputError, OSError):
        raise
    except Exception as error:  # BadZipFile, NotImplementedError, RuntimeError, struct.error, UnicodeDecodeError ...
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: damaged zip archive ({text}); copy or save it again.") from error
    _check_pickle(path, data)


def _check_pickle(path: Path, data: bytes) -> None:
    """Raise InputError for a pickle that names anything but NAMES, or is built to exhaust us; nothing of it is run."""
    named, strings, tuples, longest = set(), ["", ""], 0, 0
    try:
        for op, value, _ in pickletools.genops(data):
            if op.name in ("GLOBAL", "INST"):
                named.add(str(value))
            elif op.name == "STACK_GLOBAL":
                named.add(" ".join(strings))
            elif isinstance(value, str):
                strings = [strings[1], value]
                longest = max(longest, len(value))
            tuples += op.name.startswith("TUPLE")
    except Exception as error:  # ValueError mostly; the bytes are arbitrary
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: its pickle is damaged ({text}); copy or save it again.") from error
    foreign = sorted(named - NAMES)
    if foreign:
        shown = ", ".join(name.replace(" ", ".")[:60] for name in foreign[:3])
        raise InputError(
            f"{path}: its pickle needs {shown}{', ...' if len(foreign) > 3 else ''}, expected tensors and plain values "
            "only; nothing of it was run. If you trust it, save its parameters again, or export a .ply instead."
        )
    # `_codecs.encode` makes bytes of text; some encodings take quadratic time.
    if tuples > TUPLES or ("_codecs encode" in named and longest > 4096):
        raise InputError(f"{path}: its pickle is not of a kind that torch.save writes; it is damaged or malicious.")


def _passed_over() -> Any:
    """A context in which torch.load puts nothing in the place of numpy's scalars, instead of refusing the file.

    Learning-rate schedulers leave them in the optimiser state of nerfstudio's checkpoints, which nobody reads here.
    """

    class Nothing:
        def __new__(cls, *_: Any) -> Any:
            return object.__new__(cls)

        def __setstate__(self, _: Any) -> None:
            pass

    def stand_in(name: str) -> type:
        module, _, plain = name.rpartition(" ")
        return type(plain, (Nothing,), {"__module__": module, "__qualname__": plain})

    if not hasattr(torch.serialization, "safe_globals"):  # torch 2.4 refuses such a file
        return nullcontext()
    return torch.serialization.safe_globals([stand_in(name) for name in sorted(NUMPY)])
