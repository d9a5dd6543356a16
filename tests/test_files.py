import hashlib
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splatedit import files
from splatedit.errors import InputError, LossWarning
from splatedit.files import Sidecar, load, save, sha256, sidecar
from splatedit.formats import ply_file
from splatedit.gaussians import SH_REST, Gaussians

PLY_TYPES = {
    "i1": "char",
    "u1": "uchar",
    "i2": "short",
    "u2": "ushort",
    "i4": "int",
    "u4": "uint",
    "f4": "float",
    "f8": "double",
}
FORMATS = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}
few = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# These write and read PLY by hand, so that the package is not tested with its own tools.


def splat_columns(n=4, degree=3, seed=0, normals=False):
    """Columns of a sound splat file by name, in INRIA's order, every number different."""
    names = ["x", "y", "z", *(["nx", "ny", "nz"] if normals else []), "f_dc_0", "f_dc_1", "f_dc_2"]
    names += [f"f_rest_{i}" for i in range(3 * SH_REST[degree])]
    names += ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=n).astype(np.float32) for name in names}


def write(path, columns, form="binary_little_endian", header=(), before=(), after=()):
    """A PLY file of one vertex element; header: lines before it; before, after: (header lines, bytes) of others."""
    n = len(next(iter(columns.values()))) if columns else 0
    lines = ["ply", f"format {form} 1.0", *header, *(line for part in before for line in part[0])]
    lines += [f"element vertex {n}"]
    lines += [f"property {PLY_TYPES[c.dtype.str[1:]]} {name}" for name, c in columns.items()]
    lines += [*(line for part in after for line in part[0]), "end_header"]
    body = b"".join(part[1] for part in before)
    order = FORMATS[form]
    for row in zip(*columns.values(), strict=True):
        if order is None:
            body += (" ".join(repr(value.item()) for value in row) + "\n").encode()
        else:
            body += b"".join(np.array(value, value.dtype.newbyteorder(order)).tobytes() for value in row)
    body += b"".join(part[1] for part in after)
    path.write_bytes("\n".join(lines).encode() + b"\n" + body)
    return path


def header_of(path):
    return path.read_bytes().split(b"end_header\n")[0].decode().splitlines()


def properties_of(path):
    return [line.split()[2] for line in header_of(path) if line.startswith("property")]


