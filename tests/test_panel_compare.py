"""The compare tab: looks and their legend, which splat of two files is which, the difference in numbers."""

import math

import pytest
import torch
from screen import keep, open_page, pixels, until

from splatedit import files
from splatedit.cameras import orbit
from splatedit.errors import InputError
from splatedit.gaussians import SH_C0
from splatedit.viewer import looks
from splatedit.viewer.app import App
from splatedit.viewer.looks import LOOKS
from splatedit.viewer.panels import compare
from splatedit.viewer.stage import opened

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shown(cloud):
    """Every second splat is 0.2 redder."""
    current = cloud.detach()
    current.sh0[::2, 0, 0] += 0.2 / SH_C0
    return opened(cloud, current, up="-y")


# ---------------------------------------------------------------------------------------------- which belongs to which
def test_two_files_in_another_order_are_compared_splat_by_splat(shown):
    assert compare.correspondence(shown) is None
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    mixed = opened(shown.source, shown.current.select(order), up="-y")
    assert not compare.strange(shown) and compare.strange(mixed)
    assert torch.equal(compare.correspondence(mixed), order)


def test_of_a_file_with_fewer_or_more_splats_those_are_found_that_stayed(shown):
    some = torch.arange(300) % 3 > 0
    fewer = opened(shown.source, shown.current.select(some), up="-y")
    assert torch.equal(compare.correspondence(fewer), some.nonzero()[:, 0])
    more = opened(fewer.current, shown.current, up="-y")
    rows = compare.correspondence(more)
    assert torch.equal(rows[some], torch.arange(200)) and (rows[~some] == -1).all()
    known = fewer._replace(rows=some.nonzero()[:, 0])
    assert compare.correspondence(known) is known.rows


def test_a_rounded_file_is_found_again_by_the_rounding_of_its_format(shown, tmp_path):
    path = tmp_path / "some.spz"
    some = torch.arange(300) % 3 > 0
    with pytest.warns(files.LossWarning):
        files.save(shown.source.select(some), path)
    packed = opened(shown.source, files.load(path), path=path, up="-y")
    assert torch.equal(compare.correspondence(packed), some.nonzero()[:, 0])


def test_files_of_another_scene_cannot_be_compared_and_it_is_said(shown):
    other = shown.current._replace(means=shown.current.means + 0.3).select(slice(0, 200))
    with pytest.raises(InputError, match="only 0 of 200 splats lie where one of the source's 300 does"):
        compare.correspondence(opened(shown.source, other, up="-y"))


# ----------------------------------------------------------------------------------------------------------- in numbers
def test_the_difference_in_numbers(shown):
    told = dict(compare.numbers(shown))
    assert told["splats"] == "300" and told["changed visibly"] == "50.0%"
    assert told["mean change of colour"] == "25.5 of 255" and told["of place"] == "0.00% of the radius"
    rows = torch.cat([torch.arange(100), torch.tensor([-1])])
    grown = shown._replace(current=shown.current.select(rows.clamp(min=0)), rows=rows)
    told = dict(compare.numbers(grown))
    assert told["splats"] == "300 → 101" and told["added, removed"] == "1, 200"
    assert told["changed visibly"] == "83.4%"  # 50 changed, 1 added, 200 removed, of 301
    assert dict(compare.numbers(opened(shown.source, grown.current, up="-y"))) == {"splats": "300 → 101"}
    assert "<b>" not in compare.table([("<b>", "1 < 2")]) and "1 &lt; 2" in compare.table([("x", "1 < 2")])


def test_the_psnr_is_that_of_the_two_pictures(shown):
    from splatedit.metrics import psnr
    from splatedit.render import render

    cameras = orbit(shown.source, 1, size=48, up="-y")
    wanted = psnr(render(shown.source, cameras).rgb, render(shown.current, cameras).rgb)
    assert compare.view_psnr(shown, cameras) == wanted < 60
    broken = shown._replace(current=shown.current._replace(opacities=torch.full((300,), math.nan)))
    assert compare.view_psnr(broken, cameras) < wanted, "what cannot be drawn is not there"
    assert compare.decibels(compare.view_psnr(shown._replace(current=shown.source), cameras)) == "no difference"


def test_the_legend_says_which_colour_is_which_number(shown):
    for look in LOOKS:
        text = compare.legend(shown._replace(look=look, pull=torch.arange(300) / 100))
        assert ("linear-gradient" in text) == (look in ("difference", "gradient"))
    assert "128 and more, or added" in compare.legend(shown._replace(look="difference"))
    assert "before an edit has taken a step" in compare.legend(shown._replace(look="gradient"))
    assert set(compare.SAYS) == set(LOOKS) and set(compare.KEYS) < set(LOOKS)
    assert not set(compare.KEYS.values()) & set("WASDQE"), "viser moves the camera by these"


