"""A scene measured in other units is the same scene: drawn, lifted, picked and pointed at alike, and edited alike."""

import math

import pytest
import torch

from splatedit.cameras import orbit
from splatedit.editing import edit
from splatedit.render import lift, pick, render
from splatedit.render.pictures import NEAR, near_plane
from splatedit.viewer import pointing

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(gaussians, unit):
    """The same splats, lengths being `unit` times as large."""
    return gaussians._replace(means=gaussians.means * unit, scales=gaussians.scales + math.log(unit))


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 0.1, 1e4])
def test_a_scene_is_seen_alike_in_other_units(cloud, unit):
    other = measured(cloud, unit)
    cameras, its = (orbit(g, 2, size=48, up="-y") for g in (cloud, other))
    one, two = render(cloud, cameras), render(other, its)
    assert float(one.alpha.mean()) > 0.3, "there is something to see"
    torch.testing.assert_close(two.rgb, one.rgb, rtol=0, atol=2e-3)
    torch.testing.assert_close(two.depth / unit, one.depth, rtol=0, atol=5e-3)
    for found, wanted in zip(lift(other, its, two.rgb), lift(cloud, cameras, one.rgb), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.05)
    assert (pick(other, its).ids == pick(cloud, cameras).ids).float().mean() > 0.99
    sight, its_sight = pointing.look(cloud, cameras.pick(0)), pointing.look(other, its.pick(0))
    for found, wanted in zip(its_sight, sight, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.02, equal_nan=True)


def test_the_near_plane_is_gsplats_but_for_small_scenes(cloud):
    assert near_plane(measured(cloud, 3.0)) == NEAR == 0.01
    assert near_plane(measured(cloud, 1e-3)) == pytest.approx(near_plane(cloud) * 1e-3, rel=1e-4)
    assert NEAR / 2 < near_plane(cloud) <= NEAR
    afar = cloud._replace(means=torch.cat([cloud.means[:-1], torch.tensor([[1e6, 0.0, 0.0]])]))
    assert near_plane(measured(afar, 1e-3)) == pytest.approx(near_plane(cloud) * 1e-3, rel=0.05), "one floater"
    one = cloud.select([0])
    assert 0 < near_plane(one) < NEAR
    assert near_plane(cloud.select([])) == NEAR
    assert near_plane(cloud._replace(means=cloud.means * math.nan)) == NEAR, "drawing tells what is wrong"


def test_a_scene_is_edited_alike_in_other_units(cloud, tiny_model):
    def edited(scene):
        *_, last = edit(scene, "a pig", source="a cat", model=str(tiny_model), steps=3, views=4, up="-y")
        return last.gaussians

    one, two = edited(cloud), measured(edited(measured(cloud, 1e-3)), 1e3)
    assert (one.means - cloud.means).abs().max() > 1e-3 and (one.sh0 - cloud.sh0).abs().max() > 0.01, "an edit"
    for name, found in two.parameters.items():
        torch.testing.assert_close(found, one.parameters[name], rtol=0, atol=1e-4)
