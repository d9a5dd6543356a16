"""The cameras of a scene: found, brought into its world, split as the trainers do, held against the splats."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from splatedit.camera_files import FLIP, CameraFile, View, save_cameras
from splatedit.cameras import bounds, dome, orbit
from splatedit.captures import apparent_size, describe, find_capture, in_view, load_capture, split, spread
from splatedit.config import Config
from splatedit.errors import InputError
from splatedit.formats.checkpoints import _comments
from splatedit.lenses import Lens
from splatedit.media import save_png, to_bytes
from splatedit.render import render
from splatedit.work import find_views

SQUARE = Lens(64, 64, 80.0, 80.0, 32.0, 32.0)


def views(count: int) -> tuple[View, ...]:
    return tuple(View(f"{index:03d}.png", np.eye(4), SQUARE) for index in range(count))


def of(path, count: int, held: frozenset[str] = frozenset()) -> CameraFile:
    return CameraFile(path, "made for a test", views(count), held)


def test_every_eighth_view_is_held_out_as_everywhere(tmp_path):
    training, held = split(of(tmp_path, 20), views(20), 8)
    assert [v.name for v in held] == ["000.png", "008.png", "016.png"] and len(training) == 17
    for count, every in ((20, 0), (7, 8), (3, 1)):  # not asked for, too few to spare one, none would be left
        training, held = split(of(tmp_path, count), views(count), every)
        assert (len(training), len(held)) == (count, 0)


def test_the_file_s_own_split_goes_first(tmp_path):
    training, held = split(of(tmp_path, 20, frozenset({"003.png", "gone.png"})), views(20), 8)
    assert [v.name for v in held] == ["003.png"] and len(training) == 19


def test_views_are_spread_evenly():
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread(range(3), 4) == range(3)
    assert len(set(spread(range(1000), 48))) == 48


def test_what_is_in_view(cloud):
    """Around the ball all of it is seen; a camera that looks past it sees nothing; one inside sees what is ahead."""
    around = orbit(cloud, 4, up="-y")
    share, each = in_view(cloud, around)
    assert share == pytest.approx(1.0) and each == pytest.approx([1.0] * 4)
    away = around.w2c.clone()
    away[:, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0])) @ away[:, :3]
    assert in_view(cloud, around._replace(w2c=away))[0] == 0
    centre = around.w2c.clone()
    centre[:, :3, 3] = -centre[:, :3, :3] @ torch.tensor([0.5, 0.0, 0.0])
    inside = around._replace(w2c=centre)
    assert 0.02 < in_view(cloud, inside)[1][0] < 0.2
    assert apparent_size(bounds(cloud), inside) == np.inf and 0.5 < apparent_size(bounds(cloud), around) < 1.5


def test_a_file_beside_the_scene_is_taken_and_said(cloud, tmp_path):
    scene = tmp_path / "ball.ply"
    assert find_capture("auto", scene, cloud) == (None, "")
    save_cameras(dome(cloud, 20, size=(64, 48)), tmp_path / "cameras.json")
    capture, said = find_capture("auto", scene, cloud, most=10)
    assert capture is not None and (len(capture.edit), len(capture.report), capture.held_out) == (10, 3, 3)
    assert {v.name for v in capture.report}.isdisjoint(v.name for v in capture.edit)
    for words in (
        f"20 of {tmp_path / 'cameras.json'} (INRIA cameras.json, 64x48): 10 of 17 to edit from, 3 held out",
        "100% of the scene in view",
        "--cameras dome",
    ):
        assert words in said
    square, whole = capture.square(capture.edit, 32), capture.whole(capture.report, 30)
    assert (square.n, square.width, square.height) == (10, 32, 32)
    assert (whole.n, whole.width, whole.height) == (3, 40, 30)


def test_cameras_of_another_world_are_told_with_numbers(cloud, tmp_path):
    far = cloud._replace(means=cloud.means + 100)
    save_cameras(orbit(far, 10), tmp_path / "cameras.json")
    with pytest.raises(InputError) as error:
        load_capture(tmp_path, cloud)
    text = str(error.value)
    for words in ("the 8 cameras have 0.0% of the scene in view, 8 of them nothing", "around (0.49", "radius 1."):
        assert words in text
    for words in ("the cameras around (10", "dataparser_transforms.json", "--cameras dome"):
        assert words in text
    capture, said = find_capture("auto", tmp_path / "ball.ply", cloud)
    assert capture is None and said.startswith("cameras: those found beside the scene are not used, but dome:")
    with pytest.raises(InputError):
        find_capture(str(tmp_path), tmp_path / "ball.ply", cloud)


def test_cameras_of_another_scale_are_told(cloud, tmp_path):
    large = cloud._replace(means=cloud.means * 200, scales=cloud.scales + np.log(200))
    save_cameras(orbit(large, 10), tmp_path / "cameras.json")
    with pytest.raises(InputError, match=r"the whole scene is 0\.5\d% of a picture wide"):
        load_capture(tmp_path, cloud)


def test_a_nerfstudio_scene_is_seen_from_where_it_was_trained(cloud, tmp_path):
    """The training world is the files' turned, moved and scaled; with the dataparser's file the pictures are equal."""
    angle, scale, shift = 0.7, 0.25, np.array([3.0, -2.0, 8.0])
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    there = dome(cloud, 9, size=48)  # in the world of the splats
    before = []  # the same views in the world of the files: scale (R p + t) is a splat's place
    for w2c in there.w2c.double().numpy():
        c2w = np.linalg.inv(w2c)
        c2w[:3, 3] = turn.T @ (c2w[:3, 3] / scale - shift)
        c2w[:3, :3] = turn.T @ c2w[:3, :3]
        before.append({"file_path": f"{len(before)}.png", "transform_matrix": (c2w @ FLIP).tolist()})
    lens = {"fl_x": float(there.K[0, 0, 0]), "w": 48, "h": 48}
    (tmp_path / "data").mkdir()
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "data" / "transforms.json").write_text(json.dumps({**lens, "frames": before}))
    scene = tmp_path / "run" / "export" / "splat.ply"
    with pytest.raises(InputError, match="not of one world"):
        load_capture(tmp_path / "data", cloud, scene)
    world = {"transform": np.column_stack([turn, shift]).tolist(), "scale": scale}
    (tmp_path / "run" / "dataparser_transforms.json").write_text(json.dumps(world))
    capture = load_capture(tmp_path / "data", cloud, scene, every=0)
    assert "moved into the training world by dataparser_transforms.json" in describe(capture)
    again = capture.square(capture.views, 48)
    torch.testing.assert_close(render(cloud, again).rgb, render(cloud, there).rgb, atol=5e-5, rtol=0)
    converted = cloud._replace(comments=_comments(tmp_path / "run" / "nerfstudio_models" / "step-000000009.ckpt"))
    told = load_capture(tmp_path / "data", converted, every=0)  # the header of a converted checkpoint says the same
    assert "by what the scene's header says" in describe(told)
    for one, other in zip(told.views, capture.views, strict=True):
        np.testing.assert_allclose(one.w2c, other.w2c, atol=1e-7)
    for broken in ({"scale": 1}, {**world, "scale": 0}, {**world, "transform": np.zeros((3, 4)).tolist()}, []):
        (tmp_path / "run" / "dataparser_transforms.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=r"dataparser_transforms\.json: "):
            load_capture(tmp_path / "data", cloud, scene)


# ------------------------------------------------------------------------------------------------- what a user does


def test_a_run_looks_from_the_cameras_beside_its_scene(call, cloud, scene_file, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("splatedit.work.FRAMES", 6)
    save_cameras(dome(cloud, 20, size=(64, 48)), tmp_path / "cameras.json")
    words = [scene_file, "a pig", "--model", tiny_model, "-o", tmp_path / "out", "--src-prompt", "a cat"]
    status, out, err = call("run", *words, "--steps", "2", "cameras_most=5", "--device", "cpu")
    assert status in (0, 3), err
    assert "cameras.json (INRIA cameras.json, 64x48): 5 of 17 to edit from, 3 held out" in err
    folder = Path(out.strip()).parent
    record = json.loads((folder / "run.json").read_text())["cameras"]
    assert record["from"] == str(tmp_path / "cameras.json") and record["scene_in_view"] == 1
    assert (record["edit"], record["held_out"], record["missing_pictures"]) == (5, 3, 0)
    pictures = sorted(p.name for p in (folder / "renders").glob("*_after.png"))
    assert pictures == ["00_after.png", "01_after.png", "02_after.png"], "one for each view held out"
    with Image.open(folder / "renders" / "00_before.png") as image:
        assert image.size == (round(64 * 64 / 48), 64), "the shape of the views, the shorter edge twice the model's"
    assert "of 3 views" in err


def test_a_rig_that_is_asked_for_looks_beside_nothing(cloud, scene_file, tmp_path):
    save_cameras(dome(cloud, 20), tmp_path / "cameras.json")
    quiet = Console(file=io.StringIO())
    assert find_views(Config(scene=str(scene_file), cameras="orbit:2"), cloud, quiet) is None
    assert quiet.file.getvalue() == "" and find_views(Config(scene=str(scene_file)), cloud, quiet) is not None


def test_cameras_of_another_scene_end_a_run_at_once(call, cloud, scene_file, tiny_model, tmp_path):
    save_cameras(orbit(cloud._replace(means=cloud.means + 100), 4), tmp_path / "far.json")
    words = [scene_file, "a pig", "--model", tiny_model, "-o", tmp_path / "out", "--cameras", tmp_path / "far.json"]
    status, out, err = call("run", *words)
    assert status == 2 and out == "" and not (tmp_path / "out").exists()
    assert "far.json: the 4 cameras have 0.0% of the scene in view, 4 of them nothing" in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1


def test_render_draws_from_a_file_of_cameras(call, cloud, scene_file, tmp_path):
    cameras = dome(cloud, 9, size=(64, 48))
    save_cameras(cameras, tmp_path / "transforms.json")
    words = ["render", scene_file, "--cameras", tmp_path / "transforms.json"]
    status, out, err = call(*words, "-o", tmp_path / "all", "--size", "48")
    assert (status, out) == (0, f"{tmp_path / 'all'}\n"), err
    assert len(list((tmp_path / "all").iterdir())) == 9, "those held out for reports too"
    expected = to_bytes(render(cloud, cameras).rgb)
    for index in (0, 8):
        drawn = np.asarray(Image.open(tmp_path / "all" / f"{index:03d}.png")).astype(int)
        assert np.abs(drawn - expected[index]).max() <= 1
    assert call(*words, "-o", tmp_path / "few", "--frames", "3", "--size", "24x24")[0] == 0
    assert len(list((tmp_path / "few").iterdir())) == 3
    with Image.open(tmp_path / "few" / "000.png") as image:
        assert image.size == (24, 24)
    status, _, err = call(*words, "-o", tmp_path / "none", "--fov", "30")
    assert status == 2 and "--fov: has no meaning with --cameras" in err and not (tmp_path / "none").exists()


def test_info_names_the_cameras_beside_a_scene(call, cloud, scene_file, tmp_path):
    assert "\ncameras " not in call("info", scene_file)[1]
    save_cameras(dome(cloud, 9), tmp_path / "cameras.json")
    status, out, _ = call("info", scene_file)
    assert status == 0 and "9 of " in out and "7 to edit from, 2 held out" in out


# ---------------------------------------------------------------------------------------------------- photographs


def photographed(cloud, folder, world: np.ndarray) -> None:
    """transforms.json and pictures of the cloud, whose world was turned by `world` before they were written."""
    cameras, frames = dome(cloud, 9, size=48), []
    pictures = to_bytes(render(cloud, cameras).rgb)
    for index, w2c in enumerate(cameras.w2c.double().numpy()):
        matrix = world @ np.linalg.inv(w2c) @ FLIP
        frames.append({"file_path": f"{index}.png", "transform_matrix": matrix.tolist()})
        save_png(pictures[index], folder / f"{index}.png")
    content = {"fl_x": float(cameras.K[0, 0, 0]), "w": 48, "h": 48, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps({**content, "applied_transform": world[:3].tolist()}))


def test_photographs_tell_the_world(cloud, tmp_path):
    """Left as it is if that fits, undone if only that fits: the ball is red below and blue above, so a turn shows."""
    cloud = cloud._replace(means=cloud.means - torch.tensor([0.5, 0, 0]))
    (tmp_path / "same").mkdir(), (tmp_path / "turned").mkdir()
    turn = np.diag([1.0, -1.0, -1.0, 1.0])
    photographed(cloud, tmp_path / "same", np.eye(4))
    photographed(cloud, tmp_path / "turned", turn)
    same, turned = load_capture(tmp_path / "same", cloud), load_capture(tmp_path / "turned", cloud)
    assert same.world == "" and same.alike is not None and same.alike > 0.99
    assert "applied_transform undone" in turned.world and turned.alike == pytest.approx(same.alike, abs=1e-3)
    for one, other in zip(same.views, turned.views, strict=True):
        np.testing.assert_allclose(one.w2c, other.w2c, atol=1e-9)
    upside_down = cloud._replace(means=cloud.means * torch.tensor([1.0, -1.0, 1.0]))
    wrong = load_capture(tmp_path / "same", upside_down)
    assert wrong.alike is not None and wrong.alike < 0
    assert "not like the photographs (correlation -0." in describe(wrong)
    capture, said = find_capture("auto", tmp_path / "same" / "ball.ply", upside_down)
    assert capture is None and "not used, but dome" in said and "not like the photographs" in said
    (tmp_path / "same" / "0.png").write_text("not a picture")
    assert load_capture(tmp_path / "same", cloud).alike == pytest.approx(same.alike, abs=0.01)
