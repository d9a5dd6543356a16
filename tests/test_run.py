import hashlib
import io
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from splatedit import editing, files
from splatedit.config import Config, load_config
from splatedit.errors import InputError, Lost
from splatedit.folders import output_folder, slug
from splatedit.json_files import write_json
from splatedit.results import curve, mend
from splatedit.run import run
from splatedit.stack import Stack, introduce

PARTS = {"render", "encode", "prior", "optimise"}


@pytest.fixture
def config(scene_file, tiny_model, tmp_path):
    """Three steps with three cameras on the ball, by the untrained prior."""
    options = {
        "scene": str(scene_file),
        "prompt": "a pig",
        "model": str(tiny_model),
        "output_dir": str(tmp_path / "out"),
    }
    return load_config(options=options, words=["source_prompt=a cat", "steps=3", "cameras=dome:3", "device=cpu"])


def shout():
    """A console that keeps what it is told, on one long line each."""
    return Console(file=io.StringIO(), width=500, highlight=False)


def said(console):
    return console.file.getvalue()


def fake_edit(monkeypatch, *changes, then=None):
    """Replace the loop by steps whose splats are `change(source)` each, and an exception at the end."""

    def edit(gaussians, prompt, source, *, steps, **_):
        for index, change in enumerate(changes):
            edited = change(gaussians)
            same = all(torch.equal(p, gaussians.parameters[k]) for k, p in edited.parameters.items())
            loss = 0.5 if all(bool(p.isfinite().all()) for p in edited.parameters.values()) else math.nan
            yield editing.Step(
                index,
                steps,
                loss,
                torch.zeros(1, 3, 4, 4),
                edited,
                dict.fromkeys(PARTS, 0.1),
                7,
                [],
                99.0 if same else 20.0,
                lambda: {"step": 1},
            )
        if then is not None:
            raise then

    monkeypatch.setattr(editing, "edit", edit)


def recolored(gaussians):
    return gaussians._replace(sh0=gaussians.sh0.flip(0) + 0.3)


def test_a_run_writes_everything_it_promises(config, cloud, scene_file):
    before, console = scene_file.read_bytes(), shout()
    outcome = run(config, console, ["splatedit", "run", "ball.ply", "a pig"])
    folder, record = outcome.folder, outcome.record
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *(
            "config.yaml",
            "cmd.txt",
            "run.json",
            "edited.ply",
            "edited.ply.history",
            "renders",
            "turntable.mp4",
            "metrics.json",
            "report.html",
        ),
        "ckpts",
    }
    last = torch.load(folder / "ckpts" / "last.pt", weights_only=True)
    assert last["step"] == config.steps and last["config"]["prompt"] == "a pig"
    assert last["parameters"]["means"].shape == cloud.means.shape and last["optimizer"]["state"]
    assert folder.parent.name == "ball" and folder.name.startswith("a-pig@")
    assert (folder / "cmd.txt").read_text() == "splatedit run ball.ply 'a pig'\n"
    assert load_config(folder / "config.yaml") == config
    assert scene_file.read_bytes() == before, "the scene is only read"

    edited = files.load(outcome.edited)
    assert edited.n == cloud.n and edited.sh_degree == cloud.sh_degree
    np.testing.assert_array_equal(edited.extra["label"], cloud.extra["label"])
    assert edited.comments[:-1] == cloud.comments
    assert "'a cat' to 'a pig'" in edited.comments[-1] and "seed 0" in edited.comments[-1]
    assert float((edited.means - cloud.means).norm(dim=1).max()) < 0.1, "the same splats in the same order"

    assert json.loads((folder / "run.json").read_text()).keys() == record.keys()
    assert record["sha256"] == hashlib.sha256(before).hexdigest()
    assert (record["source_prompt"], record["source_prompt_from"]) == ("a cat", "option")
    assert (record["steps"], record["steps_asked"], record["seed"], record["splats"]) == (3, 3, 0, 300)
    assert record["interrupted"] is False and record["mended_splats"] == 0 and record["up"] == "-y"
    assert set(record["seconds_per_step"]) == {"all", *PARTS}
    assert 0 < sum(record["seconds_per_step"][p] for p in PARTS) <= record["seconds_per_step"]["all"]
    assert 0 < record["source_seconds"] and record["source_seconds"] + record["edit_seconds"] < record["wall_seconds"]
    assert 0 < record["network_evaluations"]["edit"] < record["network_evaluations"]["all"]
    assert record["peak_memory_mib"]["process"] > 50
    assert record["versions"]["torch"] == torch.__version__ and "python" in record["versions"]
    assert record["change"]["verdict"] in {"changed", "unchanged", "noise"}
    assert record["exit_status"] == outcome.status == (0 if record["change"]["verdict"] == "changed" else 3)

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["change"] == json.loads((folder / "run.json").read_text())["change"]
    assert len(metrics["curve"]["loss"]) == len(metrics["curve"]["psnr"]) == 3
    assert [len(row) for row in metrics["curve"]["fpr_drift"]] == [4, 4, 4], "before and after each of three iterations"
    assert [len(row) for row in metrics["curve"]["fpr_rms"]] == [4, 4, 4]
    assert record["network_evaluations"]["backward"] == 3 * 3 * 2 * 2, "steps, iterations, views, null and source"

    assert sorted(p.name for p in (folder / "renders").iterdir())[:2] == ["00_after.png", "00_before.png"]
    assert len(list((folder / "renders").iterdir())) == 2 * 8 + 1
    assert "step 3/3" in said(console) and "loss" in said(console) and "s/step" in said(console)


