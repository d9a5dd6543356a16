"""Edits of a part of the scene: what is outside the mask keeps its bits; what holds the rest near its source."""

import numpy as np
import pytest
import torch
from test_editing import ToyPrior, painted
from test_resume import same, saved

from splatedit.cameras import bounds, dome, orbit
from splatedit.editing import edit, outside_pull
from splatedit.errors import InputError
from splatedit.gaussians import SH_C0
from splatedit.growth import Growth
from splatedit.render import densify, render
from splatedit.scenes import Hold, Rates, Splats, nearest

pytestmark = pytest.mark.usefixtures("one_thread")
GROWTH = Growth(percent=20, every=10, window=(0.0, 1.0), prune_opacity=0.3)


@pytest.fixture
def scene(cloud):
    """SH of degree 1, so that all six parameters are there; every fifth is doubled, one of each pair outside."""
    again = cloud.select(torch.arange(0, cloud.n, 5))
    both = {k: torch.cat([v, again.parameters[k]]) for k, v in cloud.parameters.items()}
    both["opacities"] = both["opacities"].clone()
    both["opacities"][::7] = -1.0  # faint ones, inside and outside, which growth removes where it may
    both["sh0"] = both["sh0"].clone()
    both["sh0"][:40] = -0.0
    return cloud._replace(**both, extra={"label": np.arange(len(both["means"]), dtype=np.int32)})


@pytest.fixture
def mask(scene):
    """Left of the middle, without the second ones of the pairs."""
    return (scene.means[:, 0] < 0.7) & (torch.arange(scene.n) < 300)


@pytest.fixture
def prior(cloud):
    cameras = dome(cloud, 5, size=32)
    colors = {"red": (0.8, 0.1, 0.1), "blue": (0.1, 0.1, 0.8)}
    return ToyPrior({k: render(painted(cloud, v), cameras).rgb for k, v in colors.items()})


ALL = Rates(means=1e-2, quats=1e-2, scales=1e-2, opacities=0.1, sh0=0.1, shN=0.1)


def run(scene, prior, mask, **options):
    settings = {"steps": 100, "views": 5, "guidance": "dds", "supersample": 1, "rates": ALL, **options}
    return edit(scene, "blue", "red", model=prior, mask=mask, **settings)


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize(("growth", "neighbours"), [(Growth(), 16), (GROWTH, 0)], ids=["fixed", "grown"])
def test_what_is_outside_keeps_its_bits_over_a_hundred_steps(growth, neighbours, scene, mask, prior):
    outside = (~mask).nonzero()[:, 0]
    for step in run(scene, prior, mask, growth=growth, neighbours=neighbours, average_last=0.5):
        edited, rows = step.gaussians, torch.arange(scene.n) if step.rows is None else step.rows
        (at,) = torch.isin(rows, outside).nonzero(as_tuple=True)
        assert torch.equal(rows[at], outside), "all there, in their order"
        for name, value in edited.parameters.items():
            assert value.dtype == scene.parameters[name].dtype
            assert torch.equal(bits(value[at]), bits(scene.parameters[name][outside])), name
    assert step.index == 99 and (step.rows is None) == (growth.percent == 0)
    inside = mask[rows] & (rows >= 0)
    for name, value in edited.parameters.items():
        assert (value[inside] != scene.parameters[name][rows[inside]]).any(), f"{name} changed inside"
    moments = step.state()["optimizer"]["state"]
    assert {len(m["exp_avg"]) for m in moments.values()} == {edited.n - len(outside)}, "none for what is outside"


def test_a_mask_of_all_is_no_mask(scene, prior):
    whole, masked = (list(run(scene, prior, m, steps=4))[-1] for m in (None, torch.ones(scene.n, dtype=torch.bool)))
    assert same(whole.gaussians, masked.gaussians)


def test_the_gradients_inside_are_those_of_the_whole_scene(scene, mask):
    cameras = orbit(scene, 2, size=32)
    whole, part = (Splats(scene, cameras, 1.0, ALL, mask=m, supersample=1) for m in (None, mask))
    for splats in (whole, part):
        splats([0, 1]).rgb.square().sum().backward()
    assert torch.equal(whole([0]).rgb, part([0]).rgb)
    for name, parameter in part.parameters.items():
        torch.testing.assert_close(parameter.grad, whole.parameters[name].grad[mask])


