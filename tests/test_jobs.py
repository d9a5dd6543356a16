import gc
import itertools
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import splatedit
from splatedit import files, jobs, priors
from splatedit.config import Config, check, load_config
from splatedit.editing import Step, edit
from splatedit.errors import InputError
from splatedit.growth import Growth
from splatedit.jobs import STATES, Job, as_settings, launch, start, start_run
from splatedit.run import run
from splatedit.scenes import Hold, Rates
from splatedit.tuning import Tuning
from splatedit.work import Work, options

SOON = 20.0  # seconds within which whatever is waited for is there


def until(look, what):
    """Wait until `look` is true; fails with `what`."""
    end = time.monotonic() + SOON
    while not look():
        assert time.monotonic() < end, f"not within {SOON:g} s: {what}"
        time.sleep(0.001)


def a_step(index, steps, gaussians=None, residuals=(), loss=0.5):
    return Step(index, steps, loss, torch.zeros(1, 3, 2, 2), gaussians, {}, 0, list(residuals), 20.0, state=lambda: {})


class Fake:
    """An edit whose steps wait until they are let, so that a test can act in the middle of one."""

    def __init__(self, steps=6, then=None, free=False):
        self.steps, self.then, self.taken = steps, then, []
        self.may, self.loaded, self.inside = threading.Semaphore(0), threading.Event(), threading.Event()
        self.loaded.set()
        if free:
            self.may.release(steps)
        self.job = Job(self, steps)

    def __call__(self, job):
        assert self.loaded.wait(SOON)
        job._begin()
        for index in range(self.steps):
            self.inside.set()
            assert self.may.acquire(timeout=SOON)
            self.taken.append(index)
            if not job._taken(a_step(index, self.steps, gaussians=f"after {index + 1}")):
                return
        if self.then is not None:
            raise self.then


@pytest.fixture
def fake():
    made = []

    def make(*args, **more):
        made.append(Fake(*args, **more))
        return made[-1]

    yield make
    for each in made:  # no thread of a failed test goes on
        each.job.stop()
        each.may.release(each.steps)
        each.loaded.set()


def held(job, done):
    until(lambda: (job.state, job.done) == ("paused", done) or job.ended, f"held after {done}")
    assert (job.state, job.done) == ("paused", done), job.error


# ------------------------------------------------------------------------------------------------------------- control
def test_pause_holds_between_two_steps_and_costs_nothing(fake):
    edit = fake()
    job = launch(edit.job)
    assert edit.inside.wait(SOON), "the first step is under way"
    job.pause()
    assert (job.state, job.holds_after) == ("running", 1)
    edit.may.release(6)
    held(job, 1)
    before = cpu_of(job.thread)
    assert not job.wait(0.05) and edit.taken == [0], "not a step more, however many would be allowed"
    assert cpu_of(job.thread) - before < 0.005
    job.resume()
    assert job.result(SOON) == "after 6" and job.state == "done" and edit.taken == list(range(6))


def cpu_of(thread):
    """Seconds of a thread on a processor."""
    if not hasattr(time, "pthread_getcpuclockid"):
        pytest.skip("needs clocks of threads")
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def test_a_pause_before_the_first_step_holds_before_it(fake):
    edit = fake(free=True)
    edit.loaded.clear()
    job = launch(edit.job)
    job.pause()
    assert job.state == "starting"
    edit.loaded.set()
    held(job, 0)
    assert edit.taken == [] and job.last is None
    job.step(2)
    held(job, 2)
    job.step()
    held(job, 3)
    job.step(100)
    assert job.result(SOON) == "after 6"


def test_a_step_asked_for_during_a_pause_that_is_not_there_yet_comes_on_top(fake):
    edit = fake()
    job = launch(edit.job)
    assert edit.inside.wait(SOON)
    job.pause()  # after the step under way
    job.step()  # and one more
    edit.may.release(6)
    held(job, 2)


def test_step_of_a_running_edit_counts_the_one_under_way(fake):
    edit = fake()
    job = launch(edit.job)
    assert edit.inside.wait(SOON)
    job.step(2)
    edit.may.release(6)
    held(job, 2)
    with pytest.raises(InputError, match="step: found 0, expected 1 or more"):
        job.step(0)


