"""PLY as INRIA's training writes it: one float column per parameter."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch

from splatedit.errors import InputError, LossWarning
from splatedit.formats.checks import check_write
from splatedit.formats.compressed_ply import is_compressed, unpack
from splatedit.formats.ply_file import (
    FLOAT,
    Element,
    PlyFile,
    Table,
    open_ply,
    read_rows,
    table,
    table_of,
    write_tables,
)
from splatedit.formats.ply_file import NAMES as TYPE_NAMES
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


def read_ply(path: Path) -> Gaussians:
    """Read a PLY splat, plain or compressed, ascii or binary of either byte order, columns by name in any order.

    Raises InputError with element, property and row. Doubles become float32, with a LossWarning if that changes them.
    """
    ply = open_ply(path)
    if is_compressed(ply):
        return unpack(ply)
    vertex = _splat_element(ply)
    wanted = {**COLUMNS, "shN": _rest_columns(path, vertex)}
    for name in (name for names in wanted.values() for name in names):
        _check_column(path, vertex, name)
    if vertex.count == 0:
        raise InputError(f"{path}: element 'vertex' holds 0 Gaussians, expected at least 1; the scene is empty.")
    values, extra = _read_columns(ply, vertex, wanted)
    if all(name in extra and extra[name].dtype == np.float32 for name in NORMALS):
        if not any(extra[name].view(np.uint32).any() for name in NORMALS):
            extra = {name: column for name, column in extra.items() if name not in NORMALS}
    return Gaussians(
        means=torch.from_numpy(values["means"]),
        quats=torch.from_numpy(values["quats"]),
        scales=torch.from_numpy(values["scales"]),
        opacities=torch.from_numpy(values["opacities"][:, 0]),
        sh0=torch.from_numpy(values["sh0"][:, None]),
        shN=torch.from_numpy(values["shN"].reshape(vertex.count, -1, 3)),
        extra=extra,
        comments=ply.comments,
        obj_info=ply.obj_info,
        elements={e.name: table(ply, e.name) for e in ply.elements.values() if e.name != "vertex" and not e.lists},
        layout=tuple(vertex.columns),
    )


def _read_columns(ply: PlyFile, vertex: Element, wanted: dict[str, tuple[str, ...]]) -> tuple[dict, dict]:
    """The parameters as (n, columns) float32 by name, and the other columns; all rows checked on the way."""
    n = vertex.count
    used = {name for names in wanted.values() for name in names}
    values = {key: np.empty((n, len(names)), np.float32) for key, names in wanted.items()}
    extra = {name: np.empty(n, vertex.columns[name]) for name in vertex.columns if name not in used}
    # In the file all coefficients of red come first, in the tensor all colours of the first coefficient.
    k = len(wanted["shN"]) // 3
    order = {**wanted, "shN": tuple(wanted["shN"][i % 3 * k + i // 3] for i in range(3 * k))}
    doubles = sorted(name for name in used if vertex.columns[name] == "f8")
    pick = _picking(vertex.dtype(ply.order), order)
    sound, rounded = True, False
    for first, block in read_rows(ply, "vertex"):
        rows = slice(first, first + len(block))
        parts = {key: value[rows] for key, value in values.items()}
        pick(block, parts)
        sound = sound and all(_sound(key, part) for key, part in parts.items())
        with np.errstate(over="ignore"):
            rounded = rounded or any((block[name].astype(np.float32) != block[name]).any() for name in doubles)
        for name, column in extra.items():
            column[rows] = block[name]
    if not sound:
        raise _unsound(ply.path, values, order)
    if rounded:
        text = f"{ply.path}: double columns ({', '.join(doubles[:3])} ...) are rounded to float32."
        warnings.warn(text, LossWarning, stacklevel=2)
    return values, extra


def _picking(dtype: np.dtype, order: dict[str, tuple[str, ...]]) -> Callable[[np.ndarray, dict[str, np.ndarray]], None]:
    """The function that puts the columns of a block into (rows, columns) arrays; floats alone go the fast way."""

    def by_column(block: np.ndarray, parts: dict[str, np.ndarray]) -> None:
        with np.errstate(over="ignore"):  # a double beyond float32 becomes Inf and is reported as such
            for key, names in order.items():
                for i, name in enumerate(names):
                    parts[key][:, i] = block[name]

    columns = list(dtype.names or ())
    if not FLOAT.isnative or any(dtype[name] != FLOAT for name in columns):
        return by_column
    indices = {key: torch.tensor([columns.index(name) for name in names]) for key, names in order.items() if names}

    def by_row(block: np.ndarray, parts: dict[str, np.ndarray]) -> None:
        matrix = torch.from_numpy(block.view(FLOAT).reshape(len(block), -1))
        for key, index in indices.items():
            torch.index_select(matrix, 1, index, out=torch.from_numpy(parts[key]))

    return by_row


def _sound(key: str, part: np.ndarray) -> bool:
    """Whether all numbers are finite and, of quaternions, none is 0; extremes show NaN and cost no memory."""
    if not part.size:
        return True
    bits = part.view(np.uint32)
    zero = key == "quats" and not ((bits[:, 0] | bits[:, 1] | bits[:, 2] | bits[:, 3]) << 1).all()
    return bool(np.isfinite(part.min()) and np.isfinite(part.max())) and not zero


def write_ply(gaussians: Gaussians, stream: IO[bytes], path: Path) -> None:
    """Write little-endian binary PLY to a stream; `path` is only named in errors.

    Columns come in the order of `layout`, which is that of the file they were read from, else in INRIA's with normals
    of zero, because several viewers count on them. Read and written again, a plain binary little-endian file of
    float32 parameters is the same byte for byte.
    """
    others = {
        name: table_of({key: data[key] for key in data.dtype.names or ()}) for name, data in gaussians.elements.items()
    }
    write_tables(stream, {"vertex": _vertex_out(gaussians, path), **others}, gaussians.comments, gaussians.obj_info)


def ply_losses(gaussians: Gaussians) -> list[str]:
    """Nothing: what Gaussians hold came from such a file."""
    return []


def _splat_element(ply: PlyFile) -> Element:
    """The vertex element, if this is a splat; else an InputError that says what it is."""
    path = ply.path
    if "vertex" not in ply.elements:
        found = ", ".join(ply.elements) or "no element"
        raise InputError(f"{path}: no element 'vertex', found {found}; this is not a splat.")
    vertex = ply.elements["vertex"]
    names = set(vertex.columns)
    if not names & {"opacity", "scale_0", "rot_0", "f_dc_0"}:
        faces = ply.elements["face"].count if "face" in ply.elements else 0
        kind = f"a mesh ({vertex.count} vertices, {faces} faces)" if faces else f"a point cloud ({vertex.count} points)"
        found = " ".join([*vertex.columns, *vertex.lists])
        raise InputError(
            f"{path}: this is {kind}, not a splat: element 'vertex' has {found or 'no property'}, but no opacity, "
            f"scale_*, rot_*, f_dc_*; {_trained_splat(path)}."
        )
    if "scale_2" not in names and {"scale_0", "scale_1"} <= names:
        raise InputError(
            f"{path}: element 'vertex' has scale_0 and scale_1 but no scale_2: a 2D Gaussian (surfel) scene; "
            "expected a 3D Gaussian scene, train or export one."
        )
    for element in ply.elements.values():
        if element.lists and (element.count or element is vertex):
            raise InputError(
                f"{path}: element {element.name!r} has the list property {element.lists[0]!r}, which cannot be kept; "
                "remove it from the file first."
            )
    return vertex


def _trained_splat(path: Path) -> str:
    """What to give instead of a point cloud: INRIA's training leaves the splat deeper in the same folder."""
    found = sorted(path.parent.glob("point_cloud/iteration_*/point_cloud.ply"), key=lambda p: (len(p.parts[-2]), p))
    if found:
        return f"give the trained splat {found[-1]}"
    return "train a splat from it, or give the trained one, e.g. <model>/point_cloud/iteration_30000/point_cloud.ply"


