"""The edit tab: settings from text and back, the command that repeats a run, and an edit steered from the browser."""

import json
import math
import shlex
import threading
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splatedit import cli, files
from splatedit.config import (
    GUIDANCES,
    KEYS,
    MASK_BY,
    OPTIONS,
    PRESETS,
    SOLVERS,
    TIMESTEPS,
    UPS,
    WEIGHTS,
    Config,
    as_command,
    check,
    load_config,
    save_config,
)
from splatedit.errors import InputError
from splatedit.folders import CHECKPOINT
from splatedit.jobs import Job
from splatedit.tuning import RANGES
from splatedit.viewer.app import App
from splatedit.viewer.panels import edit
from splatedit.viewer.resuming import at_folder, unfinished
from splatedit.viewer.stage import opened
from splatedit.vram import VRAM
from tests.screen import keep, open_page, pixels, until

SH_C0 = 0.28209479177387814


# --------------------------------------------------------------------------------------------------------- the command
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
pairs = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda p: p[0] < p[1]).map(list)
positive = st.floats(0, 1e9) | st.sampled_from([0.0, 1e-5, 1e-12, 1e22])
count = st.integers(1, 10**6)
VALUES = {
    **dict.fromkeys(("scene", "prompt"), words.filter(str.strip)),
    **dict.fromkeys(("model", "output_dir"), words),
    **dict.fromkeys(("source_prompt", "mask", "mask_box", "mask_sphere", "mask_rule", "mask_text"), st.none() | words),
    "cache_dir": st.none() | words.filter(lambda text: text != "null"),  # which the command line reads as none
    "guidance": st.sampled_from(GUIDANCES),
    "solver": st.sampled_from(SOLVERS),
    "preset": st.sampled_from(sorted(PRESETS)),
    "timesteps": st.sampled_from((None, *TIMESTEPS)),
    "weight": st.sampled_from((None, *WEIGHTS)),
    "up": st.sampled_from((None, *UPS)),
    "mask_text_by": st.sampled_from(MASK_BY),
    "vram": st.sampled_from((None, *VRAM)),
    "device": st.sampled_from(("auto", "cpu", "cuda", "cuda:3")),
    "cameras": st.sampled_from(("auto", "orbit", "dome:12")),
    **dict.fromkeys(("t_range", "fpr_t_range", "grow_range"), pairs),
    "background": st.lists(st.floats(0, 1), min_size=3, max_size=3),
    "seed": st.integers(0, 2**63 - 1),
    "supersample": st.integers(1, 8),
    "cameras_most": st.integers(1, 1000),
    "source_cache": st.integers(0, 1000),
    **dict.fromkeys(("checkpoint_every", "max_gaussians", "rows_at_once"), st.none() | count),
    **dict.fromkeys(("guidance_scale", "mask_threshold"), st.none() | positive),
    "sdi_scale": st.none() | st.floats(-1e9, 1e9),
    "mask_grow": st.floats(-1e9, 1e9),
    "prune_opacity": st.floats(0, 0.999),
    "grow_percent": st.floats(0, 100),
    "final_rate": st.floats(0, 1, exclude_min=True),
    **dict.fromkeys(("anneal", "average_last", "anchor"), st.floats(0, 1)),
}
for key, kind in get_type_hints(Config).items():  # the others take what their type does
    low, high = RANGES.get(key, (1, 10**6))
    general = {bool: st.booleans(), int: st.integers(int(low), int(min(high, 10**6))), float: positive}
    if key not in VALUES:
        VALUES[key] = general[kind]

configs = st.fixed_dictionaries({}, optional=VALUES).map(
    lambda chosen: replace(Config(), **{"scene": "a scene.ply", "prompt": "a pig", **chosen})
)


@settings(max_examples=8, deadline=None)
@given(configs)
@example(Config("cat.ply", "a pig", preset="fast", solver="grad", fpr_iters=3, vram=8, rows_at_once=None, seed=1))
@example(Config("-cat.ply", "--help", source_prompt="-x", offline=True, viewer=True, lr_means=1e-5))
@example(Config("it's.ply", 'a "pig" $HOME `ls`\n=', source_prompt="null", guidance_scale=0.0))
def test_the_command_gives_the_same_settings_when_it_is_pasted(config):
    pasted_is_the_same(config)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(configs)
