"""PLY as INRIA's training writes it: one float column per parameter."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from splatedit.errors import InputError
from splatedit.gaussians import SH_REST, Gaussians

# Which columns make which tensor. f_rest_* is channel-major: all coefficients of red, then green, then blue.
COLUMNS = {
    "means": ("x", "y", "z"),
    "sh0": ("f_dc_0", "f_dc_1", "f_dc_2"),
    "opacities": ("opacity",),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "quats": ("rot_0", "rot_1", "rot_2", "rot_3"),
}
NORMALS = ("nx", "ny", "nz")

# What people have instead of a PLY file, by its first bytes.
MAGIC = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<": "a web page, perhaps a failed download; download the file again",
    b"\x1f\x8b": "gzip data; unpack it first",
    b"PK": "a zip archive; unpack it first",
    b"ply": "a damaged PLY header",
}


def read_ply(path: Path) -> Gaussians:
    """Read a PLY splat, ascii or binary of either byte order, columns by name in any order."""
    ply = _parse_ply(path)
    vertex = _splat_element(path, ply)
    columns = [p.name for p in vertex.properties]
    rest = _rest_columns(path, columns)
    wanted = {**COLUMNS, "shN": rest}
    for names in wanted.values():
        for name in names:
            _check_column(path, vertex, name)
    n = len(vertex.data)
    if n == 0:
        raise InputError(f"{path}: element 'vertex' holds 0 Gaussians, expected at least 1; the scene is empty.")
    values = {key: _stack(vertex.data, names) for key, names in wanted.items()}
    _check_finite(path, values, wanted)
    used = {name for names in wanted.values() for name in names}
    extra = {name: _native(vertex.data[name]) for name in columns if name not in used}
    if all(name in extra and extra[name].dtype == np.float32 for name in NORMALS):
        if not any(extra[name].view(np.uint32).any() for name in NORMALS):
            extra = {name: column for name, column in extra.items() if name not in NORMALS}
    shN = values["shN"].reshape(n, 3, -1).transpose(0, 2, 1)
    return Gaussians(
        means=torch.from_numpy(values["means"]),
        quats=torch.from_numpy(values["quats"]),
        scales=torch.from_numpy(values["scales"]),
        opacities=torch.from_numpy(values["opacities"][:, 0].copy()),
        sh0=torch.from_numpy(values["sh0"][:, None]),
        shN=torch.from_numpy(np.ascontiguousarray(shN)),
        extra=extra,
        comments=tuple(ply.comments) + tuple(c for element in ply for c in element.comments),
        obj_info=tuple(ply.obj_info),
        elements={e.name: _native(e.data) for e in ply if e.name != "vertex" and not e.data.dtype.hasobject},
    )


def write_ply(gaussians: Gaussians, stream: IO[bytes], path: Path) -> None:
    """Write little-endian binary PLY to a stream; `path` is only named in errors."""
    from plyfile import PlyData, PlyElement

    columns = _columns_out(gaussians, path)
    table = np.empty(gaussians.n, [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        table[name] = column
    others = [PlyElement.describe(data, name) for name, data in gaussians.elements.items()]
    ply = PlyData(
        [PlyElement.describe(table, "vertex"), *others],
        byte_order="<",
        comments=[_header_text(c) for c in gaussians.comments],
        obj_info=[_header_text(c) for c in gaussians.obj_info],
    )
    # plyfile's own write goes through a memoryview, which numpy refuses for a column with ":" in its name.
    stream.write(ply.header.encode("ascii") + b"\n")
    for element in ply.elements:
        stream.write(element.data.astype(element.dtype("<"), copy=False).tobytes())


def ply_losses(gaussians: Gaussians) -> list[str]:
    """Nothing: what Gaussians hold came from such a file."""
    return []


def _parse_ply(path: Path):
    """plyfile's view of the file, its errors turned into one line."""
    from plyfile import PlyData, PlyElementParseError, PlyHeaderParseError

    with open(path, "rb") as stream:
        start = stream.read(32)
    if start[:4] not in (b"ply\n", b"ply\r"):
        what = next((text for magic, text in MAGIC.items() if start.lstrip().startswith(magic)), None)
        what = what or (f"a file that starts with {start[:12]!r}" if start else "an empty file")
        raise InputError(f"{path}: not a PLY file: found {what}.")
    try:
        return PlyData.read(path)
    except PlyElementParseError as error:
        where = f"element {error.element.name!r}, row {error.row}"  # pyright: ignore[reportOptionalMemberAccess]
        if error.prop is not None:
            where += f", property {error.prop.name!r}"
        count = error.element.count  # pyright: ignore[reportOptionalMemberAccess]
        advice = "the file is cut short; copy or download it again" if "end-of-file" in error.message else "repair it"
        raise InputError(f"{path}: {where}: {error.message}, expected {count} complete rows; {advice}.") from error
    except PlyHeaderParseError as error:
        raise InputError(f"{path}: damaged PLY header, line {error.line}: {error.message}.") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1]
        raise InputError(f"{path}: the PLY text holds the byte {byte!r}, expected plain ASCII; remove it.") from error
    except (ValueError, MemoryError, OverflowError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: damaged PLY file ({text}).") from error


def _splat_element(path: Path, ply) -> Any:
    """The vertex element, if this is a splat; else an InputError that says what it is."""
    from plyfile import PlyListProperty

    names = [element.name for element in ply]
    if "vertex" not in ply:
        raise InputError(f"{path}: no element 'vertex', found {_list(names) or 'no element'}; this is not a splat.")
    vertex = ply["vertex"]
    columns = {p.name for p in vertex.properties}
    if "packed_position" in columns:
        target = path.name.replace(".compressed", "").removesuffix(".ply") + "-plain.ply"
        advice = f"unpack it, e.g. `splat-transform {path.name} {target}`"
        raise InputError(f"{path}: found a compressed PLY, which is not read yet, expected a plain one; {advice}.")
    if not columns & {"opacity", "scale_0", "rot_0", "f_dc_0"}:
        kind = (
            f"a mesh ({len(vertex)} vertices, {len(ply['face'])} faces)"
            if "face" in ply and len(ply["face"])
            else (f"a point cloud ({len(vertex)} points)")
        )
        found = " ".join(p.name for p in vertex.properties)
        raise InputError(
            f"{path}: this is {kind}, not a splat: element 'vertex' has {found or 'no property'}, but no opacity, "
            f"scale_*, rot_*, f_dc_*; {_trained_splat(path)}."
        )
    if "scale_2" not in columns and {"scale_0", "scale_1"} <= columns:
        raise InputError(
            f"{path}: element 'vertex' has scale_0 and scale_1 but no scale_2: a 2D Gaussian (surfel) scene; "
            "expected a 3D Gaussian scene, train or export one."
        )
    for element in ply:
        lists = [p.name for p in element.properties if isinstance(p, PlyListProperty)]
        if lists and (len(element) or element.name == "vertex"):
            raise InputError(
                f"{path}: element {element.name!r} has the list property {lists[0]!r}, which cannot be kept; "
                "remove it from the file first."
            )
    return vertex


def _trained_splat(path: Path) -> str:
    """What to give instead of a point cloud: INRIA's training leaves the splat deeper in the same folder."""
    found = sorted(path.parent.glob("point_cloud/iteration_*/point_cloud.ply"), key=lambda p: (len(p.parts[-2]), p))
    if found:
        return f"give the trained splat {found[-1]}"
    return "train a splat from it, or give the trained one, e.g. <model>/point_cloud/iteration_30000/point_cloud.ply"


def _rest_columns(path: Path, columns: list[str]) -> tuple[str, ...]:
    """f_rest_0 ... in numeric order, checked to make a whole SH degree."""
    count = sum(name.startswith("f_rest_") for name in columns)
    sizes = [3 * k for k in SH_REST.values()]
    if count not in sizes:
        expected = ", ".join(map(str, sizes))
        raise InputError(
            f"{path}: element 'vertex' has {count} properties f_rest_*, expected one of {expected} (SH degree 0 to 3); "
            "export it again with a whole SH degree."
        )
    return tuple(f"f_rest_{i}" for i in range(count))


def _check_column(path: Path, vertex, name: str) -> None:
    if name not in vertex:
        near = difflib.get_close_matches(name, [p.name for p in vertex.properties], 1, 0.7)
        hint = f" (there is {near[0]!r})" if near and near[0] not in {n for c in COLUMNS.values() for n in c} else ""
        raise InputError(f"{path}: element 'vertex' has no property {name!r}{hint}; a splat needs it, export it again.")
    if vertex.data[name].dtype.kind != "f":
        where = f"{path}: element 'vertex', property {name!r}"
        found = str(vertex.ply_property(name)).split()[1]
        raise InputError(f"{where}: found the type {found}, expected float or double; export it again.")


def _stack(data: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Columns by name as one (n, len(names)) float32 array."""
    out = np.empty((len(data), len(names)), np.float32)
    with np.errstate(over="ignore"):  # a double beyond float32 becomes Inf and is reported as such
        for i, name in enumerate(names):
            out[:, i] = data[name]
    return out


def _native(column: np.ndarray) -> np.ndarray:
    """A copy in this machine's byte order, free of the mapped file."""
    return np.array(column, dtype=column.dtype.newbyteorder("="))


def _check_finite(path: Path, values: dict[str, np.ndarray], names: dict[str, tuple[str, ...]]) -> None:
    """Raise InputError at the first row that holds NaN or Inf, or a quaternion of length 0."""
    bad = {key: ~np.isfinite(array) for key, array in values.items()}
    rows = np.stack([mask.any(1) for mask in bad.values()]).any(0)
    n = len(values["means"])
    advice = f"remove such Gaussians first, e.g. `splat-transform {path.name} --filter-nan clean.ply`"
    if rows.any():
        row = int(rows.argmax())
        key = next(key for key, mask in bad.items() if mask[row].any())
        column = int(bad[key][row].argmax())
        raise InputError(
            f"{path}: element 'vertex', property {names[key][column]!r}, row {row}: found {values[key][row, column]}, "
            f"expected a finite float32 ({rows.sum()} of {n} rows are affected); {advice}."
        )
    still = ~values["quats"].any(1)
    if still.any():
        raise InputError(
            f"{path}: element 'vertex', properties rot_0 to rot_3, row {int(still.argmax())}: found 0 0 0 0, expected "
            f"a quaternion ({still.sum()} of {n} rows are affected); remove such Gaussians first."
        )


def _columns_out(gaussians: Gaussians, path: Path) -> dict[str, np.ndarray]:
    """All columns by name in the order they are written; raises InputError for what no PLY can hold."""
    n, k = gaussians.n, gaussians.shN.shape[1] if gaussians.shN.ndim == 3 else -1
    shapes = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,), "sh0": (n, 1, 3), "shN": (n, k, 3)}
    for name, value in gaussians.parameters.items():
        if tuple(value.shape) != shapes[name]:
            raise InputError(f"{path}: {name} has shape {tuple(value.shape)}, expected {shapes[name]}; not written.")
    if n == 0:
        raise InputError(f"{path}: the scene holds 0 Gaussians; nothing is written.")
    if k not in SH_REST.values():
        raise InputError(f"{path}: shN has {k} coefficients, expected one of {_list(SH_REST.values())}; not written.")
    flat = {name: _rows(value) for name, value in gaussians.parameters.items() if name != "shN"}
    flat["shN"] = _rows(gaussians.shN.transpose(1, 2))
    for name, array in flat.items():
        rows = ~np.isfinite(array).all(1)
        if rows.any():
            row = int(rows.argmax())
            raise InputError(f"{path}: {name} of Gaussian {row} is not finite ({rows.sum()} of {n} are); not written.")
    extra = _extra_out(gaussians, path)
    normals = {name: extra.pop(name) for name in NORMALS if name in extra} or dict.fromkeys(
        NORMALS, np.zeros(n, np.float32)
    )
    rest = {f"f_rest_{i}": column for i, column in enumerate(flat["shN"].T)}
    block = {key: dict(zip(names, flat[key].T, strict=True)) for key, names in COLUMNS.items()}
    return {
        **block["means"],
        **normals,
        **block["sh0"],
        **rest,
        **block["opacities"],
        **block["scales"],
        **block["quats"],
        **extra,
    }


