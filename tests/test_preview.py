from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
from PIL import Image

from splatedit import preview as module
from splatedit.cameras import dome, orbit
from splatedit.cli import cli
from splatedit.config import GUIDANCES
from splatedit.errors import InputError
from splatedit.preview import advice, far_apart


@pytest.fixture
def words(scene_file, tiny_model, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    given = ["preview", scene_file, "a pig", "--source-prompt", "a cat", "--model", tiny_model, "-o", "out"]
    return [*given, "--guidance", "dds", "supersample=1"]


def test_one_labelled_sheet_is_written_and_its_path_is_the_last_line(call, words, tmp_path):
    status, out, err = call(*words, "--views", 3, "--steps", 2, "--cameras", "orbit:6")
    path = Path(out.rstrip("\n"))
    assert status in (0, 3) and out.count("\n") == 1
    assert path.parent == Path("out/ball") and path.name.startswith("a-pig@") and path.name.endswith(".preview.png")
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [tmp_path / path]
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    tile, label = 256, 2 * 18
    assert sheet.shape == (3 * (tile + label) + 2 * 4, 3 * tile + 2 * 4, 3)
    rows = [sheet[y : y + tile, :tile] for y in (label, tile + 2 * label + 4, 2 * tile + 3 * label + 8)]
    assert rows[0].std() > 10 and not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[1], rows[2])
    for row in range(3):
        top = row * (tile + label + 4)
        assert (sheet[top : top + label] < 128).any(), "words above each row"
    assert "of 3 views changed; the model prefers 'a pig' in " in err and "step 2/2" in err


def test_what_may_not_change_is_shown_as_it_is(call, words, monkeypatch):
    seen = {}

    def keep(work, views, after, *more):
        seen.update(views=views, after=after)
        return Path("a.png")

    monkeypatch.setattr(module, "write", keep)
    status, _, _ = call(*words, "--views", 2, "--steps", 3, "--mask-rule", "red > 0.5")
    inside, before, after = seen["views"].inside, seen["views"].pictures, seen["after"]
    assert status in (0, 3) and inside.shape == (2, 1, 32, 32)
    outside = (inside == 0).expand_as(before)
    assert 0.1 < outside.float().mean() < 0.95
    assert torch.equal(after[outside], before[outside]) and not torch.equal(after, before)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_sheet(call, words):
    def sheet(*more):
        path = Path(call(*words, "--views", 1, "--steps", 2, "--cameras", "orbit:2", *more)[1].rstrip("\n"))
        content = path.read_bytes()
        path.unlink()
        return content

    first = sheet()
    assert sheet() == first and sheet("--seed", 1) != first


def test_nothing_changed_is_said_with_what_to_try_and_status_3(call, words, monkeypatch):
    monkeypatch.setattr(module, "write", lambda *_: Path("a.png"))
    plain = module.image_run.measure
    still = {"verdict": "unchanged", "prefers_target": False}
    monkeypatch.setattr(module.image_run, "measure", lambda *a: [{**view, **still} for view in plain(*a)])
    status, out, err = call(*words[:2], "a cat", *words[3:], "--views", 1, "--steps", 1)
    assert (status, out) == (3, "a.png\n")
    assert "0 of 1 views changed" in err and "NOTHING CHANGED: try another prompt (it equals the source prompt)" in err


def test_ctrl_c_keeps_what_is_done(call, words, monkeypatch):
    plain = module.edit_images

    def stopped(*args, **more):
        for step in plain(*args, **more):
            yield step
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "edit_images", stopped)
    status, out, err = call(*words, "--views", 1, "--steps", 5)
    assert status == 130 and Path(out.rstrip("\n")).stat().st_size > 0 and "Interrupted after 1 of 5 steps" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--views", "5"], "--views"),
        (["--steps", "0"], "--steps"),
        (["stepz=1"], "'steps'"),
        (["--mask-box", "9,9,9,1,1,1"], "none of the 300 splats"),
    ],
)
def test_a_mistake_is_one_line_status_2_and_no_file(call, words, tmp_path, more, message):
    status, out, err = call(*words, *more)
    assert (status, out) == (2, "") and message in err and not (tmp_path / "out").exists()


def test_views_lie_far_apart(cloud):
    def angles(cameras, chosen):
        places = torch.linalg.inv(cameras.w2c)[chosen, :3, 3] - cloud.means.mean(0)
        directions = torch.nn.functional.normalize(places, dim=1)
        cosine = (directions @ directions.T).clamp(-1, 1)
        return torch.rad2deg(cosine.arccos())[~torch.eye(len(chosen), dtype=torch.bool)]

    rig = dome(cloud, 48, size=32)
    assert float(angles(rig, far_apart(rig, 4)).min()) > 80
    ring = orbit(cloud, 8, size=32)
    assert far_apart(ring, 2) == [0, 4] and far_apart(ring, 1) == [0] and len(far_apart(ring, 4)) == 4
    assert far_apart(ring.pick([0, 1]), 4) == [0, 1], "no more than there are"


def test_the_hint_fits_what_happened():
    work = SimpleNamespace(config=SimpleNamespace(prompt="a pig", scene="my cat.ply"), source_prompt="a cat")  # pyright: ignore
    assert advice(["changed"] * 4, 4, work) == "" and advice(["changed", "unchanged"], 2, work) == ""
    assert "splatedit diagnose 'my cat.ply' 'a pig'" in advice(["changed"] * 4, 2, work)
    assert "ONLY NOISE" in advice(["noise"] * 3 + ["unchanged"], 4, work)
    assert "NOTHING CHANGED: try more --steps" in advice(["unchanged"] * 4, 0, work)


def test_preview_takes_the_options_of_run():
    def names(command):
        return {o for p in cli.commands[command].params if isinstance(p, click.Option) for o in p.opts}

    missing = names("run") - names("preview")
    assert missing == {"--resume", "--dry-run", "--json", "--viewer", "--host", "--port"}, missing


@pytest.mark.slow
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_every_guidance_previews(call, words, guidance):
    status, out, err = call(*words, "--guidance", guidance, "--views", 2, "--steps", 2, "sdi_steps=2")
    assert status in (0, 3) and Path(out.rstrip("\n")).exists(), err


def test_too_many_views_in_python_are_an_input_error(scene_file, tiny_model):
    from splatedit.config import Config

    with pytest.raises(InputError, match="found 5 views and 3 steps"):
        module.preview(Config(scene=str(scene_file), prompt="a pig", model=str(tiny_model)), 5, 3)