def same_bits(a, b):
    """Equal shape, dtype and bytes: NaN equals NaN, -0 differs from 0."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_same(a, b):
    for name, value in a.parameters.items():
        assert same_bits(value.numpy(), b.parameters[name].numpy()), name
    for left, right in ((a.extra, b.extra), (a.elements, b.elements)):
        assert list(left) == list(right)
        assert all(same_bits(left[name], right[name]) for name in left)
    assert (a.comments, a.obj_info) == (b.comments, b.obj_info)


def scene(n=4, degree=1, seed=0, **fields):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(n, 3), (n, 4), (n, 3), (n,), (n, 1, 3), (n, SH_REST[degree], 3)]
    return Gaussians(*(torch.randn(shape, generator=draw) for shape in shapes), **fields)


def fails(path, *parts, action=load):
    """The one line that a wrong file gets; every part must be in it, the path too."""
    with pytest.raises(InputError) as caught:
        action(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    for part in parts:
        assert part in message
    return message


# ---------------------------------------------------------------------------------------------------------------- load


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("degree", SH_REST)
def test_columns_are_read_by_name_in_any_order_and_format(tmp_path, form, degree):
    columns = splat_columns(degree=degree)
    names = list(columns)
    np.random.default_rng(degree).shuffle(names)
    scene = load(write(tmp_path / "a.ply", {name: columns[name] for name in names}, form))
    assert (scene.n, scene.sh_degree, scene.extra) == (4, degree, {})
    for tensor, prefix in (
        (scene.means, ""),
        (scene.scales, "scale_"),
        (scene.quats, "rot_"),
        (scene.sh0[:, 0], "f_dc_"),
    ):
        suffixes = "xyz" if not prefix else range(tensor.shape[1])
        for i, suffix in enumerate(suffixes):
            assert same_bits(tensor[:, i].numpy(), columns[f"{prefix}{suffix}"])
    assert same_bits(scene.opacities.numpy(), columns["opacity"])
    k = SH_REST[degree]
    for channel in range(3):  # channel-major: all of red, then green, then blue
        for j in range(k):
            assert same_bits(scene.shN[:, j, channel].numpy(), columns[f"f_rest_{channel * k + j}"])
    assert all(value.is_contiguous() and value.dtype == torch.float32 for value in scene.parameters.values())


@pytest.mark.parametrize("form", FORMATS)
def test_doubles_become_float32(tmp_path, form):
    columns = {name: column.astype(np.float64) + 1e-12 for name, column in splat_columns().items()}
    with pytest.warns(LossWarning, match=r"a.ply: double columns .* rounded to float32") as caught:
        scene = load(write(tmp_path / "a.ply", columns, form))
    assert same_bits(scene.means[:, 1].numpy(), columns["y"].astype(np.float32)) and len(caught) == 1
    exact = {name: column.astype(np.float32).astype(np.float64) for name, column in columns.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load(write(tmp_path / "b.ply", exact, form)), scene)


@pytest.mark.parametrize("form", FORMATS)
def test_extra_columns_keep_their_type_and_bits(tmp_path, form):
    draw = np.random.default_rng(1)
    extra = {f"e_{kind}": draw.integers(0, 100, 4).astype(kind) for kind in PLY_TYPES}
    extra["e_f8"] = draw.normal(size=4)
    columns = splat_columns(degree=0, normals=True)
    first = load(write(tmp_path / "a.ply", {**extra, **columns}, form, ["comment a  b ", "obj_info from here"]))
    assert list(first.extra) == [*extra, "nx", "ny", "nz"]
    assert all(same_bits(first.extra[name], column) for name, column in extra.items())
    assert all(column.dtype.isnative and column.flags.owndata for column in first.extra.values())
    assert first.comments == ("a  b ",) and first.obj_info == ("from here",)
    save(first, tmp_path / "b.ply")
    second = load(tmp_path / "b.ply")
    assert {name: column.tobytes() for name, column in first.extra.items()} == {
        name: column.tobytes() for name, column in second.extra.items()
    }
    assert properties_of(tmp_path / "b.ply") == [*extra, *columns]
    assert second.comments == first.comments and second.obj_info == first.obj_info
    for name, value in first.parameters.items():
        assert torch.equal(value, second.parameters[name])


def test_splats_that_come_from_no_file_get_normals_of_zero(tmp_path):
    save(scene(), tmp_path / "a.ply")
    assert properties_of(tmp_path / "a.ply") == list(splat_columns(degree=1, normals=True))
    assert_same(load(tmp_path / "a.ply"), scene())


# The columns of well-known writers, and what their headers say besides.
REST = {k: [f"f_rest_{i}" for i in range(k)] for k in (0, 9, 24, 45)}
DC, SCALE, ROT = ([f"{stem}_{i}" for i in range(k)] for stem, k in (("f_dc", 3), ("scale", 3), ("rot", 4)))
XYZ, NORMAL = ["x", "y", "z"], ["nx", "ny", "nz"]
WRITERS = {
    "inria": ([*XYZ, *NORMAL, *DC, *REST[45], "opacity", *SCALE, *ROT], []),
    "gsplat": ([*XYZ, *DC, *REST[24], "opacity", *SCALE, *ROT], []),
    "supersplat": ([*XYZ, *DC, "opacity", *ROT, *SCALE, *REST[9]], ["comment Generated by SuperSplat 2.7.1"]),
    "splat-transform": ([*XYZ, *SCALE, *DC, "opacity", *ROT], ["comment Generated by splat-transform 2.1.0"]),
    "nerfstudio": (
        [*XYZ, *NORMAL, *DC, *REST[45], "opacity", *SCALE, *ROT],
        ["comment Generated by Nerfstudio 1.1.5", "comment Vertical Axis: z"],
    ),
    "brush": ([*XYZ, *SCALE, "opacity", *ROT, *DC, *REST[45]], ["comment Exported from Brush", "comment  two  words "]),
    "colours": (
        [*XYZ, "red", "green", "blue", *DC, "opacity", *SCALE, *ROT, "segment"],
        ["comment ", "obj_info made"],
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_plain_file_comes_back_byte_for_byte(tmp_path, writer):
    names, header = WRITERS[writer]
    draw = np.random.default_rng(len(names))
    columns = {name: draw.normal(size=300).astype(np.float32) for name in names}
    columns |= {name: draw.integers(0, 255, 300).astype(np.uint8) for name in ("red", "green", "blue") if name in names}
    columns |= {name: np.zeros(300, np.float32) for name in NORMAL if name in names}
    label = (
        ["element label 2", "property short a", "property double b"],
        struct.pack("<hdhd", 1, 0.1, -2, float("nan")),
    )
    after = [label] if writer == "colours" else []
    path = write(tmp_path / "a.ply", columns, header=header, after=after)
    save(load(path), tmp_path / "b.ply")
    assert (tmp_path / "b.ply").read_bytes() == path.read_bytes()


def test_the_order_of_columns_survives_another_degree_and_new_columns(tmp_path):
    names, header = WRITERS["supersplat"]
    columns = {name: np.random.default_rng(1).normal(size=4).astype(np.float32) for name in names}
    first = load(write(tmp_path / "a.ply", columns, header=header))
    for degree in (0, 1, 2):
        other = first._replace(shN=torch.ones(4, SH_REST[degree], 3), extra={"new": np.arange(4, dtype=np.int32)})
        save(other, tmp_path / "b.ply")
        rest = [f"f_rest_{i}" for i in range(3 * SH_REST[degree])]
        assert properties_of(tmp_path / "b.ply") == [*XYZ, *DC, "opacity", *ROT, *SCALE, *rest, "new"]
        back = load(tmp_path / "b.ply")
        assert_same(back, other)
        if degree:
            save(back._replace(shN=first.shN, extra={}), tmp_path / "c.ply")
            assert (tmp_path / "c.ply").read_bytes() == (tmp_path / "a.ply").read_bytes()


def test_many_rows_are_read_and_written_in_blocks_while_another_thread_waits_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(ply_file, "BLOCK", 5000)
    for form in FORMATS:
        columns = splat_columns(n=1001, degree=1, normals=True) | {"id": np.arange(1001, dtype=np.uint16)}
        path = write(tmp_path / "a.ply", columns, form)
        loaded = load(path)
        assert same_bits(loaded.scales.numpy(), np.stack([columns[f"scale_{i}"] for i in range(3)], 1))
        assert loaded.extra["id"].tolist() == list(range(1001))
        save(loaded, tmp_path / "b.ply")
        if form == "binary_little_endian":
            assert (tmp_path / "b.ply").read_bytes() == path.read_bytes()
            columns["rot_2"][777] = np.nan
            fails(write(path, columns, form), "property 'rot_2', row 777: found nan", "1 of 1001")


def test_normals_that_are_not_plain_zeros_are_kept(tmp_path):
    columns = splat_columns(degree=0, normals=True)
    for name in ("nx", "ny", "nz"):
        columns[name][:] = 0
    assert load(write(tmp_path / "a.ply", columns)).extra == {}, "normals of zero say nothing"
    columns["nz"][2] = -0.0
    assert list(load(write(tmp_path / "a.ply", columns)).extra) == ["nx", "ny", "nz"]
    lonely = {name: column for name, column in columns.items() if name != "ny"}
    first = load(write(tmp_path / "b.ply", lonely))
    save(first, tmp_path / "c.ply")
    assert_same(load(tmp_path / "c.ply"), first)


def test_other_elements_are_kept(tmp_path):
    frame = (["element frame 2", "property uchar id", "comment of the frame", "property double t"], b"")
    frame = (frame[0], struct.pack("<BdBd", 7, 0.1, 8, float("nan")))
    version = (["element version 1", "property uint number"], struct.pack("<I", 3))
    first = load(write(tmp_path / "a.ply", splat_columns(), before=[frame], after=[version]))
    assert first.elements["frame"]["id"].tolist() == [7, 8]
    assert first.elements["version"].dtype == np.dtype([("number", "u4")])
    assert first.comments == ("of the frame",)
    save(first, tmp_path / "b.ply")
    assert_same(load(tmp_path / "b.ply"), first)
    edited = first._replace(means=first.means + 1)
    save(edited, tmp_path / "b.ply")
    assert_same(load(tmp_path / "b.ply"), edited)


def test_an_empty_list_element_is_no_obstacle(tmp_path):
    faces = (["element face 0", "property list uchar int vertex_indices"], b"")
    assert "face" not in load(write(tmp_path / "a.ply", splat_columns(), after=[faces])).elements


def test_windows_line_ends(tmp_path):
    path = write(tmp_path / "a.ply", splat_columns(), "ascii")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert same_bits(load(path).means[:, 0].numpy(), splat_columns()["x"])


@pytest.mark.parametrize("name", ["A.PLY", "with space.ply", "über.ply"])
def test_any_file_name_will_do(tmp_path, name):
    save(scene(), tmp_path / name)
    assert_same(load(str(tmp_path / name)), scene())


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(scene(), "~/a.ply")
    assert load("~/a.ply").n == 4


# ------------------------------------------------------------------------------------------------------- round trips


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)


@st.composite
def scenes(draw):
    n, degree = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    shapes = [(n, 3), (n, 4), (n, 3), (n,), (n, 1, 3), (n, SH_REST[degree], 3)]
    tensors = [torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=finite))) for shape in shapes]
    tensors[1][~tensors[1].any(1), 0] = 1.0
    extra = {}
    for name in draw(st.lists(words.map(lambda w: f"e{w}"), max_size=3, unique=True)):
        raw = draw(st.binary(min_size=8 * n, max_size=8 * n))  # any bits at all, NaN payloads too
        kind = draw(st.sampled_from(list(PLY_TYPES)))
        extra[name] = np.frombuffer(raw, kind)[:n].copy()
    comments = draw(st.lists(words, max_size=3))
    return Gaussians(*tensors, extra=extra, comments=tuple(comments), obj_info=tuple(comments[:1]))


@few
@given(scenes())
def test_saved_then_loaded_is_the_same_bit_for_bit(tmp_path_factory, gaussians):
    path = tmp_path_factory.mktemp("trip") / "a.ply"
    save(gaussians, path)
    back = load(path)
    assert_same(back, gaussians)
    content = path.read_bytes()
    save(back, path)
    assert path.read_bytes() == content


@few
@given(
    st.integers(0, 3),
    st.sampled_from(list(FORMATS)),
    st.permutations(["nx", "ny", "nz", "label", "weight"]),
    st.integers(0, 99),
)
def test_loaded_then_saved_then_loaded_is_the_same_bit_for_bit(tmp_path_factory, degree, form, order, seed):
    folder = tmp_path_factory.mktemp("trip")
    columns = splat_columns(n=3, degree=degree, seed=seed, normals=True)
    columns["label"], columns["weight"] = np.array([1, 200, 3], np.uint8), np.array([0.1, -0.0, 1e300])
    chosen = [*order[: seed % 5], *(name for name in columns if name not in order)]
    first = load(write(folder / "a.ply", {name: columns[name] for name in reversed(chosen)}, form))
    save(first, folder / "b.ply")
    second = load(folder / "b.ply")
    assert set(first.extra) == set(order[: seed % 5])
    for name, value in first.parameters.items():
        assert same_bits(value.numpy(), second.parameters[name].numpy())
    assert all(same_bits(column, second.extra[name]) for name, column in first.extra.items())
    save(second, folder / "c.ply")
    assert (folder / "c.ply").read_bytes() == (folder / "b.ply").read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_plyfile_agrees(tmp_path, form):
    """Another library's writing is read, and ours is read by it."""
    from plyfile import PlyData, PlyElement

    columns = splat_columns(n=50, degree=2) | {"id": np.arange(50, dtype=np.uint8)}
    table = np.rec.fromarrays(list(columns.values()), names=list(columns))
    vertex = PlyElement.describe(np.asarray(table), "vertex", comments=["in the element"])
    other = PlyElement.describe(np.array([(1, 0.5)], [("a", "i2"), ("b", "f8")]), "other")
    text, order = form == "ascii", FORMATS[form] or "="
    PlyData([vertex, other], text=text, byte_order=order, comments=["at the top"]).write(str(tmp_path / "a.ply"))
    first = load(tmp_path / "a.ply")
    assert first.comments == ("at the top", "in the element") and first.elements["other"]["b"].tolist() == [0.5]
    save(first, tmp_path / "b.ply")
    back = PlyData.read(str(tmp_path / "b.ply"))
    assert [p.name for p in back["vertex"].properties] == list(columns) and back.comments == list(first.comments)
    for name, column in columns.items():
        assert same_bits(np.array(back["vertex"][name]), column), name
    assert same_bits(first.extra["id"], columns["id"]) and back["other"]["a"].tolist() == [1]


