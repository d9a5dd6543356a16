import io
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_scenes import FIXTURES, fails, scene, trip, turned

from splatedit.errors import LossWarning
from splatedit.files import load, save
from splatedit.formats.splat import read_splat, splat_losses, write_splat
from splatedit.gaussians import SH_C0

few = settings(max_examples=20, derandomize=True, deadline=None)


def test_one_gaussian_byte_by_byte(tmp_path):
    """32 bytes written out by hand, after antimatter15's convert.py."""
    path = tmp_path / "a.splat"
    path.write_bytes(struct.pack("<6f", 1, -2, 3.5, 0.5, 1, 2) + bytes([255, 0, 128, 51]) + bytes([192, 128, 64, 128]))
    g = read_splat(path)
    assert g.means.tolist() == [[1, -2, 3.5]]
    torch.testing.assert_close(g.scales, torch.tensor([[0.5, 1, 2]]).log())
    torch.testing.assert_close(0.5 + SH_C0 * g.sh0[0, 0], torch.tensor([1, 0, 128 / 255]))
    assert g.opacities.item() == pytest.approx(math.log(0.2 / 0.8))
    torch.testing.assert_close(g.quats, torch.tensor([[1, 0, -1, 0]]) / math.sqrt(2))
    assert g.shN.shape == (1, 0, 3)
    stream = io.BytesIO()
    write_splat(g, stream, path)
    # Unit length: 128 + 128 / sqrt(2) is 218.5.
    assert stream.getvalue()[:28] == path.read_bytes()[:28] and list(stream.getvalue()[28:]) == [219, 128, 37, 128]


@few
@given(st.integers(1, 60), st.integers(0, 99))
def test_a_round_trip_stays_within_the_bytes(tmp_path_factory, n, seed):
    g = scene(n, seed=seed)
    h = trip(g, tmp_path_factory.mktemp("trip") / "a.splat")
    assert torch.equal(g.means, h.means)
    torch.testing.assert_close(h.scales, g.scales, atol=1e-5, rtol=0)  # exp and log in float32
    assert (SH_C0 * (g.sh0 - h.sh0)).abs().max() <= 0.5001 / 255
    assert (g.opacities.sigmoid() - h.opacities.sigmoid()).abs().max() <= 0.5001 / 255
    # Each number is off by at most 1/256, or 1/128 where 1 has no byte: four of them, twice as an angle.
    assert turned(g.quats, h.quats).max() <= math.degrees(2 * math.sqrt(4) / 128)


def test_what_was_read_is_written_the_same(tmp_path):
    first = trip(scene(500), tmp_path / "a.splat")
    second = trip(first, tmp_path / "b.splat")
    a, b = ((tmp_path / name).read_bytes() for name in ("a.splat", "b.splat"))
    rows = [np.frombuffer(data, np.uint8).reshape(-1, 32) for data in (a, b)]
    assert (rows[0][:, :12] == rows[1][:, :12]).all() and (rows[0][:, 24:28] == rows[1][:, 24:28]).all()
    assert np.abs(rows[0][:, 28:].astype(int) - rows[1][:, 28:]).max() <= 1
    torch.testing.assert_close(first.scales, second.scales, atol=1e-5, rtol=0)


def test_what_is_beyond_a_byte_is_clipped_and_counted(tmp_path):
    g = scene(4, degree=2, extra={"id": np.arange(4)}, comments=("by hand",))
    g.sh0[1] = 3.0
    g.opacities[0], g.opacities[3] = 60.0, -60.0
    g.scales[2] = torch.tensor([-200.0, 200.0, 0.0])
    losses = splat_losses(g)
    assert losses[:2] == ["spherical harmonics above degree 0", "colours below 0 or above 1 (1 of 4 Gaussians)"]
    assert losses[3:] == ["extra columns id", "header comments"]
    assert splat_losses(scene(4)) == ["precision (8 bits for colours, opacities and rotations)"]
    with pytest.warns(LossWarning, match="above degree 0"):
        save(g, tmp_path / "a.splat")
    h = load(tmp_path / "a.splat")
    assert all(value.isfinite().all() for value in h.parameters.values())
    assert 0.5 + SH_C0 * h.sh0[1].max() == pytest.approx(1)
    assert h.opacities[0].sigmoid() > 0.99999 and h.opacities[3].sigmoid() < 0.00001
    assert h.scales[2, 0] < -80 and h.scales[2, 1] > 80


def test_flat_and_still_gaussians_are_read(tmp_path):
    """A size of 0 has no logarithm and four times 128 no direction; viewers draw both."""
    path = tmp_path / "a.splat"
    path.write_bytes(struct.pack("<6f", 0, 0, 0, 1, 1, 0) + bytes(4) + bytes([128] * 4))
    g = load(path)
    assert g.scales[0, 2] < -80 and g.quats.tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("size", [0, 1, 31, 33, 63])
def test_a_size_that_is_no_multiple_of_32(tmp_path, size):
    (tmp_path / "a.splat").write_bytes(bytes(size))
    fails(tmp_path / "a.splat", f"found {size} bytes", "multiple of 32")


@pytest.mark.parametrize(
    ("numbers", "part"),
    [
        ((0, 0, 0, 1, -1, 1), "the size [1.0, -1.0, 1.0]"),
        ((0, 0, 0, 1, 1, math.nan), "nan"),
        ((0, math.inf, 0, 1, 1, 1), "inf"),
    ],
)
def test_numbers_no_splat_has(tmp_path, numbers, part):
    good = struct.pack("<6f", 0, 0, 0, 1, 1, 1) + bytes([128] * 8)
    (tmp_path / "a.splat").write_bytes(good + struct.pack("<6f", *numbers) + bytes([128] * 8))
    fails(tmp_path / "a.splat", "row 1", part, "1 of 2 rows")


def test_the_fixture_of_splat_transform():
    path = FIXTURES / "fixtures" / "minimal.splat"
    if not path.is_file():
        pytest.skip("needs the fixtures beside the repository")
    g = load(path)
    assert g.means.tolist() == [[-1, 0, -1], [0, 0, -1], [-1, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(g.scales, torch.full((4, 3), 0.1).log())
    assert (255 * g.opacities.sigmoid()).round().tolist() == [230] * 4