def _rest_columns(path: Path, vertex: Element) -> tuple[str, ...]:
    """f_rest_0 ... in numeric order, checked to make a whole SH degree."""
    count = sum(name.startswith("f_rest_") for name in vertex.columns)
    sizes = [3 * k for k in SH_REST.values()]
    if count not in sizes:
        expected = ", ".join(map(str, sizes))
        raise InputError(
            f"{path}: element 'vertex' has {count} properties f_rest_*, expected one of {expected} (SH degree 0 to 3); "
            "export it again with a whole SH degree."
        )
    return tuple(f"f_rest_{i}" for i in range(count))


def _check_column(path: Path, vertex: Element, name: str) -> None:
    if name not in vertex.columns:
        near = difflib.get_close_matches(name, list(vertex.columns), 1, 0.7)
        hint = f" (there is {near[0]!r})" if near and near[0] not in {n for c in COLUMNS.values() for n in c} else ""
        raise InputError(f"{path}: element 'vertex' has no property {name!r}{hint}; a splat needs it, export it again.")
    if vertex.columns[name][0] != "f":
        found = TYPE_NAMES[vertex.columns[name]]
        raise InputError(
            f"{path}: element 'vertex', property {name!r}: found the type {found}, expected float or double; "
            "export it again."
        )


def _unsound(path: Path, values: dict[str, np.ndarray], names: dict[str, tuple[str, ...]]) -> InputError:
    """The first row that holds NaN or Inf, or a quaternion of length 0."""
    bad = {key: ~np.isfinite(array) for key, array in values.items()}
    rows = np.stack([mask.any(1) for mask in bad.values()]).any(0)
    n = len(values["means"])
    if rows.any():
        row = int(rows.argmax())
        key = next(key for key, mask in bad.items() if mask[row].any())
        column = int(bad[key][row].argmax())
        return InputError(
            f"{path}: element 'vertex', property {names[key][column]!r}, row {row}: found {values[key][row, column]}, "
            f"expected a finite float32 ({rows.sum()} of {n} rows are affected); remove such Gaussians first, "
            f"e.g. `splat-transform {path.name} --filter-nan clean.ply`."
        )
    still = ~values["quats"].any(1)
    return InputError(
        f"{path}: element 'vertex', properties rot_0 to rot_3, row {int(still.argmax())}: found 0 0 0 0, expected "
        f"a quaternion ({still.sum()} of {n} rows are affected); remove such Gaussians first."
    )


