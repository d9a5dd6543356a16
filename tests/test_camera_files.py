"""Cameras of other programs: what is written is read back, known files give known cameras, broken ones one line."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from splatedit.camera_files import (
    FLIP,
    CameraFile,
    View,
    beside,
    fit,
    inside,
    moved,
    read_cameras,
    read_dataparser,
    save_cameras,
    size_of,
)
from splatedit.cameras import Cameras, dome, orbit
from splatedit.errors import InputError
from splatedit.lenses import BROWN, FISHEYE, MODELS, Lens, distort, make_lens, pinhole, undistort
from splatedit.render import render

BEAR = Path(__file__).parents[2] / "shared" / "data" / "captures" / "bear"
POINTS = np.random.default_rng(0).normal(size=(50, 3)) * 0.3


# ------------------------------------------------------------------------------------------------------ what we write


def rotation(rng) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def quaternion(R: np.ndarray) -> np.ndarray:
    """wxyz, from the eigenvector of K (Bar-Itzhack 2000): another formula than the reader's."""
    trace = np.trace(R)
    K = np.zeros((4, 4))
    K[0, 0] = trace
    K[0, 1:] = K[1:, 0] = R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]
    K[1:, 1:] = R + R.T - trace * np.eye(3)
    return np.linalg.eigh(K)[1][:, -1]


def some_views(seed: int, count: int = 3, models: tuple[str, ...] = ("PINHOLE",)) -> list[tuple]:
    """(name, w2c, model, width, height, parameters by name) of cameras about the origin, by the alphabet."""
    rng, out = np.random.default_rng(seed), []
    for index in range(count):
        w2c = np.eye(4)
        w2c[:3, :3], w2c[:3, 3] = rotation(rng), [*rng.normal(size=2), 4 + rng.random()]
        model = models[index % len(models)]
        names = dict(MODELS.values())[model]
        values = {name: rng.normal() * 0.01 for name in names}
        width, height = (int(value) for value in rng.integers(40, 200, 2))
        values |= {name: 200 * (1 + rng.random()) for name in names if name[0] == "f"}
        values |= {"cx": width / 2 + rng.normal(), "cy": height / 2 + rng.normal()}
        out.append((f"shot {index:02d}.png", w2c, model, width, height, values))
    return out


def lens_of(model, width, height, values) -> Lens:
    return make_lens("test", model, width, height, values)


