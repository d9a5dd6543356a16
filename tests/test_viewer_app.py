"""The viewer's app: callbacks in order, errors told, edits followed, scenes opened; and the words that start it."""

import asyncio
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from splatedit import cameras, files
from splatedit.config import Config
from splatedit.editing import Step
from splatedit.errors import InputError, LossWarning
from splatedit.gaussians import SH_C0
from splatedit.jobs import Job, launch
from splatedit.run import Outcome
from splatedit.viewer import first_look, framing, shell, view, wire
from splatedit.viewer.app import App, Worker, read
from splatedit.viewer.encoding import encode
from splatedit.viewer.panels import edit
from splatedit.viewer.server import serve
from splatedit.viewer.stage import Stage, opened


def until(look, seconds=10.0):
    """The first true answer of `look`; fails if none comes."""
    end = time.monotonic() + seconds
    while not (answer := look()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)
    return answer


@pytest.fixture(autouse=True)
def never_cut_off(monkeypatch):
    """The program that would be ended here is that of the tests."""
    monkeypatch.setattr(shell, "cut_off", sys.exit)


@pytest.fixture(scope="module")
def server_app():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit.Panel, "watch", lambda self: None)  # it asks a job for more than a fake one knows
        app = App(opened(ball()))
    with app:
        yield app


@pytest.fixture
def app(server_app, monkeypatch):
    """An app as new, whose notifications are kept in `told` as (client, title, body, colour)."""
    server_app.stage.change(**ball_fields())
    server_app.job = server_app.begun = server_app.finished = None
    server_app.config = Config()
    server_app.unseen.clear()
    server_app.told = []
    browsers = {1: browser(server_app, 1), 2: browser(server_app, 2)}
    monkeypatch.setattr(server_app.server, "get_clients", lambda: dict(browsers))
    server_app.browsers = browsers
    yield server_app
    settle(server_app)


def ball(n=40, seed=0):
    from splatedit.gaussians import Gaussians

    rng = torch.Generator().manual_seed(seed)
    means = torch.nn.functional.normalize(torch.randn(n, 3, generator=rng), dim=1)
    quats, scales = torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1), torch.full((n, 3), -2.0)
    return Gaussians(means, quats, scales, torch.full((n,), 2.0), torch.zeros(n, 1, 3), torch.zeros(n, 0, 3))


def ball_fields():
    shown = opened(ball())
    return {name: getattr(shown, name) for name in ("source", "current", "extent", "up", "path", "rows")} | {
        "pull": None,
        "selection": None,
        "look": "after",
    }


def browser(app, number):
    camera = SimpleNamespace(aspect=1.5, fov=None, near=None, far=None, up_direction=None, position=None, look_at=None)
    client = SimpleNamespace(client_id=number, camera=camera, atomic=app.server.atomic)
    camera.on_update = lambda callback: vars(camera).update(moved=callback)
    client.add_notification = lambda title, body, color, auto_close_seconds: app.told.append(
        (number, title, body, color, auto_close_seconds)
    )
    return client


def settle(app):
    """Wait until both workers have nothing left to do."""
    for worker in (app.quick, app.slow, app.quick):
        done = threading.Event()
        worker.put(done.set)
        assert done.wait(10)


# --------------------------------------------------------------------------------------------------------------- worker
def test_a_worker_keeps_the_order_and_of_one_key_the_newest():
    worker, seen, begun, go = Worker("test"), [], threading.Event(), threading.Event()
    worker.put(lambda: (begun.set(), go.wait(10)))
    assert begun.wait(10)
    for number in range(5):
        worker.put(lambda n=number: seen.append(f"each {n}"))
        worker.put(lambda n=number: seen.append(f"newest {n}"), "slider")
    worker.put(lambda: 1 / 0)
    worker.put(lambda: seen.append("after an error"))
    go.set()
    until(lambda: "after an error" in seen)
    assert seen == ["each 0", "newest 4", "each 1", "each 2", "each 3", "each 4", "after an error"]
    worker.put(lambda: seen.append("again"), "slider")
    until(lambda: "again" in seen)
    worker.close()
    worker.thread.join(10)
    assert not worker.thread.is_alive()
    worker.put(lambda: seen.append("too late"))
    assert "too late" not in seen