def _vertex_out(gaussians: Gaussians, path: Path) -> Table:
    """All columns in the order they are written; raises InputError for what no PLY can hold."""
    values = check_write(gaussians, path)
    n, k = values["shN"].shape[:2]
    extra = _extra_out(gaussians, path)
    parts: list[tuple[Sequence[str], np.ndarray]] = [
        (names, values[key].reshape(n, len(names))) for key, names in COLUMNS.items()
    ]
    parts += [([f"f_rest_{i % 3 * k + i // 3}" for i in range(3 * k)], values["shN"].reshape(n, 3 * k))]
    parts += [((name,), column[:, None]) for name, column in extra.items()]
    order = _order_out(gaussians, extra)
    zeros = [name for name in NORMALS if name in order and name not in extra]
    parts += [(zeros, np.zeros((1, len(zeros)), np.float32).repeat(n, 0))] if zeros else []
    return Table(parts, order)


def _order_out(gaussians: Gaussians, extra: dict[str, np.ndarray]) -> list[str]:
    """The names of the columns in the order they are written."""
    rest = [f"f_rest_{i}" for i in range(3 * gaussians.shN.shape[1])]
    block = {key: list(names) for key, names in COLUMNS.items()}
    normals = list(NORMALS) if not set(NORMALS) & set(extra) else [name for name in NORMALS if name in extra]
    usual = [*block["means"], *normals, *block["sh0"], *rest]
    usual += [*block["opacities"], *block["scales"], *block["quats"]]
    usual += [name for name in extra if name not in NORMALS]
    if not gaussians.layout:
        return usual
    layout = list(gaussians.layout)
    if sorted(rest) != sorted(name for name in layout if name.startswith("f_rest_")):  # another degree by now
        first = next((i for i, name in enumerate(layout) if name.startswith("f_rest_")), None)
        first = layout.index("f_dc_2") + 1 if first is None and "f_dc_2" in layout else first or 0
        layout[first:first] = rest
    written = set(usual) | (set(NORMALS) - set(extra))
    known = dict.fromkeys(name for name in layout if name in written)
    return [*known, *(name for name in usual if name not in known and (name not in NORMALS or name in extra))]


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