def _rows(value: Tensor) -> np.ndarray:
    return value.detach().cpu().float().reshape(len(value), -1).numpy()


def _extra_out(gaussians: Gaussians, path: Path) -> dict[str, np.ndarray]:
    """The extra columns, checked: names that are free and legal, one PLY scalar per Gaussian."""
    taken = {name for names in COLUMNS.values() for name in names}
    extra = {name: np.asarray(column) for name, column in gaussians.extra.items()}
    for name, column in extra.items():
        where = f"{path}: extra column {name!r}"
        if name in taken or name.startswith("f_rest_"):
            raise InputError(f"{where}: the name is taken by a parameter of the Gaussians; rename it.")
        if not name or not name.isascii() or len(name.split()) != 1 or name != name.strip():
            raise InputError(f"{where}: the name must be plain ASCII without spaces; rename it.")
        if column.shape != (gaussians.n,):
            raise InputError(f"{where} has shape {column.shape}, expected ({gaussians.n},).")
        if column.dtype.kind not in "iuf" or column.dtype.itemsize > (8 if column.dtype.kind == "f" else 4):
            raise InputError(
                f"{where} is {column.dtype}, which PLY cannot hold; use int32, uint8, float32 or the like."
            )
        if column.dtype == np.float16:
            raise InputError(f"{where} is float16, which PLY cannot hold; use float32.")
    return extra


def _header_text(text: str) -> str:
    """One line of plain ASCII, as a PLY header demands; anything else is escaped, not lost."""
    return " ".join(text.splitlines()).encode("ascii", "backslashreplace").decode()


def _list(words: Iterable[Any]) -> str:
    return ", ".join(map(str, words))
