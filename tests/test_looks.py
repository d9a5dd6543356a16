"""Looks: which splats are drawn, in which colours, for a known change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splatedit.gaussians import SH_C0
from splatedit.metrics import CHANGED, changed, changed_share
from splatedit.viewer import looks
from splatedit.viewer.looks import DIM, DIMMED, FULL, GHOST, LOOKS, TINT, TINTED, change, colors, ramp, scale, strongest
from splatedit.viewer.stage import opened

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shown(cloud):
    """Row 0 another colour, 1 moved, 2 faded, 3 grown, each by ten just visible changes; 4 by half of one."""
    current = cloud.detach()
    shown = opened(cloud, current, up="-y")
    current.sh0[0, 0, 1] += 10 * CHANGED["color"] / SH_C0
    current.means[1, 2] += 10 * CHANGED["means"] * shown.extent.radius
    current.opacities[2] = (current.opacities[2].sigmoid() - 10 * CHANGED["opacity"]).logit()
    current.scales[3, 0] -= 10 * CHANGED["scale"]
    current.sh0[4, 0, 0] += 0.5 * CHANGED["color"] / SH_C0
    return shown._replace(current=current)


def grown(shown):
    """The current state without row 5, and two rows that were added."""
    rows = torch.cat([torch.arange(5), torch.arange(6, shown.source.n), torch.tensor([-1, -1])])
    return shown._replace(current=shown.current.select(rows.clamp(min=0)), rows=rows)


def test_the_change_is_counted_in_changes_that_are_just_visible(shown):
    far = change(shown)
    torch.testing.assert_close(far[:5], torch.tensor([10, 10, 10, 10, 0.5]), rtol=1e-3, atol=1e-3)
    assert not far[5:].any()
    assert torch.equal(far > 1, changed(shown.source, shown.current, shown.extent.radius))


def test_an_added_splat_is_infinitely_far_and_the_others_are_compared_with_their_own_row(shown):
    known = grown(shown)
    far = change(known)
    torch.testing.assert_close(far[:-2], change(shown)[known.rows[:-2]])
    assert far[-2:].isinf().all()
    share = changed_share(shown.source, known.current, shown.extent.radius, known.rows)
    assert (int((far > 1).sum()) + 1) / (shown.source.n + 2) == share  # one was removed


def test_the_difference_is_hot_where_something_changed_and_grey_elsewhere(shown):
    drawn = LOOKS["difference"](grown(shown))
    rgb = colors(drawn)
    hot = ramp()[round(math.sqrt(10 / FULL) * 255)]
    torch.testing.assert_close(rgb[:4], hot.expand(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(rgb[-2:], ramp()[[-1, -1]], atol=1e-5, rtol=0)
    grey = rgb[4:-2]
    assert (grey - grey[:, :1]).abs().max() < 1e-5 and grey.max() < 0.61 and grey.min() > 0.24
    assert grey.std() > 0.01, "the shape can be read"
    assert drawn.sh_degree == 0 and torch.equal(drawn.means, grown(shown).current.means)


def test_what_cannot_be_compared_is_said_and_shown_as_it_is(shown):
    few = shown._replace(current=shown.current.select(slice(0, 200)), look="difference")
    assert "300 and 200 splats" in looks.incomparable(few) and scale(few) is None
    assert LOOKS["difference"](few) is few.current
    two_files = opened(shown.source, few.current, up="-y")._replace(selection=torch.ones(300, dtype=torch.bool))
    assert LOOKS["difference"](two_files) is two_files.current and looks.incomparable(two_files)
    assert "before an edit" in looks.unpulled(shown) and LOOKS["gradient"](shown) is shown.current


def test_the_gradient_is_the_root_of_the_pull_over_its_99th_percentile(shown):
    pull = torch.arange(300).float()
    pull[-1] = 1e9  # one splat alone does not make the others cold
    shown = shown._replace(pull=pull, look="gradient")
    top = strongest(pull)
    assert 290 < top < 300 and scale(shown).high == f"{top:.2g} and more"
    rgb = colors(LOOKS["gradient"](shown))
    torch.testing.assert_close(rgb[75], ramp()[round(math.sqrt(75 / top) * 255)], atol=1e-5, rtol=0)
    torch.testing.assert_close(rgb[-1], ramp()[-1], atol=1e-5, rtol=0)
    assert rgb[0].std() < 1e-5, "nothing pulls: grey"
    assert strongest(torch.zeros(4)) == 1.0


def test_the_heat_gets_lighter_all_along():
    light = ramp() @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (light.diff() > 0).all() and ((ramp() >= 0) & (ramp() <= 1)).all()


def test_the_ghost_is_the_source_behind_the_newest_state_paler_and_fainter(shown):
    known = grown(shown)
    both = LOOKS["ghost"](known)
    n = known.current.n
    assert both.n == n + shown.source.n
    for name in ("means", "quats", "scales", "opacities", "sh0"):
        assert torch.equal(both.parameters[name][:n], known.current.parameters[name])
    spirit = both.select(slice(n, None))
    assert torch.equal(spirit.means, shown.source.means)
    torch.testing.assert_close(spirit.opacities.sigmoid(), GHOST * shown.source.opacities.sigmoid())
    assert colors(spirit).std(0).max() < 0.5 * colors(shown.source).std(0).max()
    other = LOOKS["ghost"](known._replace(source=shown.source._replace(shN=torch.zeros(300, 15, 3))))
    assert other.n == both.n, "two files of another degree each"


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_selected_is_tinted_and_the_rest_dimmed_in_every_look(look, shown):
    known = grown(shown)._replace(pull=torch.rand(301), look=look)
    chosen = torch.arange(300) < 7  # of the source: row 5 is gone
    plain, lit = (LOOKS[look](known._replace(selection=s)) for s in (None, chosen))
    inside = torch.arange(301) < 6
    if look == "before":
        inside = chosen
    if look == "ghost":  # the same colours are laid over the source before it fades
        plain, lit = plain.select(slice(0, 301)), lit.select(slice(0, 301))
    tint = colors(plain).lerp(torch.tensor(TINT).expand(plain.n, 3), TINTED)
    dim = colors(plain).lerp(torch.tensor(DIM).expand(plain.n, 3), DIMMED)
    torch.testing.assert_close(colors(lit), torch.where(inside[:, None], tint, dim), atol=2e-6, rtol=0)
    assert lit.sh_degree == 0 and torch.equal(lit.means, plain.means)


def test_a_selection_of_another_scene_is_not_laid_over_this_one(shown):
    assert LOOKS["after"](shown._replace(selection=torch.ones(7, dtype=torch.bool))) is shown.current


def test_marks_can_be_left_out_while_the_selection_stays(shown):
    assert LOOKS["after"](shown._replace(selection=torch.ones(300, dtype=torch.bool), marked=False)) is shown.current


NUMBERS = st.sampled_from([0.0, 1.0, -1e30, 1e30, math.inf, -math.inf, math.nan])


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=8), st.sampled_from(sorted(LOOKS)))
@settings(max_examples=60, deadline=None)
def test_colours_are_numbers_whatever_became_of_the_splats(values, look):
    from splatedit.gaussians import Gaussians

    n = len(values)
    sound = Gaussians(
        torch.randn(n, 3),
        torch.ones(n, 4),
        torch.zeros(n, 3),
        torch.zeros(n),
        torch.zeros(n, 1, 3),
        torch.zeros(n, 0, 3),
    )
    place, opacity, color, pull = torch.tensor(values).T
    spoilt = sound._replace(
        means=place[:, None].expand(n, 3), opacities=opacity, sh0=color[:, None, None].expand(n, 1, 3)
    )
    known = opened(sound, up="-y")._replace(current=spoilt, pull=pull, look=look)
    drawn = LOOKS[look](known)
    if look in ("difference", "gradient"):
        assert drawn.sh0.isfinite().all()
        assert ((colors(drawn) >= 0) & (colors(drawn) <= 1)).all()
    assert not change(known).isnan().any()