def write_colmap_text(folder: Path, views: list[tuple]) -> None:
    cameras, images = ["# Camera list"], ["# Image list with two lines of data per image:"]
    for index, (name, w2c, model, width, height, values) in enumerate(views, 1):
        numbers = [values[key] for key in dict(MODELS.values())[model]]
        cameras.append(f"{index} {model} {width} {height} {' '.join(map(repr, map(float, numbers)))}")
        pose = [*quaternion(w2c[:3, :3]), *w2c[:3, 3]]
        images += [f"{index} {' '.join(map(repr, map(float, pose)))} {index} {name}", "1.5 2.5 -1 3 4 7" * (index % 2)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text("\n".join(cameras) + "\n")
    (folder / "images.txt").write_text("\n".join(images) + "\n")


def write_colmap_binary(folder: Path, views: list[tuple]) -> None:
    numbers = {name: number for number, (name, _) in MODELS.items()}
    cameras, images = struct.pack("<Q", len(views)), struct.pack("<Q", len(views))
    for index, (name, w2c, model, width, height, values) in enumerate(views, 1):
        parameters = [values[key] for key in dict(MODELS.values())[model]]
        cameras += struct.pack(f"<iiQQ{len(parameters)}d", index, numbers[model], width, height, *parameters)
        pose = [*quaternion(w2c[:3, :3]), *w2c[:3, 3]]
        images += struct.pack("<i7di", index, *pose, index) + name.encode() + b"\0"
        images += struct.pack("<Q", index % 3) + (index % 3) * struct.pack("<ddq", 1.0, 2.0, -1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.bin").write_bytes(cameras)
    (folder / "images.bin").write_bytes(images)


def nerfstudio(views: list[tuple], **more) -> dict:
    """transforms.json with the lens of each frame in the frame."""
    frames = []
    for name, w2c, model, width, height, values in views:
        lens = {"fl_x": values.get("fx", values.get("f")), "fl_y": values.get("fy", values.get("f"))}
        lens |= {key: value for key, value in values.items() if key[0] not in "f"}
        matrix = np.linalg.inv(w2c) @ FLIP
        frames.append({"file_path": name, "w": width, "h": height, **lens, "transform_matrix": matrix.tolist()})
        frames[-1]["camera_model"] = model
    return {"frames": frames[::-1], **more}


def as_cameras(views: list[tuple]) -> Cameras:
    K = [[[v["fx"], 0, v["cx"]], [0, v["fy"], v["cy"]], [0, 0, 1]] for *_, v in views]
    w2c = torch.tensor(np.stack([view[1] for view in views]))
    return Cameras(w2c.float(), torch.tensor(K).float(), views[0][3], views[0][4])


def assert_same(file: CameraFile, views: list[tuple], exact: float = 1e-12) -> None:
    assert [view.name for view in file.views] == [view[0] for view in views]
    for found, (_, w2c, model, width, height, values) in zip(file.views, views, strict=True):
        np.testing.assert_allclose(found.w2c, w2c, atol=exact * 10)
        lens = lens_of(model, width, height, values)
        assert found.lens[:2] == lens[:2] and found.lens.kind == lens.kind
        np.testing.assert_allclose([*found.lens[2:6], *found.lens.k], [*lens[2:6], *lens.k], rtol=exact)


# ---------------------------------------------------------------------------------------------- written and read again

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=6, deadline=None)
COLMAP = tuple(name for name, _ in list(MODELS.values())[:10])


@few
@given(seeds)
def test_colmap_text_and_binary(tmp_path_factory, seed):
    folder, views = tmp_path_factory.mktemp("colmap"), some_views(seed, 10, COLMAP)
    write_colmap_text(folder / "text", views)
    write_colmap_binary(folder / "sparse/0", views)
    text, binary = read_cameras(folder / "text"), read_cameras(folder)
    assert (text.kind, binary.kind) == ("COLMAP text", "COLMAP binary")
    assert_same(text, views)
    assert_same(binary, views)
    assert_same(read_cameras(folder / "text" / "images.txt"), views)


@few
@given(seeds)
def test_nerfstudio(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("ns") / "any name.json"
    views = some_views(seed, 4, ("OPENCV", "OPENCV_FISHEYE"))
    path.write_text(json.dumps(nerfstudio(views)))
    assert_same(read_cameras(path), views)


@few
@given(seeds)
def test_what_save_cameras_writes_is_read_back(tmp_path_factory, seed):
    folder, views = tmp_path_factory.mktemp("own"), some_views(seed)
    cameras = as_cameras(views)
    save_cameras(cameras, folder / "transforms.json", [view[0] for view in views])
    again = fit(read_cameras(folder).views, cameras.width, cameras.height)
    torch.testing.assert_close(again.w2c, cameras.w2c, atol=2e-6, rtol=0)
    assert torch.equal(again.K, cameras.K) and again[2:] == cameras[2:]
    with pytest.raises(InputError, match="principal point"):
        save_cameras(cameras, folder / "cameras.json")
    centred = cameras._replace(K=cameras.K.clone())
    centred.K[:, :2, 2] = torch.tensor([cameras.width / 2, cameras.height / 2])
    save_cameras(centred, folder / "cameras.json")
    inria = read_cameras(folder)
    assert inria.kind == "INRIA cameras.json" and [v.name for v in inria.views][:2] == ["00000.png", "00001.png"]
    again = fit(inria.views, cameras.width, cameras.height)
    torch.testing.assert_close(again.w2c, cameras.w2c, atol=2e-6, rtol=0)
    assert torch.equal(again.K, centred.K)


@pytest.mark.parametrize("name", ["transforms.json", "cameras.json"])
def test_pictures_through_written_cameras_are_the_same(cloud, tmp_path, name):
    cameras = dome(cloud, 5, size=(64, 48))
    save_cameras(cameras, tmp_path / name)
    again = fit(read_cameras(tmp_path / name).views, 64, 48)
    torch.testing.assert_close(render(cloud, again).rgb, render(cloud, cameras).rgb, atol=2e-5, rtol=0)


def test_colmap_as_pycolmap_reads_and_writes_it(tmp_path):
    """Needs pycolmap, 130 MB, which is why the package reads these files itself."""
    pycolmap = pytest.importorskip("pycolmap")
    views = some_views(7, 10, COLMAP)
    write_colmap_binary(tmp_path / "ours", views)
    (tmp_path / "ours" / "points3D.bin").write_bytes(struct.pack("<Q", 0))
    theirs = pycolmap.Reconstruction(str(tmp_path / "ours"))
    for view in read_cameras(tmp_path / "ours").views:
        image = next(i for i in theirs.images.values() if i.name == view.name)
        np.testing.assert_allclose(image.cam_from_world().matrix(), view.w2c[:3], atol=1e-12)
        for point in POINTS @ view.w2c[:3, :3].T + view.w2c[:3, 3]:
            ours = distort(view.lens, point[None, :2] / point[2])[0]
            ours = ours * [view.lens.fx, view.lens.fy] + [view.lens.cx, view.lens.cy]
            np.testing.assert_allclose(theirs.cameras[image.camera_id].img_from_cam(point), ours, atol=1e-6)
    for form, write in (("text", theirs.write_text), ("binary", theirs.write_binary)):
        (tmp_path / form).mkdir()
        write(str(tmp_path / form))
        assert_same(read_cameras(tmp_path / form), views, 1e-9)


# -------------------------------------------------------------------------------------------------- known by hand


def seen(view: View, point) -> list[float]:
    """The pixel of a point, by a pinhole."""
    x, y, z = view.w2c[:3, :3] @ np.array(point) + view.w2c[:3, 3]
    lens = view.lens
    return [lens.fx * x / z + lens.cx, lens.fy * y / z + lens.cy, z]


def test_inria_by_hand(tmp_path):
    """Camera at (5, 0, 0) that looks along -x with z down: its axes x, y, z are world y, z, -x: the columns."""
    entry = {"id": 3, "img_name": "a", "width": 100, "height": 80, "fx": 50, "fy": 40, "position": [5, 0, 0]}
    (tmp_path / "c.json").write_text(json.dumps([{**entry, "rotation": [[0, 0, -1], [-1, 0, 0], [0, 1, 0]]}]))
    (view,) = read_cameras(tmp_path / "c.json").views
    assert seen(view, [0, 0, 0]) == [50, 40, 5]
    assert seen(view, [0, -1, 0]) == [60, 40, 5], "-y is to the right"
    assert seen(view, [0, 0, 1]) == [50, 48, 5], "+z is down"


def test_nerfstudio_by_hand(tmp_path):
    """An OpenGL camera at (0, 0, 4) without rotation looks along -z, y up; Blender's file says the angle alone."""
    matrix = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]
    frame = {"file_path": "./train/r_0", "transform_matrix": matrix}
    (tmp_path / "train").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "train" / "r_0.png")
    content = {"camera_angle_x": math.pi / 2, "frames": [frame]}
    (tmp_path / "transforms_train.json").write_text(json.dumps(content))
    (view,) = read_cameras(tmp_path).views
    assert (view.lens.width, view.lens.height, view.picture) == (200, 100, tmp_path / "./train/r_0.png")
    assert seen(view, [0, 0, 0]) == pytest.approx([100, 50, 4])
    assert seen(view, [1, 1, 0]) == pytest.approx([125, 25, 4]), "right and up"


