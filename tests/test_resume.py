"""Edits that go on where they were cut off: in the loop, from checkpoints, from the command line, after kill -9."""

import errno
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_editing import ToyPrior, painted

from splatedit import checkpoints, files, folders
from splatedit.cameras import dome
from splatedit.checkpoints import Keeper, Log, check_same, read_checkpoint, write_checkpoint
from splatedit.cli import main
from splatedit.config import Config, load_config, save_config
from splatedit.editing import edit
from splatedit.errors import InputError
from splatedit.guidance import GUIDANCE
from splatedit.render import render
from splatedit.run import run
from splatedit.source_cache import SERVED
from splatedit.stack import Stack

ROOT = Path(__file__).parent.parent


@pytest.fixture
def red(cloud):
    return painted(cloud, (0.8, 0.1, 0.1))


@pytest.fixture
def pictures(cloud, red):
    cameras = dome(red, 5, size=32)
    return {"red": render(red, cameras).rgb, "blue": render(painted(cloud, (0.1, 0.1, 0.8)), cameras).rgb}


def saved(state, folder):
    """What comes back from a file."""
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def same(first, second):
    return all(torch.equal(a, second.parameters[k]) for k, a in first.parameters.items())


# ------------------------------------------------------------------------------------------------------------ the loop
@pytest.mark.parametrize(
    ("guidance", "cache"),
    [
        *((g, 0) for g in GUIDANCE),
        *(pytest.param(g, 2, marks=() if g in ("ids", "dds") else pytest.mark.slow) for g in SERVED),
    ],
)
def test_two_parts_of_an_edit_are_the_whole_bit_for_bit(guidance, cache, red, pictures, tmp_path):
    """Cut before the first average and after some; 5 views in 6 steps of 2, so that the order goes around."""
    options = {"guidance": guidance, "steps": 6, "views": 5, "supersample": 1, "average_last": 0.5}
    options |= {"source_cache": cache, "cache_refresh": 2 if cache else 0, "timesteps": "stratified"}

    def run(**more):
        return edit(red, "blue", model=ToyPrior(pictures), **options, **more)

    whole, states = [], {}
    for step in run():
        whole.append(step)
        states[step.index + 1] = saved(step.state(), tmp_path)
    for cut in (1, 4):
        rest = list(run(resume=states[cut]))
        assert [s.index for s in rest] == list(range(cut, 6))
        for one, other in zip(whole[cut:], rest, strict=True):
            assert one.loss == other.loss and torch.equal(one.image, other.image)
            assert same(one.gaussians, other.gaussians)
        if not cache:  # records that were in memory are made again, which is counted
            assert [(s.evaluations, s.backwards) for s in whole[cut:]] == [(s.evaluations, s.backwards) for s in rest]
        end, again = states[6], rest[-1].state()
        assert torch.equal(end["generator"], again["generator"]) and end["averaged"] == again["averaged"] == 3
        assert end.get("source_cache_visits") == again.get("source_cache_visits")


def test_an_edit_at_its_end_has_nothing_more_to_do_and_a_longer_one_goes_on(red, pictures):
    options = {"guidance": "dds", "views": 5, "supersample": 1, "model": ToyPrior(pictures)}
    last = list(edit(red, "blue", "red", steps=4, average_last=0.5, **options))[-1]
    assert list(edit(red, "blue", "red", steps=4, **options, resume=last.state())) == []
    longer = edit(red, "blue", "red", steps=12, average_last=0.5, **options, resume=last.state())
    averaged = [(step.index, step.state()["averaged"]) for step in longer]
    assert averaged == [(4, 0), (5, 0), *((index, index - 5) for index in range(6, 12))], "of the longer edit alone"


def test_a_state_of_another_edit_is_refused(red, pictures, cloud):
    def run(gaussians=red, **more):
        return list(edit(gaussians, "blue", "red", model=ToyPrior(pictures), views=5, **{"steps": 2, **more}))

    state = run(guidance="ids")[-1].state()
    with pytest.raises(InputError, match="resume: the state is of 2 steps, but steps is 1"):
        run(steps=1, resume=state)
    with pytest.raises(InputError, match="resume: the state is of a scene"):
        run(cloud, resume=state)
    for more in ({"guidance": "vsd"}, {"source_cache": 1}):
        with pytest.raises(InputError, match="resume: the state is of another guidance or source_cache"):
            run(**more, resume=state)