@pytest.mark.skipif("SPLATEDIT_DATA" not in os.environ, reason="SPLATEDIT_DATA does not name a folder of real files")
def test_real_files(tmp_path):
    from plyfile import PlyData

    from splatedit.cameras import bounds, guess_up

    data = Path(os.environ["SPLATEDIT_DATA"])
    source = data / "splats" / "statue-angel.ply"
    first = load(source)
    assert (first.n, first.sh_degree, guess_up(first)) == (71359, 0, "-y")
    save(first, tmp_path / "a.ply")
    assert_same(load(tmp_path / "a.ply"), first)
    assert (tmp_path / "a.ply").read_bytes() == source.read_bytes()
    before, after = PlyData.read(source)["vertex"], PlyData.read(tmp_path / "a.ply")["vertex"]
    assert all(same_bits(np.array(before[p.name]), np.array(after[p.name])) for p in before.properties)
    assert 1.5 < bounds(first).radius < 2.5
    fails(data / "captures" / "bear" / "sparse_pc.ply", "point cloud (34174 points)", "x y z red green blue", "train")


# ------------------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_truncated(tmp_path, form, kept):
    path = write(tmp_path / "a.ply", splat_columns(degree=1), form)
    header, body = path.read_bytes().split(b"end_header\n")
    path.write_bytes(header + b"end_header\n" + body[: int(len(body) * (kept + 0.5) / 4)])
    fails(path, "element 'vertex'", f"row {kept}", "expected 4 complete rows")


