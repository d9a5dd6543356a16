"""The camera tab: views, keyframes and what lies between them, films and camera files."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from splatedit import media
from splatedit.camera_files import fit, read_cameras
from splatedit.cameras import UPS, look, orbit
from splatedit.captures import load_capture
from splatedit.config import Config
from splatedit.errors import InputError
from splatedit.viewer import films, paths
from splatedit.viewer.app import App
from splatedit.viewer.panels import camera
from splatedit.viewer.paths import Key
from splatedit.viewer.stage import opened

pytestmark = pytest.mark.usefixtures("one_thread")
CENTRE = np.array([0.5, 0.0, 0.0])


@pytest.fixture
def shown(cloud, scene_file):
    return opened(cloud, cloud._replace(means=cloud.means * 0.5), path=scene_file, up="-y")


def ring(count, up="-y", distance=4.0, elevation=10.0):
    """Views evenly around the cloud."""
    return [paths.around(CENTRE, distance, 360 * i / count, elevation, up, 0.8) for i in range(count)]


# --------------------------------------------------------------------------------------------------------- single views
@pytest.mark.parametrize("up", UPS)
def test_views_by_angle_are_those_of_an_orbit(cloud, up):
    wanted = orbit(cloud, 4, elevation=20, azimuth=30, size=(64, 48), up=up, fov=40)
    keys = camera.keys_of(wanted, CENTRE)
    found = paths.cameras_of(keys, 64, 48)
    torch.testing.assert_close(found.w2c, wanted.w2c, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.K, wanted.K, rtol=1e-6, atol=0)
    for key, azimuth in zip(keys, (30, 120, 210, 300), strict=True):
        distance = float(np.linalg.norm(key.position - key.target))
        again = paths.around(key.target, distance, azimuth, 20, up, key.fov)
        np.testing.assert_allclose(again.position, key.position, atol=1e-5)


def test_the_orientation_is_that_of_look(shown):
    for key in (*ring(3), Key(np.array([1.0, -5, 0]), CENTRE, np.array([0.0, -1, 0.2]), 1.0)):
        w2c = look(key.position.tolist(), key.target.tolist(), key.up.tolist())
        torch.testing.assert_close(paths.cameras_of([key], 8, 8).w2c[0], w2c, rtol=0, atol=1e-6)
    down = Key(np.array([0.5, -3, 0]), CENTRE, np.array([0.0, -1, 0]), 1.0)
    turn = paths.axes(down)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(turn[:, 2], [0, 1, 0], atol=1e-12)


@pytest.mark.parametrize("name", camera.VIEWS)
def test_named_views_look_at_the_middle_from_as_far_as_before(shown, name):
    now = Key(np.array([0.5, 0.0, -7.0]), np.zeros(3), np.array([0.0, -1, 0]), 0.6)
    found = camera.seen_from(name, now, shown)
    centre = shown.extent.centre.double().numpy()
    assert np.linalg.norm(found.position - centre) == pytest.approx(np.linalg.norm(now.position - centre))
    np.testing.assert_array_equal(found.target, centre)
    side = {"front": (0, 0, -1), "back": (0, 0, 1), "left": (-1, 0, 0), "right": (1, 0, 0), "top": (0, -1, 0)}[name]
    aim = (found.position - centre) / np.linalg.norm(found.position - centre)
    np.testing.assert_allclose(aim, side, atol=2e-3)
    assert found.fov == 0.6


# --------------------------------------------------------------------------------------------------------------- moving
@pytest.mark.parametrize("loop", [False, True])
def test_a_film_meets_its_keyframes_and_moves_without_jumps(loop):
    keys = ring(5)[:4]
    keys[2] = keys[2]._replace(position=keys[2].position * 1.3, fov=1.1)
    views = paths.along(keys, 120, loop)
    assert len(views) == 120
    stops, gaps = paths.laid_out(keys, loop)
    at = paths.stops_at(gaps, 120, loop)
    assert at[0] == 0 and at[-1] == (120 if loop else 119) and len(at) == len(keys) + loop
    for key, index in zip(keys, at, strict=False):
        np.testing.assert_allclose(views[index].position, key.position, atol=1e-9)
        np.testing.assert_allclose(paths.axes(views[index]), paths.axes(key), atol=1e-9)
        assert views[index].fov == pytest.approx(key.fov)
    ways = np.stack([view.position for view in views] + ([views[0].position] if loop else []))
    steps = np.linalg.norm(np.diff(ways, axis=0), axis=1)
    assert steps.max() < 0.35 and np.abs(np.diff(steps)).max() < 0.15 * steps.max(), "no jump, no jolt"
    turns = [paths.axes(a).T @ paths.axes(b) for a, b in zip(views[:-1], views[1:], strict=True)]
    assert max(math.acos(min(1.0, (np.trace(turn) - 1) / 2)) for turn in turns) < 0.1


@pytest.mark.parametrize("loop", [False, True])
def test_the_speed_does_not_jump_between_near_and_far_keyframes(loop):
    keys = [paths.around(CENTRE, 4.0, azimuth, 10.0, "-y", 0.8) for azimuth in (0, 8, 90, 200)]
    (stops, gaps), bit = paths.laid_out(keys, loop), 1e-5  # a leg takes as long as its gap

    def place(leg, share):
        return paths.between(stops, gaps, leg, share, loop).position

    pairs = list(zip(range(len(gaps)), range(1, len(gaps)), strict=False)) + [(len(gaps) - 1, 0)] * loop
    for before, after in pairs:
        into = (place(before, 1.0) - place(before, 1 - bit)) / (bit * gaps[before])
        out = (place(after, bit) - place(after, 0.0)) / (bit * gaps[after])
        assert np.linalg.norm(out - into) < 1e-3 * np.linalg.norm(into)


@pytest.mark.parametrize("loop", [False, True])
def test_a_film_keeps_in_the_middle_what_its_keyframes_look_at(loop):
    """The front, the left, the top: the turn alone would look past the scene, from below it."""
    keys = [paths.around(CENTRE, 4.0, *camera.VIEWS[name], "-y", 0.8) for name in ("front", "left", "top")]
    for view in paths.along(keys, 60, loop):
        towards = CENTRE - view.position
        assert paths.axes(view)[:, 2] @ towards > math.cos(0.1) * np.linalg.norm(towards), "of 0.4 to the edge"


def test_a_camera_that_stands_still_turns_and_one_that_flies_through_does_not_whirl():
    a = Key(np.zeros(3), np.array([0.0, 0, 2]), np.array([0.0, -1, 0]), 0.8)
    b = a._replace(target=np.array([2.0, 0, 0]))
    aims = np.stack([paths.axes(view)[:, 2] for view in paths.along([a, b], 10)])
    angles = np.degrees(np.arctan2(aims[:, 0], aims[:, 2]))
    np.testing.assert_allclose(angles, np.linspace(0, 90, 10), atol=1e-6)
    through = [paths.around(CENTRE, 4.0, azimuth, 0.0, "-y", 0.8) for azimuth in (0, 170)]
    views = paths.along(through, 120)
    turns = [paths.axes(a)[:, 2] @ paths.axes(b)[:, 2] for a, b in zip(views[:-1], views[1:], strict=True)]
    assert math.acos(min(turns)) < 0.2


def test_the_curve_is_the_centripetal_one():
    """Against the pyramid of Barry and Goldman, by which the curve is usually defined."""
    rng = np.random.default_rng(0)
    p = rng.normal(size=(4, 3))
    gaps = np.linalg.norm(np.diff(p, axis=0), axis=1) ** 0.5
    t = np.concatenate([[0], np.cumsum(gaps)])
    for share in (0.0, 0.2, 0.7, 1.0):
        x = t[1] + share * (t[2] - t[1])

        def mix(a, b, low, high, x=x):
            return ((high - x) * a + (x - low) * b) / (high - low)

        a = [mix(p[i], p[i + 1], t[i], t[i + 1]) for i in range(3)]
        b = [mix(a[i], a[i + 1], t[i], t[i + 2]) for i in range(2)]
        wanted = mix(b[0], b[1], t[1], t[2])
        np.testing.assert_allclose(paths.curve(tuple(p), tuple(gaps), share), wanted, atol=1e-12)


def test_two_keyframes_are_a_straight_way_and_one_stands_still():
    a, b = ring(8)[:2]
    views = paths.along([a, b], 5)
    line = np.stack([view.position for view in views])
    np.testing.assert_allclose(line, a.position + np.linspace(0, 1, 5)[:, None] * (b.position - a.position), atol=1e-9)
    assert paths.along([a], 3, True) == [a, a, a]
    assert len(paths.along([a, a, b], 2)) == 2, "fewer frames than keyframes"
    with pytest.raises(InputError, match="0 keyframes"):
        paths.along([], 3)


def test_a_turntable_goes_on_from_here(shown):
    key = Key(np.array([0.5, -1.0, -4.0]), np.array([0.6, 0.1, 0.0]), np.array([0.0, -1, 0]), 0.7)
    views = paths.turntable(key, CENTRE, "-y", 8)
    np.testing.assert_allclose(views[0].position, key.position)
    distances = [np.linalg.norm(view.position - CENTRE) for view in views]
    np.testing.assert_allclose(distances, distances[0])
    assert all(view.position[1] == pytest.approx(-1.0) for view in views), "at one height"
    np.testing.assert_allclose(views[4].position, [0.5, -1.0, 4.0], atol=1e-9)
    step = views[1].position - key.position
    assert step @ paths.axes(key)[:, 0] > 0, "to the right, as cameras.orbit"


def test_which_way_a_film_takes(shown):
    now = ring(8)[3]
    assert len(camera.way(camera.TURNTABLE, 6, now, [], True, shown)) == 6
    np.testing.assert_allclose(camera.way(camera.TURNTABLE, 6, now, [], True, shown)[0].position, now.position)
    circle = camera.way(camera.CIRCLE, 6, now, [], True, shown)
    wanted = orbit(shown.source, 6, size=(64, 48), up="-y")
    torch.testing.assert_close(paths.cameras_of(circle, 64, 48).w2c, wanted.w2c, rtol=0, atol=2e-6)
    with pytest.raises(InputError, match="no keyframes"):
        camera.way(camera.KEYFRAMES, 6, now, [], True, shown)
    assert (camera.length(3.0, 24.0), camera.length(0.0, 24.0)) == (72, 1)


# ------------------------------------------------------------------------------------------------- the edit's cameras
def test_the_cameras_are_those_of_the_edit(shown, cloud, tmp_path):
    from splatedit.camera_files import save_cameras
    from splatedit.editing import rig_for

    found = camera.cameras_of_edit(shown, Config(cameras="orbit:5"))
    assert found.names == tuple(f"orbit {i}" for i in range(5))
    torch.testing.assert_close(found.cameras.w2c, rig_for(cloud, "orbit", 5, 64, "-y").w2c)
    assert camera.cameras_of_edit(shown, Config()).cameras.n == 48, "the dome, as none lie beside the scene"
    save_cameras(orbit(cloud, 9, size=64), tmp_path / "transforms.json")
    found = camera.cameras_of_edit(shown, Config())
    assert found.cameras.n == 7 and "00000.png" not in found.names, "two are held out"


# ---------------------------------------------------------------------------------------------------------------- films
def test_a_film_has_the_frames_that_were_asked_for(shown, tmp_path):
    cameras = paths.cameras_of(ring(3), 40, 30)
    told = []
    path = films.save_film(shown, cameras, "before", tmp_path / "new" / "film.apng", 10, tell=told.append)
    assert told == pytest.approx([1 / 3, 2 / 3, 1])
    with Image.open(path) as film:
        assert (film.n_frames, film.size) == (3, (40, 30))
    wanted = list(media.draw(shown.source, cameras))
    for found, frame in zip(films.drawn(shown, cameras, "before"), wanted, strict=True):
        np.testing.assert_array_equal(found, frame)
    pair = next(films.drawn(shown, cameras, films.SIDE_BY_SIDE))
    assert pair.shape == (30, 80, 3)
    np.testing.assert_array_equal(pair[:, :40], wanted[0])
    np.testing.assert_array_equal(pair[:, 40:], next(media.draw(shown.current, cameras)))
    assert "split" not in films.looks() and "after" in films.looks()


def test_a_cancelled_film_leaves_nothing(shown, tmp_path):
    done = []
    with pytest.raises(InputError, match="cancelled after 2 of 6 frames"):
        films.save_film(
            shown,
            paths.cameras_of(ring(6), 40, 30),
            "after",
            tmp_path / "film.mp4",
            10,
            tell=done.append,
            stop=lambda: len(done) == 2,
        )
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".ply"] == []


def test_who_cancels_is_told_calmly_and_a_saved_path_keeps_the_chosen_keyframe(shown, monkeypatch, tmp_path):
    monkeypatch.setattr("splatedit.viewer.panels.PANELS", {})  # this tab alone
    with App(shown, Config(scene=str(shown.path), output_dir=str(tmp_path))) as app:
        said, event = [], SimpleNamespace(client=None, target=SimpleNamespace(value="save"))
        app.notify = lambda title, body, *, color="red", **_: said.append((title, color))
        keyframes = camera.Keyframes(app, camera.Views(app))
        film = camera.Film(app, keyframes)
        film.size.value, film.tell = "16", lambda share: film.stop.set()
        app.guard(film.film, event)
        monkeypatch.setattr(films, "save_film", lambda *_, **__: (_ for _ in ()).throw(InputError("no space")))
        app.guard(film.film, event)
        assert said == [("Cancelled", "blue"), ("Not done", "red")] and not film.make.disabled
        keyframes.keys = ring(3)
        keyframes.refresh(1)
        app.guard(keyframes.store, event)
        assert said[2:] == [("Saved", "green")] and keyframes.pick.value == "2"


@pytest.mark.parametrize("text", ["", "12", "640x", "x480", "640x480x3", "5000", "9x480", "a"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="expected pixels from 16"):
        films.read_size(text)
    assert films.read_size("640x480") == films.read_size(" 640 × 480 ") == (640, 480)
    assert films.read_size("512") == (512, 512)


# ---------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("loop", [False, True])
def test_saved_keyframes_are_the_same_film_for_the_command_line(shown, cloud, scene_file, tmp_path, loop):
    keys = ring(5)[:3]
    keys[1] = keys[1]._replace(target=keys[1].target + [0.2, 0.1, 0], fov=0.9)  # panned
    path = tmp_path / "path.json"
    paths.save_path(keys, path, 12, loop, (40, 30))
    here = paths.cameras_of(paths.along(keys, 12, loop), 40, 30)
    views = load_capture(path, cloud, scene_file).views  # as `splatedit render --cameras` reads them
    there = fit(views, 40, 30)
    torch.testing.assert_close(there.w2c, here.w2c, rtol=0, atol=1e-6)
    torch.testing.assert_close(there.K, here.K, rtol=1e-6, atol=0)
    found, again = paths.load_path(path, CENTRE)
    assert again is loop and len(found) == 3
    redone = paths.cameras_of(paths.along(found, 12, again), 40, 30)
    torch.testing.assert_close(redone.w2c, here.w2c, rtol=0, atol=1e-5)
    torch.testing.assert_close(redone.K, here.K, rtol=1e-6, atol=0)
    assert len(read_cameras(path).views) == 12


def test_any_file_of_cameras_is_a_path(cloud, tmp_path):
    from splatedit.camera_files import save_cameras

    wanted = orbit(cloud, 4, size=(64, 48))
    save_cameras(wanted, tmp_path / "transforms.json")
    keys, loop = paths.load_path(tmp_path / "transforms.json", CENTRE)
    assert not loop
    torch.testing.assert_close(paths.cameras_of(keys, 64, 48).w2c, wanted.w2c, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="no such file"):
        paths.load_path(tmp_path / "none.json", CENTRE)
    save_cameras(orbit(cloud, 201, size=8), tmp_path / "many.json")
    with pytest.raises(InputError, match="at most 200 keyframes"):
        paths.load_path(tmp_path / "many.json", CENTRE)


def test_the_place_is_set_before_what_is_looked_at():
    """A browser's camera takes what it looks at along when it is moved, so the order decides."""
    said = []

    class Camera:
        def __setattr__(self, name, value):
            said.append(name)

    class Client(SimpleNamespace):
        def atomic(self):
            import contextlib

            return contextlib.nullcontext()

    paths.go(Client(camera=Camera()), ring(3)[0])
    assert said.index("position") < said.index("look_at")