def test_the_stage_wakes_who_waits_when_it_closes():
    stage, seen = Stage(opened(ball())), []
    waiting = threading.Thread(target=lambda: seen.append(stage.wait(0)))
    waiting.start()
    stage.close()
    waiting.join(10)
    assert seen == [stage.shown] and stage.closed


# ------------------------------------------------------------------------------------------------------- notifications
def test_errors_go_to_the_one_who_asked(app):
    def mistake(event):
        raise InputError("steps: found 0, expected 1 or more.")

    def bug(event):
        raise ZeroDivisionError("oh")

    app.act(mistake)(SimpleNamespace(client=app.browsers[1]))
    settle(app)
    app.act(bug, slow=True)(SimpleNamespace(client=None))
    settle(app)
    assert app.told == [
        (1, "Not done", "steps: found 0, expected 1 or more.", "red", None),
        (1, "Failed", "ZeroDivisionError: oh", "red", None),
        (2, "Failed", "ZeroDivisionError: oh", "red", None),
    ]


def test_a_message_finds_somebody_or_waits(app):
    gone = app.browsers.pop(2)
    app.notify("Done", "all", color="green", client=gone)
    assert app.told == [(1, "Done", "all", "green", 5.0)], "the tab that asked is closed: who is there is told"
    back = app.browsers.pop(1)
    app.notify("Failed", "while nobody looked")
    assert len(app.told) == 1
    app.browsers[1] = back
    app.welcome(back)
    assert app.told[1:] == [(1, "Failed", "while nobody looked", "red", None)] and not app.unseen
    assert app.stage.clients == 1


def test_a_window_that_is_higher_than_wide_sees_all_of_the_scene(app):
    client = app.browsers[1]
    first = framing.place(*(frame := (app.stage.shown.extent.centre.numpy(), app.stage.shown.extent.radius, "-y")))
    client.camera.position, client.camera.aspect = first.position.astype(np.float32), 1.6
    app.welcome(client)
    assert client.camera.fov is None, "left where it is"
    client.camera.aspect = 0.8  # the panel has taken its part
    asyncio.run(client.camera.moved(client.camera))
    settle(app)
    far = framing.place(*frame, aspect=0.8).position
    np.testing.assert_allclose(client.camera.position, far)
    client.camera.position = there = far + 1  # by a hand
    asyncio.run(client.camera.moved(client.camera))
    settle(app)
    assert client.camera.position is there


def test_slow_actions_do_not_hold_up_the_others(app):
    go, done = threading.Event(), threading.Event()
    app.act(lambda _: go.wait(10), slow=True)(None)
    app.act(lambda _: done.set())(None)
    assert done.wait(10)
    go.set()


# ------------------------------------------------------------------------------------------------------------- follow
class FakeJob:
    """What `App.follow` asks of a job."""

    def __init__(self, source=None, config=None):
        self.source, self.config, self.last, self.state, self.error, self.outcome = (
            source,
            config,
            None,
            "starting",
            None,
            None,
        )
        self.steps, self.done, self.listeners = 3, 0, []
        self.asked, self.folder, self.curve = {}, None, {"loss": []}

    @property
    def ended(self):
        return self.state in ("done", "stopped", "failed")

    def listen(self, callback):
        self.listeners.append(callback)

    def tell(self, **fields):
        vars(self).update(fields)
        for callback in self.listeners:
            callback(self)

    def take(self, gaussians, rows=None, pull=None):
        step = Step(self.done, self.steps, 0.1, torch.zeros(1), gaussians, {}, 0, [], 20.0, dict, rows=rows, pull=pull)
        self.done += 1
        self.curve["loss"].append(0.1)
        self.tell(last=step, state="running")

    def result(self):
        return self.written


