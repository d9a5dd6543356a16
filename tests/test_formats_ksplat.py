import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_scenes import FIXTURES, fails

from splatedit.errors import InputError
from splatedit.files import load
from splatedit.gaussians import SH_C0, SH_REST

few = settings(
    max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def by_hand(level=1, degree=2, n=5, capacity=2, room=6, seed=0, claims=None):
    """A file of two sections, the first of them empty, and the levels in it; splat-transform 3.7.0 reads them alike.

    5 Gaussians are 2 full buckets of 2 and a partial one of 1.
    """
    draw = np.random.default_rng(seed)
    mean, other, sh = {0: ("<f4", "<f4", "<f4"), 1: ("<u2", "<f2", "<f2"), 2: ("<u2", "<f2", "u1")}[level]
    k = SH_REST[degree]
    fields = [("mean", mean, 3), ("scale", other, 3), ("quat", other, 4), ("colour", "u1", 4), ("sh", sh, 3 * k)]
    rows = np.zeros(room, fields)
    rows["mean"] = draw.integers(0, 65535, (room, 3)) if level else draw.normal(size=(room, 3))
    rows["scale"] = draw.uniform(0.01, 2, (room, 3))
    rows["quat"] = draw.normal(size=(room, 4))
    rows["colour"] = draw.integers(0, 256, (room, 4))
    rows["sh"] = draw.integers(0, 256, (room, 3 * k)) if level == 2 else draw.normal(size=(room, 3 * k))
    full, partial = divmod(n, capacity)
    centres = draw.normal(size=(full + bool(partial), 3)).astype("<f4")
    values = dict(count=n, level=level, full=full, buckets=len(centres), degree=degree, room=room) | (claims or {})
    header = bytearray(4096)
    struct.pack_into("<BBxxIIIIH", header, 0, 0, 1, 2, 2, room, values["count"], values["level"])
    struct.pack_into("<ff", header, 36, -2, 1)
    section = struct.pack(
        "<IIIIfHxxIxxxxIIH",
        *(n, values["room"], capacity, values["buckets"], 5.0, 12, 32767),
        *(values["full"], int(bool(partial)), values["degree"]),
    )
    body = (struct.pack("<I", partial) if partial else b"") + centres.tobytes() + rows.tobytes()
    return bytes(header) + bytes(1024) + section.ljust(1024, b"\0") + body, rows[:n], centres


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_every_level_byte_by_byte(tmp_path, level, degree):
    data, rows, centres = by_hand(level, degree)
    (tmp_path / "a.ksplat").write_bytes(data)
    g = load(tmp_path / "a.ksplat")
    assert g.n == 5 and g.sh_degree == degree
    means = rows["mean"]
    if level:
        means = (means.astype(float) - 32767) * (5 / 2 / 32767) + centres[[0, 0, 1, 1, 2]]
    torch.testing.assert_close(g.means, torch.tensor(means, dtype=torch.float32))
    torch.testing.assert_close(g.scales.exp(), torch.tensor(rows["scale"].astype("f4")))
    torch.testing.assert_close(g.quats, torch.tensor(rows["quat"].astype("f4")))
    torch.testing.assert_close(0.5 + SH_C0 * g.sh0[:, 0], torch.tensor(rows["colour"][:, :3] / np.float32(255)))
    assert (255 * g.opacities.sigmoid()).round().tolist() == rows["colour"][:, 3].tolist()
    raw = rows["sh"].astype("f4") * (3 / 255) - 2 if level == 2 else rows["sh"].astype("f4")
    if degree:  # three of red, three of green, three of blue, then five of each
        torch.testing.assert_close(g.shN[:, 1, 2], torch.tensor(raw[:, 7]))
        torch.testing.assert_close(g.shN[:, :3, 0], torch.tensor(raw[:, :3]))
    if degree == 2:
        torch.testing.assert_close(g.shN[:, 3:, 1], torch.tensor(raw[:, 14:19]))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"count": 4}, "promises 4 Gaussians, its sections 5"),
        ({"level": 3}, "compression level 3"),
        ({"room": 4}, "promises 5 of 4 Gaussians"),
        ({"room": 4_000_000_000}, "cut short or damaged"),
        ({"degree": 7}, "harmonics of degree 7"),
        ({"full": 4_000_000_000}, "fills 4000000000 of 3 buckets"),
        ({"full": 1}, "do not fit"),
        ({"buckets": 4_000_000_000}, "cut short or damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_refused(tmp_path, change, part):
    (tmp_path / "a.ksplat").write_bytes(by_hand(claims=change)[0])
    fails(tmp_path / "a.ksplat", part)


def test_what_is_no_ksplat(tmp_path):
    good = by_hand()[0]
    for data, part in (
        (b"", "found 0 bytes"),
        (b"ply" + bytes(5000), "version 112"),
        (good[:-1], "cut short"),
        (good[:4096], "cut"),
    ):
        (tmp_path / "a.ksplat").write_bytes(data)
        fails(tmp_path / "a.ksplat", part)


@few
@given(st.integers(0, 2), st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, level, at, junk):
    data = by_hand(level)[0]
    heads = [*range(44), *range(5120, 5164), *range(6144, len(data))]  # the rest is zeros that nobody reads
    at = heads[at % len(heads)]
    (tmp_path / "a.ksplat").write_bytes(data[:at] + junk + data[at + len(junk) :])
    try:
        assert load(tmp_path / "a.ksplat").n >= 1
    except InputError as error:
        assert "\n" not in str(error) and str(tmp_path) in str(error)


def test_the_fixture_of_splat_transform():
    path = FIXTURES / "fixtures" / "minimal.ksplat"
    if not path.is_file():
        pytest.skip("needs the fixtures beside the repository")
    g = load(path)
    assert g.means.tolist() == [[-1, 0, -1], [0, 0, -1], [-1, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(g.scales, torch.full((4, 3), 0.1).log())
