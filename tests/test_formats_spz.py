import gzip
import io
import math
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_scenes import FIXTURES, fails, scene, trip, turned

from splatedit.errors import InputError, LossWarning
from splatedit.files import load, save
from splatedit.formats.packing import ANTIALIASED
from splatedit.formats.spz import bits_for, read_spz, spz_losses, write_spz

few = settings(
    max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def written(gaussians, path, **options):
    stream = io.BytesIO()
    write_spz(gaussians, stream, path, **options)
    path.write_bytes(stream.getvalue())
    return path


# These write .spz by hand, after the spec, so that the package is not tested with its own tools.


def header(version=3, count=1, degree=0, bits=12, flags=0, magic=b"NGSP"):
    return struct.pack("<4sIIBBBB", magic, version, count, degree, bits, flags, 0)


COLUMNS = {
    "means": bytes([0, 16, 0]) + bytes([0, 224, 255]) + bytes([0, 8, 0]),  # 1, -2, 0.5 in 1/4096
    "opacities": bytes([51]),  # a fifth
    "sh0": bytes([0, 255, 51]),
    "scales": bytes([160, 0, 255]),  # 0, -10, 5.9375
    # 0xC...: w is missing; x is +511/511 of 1/sqrt(2), y -0, z 0: a quarter turn about x.
    "quats": struct.pack("<I", 3 << 30 | 511 << 20 | 512 << 10),
}
SH1 = bytes([0, 128, 255, 64, 192, 128, 129, 127, 128])


def check_by_hand(g):
    assert g.means.tolist() == [[1, -2, 0.5]]
    assert g.scales.tolist() == [[0, -10, 5.9375]]
    assert g.opacities.item() == pytest.approx(math.log(0.2 / 0.8))
    torch.testing.assert_close(g.sh0[0, 0], torch.tensor([-0.5, 0.5, -0.3]) / 0.15)
    torch.testing.assert_close(g.quats.abs(), torch.tensor([[1.0, 1, 0, 0]]) / math.sqrt(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_version_3_byte_by_byte(tmp_path, packed):
    data = header() + b"".join(COLUMNS.values())
    (tmp_path / "a.spz").write_bytes(gzip.compress(data) if packed else data)
    g = load(tmp_path / "a.spz")
    check_by_hand(g)
    assert g.shN.shape == (1, 0, 3) and g.comments == ()


def test_version_2_byte_by_byte(tmp_path):
    """x y z as bytes of -1 to 1, w positive; a coordinate with 8 bits behind the point."""
    columns = COLUMNS | {"means": bytes([0, 1, 0, 0, 254, 255, 128, 0, 0]), "quats": bytes([0, 0, 0])}
    columns["quats"] = bytes([204, 51, 204])  # 0.6, -0.6, 0.6 leave nothing for w
    (tmp_path / "a.spz").write_bytes(gzip.compress(header(2, bits=8) + b"".join(columns.values())))
    g = load(tmp_path / "a.spz")
    assert g.means.tolist() == [[1, -2, 0.5]]
    torch.testing.assert_close(g.quats, torch.tensor([[0, 0.6, -0.6, 0.6]]))


def version_4(columns, extensions=b"", flags=0, degree=0, count=1, table=None, sizes=None):
    zstandard = pytest.importorskip("zstandard")
    packed = [zstandard.ZstdCompressor().compress(column) for column in columns]
    table = 32 + len(extensions) if table is None else table
    start = struct.pack("<4sIIBBBBI12x", b"NGSP", 4, count, degree, 12, flags, len(columns), table)
    sizes = sizes or [(len(p), len(c)) for p, c in zip(packed, columns, strict=True)]
    return start + extensions + b"".join(struct.pack("<QQ", *size) for size in sizes) + b"".join(packed)


def test_version_4_byte_by_byte(tmp_path):
    extension = struct.pack("<IIf", 0xADBE0002, 4, 1.5)
    columns = [*COLUMNS.values(), SH1]
    (tmp_path / "a.spz").write_bytes(version_4(columns, extension, flags=3, degree=1))
    with pytest.warns(LossWarning, match="skipped the extension 0xadbe0002"):
        g = load(tmp_path / "a.spz")
    check_by_hand(g)
    # Coefficient by coefficient, red green blue each.
    expected = [[[-1, 0, 127 / 128], [-0.5, 0.5, 0], [1 / 128, -1 / 128, 0]]]
    assert g.shN.tolist() == expected
    assert g.comments == (ANTIALIASED,)


def test_the_quaternion_that_is_largest_is_written_out(tmp_path):
    """Every place of the largest, both signs: 2 bits, then sign and 9 bits of each of the others."""
    for place in range(4):
        for sign in (1, -1):
            xyzw = [0.5] * 4
            xyzw[place] = 0.5001
            g = scene(1)
            g.quats[0] = sign * torch.tensor([xyzw[3], *xyzw[:3]])
            path = written(g, tmp_path / "a.spz")
            word = struct.unpack("<I", gzip.decompress(path.read_bytes())[16 + 16 : 16 + 20])[0]
            level = round(511 * 0.5 * math.sqrt(2))
            assert word == place << 30 | level << 20 | level << 10 | level
            assert turned(g.quats, load(path).quats).max() < 0.2


# ------------------------------------------------------------------------------------------------------- round trips


@few
@given(st.integers(1, 50), st.integers(0, 3), st.sampled_from([2, 3, 4]), st.integers(0, 99))
def test_a_round_trip_stays_within_the_bits(tmp_path, n, degree, version, seed):
    g = scene(n, degree, seed)
    h = load(written(g, tmp_path / "a.spz", version=version))
    step = 2.0 ** -bits_for(float(g.means.abs().max()))
    assert step <= 1 / 4096
    assert (g.means - h.means).abs().max() <= 0.5001 * step
    assert (g.scales - h.scales).abs().max() <= 0.5001 / 16
    assert (g.opacities.sigmoid() - h.opacities.sigmoid()).abs().max() <= 0.5001 / 255
    assert (g.sh0 - h.sh0).abs().max() <= 0.5001 / 255 / 0.15
    assert degree == 0 or (g.shN - h.shN).abs().max() <= 0.5001 / 128
    # The number left out is at least 1/2 (3, 4) or |w| (2): errors of the three others weigh up to 1 over that.
    w = torch.nn.functional.normalize(g.quats, dim=1)[:, 0].abs()
    error, least = (0.5 / 127.5, w) if version == 2 else (0.5 * math.sqrt(0.5) / 511, torch.full_like(w, 0.5))
    sure = least > 0.3
    assert (turned(g.quats, h.quats) <= torch.rad2deg(1.1 * 2 * math.sqrt(3) * error / least))[sure].all()
    assert turned(g.quats, h.quats).max() < 15


@pytest.mark.parametrize("version", [2, 3, 4])
def test_what_was_read_is_written_the_same(tmp_path, version):
    first = load(written(scene(300, 3), tmp_path / "a.spz", version=version))
    second = load(written(first, tmp_path / "b.spz", version=version))
    for name in ("means", "scales", "opacities", "sh0", "shN"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert turned(first.quats, second.quats).max() < (1 if version == 2 else 0.3)


def test_versions_hold_the_same_and_the_default_is_3(tmp_path):
    g = scene(100, 2)
    three, four = (load(written(g, tmp_path / f"{v}.spz", version=v)) for v in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(three.parameters.values(), four.parameters.values(), strict=True))
    with pytest.warns(LossWarning):
        save(g, tmp_path / "a.spz")
    assert (tmp_path / "a.spz").read_bytes() == (tmp_path / "3.spz").read_bytes(), "the same at any time"
    assert gzip.decompress((tmp_path / "a.spz").read_bytes())[:8] == b"NGSP\3\0\0\0"
    with pytest.raises(InputError, match="version 1 of .spz"):
        write_spz(g, io.BytesIO(), tmp_path / "a.spz", version=1)


def test_fewer_bits_of_the_harmonics(tmp_path):
    """Niantic's 5 of 8 for degree 1 and 4 for the others: half a bucket, and half a level to the nearest of 256."""
    g = scene(50, 3)
    h = load(written(g, tmp_path / "a.spz", sh_bits=(5, 4)))
    levels = (h.shN * 128).numpy()
    assert not np.any(levels[:, :3] % 8) and not np.any(levels[:, 3:] % 16)
    assert (g.shN - h.shN)[:, :3].abs().max() <= (4 + 0.5) / 128
    assert (g.shN - h.shN)[:, 3:].abs().max() <= (8 + 0.5) / 128


@few
@given(st.floats(1e-6, 1e9, allow_nan=False))
def test_bits_behind_the_point(reach):
    bits = bits_for(reach)
    assert 0 <= bits <= 23
    if reach <= 8388607:
        assert reach * 2**bits <= 2**23 - 1, "it fits"
    if 8 <= reach < 2047:
        assert bits == 12, "as Niantic writes"
    if 1e-2 <= reach < 2047:
        assert 2.0**-bits <= min(2 * reach / 65536, 1 / 4096), "fine enough for a small scene"


def test_a_scene_too_wide_for_24_bits(tmp_path):
    g = scene(3)
    g.means[1, 0] = 100_000.0
    h = trip(g, tmp_path / "a.spz")
    assert (g.means - h.means).abs().max() <= 0.5 / 2 ** bits_for(100_000) <= 0.01
    g.means[1, 0] = 1e7
    with pytest.raises(InputError, match="the farthest coordinate is 1e\\+07, expected at most"):
        save(g, tmp_path / "b.spz")
    assert not (tmp_path / "b.spz").exists()


def test_losses_are_counted(tmp_path):
    g = scene(5, 3, comments=("by hand", "SplatRenderMode: mip"))
    g.scales[1] = -20.0
    g.sh0[2] = 8.0
    g.shN[3, 4] = 2.0
    losses = spz_losses(g)
    assert losses[0] == "scales below -10 or above 5.94 (1 of 5 Gaussians)"
    assert losses[1] == "colours beyond the range (1 of 5 Gaussians)"
    assert losses[2] == "spherical harmonics below -1 or above 1 (1 of 5 Gaussians)"
    assert losses[3].startswith("precision (positions to 1/16384, scales to 1/16; 10 bits for rotations")
    assert losses[4:] == ["header comments"]
    h = trip(g, tmp_path / "a.spz")
    assert (h.scales[1] == -10).all() and (h.shN[3, 4] <= 1).all() and h.comments == (ANTIALIASED,)
    assert [loss.split()[0] for loss in spz_losses(scene(5))] == ["precision"]


def test_the_flag_of_antialiasing_is_a_comment(tmp_path):
    for comments, flag in ((("splatRenderMode:  MIP ",), 1), ((), 0), ((ANTIALIASED, "SplatRenderMode: default"), 0)):
        path = written(scene(2, comments=comments), tmp_path / "a.spz")
        assert gzip.decompress(path.read_bytes())[14] & 1 == flag
        assert load(path).comments == ((ANTIALIASED,) if flag else ())


# -------------------------------------------------------------------------------------------------------------- axes


@pytest.mark.parametrize("version", [2, 3, 4])
def test_axes_stay_and_are_named(tmp_path, version):
    """Coordinates are the .ply's own; the extension SPZ_ADOBE_coordinate_system says RDF, number 6."""
    g = scene(1)
    g.means[0] = torch.tensor([1.0, 2.0, 3.0])
    path = written(g, tmp_path / "a.spz", version=version)
    record = struct.pack("<III", 0xADBE0003, 4, 6)
    data = path.read_bytes()
    if version == 4:
        assert data[14] & 2 and data[32:44] == record and struct.unpack_from("<I", data, 16) == (44,)
    else:
        data = gzip.decompress(data)
        assert data[14] & 2 and data[-12:] == record
        bits = data[13]
        assert int.from_bytes(data[16:19], "little") == 1 << bits and int.from_bytes(data[19:22], "little") == 2 << bits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path).means.tolist() == [[1, 2, 3]]


def test_other_axes_are_told_and_kept(tmp_path):
    record = struct.pack("<III", 0xADBE0003, 4, 4) + struct.pack("<II", 0x12340001, 3) + b"abc"
    (tmp_path / "a.spz").write_bytes(gzip.compress(header(flags=2) + b"".join(COLUMNS.values()) + record))
    with pytest.warns(LossWarning, match="the coordinate system RUB .*, the extension 0x12340001 \\(3 bytes\\)"):
        assert load(tmp_path / "a.spz").means.tolist() == [[1, -2, 0.5]]


# --------------------------------------------------------------------------------------------------------- bad files

BODY = b"".join(COLUMNS.values())


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"", ("an empty file", "not a .spz file")),
        (b"ply\n", ("starts with b'ply", "not a .spz file")),
        (gzip.compress(b"hello, world, this is no splat"), ("found b'hell'", "NGSP")),
        (gzip.compress(header(1) + BODY), ("version 1", "expected 2 or 3")),
        (gzip.compress(header(9) + BODY), ("version 9",)),
        (b"NGSP\5\0\0\0" + bytes(99), ("version 5", "expected 4")),
        (gzip.compress(header(degree=4) + BODY), ("degree 4", "expected 0 to 3", "splat-transform a.spz -H 3 a.ply")),
        (gzip.compress(header(bits=24) + BODY), ("24 fractional bits",)),
        (gzip.compress(header(flags=0x80) + BODY), ("levels of detail as Spark builds them",)),
        (gzip.compress(header(count=0) + BODY), ("promises 0 Gaussians",)),
        (gzip.compress(header(count=2) + BODY), ("promises 2 Gaussians", "cut short")),
        (gzip.compress(header(count=4_000_000_000) + BODY), ("would unpack",)),
        (gzip.compress(header() + BODY)[:-12], ("cut short",)),
        (gzip.compress(header() + BODY[:-1]), ("cut short",)),
        (b"\x1f\x8b" + bytes(40), ("gzip",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_files_that_are_refused(tmp_path, data, parts):
    (tmp_path / "a.spz").write_bytes(data)
    fails(tmp_path / "a.spz", *parts)


def test_streams_that_do_not_fit(tmp_path):
    columns = list(COLUMNS.values())
    good = version_4(columns)
    sizes = [struct.unpack_from("<QQ", good, 32 + 16 * i) for i in range(5)]
    for data, *parts in (
        (good[:40], "cut short"),
        (good[:-3], "stream 4 (quats)", "left"),
        (version_4(columns[:4]), "4 streams", "expected 5"),
        (version_4(columns, degree=1), "5 streams", "expected 6"),
        (version_4(columns, table=8), "from byte 8 on"),
        (version_4(columns, table=1 << 30), "damaged or cut short"),
        (version_4(columns, sizes=[(sizes[0][0], 1 << 40), *sizes[1:]]), "promises 1099511627776 bytes"),
        (version_4([columns[0][:5], *columns[1:]], sizes=sizes), "stream"),
        (version_4([columns[0] * 2, *columns[1:]], sizes=[(21 + 0, 9), *sizes[1:]]), "means"),
        (version_4(columns, count=10**9), "would unpack"),
        (version_4(columns, count=0, sizes=[(s[0], 0) for s in sizes]), "means"),
    ):
        (tmp_path / "a.spz").write_bytes(data)
        fails(tmp_path / "a.spz", *parts)


@few
@given(st.sampled_from([2, 3, 4]), st.integers(0, 10**6), st.binary(min_size=1, max_size=6), st.booleans())
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, version, at, junk, cut):
    path = written(scene(20, 1), tmp_path / "a.spz", version=version)
    data = path.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + junk + (b"" if cut else data[at + len(junk) :]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LossWarning)
            assert load(path).n >= 1
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def test_without_zstandard_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(InputError, match="splatedit\\[spz\\]"):
        write_spz(scene(2), io.BytesIO(), tmp_path / "a.spz", version=4)
    (tmp_path / "a.spz").write_bytes(header(4) + bytes(16 + 5 * 16))
    (tmp_path / "a.spz").write_bytes(
        struct.pack("<4sIIBBBBI12x", b"NGSP", 4, 1, 0, 12, 0, 5, 32)
        + b"".join(struct.pack("<QQ", 1, len(column)) for column in COLUMNS.values())
        + bytes(5)
    )
    fails(tmp_path / "a.spz", "zstandard")


@pytest.mark.parametrize("name", ["raw", "v2", "v3", "v4"])
def test_the_fixtures_of_splat_transform(name):
    """Four Gaussians 0.1 wide; 3 and 4 were made when splat-transform turned y and z, 2 when it did not."""
    path = FIXTURES / "fixtures" / f"minimal-{name}.spz"
    if not path.is_file():
        pytest.skip("needs the fixtures beside the repository")
    g = read_spz(path)
    z = 1 if name in ("v3", "v4") else -1
    assert g.means.tolist() == [[-1, 0, z], [0, 0, z], [-1, 0, 0], [0, 0, 0]]
    assert (g.scales == -2.3125).all() and np.isclose(g.opacities.sigmoid() * 255, 230).all()
    assert turned(g.quats, torch.tensor([[1.0, 0, 0, 0]] * 4)).max() < 1