def test_keys_of_a_frame_win(tmp_path):
    matrix = np.eye(4)[:3].tolist()  # three rows do
    shared = {"fl_x": 100, "w": 64, "h": 48, "k1": 0.1, "camera_model": "OPENCV"}
    frames = [{"file_path": "a", "transform_matrix": matrix}, {"file_path": "b", "transform_matrix": matrix}]
    frames[1] |= {"fl_x": 50, "fl_y": 60, "cx": 30, "w": 32.0, "k1": 0}
    (tmp_path / "transforms.json").write_text(json.dumps({**shared, "frames": frames}))
    a, b = (view.lens for view in read_cameras(tmp_path).views)
    assert a[:6] == (64, 48, 100, 100, 32, 24) and a.kind == "brown" and a.k[0] == 0.1
    assert b == (32, 48, 50, 60, 30, 24, "pinhole", ())


def test_colmap_by_hand(tmp_path):
    """A quarter turn about y: w2c takes world x to camera -z. A name may hold spaces, a line of points be empty."""
    half = math.sqrt(0.5)
    (tmp_path / "cameras.txt").write_text("# c\n\n7 SIMPLE_PINHOLE 100 80 50 50 40\n")
    (tmp_path / "images.txt").write_text(f"# i\n1 {half} 0 {half} 0 0 0 5 7 my shot.jpg\n\n")
    (view,) = read_cameras(tmp_path).views
    assert view.name == "my shot.jpg"
    assert seen(view, [0, 0, 0]) == pytest.approx([50, 40, 5])
    assert seen(view, [-1, 0, 0]) == pytest.approx([50, 40, 6])
    assert seen(view, [0, 0, 1]) == pytest.approx([60, 40, 5])