def test_the_command_gives_the_same_settings_whatever_they_are(config):
    pasted_is_the_same(config)


def pasted_is_the_same(config):
    check(config)
    program, name, *given_words = shlex.split(shlex.join(as_command(config)))
    parsed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splatedit.preflight.tell", lambda config, as_json: parsed.append(config))
        cli.cli.main([name, "--dry-run", *given_words], standalone_mode=False)
    assert program == "splatedit" and parsed == [config]


def test_the_command_says_what_is_not_the_default_and_no_more():
    config = load_config(options={"scene": "my cat.ply", "prompt": "a pig", "guidance": "dds", "steps": 50})
    assert shlex.join(as_command(config)) == "splatedit run 'my cat.ply' 'a pig' --guidance dds --steps 50"
    fast = load_config(options={"scene": "cat.ply", "prompt": "a pig", "preset": "fast"}, words=["anchor=0.1"])
    assert as_command(fast) == ["splatedit", "run", "cat.ply", "a pig", "--preset", "fast", "anchor=0.1"]
    assert as_command(replace(fast, solver="grad"))[-4:] == ["fast", "--solver", "grad", "anchor=0.1"]


def test_options_are_those_of_the_command_line():
    there = {option: parameter.name for parameter in cli.run.params for option in parameter.opts}
    assert {f"--{key.replace('_', '-')}": key for key in OPTIONS}.items() <= there.items()
    assert set(there.values()) & set(KEYS) == {*OPTIONS, "scene", "prompt"}, "and no option is forgotten"


def test_a_command_to_copy_is_text_and_no_html():
    said = edit.commands(Config("<b>.ply", "a pig"), [], None)
    assert "&lt;b&gt;.ply" in said and "<b>" not in said and "user-select:all" in said
    assert "Not yet:" in (said := edit.commands(Config("cat.ply"), ["steps: found <0>"], None)) and "&lt;0&gt;" in said
    assert "Run would do" not in said
    job = Job(lambda job: None, 3, Config("cat.ply", "a pig"))
    assert "Run would do" not in edit.commands(Config("edited.ply", "a pig"), [], job), "while it is the same"
    assert "splatedit run edited.ply" in edit.commands(Config("edited.ply", "a pig", seed=1), [], job)


# -------------------------------------------------------------------------------------------------------- the settings
def every_field():
    return (*edit.SUBJECT, *edit.MAIN, *edit.FPR, *edit.ADVANCED)


def test_every_field_shows_a_setting_and_reads_it_back():
    config = replace(Config(), guidance_scale=3.5, timesteps="annealed", t_range=[0.1, 0.4])
    for entry in every_field():
        assert edit.changed(Config(), entry.key, edit.as_text(config, entry)) == replace(
            Config(), **{entry.key: getattr(config, entry.key)}
        ), entry
    assert {entry.key for entry in every_field()} == edit.SHOWN and not edit.SHOWN & edit.ELSEWHERE


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("guidance_scale", "", None),
        ("guidance_scale", " 7.5 ", 7.5),
        ("guidance_scale", "5", 5.0),
        ("timesteps", edit.OWN, None),
        ("prompt", "a pig, ${HOME} a=b", "a pig, ${HOME} a=b"),
        ("prompt", "", ""),
        ("source_prompt", "", None),
        ("source_prompt", "null", "null"),
        ("t_range", "[0.1, 0.5]", [0.1, 0.5]),
        ("steps", "12", 12),
    ],
)
def test_a_field_takes_what_is_written(key, text, value):
    assert getattr(edit.changed(Config(), key, text), key) == value


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("steps", "", "steps: it is empty"),
        ("steps", "1.5", "steps: found 1.5, expected a whole number"),
        ("steps", "0", "steps: found 0, expected"),
        ("guidance_scale", "high", "guidance_scale: found 'high', expected a number or null"),
        ("t_range", "[0.5, 0.1]", "t_range"),
        ("cameras", "sphere", "cameras: 'sphere'"),
        ("device", "tpu", "device: 'tpu' is not known"),
    ],
)
def test_what_a_field_does_not_understand_is_said(key, text, words):
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        edit.changed(Config(), key, text)


