"""Splats as something to optimise: pictures, rates, smoothing and averaging."""

import pytest
import torch

from splatedit.cameras import bounds, orbit
from splatedit.render import render
from splatedit.scenes import Rates, Splats, nearest


@pytest.fixture
def scene(cloud):
    cameras = orbit(cloud, 4, size=32)
    return Splats(cloud, cameras, bounds(cloud).radius, supersample=1)


def pull(scene, views=(0, 1)):
    """Leave a gradient: make everything darker."""
    scene(list(views)).rgb.sum().backward()


def test_pictures_are_those_of_render(scene, cloud):
    drawn = scene([2])
    torch.testing.assert_close(drawn.rgb, render(cloud, scene.cameras.pick([2])).rgb)
    assert drawn.rgb.shape == (1, 3, 32, 32) and drawn.alpha.shape == (1, 1, 32, 32)


def test_supersampled_pictures_average_larger_ones(cloud):
    cameras = orbit(cloud, 2, size=32)
    drawn = Splats(cloud, cameras, 1.0, supersample=2)([0]).rgb
    large = render(cloud, cameras.pick([0]).resized(64, 64)).rgb
    torch.testing.assert_close(drawn, large.unflatten(2, (32, 2)).unflatten(4, (32, 2)).mean((3, 5)))


def test_a_step_moves_by_the_rate_and_a_rate_of_zero_freezes(scene, cloud):
    pull(scene)
    scene.step(0.0, 0.1)
    edited = scene.result()
    moved = (edited.sh0 - cloud.sh0).abs()
    assert float(moved.max()) == pytest.approx(Rates().sh0, rel=1e-3)  # Adam's first step is the rate itself
    assert torch.equal(edited.shN, cloud.shN)  # Rates().shN is 0


def test_means_move_in_units_of_the_radius(cloud):
    cameras, moved = orbit(cloud, 2, size=32), []
    for radius in (1.0, 3.0):
        scene = Splats(cloud, cameras, radius, supersample=1)
        pull(scene)
        scene.step(0.0, 0.1)
        moved.append(float((scene.result().means - cloud.means).abs().max()))
    assert moved[1] == pytest.approx(3 * moved[0], rel=1e-4)


def test_rates_fall_to_the_given_fraction(scene):
    pull(scene)
    scene.step(1.0, 0.1)
    rates = {group["name"]: group["lr"] for group in scene.optimizer.param_groups}
    assert rates["sh0"] == pytest.approx(0.1 * Rates().sh0)


def test_the_source_and_its_columns_never_change(scene, cloud):
    before = cloud.sh0.clone()
    for _ in range(3):
        pull(scene)
        scene.step(0.0, 0.1)
    assert torch.equal(cloud.sh0, before) and torch.equal(scene.source.sh0, before)
    assert (scene.result().extra["label"] == cloud.extra["label"]).all()


def test_averaging_returns_the_mean_of_the_iterates(scene):
    seen = []
    for _ in range(3):
        pull(scene)
        scene.step(0.0, 1.0)
        scene.average()
        seen.append(scene.parameters["sh0"].detach().clone())
    torch.testing.assert_close(scene.result().sh0, torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)


def test_neighbours_share_their_gradients(cloud):
    cameras = orbit(cloud, 2, size=32)
    plain, smooth = (Splats(cloud, cameras, 1.0, supersample=1, neighbours=n) for n in (0, 8))
    for scene in (plain, smooth):
        pull(scene)
    raw = plain.parameters["sh0"].grad
    torch.testing.assert_close(smooth.parameters["sh0"].grad, raw)  # smoothing comes after backward, not in it
    used = []
    smooth.optimizer.register_step_pre_hook(lambda *_: used.append(smooth.parameters["sh0"].grad))
    smooth.step(0.0, 1.0)
    assert raw is not None and smooth.nearest is not None
    torch.testing.assert_close(used[0], raw[smooth.nearest].mean(1))


def test_nearest_against_brute_force():
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.cdist(points, points).topk(5, largest=False).indices
    assert torch.equal(nearest(points, 5).sort(1).values, expected.sort(1).values)
    assert nearest(points[:3], 16).shape == (3, 3)  # never more neighbours than points