def test_truncated_header(tmp_path):
    path = write(tmp_path / "a.ply", splat_columns())
    path.write_bytes(path.read_bytes()[:120])
    fails(path, "damaged PLY header", "end-of-file")


@pytest.mark.parametrize("name", ["x", "f_dc_2", "opacity", "scale_0", "rot_3"])
def test_missing_property(tmp_path, name):
    columns = splat_columns()
    del columns[name]
    fails(write(tmp_path / "a.ply", columns), "element 'vertex'", f"no property {name!r}")


def test_a_misspelt_property_is_pointed_out(tmp_path):
    columns = splat_columns()
    columns["opacities"] = columns.pop("opacity")
    fails(write(tmp_path / "a.ply", columns), "no property 'opacity' (there is 'opacities')")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("name", "value"), [("z", np.nan), ("f_rest_7", np.inf), ("opacity", -np.inf)])
def test_nan_and_inf(tmp_path, form, name, value):
    columns = splat_columns()
    columns[name][[1, 3]] = value
    path = write(tmp_path / "a.ply", columns, form)
    fails(path, f"element 'vertex', property {name!r}, row 1", f"found {value}", "2 of 4 rows")


def test_a_double_beyond_float32(tmp_path):
    columns = {name: column.astype(np.float64) for name, column in splat_columns().items()}
    columns["x"][2] = 1e300
    fails(write(tmp_path / "a.ply", columns), "property 'x', row 2", "found inf")