def test_a_preset_brings_its_settings_along():
    fast = edit.changed(Config(steps=7), "preset", "fast")
    assert {key: getattr(fast, key) for key in PRESETS["fast"]} == PRESETS["fast"] and fast.steps == 7
    assert edit.changed(fast, "preset", "paper") == Config(steps=7)


def test_all_other_settings_can_be_written_as_words():
    config = replace(Config(), lr_means=1e-5, cache_dir="a b", mask="m.npy", steps=5, background=[0, 0.5, 1.0])
    text = edit.others(config)
    assert text == "'cache_dir=a b' lr_means=1e-05 'background=[0, 0.5, 1.0]'"
    assert edit.with_others(replace(Config(), mask="m.npy", steps=5, sdi_steps=4), text) == config
    assert edit.with_others(config, "") == replace(Config(), mask="m.npy", steps=5)
    for wrong, said in (("steps=3", "'steps' has a place"), ("lr_mean=3", "did you mean 'lr_means'"), ("a'b", "quot")):
        with pytest.raises(InputError, match=said):
            edit.with_others(config, wrong)


def test_the_mask_in_use_is_said():
    assert "All splats" in edit.mask_in_use(Config())
    assert edit.mask_in_use(Config(mask="m.npy", mask_invert=True)).endswith("mask=m.npy, mask_invert=true")


# ------------------------------------------------------------------------------------------------------------- the job
@pytest.mark.parametrize(
    ("state", "done", "able"),
    [
        (None, 0, "run"),
        ("starting", 0, "pause step stop"),
        ("running", 3, "pause step stop"),
        ("paused", 3, "pause step stop"),
        ("running", 9, ""),  # writing
        ("stopping", 3, ""),
        ("stopped", 3, "run"),
        ("done", 9, "run"),
        ("failed", 0, "run"),
    ],
)
def test_buttons_can_be_pressed_when_that_makes_sense(state, done, able):
    found = edit.buttons(state, done, 9)
    assert [name for name in ("run", "pause", "step", "stop") if getattr(found, name)] == able.split()
    assert found.pause_label == ("Resume" if state == "paused" else "Pause")


class Said:
    """A job as far as a line about it asks."""

    def __init__(self, **more):
        self.state, self.done, self.steps, self.pace, self.seconds_left = "running", 3, 9, 0.5, 3
        self.holds_after = self.error = self.outcome = None
        vars(self).update(more)


def test_how_far_an_edit_is():
    assert edit.how_far(Said()) == "step 3/9 · 0.50 s/step · 0:03 left"
    assert edit.how_far(Said(state="paused")) == "step 3/9 · paused · 0.50 s/step"
    assert edit.how_far(Said(holds_after=5)) == "step 3/9 · will hold after step 5 · 0.50 s/step · 0:03 left"
    assert edit.how_far(Said(done=9)) == "step 9/9 · writing the results · 0.50 s/step"
    assert edit.how_far(Said(state="starting", done=0, pace=None)) == "step 0/9 · loading"
    assert [edit.clock(s) for s in (0.4, 85, 3600, 36000)] == ["0:00", "1:25", "1:00:00", "10:00:00"]


def test_messages_are_the_newest_without_progress_and_boxes():
    box = ["╭─ NOTHING CHANGED ─╮", "│ 0% changed        │", "╰───────────────────╯"]
    lines = ["12 splats", "step 1/9  loss 2", *box, "step 2/9  loss"]
    assert edit.messages(lines) == ["12 splats", "NOTHING CHANGED", "0% changed"]
    assert edit.messages([str(i) for i in range(40)]) == [str(i) for i in range(40 - edit.MESSAGES, 40)]