def test_steps_asked_for_while_a_run_that_goes_on_is_loading_come_after_those_that_are_done(fake):
    edit = fake(steps=9, free=True)
    job = edit.job
    job.step(2)
    job._go_on(4)  # as `Onlooker.begin` does of a checkpoint
    assert (job.done, job.holds_after) == (4, 6)
    job.resume()
    job._go_on(5)
    assert job.holds_after is None


def test_who_waits_for_a_pause_hears_of_it_when_a_step_is_taken_back(fake):
    """Ordered and taken back before the edit has woken up: it has no news then that it would tell."""
    job = fake().job
    job.pause()
    job._become("paused")  # with no thread of the edit that could notify
    job.step()
    settled, waits = [], threading.Thread(target=lambda: settled.append(job.settle(SOON)))
    waits.start()
    until(lambda: job._changed._waiters, "it waits")  # type: ignore[attr-defined]
    begun = time.monotonic()
    job.pause()
    waits.join(SOON)
    assert settled == [True] and time.monotonic() - begun < SOON / 2, "at once, not when its time is up"


def test_stop_while_paused_keeps_what_is_done(fake):
    edit = fake(free=True)
    edit.loaded.clear()
    job = launch(edit.job)
    job.step(3)
    edit.loaded.set()
    held(job, 3)
    job.stop()
    assert job.result(SOON) == "after 3" == job.snapshot() and job.state == "stopped" and edit.taken == [0, 1, 2]
    for late in (job.pause, job.resume, job.step, job.stop):
        late()
    assert job.state == "stopped" and job.seconds_left == 0.0


def test_stop_in_the_middle_of_a_step_lets_it_end(fake):
    edit = fake()
    job = launch(edit.job)
    assert edit.inside.wait(SOON)
    job.stop()
    assert job.state == "stopping" and not job.ended
    edit.may.release(6)
    assert job.result(SOON) == "after 1" and job.state == "stopped"


def test_stop_before_the_first_step_says_that_nothing_was_done(fake):
    edit = fake(free=True)
    edit.loaded.clear()
    job = launch(edit.job)
    job.stop()
    edit.loaded.set()
    with pytest.raises(InputError, match="stopped before the first step: nothing was done, and nothing written"):
        job.result(SOON)
    assert job.state == "stopped" and edit.taken == [] and "stopped before" in job.lines[-1]


def test_an_edit_that_is_stopped_in_its_last_step_is_done(fake):
    edit = fake(steps=1)
    job = launch(edit.job)
    assert edit.inside.wait(SOON)
    job.stop()
    edit.may.release()
    assert job.wait(SOON) and job.state == "done"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["pause", "resume", "step 1", "step 3"]), max_size=6))
def test_any_sequence_of_orders_ends_where_a_model_says(orders):
    """Orders given while the edit waits before its first step, then carried out."""
    edit = Fake(steps=8, free=True)
    edit.loaded.clear()
    job, target = launch(edit.job), math.inf
    for order in orders:
        name, _, n = order.partition(" ")
        getattr(job, name)(*([int(n)] if n else []))
        steps_more = 0 if name == "pause" else math.inf if name == "resume" else int(n)
        base = 0 if name != "step" or target == math.inf else target
        target = base + steps_more
    edit.loaded.set()
    if target < 8:
        held(job, target)
        job.stop()
        assert job.wait(SOON) and edit.taken == list(range(int(target)))
    else:
        assert job.result(SOON) == "after 8" and job.state == "done"