def test_a_state_of_another_kind_of_device_is_refused(red, pictures):
    state = next(edit(red, "blue", "red", model=ToyPrior(pictures), views=2)).state()
    with pytest.raises(InputError, match="another kind of device"):
        list(
            edit(red, "blue", "red", model=ToyPrior(pictures), views=2, resume={**state, "generator": torch.zeros(16)})
        )


# ------------------------------------------------------------------------------------------------------------ the file
def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    content = {"step": 3, "config": {"a": [1.0, None]}, "sha256": "ab", "log": {"loss": [0.5]}, "mean": torch.ones(2)}
    path = tmp_path / "ckpts" / "last.pt"
    write_checkpoint(content, path)
    found = read_checkpoint(path)
    assert torch.equal(found.pop("mean"), content.pop("mean")) and found == {**content, "format": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


class Evil:
    def __reduce__(self):
        return (os.system, ("exit",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, or not a checkpoint; delete it"),
        (b"PK\3\4 and then nothing", "damaged"),
        ([1, 2], "not a checkpoint of `splatedit run`"),
        ({"step": 1}, "not a checkpoint of `splatedit run`"),
        ({"step": 1, "config": {}, "sha256": "", "log": {}, "format": 99}, "of format 99, expected 1"),
        (Evil(), "damaged, or not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_every_cut_of_a_checkpoint_is_noticed(tmp_path):
    write_checkpoint({"step": 1, "config": {}, "sha256": "", "log": {}, "means": torch.rand(50, 3)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "a.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match="damaged"):
            read_checkpoint(tmp_path / "a.pt")


def test_only_what_does_not_decide_the_edit_may_change():
    config = Config(scene="a.ply", prompt="a pig", steps=9)
    saved = {"config": vars(config).copy(), "sha256": "ab", "step": 5}
    check_same(saved, config, "ab")
    check_same(saved, replace(config, scene="b.ply", steps=6, device="cpu", cache_mb=1.0, checkpoint_every=3), "ab")
    for change in ({"prompt": "a dog"}, {"seed": 1}, {"lr_sh0": 0.1}, {"mask_box": "0,0,0,1,1,1"}):
        with pytest.raises(InputError, match=f"--resume: {next(iter(change))} was .* when the run began, now it is"):
            check_same(saved, replace(config, **change), "ab")
    with pytest.raises(InputError, match="steps: found 5, but 5 are done already; give more"):
        check_same(saved, replace(config, steps=5), "ab")
    with pytest.raises(InputError, match="a.ply has changed since the run began"):
        check_same(saved, config, "cd")
    del saved["config"]["seed"]  # of a version that did not know this setting
    check_same(saved, config, "ab")


def test_checkpoints_come_every_so_many_steps_or_cost_two_percent(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: now[0])

    def keeper(every, cost):
        def write(*_):
            now[0] += cost

        monkeypatch.setattr(checkpoints, "write_checkpoint", write)
        return Keeper(tmp_path / "a.pt", {}, every, pytest.fail)

    def written(keeper, seconds):
        """After which of so many steps of one second each."""
        log, found = Log(last=edit_step()), []
        for done in range(1, seconds):
            now[0] += 1
            if keeper.due(done):
                keeper.write(log)
                found.append(done)
        return found

    assert written(keeper(7, 0.1), 30) == [7, 14, 21, 28]
    assert written(keeper(0, 0.1), 300) == []
    assert written(keeper(None, 0.1), 100) == [1, 31, 61, 91]
    slow = keeper(None, 4.0)
    assert written(slow, 1000) == [1, 201, 401, 601, 801] and slow.spent == 20


def edit_step():
    from types import SimpleNamespace

    return SimpleNamespace(state=dict)


# ------------------------------------------------------------------------------------------------------------- the run
@pytest.fixture
def config(scene_file, pictures, tmp_path, monkeypatch, one_thread):
    """Six steps with three cameras on the ball by a prior that answers at once, a checkpoint after each."""
    monkeypatch.setattr("splatedit.work.FRAMES", 2)
    monkeypatch.setattr("splatedit.work.VIEWS", 2)
    monkeypatch.setattr("splatedit.priors.load_prior", lambda *_, **__: ToyPrior(pictures))
    options = {"scene": str(scene_file), "prompt": "blue", "output_dir": str(tmp_path / "out")}
    words = ["source_prompt=red", "steps=6", "cameras=dome:3", "device=cpu", "guidance=dds", "checkpoint_every=1"]
    return load_config(options=options, words=words)


def shout():
    return Console(file=io.StringIO(), width=500, highlight=False)


def said(console):
    return console.file.getvalue()


class Killed(BaseException):
    """What no part of the program expects."""


def die_at(monkeypatch, step):
    """Have the run die when this step is over, as if by kill -9: nothing is tidied up by the loop."""
    show = checkpoints.Log.add

    def add(log, taken, spent):
        show(log, taken, spent)
        if taken.index + 1 == step:
            raise Killed

    monkeypatch.setattr(checkpoints.Log, "add", add)


def same_result(one, other):
    assert one.edited.read_bytes() == other.edited.read_bytes()
    first, second = (json.loads((o.folder / "metrics.json").read_text()) for o in (one, other))
    assert first == second


@pytest.fixture
def whole(config):
    return run(config, shout())


def test_a_run_that_died_goes_on_in_its_folder_and_ends_the_same(config, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 4)
        run(config, console := shout())
    assert "The edit is kept as of its last checkpoint; to go on: splatedit run --resume" in said(console)
    folder = folders.newest(config)
    assert not (folder / "edited.ply").exists() and read_checkpoint(folder / "ckpts" / "last.pt")["step"] == 3
    (folder / ".edited.ply.1234abcd.part").write_bytes(b"half")
    (folder / "ckpts" / ".last.pt.1234abcd.part").write_bytes(b"half")
    console = shout()
    outcome = run(config, console, ["splatedit", "run", "--resume"], resume=folder)
    assert outcome.folder == folder and "going on after 3 of 6 steps" in said(console)
    same_result(whole, outcome)
    record = outcome.record
    assert (record["steps"], record["resumed_after"], record["interrupted"]) == (6, [3], False)
    assert record["network_evaluations"] == whole.record["network_evaluations"]
    assert whole.record["resumed_after"] == []
    assert not list(folder.rglob("*.part")) and len((folder / "cmd.txt").read_text().splitlines()) == 2


def test_a_finished_run_says_so_and_more_steps_go_on_from_its_end(config, whole, monkeypatch):
    edited = whole.edited.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("splatedit.run.optimise", lambda *_: pytest.fail("nothing is left to do"))
        again = run(config, console := shout(), resume=whole.folder)
    assert "is finished: 6 of 6 steps" in said(console) and again.edited == whole.edited
    assert again.status == whole.status and whole.edited.read_bytes() == edited
    with pytest.raises(InputError, match="no unfinished run of .* to 'blue' in .*; the newest, .*, is finished"):
        folders.newest(config)
    with pytest.raises(InputError, match="guidance was 'dds'.*now it is 'ids'"):
        run(replace(config, guidance="ids"), shout(), resume=whole.folder)
    longer = run(replace(config, steps=8), shout(), resume=whole.folder)
    assert longer.record["steps"] == 8 and longer.record["resumed_after"] == [6]
    assert len(json.loads((longer.folder / "metrics.json").read_text())["curve"]["loss"]) == 8
    assert longer.edited.read_bytes() != edited and load_config(longer.folder / "config.yaml").steps == 8


def test_a_run_that_dies_while_it_writes_goes_on_without_a_step(config, whole, monkeypatch):
    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("splatedit.results.draw_pairs", die)
        run(config, shout())
    folder = folders.newest(config)
    with monkeypatch.context() as patch:
        patch.setattr("splatedit.editing.edit", lambda *_, **__: pytest.fail("all steps have been taken"))
        outcome = run(config, shout(), resume=folder)
    same_result(whole, outcome)
    assert outcome.record["change"] == whole.record["change"]
    assert [e.number for e in Stack(outcome.edited).entries.values()] == [1], "one edit in the history"


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_at_its_first_step(config, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("splatedit.folders.shutil.rmtree", lambda _: None)  # kill -9 leaves the folder behind
        die_at(patch, 1)
        run(config, shout())
    outcome = run(config, console := shout(), resume=folders.newest(config))
    assert "has no checkpoint yet: it begins at the first step" in said(console)
    same_result(whole, outcome)


def test_a_changed_scene_is_refused_and_a_moved_one_is_not(config, scene_file, monkeypatch, cloud):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 2)
        run(config, shout())
    folder = folders.newest(config)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    moved = scene_file.rename(scene_file.with_name("moved.ply"))
    with pytest.raises(InputError, match="ball.ply: no such file.*say where: splatedit run --resume .* SCENE"):
        run(config, shout(), resume=folder)
    files.save(cloud._replace(sh0=cloud.sh0 + 1), scene_file)
    with pytest.raises(InputError, match="--resume: .*ball.ply has changed since the run began"):
        run(config, shout(), resume=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before
    assert run(replace(config, scene=str(moved)), shout(), resume=folder).record["steps"] == 6


def test_one_ctrl_c_ends_after_the_step_and_the_run_goes_on_from_there(config, whole, monkeypatch):
    add = checkpoints.Log.add

    def interrupt(log, step, spent):
        add(log, step, spent)
        if step.index == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Log, "add", interrupt)
        outcome = run(config, console := shout())
    assert outcome.status == 130 and outcome.record["interrupted"] and "Interrupted after 3 of 6 steps" in said(console)
    assert files.load(outcome.edited).n == 300 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert folders.newest(config) == outcome.folder, "unfinished, and found again"
    again = run(config, shout(), resume=outcome.folder)
    same_result(whole, again)
    assert again.record["resumed_after"] == [3] and not again.record["interrupted"]


def test_a_folder_in_use_is_left_alone(config, whole):
    holder = "import pathlib, sys, time\nfrom splatedit.folders import locked\n"
    holder += "with locked(pathlib.Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", holder, str(whole.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is working in this folder"):
            run(replace(config, steps=9), shout(), resume=whole.folder)
        assert folders.in_use(whole.folder)
        other.kill()
    assert not folders.in_use(whole.folder), "the lock of a killed process is gone"


def test_a_new_run_says_that_another_is_unfinished(config, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 2)
        run(config, shout())
    cut = folders.newest(config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 1)
        run(config, console := shout())
    assert f"{cut} is unfinished; --resume goes on there" in said(console)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 1)
        run(replace(config, prompt="red"), console := shout())
    assert "unfinished" not in said(console)


# ---------------------------------------------------------------------------------------------------- the command line
@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """`splatedit run` with these words, up to the run itself: its settings and what it resumes; or status and error."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        asked = []
        monkeypatch.setattr(
            "splatedit.run.run", lambda config, resume, **_: asked.append((config, resume)) or sys.exit()
        )
        monkeypatch.setattr(sys, "argv", ["splatedit", "run", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return asked[0] if asked else (ended.value.code, capsys.readouterr().err)

    return call


def cut_off(name, number, scene="cat.ply", prompt="a pig", **settings):
    """The folder of a run, as much of it as finding it needs; `number` says how old it is."""
    folder = Path("outputs", name)
    folder.mkdir(parents=True)
    save_config(Config(scene=scene, prompt=prompt, steps=9, seed=number, **settings), folder / "config.yaml")
    os.utime(folder / "config.yaml", (number, number))
    return folder


def finish(folder, interrupted=False):
    (folder / "run.json").write_text(json.dumps({"interrupted": interrupted, "steps_asked": 9}))


def test_resume_with_a_folder_or_a_checkpoint_needs_neither_scene_nor_prompt(call):
    folder = cut_off("cat/a-pig@1", 1, guidance="cds")
    (folder / "ckpts").mkdir()
    (folder / "ckpts" / "old.pt").write_bytes(b"")
    own = Config(scene="cat.ply", prompt="a pig", steps=9, seed=1, guidance="cds")
    assert call("--resume", folder) == (own, str(folder))
    assert call("--resume", folder / "ckpts" / "old.pt") == (own, str(folder / "ckpts" / "old.pt"))
    assert call("--resume", folder, "--steps", 20) == call("--resume", folder, "steps=20")
    assert call("--resume", folder, "steps=20") == (replace(own, steps=20), str(folder))
    assert call("--resume", folder, "moved.ply")[0].scene == "moved.ply"
    assert call("--resume", folder, "cat.ply", "a pig", "device=cpu")[0] == replace(own, device="cpu")
    Path("c.yaml").write_text("offline: true\n")
    assert call("--resume", folder, "--config", "c.yaml")[0] == replace(own, offline=True)


def test_resume_alone_takes_the_newest_unfinished_run_of_what_is_said(call):
    pig, dog, other, done = (
        cut_off(*words)
        for words in (
            ("cat/a-pig@1", 3),
            ("cat/a-dog@1", 2, "cat.ply", "a dog"),
            ("dog/a-pig@1", 5, "dog.ply"),
            ("cat/a-pig@2", 9),
        )
    )
    finish(done)
    finish(other, interrupted=True)
    cut_off("cat/a-pig@3", 10, prompt="a pig!")  # another prompt that makes the same name
    Path("cat.ply").write_bytes(b"")
    assert call("cat.ply", "a pig", "--resume")[1] == str(pig)
    assert call("--resume", "cat.ply", "a pig")[1] == str(pig)
    assert call("--resume", "cat.ply", "a dog", "seed=2")[1] == str(dog)
    assert call("dog.ply", "--resume")[1] == str(other)
    assert call("--resume", "seed=10")[0].prompt == "a pig!"
    status, said = call("horse.ply", "a pig", "--resume")
    assert status == 2 and "there is no unfinished run of horse.ply to 'a pig' in outputs" in said
    status, said = call("cat.ply", "a pig", "--resume", "-o", "elsewhere")
    assert status == 2 and "in elsewhere" in said


def test_mistakes_of_resume_are_one_line(call):
    folder = cut_off("cat/a-pig@1", 1)
    Path("empty").mkdir()
    for words, message in (
        (("--resume", "nowhere"), "nowhere: not there"),
        (("--resume", "empty"), "empty is not the outputs folder of a run"),
        (("--resume", folder, "stepz=3"), "did you mean 'steps'?"),
        (("--resume", folder, "cat.ply", "a", "pig"), "quotes"),
        (("cat.ply",), "Missing argument 'PROMPT'"),
        ((), "Missing argument 'SCENE'"),
    ):
        status, said = call(*words)
        assert status == 2 and message in said and said.count("\n") == 1, said


# ---------------------------------------------------------------------------------------------------- disks that fail
def full(path, after):
    """`files.atomic` on a disk that is full for names that end in `path`, from the so-many-th time on."""
    real, count = files.os.fsync, [0]

    def fsync(handle):
        if os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).startswith(f".{path}"):
            count[0] += 1
            if count[0] > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    return fsync


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")


@needs_proc
def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_the_edit_goes_on(config, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("splatedit.files.os.fsync", full("last.pt", 2))
        outcome = run(config, console := shout())
    assert said(console).count("last.pt: cannot be written (No space left on device). The edit goes on") == 4
    same_result(whole, outcome)
    assert read_checkpoint(outcome.folder / "ckpts" / "last.pt")["step"] == 2, "the last one that was written"


def test_wherever_a_disk_is_full_a_checkpoint_says_so(tmp_path, monkeypatch):
    """torch turns some of these errors into its own."""
    write_checkpoint({"step": 1}, tmp_path / "a.pt")
    before, content = (tmp_path / "a.pt").read_bytes(), {"step": 2, "means": torch.ones(100)}
    for limit in range(0, len(before) + 400, 61):
        room = [limit]

        class Full(io.FileIO):
            def write(self, data, room=room):
                room[0] -= len(data)
                if room[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        monkeypatch.setattr("splatedit.files.open", lambda part, _, Full=Full: Full(part, "xb"), raising=False)
        with pytest.raises(InputError, match="a.pt: cannot be written .No space left on device.") as error:
            write_checkpoint(content, tmp_path / "a.pt")
        assert isinstance(error.value.__cause__, OSError) and error.value.__cause__.errno == errno.ENOSPC
        assert (tmp_path / "a.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "missing"), [(10_000, "edited.ply"), (40_000, "sheet.png")])
def test_a_full_disk_in_a_real_process(limit, missing, scene_file, tiny_model, tmp_path):
    """The system refuses checkpoints, and in the end edited.ply or a picture: no file may grow beyond `limit` bytes."""
    paths = [str(scene_file), "a pig", "--model", str(tiny_model), "-o", str(tmp_path / "out")]
    words = ["--source-prompt", "a cat", "steps=2", "cameras=orbit:2", "checkpoint_every=1"]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "splatedit", "run", *paths, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 1 and done.stdout == ""
    assert "last.pt: cannot be written (File too large). The edit goes on" in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("splatedit: error: ") and f"{missing}: cannot be written (File too large)" in error
    if missing == "edited.ply":
        assert not (tmp_path / "out").exists(), "nothing could be kept"
    else:
        (edited,) = (tmp_path / "out").glob("*/*/edited.ply")
        assert files.load(edited).n == 300 and f"The edit is kept: {edited} is whole" in done.stderr


@needs_proc
@pytest.mark.parametrize(
    "name",
    ["edited.ply", *(pytest.param(n, marks=pytest.mark.slow) for n in ("00_before.png", "turntable.mp4", "run.json"))],
)
def test_results_that_cannot_be_written_are_an_error_and_nothing_is_lost(name, config, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError, match=f"{name}: cannot be written .No space left"):
        patch.setattr("splatedit.files.os.fsync", full(name, 0))
        run(config, console := shout())
    assert "The edit is kept as of its last checkpoint" in said(console)
    folder = folders.newest(config)
    assert not list(folder.rglob("*.part")) and not (folder / name).exists()
    same_result(whole, run(config, shout(), resume=folder))


# ------------------------------------------------------------------------------------------------------------- kill -9
@pytest.mark.slow
def test_a_run_that_dies_at_any_of_its_writes_ends_the_same(config, whole, monkeypatch):
    """Every file that a run writes, one after the other, is the last."""
    sync, ended, last = files.os.fsync, False, 0
    for last in range(100):
        left = [last]

        def fsync(handle, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr("splatedit.folders.shutil.rmtree", lambda _: None)
            patch.setattr("splatedit.files.os.fsync", fsync)
            try:
                run(config, shout())
                ended = True
                break
            except Killed:
                pass
        try:
            folder = folders.newest(config)
        except InputError:  # not even its settings were written
            continue
        same_result(whole, run(config, shout(), resume=folder))
    assert ended and last > 20


def check_whole(folder):
    """Every file that a killed run left behind can be read."""
    from PIL import Image

    for path in folder.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".ply":
            files.load(path)
        elif path.suffix == ".pt":
            read_checkpoint(path)
        elif path.name == "config.yaml":
            load_config(path)


def splatedit(words, out, log):
    """`splatedit WORDS` in this process, with what it prints in files."""
    for number, path in ((1, out), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["splatedit", *words]
    main()


@pytest.mark.slow
def test_kill_9_at_20_random_moments(scene_file, tiny_model, tmp_path, monkeypatch):
    """A run is killed, resumed and killed again until it gets through, and another, until there were 20 kills.

    Each is a process of its own, forked from one that has imported what takes long. The moment is any between the start
    and the end of the process; three of four come after the model was loaded.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forks = multiprocessing.get_context("forkserver")
    slow = ("pipelines.stable_diffusion.pipeline_stable_diffusion", "models.unets.unet_2d_condition")
    forks.set_forkserver_preload(["splatedit.run", "splatedit.media", "av", *(f"diffusers.{name}" for name in slow)])
    settings = ["--source-prompt", "a cat", "--model", str(tiny_model), "--cameras", "orbit:3", "--guidance", "dds"]
    fresh = ["run", str(scene_file), "a pig", *settings, "steps=12", "checkpoint_every=3", "device=cpu", "-o"]
    log, out, rng = tmp_path / "log", tmp_path / "out", random.Random(0)

    def start(*words):
        log.write_text("")
        process = forks.Process(target=splatedit, args=(words, str(out), str(log)))
        process.start()
        return process

    def loaded(process):
        """Seconds until the model is there, or the process at its end."""
        begin = time.monotonic()
        while "splats from" not in log.read_text() and process.is_alive():
            time.sleep(0.01)
        return time.monotonic() - begin

    def result(process):
        process.join()
        assert process.exitcode in (0, 3), log.read_text()
        edited = Path(out.read_text().rstrip("\n"))
        return edited.read_bytes(), json.loads((edited.parent / "metrics.json").read_text())

    process = start(*fresh, str(tmp_path / "warm"))  # whatever is done once, the first time
    result(process)
    process = start(*fresh, str(tmp_path / "whole"))
    loading, begin = loaded(process), time.monotonic()
    whole = result(process)
    working, moments = time.monotonic() - begin, []
    while len(moments) < 20:
        top = tmp_path / f"out{len(moments)}"
        words, killed = [*fresh, str(top)], True
        while killed:
            process = start(*words)
            early = rng.random() < 0.25
            if not early:
                loaded(process)
            process.join(rng.uniform(0, loading if early else working))
            killed = process.is_alive()
            if not killed:
                break
            process.kill()
            process.join()
            moments.append(None)  # before there was a folder
            for folder in (path.parent for path in top.glob("*/*/config.yaml")):
                check_whole(folder)
                last = folder / "ckpts" / "last.pt"
                moments[-1] = (read_checkpoint(last)["step"] if last.exists() else 0, len(list(folder.rglob("*.*"))))
                words = ["run", "--resume", str(folder)]
        assert result(process) == whole
        assert not list(top.rglob("*.part"))
    print("steps in the last checkpoint and files there, at each kill:", moments)