def test_the_outcome_is_the_verdict_the_numbers_and_the_advice():
    change = {"verdict": "noise", "changed_share": 0.5, "psnr_to_source": 12.34, "prefers_target": 0.25}
    record = {"steps": 3, "steps_asked": 9, "change": {**change, "advice": ["lower the scale"]}}

    class Outcome:
        folder = Path("outputs/cat/pig")

    outcome = Outcome()
    outcome.record = record
    assert edit.outcome(Said(outcome=outcome)) == (
        "<b>the edit went to noise</b> · 3 of 9 steps · 50% of the splats changed · 12.3 dB to the source · the model "
        "prefers the target in 25% of the views<br>– lower the scale<br><code>outputs/cat/pig</code>"
    )
    record["change"]["psnr_to_source"] = None  # json of infinity
    assert "equal to the source" in edit.outcome(Said(outcome=outcome))
    record["change"] = None
    assert edit.outcome(Said(outcome=outcome)).startswith("<b>not measured</b> · 3 of 9 steps")
    assert edit.outcome(Said(state="failed", error=InputError("no <word>"))) == "<b>failed</b>: no &lt;word&gt;"


@given(st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=1500))
@settings(max_examples=40, deadline=None)
def test_curves_are_thinned_to_means_and_drop_what_is_not_finite(values):
    x, y = edit.thinned([values])
    good = [(i + 1, v) for i, v in enumerate(values) if math.isfinite(v)]
    assert len(x) == len(y) <= edit.POINTS and bool(good) == bool(len(x))
    if len(good) <= edit.POINTS:
        assert list(zip(x, y, strict=True)) == good
    elif good:
        assert (np.diff(x) > 0).all() and x[0] < x[-1] <= good[-1][0]
        parts = np.array_split(np.array(good), [math.ceil(len(good) / edit.POINTS)])
        np.testing.assert_allclose((x[0], y[0]), parts[0].mean(0), rtol=1e-9, atol=1e-6)


def test_two_curves_share_their_steps():
    x, a, b = edit.thinned([[1.0, math.nan, 3.0, 4.0], [1.0, 2.0, math.inf, 5.0]])
    assert (x.tolist(), a.tolist(), b.tolist()) == ([1, 4], [1, 4], [1, 5])
    assert all(len(part) == 0 for part in edit.thinned([[], []]))


# ----------------------------------------------------------------------------------------------------------- the panel
@pytest.fixture
def made(cloud, scene_file, tmp_path, monkeypatch):
    """A function that opens a viewer with the edit tab, whose actions are done at once; its jobs are not started."""
    apps, begun, resumed = [], [], []
    monkeypatch.setattr(edit.Panel, "watch", lambda self: None)

    def start_run(config, resume=None, command=None):
        resumed.extend([resume] if resume else [])
        begun.append(Job(lambda job: None, config.steps, config))
        return begun[-1]

    monkeypatch.setattr(edit, "start_run", start_run)

    def make(path=scene_file, **settings):
        config = replace(Config(prompt="a pig", output_dir=str(tmp_path / "out")), **settings)
        app = App(opened(cloud, path=path), config)
        app.act = lambda handler, **_: lambda event: app.guard(handler, event)
        app.told = []
        app.notify = lambda title, body, **more: app.told.append(body)
        with app.server.gui.add_folder("tab"):
            panel = edit.Panel(app)
        panel.begun, panel.resumed = begun, resumed
        apps.append(app)
        return panel

    yield make
    for app in apps:
        app.close()


def test_fields_are_the_settings(made):
    panel = made()
    panel.fields["steps"].value = "12"
    panel.fields["source_prompt"].value = "a cat"
    panel.fields["guidance"].value = "dds"
    assert (panel.app.config.steps, panel.app.config.source_prompt, panel.app.config.guidance) == (12, "a cat", "dds")
    panel.fields["preset"].value = "fast"
    assert panel.fields["solver"].value == "picard_null" == panel.app.config.solver
    panel.app.config = replace(panel.app.config, mask="mine.npy", seed=4, lr_means=0.5)  # by another panel
    panel.look()
    assert panel.fields["seed"].value == "4" and panel.more.value == "lr_means=0.5"
    assert "mine.npy" in panel.mask_line.content and "mine.npy" in panel.command_block.content


def test_a_mistake_in_a_field_stays_there_until_it_is_mended(made):
    panel = made()
    panel.fields["steps"].value = "ten"
    assert panel.app.config.steps == 300 and "Not yet" in panel.command_block.content
    panel.app.act(panel.run)(None)
    assert panel.begun == [] and "steps: found 'ten'" in panel.app.told[-1]
    panel.app.config = replace(panel.app.config, seed=9)
    panel.look()
    assert panel.fields["steps"].value == "ten", "what somebody is typing is left alone"
    panel.fields["steps"].value = "10"
    panel.app.act(panel.run)(None)
    assert panel.begun[-1].config.steps == 10