def test_an_edit_is_followed_from_its_source_to_its_file(app, tmp_path):
    job, source = FakeJob(), ball(30, seed=3)
    before = app.stage.shown
    app.follow(job)
    settle(app)
    assert app.stage.shown is before, "nothing to show yet"
    job.tell(source=source, state="running")
    settle(app)
    shown = app.stage.shown
    assert shown.source.means.equal(source.means) and shown.current is shown.source
    assert shown.extent.radius == cameras.bounds(source).radius
    with pytest.raises(InputError, match="under way"):
        app.follow(FakeJob())
    rows, pull = torch.arange(31).clamp(max=29), torch.rand(31)
    job.take(ball(31), rows, pull)
    settle(app)
    shown = app.stage.shown
    assert shown.current.n == 31 and shown.rows is rows and shown.pull is pull and shown.source.n == 30
    job.written = ball(31, seed=9)
    job.tell(state="done", outcome=Outcome(tmp_path, tmp_path / "edited.ply", {}, 0))
    settle(app)
    shown = app.stage.shown
    assert shown.current is job.written and shown.rows is rows and shown.path == tmp_path / "edited.ply"
    assert {title for _, title, *_ in app.told} == {"The edit is done"} and len(app.told) == 2, "told once to each"
    job.tell()
    settle(app)
    assert len(app.told) == 2
    app.follow(FakeJob())


def test_the_same_scene_keeps_its_place_and_its_selection(app):
    chosen = torch.arange(40) < 7
    app.stage.change(selection=chosen)
    moved = []
    app.browsers[1].camera = SimpleNamespace(aspect=1.0, __setattr__=lambda *_: moved.append(1))
    app.follow(job := FakeJob(ball()))
    job.tell(state="running")
    settle(app)
    assert app.stage.shown.selection is chosen and app.browsers[1].camera.__dict__.keys() == {"aspect", "__setattr__"}
    job.tell(source=ball(30, seed=3))
    settle(app)
    assert app.stage.shown.selection is None and app.browsers[2].camera.position is not None


def test_the_edit_never_waits_for_the_viewer(app):
    go, begun = threading.Event(), threading.Event()
    app.act(lambda _: (begun.set(), go.wait(10)))(None)
    assert begun.wait(10)
    job, states = FakeJob(ball()), [ball(40, seed) for seed in range(1, 20)]
    app.follow(job)
    version = app.stage.shown.version
    for state in states:
        job.take(state)  # returns though the viewer is stuck
    assert app.stage.shown.version == version
    go.set()
    settle(app)
    assert app.stage.shown.current.means.equal(states[-1].means)
    assert app.stage.shown.version == version + 1, "what nobody could see was left out"


@pytest.mark.parametrize(
    ("state", "error", "title", "color"),
    [
        ("failed", InputError("model: not there."), "The edit failed", "red"),
        ("failed", RuntimeError("boom"), "The edit failed", "red"),
        ("stopped", InputError("stopped before the first step."), "The edit was stopped", "blue"),
        ("stopped", None, "The edit is stopped", "green"),
    ],
)
def test_how_an_edit_ends_is_told(app, state, error, title, color):
    app.follow(job := FakeJob(ball()))
    job.tell(state=state, error=error)
    settle(app)
    assert [(t, c) for _, t, _, c, _ in app.told] == [(title, color)] * 2
    assert error is None or str(error) in app.told[0][2]