def test_a_camera_path_of_the_viewer(tmp_path):
    """fov is vertical: 90 degrees of 80 pixels is a focal length of 40."""
    matrix = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 4, 0, 0, 0, 1]
    entries = [{"camera_to_world": matrix, "fov": 90, "aspect": 1.5}] * 12
    content = {"camera_type": "perspective", "render_height": 80, "render_width": 120, "camera_path": entries}
    (tmp_path / "path.json").write_text(json.dumps(content))
    file = read_cameras(tmp_path / "path.json")
    assert len(file.views) == 12 and file.trained
    assert seen(file.views[11], [1, 1, 0]) == pytest.approx([70, 30, 4])


# ------------------------------------------------------------------------------------------------------------- lenses


@few
@given(seeds, st.sampled_from(["OPENCV", "FULL_OPENCV", "OPENCV_FISHEYE", "FOV", "SIMPLE_RADIAL"]))
def test_undistorting_undoes_distorting(seed, model):
    *_, width, height, values = some_views(seed, 1, (model,))[0]
    values = values | ({"omega": 0.5 + abs(values.get("omega", 0))} if model == "FOV" else {})
    lens = lens_of(model, width, height, values)
    points = np.random.default_rng(seed).uniform(-0.8, 0.8, (40, 2))
    np.testing.assert_allclose(undistort(lens, distort(lens, points)), points, atol=1e-6)


@pytest.mark.parametrize(
    ("lens", "theirs"),
    [  # width, height of COLMAP 4.2.1's undistort_camera with blank_pixels = 0
        (Lens(1000, 800, 900, 900, 500, 400, "brown", (0.3, 0.1, 0, 0, 0, 0, 0, 0)), (881, 704)),
        (Lens(1000, 800, 900, 900, 500, 400, "brown", (-0.3, 0.1, 0, 0.001, 0, 0, 0, 0)), (1107, 851)),
        (Lens(1000, 800, 900, 900, 500, 400, "fov", (0.9,)), (1016, 786)),
        (Lens(1000, 1000, 500, 500, 500, 500, "fisheye", (0, 0, 0, 0)), (1553, 1553)),
    ],
)
def test_the_pinhole_of_a_lens_is_colmaps(lens, theirs):
    straight = pinhole(lens)
    assert straight.kind == "pinhole" and straight[2:4] == lens[2:4]
    np.testing.assert_allclose(straight[:2], theirs, atol=4)  # COLMAP looks at pixel centres, not edges
    x, y = np.meshgrid(np.linspace(0, straight.width, 21), np.linspace(0, straight.height, 21))
    tangents = np.stack([(x - straight.cx) / straight.fx, (y - straight.cy) / straight.fy], -1).reshape(-1, 2)
    pixels = distort(lens, tangents) * [lens.fx, lens.fy] + [lens.cx, lens.cy]
    assert (pixels > -1e-2).all() and (pixels < np.array(lens[:2]) + 1e-2).all(), "nothing the lens did not see"