def test_a_pull_is_the_rms_of_the_gradients_of_places_and_colours_and_nothing_outside(scene, mask):
    splats = Splats(scene, orbit(scene, 2, size=32), 2.0, ALL, mask=mask, supersample=1)
    splats([0, 1]).rgb[:, :, :16].square().sum().backward()  # the upper half of the pictures
    splats.feel(means=0.5, color=0.1)
    place, paint = splats.parameters["means"].grad, splats.parameters["sh0"].grad[:, 0]
    expected = torch.cat([place * 0.5 * 2.0, paint / SH_C0 * 0.1], 1).square().mean(1).sqrt()
    torch.testing.assert_close(splats.pull[mask], expected)
    assert not splats.pull[~mask].any() and splats.pull.shape == (scene.n,)
    up = -scene.means[:, 1]
    assert splats.pull[mask & (up > 0.5)].mean() > 20 * splats.pull[mask & (up < -0.5)].mean()


@pytest.mark.parametrize("rates", [ALL, ALL._replace(sh0=0.0), ALL._replace(means=0.0)], ids=["all", "grey", "still"])
def test_every_step_says_how_hard_it_pulls_at_each_row_it_leaves(rates, scene, mask, prior):
    steps = list(run(scene, prior, mask, steps=12, growth=GROWTH, rates=rates))
    first, last = steps[0], steps[-1]
    assert first.pull.shape == (scene.n,) and first.pull.isfinite().all() and (first.pull >= 0).all()
    assert (first.pull[mask] > 0).float().mean() > 0.5 and not first.pull[~mask].any()
    assert len({len(step.pull) for step in steps}) == 2 and len(last.pull) == len(last.rows) == last.gaussians.n
    assert not last.pull[(last.rows >= 0) & ~mask[last.rows]].any()


def test_a_pull_follows_the_rows_that_come_and_go(scene, mask):
    splats = Splats(scene, orbit(scene, 1, size=32), 1.0, ALL, mask=mask, supersample=1)
    number = torch.arange(len(splats.parent)).float() + 1
    splats.felt = number
    chosen = number > number.max() - 5
    halved = densify.halve(splats.parameters, splats.optimizer, chosen)
    splats.follow(halved)
    assert torch.equal(splats.pull[splats.at], number[halved.source]) and splats.n == scene.n + 5


def test_neighbours_are_looked_for_inside_the_mask(scene, mask):
    splats = Splats(scene, orbit(scene, 2, size=32), 1.0, mask=mask, neighbours=4)
    assert torch.equal(splats.nearest, nearest(scene.means[mask], 4))


def test_an_edit_of_a_part_goes_on_bit_for_bit(scene, mask, prior, tmp_path):
    options = {"steps": 6, "average_last": 0.5, "hold": Hold(anchor=0.1, outside=0.5)}
    whole = [(step, saved(step.state(), tmp_path)) for step in run(scene, prior, mask, **options)]
    for cut in (1, 4):
        rest = list(run(scene, prior, mask, **options, resume=whole[cut - 1][1]))
        assert all(same(a.gaussians, b.gaussians) for (a, _), b in zip(whole[cut:], rest, strict=True))
    state = whole[0][1]
    with pytest.raises(InputError, match="resume: .* another mask"):
        next(run(scene, prior, ~mask, **options, resume=state))
    with pytest.raises(InputError, match="resume: .* another anchor"):
        next(run(scene, prior, mask, steps=6, resume=state))


def test_masks_that_cannot_be_are_named(scene, mask, prior):
    with pytest.raises(InputError, match=r"mask: found shape \[7\] of torch.bool, expected \[360\]"):
        next(run(scene, prior, mask[:7]))
    with pytest.raises(InputError, match=r"mask: found shape \[360\] of torch.float32"):
        next(run(scene, prior, mask.float()))
    with pytest.raises(InputError, match="mask: none of the 360 Gaussians is inside"):
        next(run(scene, prior, mask & ~mask))


# ------------------------------------------------------------------------------------------------------------ an anchor
def pulled_one_way(scene, steps, hold, final_rate=1.0):
    """Every parameter's gradient is 1 in every step, so that Adam moves it by its rate."""
    splats = Splats(scene, orbit(scene, 1, size=32), 2.0, ALL, hold=hold, neighbours=0)
    for index in range(steps):
        for name in splats.trained:
            splats.parameters[name].grad = torch.ones_like(splats.parameters[name])
        splats.step(index / steps, final_rate)
    return splats.result()


