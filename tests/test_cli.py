import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from splatedit import __version__, files
from splatedit.cli import cli

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "numpy",
    "scipy",
    "numba",
    "diffusers",
    "transformers",
    "huggingface_hub",
    "PIL",
    "av",
    "rich",
    "plyfile",
}


@pytest.mark.parametrize("words", [[], ["run"], ["image"], ["info"], ["render"]])
def test_help_imports_nothing_heavy(words):
    """What makes --help instant. A clock would test the machine; the list of modules tests the program."""
    script = "import sys\nfrom splatedit.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shown, modules = done.stdout.rsplit("\n", 2)[0], done.stdout.rsplit("\n", 2)[1]
    assert "Usage: splatedit" in shown
    loaded = {name.partition(".")[0] for name in modules.split()}
    assert "click" in loaded and not loaded & (HEAVY | {"omegaconf", "yaml"})


def test_importing_the_package_imports_nothing_heavy():
    script = "import splatedit, sys; dir(splatedit); splatedit.InputError; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & HEAVY


def test_public_names():
    import splatedit

    for name in splatedit.__all__:
        assert getattr(splatedit, name) is not None
        assert name in dir(splatedit)
    assert callable(splatedit.load) and callable(splatedit.edit) and callable(splatedit.render.render)
    with pytest.raises(AttributeError, match="nothing"):
        splatedit.nothing  # noqa: B018
    for path in (ROOT / "splatedit").iterdir():
        assert path.stem.startswith("__") or path.stem not in splatedit.__all__, f"{path.name} hides a public function"


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "splatedit", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"splatedit {__version__}\n"


