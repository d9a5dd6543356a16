"""Limits on what a lying file may make us allocate: honest data passes unharmed, lies cost one line."""

import gzip
import json
import tracemalloc
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splatedit.errors import InputError
from splatedit.formats import limits

PACKERS = {"zlib": zlib.compress, "gzip": gzip.compress}


def refused(call, *args, **kwargs) -> str:
    """The one line with which `call` refuses."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def peak(call, *args) -> int:
    """Bytes of Python memory that `call` needs at most."""
    tracemalloc.start()
    try:
        call(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_count_has_to_fit_into_the_file(tmp_path):
    limits.check_count(tmp_path, 10, 32, 320)
    assert "promises 11 Gaussians (352 bytes), the file holds 320" in refused(limits.check_count, tmp_path, 11, 32, 320)
    for count in (0, -1, 1 << 62):
        refused(limits.check_count, tmp_path, count, 32, 320)


@pytest.mark.parametrize("method", PACKERS)
@settings(max_examples=20, deadline=None)
@given(data=st.binary(min_size=1, max_size=300), cut=st.integers(1, 50))
def test_unpacking_gives_back_the_bytes_or_refuses(tmp_path_factory, method, data, cut):
    path = tmp_path_factory.getbasetemp() / "scene.spz"
    packed = PACKERS[method](data)
    assert limits.unpack(path, packed, len(data), method) == data
    assert limits.head(path, packed, 3, method) == data[:3]
    assert "should unpack to" in refused(limits.unpack, path, packed, len(data) + 1, method)
    assert "more than that" in refused(limits.unpack, path, packed, len(data) - 1, method)
    damaged = packed[:-cut]
    try:
        assert limits.unpack(path, damaged, len(data), method) == data  # only the checksum was cut off
    except InputError as error:
        assert str(path) in str(error)


def test_gzip_members_follow_one_another(tmp_path):
    packed = gzip.compress(b"abc") + gzip.compress(b"def") + b"\0\0"
    assert limits.unpack(tmp_path, packed, 6, "gzip") == b"abcdef"


@pytest.mark.parametrize("method", PACKERS)
def test_a_bomb_is_not_unpacked(tmp_path, method):
    bomb = PACKERS[method](bytes(1 << 26))
    size = len(bomb)
    assert "exhaust the memory" in refused(limits.unpack, tmp_path, bomb, 1 << 26, method)
    assert peak(refused, limits.unpack, tmp_path, bomb, 1 << 26, method) < 1 << 20
    assert peak(refused, limits.unpack, tmp_path, bomb, 1000, method) < 2 * size + (1 << 17)


def test_zip_archives_are_read_whole(tmp_path):
    path = tmp_path / "scene.sog"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.json", b"{}")
        archive.writestr("sub/", b"")
        archive.writestr("sub/a.webp", b"abc", zipfile.ZIP_DEFLATED)
    assert limits.read_zip(path) == {"meta.json": b"{}", "sub/a.webp": b"abc"}


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "..\\a", "C:\\a", "a/../../b", ".."])
def test_names_do_not_lead_out_of_the_archive(tmp_path, name):
    path = tmp_path / "scene.sog"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")
    assert "lies outside" in refused(limits.read_zip, path)
    assert "lies outside" in refused(limits.member_name, path, name)


def test_zip_bombs_and_damage_are_refused(tmp_path):
    path = tmp_path / "scene.sog"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.webp", bytes(1 << 25))
    assert "exhaust the memory" in refused(limits.read_zip, path)
    assert peak(refused, limits.read_zip, path) < 1 << 20
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(limits.MEMBERS + 1):
            archive.writestr(str(i), b"")
    assert "at most 1000" in refused(limits.read_zip, path)
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    assert "twice" in refused(limits.read_zip, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert "its end is missing" in refused(limits.read_zip, path)
    path.write_bytes(b"\0" * 40 + whole[40:])
    assert "twice" in refused(limits.read_zip, path)


def test_json_is_refused_with_line_and_column(tmp_path):
    path = tmp_path / "meta.json"
    assert limits.parse_json(path, '\ufeff{"a": 1}'.encode()) == {"a": 1}
    assert "line 2, column 1" in refused(limits.parse_json, path, b'{"a": 1,\n')
    assert "b'\\xff'" in refused(limits.parse_json, path, b"\xff")
    assert "nested too deep" in refused(limits.parse_json, path, b"[" * 200_000)
    assert "digits" in refused(limits.parse_json, path, b"1" * 5000)
    assert "meta.json" in refused(limits.parse_json, tmp_path, b"{", "meta.json")
    assert limits.parse_json(path, json.dumps([1.5])) == [1.5]