def test_nan_in_an_extra_column_is_nobodys_business(tmp_path):
    columns = {**splat_columns(), "confidence": np.full(4, np.nan, np.float32)}
    assert np.isnan(load(write(tmp_path / "a.ply", columns)).extra["confidence"]).all()


def test_a_quaternion_of_zeros(tmp_path):
    columns = splat_columns()
    for i in range(4):
        columns[f"rot_{i}"][2] = 0
    fails(write(tmp_path / "a.ply", columns), "rot_0 to rot_3, row 2", "1 of 4 rows")


@pytest.mark.parametrize("form", FORMATS)
def test_zero_gaussians(tmp_path, form):
    fails(write(tmp_path / "a.ply", splat_columns(n=0), form), "0 Gaussians")


@pytest.mark.parametrize("count", [1, 3, 8, 10, 44, 46, 72])
def test_a_broken_number_of_coefficients(tmp_path, count):
    columns = splat_columns(degree=0) | {f"f_rest_{i}": np.zeros(4, np.float32) for i in range(count)}
    fails(write(tmp_path / "a.ply", columns), f"{count} properties f_rest_*", "0, 9, 24, 45")


def test_coefficients_with_a_gap(tmp_path):
    columns = splat_columns(degree=1)
    columns["f_rest_9"] = columns.pop("f_rest_4")
    fails(write(tmp_path / "a.ply", columns), "no property 'f_rest_4'")


def test_a_parameter_of_whole_numbers(tmp_path):
    columns = splat_columns()
    columns["opacity"] = np.array([0, 128, 255, 3], np.uint8)
    fails(write(tmp_path / "a.ply", columns), "property 'opacity'", "found the type uchar")