def test_orders_from_many_threads_leave_it_whole(fake):
    edit = fake(steps=300, free=True)
    job = launch(edit.job)

    def disturb():
        for order in itertools.islice(itertools.cycle([job.pause, job.step, job.resume]), 60):
            order()

    threads = [threading.Thread(target=disturb) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job.resume()
    assert job.result(SOON) == "after 300" and edit.taken == list(range(300)), "each step once, in order"


# -------------------------------------------------------------------------------------------------------------- to ask
def test_what_goes_wrong_is_raised_where_it_is_asked_for(fake):
    error = ZeroDivisionError("in a step")
    job = launch(fake(then=error, free=True).job)
    with pytest.raises(ZeroDivisionError) as found:
        job.result(SOON)
    assert found.value is error is job.error and job.state == "failed" and job.lines == ["in a step"]
    assert job.snapshot() == "after 6", "what was done can still be had"


def test_listeners_hear_every_step_and_change_and_cannot_do_harm(fake, caplog):
    heard, edit = [], fake(steps=3, free=True)
    edit.loaded.clear()
    job = launch(edit.job)
    job.listen(lambda job: 1 / 0)
    job.listen(lambda job: heard.append((job.state, job.done)))
    job.step(2)
    edit.loaded.set()
    held(job, 2)
    job.resume()
    assert job.wait(SOON)
    until(lambda: heard[-1][0] == "done", "the end is told")
    assert heard == [
        ("running", 0),
        ("running", 1),
        ("running", 2),
        ("paused", 2),
        ("running", 2),
        ("running", 3),
        ("done", 3),
    ]
    assert "a listener failed" in caplog.text
    late = []
    job.listen(late.append)
    assert late == [job], "who comes too late is told at once"
    assert {state for state, _ in heard} < set(STATES)


def test_the_curve_pace_and_time_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("splatedit.jobs.time.perf_counter", lambda: clock[0])
    job = Job(lambda job: None, 5)
    assert job.pace is None and job.seconds_left is None
    job.listen(lambda job: clock.__setitem__(0, clock[0] + 50.0))  # somebody holds it up
    job._begin()
    for index, (residuals, loss) in enumerate([((), math.nan), ((0.4, 0.3, 0.1), 2.0), ((0.2,), 1.0)]):
        clock[0] += 100.0 if index == 0 else 2.0 * index  # the first step has drawn the source, too
        job._taken(a_step(index, 5, residuals=residuals, loss=loss))
    assert job.pace == 3.0 and job.seconds_left == 2 * 3.0
    assert job.curve["loss"][1:] == [2.0, 1.0] and math.isnan(job.curve["loss"][0])
    assert job.curve["drift"][1:] == [0.1, 0.2] and job.curve["drift_before"][1:] == [0.4, 0.2]
    assert math.isnan(job.curve["drift"][0]) and job.curve["psnr"] == [20.0] * 3


def test_waiting_has_an_end(fake):
    job = launch(fake().job)
    assert job.wait(0.0) is False
    with pytest.raises(TimeoutError, match=r"after 0 of 6 steps"):
        job.result(timeout=0.0)
    with pytest.raises(InputError, match="not loaded yet"):
        Job(lambda job: None, 1).snapshot()


# ----------------------------------------------------------------------------------------------------------- to start
@pytest.fixture
def asked(scene_file, tiny_model, tmp_path):
    """Settings of three steps with three cameras on the ball, by the untrained prior."""
    return {"model": str(tiny_model), "output_dir": str(tmp_path / "out"), "steps": 3, "cameras": "dome:3"}


def same(a, b):
    return all(torch.equal(p, b.parameters[k]) for k, p in a.parameters.items())


def test_an_edit_in_memory_gives_the_bits_of_edit_held_up_or_not(cloud, tiny_model, one_thread):
    settings = {"model": str(tiny_model), "steps": 4, "views": 3, "seed": 5, "average_last": 0.5}
    *_, last = edit(cloud, "a pig", "a cat", **settings)
    job = splatedit.start(cloud, "a pig", "a cat", **settings)
    job.pause()
    for done in range(4):
        held(job, done)
        job.step()
    assert same(job.result(SOON), last.gaussians) and not same(last.gaussians, cloud)
    assert job.source is cloud and job.curve["loss"][-1] == last.loss and job.last.evaluations == last.evaluations
    again = start(cloud, "a pig", "a cat", **settings)
    assert same(again.result(SOON), last.gaussians), "with the model that was kept"


class Dawdler:
    """Somebody who holds a run up for 100 seconds after each step, by the run's own clock."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("splatedit.run.time", SimpleNamespace(perf_counter=lambda: self.now))

    def begin(self, work):
        pass

    def step(self, step):
        self.now += 100.0
        return True


def test_a_run_of_a_file_is_the_run_of_the_command_line(scene_file, asked, few_frames, one_thread, monkeypatch):
    words = {"scene": str(scene_file), "prompt": "a pig", "source_prompt": "a cat"}
    with monkeypatch.context() as patch:
        config = load_config(options={**asked, **words})
        plain = run(config, Console(quiet=True), ["splatedit"], watch=Dawdler(patch))
    assert plain.record["wall_seconds"] == 300 and plain.record["edit_seconds"] < 100, "the pace leaves out the holds"
    loads, load = [], priors.load_prior
    monkeypatch.setattr(priors, "load_prior", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(priors, "KEPT", {})
    job = start(scene_file, "a pig", "a cat", **asked)
    result = job.result(SOON)
    assert job.state == "done" and job.outcome.status == plain.status
    assert job.outcome.edited.read_bytes() == plain.edited.read_bytes() and same(result, files.load(plain.edited))
    assert job.folder == job.outcome.folder != plain.folder
    assert (job.folder / "config.yaml").read_text() == (plain.folder / "config.yaml").read_text()
    command = (job.folder / "cmd.txt").read_text()
    assert command.startswith(f"splatedit run {scene_file} 'a pig' --source-prompt 'a cat' --model ")
    assert any("'a cat' (as given) to 'a pig'" in line for line in job.lines)
    assert not any("\x1b" in line for line in job.lines)

    second = start_run(job.config)
    assert second.wait(SOON) and len(loads) == 1, "the model is loaded once"
    counts = [each.outcome.record["network_evaluations"] for each in (job, second)]
    assert counts[0] == counts[1] == plain.record["network_evaluations"], "and counts from zero again"


def test_a_run_in_a_notebook_displays_nothing(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *_: pytest.fail("a cell would show it"))
    said = []

    def run(config, console, *_, **__):
        console.print("loud")
        with console.status("busy"):
            console.print("louder")
        said.append(console.is_jupyter)
        return SimpleNamespace(folder=None, edited=None)

    monkeypatch.setattr("splatedit.run.run", run)
    monkeypatch.setattr("splatedit.work.check_run", lambda *_: None)
    job = start_run(Config(scene="a.ply", prompt="a pig"))
    assert job.wait(30) and said == [False]
    assert [line for line in job.lines if line in ("loud", "louder")] == ["loud", "louder"]


def first(monkeypatch, order):
    """The next job is given this order before it begins, however fast it is."""
    monkeypatch.setattr(jobs, "launch", lambda job: (order(job), launch(job))[1])


def test_a_stopped_run_is_written_and_goes_on_where_it_was(scene_file, asked, few_frames, one_thread, monkeypatch):
    whole = start(scene_file, "a pig", "a cat", **asked)
    with monkeypatch.context() as patch:
        first(patch, lambda job: job.step(2))
        job = start(scene_file, "a pig", "a cat", **asked)
    held(job, 2)
    job.stop()
    edited = job.result(SOON)
    assert job.state == "stopped" and job.outcome.record["steps"] == 2 and job.outcome.record["interrupted"]
    assert same(edited, files.load(job.folder / "edited.ply")) and not same(edited, whole.result(SOON))
    on = start_run(job.config, resume=job.folder)
    assert same(on.result(SOON), whole.result()) and on.outcome.folder == job.folder and on.done == 3


def test_a_run_that_is_stopped_before_its_first_step_leaves_nothing(scene_file, asked, tmp_path, monkeypatch):
    first(monkeypatch, Job.stop)
    job = start(scene_file, "a pig", "a cat", **asked)
    with pytest.raises(InputError, match="before the first step"):
        job.result(SOON)
    assert job.state == "stopped" and not (tmp_path / "out").exists()


def test_a_word_the_model_does_not_know_is_told_by_the_result(scene_file, cloud, asked, tmp_path, tiny_model):
    run_job = start(scene_file, "a zebra", "a cat", **asked)
    memory_job = start(cloud, "a zebra", "a cat", model=str(tiny_model), steps=2, views=2)
    for job in (run_job, memory_job):
        with pytest.raises(InputError, match="zebra"):
            job.result(SOON)
        assert job.state == "failed" and "zebra" in job.lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scene", "settings", "words"),
    [
        ("ball.ply", {"stepz": 3}, "'stepz' is not a setting; did you mean 'steps'"),
        ("ball.ply", {"steps": "many"}, "steps: found 'many', expected a whole number"),
        ("ball.ply", {"source_prompt": "a dog"}, "'source_prompt' is given twice"),
        ("ball.ply", {"mask": Path("no.npy")}, "no.npy"),
        ("nowhere.ply", {}, "nowhere.ply: no such file"),
        (None, {"stepz": 3}, "'stepz' is not an argument of splatedit.edit; did you mean 'steps'"),
        (None, {"lr_means": 0.1}, "'lr_means' is not an argument"),
        (None, {"guidance": "foo"}, "guidance: 'foo' is not known"),
        (None, {"steps": 0}, "steps: found 0, expected 1 or more"),
        (None, {"steps": "many"}, "steps: found 'many', expected a whole number"),
        (None, {"views": 0}, "cameras: 'dome:0' wants a number of views"),
        (None, {"t_range": (0.9, 0.1)}, "t_range: found"),
        (None, {"anneal": 3.0}, "anneal: found 3.0"),
        (None, {"mask": torch.ones(3)}, "mask: found shape"),
        (None, {"tuning": 3}, "tuning: found a int, expected Tuning"),
        (None, {"model": "nowhere"}, "model: 'nowhere' is neither a known name nor a folder"),
        (None, {"source_cache": 4, "guidance": "dds", "model": 3}, "model: found a int, expected str or Prior"),
        (3, {}, "found a int, expected the path of a splat file or Gaussians"),
    ],
)
def test_mistakes_are_told_at_once(scene, settings, words, scene_file, cloud, monkeypatch):
    monkeypatch.chdir(scene_file.parent)
    running = set(threading.enumerate())
    with pytest.raises(InputError, match=words):
        start(cloud if scene is None else scene, "a pig", "a cat", **settings)
    assert not [thread for thread in set(threading.enumerate()) - running if thread.name == "splatedit-edit"]


def test_splats_that_are_not_finite_are_told_at_once(cloud):
    with pytest.raises(InputError, match="scene: opacities, row 7, component 0: found inf"):
        start(cloud._replace(opacities=cloud.opacities.index_fill(0, torch.tensor([7]), math.inf)), "a pig", "a cat")


def test_the_settings_of_an_edit_in_memory_are_those_that_config_knows():
    given = dict(
        steps=7, t_range=(0.1, 0.5), cameras="orbit", views=9, mask=torch.ones(3), hold=Hold(anchor=0.1), model=object()
    )
    growth, rates = Growth(5.0, 10, (0.2, 0.4), 900, 0.01), Rates(means=0.5)
    asked = as_settings("a pig", None, {**given, "growth": growth, "rates": rates, "tuning": Tuning(sdi_steps=4)})
    config = replace(Config(), **asked)
    check(config)
    edited = options(Work(config, cast(Any, SimpleNamespace(n=10)), cast(Any, None), "", "none", None))
    for key in ("steps", "t_range", "cameras", "views"):
        assert edited[key] == given[key]
    assert (edited["growth"], edited["rates"], edited["tuning"].sdi_steps) == (growth, rates, 4)
    assert edited["hold"] == Hold(anchor=0.1) and edited["mask"] is None and config.model == Config().model
    assert (config.prompt, config.source_prompt) == ("a pig", None)


@pytest.mark.parametrize("scene", ["file", "memory"])
def test_an_empty_prompt_is_a_mistake(scene, scene_file, cloud):
    with pytest.raises(InputError, match="prompt: it is empty"):
        start(scene_file if scene == "file" else cloud, " ")
    with pytest.raises(InputError, match="prompt: "):
        start(scene_file if scene == "file" else cloud, cast(str, None))


# ---------------------------------------------------------------------------------------------------- the kept model
def test_a_borrowed_model_is_lent_once_and_read_anew_if_it_has_changed(tiny_model, monkeypatch):
    monkeypatch.setattr(priors, "KEPT", {})
    with priors.borrowed(str(tiny_model), "cpu") as first, priors.borrowed(str(tiny_model), "cpu") as second:
        assert first is not second, "never two at once"
        first.evaluations = 7
        first.save_memory(priors.Savings(rows_at_once=1))
    with priors.borrowed(str(tiny_model), "cpu") as third:
        assert third is first and third.evaluations == 0 and third.rows_at_once is None, "as it was when loaded"
    weights = tiny_model / "model_index.json"
    times = weights.stat()
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 10**10))
    try:
        with priors.borrowed(str(tiny_model), "cpu") as fourth:
            assert fourth is not first
    finally:
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("prompt", ["a pig", "a zebra"])
def test_an_edit_that_has_ended_holds_no_model(prompt, cloud, tiny_model, one_thread, monkeypatch):
    """Else the next model would not fit beside it, as long as somebody keeps the job."""
    monkeypatch.setattr(priors, "KEPT", {})
    options = {"model": str(tiny_model), "views": 2, "guidance": "dds"}
    job = start(cloud, prompt, "a cat", steps=1, **options)
    assert job.wait(SOON)
    (model,) = map(weakref.ref, priors.KEPT.values())
    priors.KEPT.clear()
    gc.collect()
    assert model() is None and (job.state == "failed") == (prompt == "a zebra")
    if job.last is not None:
        state = job.last.state()
        assert (state["step"], state["evaluations"]) == (1, job.last.evaluations), "to go on with, later"


def test_the_state_of_a_step_is_not_to_be_had_once_the_next_one_has_failed():
    job = Job(lambda job: None, 3)
    job._let_go(ValueError)
    job.last = a_step(0, 3)
    job._let_go(ValueError)
    with pytest.raises(InputError, match="in the middle of a step"):
        job.last.state()


def test_models_are_loaded_one_after_the_other(tiny_model, monkeypatch):
    """diffusers makes modules without memory meanwhile, of whatever thread: two edits begun at once failed by that."""
    free, refused = threading.Lock(), []

    def load(*_, **__):
        refused.append(not free.acquire(blocking=False))
        time.sleep(0.02)  # long enough for the others to come
        free.release()
        return SimpleNamespace(save_memory=lambda savings: None)

    def borrow():
        with priors.borrowed(str(tiny_model), "cpu"):
            all_there.wait(SOON)

    all_there = threading.Barrier(3)
    monkeypatch.setattr(priors, "KEPT", {})
    monkeypatch.setattr(priors, "load_prior", load)
    threads = [threading.Thread(target=borrow) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert refused == [False] * 3


# ------------------------------------------------------------------------------------------------- the program's end
ENDING = """
    import sys, time
    import splatedit
    scene, model, out, hold = sys.argv[1:]
    job = splatedit.start(scene, "a pig", "a cat", model=model, output_dir=out, steps=5000, cameras="dome:3")
    if hold == "held":
        job.step(2)
    while job.state != "paused" if hold == "held" else job.done < 3:
        time.sleep(0.01)
    print(job.folder)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_the_end_of_the_program_waits_for_what_is_being_written(stopped, fake, monkeypatch):
    """Cut off in torch it would take the exit status, and what the edit has come to."""
    edit = fake(steps=2)
    job, write = edit.job, threading.Event()

    def edited(job):
        edit(job)
        write.wait(SOON)

    job.thread = threading.Thread(target=job._work, args=(edited,))
    monkeypatch.setattr(jobs, "LIVE", [job])
    monkeypatch.setattr(jobs, "FAREWELL", 0.0)
    job.listen(lambda job: job.stop() if stopped and job.last is not None else None)
    assert not job.writing
    job.thread.start()
    edit.may.release(2)
    until(lambda: job.writing, "the steps are taken")
    job.abandon = write.set
    jobs.leave()
    assert job.state == ("stopped" if stopped else "done") and edit.taken == [0, 1][: 2 - stopped]


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["held", "running"])
def test_a_program_that_ends_leaves_a_run_that_can_go_on(hold, scene_file, tiny_model, tmp_path, few_frames):
    code = textwrap.dedent(ENDING)
    words = [sys.executable, "-c", code, str(scene_file), str(tiny_model), str(tmp_path / "out"), hold]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    folder = Path(ended.stdout.strip())
    assert (folder / "ckpts" / "last.pt").exists() and not (folder / "run.json").exists()
    config = replace(load_config(folder / "config.yaml"), steps=8)
    on = start_run(config, resume=folder)
    on.result(60)
    assert on.outcome.record["steps"] == 8 and on.outcome.record["resumed_after"]
