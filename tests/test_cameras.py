import math

import numpy as np
import pytest
import torch

from splatedit.cameras import RIGS, UPS, bounds, dome, explain_up, guess_up, look, orbit, visible
from splatedit.errors import InputError
from splatedit.extents import ground_scores
from splatedit.gaussians import Gaussians

CENTRE = torch.tensor([3.0, -2.0, 5.0])


def splats(means, scale=0.02, opacity=2.0, **fields):
    means = torch.as_tensor(means, dtype=torch.float32)
    n = len(means)
    quats = torch.tensor([[1.0, 0, 0, 0]]).expand(n, 4)
    return Gaussians(
        means,
        quats,
        torch.full((n, 3), math.log(scale)),
        torch.full((n,), opacity),
        torch.zeros(n, 1, 3),
        torch.zeros(n, 0, 3),
        **fields,
    )


def join(*parts):
    fields = ("means", "quats", "scales", "opacities", "sh0", "shN")
    return Gaussians(*(torch.cat([getattr(p, f) for p in parts]) for f in fields))


def ball(n=3000, seed=0):
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return splats(CENTRE + points / points.norm(dim=1, keepdim=True))


def axis(up):
    return (1.0 if up[0] == "+" else -1.0) * torch.eye(3)["xyz".index(up[1])]


def project(cameras, points):
    """Pixels (c, n, 2) and depth (c, n), written out apart from the package."""
    seen = points @ cameras.w2c[:, :3, :3].transpose(1, 2) + cameras.w2c[:, None, :3, 3]
    pixels = seen @ cameras.K.transpose(1, 2)
    return pixels[..., :2] / pixels[..., 2:], seen[..., 2]


def eyes(cameras):
    return -torch.einsum("cji,cj->ci", cameras.w2c[:, :3, :3], cameras.w2c[:, :3, 3])