# ------------------------------------------------------------------------------------------------------ in a browser
def field(page, label):
    """The input beside a label."""
    return page.get_by_text(label, exact=True).locator("xpath=following::input[1]")


@pytest.mark.browser
def test_a_turntable_is_made_from_here(browser, shown, tmp_path):
    import av
    from screen import keep, open_page, pixels, until

    with App(shown, Config(scene=str(shown.path), output_dir=str(tmp_path / "outputs"))) as app:
        page = open_page(browser, app.url)
        until(page, lambda: np.mean(pixels(page)[:, :300].min(2) < 200) > 0.05, "the scene")
        page.get_by_role("tab", name="Camera", exact=True).click()
        client = next(iter(app.server.get_clients().values()))
        page.get_by_role("button", name="left", exact=True).click()
        past = []

        def arrived():
            past.append(paths.key_of(client.camera))
            return past[-1].position[0] < -1 and all(map(np.array_equal, past[-1], past[max(len(past) - 3, 0)]))

        until(page, lambda: arrived() and len(past) > 2, "the camera on the left, and it stays")
        here = past[-1]
        size = field(page, "Size")
        size.scroll_into_view_if_needed()
        size.fill("80x60")
        size.press("Enter")
        page.get_by_role("button", name="Make the film").click()
        until(page, lambda: list(tmp_path.glob("outputs/ball/turntable@*.mp4")), "the film")
        (path,) = tmp_path.glob("outputs/ball/turntable@*.mp4")
        with av.open(str(path)) as film:
            stream = film.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
            assert (len(frames), stream.width, stream.height, float(stream.average_rate)) == (72, 80, 60, 24)
        wanted = next(films.drawn(shown, paths.cameras_of([here], 80, 60), "after"))
        assert np.abs(frames[0].astype(int) - wanted).mean() < 6, "it begins where the browser looks from"
        until(page, lambda: page.locator("a[download]").count(), "a link to the film")
        keep(page, "camera")
        assert page.errors == []
        page.context.close()