POINTS = {
    **{name: np.arange(4, dtype=np.float32) for name in ("x", "y", "z", "nx", "ny", "nz")},
    **{name: np.arange(4, dtype=np.uint8) for name in ("red", "green", "blue")},
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_point_cloud_of_colmap(tmp_path, form):
    path = write(tmp_path / "input.ply", POINTS, form)
    fails(path, "point cloud (4 points), not a splat", "x y z nx ny nz red green blue", "point_cloud/iteration_30000")


def test_the_trained_splat_beside_a_point_cloud_is_named(tmp_path):
    path = write(tmp_path / "input.ply", POINTS)
    for steps in (7000, 30000):
        trained = tmp_path / "point_cloud" / f"iteration_{steps}" / "point_cloud.ply"
        trained.parent.mkdir(parents=True)
        save(scene(), trained)
    fails(path, f"give the trained splat {trained}")
    fails(tmp_path, "is a folder", f"{trained}")


def test_a_mesh(tmp_path):
    face = (["element face 1", "property list uchar int vertex_indices"], struct.pack("<Biii", 3, 0, 1, 2))
    fails(write(tmp_path / "a.ply", POINTS, after=[face]), "this is a mesh (4 vertices, 1 faces), not a splat")


def test_a_list_in_a_splat(tmp_path):
    face = (["element face 1", "property list uchar int corners"], struct.pack("<Biii", 3, 0, 1, 2))
    fails(write(tmp_path / "a.ply", splat_columns(), after=[face]), "element 'face'", "list property 'corners'")


def test_surfels(tmp_path):
    columns = splat_columns()
    del columns["scale_2"]
    fails(write(tmp_path / "a.ply", columns), "2D Gaussian (surfel)")


def test_no_vertices_at_all(tmp_path):
    (tmp_path / "a.ply").write_text("ply\nformat ascii 1.0\nelement camera 1\nproperty float x\nend_header\n1\n")
    fails(tmp_path / "a.ply", "no element 'vertex', found camera")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\x00\x01\x02", "starts with"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PK\x03\x04", "a zip archive"),
        (b"plyometrics\n", "a damaged PLY header"),
        (b"ply\nformat ascii 2.0\nend_header\n", "expected version '1.0'"),
        (b"ply\nformat ascii 1.0\nelement vertex many\nend_header\n", "line 3"),
        (b"ply\nformat ascii 1.0\nelement vertex -3\nproperty float x\nend_header\n", "damaged PLY"),
        (b"ply\nformat binary_little_endian 1.0\nelement vertex -3\nproperty float x\nend_header\n", "damaged PLY"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 99999999999999999\nproperty float x\nend_header\n1\n",
            "row 1: early end-of-file, expected 99999999999999999 complete rows",
        ),
        (b"ply\nformat ascii 1.0\nelement vertex " + b"9" * 30 + b"\nproperty float x\nend_header\n1\n", "line 3"),
        (b"ply\nformat ascii 1.0\nformat ascii 1.0\n", "found end-of-file before end_header"),
        (b"ply\nformat ascii 1.0\nformat ascii 1.0\nend_header\n", "line 3: a second format"),
        (b"ply\nelement vertex 0\nend_header\n", "no line `format"),
        (b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", "line 3: property before the first element"),
        (b"ply\nformat ascii 1.0\nelement a 0\nproperty quad x\nend_header\n", "line 4: found property 'quad x'"),
        (b"ply\nformat ascii 1.0\nelement a 0\nelement a 0\nend_header\n", "line 4: two elements with the same name"),
        (b"ply\nformat ascii 1.0\nelement a 0\nproperty float caf\xc3\xa9\nend_header\n", "ASCII"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float x\nend_header\n1 1\n",
            "same name",
        ),
        (b"ply\n" + bytes(range(1, 200)), "damaged PLY header"),
        (
            b"ply\nformat ascii 1.0\nelement a 0\n"
            + b"".join(b"property int p%d\n" % i for i in range(20_000))
            + b"end_header\n",
            "line 4098: more than 4096 elements and properties",
        ),
        (b"ply\n" + bytes(3 << 20), "found 1048576 bytes before end_header"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_not_a_ply(tmp_path, content, message):
    (tmp_path / "a.ply").write_bytes(content)
    fails(tmp_path / "a.ply", message)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("one", "row 2, property 'opacity': found 'one', expected a number that fits the type float"),
        ("1 2", "row 2: found 16 numbers, expected 15"),
        ("", "row 2: found 14 numbers, expected 15"),
        ("\xff", r"row 2, property 'opacity': found '\xff'"),
        ("inf", "property 'opacity', row 2: found inf, expected a finite float32"),
        ("1e39", "property 'opacity', row 2: found inf"),
    ],
)
def test_a_wrong_number_in_an_ascii_file(tmp_path, word, message):
    columns = splat_columns(degree=0) | {"id": np.arange(4, dtype=np.uint8)}
    path = write(tmp_path / "a.ply", columns, "ascii")
    lines = path.read_bytes().split(b"\n")
    row = lines[-3].split(b" ")
    row[6] = word.encode("latin-1")
    lines[-3] = b" ".join(row)
    path.write_bytes(b"\n".join(lines))
    fails(path, message)