def test_wide_fisheyes_are_cut_and_folded_lenses_refused():
    """180 degrees across have no pinhole: 60 from the axis is the end."""
    wide = pinhole(Lens(1000, 1000, 318, 318, 500, 500, "fisheye", (0, 0, 0, 0)))
    assert wide.width == int(2 * 318 * math.tan(math.radians(60)))
    folded = Lens(1000, 800, 900, 900, 500, 400, "brown", (-3, 0.1, 0, 0, 0, 0, 0, 0))
    with pytest.raises(InputError, match=r"^here: the distortion \(-3, 0.1, .*folds the picture.*image_undistorter"):
        pinhole(folded, "here")


def test_no_distortion_is_a_pinhole():
    values = {"fx": 100.0, "fy": 90.0, "cx": 32.0, "cy": 24.0}
    assert len({lens_of(model, 64, 48, values) for model in ("PINHOLE", "OPENCV", "FULL_OPENCV", "FOV")}) == 1
    assert lens_of("OPENCV_FISHEYE", 64, 48, values).kind == "fisheye", "an equidistant one is no pinhole"
    assert len(BROWN) == 8 and len(FISHEYE) == 4


# ------------------------------------------------------------------------------------------------------ sizes, worlds


def test_fit_cuts_the_middle(cloud):
    """The square picture of a wide camera is the middle of its wide picture, whatever its principal point."""
    wide = orbit(cloud, 3, size=(96, 48))
    wide.K[:, 0, 2] += 5
    views = [View(str(i), w2c.double().numpy(), lens_from(wide, i)) for i, w2c in enumerate(wide.w2c)]
    whole, middle = render(cloud, wide).rgb, render(cloud, fit(views, 48, 48)).rgb
    torch.testing.assert_close(middle, whole[..., 24:72], atol=2e-5, rtol=0)
    large = fit(views, 96, 96)
    torch.testing.assert_close(large.K[0], torch.tensor([[2.0], [2.0], [1.0]]) * fit(views, 48, 48).K[0])


def lens_from(cameras: Cameras, index: int) -> Lens:
    K = cameras.K[index].tolist()
    return Lens(cameras.width, cameras.height, K[0][0], K[1][1], K[0][2], K[1][2])


def test_mixed_sizes_become_one():
    square, wide = Lens(100, 100, 80, 80, 50, 50), Lens(200, 100, 80, 80, 100, 50)
    views = [View("a", np.eye(4), square), View("b", np.eye(4), wide), View("c", np.eye(4), wide)]
    assert size_of(views) == (200, 100)
    assert fit(views, 50, 50).K[:, 0, 2].tolist() == [25, 25, 25]
    assert fit(views, 200, 100).K[:, 0, 0].tolist() == [160, 80, 80], "the square one is cut above and below"


@few
@given(seeds)
def test_nerfstudios_training_world(tmp_path_factory, seed):
    """Points and cameras moved as nerfstudio moves them give the same pixels, whatever had been applied before."""
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("world")
    applied, auto = np.eye(4), np.eye(4)
    applied[:3, :3], auto[:3, :3] = rotation(rng), rotation(rng)
    applied[:3, 3], auto[:3, 3], scale = rng.normal(size=3), rng.normal(size=3), 0.2 + rng.random()
    views = some_views(seed)
    stored = [(name, w2c @ np.linalg.inv(applied), *rest) for name, w2c, *rest in views]
    path = folder / "transforms.json"
    path.write_text(json.dumps(nerfstudio(stored, applied_transform=applied[:3].tolist())))
    world = {"transform": (auto @ applied)[:3].tolist(), "scale": scale}
    (folder / "dataparser_transforms.json").write_text(json.dumps(world))
    file = read_cameras(path)
    trained = moved(file.views, *read_dataparser(folder / "dataparser_transforms.json", file))
    whole = auto @ applied
    there = scale * (POINTS @ whole[:3, :3].T + whole[:3, 3])
    for before, (_, w2c, *_) in zip(trained, views, strict=True):
        x = POINTS @ w2c[:3, :3].T + w2c[:3, 3]
        y = there @ before.w2c[:3, :3].T + before.w2c[:3, 3]
        np.testing.assert_allclose(y, scale * x, atol=1e-9)