def test_an_anchor_takes_back_its_share_in_every_step(scene):
    relevance = torch.linspace(0, 1, scene.n)
    share = 0.2 * (1 - relevance).double()
    after = pulled_one_way(scene, 12, Hold(anchor=0.2, relevance=relevance))
    keep = 1 - share
    way = sum(keep**k for k in range(1, 13))  # in rates; the last step is taken back too
    for name, rate in (("means", 2 * ALL.means), ("opacities", ALL.opacities), ("shN", ALL.shN)):
        moved = (scene.parameters[name] - after.parameters[name]).double().flatten(1 if name != "opacities" else 0)
        expected = rate * (way if name == "opacities" else way[:, None].expand_as(moved))
        torch.testing.assert_close(moved, expected, rtol=2e-4, atol=2e-6)


def test_an_anchor_falls_with_the_rates_and_of_nothing_is_none(scene):
    free, held = (pulled_one_way(scene, 5, Hold(anchor=a)) for a in (0.0, 1.0))
    assert same(free, pulled_one_way(scene, 5, Hold(anchor=1.0, relevance=torch.ones(scene.n))))
    assert same(held, scene), "all the way back"
    late = pulled_one_way(scene, 5, Hold(anchor=1.0), final_rate=0.1)
    sh0 = (scene.sh0 - late.sh0).double()
    expected = 0.0
    for index in range(5):
        rate = 0.1 ** (index / 5)
        expected = (expected + ALL.sh0 * rate) * (1 - rate)
    torch.testing.assert_close(sh0, torch.full_like(sh0, expected), rtol=2e-4, atol=2e-6)


# ---------------------------------------------------------------------------------------------------- outside the mask
def test_coverage_is_what_those_inside_make_up_of_a_pixel(scene, mask):
    cameras = orbit(scene, 2, size=32)
    whole, part = (Splats(scene, cameras, 1.0, mask=m, supersample=1) for m in (None, mask))
    torch.testing.assert_close(whole.coverage([0, 1]), whole([0, 1]).alpha, rtol=1e-5, atol=1e-5)
    other = Splats(scene, cameras, 1.0, mask=~mask, supersample=1)
    torch.testing.assert_close(part.coverage([0]) + other.coverage([0]), whole([0]).alpha, rtol=1e-5, atol=1e-5)
    assert 0.2 < float(part.coverage([0]).mean() / whole.coverage([0]).mean()) < 0.95


def test_the_pull_outside_is_the_gradient_of_the_weighted_difference():
    rng = torch.Generator().manual_seed(0)
    images, source = (torch.rand(2, 3, 4, 4, generator=rng) for _ in range(2))
    images[0, :, 0] = source[0, :, 0]  # where they are equal nothing pulls
    images.requires_grad_()
    elsewhere = torch.rand(2, 1, 4, 4, generator=rng)
    (2.5 * elsewhere * (images - source).abs()).sum().backward()
    assert images.grad is not None
    assert torch.equal(outside_pull(images, source, elsewhere, 2.5), images.grad)


def test_the_pull_outside_keeps_the_rest_of_the_picture(cloud, prior):
    """Those inside grow over their neighbours unless they are told not to."""
    scene = painted(cloud, (0.8, 0.1, 0.1))
    mask = scene.means[:, 1] < 0.0
    cameras, rates = orbit(scene, 5, size=32), Rates(means=0, quats=0, scales=0.03, opacities=0, sh0=0.05)
    splats = Splats(scene, cameras, bounds(scene).radius, mask=mask, supersample=1)
    views = list(range(5))
    elsewhere, source = 1 - splats.coverage(views), splats(views).rgb
    spilt, changed = [], []
    for weight in (0.0, 3.0):
        options = {"steps": 40, "rates": rates, "cameras": cameras, "hold": Hold(outside=weight)}
        edited = list(run(scene, prior, mask, **options))[-1].gaussians
        difference = (splats(views, edited).rgb - source).detach().abs()
        spilt.append(float((elsewhere * difference).mean()))
        changed.append(float(((1 - elsewhere) * difference).mean()))
    assert spilt[1] < 0.7 * spilt[0] and changed[1] > 0.5 * changed[0], (spilt, changed)


def test_what_holds_is_checked(scene, mask, prior):
    for hold, message in (
        (Hold(anchor=-0.1), "anchor: found -0.1"),
        (Hold(anchor=1.5), "anchor: found 1.5"),
        (Hold(outside=-1), "outside: found -1"),
        (Hold(anchor=0.1, relevance=torch.ones(3)), r"relevance: found shape \[3\]"),
        (Hold(anchor=0.1, relevance=torch.full((scene.n,), torch.nan)), "relevance: "),
    ):
        with pytest.raises(InputError, match=message):
            next(run(scene, prior, mask, hold=hold))
