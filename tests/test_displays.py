"""What notebooks show: bundles that hold pictures, lines instead of tensors, sliders, films of a size."""

import base64
import importlib
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import splatedit
from splatedit import displays
from splatedit.cameras import Cameras, dome, look, orbit
from splatedit.errors import InputError


def inside(html: str) -> list[Image.Image]:
    """The pictures in the HTML."""
    found = re.findall(r'<img src="data:image/\w+;base64,([^"]+)"', html)
    assert found and len(found) == html.count("<img"), "every picture is inside"
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def test_gaussians_show_themselves(cloud):
    shown = cloud._repr_mimebundle_()
    assert repr(cloud) == shown["text/plain"] == "Gaussians(300, SH degree 1, cpu)"
    (picture,) = inside(shown["text/html"])
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert picture.size == (displays.THUMBNAIL,) * 2
    red, blue = pixels[..., 0] - pixels[..., 2] > 60, pixels[..., 2] - pixels[..., 0] > 60
    rows = np.arange(len(pixels))[:, None].repeat(len(pixels), 1)
    assert red.mean() > 0.05 and blue.mean() > 0.05 and rows[red].mean() > rows[blue].mean() + 30, "red is below"
    for words in ("300", "SH degree", "-y", "label", "made for a test"):
        assert words in shown["text/html"]


def test_what_a_file_says_is_text_not_html(cloud):
    html = cloud._replace(comments=("<script>alert(1)</script>",))._repr_mimebundle_()["text/html"]
    assert "<script" not in html and "&lt;script&gt;" in html


def test_gaussians_that_cannot_be_drawn_still_show(cloud):
    nowhere = cloud._replace(means=torch.full_like(cloud.means, torch.nan))
    for count, none in (("0", cloud.select(slice(0, 0))), ("300", nowhere)):
        shown = none._repr_mimebundle_()
        assert shown["text/plain"].startswith(f"Gaussians({count},")
        assert "nothing in it can be drawn" in shown["text/html"] and "<img" not in shown["text/html"]
        for see in (splatedit.animate, lambda scene: splatedit.compare(scene, cloud)):
            with pytest.raises(InputError, match=f"found {count} splats, none of them with finite numbers"):
                see(none)


@pytest.mark.parametrize("name", ["means", "scales", "opacities"])
def test_a_few_gaussians_that_are_not_finite_move_nothing(cloud, name):
    values = getattr(cloud, name).clone()
    values[:40] = torch.nan
    some = cloud._replace(**{name: values})
    assert inside(some._repr_mimebundle_()["text/html"])
    assert splatedit.cameras.bounds(some).radius == pytest.approx(splatedit.cameras.bounds(cloud).radius, rel=0.05)


def test_a_huge_scene_is_thinned_and_covers_as_much(cloud):
    few = displays.thinned(cloud, 100)
    assert few.n == 100 and displays.thinned(cloud, 300) is cloud
    area = [float((2 * g.scales).exp().sum()) for g in (cloud, few)]
    assert area[1] == pytest.approx(area[0], rel=0.25)


def test_cameras_show_their_frusta(cloud):
    rig = dome(cloud, 12, size=64)
    shown = rig._repr_mimebundle_()
    assert repr(rig) == shown["text/plain"] == "Cameras(12, pictures of 64x64)"
    (picture,) = inside(shown["text/html"])
    assert "45°" in shown["text/html"] and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 50


def test_frusta_of_one_camera_and_of_parallel_ones():
    """Where lines of sight never meet there is no middle, and one camera has no ring."""
    straight = look((0.0, 0.0, -3.0), (0.0, 0.0, 0.0), "-y")
    beside = straight.clone()
    beside[0, 3] += 1
    for poses in (straight[None], torch.stack([straight, beside])):
        K = torch.tensor([[50.0, 0, 32], [0, 50, 32], [0, 0, 1]]).expand(len(poses), 3, 3)
        picture = displays.frusta(Cameras(poses, K, 64, 64))
        assert (picture < 200).any(2).mean() > 0.005


def test_one_camera_fills_its_picture(cloud):
    assert displays.frusta(orbit(cloud, 1)).shape[0] > 120, "else it is a dot in a corner"


def test_lines_of_sight_meet_where_cameras_look(cloud):
    c2w = torch.linalg.inv(orbit(cloud, 5).w2c.double()).numpy()
    centre = splatedit.cameras.bounds(cloud).centre.numpy()
    np.testing.assert_allclose(displays.meeting_point(c2w[:, :3, 3], c2w[:, :3, 2]), centre, atol=1e-4)