def test_run_edits_the_shown_scene_and_is_followed(made, scene_file, tmp_path):
    panel = made(steps=5)
    panel.run(None)
    (job,) = panel.begun
    assert job.config == replace(panel.app.config, scene=str(scene_file)) and panel.app.job is job
    with pytest.raises(InputError, match="an edit is under way"):
        panel.run(None)
    assert panel.run_button.disabled and not panel.stop_button.disabled and panel.status.visible
    job.pause()
    job._become("paused")
    panel.look()
    assert panel.pause_button.label == "Resume"
    panel.pause(None)
    assert job.holds_after is None, "it goes on"
    panel.step(None)
    assert job.holds_after == 1
    panel.stop(None)
    panel.look()
    assert job.state == "stopping" and panel.stop_button.disabled


def test_a_scene_without_a_file_is_saved_where_its_edits_go(made, cloud, tmp_path):
    panel = made(path=None)
    panel.run(None)
    where = tmp_path / "out" / "scene" / "scene.ply"
    assert panel.begun[0].config.scene == str(where) and panel.app.stage.shown.path == where
    assert torch.equal(files.load(where).means, cloud.means) and str(where) in panel.app.told[0]
    assert panel.app.config.up == panel.app.stage.shown.up


def test_the_edit_only_sets_a_flag(made):
    panel = made(steps=3)
    panel.run(None)
    panel.news.clear()
    job, drawn = panel.begun[0], panel.status.content
    job._tell()
    assert panel.news.is_set() and panel.status.content == drawn


def test_what_came_of_an_edit_stands_there(made, tmp_path):
    panel = made(source_prompt="a cat")
    panel.run(None)
    (job,) = panel.begun

    class Outcome:
        folder, edited, record = tmp_path, tmp_path / "edited.ply", {"steps": 3, "steps_asked": 3, "change": None}

    job.outcome, job.done = Outcome(), 3
    job._state = "done"
    panel.look()
    assert panel.result.visible and "not measured" in panel.result.content and not panel.run_button.disabled


def test_the_fields_follow_an_edit_that_was_started_elsewhere(made):
    panel = made()
    job = Job(lambda job: None, 7, asked={"prompt": "a fox", "source_prompt": "a cat", "steps": 7, "guidance": "dds"})
    panel.app.follow(job)
    panel.look()
    shown = {key: panel.fields[key].value for key in ("prompt", "source_prompt", "steps", "guidance")}
    assert shown == {"prompt": "a fox", "source_prompt": "a cat", "steps": "7", "guidance": "dds"}
    assert panel.run_button.disabled and panel.go_on_button.disabled and "under way" in panel.go_on_button.label


def test_what_an_empty_source_stands_for_is_said(made, scene_file, monkeypatch):
    panel = made()
    assert "the model looks for it" in panel.source_line.content and panel.source_line.visible
    scene_file.with_suffix(".yaml").write_text("source_prompt: a <ball>\n")
    panel.fields["source_prompt"].value = "a cat"
    panel.look()
    assert not panel.source_line.visible
    panel.fields["source_prompt"].value = ""
    panel.look()
    assert panel.source_line.visible and "&#x27;a &lt;ball&gt;&#x27;, its sidecar says" in panel.source_line.content
    scene_file.with_suffix(".yaml").write_text("source: a ball\n")
    assert "cannot be read" in edit.source_in_use(scene_file)
    monkeypatch.setattr("splatedit.stack.shows", lambda path: "a pig")
    scene_file.with_suffix(".yaml").unlink()
    assert edit.source_in_use(scene_file) == "Empty: 'a pig', its history says."
    assert edit.source_in_use(None) == "Empty: the model looks for it."