@pytest.mark.parametrize("number", ["256", "-1", "1.5", "nan"])
def test_a_number_that_does_not_fit_its_type(tmp_path, number):
    path = write(tmp_path / "a.ply", splat_columns(degree=0) | {"id": np.full(4, 77, np.uint8)}, "ascii")
    path.write_bytes(path.read_bytes()[: -len("77\n")] + number.encode())
    fails(path, "row 3, property 'id'", "fits the type uchar")


def test_comments_in_any_language_are_no_obstacle(tmp_path):
    path = write(tmp_path / "a.ply", splat_columns(), header=["comment caf?"])
    path.write_bytes(path.read_bytes().replace(b"caf?", "caf\xe9".encode()))
    assert load(path).comments == ("caf\xe9",)


@few
@given(st.integers(0, 399), st.binary(min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path_factory, at, junk):
    path = write(tmp_path_factory.mktemp("junk") / "a.ply", splat_columns(n=2, degree=0))
    content = path.read_bytes()
    path.write_bytes(content[:at] + junk + content[at + len(junk) :])
    try:
        assert load(path).n >= 1
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)


@pytest.mark.parametrize("name", ["a.lcc"])
def test_formats_that_can_be_converted(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    fails(tmp_path / name, f"found a {Path(name).suffix} file", "expected .ply", f"splat-transform {name} a.ply")


@pytest.mark.parametrize(("name", "found"), [("a.obj", "a .obj file"), ("ply", "a file without extension")])
def test_formats_that_cannot(tmp_path, name, found):
    (tmp_path / name).write_bytes(b"x")
    fails(tmp_path / name, found, "expected .ply")


def test_a_missing_file_suggests_names_nearby(tmp_path):
    save(scene(), tmp_path / "penguin.ply")
    fails(tmp_path / "pengiun.ply", "no such file", f"did you mean {tmp_path / 'penguin.ply'}?")
    fails(tmp_path / "Penguin.PLY", f"did you mean {tmp_path / 'penguin.ply'}?")
    fails(tmp_path / "zebra.ply", "no such file", "holds penguin.ply")
    fails(tmp_path / "none" / "a.ply", "no such file, and no folder")
    fails(tmp_path, "is a folder", "penguin.ply")
    (tmp_path / "penguin.ply").unlink()
    fails(tmp_path / "zebra.ply", "holds no splat file")
    fails(tmp_path, "is a folder", "holds no splat file")
    fails(tmp_path / f"{'a' * 300}.ply", "File name too long")


# ---------------------------------------------------------------------------------------------------------------- save


def failing_save(gaussians, path, *parts):
    """A save that is refused and leaves the folder as it was."""
    before = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()} if path.parent.is_dir() else {}
    message = fails(path, *parts, action=lambda target: save(gaussians, target))
    after = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()} if path.parent.is_dir() else {}
    assert after == before
    return message


@pytest.mark.parametrize("name", ["a.ksplat", "a", "a.ply.txt"])
def test_only_known_endings_are_written(tmp_path, name):
    failing_save(scene(), tmp_path / name, "cannot write", "only .ply", "rename")


def test_a_quaternion_of_zero_is_not_written(tmp_path):
    broken = scene(3)
    broken.quats[1] = 0
    failing_save(broken, tmp_path / "a.ply", "quats of Gaussian 1 is 0 0 0 0")


