"""The select tab: what a rectangle, a click, a box or a rule selects, and that the mask is what was selected."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from screen import keep, open_page, pixels, until

from splatedit import files, mask_files
from splatedit.cameras import Cameras, look, orbit
from splatedit.config import Config
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.masks import Box, Rule, Sphere, box, sphere
from splatedit.render import twin
from splatedit.viewer import pointing, selection
from splatedit.viewer.app import App
from splatedit.viewer.panels import select
from splatedit.viewer.pointing import Rectangle, cut, rectangle, surface, within
from splatedit.viewer.selection import COMBINE, as_settings, box_text, carried, masked, of_source, sphere_text
from splatedit.viewer.stage import opened

pytestmark = pytest.mark.usefixtures("one_thread")
WHOLE = Rectangle(0.0, 0.0, 1.0, 1.0)


def balls(places, size=0.05, opacity=6.0):
    """Round splats at these places (n, 3)."""
    n = len(places)
    return Gaussians(
        torch.tensor(places, dtype=torch.float32),
        torch.tensor([1.0, 0, 0, 0]).repeat(n, 1),
        torch.full((n, 3), math.log(size)),
        torch.full((n,), opacity),
        torch.zeros(n, 1, 3),
        torch.zeros(n, 0, 3),
    )


def ahead(width=200, height=100):
    """A camera at the origin that looks along +z; x right, y down, 90 degrees across."""
    K = torch.tensor([[[width / 2, 0, width / 2], [0, width / 2, height / 2], [0, 0, 1.0]]])
    return Cameras(torch.eye(4)[None], K, width, height)


# --------------------------------------------------------------------------------------------------------- what is seen
def test_a_rectangle_selects_what_is_in_it_and_not_what_is_behind():
    wall = [(x / 10, y / 10, 2.0) for x in range(-10, 11) for y in range(-5, 6)]
    behind = [(0.0, 0.0, 4.0), (0.2, 0.1, 5.0)]
    aside = [(3.5, 0.0, 4.0)]  # at the very right, beside the wall
    scene = balls([*wall, *behind, *aside], size=0.1)
    chosen = within(scene, ahead(), WHOLE)
    assert chosen[: len(wall)].all() and not chosen[len(wall) : -1].any() and chosen[-1]
    left = within(scene, ahead(), Rectangle(0.0, 0.0, 0.5, 1.0))
    middle = torch.tensor([place[0] for place in wall]) < -1e-6
    assert torch.equal(left[: len(wall)][middle], torch.ones(int(middle.sum()), dtype=torch.bool))
    assert not left[: len(wall)][torch.tensor([place[0] for place in wall]) > 1e-6].any() and not left[-1]


def test_what_is_covered_by_others_of_its_surface_is_part_of_it():
    layers = [(x / 20, y / 20, 2.0 + z / 20) for z in range(3) for x in range(-20, 21) for y in range(-10, 11)]
    behind = [(0.0, 0.0, 3.0)]
    scene = balls([*layers, *behind], size=0.15, opacity=9.0)
    sight = pointing.look(scene, ahead())
    assert sight.transmittance[2 * 41 * 21 : -1].max() < pointing.SEEN / 2, "the last layer is not seen itself"
    chosen = within(scene, ahead(), WHOLE)
    assert chosen[:-1].all() and not chosen[-1]


def test_nothing_beside_or_behind_the_camera_is_selected_and_no_broken_splat():
    scene = balls([(0, 0, 2), (0, 0, -2), (9, 0, 2), (math.nan, 0, 2)])
    assert within(scene, ahead(), WHOLE).tolist() == [True, False, False, False]
    assert not within(scene.select([3]), ahead(), WHOLE).any()


def test_the_transmittance_is_that_of_the_slow_twin(cloud):
    """sum of alpha T over sum of alpha, pixel by pixel."""
    scene = cloud.select(slice(0, 150))
    scene = scene._replace(scales=scene.scales - 0.7)
    camera = orbit(scene, 1, size=(96, 64), up="-y", zoom=0.8)
    view = cut(camera, Rectangle(0.1, 0.2, 0.9, 0.7), least=64, most=64)
    given = (scene.means, scene.quats, scene.scales.exp(), scene.opacities.sigmoid(), view.w2c, view.K)
    limits = (0.01, 1e10, 0.0, 0.3, False)
    radii, means2d, depths, conics, dimmed = twin.splats(*given, view.width, view.height, *limits)
    light = torch.zeros(scene.n)
    alone = torch.zeros(scene.n)
    for tile in twin.tiles(means2d[0], radii[0], depths[0], view.width, view.height):
        blended, _ = twin.blend(means2d[0], conics[0], dimmed[0], tile)
        light[tile.near] += blended.sum(1)
        for row, one in enumerate(tile.near.tolist()):
            single = tile._replace(near=tile.near[row : row + 1])
            alone[one] += twin.blend(means2d[0], conics[0], dimmed[0], single)[0].sum()
    transmittance = pointing.look(scene, view).transmittance
    inner = (alone > 1) & ((means2d[0] > radii[0]) & (means2d[0] < torch.tensor([64, view.height]) - radii[0])).all(1)
    assert inner.sum() > 40 and (light / alone)[inner].min() < 0.2 and (light / alone)[inner].max() > 0.9
    torch.testing.assert_close(transmittance[inner], (light / alone)[inner], atol=0.05, rtol=0.05)
    assert not transmittance[(alone == 0)].any()


def test_a_part_of_a_window_is_the_same_view():
    camera = orbit(balls([(0, 0, 0)]), 1, size=(640, 400), up="-y")
    part = cut(camera, Rectangle(0.25, 0.5, 0.75, 1.0))
    assert (part.width, part.height) == (320, 200)
    point = torch.tensor([0.01, 0.03, 0.02, 1.0])
    pixels = [k @ (w2c @ point)[:3] for k, w2c in ((camera.K[0], camera.w2c[0]), (part.K[0], part.w2c[0]))]
    whole, small = (p[:2] / p[2] for p in pixels)
    torch.testing.assert_close(small, whole - torch.tensor([160.0, 200.0]))
    tiny, huge = cut(camera, Rectangle(0.5, 0.5, 0.51, 0.505)), cut(camera.resized(4000, 2000), WHOLE)
    assert (tiny.width, huge.width, huge.height) == (64, 512, 256)


def test_a_click_finds_the_surface():
    wall = balls([(x / 10, y / 10, 2.0) for x in range(-10, 11) for y in range(-5, 6)], size=0.1, opacity=9.0)
    torch.testing.assert_close(surface(wall, ahead(), (0.5, 0.5)), torch.tensor([0.0, 0.0, 2.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(surface(wall, ahead(), (0.65, 0.4)), torch.tensor([0.6, -0.2, 2.0]), atol=0.03, rtol=0)
    turned = ahead()._replace(w2c=look((0, 0, 0), (0, 0, -1), "-y")[None])
    with pytest.raises(InputError, match="nothing is there"):
        surface(wall, turned, (0.5, 0.5))
    around = orbit(balls([(0.3, 0.2, 0.1)], size=0.3), 1, size=(300, 200), up="-y")
    eye = -around.w2c[0, :3, :3].T @ around.w2c[0, :3, 3]
    hit = surface(balls([(0.3, 0.2, 0.1)], size=0.3), around, (0.5, 0.5))
    torch.testing.assert_close(hit, torch.tensor([0.3, 0.2, 0.1]), atol=0.02, rtol=0)
    assert (eye - hit).norm() > 0.3


def test_a_rectangle_is_between_two_corners_and_within_the_window():
    assert rectangle((0.75, 0.25), (-0.5, 1.5)) == Rectangle(0.0, 0.25, 0.75, 1.0)
    with pytest.raises(InputError, match="empty"):
        rectangle((0.5, 0.1), (0.5, 0.9))


# ------------------------------------------------------------------------------------------------------------- rows
def test_selections_combine_as_sets():
    old, new = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    wanted = {"replace": [1, 0, 1, 0], "add": [1, 1, 1, 0], "subtract": [0, 1, 0, 0], "intersect": [1, 0, 0, 0]}
    assert {how: combine(old, new).int().tolist() for how, combine in COMBINE.items()} == wanted


@pytest.fixture
def shown(cloud):
    return opened(cloud, up="-y")


def grown(shown):
    """Row 0 is gone, two were added."""
    rows = torch.cat([torch.arange(1, 300), torch.tensor([-1, -1])])
    return shown._replace(current=shown.current.select(rows.clamp(min=0)), rows=rows)


def test_what_is_picked_on_the_screen_are_rows_of_the_source(shown):
    known, low = grown(shown), Rule("y", ">", 0.2)
    wanted = low(shown.source)
    wanted[0] = False
    assert torch.equal(masked(known, low), wanted)
    assert torch.equal(masked(known._replace(look="before"), low), low(shown.source))
    unknown = opened(shown.source, known.current, up="-y")
    with pytest.raises(InputError, match="nothing says which continues which"):
        of_source(unknown, torch.ones(301, dtype=torch.bool))


def test_a_selection_follows_its_rows_when_the_result_is_edited_next(shown):
    known = grown(shown)._replace(selection=torch.arange(300) < 10)
    after = known._replace(source=known.current.detach(), rows=None, selection=None)
    assert carried(known, after).nonzero()[:, 0].tolist() == list(range(9)), "row 0 is gone, what was 1 is 0"
    other = after._replace(source=after.source._replace(means=after.source.means + 1))
    assert carried(known, other) is None, "another scene"


def test_growing_and_shrinking_are_those_of_masks(shown):
    ball = Sphere((0.5, -1.0, 0.0), 0.5)
    known = shown._replace(selection=ball(shown.source))
    assert torch.equal(selection.grown(known, 0.3), ball.grow(0.3)(shown.source))
    assert torch.equal(selection.grown(known, -0.3), ball.shrink(0.3)(shown.source))
    assert selection.counted(known) == f"**{int(known.selection.sum())}** of 300 splats selected"
    with pytest.raises(InputError, match="nothing is selected"):
        selection.grown(shown, 0.3)


# ------------------------------------------------------------------------------------------------------------- masks
floats = st.floats(-1e6, 1e6, width=32)
lengths = st.floats(1e-6, 1e6)


@given(st.tuples(floats, floats, floats), st.tuples(lengths, lengths, lengths), lengths)
@settings(max_examples=50, deadline=None)
def test_the_text_of_a_box_or_a_sphere_is_that_box_or_sphere(centre, size, radius):
    one, ball = Box(centre, size), Sphere(centre, radius)
    assert box(box_text(one)) == one and sphere(sphere_text(ball)) == ball
    turned = Box(centre, size, (0.9, 0.1, -0.2, 0.3))
    assert box(box_text(turned)) == turned


def test_a_lone_box_or_sphere_stands_in_the_settings_and_anything_else_in_a_file(shown, tmp_path):
    for mask, name, text in (
        (Box((0.5, -0.5, 0), (2, 1, 2.5)), "mask_box", "0.5,-0.5,0,2,1,2.5"),
        (Sphere((0.5, -1, 0), 0.75), "mask_sphere", "0.5,-1,0,0.75"),
    ):
        known = shown._replace(selection=mask(shown.source))
        assert as_settings(known, mask, tmp_path) == {**selection.NO_MASK, name: text}
    assert not list(tmp_path.iterdir())
    found = as_settings(known, None, tmp_path)
    assert found["mask_sphere"] is None and torch.equal(mask_files.load(found["mask"])(shown.source), known.selection)
    assert as_settings(known, None, tmp_path) == found, "the same rows are the same file"
    other = as_settings(known._replace(selection=~known.selection), None, tmp_path)
    assert other["mask"] != found["mask"] and len(list(tmp_path.iterdir())) == 2
    moved = known._replace(current=known.current._replace(means=known.current.means + 0.5))
    assert as_settings(moved, mask, tmp_path)["mask"] == found["mask"], "the sphere would hold others by now"


def test_the_mask_is_of_the_newest_state_which_is_edited_next(shown, tmp_path):
    low = Sphere((0.5, 1.0, 0), 0.8)
    known = grown(shown)._replace(selection=low(shown.source))
    path = as_settings(known, None, tmp_path)["mask"]
    chosen = mask_files.load(path)(known.current)
    assert len(chosen) == 301 and torch.equal(chosen[:-2], low(known.current)[:-2]) and not chosen[-2:].any()
    assert as_settings(known, low, tmp_path)["mask_sphere"] == "0.5,1,0,0.8"
    gone = known._replace(selection=torch.arange(300) < 1)
    with pytest.raises(InputError, match="nothing of what is selected is left"):
        as_settings(gone, None, tmp_path)
    with pytest.raises(InputError, match="nothing is selected"):
        as_settings(known._replace(selection=None), None, tmp_path)


@pytest.mark.parametrize("alone", [None, Box((0.5, -0.5, 0), (2, 1, 2))], ids=["file", "box"])
def test_splatedit_mask_gives_back_the_selection(alone, shown, scene_file, tmp_path, call):
    chosen = (alone or Rule("y", "<", -0.3))(shown.source)
    wanted = as_settings(shown._replace(selection=chosen), alone, tmp_path / "new" / "folder")
    words = [f"{key}={value}" for key, value in wanted.items() if value not in (None, 0.0, False)]
    status, _, err = call("mask", scene_file, *words, "-o", tmp_path / "rows.npy")
    assert status == 0, err
    assert np.array_equal(np.load(tmp_path / "rows.npy"), chosen.numpy())


# ----------------------------------------------------------------------------------------------------------- the panel
@pytest.fixture(scope="module")
def app():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splatedit.viewer.panels.PANELS", {})
        app = App(opened(balls([(0, 0, 0), (1, 0, 0)]), up="-y"))
        app.act = lambda handler, **_: lambda event: app.guard(handler, event)  # at once
        yield app
        app.close()


@pytest.fixture
def panel(app, cloud, scene_file, tmp_path):
    """The tab, without a browser; what is told is in `panel.told`."""
    app.job, app.config = None, Config(scene=str(scene_file), output_dir=str(tmp_path / "outputs"))
    app.stage.listeners = [listener for listener in app.stage.listeners if not hasattr(listener, "__self__")]
    app.stage.shown = opened(cloud, path=scene_file, up="-y")
    told: list[str] = []
    app.notify = lambda title, body, **_: told.append(body)
    with app.server.gui.add_folder("tab"):
        panel = select.Panel(app)
    panel.told = told
    return panel


def user(**more):
    """An event that somebody in a browser made."""
    camera = SimpleNamespace(
        wxyz=(1.0, 0, 0, 0), position=(0.5, 0.0, -4.0), fov=math.radians(45), image_width=400, image_height=300
    )
    return SimpleNamespace(client=SimpleNamespace(camera=camera, client_id=0), **more)


def chosen(panel):
    return panel.app.stage.shown.selection


def test_tools_combine_and_become_the_mask_of_the_next_edit(panel, cloud):
    panel.tool.value = "box"
    panel.box_text.value = "0.5,-1,0,2,2,2"
    panel.box_by_text(user())
    assert panel.box_size.value == (2, 2, 2) and np.allclose(panel.frame.position, (0.5, -1, 0))
    panel.press(user())
    first = Box((0.5, -1, 0), (2, 2, 2))(cloud)
    assert torch.equal(chosen(panel), first) and panel.count.content.startswith(f"**{int(first.sum())}** of 300")
    panel.use_as_mask(user())
    assert panel.app.config.mask_box == "0.5,-1,0,2,2,2" and panel.app.config.mask is None
    panel.tool.value, panel.how.value, panel.rule.value = "rule", "subtract", "x < 0.5 and opacity > 0.5"
    panel.press(user())
    assert torch.equal(chosen(panel), first & ~(cloud.means[:, 0] < 0.5))
    panel.change("Invert")
    panel.change("Invert")
    panel.use_as_mask(user())
    path = panel.app.config.mask
    assert panel.app.config.mask_box is None and path in panel.told[-1] and path in panel.mask.content
    assert torch.equal(mask_files.load(path)(cloud), chosen(panel))
    panel.use_no_mask(user())
    assert panel.app.config.mask is None and "All splats" in panel.mask.content
    panel.change("Clear")
    assert chosen(panel) is None
    panel.app.guard(panel.use_as_mask, user())
    assert "nothing is selected" in panel.told[-1]


def test_a_rectangle_in_a_browser_selects_by_its_camera(panel, cloud):
    panel.take_rectangle(user(screen_min=(0.0, 0.0), screen_max=(1.0, 0.5)))
    front, back = cloud.means[:, 2] < -0.6, cloud.means[:, 2] > 0.6
    upper = cloud.means[:, 1] < -0.1
    assert chosen(panel)[front & upper].float().mean() > 0.9 and not chosen(panel)[cloud.means[:, 1] > 0.05].any()
    assert chosen(panel)[back & upper].float().mean() < 0.35, "300 splats leave holes to look through"
    panel.app.guard(panel.take_rectangle, user(screen_min=(0.2, 0.2), screen_max=(0.2, 0.2)))
    assert "empty" in panel.told[-1]


def test_a_sphere_is_placed_by_a_click_and_by_numbers(panel, cloud):
    panel.place_sphere(user(screen_pos=(0.5, 0.5)))
    assert abs(panel.sphere.centre[2]) < 1.2 and np.allclose(panel.ball.position, panel.sphere.centre)
    panel.ball_text.value = "0.5,0,-1,0.4"
    panel.sphere_by_text(user())
    assert panel.ball_radius.value == 0.4
    panel.tool.value = "sphere"
    panel.press(user())
    assert torch.equal(chosen(panel), Sphere((0.5, 0, -1), 0.4)(cloud))
    panel.ball_text.value = "0.5,0,-1"
    panel.app.guard(panel.sphere_by_text, user())
    assert "expected x,y,z,r" in panel.told[-1] and panel.sphere.radius == 0.4


def test_handles_of_the_sphere_are_away_until_it_is_placed(panel, monkeypatch):
    waiting = []
    monkeypatch.setattr(panel.app.server.scene, "on_click", lambda: waiting.append)
    monkeypatch.setattr(panel.app.server.scene, "remove_click_callback", waiting.remove)
    panel.tool.value = "sphere"
    panel.choose_tool(None)
    for _ in range(2):
        panel.ask_for_click(user())
        assert len(waiting) == 1 and not panel.ball.visible, "they would take the click"
    waiting[0](user(screen_pos=(0.5, 0.5)))
    assert not waiting and panel.ball.visible and abs(panel.sphere.centre[2]) > 0


def test_a_huge_sphere_does_not_make_the_slider_coarse_for_good(panel):
    usual = panel.ball_radius.max
    for radius, most in ((1e9, 1e9), (0.4, usual)):
        panel.ball_text.value = f"0,0,0,{radius}"
        panel.sphere_by_text(user())
        assert panel.ball_radius.max == most


def test_what_was_found_for_other_words_does_not_count(panel, monkeypatch):
    heard = []

    def relevant(shown, config, words, above):
        heard.append((words, above))
        return type("Found", (), {"threshold": 0.762, "__call__": lambda _, g: torch.ones(g.n, dtype=torch.bool)})()

    monkeypatch.setattr(selection, "relevant", relevant)
    nobody = SimpleNamespace(client=None)
    for words, above in (("auto", ""), ("auto", None), ("ears", None), ("tail", "0.5"), ("ears", None)):
        panel.words.value, panel.cut.value = words, panel.cut.value if above is None else above
        panel.take_text(nobody)
        assert panel.cut.value == "0.762"
    assert heard == [("auto", None), ("auto", 0.762), ("ears", None), ("tail", 0.5), ("ears", 0.762)]


def test_handles_move_the_box(panel):
    panel.frame.position, panel.frame.wxyz = np.array([0.25, 0.5, -0.75]), np.array([0.0, 1.0, 0.0, 0.0])
    panel.box_by_frame(user())
    panel.corner.position = np.array([0.5, -0.25, 1.0])
    panel.box_by_corner(user())
    assert panel.box == Box((0.25, 0.5, -0.75), (1.0, 0.5, 2.0), (0, 1, 0, 0))
    assert panel.box_text.value == "0.25,0.5,-0.75,1,0.5,2,0,1,0,0"
    assert np.abs(panel.edges.points).max(axis=(0, 1)).tolist() == [0.5, 0.25, 1.0]


def test_another_scene_has_shapes_of_its_size(panel, cloud):
    large = opened(cloud._replace(means=1e4 * cloud.means, scales=cloud.scales + 9.2), up="-y")
    panel.app.stage.change(source=large.source, current=large.current, extent=large.extent)
    radius = large.extent.radius
    assert np.allclose(panel.box.size, radius, rtol=1e-3) and panel.sphere.radius == panel.ball_radius.value
    assert panel.ball_radius.max > radius > 9000 and abs(panel.frame.scale / radius - 1.2) < 1e-6
    assert np.allclose(panel.frame.position, large.extent.centre, atol=1e-2 * radius)


def test_files_select_by_rows_or_by_the_splats_they_hold(panel, cloud, tmp_path):
    rows = torch.arange(300) % 7 == 0
    np.save(tmp_path / "rows.npy", rows.numpy())
    files.save(cloud.select(rows), tmp_path / "some.ply")
    for name in ("rows.npy", "some.ply"):
        panel.app.stage.change(selection=None)
        panel.take_file(tmp_path / name)
        assert torch.equal(chosen(panel), rows)
    given = SimpleNamespace(value=SimpleNamespace(name="../rows.txt", content=b"1 2 x"))
    panel.app.guard(panel.take_upload, user(target=given))
    assert panel.told[-1].startswith("rows.txt: not a sound .txt file")
    given.value.content = b"1 2 5"
    panel.take_upload(user(target=given))
    assert chosen(panel).nonzero()[:, 0].tolist() == [1, 2, 5]


def test_the_mask_in_use_follows_when_the_edit_changed_the_rows(panel, cloud, scene_file):
    panel.put(torch.arange(300) < 10)
    panel.use_as_mask(user())
    first = panel.app.config.mask
    done = grown(panel.app.stage.shown)
    panel.app.stage.change(current=done.current, rows=done.rows, path=scene_file.with_name("edited.ply"))
    second = panel.app.config.mask
    assert second != first and mask_files.load(second)(done.current).nonzero()[:, 0].tolist() == list(range(9))
    panel.app.stage.change(source=done.current.detach(), current=done.current, rows=None, selection=None)
    assert chosen(panel).nonzero()[:, 0].tolist() == list(range(9)) and len(chosen(panel)) == 301
    panel.app.stage.change(source=cloud.select([1, 2]), current=cloud.select([1, 2]), selection=None, rows=None)
    assert panel.app.config.mask is None and "nothing is selected" in panel.told[-1]


def test_an_edit_that_begins_is_seen_without_marks(panel, cloud):
    panel.put(torch.arange(300) < 10)
    assert panel.app.stage.shown.marked
    panel.app.job = SimpleNamespace(ended=False)
    panel.app.stage.change(source=cloud.detach(), current=cloud, rows=None)
    assert not panel.app.stage.shown.marked and int(chosen(panel).sum()) == 10 and not panel.marked.value


@pytest.mark.slow
def test_the_model_is_asked_as_splatedit_mask_asks(panel, cloud, tiny_model, tmp_path, call):
    config = Config(scene=str(panel.app.stage.shown.path), model=str(tiny_model), prompt="a pig", source_prompt="a cat")
    config = replace(config, cameras="dome:4", device="cpu", up="-y")
    found = selection.relevant(panel.app.stage.shown, config, "auto", 0.9)
    words = ["--mask-text", "auto", "mask_threshold=0.9", "--model", tiny_model, "--source-prompt", "a cat"]
    words += ["prompt=a pig", "cameras=dome:4", "device=cpu", "up=-y", "-o", tmp_path / "rows.npy"]
    status, _, err = call("mask", config.scene, *words)
    assert status == 0, err
    assert np.array_equal(found(cloud).numpy(), np.load(tmp_path / "rows.npy"))
    without_file = panel.app.stage.shown._replace(path=None)
    assert np.allclose(selection.relevant(without_file, config, "auto", 0.9).values, found.values)
    with pytest.raises(InputError, match="say in the Edit tab what the scene shall show"):
        selection.relevant(without_file, replace(config, prompt=" "), "auto", None)


def test_lengths_are_short_to_write():
    assert select.rounded([0.123456, -7.0], 0.8) == (0.1235, -7.0)
    assert select.rounded([123456.0], 5e4) == (123460.0,)
    assert pointing.SEEN < 0.1


# --------------------------------------------------------------------------------------------------------- in a browser
@pytest.mark.browser
def test_a_click_at_the_middle_of_the_scene_places_the_sphere(browser, cloud):
    from splatedit.viewer import view

    with view(cloud._replace(scales=cloud.scales + 0.7), up="-y") as app:
        page = open_page(browser, app.url)
        page.get_by_role("tab", name="Select").click()
        until(page, lambda: (pixels(page)[130:, :300].min(-1) < 200).mean() > 0.2, "the scene")
        page.get_by_text("Tool", exact=True).locator("xpath=following::input[1]").click()
        page.get_by_role("option", name="sphere").click()
        centre = page.get_by_text("As text", exact=True).locator("visible=true").locator("xpath=following::input[1]")
        first = until(page, lambda: centre.count() and centre.input_value(), "the sphere as text")
        page.get_by_role("button", name="Place by a click").click()
        until(page, lambda: page.get_by_text("Click at the scene").count(), "it waits")
        canvas = page.locator("canvas[data-engine]").bounding_box()
        page.mouse.click(canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2)
        until(page, lambda: centre.input_value() != first, "it is placed")


@pytest.mark.browser
def test_a_rectangle_that_is_dragged_becomes_the_mask_of_an_edit(browser, cloud, tiny_model, tmp_path):
    from splatedit.viewer import view

    path = tmp_path / "ball.ply"
    files.save(cloud._replace(scales=cloud.scales + 0.7), path)
    scene = files.load(path)
    config = Config(
        scene=str(path), model=str(tiny_model), prompt="a pig", source_prompt="a cat", device="cpu", steps=2
    )
    config = replace(config, cameras="dome:4", up="-y", output_dir=str(tmp_path / "outputs"))

    def green():
        """Share of the window's left part that is marked."""
        image = pixels(page)[130:, :300]
        return float((image[..., 1] - image[..., 0] > 50).mean())

    with view(path, up="-y", config=config) as app:
        page = open_page(browser, app.url)
        page.get_by_role("tab", name="Select").click()
        until(page, lambda: (pixels(page)[130:, :300].min(-1) < 200).mean() > 0.2, "the scene")
        assert green() == 0
        page.keyboard.down("Shift")
        page.mouse.move(100, 180)
        page.mouse.down()
        page.mouse.move(220, 330, steps=4)
        page.mouse.up()
        page.keyboard.up("Shift")
        until(page, lambda: app.stage.shown.selection is not None, "something is selected")
        until(page, lambda: green() > 0.03, "it is marked")
        keep(page, "select-rectangle")
        inside = app.stage.shown.selection.clone()
        assert 5 < int(inside.sum()) < 150
        page.get_by_role("button", name="Use as mask", exact=True).click()
        until(page, lambda: app.config.mask, "the mask is in the settings")
        assert torch.equal(mask_files.load(app.config.mask)(scene), inside)
        page.get_by_role("tab", name="Edit").click()
        page.get_by_role("button", name="Run", exact=True).click()
        until(page, lambda: app.job is not None and app.job.ended, "the edit is done", 200)
        assert app.job.error is None, app.job.error
        edited = files.load(app.job.outcome.edited)
        for name, value in scene.parameters.items():
            assert torch.equal(edited.parameters[name][~inside], value[~inside]), name
        assert not torch.equal(edited.sh0[inside], scene.sh0[inside])
        until(page, lambda: not app.stage.shown.marked and green() < 0.01, "an edit is seen without marks")
        assert not page.errors, page.errors
        page.context.close()
