"""`splatedit mask`, and runs with a mask: through the command line where a user meets them."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from splatedit import files, mask_files
from splatedit.cli import cli, main
from splatedit.config import load_config
from splatedit.errors import InputError
from splatedit.mask_run import HIGHLIGHT, highlight
from splatedit.mask_settings import build, of
from splatedit.masks import Box, Indices, Relevance, Sphere
from splatedit.run import run
from splatedit.work import Work

pytestmark = pytest.mark.usefixtures("one_thread")


def splatedit(monkeypatch, capsys, *words):
    """Exit status, lines of stdout, stderr of `splatedit WORDS`."""
    monkeypatch.setattr(sys, "argv", ["splatedit", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    return stop.value.code, said.out.splitlines(), said.err


def test_the_command_counts_and_writes_every_kind(scene_file, cloud, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("splatedit.mask_run.SIZE", 48)
    monkeypatch.setattr("splatedit.mask_run.FRAMES", 3)
    outputs = [tmp_path / name for name in ("m.json", "m.npy", "m.png", "m.gif", "m.ply")]
    options = [word for path in outputs for word in ("-o", path)]
    choice = ("--mask-box", "0.5,-1,0,3,2,3", "--mask-rule", "opacity > 0.5 and x < 0.5")
    status, paths, said = splatedit(monkeypatch, capsys, "mask", scene_file, *choice, *options)
    chosen = (cloud.means[:, 1] <= 0) & (cloud.means[:, 0] < 0.5)  # blue, and left of the middle
    count = int(chosen.sum())
    assert status == 0 and paths == [str(path) for path in outputs]
    assert f"{count} of 300 splats may change ({count / 300:.1%}), by mask:" in said
    assert "box around 0.5,-1,0 of 3,2,3: " in said and "x < 0.5: " in said
    assert mask_files.load(outputs[0])(cloud).equal(chosen)
    assert np.load(outputs[1]).tolist() == chosen.tolist()
    with Image.open(outputs[2]) as picture, Image.open(outputs[3]) as film:
        assert picture.size == (4 * 48 + 3 * 2, 2 * 48 + 2) and film.size == (48, 48)
        assert getattr(film, "n_frames", 1) == 3
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    signal = pixels[..., 0] - pixels[..., 1] > 60
    assert 0.02 < signal.mean() < 0.4
    selection = files.load(outputs[4])
    assert selection.means.equal(cloud.means[chosen])
    assert selection.extra["label"].tolist() == chosen.nonzero()[:, 0].tolist()
    for written in outputs[:2] + outputs[4:]:  # each of these is a mask again
        assert mask_files.load(written)(cloud).equal(chosen), written


def test_the_highlight_is_grey_outside_and_one_colour_inside(cloud):
    chosen = torch.arange(300) < 100
    shown = highlight(cloud, chosen)
    assert shown.shN.shape[1] == 0 and shown.means is cloud.means
    colors = 0.5 + 0.28209479177387814 * shown.sh0[:, 0]
    torch.testing.assert_close(colors[100:].amax(1), colors[100:].amin(1), rtol=0, atol=1e-5)
    ratio = colors[:100, 2] / colors[:100, 0]
    torch.testing.assert_close(ratio, torch.full((100,), HIGHLIGHT[2] / HIGHLIGHT[0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "mask: none is given; give --mask"),
        (("mask_invert=true",), "mask_invert: there is no mask to change"),
        (("mask_grow=0.1",), "mask_grow: there is no mask to change"),
        (("--mask-box", "1,2"), "mask_box: found 1,2, expected cx,cy,cz"),
        (("--mask-sphere", "9,9,9,1"), "it holds none of the 300 splats"),
        (("--mask-rule", "opacty > 1"), "'opacty' is not known"),
        (("--mask", "nothing.json"), "nothing.json: cannot be read"),
        (("--mask-sphere", "0,0,0,1", "-o", "m.docx"), "m.docx: cannot write '.docx'"),
        (("--mask-sphere", "0,0,0,1", "-o", "nowhere/m.json"), "nowhere does not exist"),
        (("--mask-sphere", "0,0,0,1", "-o", "ball.ply"), "is the scene itself"),
        (("--mask-sphere", "0,0,0,1", "mask_text_by=luck"), "mask_text_by: 'luck' is not known"),
        (("--mask-text", "auto"), "mask_text: auto compares two prompts"),
        (("--mask-text", "tail"), "'tail'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words, message, scene_file, tiny_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    options = ("--model", tiny_model, "--source-prompt", "a cat")
    status, lines, said = splatedit(monkeypatch, capsys, "mask", "ball.ply", *options, *words)
    assert status == 2 and not lines
    assert message in said.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def job_of(scene_file, *words, folder=None):
    config = load_config(options={"scene": str(scene_file)}, words=words)
    return Work(config, files.load(scene_file), None, "", "none", None, folder=folder)


def quiet():
    return Console(file=io.StringIO(), width=300)


def test_masks_hold_together_then_grow_then_turn_round(scene_file, cloud):
    words = ["mask_box=0.5,-1,0,3,2,3", "mask_sphere=0.5,0,0,1.01", "mask_rule=x < 0.5"]
    all_of_them = Box((0.5, -1, 0), (3, 2, 3))(cloud) & (cloud.means[:, 0] < 0.5)
    assert build(job_of(scene_file, *words), quiet())(cloud).equal(all_of_them)
    rows = Indices(all_of_them.nonzero()[:, 0].numpy())
    grown = build(job_of(scene_file, *words, "mask_grow=0.2"), quiet())(cloud)
    assert grown.equal(rows.grow(0.2)(cloud)) and grown.sum() > all_of_them.sum()
    shrunk = build(job_of(scene_file, *words, "mask_grow=-0.2"), quiet())(cloud)
    assert shrunk.equal(rows.shrink(0.2)(cloud)) and shrunk.sum() < all_of_them.sum()
    turned = build(job_of(scene_file, *words, "mask_grow=0.2", "mask_invert=true"), quiet())(cloud)
    assert turned.equal(~grown)
    assert build(job_of(scene_file), quiet()) is None and of(job_of(scene_file), quiet()) is None


def test_the_mask_is_kept_with_the_run_and_taken_from_there(scene_file, cloud, tmp_path):
    work = job_of(scene_file, "mask_rule=x < 0.5", folder=tmp_path)
    chosen = of(work, quiet())
    assert mask_files.load(tmp_path / "mask.json")(cloud).equal(chosen)
    mask_files.save(Indices([7]), tmp_path / "mask.json")  # as a run that is resumed finds it
    assert of(work, quiet()).nonzero()[:, 0].tolist() == [7]


def test_a_mask_of_everything_is_said(scene_file):
    console = quiet()
    assert of(job_of(scene_file, "mask_sphere=0.5,0,0,2"), console).all()
    assert "The mask holds every splat" in console.file.getvalue()


def test_relevance_from_the_command_line(scene_file, cloud, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("splatedit.relevance.VIEWS", 4)
    options = ("--model", tiny_model, "--source-prompt", "a cat", "--prompt", "a pig", "-o", tmp_path / "m.json")
    for way in ("scores", "attention"):
        words = ("--mask-text", "auto", f"mask_text_by={way}", "mask_threshold=0.9")
        status, _, said = splatedit(monkeypatch, capsys, "mask", scene_file, *options, *words)
        mask = mask_files.load(tmp_path / "m.json")
        assert status == 0 and isinstance(mask, Relevance) and "relevance of 'a cat' to 'a pig' > 0.9" in said
        assert mask.values.shape == (300,) and np.quantile(mask.values, 0.95) == pytest.approx(1, abs=1e-5)
    words = ("--mask-text", "cat", "mask_threshold=0.5")
    status, _, said = splatedit(monkeypatch, capsys, "mask", scene_file, *options, *words)
    assert status == 0 and "relevance of cat > 0.5" in said


def test_a_run_changes_what_the_mask_holds_and_no_bit_else(scene_file, cloud, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("splatedit.work.FRAMES", 2)
    monkeypatch.setattr("splatedit.work.VIEWS", 2)
    options = {"scene": str(scene_file), "prompt": "a pig", "model": str(tiny_model)}
    options["output_dir"] = str(tmp_path / "out")
    cap, given = Sphere((0.5, -1, 0), 0.7), tmp_path / "cap.json"
    mask_files.save(cap, given)
    words, console = ["source_prompt=a cat", "cameras=dome:3", "device=cpu", f"mask={given}"], quiet()
    outcome = run(load_config(options=options, words=[*words, "steps=3"]), console, ["splatedit"])
    inside = cap(cloud)

    def check():
        edited = files.load(outcome.edited)
        for name, value in edited.parameters.items():
            assert value[~inside].equal(cloud.parameters[name][~inside]), name
        assert (edited.sh0 != cloud.sh0)[inside].any()
        return edited

    first, count = check(), int(inside.sum())
    record = json.loads((outcome.folder / "run.json").read_text())
    assert record["splats_that_may_change"] == count and f"{count} of 300" in console.file.getvalue()
    assert mask_files.load(outcome.folder / "mask.json") == cap
    given.unlink()  # the run has it, and goes on without
    run(load_config(options=options, words=[*words, "steps=4"]), quiet(), ["splatedit"], resume=outcome.folder)
    assert not check().sh0.equal(first.sh0)


def test_a_run_with_an_impossible_mask_writes_nothing(scene_file, tiny_model, tmp_path):
    options = {"scene": str(scene_file), "prompt": "a pig", "model": str(tiny_model)}
    options["output_dir"] = str(tmp_path / "out")
    for word, message in (
        ("mask_sphere=9,9,9,1", "holds none"),
        ("mask_box=1", "mask_box"),
        ("mask=no.json", "no.json"),
    ):
        with pytest.raises(InputError, match=message):
            run(load_config(options=options, words=["source_prompt=a cat", word]), quiet())
        assert not (tmp_path / "out").exists()


def test_the_guide_is_right(scene_file, monkeypatch, tmp_path):
    """Its commands parse and its Python runs."""
    text = (Path(__file__).parent.parent / "docs" / "masks.md").read_text()
    (shell,), (code,) = (
        re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S) for language in ("bash", "python")
    )
    for line in shell.splitlines():
        _, name, *words = shlex.split(line)
        with cli.commands[name].make_context(name, words):
            pass
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("scenes/cat.ply", str(scene_file)), names)
    assert names["same"] is True and names["mask"](names["gaussians"]).any()
