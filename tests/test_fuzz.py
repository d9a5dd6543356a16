"""Mutated files of every kind end as sound data or as one line; the guard that says so notices all that it should.

More of them: `SPLATEDIT_FUZZ_FILES=100000 SPLATEDIT_FUZZ_SEED=7 pytest -m slow tests/test_fuzz.py`, or
`python tests/fuzz.py --files 100000 --seed 7`, which prints a table.
"""

import os
import pickle
import signal
import struct
import warnings
from pathlib import Path

import fuzz
import fuzz_files
import pytest
import torch

from splatedit import camera_files, cli
from splatedit.errors import InputError
from splatedit.formats import FORMATS

FILES = int(os.environ.get("SPLATEDIT_FUZZ_FILES", 20_000))
SEED = int(os.environ.get("SPLATEDIT_FUZZ_SEED", 0))


def test_every_format_is_mutated():
    """A new format, or kind of camera file, needs sound files and a line in SUBJECTS."""
    assert set(FORMATS) <= set(fuzz_files.SPLATS)
    assert set(camera_files.READERS) == {"frames", "camera_path"}
    assert set(camera_files.WRITERS) == {"nerfstudio", "inria"}


@pytest.mark.parametrize("name", fuzz_files.SUBJECTS)
def test_what_is_mutated_is_sound(tmp_path, name):
    subject = fuzz_files.SUBJECTS[name]
    for number, files in enumerate(fuzz_files.samples(name)):
        for file, content in files.items():
            path = tmp_path / str(number) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert fuzz.unsound(subject.read(tmp_path / str(number) / subject.given)) == ""


def test_500_mutated_files(tmp_path):
    results = list(fuzz.run(fuzz.plan(500, list(fuzz_files.SUBJECTS)), 0, tmp_path))
    assert fuzz.failures(results) == []
    assert len(results) == 500 and len(set(results)) == 500
    verdicts = {(r.subject, r.verdict) for r in results}
    assert {(name, "refused") for name in fuzz_files.SUBJECTS} <= verdicts, "mutations that hurt nothing test nothing"


@pytest.mark.slow
def test_many_mutated_files(tmp_path):
    results = list(fuzz.run(fuzz.plan(FILES, list(fuzz_files.SUBJECTS)), SEED, tmp_path, os.cpu_count() or 1))
    print(fuzz.table(results))
    assert fuzz.failures(results) == []


@pytest.mark.parametrize("kind", fuzz_files.SPLATS)
def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys, kind):
    """The first mutated file of each kind that is refused: exit status 2, one line that names the file."""
    subject = fuzz_files.SPLATS[kind]
    for index in range(20):
        case = tmp_path / str(index)
        for name, content in fuzz_files.mutated(kind, 1, index)[1].items():
            (case / name).parent.mkdir(parents=True, exist_ok=True)
            (case / name).write_bytes(content)
        try:
            subject.read(case / subject.given)
        except InputError:
            break
    monkeypatch.setattr("sys.argv", ["splatedit", "info", str(case / subject.given)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert len(err.splitlines()) == 1 and str(case) in err


# ------------------------------------------------------------------------------------------------- what it has found


def colmap_with(value: float) -> fuzz_files.Files:
    """A model whose first camera has this principal point."""
    (files,) = fuzz_files.colmap_binary()
    cameras = bytearray(files["cameras.bin"])
    struct.pack_into("<d", cameras, 8 + 24 + 16, value)
    return {**files, "cameras.bin": bytes(cameras)}


def compressed_with(value: float) -> fuzz_files.Files:
    """A scene whose first chunk has this minimum of red, the 13th of its 18 numbers."""
    data = bytearray(fuzz_files.written("compressed_ply", fuzz_files.gaussians(7, 0)))
    struct.pack_into("<f", data, data.index(b"end_header\n") + 11 + 4 * 12, value)
    return {"scene.compressed.ply": bytes(data)}


FOUND: dict[str, tuple[str, fuzz_files.Files]] = {
    "a number of yaml with 5000 digits": ("sidecar", {"scene.yaml": b"up: " + b"9" * 5000}),
    "yaml that multiplies": ("sidecar", {"scene.yaml": fuzz_files.YAML[0].encode()}),
    "settings that multiply": ("config", {"run.yaml": fuzz_files.YAML[0].encode()}),
    "settings in settings in settings": ("config", {"run.yaml": fuzz_files.YAML[3].encode()}),
    "an unfinished header of .npy": ("rows", {"rows.npy": b"\x93NUMPY\1\0\x0e\0{'descr': '<i8'"}),
    "colours that overflow once they are harmonics": ("compressed_ply", compressed_with(-3.4e38)),
    "a principal point beyond float32": ("colmap_binary", colmap_with(-1e39)),
    "a column's name that a terminal would obey": (
        "ply",
        {"scene.ply": b"ply\nformat ascii 1.0\nelement \x1b[2J 0\nend_header\n"},
    ),
    "a mask of another kind, 20,000 characters long": (
        "mask",
        {"mask.json": b'{"splatedit_mask": 1, "mask": {"kind": "' + b"x" * 20_000 + b'"}}'},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(tmp_path, name):
    kind, files = FOUND[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    verdict, detail, _ = fuzz.attempt(fuzz_files.SUBJECTS[kind].read, tmp_path / fuzz_files.SUBJECTS[kind].given)
    assert verdict == "refused", detail


# ----------------------------------------------------------------------------------------------- the guard is guarded


def spin(path: Path) -> None:
    while True:
        pass


def segfault(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hoard(path: Path) -> None:
    block = bytearray(40 << 20)
    raise InputError(f"{path}: {len(block)}")


def ask_for_too_much(path: Path) -> None:
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        raise InputError(f"{path}: damaged") from error


def unpickle(path: Path) -> None:
    os.chdir(path.parent)
    pickle.loads(fuzz_files.evil_pickle())


def write(path: Path) -> None:
    path.with_name("other").write_bytes(b"")


def peek(path: Path) -> None:
    (path.parent.parent / fuzz_files.SECRET).read_bytes()


def leave(path: Path) -> None:
    raise SystemExit(2)


def warn(path: Path) -> None:
    warnings.warn("overflow", RuntimeWarning, stacklevel=1)


def give_nan(path: Path):
    scene = fuzz_files.gaussians(3, 0)
    return scene._replace(means=scene.means / 0)


PLANTED = {
    spin: "hang",
    segfault: "crash",
    hoard: "memory",
    ask_for_too_much: "memory",
    unpickle: "code",
    write: "outside",
    peek: "outside",
    leave: "exception",
    warn: "warning",
    give_nan: "unsound",
}


def test_the_guard_notices(tmp_path, monkeypatch):
    """Readers that do wrong on every file but the sound one."""

    def subject(reader) -> fuzz_files.Subject:
        def read(path: Path):
            return None if path.read_bytes() == b"sound" else reader(path)

        spoil = (lambda rng, files: {"x": b"bad"},)
        return fuzz_files.Subject(reader.__name__, "x", lambda: [{"x": b"sound"}], read, spoil)

    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    for reader in PLANTED:
        monkeypatch.setitem(fuzz_files.SUBJECTS, reader.__name__, subject(reader))
    jobs = [(reader.__name__, 0) for reader in PLANTED]
    results = {r.subject: r.verdict for r in fuzz.run(jobs, 0, tmp_path)}
    assert results == {reader.__name__: verdict for reader, verdict in PLANTED.items()}