# --------------------------------------------------------------------------------------------------- found, left out


def test_what_a_folder_holds(tmp_path, cloud):
    cameras, views = orbit(cloud, 2), some_views(1)
    assert inside(tmp_path) is None
    with pytest.raises(InputError, match=r"no cameras in this folder.*sparse/0"):
        read_cameras(tmp_path)
    write_colmap_text(tmp_path / "sparse/0", views)
    assert read_cameras(tmp_path).kind == "COLMAP text"
    write_colmap_binary(tmp_path / "sparse/0", views)
    assert read_cameras(tmp_path).kind == "COLMAP binary", "as COLMAP itself prefers"
    save_cameras(cameras, tmp_path / "transforms.json")
    assert read_cameras(tmp_path).kind == "nerfstudio transforms.json"
    save_cameras(cameras, tmp_path / "cameras.json")
    assert read_cameras(tmp_path).kind == "INRIA cameras.json", "the one in the world of the splats"
    iteration = tmp_path / "point_cloud" / "iteration_30000"
    iteration.mkdir(parents=True)
    assert beside(iteration / "point_cloud.ply") == tmp_path / "cameras.json"
    assert beside(tmp_path / "scene.ply") == tmp_path / "cameras.json"
    assert beside(tmp_path / "sparse" / "scene.ply") == tmp_path / "sparse" / "0"
    assert beside(tmp_path / "point_cloud" / "scene.ply") is None


def test_colmap_finds_its_pictures(tmp_path):
    views = some_views(2, 2)
    write_colmap_text(tmp_path / "sparse/0", views)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / views[1][0])
    first, second = read_cameras(tmp_path).views
    assert first.picture is None and second.picture == tmp_path / "images" / views[1][0]


def test_frames_without_their_picture_are_left_out_and_counted(tmp_path):
    views = some_views(2, 4)
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps(nerfstudio(views)))
    assert (len(read_cameras(path).views), read_cameras(path).missing) == (4, 0), "cameras alone are enough"
    for name in (views[0][0], views[2][0]):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    file = read_cameras(path)
    assert [view.name for view in file.views] == [views[0][0], views[2][0]] and file.missing == 2


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotation": [[2, 0, 0], [0, 2, 0], [0, 0, 2]]}, ["camera 1 (b)", "rotation", "no rotation", "by 3"]),
        ({"rotation": [[1, 0, 0], [0, 1, 0], [0, 0, -1]]}, ["camera 1 (b)", "mirrored"]),
        ({"rotation": [[1, 0], [0, 1]]}, ["rotation", "2x2", "3x3"]),
        ({"rotation": [[1, 0, 0], [0, 1, 0], [0, 0]]}, ["rotation", "a list (3)", "3x3"]),
        ({"rotation": None}, ["camera 1 (b)", "rotation is missing"]),
        ({"position": [0, 0, float("nan")]}, ["position", "NaN"]),
        ({"position": [0, 0, 1e20]}, ["1e+20"]),
        ({"position": "here"}, ["position", "'here'"]),
        ({"fx": 0}, ["camera 1 (b)", "focal length 0"]),
        ({"fx": -5}, ["focal length -5"]),
        ({"fy": float("inf")}, ["fy", "inf", "finite"]),
        ({"fx": True}, ["fx", "True"]),
        ({"fx": 10**400}, ["fx", "finite"]),
        ({"width": 0}, ["0x48"]),
        ({"width": 1.5}, ["width", "1.5", "whole"]),
        ({"height": None}, ["height is missing"]),
        ({"img_name": {"a": 1}}, ["img_name", "keys and values"]),
    ],
)
def test_a_broken_camera_is_named(tmp_path, change, words):
    good = {"img_name": "a", "width": 64, "height": 48, "fx": 50, "fy": 50, "position": [0, 0, 0]}
    good["rotation"] = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    path = tmp_path / "cameras.json"
    path.write_text(json.dumps([good, {**good, "img_name": "b", **change}]))
    complains(path, ["cameras.json", *words])