def test_a_run_on_an_edited_file_goes_on_with_its_history(config, scene_file, monkeypatch, few_frames):
    fake_edit(monkeypatch, recolored)
    first = run(replace(config, steps=1), shout())
    again = replace(config, steps=1, scene=str(first.edited), prompt="a dog", source_prompt=None)
    console = shout()
    second = run(again, console)
    assert second.record["source_prompt_from"] == "history" and "from its history" in said(console)
    assert "1 edit in its history, the last 'a cat' to 'a pig'" in said(console)
    contents = [path.read_bytes() for path in (scene_file, first.edited, second.edited)]
    shutil.rmtree(first.folder)
    history = Stack.open(second.edited)
    assert [entry.title for entry in history.done] == [
        "'a cat' to 'a pig'",
        f"{second.record['source_prompt']!r} to 'a dog'",
    ]
    record = history.done[-1].record
    assert record["config"]["prompt"] == record["prompt"] == "a dog" and record["versions"]["torch"]
    assert record["verdict"] == second.record["change"]["verdict"] and record["seed"] == 0
    for content in contents[1::-1]:
        history.undo()
        assert second.edited.read_bytes() == content
    second.edited.write_bytes(contents[1] + b" ")
    assert "changed by another program" in (introduce(second.edited) or "") and introduce(scene_file) is None


def test_the_film_shows_both_and_the_page_stands_alone(config, few_frames):
    import av

    folder = run(config, shout()).folder
    with av.open(str(folder / "turntable.mp4")) as film:
        assert [(f.width, f.height) for f in film.decode(video=0)] == [(128, 64)] * 4
    page = (folder / "report.html").read_text()
    assert page.count('<img src="data:image/webp;base64,') == 4 and 'src="renders' not in page
    assert "a cat → a pig" in page and 'src="data:video/mp4;base64,' in page


def test_the_same_seed_gives_the_same_file(config, few_frames):
    first, second = (run(config, shout()) for _ in range(2))
    assert first.folder != second.folder, "a second run never overwrites the first"
    assert first.edited.read_bytes() == second.edited.read_bytes()
    other = load_config(options=vars(config) | {"seed": 1})
    assert run(other, shout()).edited.read_bytes() != first.edited.read_bytes()


def test_where_the_source_prompt_comes_from(config, scene_file, monkeypatch, few_frames):
    fake_edit(monkeypatch, recolored)
    open_ = load_config(options={k: v for k, v in vars(config).items() if k != "source_prompt"})
    console = shout()
    found = run(open_, console).record
    assert found["source_prompt_from"] == "model" and found["source_prompt"] in {"a cat", "a pig", "a dog"}
    assert "found by the model" in said(console)
    scene_file.with_suffix(".yaml").write_text('source_prompt: a dog\nup: "+z"\n')
    console = shout()
    beside = run(open_, console).record
    assert (beside["source_prompt"], beside["source_prompt_from"], beside["up"]) == ("a dog", "sidecar", "+z")
    assert "from ball.yaml" in said(console)
    given = run(config, shout()).record
    assert (given["source_prompt"], given["source_prompt_from"]) == ("a cat", "option")
    turned = load_config(options=vars(open_) | {"up": "+x", "source_prompt": ""})
    empty = run(turned, shout()).record
    assert (empty["source_prompt"], empty["source_prompt_from"], empty["up"]) == ("", "option", "+x")