def test_the_next_edit_begins_with_what_this_one_wrote_however_busy_the_viewer_is(app, tmp_path):
    go, busy = threading.Event(), threading.Event()
    app.act(lambda _: (busy.set(), go.wait(10)), slow=True)(None)  # a diagnosis, say
    assert busy.wait(10)
    app.follow(job := FakeJob(ball(), Config(scene="old.ply", prompt="a pig", source_prompt="a cat")))
    job.take(ball(seed=4))
    until(lambda: app.stage.shown.current.means is job.last.gaussians.means)
    told = threading.Event()
    app.act(lambda _: told.set())(None)  # behind the step, which the viewer may not be through with
    assert told.wait(10)
    job.written, job.done = ball(seed=5), 3
    job.state = "done"
    with pytest.raises(InputError, match="under way"):
        app.check_idle()  # before the viewer has heard of the end
    job.tell(outcome=Outcome(tmp_path, tmp_path / "edited.ply", {}, 0))
    ran = []
    app.act(lambda _: ran.append((app.check_idle(), app.stage.shown.path, app.config.source_prompt)))(None)
    until(lambda: ran)
    assert ran == [(None, tmp_path / "edited.ply", None)] and app.stage.shown.current is job.written
    assert app.config.prompt == "a pig"
    go.set()


def test_an_end_that_cannot_be_shown_is_an_end(app, tmp_path):
    app.follow(job := FakeJob(ball(), Config(scene="old.ply", prompt="a pig")))
    job.result = lambda: files.load(tmp_path / "edited.ply")  # somebody has deleted it
    job.tell(state="done", outcome=Outcome(tmp_path, tmp_path / "edited.ply", {}, 0))
    settle(app)
    assert app.told[-1][2].startswith(f"{tmp_path}/edited.ply: no such file")
    app.check_idle()
    app.follow(job := FakeJob(ball()))
    job.take(SimpleNamespace(to=lambda device: 1 / 0))  # a GPU that has crashed gives nothing back
    job.tell(state="failed", error=RuntimeError("CUDA error"))
    settle(app)
    assert "RuntimeError: CUDA error" in [body for _, _, body, *_ in app.told]
    app.check_idle()


def test_the_settings_of_an_edit_from_elsewhere_are_those_of_the_panel(app, tmp_path):
    app.config, before = Config(output_dir="mine", prompt="a dog"), app.stage.shown
    app.stage.change(path=tmp_path / "cat.ply")
    job = FakeJob(ball())
    job.asked = {"prompt": "a pig", "source_prompt": "a cat", "steps": 7}
    app.follow(job)
    assert app.config == Config(output_dir="mine", prompt="a pig", source_prompt="a cat", steps=7)
    job.take(ball(seed=6))
    job.tell(state="done")
    settle(app)
    shown = app.stage.shown
    assert shown.path is None, "no file holds what is shown: the next run saves it"
    assert shown.current.means.equal(ball(seed=6).means) and shown.up == before.up
    assert (app.config.source_prompt, app.config.prompt) == ("a pig", "a pig"), "that is what it shows by now"
    config = Config(scene=str(tmp_path / "dog.ply"), prompt="a fox", guidance="dds")
    app.follow(job := FakeJob(ball(), config))
    job.tell(state="running")
    settle(app)
    assert app.config is config and app.stage.shown.path == tmp_path / "dog.ply"
    job.tell(state="failed", error=InputError("no"))
    settle(app)
    assert app.config is config, "what failed has made nothing else of it"


def test_a_run_that_goes_on_begins_with_what_is_shown(app, tmp_path):
    app.stage.change(current=ball(seed=7), path=tmp_path / "edited.ply", rows=None)
    current = app.stage.shown.current
    job = FakeJob(ball(), Config(scene=str(tmp_path / "cat.ply"), prompt="a pig"))
    job.folder, job.done = tmp_path, 2
    app.follow(job)
    job.tell(state="running")
    settle(app)
    shown = app.stage.shown
    assert shown.source is not shown.current is current and shown.path == tmp_path / "edited.ply"
    app.job = app.begun = None
    app.stage.change(path=tmp_path / "another.ply")
    app.follow(job)
    job.tell(state="running")
    settle(app)
    shown = app.stage.shown
    assert shown.current is shown.source and shown.path == tmp_path / "cat.ply"