@pytest.mark.parametrize(
    ("top", "frame", "words"),
    [
        ({"camera_model": "EQUIRECTANGULAR"}, {}, ["frame 0 (a.png)", "EQUIRECTANGULAR", "OPENCV"]),
        ({"camera_model": 3}, {}, ["camera_model", "3"]),
        ({"fl_x": None}, {}, ["frame 0", "fl_x", "camera_angle_x"]),
        ({"w": None}, {}, ["w is missing"]),
        ({"k4": 0.1}, {}, ["k4", "OPENCV_FISHEYE"]),
        ({"k1": "x"}, {}, ["k1", "'x'"]),
        ({"k1": -30}, {}, ["transforms.json: a.png", "(-30, 0, ", "folds the picture"]),
        ({"camera_angle_x": 4, "fl_x": None}, {}, ["camera_angle_x", "pi"]),
        ({"frames": []}, {}, ["frames", "at least one"]),
        ({"frames": {"a": 1}}, {}, ["frames", "list"]),
        ({"frames": [1]}, {}, ["frame 0", "found 1"]),
        ({"applied_transform": [[1]]}, {}, ["applied_transform", "1x1"]),
        ({"applied_scale": 0}, {}, ["applied_scale"]),
        ({}, {"transform_matrix": None}, ["frame 0 (a.png)", "transform_matrix is missing"]),
        ({}, {"transform_matrix": np.zeros((4, 4)).tolist()}, ["transform_matrix", "no rotation"]),
        ({}, {"transform_matrix": (np.eye(4) * 1e300).tolist()}, ["transform_matrix", "1e+300"]),
        ({}, {"file_path": ["a"]}, ["frame 0", "file_path"]),
    ],
)
def test_a_broken_frame_is_named(tmp_path, top, frame, words):
    frame = {"file_path": "a.png", "transform_matrix": np.eye(4).tolist(), **frame}
    content = {"fl_x": 50, "w": 64, "h": 48, "frames": [frame], **top}
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    complains(tmp_path, ["transforms.json", *words])


@pytest.mark.parametrize(
    ("cameras", "images", "words"),
    [
        ("1 PINHOLE 64 48 50 50 32", None, ["cameras.txt: line 1", "3 parameters", "4"]),
        ("1 PINHOLE 64 48 50 50 32 nan", None, ["line 1", "cy", "nan"]),
        ("1 PINHOLE x 48 50 50 32 24", None, ["line 1", "'x'", "whole"]),
        ("1 PINHOL 64 48 50 50 32 24", None, ["'PINHOL'"]),
        ("1 EUCM 64 48 50 50 32 24 0.5 1", None, ["EUCM", "image_undistorter"]),
        ("1 PINHOLE 64", None, ["3 words"]),
        (None, "1 1 0 0 0 0 0 5 2 a.png\n\n", ["images.txt: line 1", "camera 2"]),
        (None, "1 2 2 0 0 0 0 5 1 a.png\n\n", ["line 1 (a.png)", "length 2.83"]),
        (None, "1 1 0 0 0 0 0 inf 1 a.png\n\n", ["line 1", "'inf'"]),
        (None, "1 1 0 0 0 0 0 5 1\n\n", ["line 1", "IMAGE_ID"]),
        (None, "1 1 0 0 0 0 0 5 1 a.png\n1 1 0 0 0 0 0 5 1 b.png\n", ["line 2", "empty line"]),
        (None, "# nothing\n", ["images.txt", "no images"]),
    ],
)
def test_broken_colmap_text_is_named(tmp_path, cameras, images, words):
    (tmp_path / "cameras.txt").write_text(cameras or "1 PINHOLE 64 48 50 50 32 24")
    (tmp_path / "images.txt").write_text(images or "1 1 0 0 0 0 0 5 1 a.png\n\n")
    complains(tmp_path, words)