def test_seen_from_aside_is_a_rotation_with_up_upwards():
    for up in ((0.0, 0.0, 1.0), (0.3, -2.0, 0.1)):
        turn = displays.aside(np.array(up), 25, 25)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(turn) == pytest.approx(1)
        x, y, z = turn @ (np.array(up) / np.linalg.norm(up))
        assert x == pytest.approx(0, abs=1e-9) and y < -0.8, "to the top of the picture"
        assert z < 0, "and, looking down, towards the eye"


def test_steps_show_what_they_saw(cloud, tiny_model, one_thread):
    steps = list(splatedit.edit(cloud, "a pig", "a cat", model=str(tiny_model), steps=2, views=3))
    assert re.fullmatch(r"Step\(2 of 2, loss [\d.e-]+, [\d.]+ dB to the source, drift [\d.e+]+\)", repr(steps[1]))
    (strip,) = inside(steps[1]._repr_mimebundle_()["text/html"])
    assert strip.size == (2 * 32 + 2, 32), "two views"
    film = splatedit.animate(steps, size=32)
    assert film.frames == 2 and film.size == (32, 32)


def test_reports_show_verdict_and_numbers():
    from splatedit.metrics import Report

    report = Report("unchanged", 0.0, float("inf"), 0.01, 1.0, 1.0, 0.25, 0.25, -0.1, -0.1, ["more <steps>"])
    shown = report._repr_mimebundle_()
    assert "Nothing changed." in shown["text/html"] and "more &lt;steps&gt;" in shown["text/html"]
    assert "PSNR to the source, dB: equal" in shown["text/plain"]


# -------------------------------------------------------------------------------------------------------------- compare
def test_compare_takes_pictures_of_every_kind(tmp_path):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    tensor = torch.from_numpy(picture).permute(2, 0, 1) / 255
    same = [picture, picture / 255, tensor, tensor[None], Image.fromarray(picture), tmp_path / "a.png"]
    for kind in [*same, str(tmp_path / "a.png")]:
        (found,) = displays.scene_or_pictures(kind)
        np.testing.assert_array_equal(found, picture)
    both = splatedit.compare(torch.stack([tensor, tensor]), torch.stack([tensor, 1 - tensor]))
    assert len(both.before) == 2 and np.abs(both.after[1].astype(int) - (255 - picture)).max() <= 1


def test_compare_draws_scenes_from_one_place(cloud, scene_file):
    moved = cloud._replace(means=cloud.means + torch.tensor([0.5, 0.0, 0.0]))
    pair = splatedit.compare(scene_file, moved, views=2, size=48)
    assert len(pair.before) == len(pair.after) == 2 and pair.before[0].shape == (48, 48, 3)
    assert np.abs(pair.before[0].astype(int) - pair.after[0]).mean() > 3, "the camera did not follow"
    again = splatedit.compare(cloud, cloud, size=48)
    np.testing.assert_array_equal(again.before[0], again.after[0])


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((8, 8, 3)), np.zeros((8, 9, 3)), "1 of 8x8 and 1 of 9x8 pixels"),
        (np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3)), "2 of 8x8 and 1 of 8x8 pixels"),
        (np.zeros((8, 8)), np.zeros((8, 8)), r"ndarray of shape \(8, 8\)"),
        (7, 7, "found int, expected Gaussians"),
        ("nowhere.png", np.zeros((8, 8, 3)), "nowhere.png: cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_said(a, b, words):
    with pytest.raises(InputError, match=words):
        splatedit.compare(a, b)


def test_a_comparison_is_a_png_then_a_slider(monkeypatch):
    pytest.importorskip("IPython")
    import IPython.display

    put = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: put.append(data))
    pair = splatedit.compare(np.zeros((40, 60, 3)), np.ones((40, 60, 3)), words=("a <b>", "c"))
    pair._ipython_display_()
    first, second = put
    assert set(first) == {"image/png", "text/plain"} and "image/png" not in second
    still = Image.open(io.BytesIO(base64.b64decode(first["image/png"])))
    assert still.width >= 120 and still.height > 40, "side by side below their names"
    assert "<img" not in re.sub("<script>.*</script>", "", second["text/html"], flags=re.S), "where no script runs"
    html = json.loads(re.search(r'innerHTML = (".*?[^\\]");for', second["text/html"].replace("\n", ""))[1])
    assert [p.size for p in inside(html)] == [(60, 40)] * 2 and "a &lt;b&gt;" in html and "a <b>" not in html
    assert "http" not in re.sub(r"base64,[^\"]+", "", html), "nothing from elsewhere"


