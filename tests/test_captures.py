"""The cameras of a scene: found, brought into its world, split as the trainers do, held against the splats."""

import json

import numpy as np
import pytest
import torch

from splatedit.camera_files import FLIP, CameraFile, View, save_cameras
from splatedit.cameras import bounds, dome, orbit
from splatedit.captures import apparent_size, describe, find_capture, in_view, load_capture, split, spread
from splatedit.errors import InputError
from splatedit.lenses import Lens
from splatedit.render import render

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
    for broken in ({"scale": 1}, {**world, "scale": 0}, {**world, "transform": np.zeros((3, 4)).tolist()}, []):
        (tmp_path / "run" / "dataparser_transforms.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=r"dataparser_transforms\.json: "):
            load_capture(tmp_path / "data", cloud, scene)