# ------------------------------------------------------------------------------------------------------------- going on
def cut_off(config, done=None, checkpoint=True, name="a-pig@20260101-000000"):
    """The folder of a run that took `done` steps, None: that was killed."""
    folder = Path(config.output_dir) / Path(config.scene).stem / name
    (folder / "ckpts").mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    if checkpoint:
        (folder / CHECKPOINT).write_bytes(b"")
    if done is not None:
        record = {"steps": done, "steps_asked": config.steps, "interrupted": done < config.steps, "exit_status": 130}
        (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (dict(done=3), "Go on from step 3 of 5"),
        (dict(done=None), "Go on"),
        (dict(done=5), "Go on (5 of 5 steps are done)"),
        (dict(done=3, checkpoint=False), "Go on (its checkpoint is gone)"),
    ],
)
def test_a_run_that_was_stopped_can_go_on_unless_something_is_missing(scene_file, tmp_path, case, words):
    config = Config(str(scene_file), "a pig", steps=5, output_dir=str(tmp_path / "out"))
    folder, job = cut_off(config, **case), Job(lambda job: None, 5, config)
    assert unfinished(config, job, scene_file).words == "Go on (an edit is under way)"
    job.folder, job._state = folder, "stopped"
    found = unfinished(config, job, folder / "edited.ply")
    assert found.words == words and (found.folder == folder) == ("(" not in words)
    if "(" not in words:
        assert found.config == config and found.command[2:] == ["--resume", str(folder), "--steps", "5"]
    more = unfinished(replace(config, steps=9, prompt="a fox"), job, None)
    assert more.config == (None if "gone" in words else replace(config, steps=9)), "its own settings, but more steps"


def test_a_run_that_was_cut_off_before_is_found(scene_file, tmp_path):
    config = Config(str(scene_file), "a pig", steps=5, output_dir=str(tmp_path / "out"))
    assert unfinished(config, None, scene_file).words == "Go on (no run was cut off)"
    folder = cut_off(config, 3)
    cut_off(config, 5, name="a-pig@20270101-000000")
    found = unfinished(replace(config, steps=300), None, scene_file)
    assert (found.folder, found.config) == (folder, config), "by its own settings"
    assert found.words == "Go on with a-pig@20260101-000000 from step 3 of 5"
    for nothing in (unfinished(replace(config, prompt="a fox"), None, scene_file), unfinished(config, None, None)):
        assert nothing == ("Go on (no run was cut off)", None, None)
    (folder / "config.yaml").write_text("steps: many\n")
    assert at_folder(folder).folder is None


def test_go_on_starts_that_run_again(made, scene_file, tmp_path):
    panel = made(steps=5)
    assert panel.go_on_button.disabled
    panel.app.act(panel.go_on)(None)
    assert panel.begun == [] and panel.app.told == ["Go on (no run was cut off)."]
    folder = cut_off(replace(panel.app.config, scene=str(scene_file), guidance="dds"), 3)
    panel.asked = None
    panel.look()
    assert not panel.go_on_button.disabled and panel.go_on_button.label.endswith("from step 3 of 5")
    panel.go_on(None)
    (job,) = panel.begun
    assert panel.resumed == [folder] and job.config.guidance == "dds" == panel.fields["guidance"].value
    assert panel.app.job is job and panel.go_on_button.disabled


def test_the_panels_thread_ends_with_the_viewer(cloud, scene_file):
    others = threading.enumerate()
    app = App(opened(cloud, path=scene_file))
    threads = [t for t in threading.enumerate() if t.name == "splatedit-edit-panel" and t not in others]
    app.close()
    for thread in threads:
        thread.join(10)
    assert threads and not any(t.is_alive() for t in threads)


# --------------------------------------------------------------------------------------------------------- in a browser
STEPS = 4000  # so many that none of these edits comes to its end by itself, however slow the browser is


@pytest.fixture
def cat(tmp_path):
    """The front of the cat as 1,500 splats, in one file."""
    whole = files.load(Path(__file__).parents[1] / "scenes" / "cat.ply")
    rows = torch.randperm(whole.n, generator=torch.Generator().manual_seed(0))[:1500]
    few = whole.select(rows)
    files.save(few._replace(scales=few.scales + 0.6), tmp_path / "cat.ply")
    (tmp_path / "cat.yaml").write_text((Path(__file__).parents[1] / "scenes" / "cat.yaml").read_text())
    return tmp_path / "cat.ply"


