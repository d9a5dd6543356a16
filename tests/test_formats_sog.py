import io
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_scenes import FIXTURES, fails, scene, trip, turned
from PIL import Image

from splatedit.errors import InputError, LossWarning
from splatedit.files import load, save
from splatedit.formats.codebooks import codebook, palette
from splatedit.formats.sog import _extent, palette_size, sog_losses

few = settings(
    max_examples=10, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# ------------------------------------------------------------------------------------------------ written by hand
# After the spec, so that the package is not tested with its own tools.


def picture(pixels, kind="WEBP", **options):
    """A lossless picture from rows of (r, g, b, a)."""
    out = io.BytesIO()
    image = Image.fromarray(np.array(pixels, np.uint8))
    image.save(out, kind, **({"lossless": True, "exact": True} | options if kind == "WEBP" else {}))
    return out.getvalue()


def by_hand(**changes):
    """Three Gaussians in pictures of 2 x 2, version 2, all files by name; a change of None drops a file."""
    ln2 = math.log(2)
    meta = {
        "version": 2,
        "count": 3,
        "means": {"mins": [-ln2, 0, 0], "maxs": [ln2, 0, 1], "files": ["l.webp", "u.webp"]},
        "scales": {"codebook": [-5.0, -1.0, 0.5], "files": ["s.webp"]},
        "quats": {"files": ["q.webp"]},
        "sh0": {"codebook": [-1.5, 0.25, 2.0], "files": ["c.webp"]},
    }
    files = {
        "l.webp": picture([[[0, 7, 0, 255], [255, 7, 0, 255]], [[0, 7, 1, 255], [9, 9, 9, 9]]]),
        "u.webp": picture([[[0, 0, 0, 255], [255, 0, 0, 255]], [[0, 0, 128, 255], [9, 9, 9, 9]]]),
        "s.webp": picture([[[0, 1, 2, 255], [2, 2, 2, 255]], [[0, 0, 0, 255], [9, 9, 9, 9]]]),
        "q.webp": picture([[[0, 255, 0, 252], [0, 255, 0, 254]], [[0, 0, 255, 7], [9, 9, 9, 9]]]),
        "c.webp": picture([[[0, 1, 2, 51], [2, 1, 0, 0]], [[0, 0, 0, 255], [9, 9, 9, 9]]]),
    }
    files = {"meta.json": json.dumps(meta | changes.pop("meta", {})).encode(), **files, **changes}
    return {name: data for name, data in files.items() if data is not None}


def zipped(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def check_by_hand(g):
    assert g.n == 3
    torch.testing.assert_close(g.means[:, 0], torch.tensor([-1.0, 1.0, -1.0]))
    assert g.means[:, 1].tolist() == [0, 0, 0]  # both ends alike: the level does not matter
    torch.testing.assert_close(g.means[:, 2], torch.tensor([0, 0, math.exp(0x8001 / 65535) - 1]))
    assert g.scales.tolist() == [[-5, -1, 0.5], [0.5, 0.5, 0.5], [-5, -5, -5]]
    half = math.sqrt(0.5)
    assert g.quats[2].tolist() == [1, 0, 0, 0]  # 7 is no quaternion
    torch.testing.assert_close(g.quats[0], torch.tensor([0, -half, half, -half]))  # three of 1/2 leave nothing
    torch.testing.assert_close(g.quats[1], torch.tensor([-half, half, 0, -half]))
    assert g.sh0[:, 0].tolist() == [[-1.5, 0.25, 2], [2, 0.25, -1.5], [-1.5, -1.5, -1.5]]
    torch.testing.assert_close(g.opacities.sigmoid(), torch.tensor([0.2, 0, 1]), atol=2e-6, rtol=0)
    assert g.shN.shape == (3, 0, 3) and g.comments == ()


def test_a_zip_byte_by_byte(tmp_path):
    check_by_hand(load(zipped(tmp_path / "a.sog", by_hand())))
    check_by_hand(load(zipped(tmp_path / "b.sog", by_hand(), zipfile.ZIP_DEFLATED)))


def test_a_folder_and_its_meta_json(tmp_path):
    for name, data in by_hand().items():
        (tmp_path / name).write_bytes(data)
    check_by_hand(load(tmp_path))
    check_by_hand(load(tmp_path / "meta.json"))


def test_png_will_do(tmp_path):
    scales = picture([[[0, 1, 2], [2, 2, 2]], [[0, 0, 0], [9, 9, 9]]], "PNG")
    check_by_hand(load(zipped(tmp_path / "a.sog", by_hand(**{"s.webp": scales}))))


def test_higher_harmonics_come_from_a_palette(tmp_path):
    """Row r of the palette is at pixel 3 (r % 64), line r // 64, for degree 1; labels have two bytes."""
    rows = np.zeros((2, 64 * 3, 4), np.uint8)
    rows[1, 3:6, :3] = [[1, 2, 0], [0, 1, 2], [2, 0, 1]]  # row 65
    labels = picture([[[65, 0, 0, 255], [0, 0, 0, 255]], [[65, 0, 0, 255], [9, 9, 9, 9]]])
    shN = {"count": 128, "bands": 1, "codebook": [0.0, 0.5, -1.0], "files": ["p.webp", "i.webp"]}
    files = by_hand(meta={"shN": shN, "model": "antialiased"}, **{"p.webp": picture(rows), "i.webp": labels})
    g = load(zipped(tmp_path / "a.sog", files))
    row = [[0.5, -1, 0], [0, 0.5, -1], [-1, 0, 0.5]]
    assert g.shN.tolist() == [row, [[0, 0, 0]] * 3, row]
    assert g.comments == ("SplatRenderMode: mip",)
    files["i.webp"] = picture([[[128, 0, 0, 255]] * 2] * 2)
    fails(zipped(tmp_path / "b.sog", files), "p.webp has 128 rows, and row 128 is used")


def test_version_1_has_levels_instead_of_codebooks(tmp_path):
    files = by_hand()
    meta = json.loads(files["meta.json"])
    del meta["version"], meta["count"]
    meta["means"]["shape"] = [3, 3]
    meta["scales"] = {"mins": [-10, -8, -6], "maxs": [0, 2, 4], "files": ["s.webp"]}
    meta["sh0"] = {"mins": [-1, -1, -1, -5], "maxs": [1, 1, 1, 5], "files": ["c.webp"]}
    meta["shN"] = {"shape": [3, 9], "mins": -2.0, "maxs": 2.0, "files": ["p.webp", "i.webp"]}
    files["p.webp"] = picture(np.full((1, 64 * 3, 4), 255))
    files["i.webp"] = picture([[[0, 0, 0, 255]] * 2] * 2)
    g = load(zipped(tmp_path / "a.sog", files | {"meta.json": json.dumps(meta).encode()}))
    torch.testing.assert_close(g.scales[0], torch.tensor([-10, -8 + 10 / 255, -6 + 20 / 255]))
    torch.testing.assert_close(g.opacities, torch.tensor([-5 + 510 / 255, -5, 5]))
    torch.testing.assert_close(g.sh0[1, 0], torch.tensor([-1 + 4 / 255, -1 + 2 / 255, -1]))
    assert (g.shN == 2).all() and g.shN.shape == (3, 3, 3)


# ------------------------------------------------------------------------------------------------------- round trips


@few
@given(st.integers(1, 300), st.integers(0, 3), st.integers(0, 99))
def test_a_round_trip_stays_within_the_levels(tmp_path, n, degree, seed):
    g = scene(n, degree, seed)
    h = trip(g, tmp_path / "a.sog")
    fold = torch.sign(g.means) * torch.log1p(g.means.abs())
    # Half of 1/65535 of the range of the logarithm, which at x is 1 + |x| times as wide.
    step = (fold.amax(0) - fold.amin(0)) / 65535
    assert ((g.means - h.means).abs() <= 0.51 * step * (1 + g.means.abs()) + 1e-6).all()
    assert (g.opacities.sigmoid() - h.opacities.sigmoid()).abs().max() <= 0.5001 / 255
    # Each of three within 0.5/255 sqrt(2); the fourth, at least 1/2, adds up to as much again, times its 1 / w.
    assert turned(g.quats, h.quats).max() <= math.degrees(2 * 2 * math.sqrt(3) * math.sqrt(2) * 0.5 / 255)
    for name, limit in (("scales", 12.5), ("sh0", 3.4)):
        a, b = getattr(g, name), getattr(h, name)
        # Evenly spread numbers: 256 of them leave a step of 1/256 of the range, 1/sqrt(12) of that as an error.
        assert (a - b).square().mean().sqrt() <= 1.1 * limit / 256 / math.sqrt(12)
        if a.numel() <= 256:
            assert torch.equal(a, b), "few numbers are kept"
    assert h.shN.shape == g.shN.shape


def test_few_sets_of_harmonics_are_kept(tmp_path):
    g = scene(2000, 3)
    kinds = (g.shN[:1000] * 64).round() / 64  # 116 different numbers in 1000 different sets, as many as the palette has
    g = g._replace(shN=torch.cat([kinds, kinds]))
    assert torch.equal(trip(g, tmp_path / "a.sog").shN, g.shN)


def test_what_was_read_is_written_the_same(tmp_path):
    first = trip(scene(3000, 2), tmp_path / "a.sog")
    second = trip(first, tmp_path / "b.sog")
    for name in ("scales", "opacities", "sh0", "shN"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    torch.testing.assert_close(first.means, second.means, atol=1e-6, rtol=1e-6)
    assert turned(first.quats, second.quats).max() < 0.7


def test_the_same_scene_makes_the_same_file(tmp_path):
    for name in ("a.sog", "b.sog"):
        trip(scene(1500, 1), tmp_path / name)
    assert (tmp_path / "a.sog").read_bytes() == (tmp_path / "b.sog").read_bytes()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    g = scene(100, 1)
    with pytest.warns(LossWarning):
        save(g, tmp_path / "meta.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["means_l.webp", "means_u.webp", "meta.json", "quats.webp", "scales.webp", "sh0.webp"]
        + ["shN_centroids.webp", "shN_labels.webp"]
    )
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    same = trip(g, tmp_path / "a.sog")
    assert all(
        torch.equal(a, b) for a, b in zip(load(tmp_path).parameters.values(), same.parameters.values(), strict=True)
    )
    (tmp_path / "a.sog").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("splatedit.files.os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save(scene(100, 1, seed=2), tmp_path / "meta.json")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_losses_and_the_render_mode(tmp_path):
    g = scene(100, 2, comments=("SplatRenderMode: 2dgs", "by hand"), extra={"id": np.arange(100)})
    precision, harmonics, *rest = sog_losses(g)
    assert precision.startswith("precision (16 bits for positions")
    assert harmonics == "more than 64 different sets of harmonics, of 256 different numbers"
    assert rest == ["extra columns id", "header comments"]
    assert trip(g, tmp_path / "a.sog").comments == ("SplatRenderMode: 2dgs",)
    assert len(sog_losses(scene(100))) == 1
    assert [palette_size(n) for n in (1, 2, 1000, 1024, 65535, 65536, 10**6)] == [1, 2, 512, 1024, 32768, 65536, 65536]


# --------------------------------------------------------------------------------------------------------- codebooks


@few
@given(st.integers(257, 1500), st.integers(0, 99), st.sampled_from(["normal", "uniform", "exponential"]))
def test_a_codebook_is_near_the_best(n, seed, kind):
    values = getattr(np.random.default_rng(seed), kind)(size=(n, 3)).astype(np.float32)
    book, index = codebook(values)
    assert book.shape == (256,) and (np.diff(book) >= 0).all() and index.shape == values.shape
    error = np.abs(book[index] - values)
    assert np.allclose(np.abs(book[:, None, None] - values).min(0), error, atol=1e-6), "each has its nearest"
    # Panter and Dite: of endless numbers, the least error is (integral of the cube root of the density)^3 / 12 / 256^2.
    least = {"normal": 6 * math.sqrt(3) * math.pi, "uniform": 1.0, "exponential": 27.0}[kind] / 12 / 256**2
    assert np.square(error).mean() <= least


def test_a_palette_finds_clusters():
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(64, 9)).astype(np.float32)
    rows = np.repeat(centres, 40, 0) + draw.normal(size=(2560, 9)).astype(np.float32) * 1e-3
    colours, labels = palette(rows, 512)
    assert len(colours) <= 512 and labels.shape == (2560,) and labels.max() < len(colours)
    assert np.abs(colours[labels] - rows).max() < 0.01
    again, same = palette(rows, 512)
    assert np.array_equal(colours, again) and np.array_equal(labels, same)
    few_rows, index = palette(np.repeat(centres, 3, 0), 512)
    assert len(few_rows) == 64 and np.array_equal(few_rows[index], np.repeat(centres, 3, 0))


# --------------------------------------------------------------------------------------------------------- bad files


def changed(part, **values):
    meta = json.loads(by_hand()["meta.json"])
    return {"meta": {part: meta[part] | values}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"meta.json": None}, ("no file 'meta.json'", "found c.webp, l.webp")),
        ({"meta.json": b"{"}, ("meta.json", "not valid JSON")),
        ({"meta.json": b"[" * 100_000}, ("meta.json", "nested too deep")),
        ({"meta.json": b"[]"}, ("holds list, expected an object",)),
        ({"meta": {"version": 3}}, ("version 3", "expected 1 or 2")),
        ({"meta": {"count": 5}}, ("l.webp has 2x2 pixels", "each of 5")),
        ({"meta": {"count": 10**18}}, ("l.webp has 2x2 pixels",)),
        ({"meta": {"count": 0}}, ("promises 0 Gaussians",)),
        ({"meta": {"count": -1}}, ("promises -1 Gaussians",)),
        ({"meta": {"count": True}}, ("the count True",)),
        ({"meta": {"count": 2.5}}, ("the count 2.5",)),
        ({"meta": {"quats": 7}}, ("quats is 7, expected an object",)),
        (changed("means", files=["l.webp"]), ("means.files", "expected 2 file names")),
        (changed("means", files=["l.webp", 3]), ("means.files",)),
        (changed("means", mins=[0, 0]), ("means.mins is [0, 0], expected 3 numbers",)),
        (changed("means", mins=[0, 0, math.nan]), ("means.mins",)),
        (changed("means", mins=[0, 0, "x"]), ("means.mins",)),
        (changed("means", maxs=[1e9, 0, 0]), ("means, row 1, component 0: found inf",)),
        (changed("scales", codebook=[1]), ("the codebook of scales has 1 entries, and entry 2 is used",)),
        (changed("scales", codebook=[1.0] * 257), ("expected 1 to 256 numbers",)),
        (changed("scales", files=["../s.webp"]), ("'../s.webp', which lies outside",)),
        (changed("scales", files=["/etc/passwd"]), ("'/etc/passwd', which lies outside",)),
        ({"s.webp": None}, ("no file 's.webp'",)),
        ({"s.webp": b"not a picture"}, ("s.webp is not a WebP or PNG picture",)),
        ({"s.webp": by_hand()["s.webp"][:-4]}, ("s.webp",)),
        ({"s.webp": picture([[[0, 0, 0, 0]]])}, ("s.webp has 1x1 pixels",)),
        ({"s.webp": picture(np.zeros((4096, 4096, 4)))}, ("all pictures together would unpack",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_files_that_are_refused(tmp_path, changes, parts):
    fails(zipped(tmp_path / "a.sog", by_hand(**changes)), *parts)
    if "meta.json" in changes and changes["meta.json"] is None or "etc" in str(changes):
        return
    for name, data in by_hand(**changes).items():
        (tmp_path / name).write_bytes(data)
    fails(tmp_path / "meta.json")


def test_a_folder_does_not_lead_out_of_itself(tmp_path):
    (tmp_path / "s.webp").write_bytes(by_hand()["s.webp"])
    inside = tmp_path / "scene"
    inside.mkdir()
    for name, data in by_hand(**changed("scales", files=["../s.webp"])).items():
        (inside / name).write_bytes(data)
    fails(inside, "which lies outside")


@pytest.mark.parametrize("kind", ["PNG", "lossless", "lossy", "extended"])
def test_the_extent_of_a_picture_is_read_without_a_decoder(kind):
    options = {"lossy": {"lossless": False}, "extended": {"icc_profile": b"profile"}}.get(kind, {})
    data = picture(np.zeros((301, 77, 3)), "PNG" if kind == "PNG" else "WEBP", **options)
    assert _extent(data) == (77, 301)
    assert _extent(data[:11]) == (0, 0) and _extent(b"GIF89a" + data[6:]) == (0, 0)


def test_other_json_is_not_sog(tmp_path):
    (tmp_path / "lod-meta.json").write_text("{}")
    fails(tmp_path / "lod-meta.json", "expected the name meta.json", "streamed")
    with pytest.raises(InputError, match="expected the name meta.json"):
        save(scene(2), tmp_path / "my-meta.json")
    assert [p.name for p in tmp_path.iterdir()] == ["lod-meta.json"]


def test_not_a_zip(tmp_path):
    for data, part in ((b"", "an empty file"), (b"ply\n", "starts with b'ply"), (b"PK\3\4" + bytes(60), "zip")):
        (tmp_path / "a.sog").write_bytes(data)
        fails(tmp_path / "a.sog", part)


def test_a_deflated_bomb(tmp_path):
    files = by_hand(**{"s.webp": bytes(50_000_000)})
    message = fails(zipped(tmp_path / "a.sog", files, zipfile.ZIP_DEFLATED), "would unpack")
    assert "exhaust the memory" in message


@few
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6), st.booleans())
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, at, junk, cut):
    data = zipped(tmp_path / "a.sog", by_hand()).read_bytes()
    at %= len(data)
    (tmp_path / "a.sog").write_bytes(data[:at] + junk + (b"" if cut else data[at + len(junk) :]))
    try:
        assert load(tmp_path / "a.sog").n >= 1
    except InputError as error:
        assert "\n" not in str(error) and str(tmp_path) in str(error)


# -------------------------------------------------------------------------------------------------------- real files

angel = pytest.mark.skipif(
    not (FIXTURES / "statue-angel.sog").is_file(), reason="needs the scans beside the repository"
)


@angel
def test_a_real_scan_reads_as_splat_transform_reads_it():
    """Every number, bit for bit: the .ply beside it was made from it by splat-transform."""
    ours, theirs = load(FIXTURES / "statue-angel.sog"), load(FIXTURES / "statue-angel.ply")
    assert ours.n == theirs.n == 71359
    for name, value in ours.parameters.items():
        torch.testing.assert_close(value, getattr(theirs, name), atol=1e-6, rtol=1e-6)


@angel
@pytest.mark.slow
@pytest.mark.parametrize(("ending", "least"), [(".sog", 70.0), (".spz", 55.0), (".splat", 60.0)])
def test_a_real_scan_looks_the_same_after_a_round_trip(tmp_path, ending, least):
    from splatedit.cameras import orbit
    from splatedit.render import render

    scan = load(FIXTURES / "statue-angel.ply")
    draw = torch.Generator().manual_seed(0)
    # The scan has no higher harmonics; smooth ones stand in, over the whole scene.
    if ending != ".splat":
        wave = torch.sin(scan.means @ torch.randn(3, 24, generator=draw)).reshape(scan.n, 8, 3)
        scan = scan._replace(shN=0.1 * wave)
    back = trip(scan, tmp_path / f"a{ending}")
    cameras = orbit(scan, 4, size=256)
    with torch.no_grad():
        error = (render(scan, cameras).rgb.clamp(0, 1) - render(back, cameras).rgb.clamp(0, 1)).square().mean()
    assert -10 * torch.log10(error) >= least