def test_broken_colmap_binary_is_named(tmp_path):
    """Cut anywhere, and with counts that lie: one line, at once."""
    write_colmap_binary(tmp_path, some_views(3))
    whole = {name: (tmp_path / name).read_bytes() for name in ("cameras.bin", "images.bin")}
    for name, data in whole.items():
        for length in range(0, len(data), 7):
            (tmp_path / name).write_bytes(data[:length])
            complains(tmp_path, [name])
        (tmp_path / name).write_bytes(struct.pack("<Q", 2**63) + data[8:])
        complains(tmp_path, [name, str(2**63)])
        (tmp_path / name).write_bytes(data)
    lies = bytearray(whole["images.bin"])
    at = lies.index(b"\0", 8 + 64) + 1
    lies[at : at + 8] = struct.pack("<Q", 2**40)
    (tmp_path / "images.bin").write_bytes(lies)
    complains(tmp_path, ["image 0 (shot 00.png)", str(2**40)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, ["nested"]),
        ('{"frames": ' + "[" * 200 + "]" * 200 + "}", ["frame 0"]),
        ("{", ["line 1"]),
        ("3", ["not a file of cameras", "frames"]),
        ('{"poses": []}', ["not a file of cameras"]),
        ("[]", ["at least one"]),
        ("\ufffd", ["JSON"]),
    ],
)
def test_json_that_is_none_of_these(tmp_path, text, words):
    (tmp_path / "c.json").write_text(text)
    complains(tmp_path / "c.json", ["c.json", *words])


def test_paths_that_are_no_cameras(tmp_path, scene_file):
    complains(tmp_path / "nothing.json", ["nothing.json", "no such file", "dome:48"])
    complains(scene_file, [".ply", ".json"])
    (tmp_path / "notes.txt").write_text("x")
    complains(tmp_path / "notes.txt", ["notes.txt", "cameras.txt"])
    with pytest.raises(InputError, match=r"names: found 1, expected one for each of 2"):
        save_cameras(as_cameras(some_views(1, 2)), tmp_path / "c.json", ["a"])
    with pytest.raises(InputError, match=r"\.json"):
        save_cameras(as_cameras(some_views(1, 2)), tmp_path / "c.txt")
    assert not (tmp_path / "c.json").exists()


def complains(path: Path, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        read_cameras(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for word in words:
        assert word in text, text


# ------------------------------------------------------------------------------------------------------- a real one


@pytest.mark.skipif(not BEAR.is_dir(), reason="a capture that is not part of the project")
def test_the_points_of_a_real_capture_lie_where_its_pictures_show_them():
    """The sparse points have the colours that the photographs have at their pixels, and less so a few pixels aside."""
    file = read_cameras(BEAR)
    assert len(file.views) == 96 and file.missing == 0 and file.views[0].name == "images/frame_00001.jpg"
    points = np.loadtxt(BEAR / "sparse_pc.ply", skiprows=10)
    shifts = [(0, 0), (4, 0), (-4, 0), (0, 4), (0, -4)]
    errors = np.zeros((4, len(shifts)))
    for row, view in enumerate(file.views[5::24]):
        local = points[:, :3] @ view.w2c[:3, :3].T + view.w2c[:3, 3]
        tangents = local[:, :2] / local[:, 2:]
        pixels = distort(view.lens, tangents) * [view.lens.fx, view.lens.fy] + [view.lens.cx, view.lens.cy]
        there = (local[:, 2] > 0.1) & (np.abs(tangents) < 1).all(1) & ((pixels >= 4) & (pixels < 508)).all(1)
        assert there.sum() > 10_000 and view.picture is not None
        photo = np.asarray(Image.open(view.picture).convert("RGB")).astype(int)
        for column, shift in enumerate(shifts):
            u, v = (pixels[there] + shift).astype(int).T
            errors[row, column] = np.median(np.abs(photo[v, u] - points[there, 3:6]))
    assert (errors.argmin(1) == 0).all(), errors