@pytest.mark.parametrize("radius", [1e-4, 1.0, 1e5])
def test_the_picture_behind_the_scene_is_not_cut_off_in_scenes_of_any_size(radius):
    """The browser hangs it one world unit before its camera."""
    near, far = framing.planes(radius)
    assert near < 1 < far and near <= 0.002 * radius and far >= 200 * radius


# --------------------------------------------------------------------------------------------------------------- files
def test_another_file_is_opened(app, scene_file, cloud, monkeypatch):
    monkeypatch.setenv("HOME", str(scene_file.parent))
    app.stage.change(selection=torch.ones(40, dtype=torch.bool), rows=torch.arange(40), pull=torch.ones(40))
    app.open_file(scene_file)
    settle(app)
    shown = app.stage.shown
    assert shown.source.means.equal(cloud.means) and shown.path == scene_file and app.config.scene == str(scene_file)
    assert shown.rows is None and shown.pull is None and shown.selection is None and shown.up == "-y"
    expected = framing.place(shown.extent.centre.numpy(), shown.extent.radius, "-y")
    np.testing.assert_allclose(app.browsers[1].camera.position, expected.position)
    np.testing.assert_allclose(app.server.initial_camera.position, expected.position)

    app.config = replace(app.config, up="+x")
    for path, up in ((scene_file, "+x"), (Path("~") / scene_file.name, None)):
        app.open_file(path)
        settle(app)
        assert app.config.up == up and app.stage.shown.up == (up or "-y"), "what was said of another scene"
    shown = app.stage.shown
    assert shown.path == scene_file and app.config.scene == str(scene_file)

    app.open_file(scene_file.parent / "nothing.ply")
    settle(app)
    assert "nothing.ply: no such file" in app.told[-1][2] and app.stage.shown is shown
    app.follow(FakeJob())
    app.open_file(scene_file)
    settle(app)
    assert "under way" in app.told[-1][2]


def test_two_scenes_are_compared(scene_file, cloud, tmp_path):
    files.save(cloud.select(slice(0, 290)), tmp_path / "less.ply")
    shown = read(scene_file, tmp_path / "less.ply")
    assert (shown.source.n, shown.current.n, shown.path) == (300, 290, tmp_path / "less.ply")
    assert shown.rows.tolist() == [-1] * 290, "nothing is known of which is which"
    shown = read(scene_file, cloud._replace(means=cloud.means + 1))
    assert shown.rows is None and shown.path is None
    with pytest.raises(InputError, match="up: found 'y'.*did you mean"):
        read(scene_file, up="y")


def test_view_takes_files_gaussians_and_edits(scene_file, cloud, monkeypatch):
    made = []
    monkeypatch.setattr(
        "splatedit.viewer.app.App", lambda *a, **k: made.append((a, k)) or SimpleNamespace(follow=made.append)
    )
    import splatedit

    assert splatedit.view is view
    view(str(scene_file), up="+z")
    assert made[-1][0][0].up == "+z" and made[-1][0][0].path == scene_file
    assert made[-1][0][1] == Config(scene=str(scene_file), up="+z"), "edits look from the same up axis"
    view(cloud, scene_file)
    assert made[-1][0][0].path == scene_file
    job = FakeJob(config=Config(scene=str(scene_file), up="+y"))
    view(job)
    (shown, config), _ = made[-2]
    assert made[-1] is job and shown.up == "+y" and shown.path == scene_file and config is job.config


def test_closing_returns_at_once_and_ends_the_threads(monkeypatch):
    app = App(opened(ball()))
    begun, go, stop = threading.Event(), threading.Event(), app.server.stop
    monkeypatch.setattr(app.server, "stop", lambda: (begun.set(), go.wait(10), stop()))
    app.close()
    app.close()
    assert begun.wait(10) and app.wait(0), "while the server still stops"
    go.set()
    assert app.at_rest(10)