# ----------------------------------------------------------------------------------------------------------- the panel
@pytest.fixture
def panel(shown, monkeypatch):
    """The tab, alone in an app without a browser; what is told is in `panel.told`."""
    monkeypatch.setattr("splatedit.viewer.panels.PANELS", {})
    app = App(shown)
    app.act = lambda handler, **_: lambda event: app.guard(handler, event)  # at once
    told: list[str] = []
    app.notify = lambda title, body, **_: told.append(body)
    with app.server.gui.add_folder("tab"):
        panel = compare.Panel(app)
    panel.told = told
    yield panel
    app.close()


def test_a_key_shows_a_look_and_again_what_was_there_before(panel, shown):
    stage = panel.app.stage
    panel.press("before", None)
    assert stage.shown.look == panel.look.value == "before"
    panel.press("before", None)
    assert stage.shown.look == "after"
    panel.press("ghost", None)
    panel.press("before", None)
    panel.press("before", None)
    assert stage.shown.look == panel.look.value == "ghost", "before and back"
    panel.press("split", None)
    assert panel.split.visible
    panel.split.value = 0.25
    panel.move()
    assert stage.shown.split == 0.25
    stage.change(look="difference")
    assert panel.look.value == "difference" and "linear-gradient" in panel.legend.content and not panel.split.visible


def test_the_difference_of_two_files_is_shown_once_it_is_known_which_is_which(panel, shown):
    stage = panel.app.stage
    fewer = shown.current.select(slice(20, 300))
    stage.change(current=fewer, rows=torch.full((280,), -1))
    panel.show("difference", None)
    assert stage.shown.look == "difference" and torch.equal(stage.shown.rows, torch.arange(20, 300))
    stage.change(current=fewer._replace(means=fewer.means + 5), rows=torch.full((280,), -1), look="after")
    panel.show("difference", None)
    assert stage.shown.look == panel.look.value == "after" and "cannot be shown" in panel.told[-1]
    panel.count(None)
    assert "300 → 280" in panel.numbers.content and panel.numbers.visible


# --------------------------------------------------------------------------------------------------------- in a browser
def seen(page):
    """The part of the canvas that neither panel nor notifications cover."""
    return pixels(page)[130:, :300]


@pytest.mark.browser
def test_before_and_after_change_the_canvas_and_back_to_the_same_picture(browser, cloud):
    from splatedit.viewer import view

    red, blue = ((torch.tensor(c) - 0.5).expand(300, 1, 3) / SH_C0 for c in ((0.9, 0.1, 0.1), (0.1, 0.1, 0.9)))
    flat = cloud._replace(shN=cloud.shN[:, :0])
    with view(flat._replace(sh0=red), flat._replace(sh0=blue), up="-y") as app:
        page = open_page(browser, app.url)
        until(page, lambda: blueish(page) > 0.2, "the newest state")
        page.get_by_role("tab", name="Compare").click()
        for look, sign in (("before", -1), ("after", 1)):  # the browser sorts hidden splats along: both are there now
            app.stage.change(look=look)
            until(page, lambda sign=sign: sign * blueish(page) > 0.2, look)

        def back_and_forth():
            first = settled(page)
            page.get_by_role("button", name="Before / after").click()
            until(page, lambda: -blueish(page) > 0.2, "the source")
            assert app.stage.shown.look == "before"
            keep(page, "compare-before")
            page.keyboard.press("b")
            until(page, lambda: blueish(page) > 0.2, "the newest state again, by a key")
            return abs(settled(page) - first).max() <= 2

        # Again if it was not the same: a browser that is late sorts the splats anew in between, and rounds otherwise.
        until(page, back_and_forth, "the picture as it was before the two changes", 120)
        page.keyboard.press("c")
        until(page, lambda: "linear-gradient" in page.content(), "the legend of the difference")
        hot = torch.tensor(looks.RAMP[-1]) * 255
        until(
            page,
            lambda: (abs(seen(page) - hot.numpy()).max(-1) < 30).mean() > 0.1,
            "all of it changed as far as can be",
        )
        keep(page, "compare-difference")
        page.keyboard.press("x")
        until(
            page,
            lambda: -blueish(page, slice(0, 150)) > 0.3 and blueish(page, slice(165, 300)) > 0.3,
            "the source left of the middle, the newest state right of it",
        )
        until(page, lambda: page.get_by_text("Split at").is_visible(), "the slider")
        keep(page, "compare-split")
        assert not page.errors, page.errors
        page.context.close()


def blueish(page, columns=slice(None)):
    """Share of what is seen in these columns that is blue, less that which is red."""
    image = seen(page)[:, columns]
    return float((image[..., 2] - image[..., 0] > 100).mean() - (image[..., 0] - image[..., 2] > 100).mean())


def settled(page):
    """The picture once it stays as it is."""
    last = [seen(page)]

    def stays():
        last.append(seen(page))
        return len(last) > 3 and all(abs(last[-1] - past).max() == 0 for past in last[-4:-1])

    until(page, stays, "a still picture")
    return last[-1]