# -------------------------------------------------------------------------------------------------------------- animate
def frames_of(film):
    picture = Image.open(io.BytesIO(film.apng))
    return [np.asarray((picture.seek(i), picture.convert("RGB"))[1]).astype(int) for i in range(picture.n_frames)]


def test_a_turntable_is_an_animated_png(cloud, tmp_path):
    film = splatedit.animate(cloud, frames=5, size=40, fps=10)
    data = film._repr_mimebundle_()
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert (picture.format, picture.n_frames, picture.size, picture.info["duration"]) == ("PNG", 5, (40, 40), 100.0)
    assert all(np.abs(a - b).mean() > 1 for a, b in zip(frames_of(film), frames_of(film)[1:], strict=False))
    film.save(tmp_path / "t.apng")
    assert (tmp_path / "t.apng").read_bytes() == film.apng and f"{len(film.apng):,} bytes" in repr(film)


def test_a_film_fits_and_still_shows_the_same():
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((90, 90)))
    frames = [np.roll(smooth, 9 * k, axis=1) for k in range(4)]
    full, small = displays.film(frames, 12, 10**7), displays.film(frames, 12, 10_000)
    for a, b in zip(frames_of(full), frames, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(small.apng) <= 10_000 < len(full.apng) and small.size < full.size
    for a, b in zip(frames_of(small), frames, strict=True):
        shrunk = np.asarray(Image.fromarray(b).resize(small.size)).astype(int)
        assert np.abs(a - shrunk).mean() < 8


def test_white_stays_white_with_few_colours():
    frames = [np.full((64, 64, 3), 255, np.uint8) for _ in range(3)]
    for seed, frame in enumerate(frames):
        frame[20:50, 20:50] = np.random.default_rng(seed).integers(200, 256, (30, 30, 3))
    for frame, few in zip(frames, displays.few_colours(frames), strict=True):
        seen = np.asarray(few.convert("RGB")).astype(int)
        assert (seen[:20] == 255).all() and np.abs(seen - frame).mean() < 3


def test_a_film_of_scenes_stays_in_place_or_follows_the_cameras(cloud):
    film = splatedit.animate([cloud, cloud, cloud], size=32)
    assert film.frames == 3 and len(frames_of(film)) == 1, "equal frames are one that stays"
    moving = splatedit.animate([cloud] * 3, orbit(cloud, 3, size=32))
    assert np.abs(frames_of(moving)[0] - frames_of(moving)[1]).mean() > 1
    with pytest.raises(InputError, match="found 2 for 3 frames"):
        splatedit.animate([cloud] * 3, orbit(cloud, 2, size=32))


def test_a_path_and_a_step_are_films_of_what_they_hold(cloud, scene_file):
    for what in (scene_file, str(scene_file), type("Step", (tuple,), {"gaussians": cloud})((0, 1))):
        assert splatedit.animate(what, frames=2, size=32).frames == 2


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "found nothing"),
        ([np.zeros((4, 4, 3)), np.zeros((4, 5, 3))], "differ in size"),
        ([3], "found int"),
        (3, "found int"),
    ],
)
def test_what_is_no_film_is_said(frames, words):
    with pytest.raises(InputError, match=words):
        splatedit.animate(frames)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_film_has_to_move(fps):
    with pytest.raises(InputError, match="fps: found"):
        splatedit.animate([np.zeros((4, 4, 3))], fps=fps)


def test_a_line_of_the_library_imports_no_notebook(scene_file, monkeypatch):
    """All of splatedit anew, where what it must not import cannot be; a process of its own would import torch again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "splatedit"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("torch", "IPython", "viser", "ipywidgets", "matplotlib", "jupyterlab"):
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an ImportError
    anew = importlib.import_module("splatedit")
    assert anew is not splatedit
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert repr(anew.load(scene_file)).startswith("Gaussians(300")
    for name in ("displays", "notebook", "lab"):
        importlib.import_module(f"splatedit.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "splatedit"]:
        del sys.modules[name]  # the old ones come back