def test_the_target_must_have_a_place(tmp_path):
    failing_save(scene(), tmp_path / "none" / "a.ply", f"the folder {tmp_path / 'none'} does not exist")
    (tmp_path / "folder.ply").mkdir()
    failing_save(scene(), tmp_path / "folder.ply", "is a folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": torch.tensor([[1.0, 2, 3], [4, np.nan, 6]])}, "means of Gaussian 1 is not finite"),
        ({"opacities": torch.zeros(2, 1)}, "opacities has shape (2, 1), expected (2,)"),
        ({"sh0": torch.zeros(2, 3)}, "sh0 has shape (2, 3), expected (2, 1, 3)"),
        ({"shN": torch.zeros(2, 4, 3)}, "shN has 4 coefficients"),
        ({"shN": torch.zeros(2, 9)}, "shN has shape"),
        ({"extra": {"id": np.zeros(3, np.uint8)}}, "'id' has shape (3,), expected (2,)"),
        ({"extra": {"id": np.zeros(2, np.int64)}}, "'id' is int64"),
        ({"extra": {"id": np.zeros(2, np.float16)}}, "'id' is float16"),
        ({"extra": {"id": np.zeros(2, bool)}}, "'id' is bool"),
        ({"extra": {"id": np.array(["a", "b"])}}, "'id' is <U1"),
        ({"extra": {"rot_0": np.zeros(2, np.float32)}}, "'rot_0': the name is taken"),
        ({"extra": {"f_rest_3": np.zeros(2, np.float32)}}, "'f_rest_3': the name is taken"),
        ({"extra": {"my id": np.zeros(2, np.float32)}}, "without spaces"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_unsound_scene_is_not_written(tmp_path, change, message):
    save(scene(2), tmp_path / "a.ply")
    failing_save(scene(2)._replace(**change), tmp_path / "a.ply", message)
    failing_save(scene(2)._replace(**change), tmp_path / "b.ply", message)


def test_no_gaussian_is_left(tmp_path):
    failing_save(scene().select([]), tmp_path / "a.ply", "0 Gaussians")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    save(scene(seed=1), tmp_path / "a.ply")
    before = (tmp_path / "a.ply").read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save(scene(seed=2), tmp_path / "a.ply")
    if isinstance(error, OSError):
        assert "cannot be written (No space left on device)" in str(caught.value)
    assert (tmp_path / "a.ply").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_save_replaces_what_was_there_and_keeps_its_mode_and_link(tmp_path):
    save(scene(seed=1), tmp_path / "a.ply")
    os.chmod(tmp_path / "a.ply", 0o640)
    (tmp_path / "link.ply").symlink_to("a.ply")
    first = load(tmp_path / "a.ply")
    save(scene(seed=2), tmp_path / "link.ply")
    assert (tmp_path / "link.ply").is_symlink()
    assert_same(load(tmp_path / "a.ply"), scene(seed=2))
    assert (tmp_path / "a.ply").stat().st_mode & 0o777 == 0o640
    assert_same(first, scene(seed=1))  # what was loaded does not depend on the file any more
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ply", "link.ply"]


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    save(scene(), tmp_path / "a.ply")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.ply").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_gradients_and_strides_do_not_matter(tmp_path):
    first = scene(degree=3)
    odd = first._replace(
        means=first.means.clone().requires_grad_(),
        shN=first.shN.transpose(1, 2).contiguous().transpose(1, 2),
        scales=first.scales.double(),
    )
    save(odd, tmp_path / "a.ply")
    assert_same(load(tmp_path / "a.ply"), first)


def test_comments_become_plain_ascii(tmp_path):
    save(scene(comments=("prompt: a caf\xe9\nin the rain", "")), tmp_path / "a.ply")
    assert load(tmp_path / "a.ply").comments == ("prompt: a caf\\xe9 in the rain", "")


# -------------------------------------------------------------------------------------------------------------- beside


def test_sidecar(tmp_path):
    assert sidecar(tmp_path / "cat.ply") == Sidecar(None, None)
    (tmp_path / "cat.yaml").write_text("# the scene\nsource_prompt: a cat\nup: +y\n")
    assert sidecar(tmp_path / "cat.ply") == Sidecar("a cat", "+y")
    assert sidecar(str(tmp_path / "dog.ply")) == Sidecar()
    (tmp_path / "cat.yaml").write_text("up: -y\n")
    assert sidecar(tmp_path / "cat.ply") == Sidecar(up="-y")
    (tmp_path / "cat.yaml").write_text("")
    assert sidecar(tmp_path / "cat.ply") == Sidecar()
    assert sidecar(".") == Sidecar()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source_promt: a cat", "unknown key 'source_promt'; did you mean 'source_prompt'?"),
        ("zzz: 1", "unknown key 'zzz'; known are source_prompt, up"),
        ("up: y", "up is 'y', expected one of +x, -x"),
        ("source_prompt: 3", "source_prompt is 3, expected text"),
        ("up: [", "not readable as yaml"),
        ("a cat", "found str, expected lines like"),
    ],
)
def test_a_wrong_sidecar(tmp_path, text, message):
    (tmp_path / "cat.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        sidecar(tmp_path / "cat.ply")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "cat.yaml"))


def test_sha256(tmp_path):
    content = bytes(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