def test_no_words_at_all_shows_the_help(call):
    status, out, err = call()
    assert status == 2 and not out and "Commands:" in err and "run" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runn"], "'runn'"),
        (["run", "a.ply"], "PROMPT"),
        (["run", "a.ply", "pig", "--step", "3"], "--steps"),
        (["run", "a.ply", "pig", "stepz=3"], "'steps'"),
        (["run", "a.ply", "a", "pig"], "quotes"),
        (["run", "a.ply", "pig", "--steps", "many"], "'many'"),
        (["run", "a.ply", "pig", "--steps", "0"], "1 or more"),
        (["run", "a.ply", "pig", "--guidance", "idz"], "'ids'"),
        (["run", "a.ply", "pig", "--cameras", "c.json"], "dome:N"),
        (["run", "a.ply", "pig", "--config", "none.yaml"], "none.yaml"),
        (["run", "none.ply", "pig"], "none.ply"),
        (["info", "none.ply"], "none.ply"),
        (["render", "none.ply", "-o", "a.mp4"], "none.ply"),
        (["render", "none.ply"], "--output"),
        (["render", "a.ply", "-o", "a.webm"], ".mp4"),
        (["render", "a.ply", "-o", "a.mp4", "--size", "big"], "640x480"),
        (["render", "a.ply", "-o", "a.mp4", "--background", "red"], "1,1,1"),
        (["render", "a.ply", "-o", "a.mp4", "--background", "1,2,3"], "[0, 1]"),
        (["render", "a.ply", "-o", "a.mp4", "--frames", "0"], "--frames"),
        (["render", "a.ply", "-o", "a.mp4", "--up", "y"], "+y"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(call, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*words)
    assert status == 2 and out == ""
    assert err.startswith("splatedit: error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_run_prints_the_path_alone(call, scene_file, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("splatedit.work.FRAMES", 4)
    words = [scene_file, "a pig", "--model", tiny_model, "-o", tmp_path / "out", "--cameras", "orbit:3", "--steps", 9]
    status, out, err = call("run", *words, "--src-prompt", "a cat", "--guidance", "dds", "--no-viewer", "steps=2")
    assert status in (0, 3), err
    path = Path(out.rstrip("\n"))
    assert path.name == "edited.ply" and files.load(path).n == 300 and out.count("\n") == 1
    record = json.loads((path.parent / "run.json").read_text())
    assert (record["steps"], record["guidance"], record["exit_status"]) == (2, "dds", status), "words win over options"
    assert (path.parent / "cmd.txt").read_text().startswith(f"splatedit run {scene_file} 'a pig' --model")
    assert "step 2/2" in err

    again = call("run", scene_file, "a dog", "--config", path.parent / "config.yaml")
    path = Path(again[1].rstrip("\n"))
    record = json.loads((path.parent / "run.json").read_text())
    assert (record["steps"], record["guidance"], record["prompt"]) == (2, "dds", "a dog")


def test_flags_that_are_not_given_leave_the_file_alone(tmp_path, monkeypatch, call):
    seen = []
    monkeypatch.setattr("splatedit.run.run", lambda config, **_: seen.append(config) or sys.exit(0))
    monkeypatch.setattr("splatedit.viewer.shell.watch", lambda config, *_, **__: seen.append(config) or sys.exit(0))
    (tmp_path / "c.yaml").write_text("offline: true\nviewer: true\nseed: 5\nguidance_scale: 2\n")
    call("run", "a.ply", "a pig", "--config", tmp_path / "c.yaml")
    call("run", "a.ply", "a pig", "--config", tmp_path / "c.yaml", "--no-viewer", "--seed", 0, "guidance_scale=null")
    call("run", "a.ply", "a pig", "--offline")
    found = [(c.offline, c.viewer, c.seed, c.guidance_scale) for c in seen]
    assert found == [(True, True, 5, 2.0), (True, False, 0, None), (True, False, 0, None)]


def test_ctrl_c_in_a_real_process_keeps_what_is_done(scene_file, tiny_model, tmp_path):
    words = [scene_file, "a pig", "--source-prompt", "a cat", "--model", tiny_model, "-o", tmp_path / "out"]
    command = [sys.executable, "-m", "splatedit", "run", *map(str, words), "--steps", "600", "--cameras", "orbit:2"]
    with open(tmp_path / "log", "w") as log:
        # A test run started in the background ignores SIGINT, and so would its children.
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, preexec_fn=listen, **pipes)
        while process.poll() is None and "step 60/600" not in (tmp_path / "log").read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, (tmp_path / "log").read_text()
    path = Path(out.removesuffix("\n"))
    record = json.loads((path.parent / "run.json").read_text())
    assert record["interrupted"] is True and 60 <= record["steps"] < 600
    assert files.load(path).n == 300 and (path.parent / "metrics.json").exists()


def test_info_in_words_and_as_json(call, scene_file):
    status, out, _ = call("info", scene_file)
    assert status == 0 and "300" in out and "label" in out
    status, out, _ = call("info", scene_file, "--json")
    assert status == 0 and json.loads(out)["gaussians"] == 300


def test_render_makes_films_pictures_and_folders(call, scene_file, tmp_path):
    import av

    some = ["--frames", "3", "--size", "48x32", "--fps", "6"]
    for name in ("a.mp4", "a.gif", "a.png", "folder"):
        status, out, err = call("render", scene_file, "-o", tmp_path / name, *some)
        assert (status, out) == (0, f"{tmp_path / name}\n"), err
    with av.open(str(tmp_path / "a.mp4")) as film:
        assert film.streams.video[0].average_rate == 6
        assert [(f.width, f.height) for f in film.decode(video=0)] == [(48, 32)] * 3
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3 and image.size == (48, 32)
    pictures = [np.asarray(Image.open(tmp_path / "folder" / f"{i:03d}.png")) for i in range(3)]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), pictures[0])
    assert not np.array_equal(pictures[0], pictures[1])


def test_render_takes_the_up_axis_of_the_sidecar(call, scene_file, tmp_path):
    def picture(*words):
        assert call("render", scene_file, "-o", tmp_path / "a.png", "--size", "32", *words)[0] == 0
        return np.asarray(Image.open(tmp_path / "a.png")).astype(int)

    upright = picture("--up", "-y")
    assert upright[:12, :, 2].sum() > upright[-12:, :, 2].sum(), "blue is above"
    scene_file.with_suffix(".yaml").write_text('up: "+y"\n')
    turned = picture()
    assert turned[:12, :, 2].sum() < turned[-12:, :, 2].sum()
    np.testing.assert_array_equal(picture("--up", "-y"), upright)
    far = picture("--background", "0,0,0.2", "--zoom", "0.5")
    assert far[0, 0].tolist() == [0, 0, 51]


def test_every_command_is_here():
    edits = {"run", "preview", "image", "diagnose", "mask", "history", "undo", "redo", "strength"}
    assert set(cli.commands) == {*edits, "doctor", "info", "render", "convert", "view", "lab"}