def test_a_model_without_vocabulary_warns(config, tiny_model, tmp_path, monkeypatch, few_frames):
    import shutil

    fake_edit(monkeypatch, recolored)
    shutil.copytree(tiny_model, tmp_path / "full")
    (tmp_path / "full" / "vocabulary.json").unlink()
    options = {k: v for k, v in vars(config).items() if k != "source_prompt"} | {"model": str(tmp_path / "full")}
    console = shout()
    record = run(load_config(options=options), console).record
    assert (record["source_prompt"], record["source_prompt_from"]) == ("", "none")
    assert "No source prompt" in said(console) and "--source-prompt" in said(console)


def test_interrupt_keeps_what_is_done(config, monkeypatch, few_frames, cloud):
    fake_edit(monkeypatch, lambda g: g, recolored, then=KeyboardInterrupt())
    console = shout()
    outcome = run(config, console)
    assert outcome.status == 130 and outcome.record["interrupted"] is True and outcome.record["exit_status"] == 130
    assert (outcome.record["steps"], outcome.record["steps_asked"]) == (2, 3)
    torch.testing.assert_close(files.load(outcome.edited).sh0, recolored(cloud).sh0)
    assert (outcome.folder / "report.html").exists() and "after 2 of 3 steps" in said(console)


def test_a_second_interrupt_gives_up_the_pictures_only(config, monkeypatch):
    def again(*_):
        raise KeyboardInterrupt

    fake_edit(monkeypatch, recolored)
    monkeypatch.setattr("splatedit.results.draw_pairs", again)
    outcome = run(config, shout())
    assert outcome.status == 130 and outcome.edited.exists() and outcome.record["change"] is not None
    assert json.loads((outcome.folder / "run.json").read_text())["interrupted"] is True


def test_interrupt_before_the_first_step_leaves_nothing(config, monkeypatch, tmp_path):
    fake_edit(monkeypatch, then=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(config, shout())
    assert not (tmp_path / "out").exists()


def test_nothing_changed_is_loud(config, monkeypatch, few_frames):
    fake_edit(monkeypatch, lambda g: g, lambda g: g)
    console = shout()
    outcome = run(config, console)
    assert outcome.status == 3 and outcome.record["change"]["verdict"] == "unchanged" and outcome.edited.exists()
    assert outcome.record["change"]["psnr_to_source"] is None, "infinity is not JSON"
    assert "Nothing is changing" in said(console), "told early"
    assert "NOTHING CHANGED" in said(console) and "try " in said(console)


def test_an_edit_gone_to_noise_is_loud_and_still_opens(config, monkeypatch, few_frames, cloud):
    def broken(gaussians):
        means = gaussians.means.clone()
        means[5] = math.nan
        return gaussians._replace(means=means)

    fake_edit(monkeypatch, broken)
    console = shout()
    outcome = run(config, console)
    assert outcome.status == 3 and outcome.record["change"]["verdict"] == "noise"
    assert outcome.record["mended_splats"] == 1
    torch.testing.assert_close(files.load(outcome.edited).means[5], cloud.means[5])
    assert "WENT TO NOISE" in said(console) and "the edit is lost" in said(console)


def test_an_edit_that_bursts_is_written_as_far_as_it_came(config, monkeypatch, few_frames, cloud):
    def burst(gaussians):
        return gaussians._replace(scales=torch.full_like(gaussians.scales, 100.0))

    fake_edit(monkeypatch, recolored, burst, then=Lost("edit: after 2 steps ... lower the rates (lr_*)."))
    console = shout()
    outcome = run(config, console)
    assert outcome.status == 3 and outcome.record["mended_splats"] == cloud.n
    assert "The edit is lost" in said(console) and "lr_*" in said(console)
    assert files.load(outcome.edited).drawable().all()


def test_prompts_cannot_be_markup(config, monkeypatch, few_frames):
    fake_edit(monkeypatch, recolored)
    console = shout()
    options = vars(config) | {"prompt": "a [bold]pig<script>", "source_prompt": "a [/] cat"}
    monkeypatch.setattr("splatedit.priors.Prior.check_words", lambda *_: None)
    outcome = run(load_config(options=options), console)
    assert "[bold]pig" in said(console) and "a [/] cat" in said(console)
    assert (outcome.folder / "report.html").read_text().count("<script>") == 1, "its own"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scene": "nothing.ply"}, "nothing.ply: no such file"),
        ({"scene": "."}, "is a folder, expected a splat file"),
        ({"prompt": "  "}, "prompt: it is empty"),
        ({"prompt": "a zebra"}, "zebra.*--model"),
        ({"source_prompt": "a zebra"}, "zebra"),
        ({"model": "nobody/nothing", "offline": True}, "nobody/nothing"),
        ({"guidance": "idz"}, "'ids'"),
        ({"device": "cuda"}, "cuda.*no CUDA GPU"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(config, change, message, tmp_path):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(InputError, match=message) as error:
        run(Config(**vars(config) | change), shout())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_told_before_anything_slow(config, monkeypatch):
    monkeypatch.setattr("splatedit.files.load", lambda *_: pytest.fail("the scene was read first"))
    with pytest.raises(InputError):
        run(Config(**vars(config) | {"model": "/nowhere/model"}), shout())


def test_output_folder_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output_dir: .*file cannot be written to"):
        run(Config(**vars(config) | {"output_dir": str(tmp_path / "file")}), shout())


def test_a_broken_scene_leaves_no_folder(config, scene_file, tmp_path):
    scene_file.write_bytes(scene_file.read_bytes()[:-10])
    with pytest.raises(InputError, match="ball.ply"):
        run(config, shout())
    assert not (tmp_path / "out").exists()


def test_folders_of_one_second_do_not_collide(config):
    with output_folder(config) as one, output_folder(config) as two, output_folder(config) as three:
        assert len({one, two, three}) == 3 and one.is_dir() and three.is_dir()


def test_folder_is_taken_away_when_the_body_fails_but_not_its_neighbours(config, tmp_path):
    with output_folder(config) as kept:
        pass
    with pytest.raises(RuntimeError), output_folder(config) as lost:
        (lost / "config.yaml").write_text("")
        raise RuntimeError
    assert kept.is_dir() and not lost.exists()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a pig", "a-pig"),
        ("A Pig, pink!", "a-pig-pink"),
        ("../../etc", "etc"),
        ("***", "edit"),
        ("ein süßes Tier", "ein-süßes-tier"),
    ],
)
def test_slugs(text, name):
    assert slug(text) == name and len(slug(text * 50)) <= 48