@pytest.fixture
def viewer(cat, tmp_path, browser):
    """An open viewer of the cat with settings for a quick edit into a fox, and its page."""
    from splatedit.viewer import view

    words = ["cameras=dome:8", "lr_sh0=0.1", "views_per_step=1", "guidance_scale=7.5", "guidance=dds"]
    options = {"scene": str(cat), "prompt": "a fox", "steps": STEPS, "output_dir": str(tmp_path / "out")}
    app = view(cat, config=load_config(options=options, words=words))
    page = open_page(browser, app.url, 1000, 700)
    yield app, page
    page.context.close()
    if app.job is not None:
        app.job.stop()
        app.job.wait(60)
    app.close()


def colour(page):
    """Mean red minus blue where there is something, and how much of the picture that is."""
    shot = pixels(page)[80:, :640]  # without the panel and notifications
    there = shot.min(2) < 235
    return float((shot[..., 0] - shot[..., 2])[there].mean()) if there.any() else 0.0, float(there.mean())


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


@pytest.mark.browser
def test_an_edit_from_the_panel_can_be_watched_held_and_stopped(viewer):
    app, page = viewer
    until(page, lambda: colour(page)[1] > 0.1, "the cat is on the screen")
    before, _ = colour(page)
    press(page, "Run")
    until(page, lambda: colour(page)[0] > before + 12, "the grey cat turns into the orange of a fox", 180)
    assert app.job.state == "running" and app.job.done < STEPS, "while the edit goes on"
    keep(page, "edit-running")

    press(page, "Pause")
    until(page, lambda: app.job.state == "paused", "held")
    until(page, lambda: page.get_by_text("paused").count() > 0, "the panel says so")
    done = app.job.done
    assert not app.job.wait(1.0) and app.job.done == done, "the counter stands still"
    press(page, "Step")
    until(page, lambda: app.job.state == "paused" and app.job.done == done + 1, "one step more")
    page.keyboard.press("n")
    until(
        page,
        lambda: app.job.state == "paused" and app.job.done == done + 2,
        "one step more by its key, which does not press the button too",
    )
    page.keyboard.press("Space")
    until(page, lambda: app.job.done > done + 3, "going on")

    press(page, "Stop")
    until(page, lambda: app.job.ended, "stopped and written", 120)
    until(page, lambda: page.get_by_text("of the splats changed").count() > 0, "the verdict is shown")
    assert app.job.state == "stopped" and app.job.outcome.edited.exists()
    until(page, lambda: app.stage.shown.path == app.job.outcome.edited, "the next edit goes on from there")
    until(page, lambda: colour(page)[0] > before + 12, "what was done is kept")
    page.get_by_text("Command", exact=True).click()
    until(page, lambda: page.get_by_text(f"splatedit run {app.job.config.scene} 'a fox'").count() > 0, "the command")
    keep(page, "edit-stopped")

    stopped, done = app.job, app.job.done
    press(page, f"Go on from step {done} of {STEPS}")
    until(page, lambda: app.job is not stopped and app.job.last is not None, "it goes on", 120)
    assert app.job.folder == stopped.folder and app.job.last.index >= done and app.config.prompt == "a fox"
    until(page, lambda: colour(page)[0] > before + 12, "with what was done")
    press(page, "Stop")
    until(page, lambda: app.job.ended, "stopped and written", 120)
    assert page.errors == []


@pytest.mark.browser
def test_keys_typed_into_a_field_are_text_and_an_unknown_word_is_told(viewer):
    app, page = viewer
    target = page.get_by_text("Target", exact=True).locator("xpath=following::input[1]")
    until(page, lambda: target.input_value() == "a fox", "the panel is there")
    target.fill("")
    target.press_sequentially("a nr zebra ")
    until(page, lambda: app.config.prompt == "a nr zebra ", "the text has arrived")
    assert app.job is None, "no key was taken for a command"
    press(page, "Run")
    told = page.get_by_text("zebra", exact=False).filter(has_text="does not know")
    until(page, lambda: told.count() > 0, "the notification names the word", 120)
    assert app.job.state == "failed" and not Path(app.config.output_dir).exists()
    keep(page, "edit-unknown-word")
