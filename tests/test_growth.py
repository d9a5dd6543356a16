"""Geometry that may change: who grows, what follows, and that an edit with it is as repeatable as one without."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_editing import ToyPrior, painted
from test_resume import same, saved

from splatedit import files
from splatedit.cameras import bounds, dome, orbit
from splatedit.checkpoints import read_checkpoint
from splatedit.config import load_config
from splatedit.editing import edit
from splatedit.errors import InputError
from splatedit.growth import Grower, Growth, faint, refine, strongest
from splatedit.metrics import change_report, changed_share, count_rows
from splatedit.render import densify, render
from splatedit.results import mend, without_lost
from splatedit.run import run as start
from splatedit.scenes import Hold, Rates, Splats

pytestmark = pytest.mark.usefixtures("one_thread")
SCENES = Path(__file__).parents[1] / "scenes"
ALL = Rates(means=1e-2, quats=1e-2, scales=1e-2, opacities=0.1, sh0=0.1, shN=0.1)


@pytest.fixture
def scene(cloud):
    """300, of which the last 10 are faint."""
    opacities = cloud.opacities.clone()
    opacities[-10:] = -6.0  # 0.0025
    return cloud._replace(opacities=opacities)


@pytest.fixture
def prior(cloud):
    cameras = dome(cloud, 5, size=32)
    colors = {"red": (0.8, 0.1, 0.1), "blue": (0.1, 0.1, 0.8)}
    return ToyPrior({k: render(painted(cloud, v), cameras).rgb for k, v in colors.items()})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def splats(scene, **options):
    return Splats(scene, orbit(scene, 4, size=32), 1.0, ALL, supersample=1, **options)


def trained(scene, steps=3, **options):
    """A scene under edit with moments and a mean, each row with its own."""
    under = splats(scene, **options)
    for _ in range(steps):
        (under([0, 1]).rgb * torch.linspace(-1, 1, 32)).sum().backward()
        under.step(0.0, 1.0)
        under.average()
    return under


def moments(under, name):
    (state,) = (under.optimizer.state[g["params"][0]] for g in under.optimizer.param_groups if g["name"] == name)
    return state


def run(scene, prior, **options):
    settings = {"steps": 40, "views": 5, "guidance": "dds", "supersample": 1, "rates": ALL, **options}
    return edit(scene, "blue", "red", model=prior, **settings)


# ---------------------------------------------------------------------------------------------------------- who grows
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(0, 100), st.integers(-3, 50))
@settings(max_examples=50, deadline=None)
def test_the_strongest_are_the_highest_so_many_percent(values, percent, room):
    pull = torch.tensor(values)
    chosen = strongest(pull, percent, room)
    expected = min(round(len(pull) * percent / 100), max(room, 0), int((pull > 0).sum()))
    assert int(chosen.sum()) == expected
    assert not chosen.any() or chosen.all() or pull[chosen].min() >= pull[~chosen].max()


def test_what_nothing_pulls_at_or_pulls_at_without_a_number_does_not_grow():
    pull = torch.tensor([0.0, math.nan, 2.0, 0.0])
    assert strongest(pull, 100, 9).tolist() == [False, False, True, False]


def test_the_faint_go_but_never_all_of_them():
    below = faint(torch.tensor([-6.0, 0.0, -5.0, -5.4]), 0.005)
    assert below.tolist() == [True, False, False, True], "logit(0.005) is -5.29"
    assert faint(torch.tensor([-6.0, -5.5, -7.0]), 0.005).tolist() == [True, False, True]


def test_the_chosen_are_halved_the_faint_removed(scene):
    under = trained(scene)
    before = {k: p.detach().clone() for k, p in under.parameters.items()}
    learnt = moments(under, "sh0")["exp_avg"].clone()
    pull = torch.zeros(300)
    pull[[3, 100, 295]] = torch.tensor([5.0, 3.0, 9.0])  # 295 is faint
    refine(under, pull, Growth(percent=2 / 290 * 100), limit=1000)
    after = under.parameters
    assert under.n == len(after["means"]) == 300 - 10 + 2
    left = [i for i in range(290) if i not in (3, 100)]
    assert under.rows.tolist() == [*left, *[-1] * 4] and under.parent[-4:].tolist() == [3, 100, 3, 100]
    for name, value in after.items():
        assert torch.equal(value[:288], before[name][left])
    kept = {k: before[k].clone().requires_grad_() for k in before}
    densify.halve(kept, [], torch.isin(torch.arange(300), torch.tensor([3, 100])))
    assert all(torch.equal(value[288:], kept[name][-4:]) for name, value in after.items())
    assert torch.equal(moments(under, "sh0")["exp_avg"][:288], learnt[left])
    assert not moments(under, "sh0")["exp_avg"][288:].any()


def test_everything_kept_of_a_row_follows_it(scene):
    mask = torch.arange(300) % 3 != 0
    under = trained(scene, mask=mask, hold=Hold(anchor=0.1))
    mean, home = under.mean, under.home
    pull = torch.rand(200, generator=generator())
    refine(under, pull, Growth(percent=10), limit=1000)
    carried, born = ~under.added, under.added
    rows = {int(r): i for i, r in enumerate(mask.nonzero()[:, 0])}
    old = torch.tensor([rows[int(r)] for r in under.parent])
    for kept, before in ((under.mean, mean), (under.home, home)):
        for name, value in kept.items():
            assert torch.equal(value[carried], before[name][old][carried]), name
            assert torch.equal(value[born], under.parameters[name].detach()[born]), "from its birth"
    assert born.sum() > 10 and under.nearest.shape == (len(born), 16)
    assert torch.equal(under.nearest[:, 0].sort().values, torch.arange(len(born))) or born.any()
    result = under.result()
    assert result.n == under.n and len(result.extra["label"]) == result.n
    source = torch.where(under.rows < 0, -1, torch.as_tensor(result.extra["label"]))
    assert torch.equal(source, under.rows), "a column of the file follows, an added one takes its ancestor's"
    np.testing.assert_array_equal(result.extra["label"][-int(born.sum()) :], under.parent[born].numpy())
    outside = (~mask).nonzero()[:, 0]
    at = torch.isin(under.rows, outside)
    assert torch.equal(result.means[at], scene.means[outside]) and not under.inside[under.rows[at]].any()


def test_two_changes_in_a_row_leave_the_old_before_the_new(scene):
    under = trained(scene, mask=torch.arange(300) >= 100)
    for seed in range(4):
        pull = torch.rand(len(under.parent), generator=generator(seed))
        refine(under, pull, Growth(percent=30), limit=10_000)
        old = under.rows[under.rows >= 0]
        assert (old.diff() > 0).all() and (under.rows[len(old) :] == -1).all()
        assert not (under.added[:-1] & ~under.added[1:]).any(), "so too among those under edit"
        drawn = under.gaussians
        assert torch.equal(drawn.means[under.at], under.parameters["means"])
        under([0]).rgb.sum().backward()
        under.step(0.5, 0.1)
    assert under.n > 500


def test_an_edit_may_come_back_from_a_split_to_the_same_number(scene):
    """One split, one removed: the rows are as many as before, and yet not the same."""
    under = trained(scene)
    state = under.state_dict()
    grown = splats(scene)
    parent, added = torch.arange(300), torch.arange(300) == 299
    born = {"means": torch.full((1, 3), 7.0)}
    grown.load_state_dict({**state, "parent": parent, "added": added, "born": born})
    assert grown.rows.tolist() == [*range(299), -1] and torch.equal(grown.home["means"][299], born["means"][0])


# ---------------------------------------------------------------------------------------------------------- the limit
@pytest.mark.parametrize("limit", [300, 301, 317, None])
def test_never_more_than_the_limit(limit, scene, prior):
    growth = Growth(percent=50, every=4, window=(0, 1), max_gaussians=limit)
    counts = [(s.gaussians.n, s.rows) for s in run(scene, prior, growth=growth)]
    most = max(n for n, _ in counts)
    assert most == (limit or 600), "and it is reached"
    assert all(rows is None or len(rows) == n for n, rows in counts)
    assert counts[-1][1] is not None and (counts[-1][1] == -1).any()


def test_a_limit_below_what_there_is_is_a_mistake(scene, prior):
    with pytest.raises(InputError, match="max_gaussians: found 299, but the scene has 300 already"):
        next(run(scene, prior, growth=Growth(max_gaussians=299)))
    for growth, message in (
        (Growth(percent=101), "grow_percent: found 101"),
        (Growth(every=0), "grow_every: found 0"),
        (Growth(window=(0.5, 0.2)), r"grow_range: found \[0.5, 0.2\]"),
        (Growth(prune_opacity=1.0), "prune_opacity: found 1.0"),
    ):
        with pytest.raises(InputError, match=message):
            next(run(scene, prior, growth=growth))


# ---------------------------------------------------------------------------------------------------------- in an edit
def test_without_growth_nothing_is_counted_and_no_row_changes(scene, prior):
    plain, off = (list(run(scene, prior, steps=6, growth=g)) for g in (Growth(), Growth(0, 1, (0, 1), None, 0.9)))
    assert all(s.rows is None for s in off) and same(plain[-1].gaussians, off[-1].gaussians)
    assert not off[-1].state()["seen"].any()


def test_rows_change_when_they_should(scene, prior):
    growth = Growth(percent=10, every=5, window=(0.25, 0.75), prune_opacity=0.0)
    counts = [s.gaussians.n for s in run(scene, prior, growth=growth)]
    changes = [i for i, (a, b) in enumerate(zip([300, *counts], counts, strict=False)) if a != b]
    assert changes == [14, 19, 24, 29] and counts[14] == 330 and counts[19] == 363


def test_what_is_counted_is_the_mean_length_of_the_gradient_on_screen(scene):
    """By `screen_gradients` of each step, of those inside the mask."""
    mask = torch.arange(300) % 2 == 0
    under = splats(scene, mask=mask)
    grower = Grower(Growth(percent=1, every=100, window=(0, 1)), under, 100)
    pulled, seen = torch.zeros(300), torch.zeros(300, dtype=torch.int64)
    for index, views in enumerate(([0, 1], [2, 3], [1, 2])):
        drawn = under(views)
        grower.watch(index, drawn)
        (drawn.rgb * torch.linspace(-1, 1, 32)).sum().backward()
        more = densify.screen_gradients(drawn.meta)
        pulled, seen = pulled + more[0], seen + more[1]
        under.step(0.0, 1.0)
        grower.step(index, drawn)
    assert torch.equal(grower.pulled, pulled[mask]) and torch.equal(grower.seen, seen[mask])
    assert pulled.any() and seen.max() == 6


def test_places_may_be_frozen_while_splats_are_added(scene, prior):
    growth = Growth(percent=20, every=2, window=(0, 1), prune_opacity=0.0)
    last = list(run(scene, prior, steps=4, growth=growth, rates=Rates(means=0)))[-1]
    stayed = last.rows >= 0
    assert last.gaussians.n > 350 and torch.equal(last.gaussians.means[stayed], scene.means[last.rows[stayed]])


@pytest.mark.parametrize("masked", [False, True])
def test_an_edit_that_grows_goes_on_bit_for_bit(masked, scene, prior, tmp_path):
    mask = torch.arange(300) % 3 != 0 if masked else None
    growth = Growth(percent=20, every=3, window=(0.1, 0.9), max_gaussians=420)
    options = {"steps": 14, "average_last": 0.5, "growth": growth, "hold": Hold(anchor=0.05), "mask": mask}
    whole = [(s, saved(s.state(), tmp_path)) for s in run(scene, prior, **options)]
    assert whole[-1][0].gaussians.n == 420
    for cut in (4, 11):  # right after a change and between two, while averaging
        rest = list(run(scene, prior, **options, resume=whole[cut - 1][1]))
        for (one, _), other in zip(whole[cut:], rest, strict=True):
            assert one.loss == other.loss and same(one.gaussians, other.gaussians)
            assert (one.rows is None and other.rows is None) or torch.equal(one.rows, other.rows)
            np.testing.assert_array_equal(one.gaussians.extra["label"], other.gaussians.extra["label"])


def test_growing_reaches_what_the_source_cannot_show(cloud):
    """Thirty large Gaussians have to show what three hundred small ones do; fitted by the pixels, not by a prior."""
    target = painted(cloud, (0.8, 0.1, 0.1))._replace(sh0=cloud.sh0)
    coarse = target.select(torch.arange(0, 300, 10))._replace(scales=torch.full((30, 3), math.log(0.4)))

    def fitted(growth):
        under = splats(coarse, neighbours=0)
        grower = Grower(growth, under, 80)
        goal = under([0, 1, 2, 3], target).rgb
        for index in range(80):
            drawn = under([0, 1, 2, 3])
            grower.watch(index, drawn)
            loss = (drawn.rgb - goal).square().mean()
            loss.backward()
            under.step(index / 80, 0.1)
            grower.step(index, drawn)
        return under.n, loss.item()

    (fixed, before), (grown, after) = (fitted(Growth(percent=p, every=10, max_gaussians=200)) for p in (0, 50))
    assert fixed == 30 and 100 < grown <= 200 and after < 0.5 * before, (before, after)


# -------------------------------------------------------------------------------------------------------- in the report
def test_the_share_of_what_changed_counts_what_came_and_went(cloud):
    rows = torch.tensor([*range(10, 300), -1, -1])  # the first ten are gone, two are new
    edited = cloud.select(torch.cat([rows[:-2], torch.tensor([0, 1])]))
    assert changed_share(cloud, edited, 1.0, rows) == pytest.approx(12 / 302)
    darker = edited._replace(sh0=torch.cat([edited.sh0[:30] - 0.5, edited.sh0[30:]]))
    assert changed_share(cloud, darker, 1.0, rows) == pytest.approx(42 / 302)
    assert count_rows(rows, 300) == (2, 10) and count_rows(None, 300) == (0, 0)
    assert changed_share(cloud, cloud, 1.0, torch.arange(300)) == 0 == changed_share(cloud, cloud, 1.0)
    everything = torch.full((5,), -1)
    assert changed_share(cloud, cloud.select(torch.arange(5)), 1.0, everything) == 1


def test_what_is_lost_gets_the_values_of_its_own_row_and_is_left_out_if_it_has_none(cloud):
    rows = torch.tensor([*range(10, 300), -1, -1])
    broken = cloud.select(rows.clamp(min=0))._replace(scales=torch.zeros(292, 3))
    broken.scales[0] = broken.scales[-1] = math.nan
    left, kept = without_lost(broken, rows)
    assert kept.tolist() == rows[:-1].tolist() and left.n == 291 and len(left.extra["label"]) == 291
    fixed, count = mend(left, cloud, kept)
    assert count == 1 and torch.equal(fixed.scales[0], cloud.scales[10]) and not fixed.scales[1:].any()
    assert without_lost(cloud, None) == (cloud, None)


def test_a_run_that_grows_writes_what_came_and_went(cloud, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("splatedit.work.FRAMES", 2)
    monkeypatch.setattr("splatedit.work.VIEWS", 2)
    opacities = cloud.opacities.clone()
    opacities[:9] = -7.0
    cloud = cloud._replace(opacities=opacities)
    files.save(cloud, tmp_path / "ball.ply")
    words = ["source_prompt=a cat", "steps=4", "cameras=dome:3", "device=cpu", "guidance=dds", "mask_rule=y > 0"]
    words += ["grow_percent=50", "grow_every=1", "grow_range=[0.25,1]", "max_gaussians=350", "supersample=1"]
    options = {"scene": str(tmp_path / "ball.ply"), "prompt": "a pig", "model": str(tiny_model)}
    console = Console(file=io.StringIO(), width=200)
    outcome = start(load_config(options={**options, "output_dir": str(tmp_path / "out")}, words=words), console)
    edited, record = files.load(outcome.edited), outcome.record
    faint_ones = int((cloud.means[:9, 1] > 0).sum())
    assert edited.n == 350 and record["splats"] == 300 and 0 < faint_ones <= record["splats_removed"]
    assert record["splats_added"] == 50 + record["splats_removed"]
    assert f"{record['splats_added']} splats added, {record['splats_removed']} removed" in console.file.getvalue()
    kept = edited.n - record["splats_added"]
    labels = edited.extra["label"]
    assert (np.diff(labels[:kept]) > 0).all() and set(labels[kept:]) <= set(range(300))
    outside = (cloud.means[:, 1] <= 0).nonzero()[:, 0]
    at = torch.from_numpy(np.isin(labels[:kept], outside.numpy()).nonzero()[0])
    assert torch.equal(edited.select(at).means, cloud.means[outside])
    assert torch.equal(edited.select(at).shN, cloud.shN[outside])
    rows = read_checkpoint(outcome.folder / "ckpts" / "last.pt")["log"]["rows"]
    assert torch.equal(rows[:kept], torch.from_numpy(labels[:kept]).long()) and (rows[kept:] == -1).all()


@pytest.mark.gpu
def test_cuda_counts_and_grows_as_the_cpu_does(scene):
    grown = {}
    for device in ("cpu", "cuda"):
        under = splats(scene.to(device), mask=torch.arange(300) % 3 != 0)
        grower = Grower(Growth(percent=10, every=100, window=(0, 1)), under, 100)
        drawn = under([0, 1])
        grower.watch(0, drawn)
        (drawn.rgb * torch.linspace(-1, 1, 32, device=device)).sum().backward()
        under.step(0.0, 1.0)
        grower.step(0, drawn)
        refine(under, torch.arange(200.0, device=device), grower.growth, 1000)
        grown[device] = under, grower.pulled.cpu(), grower.seen.cpu()
    (one, *counted), (other, *expected) = grown["cuda"], grown["cpu"]
    torch.testing.assert_close(counted[0], expected[0], rtol=1e-2, atol=1e-4)
    assert torch.equal(counted[1], expected[1]) and torch.equal(one.rows.cpu(), other.rows)
    torch.testing.assert_close(one.result().means.cpu(), other.result().means, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_edit_of_the_bundled_cat_that_grows_is_as_much_of_a_pig():
    from splatedit.priors import load_prior

    prior, cat = load_prior("pocket"), files.load(SCENES / "cat.ply")
    views = orbit(cat, 8, elevation=12, azimuth=22.5, size=prior.image_size)

    def edited(growth):
        for step in edit(cat, "a pig", "a cat", model=prior, guidance="dds", steps=120, growth=growth):
            assert step.gaussians.n <= (growth.max_gaussians or cat.n)
        extent = bounds(cat).radius
        return step, change_report(cat, step.gaussians, prior, views, "a pig", "a cat", extent, rows=step.rows)

    (plain, fixed), (step, grown) = edited(Growth()), edited(Growth(percent=5, every=10, max_gaussians=18_000))
    assert plain.gaussians.n == cat.n and step.gaussians.n == 18_000
    assert grown.verdict == "changed" and grown.prefers_target >= fixed.prefers_target == 1.0
    assert grown.margin > fixed.margin - 0.02, (grown.margin, fixed.margin)
    assert grown.roughness < 1.1 * fixed.roughness, "halves leave no holes"