def test_mending_touches_only_what_is_lost(cloud):
    scales = cloud.scales.clone()
    scales[3, 1] = math.inf
    sh = cloud.sh0 + 1
    fixed, count = mend(cloud._replace(scales=scales, sh0=sh), cloud)
    assert count == 1
    torch.testing.assert_close(fixed.scales, cloud.scales)
    torch.testing.assert_close(fixed.sh0[3], cloud.sh0[3])
    torch.testing.assert_close(fixed.sh0[4:], sh[4:])


def test_json_has_no_nan_and_short_floats(tmp_path):
    write_json({"a": [1.23456789, 2], "b": {"c": True, "d": None}}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.23457, 2], "b": {"c": True, "d": None}}
    with pytest.raises(ValueError, match="JSON"):
        write_json({"a": math.nan}, tmp_path / "b.json")


def test_a_terminal_gets_a_bar(config, monkeypatch, few_frames):
    fake_edit(monkeypatch, recolored, recolored, recolored)
    console = Console(file=io.StringIO(), width=120, force_terminal=True, highlight=False)
    run(config, console)
    assert "3/3" in said(console) and "loss 0.5" in said(console) and "s/step" in said(console)


def test_a_source_cache_on_disk_lies_with_the_run_if_asked(config, few_frames):
    from dataclasses import replace

    outcome = run(replace(config, source_cache=1, cache_dir="run", solver="picard_null"), shout())
    counts = outcome.record["source_cache"]
    assert counts["filled"] == len(list((outcome.folder / "source_cache").iterdir())) == 3
    assert counts["hits"] == 3 * 2 - 3 and outcome.record["network_evaluations"]["backward"] == 0
    assert load_config(outcome.folder / "config.yaml").cache_dir == "run"


def test_curve_of_an_edit_without_drift():
    from splatedit.checkpoints import Log

    log = Log([1.0, math.nan], [math.inf, 20.0], [[], []], [[], []])
    assert curve(log) == {"loss": [1.0, None], "psnr": [None, 20.0]}