@pytest.mark.browser
def test_keyframes_are_played_and_the_edits_cameras_looked_through(browser, shown, tmp_path):
    from screen import keep, open_page, pixels, until

    config = Config(scene=str(shown.path), output_dir=str(tmp_path / "outputs"), cameras="orbit:4")
    with App(shown, config) as app:
        page = open_page(browser, app.url)
        until(page, lambda: np.mean(pixels(page)[:, :300].min(2) < 200) > 0.05, "the scene")
        page.get_by_role("tab", name="Camera", exact=True).click()
        client = next(iter(app.server.get_clients().values()))

        def press(name):
            button = page.get_by_role("button", name=name, exact=True).first
            button.scroll_into_view_if_needed()
            button.click()

        press("Add this view")
        press("left")
        until(page, lambda: client.camera.position[0] < -1, "the camera on the left")
        press("Add this view")
        until(page, lambda: field(page, "Keyframe").input_value() == "2", "two keyframes")
        seen = []
        client.camera.on_update(lambda camera: seen.append(np.array(camera.position)))
        press("Play")
        until(page, lambda: len(seen) > 5 and np.ptp(seen, axis=0).max() > 0.3, "the camera moves")
        keep(page, "keyframes")
        press("Stop")
        until(page, lambda: page.get_by_role("button", name="Play", exact=True).count(), "it stops")
        assert min(np.linalg.norm(place - CENTRE) for place in seen) > 1.5, "around the scene"
        page.get_by_text("Cameras of the edit").click()
        press("Look through it")
        wanted = camera.keys_of(orbit(shown.source, 4, size=64, up="-y"), CENTRE)[0]

        there = []

        def stays():  # it is the place of the first look too, from which a narrow window steps back once
            near = np.allclose(client.camera.position, wanted.position, atol=1e-3)
            there.append(near and client.camera.fov == pytest.approx(wanted.fov, abs=1e-3))
            return there[-5:] == [True] * 5

        until(page, stays, "the first camera's place and its angle")
        assert page.errors == []
        page.context.close()