@pytest.mark.parametrize("up", UPS)
@pytest.mark.parametrize("rig", RIGS)
def test_every_camera_is_upright_and_has_the_centre_in_the_middle(rig, up):
    scene = ball()
    cameras = RIGS[rig](scene, 7, size=(320, 200), up=up, fov=50.0)
    assert (cameras.n, cameras.width, cameras.height) == (7, 320, 200)
    rotations = cameras.w2c[:, :3, :3]
    torch.testing.assert_close(rotations @ rotations.transpose(1, 2), torch.eye(3).expand(7, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(7))
    centre = bounds(scene).centre
    pixels, depth = project(cameras, torch.stack([centre, centre + 0.1 * axis(up)]))
    torch.testing.assert_close(pixels[:, 0], torch.tensor([[160.0, 100.0]]).expand(7, 2), atol=1e-3, rtol=0)
    assert bool((depth > 0).all())
    torch.testing.assert_close(pixels[:, 1, 0], torch.full((7,), 160.0), atol=1e-3, rtol=0)
    assert bool((pixels[:, 1, 1] < 99).all()), "the world's up must point up in the picture"


@pytest.mark.parametrize("up", UPS)
def test_azimuth_0_has_the_agreed_right_axis_and_level_forward(up):
    camera = orbit(ball(), 1, elevation=0.0, up=up).w2c[0, :3, :3]
    right = torch.tensor([0.0, 1, 0]) if up[1] == "x" else torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(camera[0], right, atol=1e-6, rtol=0)
    torch.testing.assert_close(camera[1], -axis(up), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("up", "side"), [("-y", "-z"), ("+y", "+z"), ("+z", "-y"), ("-z", "+y")])
def test_where_the_camera_of_azimuth_0_stands(up, side):
    scene = ball()
    offset = eyes(orbit(scene, 1, elevation=0.0, up=up))[0] - bounds(scene).centre
    torch.testing.assert_close(offset / offset.norm(), axis(side), atol=1e-5, rtol=0)


def test_captures_with_y_down_start_at_the_identity():
    torch.testing.assert_close(orbit(ball(), 1, elevation=0.0, up="-y").w2c[0, :3, :3], torch.eye(3))


@pytest.mark.parametrize("up", UPS)
def test_azimuth_grows_to_the_right_of_the_camera(up):
    scene = ball()
    start, moved, quarter = (orbit(scene, 1, azimuth=a, elevation=0.0, up=up) for a in (0.0, 5.0, 90.0))
    right = start.w2c[0, 0, :3]
    assert float((eyes(moved) - eyes(start))[0] @ right) > 0
    offset = eyes(quarter)[0] - bounds(scene).centre
    torch.testing.assert_close(offset / offset.norm(), right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("up", UPS)
@pytest.mark.parametrize("elevation", [-90.0, -30.0, 0.0, 40.0, 90.0])
def test_elevation_is_the_angle_above_the_horizon(up, elevation):
    scene = ball()
    offsets = eyes(orbit(scene, 5, elevation=elevation, up=up)) - bounds(scene).centre
    sines = offsets @ axis(up) / offsets.norm(dim=1)
    torch.testing.assert_close(sines, torch.full((5,), math.sin(math.radians(elevation))), atol=1e-6, rtol=0)


def test_the_orbit_is_even_and_starts_at_azimuth():
    scene = ball()
    around = orbit(scene, 8, azimuth=20.0, up="+y")
    for i in range(8):
        alone = orbit(scene, 1, azimuth=20.0 + 45.0 * i, up="+y")
        torch.testing.assert_close(around.w2c[i], alone.w2c[0], atol=1e-5, rtol=0)


def test_distance_follows_fov_and_zoom():
    scene = ball()
    centre, radius = bounds(scene)
    for fov, zoom in [(45.0, 1.0), (90.0, 1.0), (30.0, 2.5)]:
        distance = (eyes(orbit(scene, 3, fov=fov, zoom=zoom)) - centre).norm(dim=1)
        expected = radius / math.sin(math.radians(fov / 2)) / zoom
        torch.testing.assert_close(distance, torch.full((3,), expected))


@pytest.mark.parametrize("size", [256, (256, 256), (640, 200), (200, 640)])
def test_the_scene_spans_the_shorter_side(size):
    scene = ball()
    cameras = orbit(scene, 4, size=size, fov=50.0, up="+z", elevation=0.0)
    centre, radius = bounds(scene)
    pixels, _ = project(cameras, torch.stack([centre + radius * axis("+z"), centre - radius * axis("+z")]))
    short = min(cameras.width, cameras.height)
    expected = short * math.cos(math.radians(25.0))
    torch.testing.assert_close(pixels[:, 1, 1] - pixels[:, 0, 1], torch.full((4,), expected))
    assert 0.9 * short < expected < short  # nothing of the ball is cut, little room is wasted


def test_a_dome_is_rings_turned_against_each_other():
    scene = ball()
    cameras = dome(scene, 10, elevations=(0.0, 20.0, 50.0), up="+y")
    offsets = eyes(cameras) - bounds(scene).centre
    elevation = torch.rad2deg(torch.asin(offsets[:, 1] / offsets.norm(dim=1)))
    torch.testing.assert_close(elevation, torch.tensor([0.0] * 4 + [20.0] * 3 + [50.0] * 3), atol=1e-3, rtol=0)
    azimuth = torch.rad2deg(torch.atan2(offsets[:, 0], offsets[:, 2])).remainder(360)
    expected = torch.tensor([0.0, 90, 180, 270, 40, 160, 280, 80, 200, 320])
    torch.testing.assert_close(azimuth, expected, atol=1e-2, rtol=0)


def test_a_dome_of_one_camera_is_an_orbit_of_one():
    torch.testing.assert_close(dome(ball(), 1).w2c, orbit(ball(), 1, elevation=0.0).w2c)


def test_default_dome_has_36_different_views():
    cameras = dome(ball())
    assert cameras.n == 36
    gaps = torch.cdist(eyes(cameras), eyes(cameras)) + 9 * torch.eye(36)
    assert float(gaps.min()) > 0.5


@pytest.mark.parametrize("up", UPS)
def test_look_gives_the_same_camera_as_the_angles(up):
    scene = ball()
    cameras = orbit(scene, 5, elevation=25.0, up=up)
    for eye, w2c in zip(eyes(cameras), cameras.w2c, strict=True):
        torch.testing.assert_close(look(eye, bounds(scene).centre, up), w2c, atol=2e-6, rtol=0)
        torch.testing.assert_close(look(eye, bounds(scene).centre, 3 * axis(up)), w2c, atol=2e-6, rtol=0)


def test_look_straight_down_picks_the_right_of_azimuth_0():
    w2c = look([0.0, 4.0, 0.0], [0.0, 0.0, 0.0], "+y")
    torch.testing.assert_close(w2c[0, :3], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(w2c[:3] @ torch.tensor([0.0, 0, 0, 1]), torch.tensor([0.0, 0, 4]))
    with pytest.raises(InputError, match="must differ"):
        look([1.0, 2, 3], [1.0, 2, 3], "+y")


def test_pick_keeps_a_batch():
    cameras = orbit(ball(), 6)
    for index, rows in [(2, [2]), ([4, 1], [4, 1]), (slice(3), [0, 1, 2]), (torch.tensor([5]), [5]), (-1, [5])]:
        chosen = cameras.pick(index)
        assert torch.equal(chosen.w2c, cameras.w2c[rows]) and torch.equal(chosen.K, cameras.K[rows])
        assert (chosen.width, chosen.height) == (256, 256)
    with pytest.raises(IndexError):
        cameras.pick(6)


def test_resized_scales_every_pixel_coordinate():
    cameras = orbit(ball(), 2, size=(200, 100))
    points = ball(50).means
    before, _ = project(cameras, points)
    after, _ = project(cameras.resized(300, 400), points)
    torch.testing.assert_close(after, before * torch.tensor([1.5, 4.0]), atol=1e-3, rtol=1e-5)
    assert torch.equal(cameras.resized(300, 400).resized(200, 100).K, cameras.K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up": "y"}, r"up: found 'y'.*did you mean \+y\?"),
        ({"up": "-Z"}, r"did you mean -z\?"),
        ({"up": "north"}, r"expected one of \+x, -x"),
        ({"fov": 0.0}, "fov: found 0.0"),
        ({"fov": 180.0}, "fov: found 180.0"),
        ({"zoom": 0.0}, "zoom: found 0.0"),
        ({"size": 0}, "size: found 0x0"),
        ({"elevation": 91.0}, "elevation: found 91.0"),
        ({"n": 0}, "views: found 0"),
    ],
)
def test_a_wrong_argument_gets_one_clear_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        orbit(ball(), **options)
    assert "\n" not in str(caught.value)


def test_bounds_of_a_ball_are_the_ball():
    centre, radius = bounds(ball(20000))
    torch.testing.assert_close(centre, CENTRE, atol=0.03, rtol=0)
    assert radius == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("far", [3.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("size", [0.02, 0.5, 30.0])
@pytest.mark.parametrize("one_sided", [False, True])
def test_one_percent_of_floaters_moves_nothing(far, size, one_sided):
    """Floaters as opaque as the scene and up to 1500 times larger, all around or all in one place."""
    clean = ball(3000)
    where = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    where = where / where.norm(dim=1, keepdim=True)
    where = torch.tensor([[1.0, 0, 0]]).expand(30, 3) if one_sided else where
    dirty = join(clean, splats(CENTRE + far * where, scale=size))
    before, after = bounds(clean), bounds(dirty)
    assert float((after.centre - before.centre).norm()) < 0.02 * before.radius
    assert abs(after.radius - before.radius) < 0.02 * before.radius


def test_transparent_gaussians_count_little():
    fog = splats(CENTRE + 2.2 * torch.randn(3000, 3, generator=torch.Generator().manual_seed(2)), opacity=-9.0)
    assert bounds(join(ball(), fog)).radius == pytest.approx(bounds(ball()).radius, rel=0.02)


def test_bounds_move_and_grow_with_the_scene():
    scene = ball(2999)  # no quantile falls between two points, where rounding would decide
    moved = scene._replace(means=scene.means * 50 + 7, scales=scene.scales + math.log(50))
    centre, radius = bounds(scene)
    torch.testing.assert_close(bounds(moved).centre, centre * 50 + 7, atol=1e-4, rtol=1e-6)
    assert bounds(moved).radius == pytest.approx(50 * radius, rel=1e-5)


def test_bounds_of_a_sample_agree_with_the_whole():
    whole, part = ball(120_000), ball(120_000).select(slice(40_000))
    assert bounds(whole).radius == pytest.approx(bounds(part).radius, rel=0.01)
    assert torch.equal(bounds(whole).centre, bounds(whole).centre)


def test_one_gaussian_has_bounds_and_an_orbit():
    one = splats(CENTRE[None], scale=0.5)
    assert torch.equal(bounds(one).centre, CENTRE)
    assert bounds(one).radius == pytest.approx(1.5)
    assert bool(orbit(one, 3).w2c.isfinite().all())


def test_bounds_need_no_gradient_and_cameras_are_float32():
    scene = ball()
    scene.means.requires_grad_()
    cameras = orbit(scene, 2)
    assert not cameras.w2c.requires_grad
    assert cameras.w2c.dtype == cameras.K.dtype == bounds(scene).centre.dtype == torch.float32


def standing(up, ground=True, seed=0):
    """A thin statue, on a wide ground or not, with `up` up."""
    draw = np.random.default_rng(seed)
    height = "xyz".index(up[1])
    flat = [i for i in range(3) if i != height]
    statue = draw.normal(0, 0.2, (1500, 3))
    statue[:, height] = draw.uniform(0, 1.2, 1500)
    angle, reach = draw.uniform(0, 2 * np.pi, 1500), np.sqrt(draw.uniform(0, 1, 1500))
    floor = np.zeros((1500, 3))
    floor[:, flat[0]], floor[:, flat[1]] = reach * np.cos(angle), reach * np.sin(angle)
    floor[:, height] = draw.normal(0, 0.01, 1500)
    points = np.concatenate([statue, floor]) if ground else statue
    points[:, height] *= 1 if up[0] == "+" else -1
    return splats(points)


@pytest.mark.parametrize("up", ["-y", "+y", "+z"])
def test_a_ground_says_which_way_is_up(up):
    scene = standing(up)
    assert explain_up(scene) == (up, "there is a flat ground on the opposite side")
    scores = ground_scores(*visible(scene))
    assert max(scores, key=lambda k: scores[k]) == up and 0 <= min(scores.values()) <= max(scores.values()) <= 1


@pytest.mark.parametrize("up", ["+x", "-x", "-z"])
def test_a_wall_is_not_taken_for_a_ground(up):
    assert guess_up(standing(up)) == "-y"


def test_without_any_hint_y_is_down():
    for scene in (ball(), standing("+y", ground=False), splats([[0.0, 0, 0]])):
        up, why = explain_up(scene)
        assert up == "-y" and why.startswith("assumed")


@pytest.mark.parametrize(
    ("comments", "up"),
    [
        (["Generated by Nerfstudio 1.1", "Vertical Axis: z"], "+z"),
        (["Vertical Axis: y"], "+y"),
        (["vertical axis: -y"], "-y"),
        (["up: +x"], "+x"),
        (["up_axis = -z"], "-z"),
        (["Exported from Brush", "Vertical axis: 0 -1 0"], "-y"),
        (["Exported from Brush", "Vertical axis: 0.05 0.1 0.99"], "+z"),
        (["coordinates EDN metres; world_up 0 -1 0"], "-y"),
        (["Exported from Brush", "Vertical axis: y"], "-y"),
        (["Vertical axis: nan nan nan"], "-y"),
        (["cleaned up yesterday", "set up by hand", "up"], "-y"),
        (["scaled up: twice", "messed up x values"], "-y"),
        (["axes: x right, Y-up"], "+y"),
        (["coordinate_system -z_up"], "-z"),
    ],
)
def test_header_comments_are_heeded(comments, up):
    assert guess_up(ball()._replace(comments=tuple(comments))) == up


def test_a_comment_beats_the_ground():
    assert guess_up(standing("+y")._replace(comments=("Vertical Axis: z",))) == "+z"


def test_the_rig_uses_the_guess():
    scene = standing("+z")
    assert torch.equal(orbit(scene, 3).w2c, orbit(scene, 3, up="+z").w2c)
    assert not torch.equal(orbit(scene, 3).w2c, orbit(scene, 3, up="-y").w2c)


@pytest.mark.gpu
def test_cameras_stand_on_the_device_of_the_scene():
    here, there = orbit(ball(), 3), orbit(ball().to("cuda"), 3)
    assert there.w2c.is_cuda and there.K.is_cuda and bounds(ball().to("cuda")).centre.is_cuda
    torch.testing.assert_close(there.w2c.cpu(), here.w2c)
    assert there.pick(torch.tensor([1])).n == 1