@pytest.mark.parametrize("busy", [False, True])
def test_a_thread_that_is_at_work_does_not_outlive_the_program(busy, monkeypatch):
    """Where the interpreter ends it, in torch, it would take the exit status."""
    app, go, status = App(opened(ball())), threading.Event(), []
    monkeypatch.setattr(shell, "cut_off", status.append)
    monkeypatch.setattr("splatedit.viewer.app.FAREWELL", 0.01 if busy else 10.0)
    if busy:
        app.slow.put(lambda: go.wait(10))
        until(lambda: not app.slow.waiting)
    shell.close(app, 3)
    assert status == [3] * busy and app.closed.is_set()
    go.set()
    assert app.at_rest(10)


def test_ctrl_c_twice_leaves_an_edit_that_does_not_end(monkeypatch):
    go, begun, said, status = threading.Event(), threading.Event(), [], []

    def edit(job):
        job._begin()
        begun.set()
        go.wait(10)
        job._taken(Step(0, 9, 0.1, torch.zeros(1), ball(), {}, 0, [], 20.0, dict))

    job = launch(Job(edit, 9))
    assert begun.wait(10)
    monkeypatch.setattr(shell, "cut_off", lambda number: (status.append(number), sys.exit(number)))
    monkeypatch.setattr("splatedit.jobs.FAREWELL", 0.01)
    monkeypatch.setattr(job, "wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        shell.attend(job, SimpleNamespace(print=said.append))
    assert (end.value.code, status) == (130, [130]) and said[1].startswith("[bold yellow]Left")
    go.set()
    job.thread.join(10)
    assert job.state == "stopped" and job.error is not None, "and writes nothing more"


# ----------------------------------------------------------------------------------------------------------- first look
@pytest.mark.parametrize("up", cameras.UPS)
def test_the_first_camera_is_that_of_an_orbit(cloud, up):
    extent = cameras.bounds(cloud)
    found = framing.place(extent.centre.numpy(), extent.radius, up)
    (w2c,) = cameras.orbit(cloud, 1, elevation=framing.ELEVATION, fov=framing.FOV, up=up).w2c
    eye = -w2c[:3, :3].T @ w2c[:3, 3]
    np.testing.assert_allclose(found.position, eye, atol=1e-5)
    np.testing.assert_allclose(found.target, extent.centre)
    far = framing.place(extent.centre.numpy(), extent.radius, up, aspect=0.5)
    assert np.linalg.norm(far.position - far.target) > 1.8 * np.linalg.norm(found.position - found.target)


def test_the_first_look_is_what_the_display_draws(scene_file, cloud):
    seen, shown = first_look.glance(scene_file), read(scene_file)
    assert seen.up == shown.up == "-y" and seen.radius == pytest.approx(shown.extent.radius, rel=1e-6)
    assert wire.same(encode(shown.source, wire.place(seen.centre, seen.radius)).splats, seen.splats)
    assert SH_C0 == wire.SH_C0
    scene_file.with_suffix(".yaml").write_text("source_prompt: a ball\nup: '+z'  # as it stands\n")
    assert first_look.glance(scene_file).up == files.sidecar(scene_file).up == "+z"
    assert first_look.glance(scene_file, "-x").up == "-x"


def test_what_the_first_look_has_sent_is_not_sent_again(scene_file):
    served = first_look.show(serve(), first_look.glance(scene_file))
    with view(scene_file, served=served) as app:
        splats = app.displays.splats
        node = until(lambda: next((n for n in splats.nodes.values() if n.picture is not None), None))
        assert node.handle is served.first.handle and node.at == served.first.at and not node.updated


def test_without_a_plain_sound_file_there_is_no_first_look(scene_file, cloud, tmp_path):
    with pytest.warns(LossWarning):
        files.save(cloud, tmp_path / "a.compressed.ply")
        files.save(cloud, tmp_path / "a.splat")
    data = scene_file.read_bytes()
    spoilt = {
        "short.ply": data[:-4],
        "big.ply": data.replace(b"little", b"big"),
        "empty.ply": b"",
        "words.ply": b"ply\nformat binary_little_endian 1.0\nelement vertex x\nend_header\n",
        "few.ply": data.replace(b"property float opacity", b"property float opacitx"),
        "nan.ply": data[: data.index(b"end_header\n") + 11] + b"\xff" * (len(data) - data.index(b"end_header\n") - 11),
    }
    for name, content in spoilt.items():
        (tmp_path / name).write_bytes(content)
    for name in ("a.compressed.ply", "a.splat", "not-there.ply", *spoilt):
        assert first_look.glance(tmp_path / name) is None, name
    assert first_look.glance(scene_file) is not None
    scene_file.with_suffix(".yaml").write_text("sourceprompt: a ball\n")
    assert first_look.glance(scene_file) is None, "the address is not told before it is known that all can be read"


# ---------------------------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["view", "nothing.ply"], "nothing.ply: no such file"),
        (["view", "{scene}", "nothing.ply"], "nothing.ply: no such file"),
        (["view", "{bad}"], "bad.yaml: unknown key 'sourceprompt'"),
        (["view", "{scene}", "--port", "65536"], "port: found 65536"),
        (["view", "{scene}", "--up", "y"], "+y"),
        (["run", "{scene}", "a pig", "--port", "8000"], "go with --viewer"),
        (["run", "nothing.ply", "a pig", "--viewer"], "nothing.ply: no such file"),
    ],
)
def test_mistakes_are_one_line(call, words, message, scene_file):
    bad = scene_file.with_name("bad.ply")
    bad.write_bytes(scene_file.read_bytes())
    bad.with_suffix(".yaml").write_text("sourceprompt: a ball\n")
    status, out, err = call(*(word.format(scene=scene_file, bad=bad) for word in words))
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err


def test_view_tells_the_address_and_ends_with_ctrl_c(call, scene_file, monkeypatch):
    visited, held = [], []
    monkeypatch.setattr(shell.webbrowser, "open", visited.append)
    monkeypatch.setattr(App, "wait", lambda app: held.append(app) or (_ for _ in ()).throw(KeyboardInterrupt))
    status, out, err = call("view", scene_file, "--open")
    assert (status, out) == (0, held[0].url + "\n") and err == "Ctrl-C ends.\n" and held[0].closed.is_set()
    until(lambda: visited == [held[0].url])
    assert call("view", scene_file, scene_file)[1] == held[1].url + "\n" and len(visited) == 1, "no screen, no browser"


def test_view_that_is_ended_while_it_starts_says_so(call, scene_file, monkeypatch):
    monkeypatch.setattr(first_look, "glance", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    status, out, err = call("view", scene_file)
    assert (status, out) == (130, "") and err == "Interrupted before the scene was open.\n"


@pytest.mark.parametrize("interrupted", [False, True])
def test_run_with_a_viewer_says_what_it_says_without(call, scene_file, tiny_model, tmp_path, monkeypatch, interrupted):
    monkeypatch.setattr("splatedit.work.FRAMES", 2)
    if interrupted:
        from splatedit.jobs import Job

        wait, asked = Job.wait, []

        def ctrl_c(job, timeout=None):
            if asked:
                return wait(job, timeout)
            asked.append(until(lambda: job.last))
            raise KeyboardInterrupt

        monkeypatch.setattr(Job, "wait", ctrl_c)
    words = ["--model", tiny_model, "-o", tmp_path / "out", "--cameras", "orbit:3", "--steps", 2 + 98 * interrupted]
    status, out, err = call(
        "run", scene_file, "a pig", "--src-prompt", "a cat", "--guidance", "dds", "--viewer", *words
    )
    assert status == 130 if interrupted else status in (0, 3), err
    (edited,) = out.splitlines()
    assert Path(edited).name == "edited.ply" and files.load(edited).n == 300
    assert err.startswith("viewer: http://127.0.0.1:") and ("stopping after this step" in err) == interrupted
    assert (Path(edited).parent / "cmd.txt").read_text().startswith(f"splatedit run {scene_file} 'a pig' --src-prompt")
