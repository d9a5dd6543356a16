"""The viewer in a real browser: what is to be seen at once, after a reload, in two windows, and without the secret."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from screen import keep, open_page, pixels, until

from splatedit import files
from splatedit.editing import Step
from splatedit.errors import InputError
from splatedit.gaussians import SH_C0
from splatedit.jobs import Job, launch
from splatedit.viewer import first_look, framing, view
from splatedit.viewer.app import frame
from splatedit.viewer.server import serve

pytestmark = pytest.mark.browser
RED, GREEN, BLUE = (0.9, 0.05, 0.05), (0.05, 0.8, 0.05), (0.05, 0.05, 0.9)


def painted(gaussians, color):
    """The same splats in one colour."""
    sh0 = ((torch.tensor(color) - 0.5) / SH_C0).expand(gaussians.n, 1, 3).clone()
    return gaussians._replace(sh0=sh0, shN=torch.zeros_like(gaussians.shN))


def share(page, color):
    """Share of the canvas that has about this colour."""
    image = pixels(page)
    strong, weak = ([i for i in range(3) if (color[i] > 0.5) == bright] for bright in (True, False))
    return ((image[..., strong] > 120).all(-1) & (image[..., weak] < 90).all(-1)).mean()


def shows(page, color, least=0.1):
    until(page, lambda: share(page, color) > least, f"{color} on the screen")


def wait(look):
    """Until that is true, with no page to ask."""
    end = time.monotonic() + 60
    while not look():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def app(cloud):
    with view(painted(cloud, GREEN)) as app:
        yield app


@pytest.fixture
def page(browser, app):
    page = open_page(browser, app.url)
    yield page
    assert not page.errors, page.errors
    page.context.close()


def test_the_scene_fills_the_window_and_a_reload_keeps_what_is_shown(app, page, cloud):
    shows(page, GREEN, 0.2)

    def filled():
        rows = (pixels(page).min(-1) < 150).nonzero()[0]
        return len(rows) and rows.min() < 80 and rows.max() > 320

    until(page, filled, "the ball reaches from near the top of the 400 pixels to near the bottom")
    keep(page, "viewer-first-picture")
    app.stage.change(current=painted(cloud, RED))
    shows(page, RED)
    page.reload()
    shows(page, RED, 0.2)
    assert share(page, GREEN) < 0.01


def test_two_browsers_see_the_same_and_an_error_reaches_the_one_who_asked(app, page, browser, cloud):
    until(page, lambda: app.stage.clients == 1, "the first has come, so the second is the newest")
    other = open_page(browser, app.url, 400, 640)  # higher than wide: seen from farther away
    until(page, lambda: app.stage.clients == 2, "both are there")
    app.stage.change(current=painted(cloud, BLUE))
    shows(page, BLUE)
    shows(other, BLUE, 0.05)

    def placed(client):
        found = framing.place(*frame(app.stage.shown), min(client.camera.aspect, 1.0)).position
        return np.allclose(client.camera.position, found, rtol=1e-3, atol=1e-3)

    first, second = app.server.get_clients().values()
    until(page, lambda: placed(first) and placed(second), "each sees all of the scene, once its panel has its place")

    def mistake(event):
        raise InputError("a mistake of the second one")

    app.act(mistake)(SimpleNamespace(client=second))
    until(other, lambda: other.get_by_text("a mistake of the second one").count(), "the notification")
    assert not page.get_by_text("a mistake of the second one").count()
    other.context.close()
    until(page, lambda: app.stage.clients == 1, "one is left")


def test_a_tab_that_is_closed_in_mid_edit_changes_nothing(app, browser, cloud):
    steps = 6

    def edit(job):
        """Green to red, a step at a time."""
        job.source = painted(cloud, GREEN)
        job._begin()
        for index in range(steps):
            color = tuple(a + (b - a) * (index + 1) / steps for a, b in zip(GREEN, RED, strict=True))
            after = painted(cloud, color)
            if not job._taken(Step(index, steps, 0.1, torch.zeros(1), after, {}, 0, [], 20.0, dict)):
                return

    page = open_page(browser, app.url)
    shows(page, GREEN)
    job = Job(edit, steps)
    job.step(2)
    app.follow(launch(job))
    until(page, lambda: job.state == "paused" and job.done == 2, "the edit holds after two steps")
    page.context.close()
    wait(lambda: app.stage.clients == 0)
    job.resume()
    assert job.wait(60) and job.state == "done" and job.done == steps
    wait(lambda: app.finished is job)  # with nobody there it is told to the next one, and stays
    page = open_page(browser, app.url)
    shows(page, RED, 0.2)
    until(page, lambda: page.get_by_text("The edit is done").count(), "what happened meanwhile is told")
    page.context.close()


def test_another_file_is_opened_by_a_key(app, page, cloud, tmp_path):
    files.save(painted(cloud, RED), tmp_path / "red.ply")
    shows(page, GREEN)
    page.keyboard.press("o")
    field = page.get_by_role("dialog").get_by_role("textbox")
    field.fill(str(tmp_path / "red.ply"))
    keep(page, "viewer-open")
    page.get_by_role("dialog").get_by_role("button", name="Open", exact=True).click()
    shows(page, RED, 0.2)
    until(page, lambda: page.get_by_text("red.ply - splatedit").count(), "the panel names the file")
    assert app.stage.shown.path == tmp_path / "red.ply"


def test_without_the_secret_there_is_nothing(app, page):
    root = f"http://127.0.0.1:{app.server.get_port()}/"
    assert page.request.get(root).status == 403 and page.request.get(app.url).status == 200
    stranger = page.context.new_page()
    stranger.goto(root)
    assert stranger.locator("canvas").count() == 0 and "403" in stranger.content()
    # A page from elsewhere that has got hold of the address: its origin is not ours.
    stranger.goto("data:text/html,<p>another site</p>")
    ends = """address => new Promise(done => {
        const socket = new WebSocket(address);
        socket.onopen = () => done("open"); socket.onerror = () => done("refused");
    })"""
    address = app.url.replace("http", "ws").rstrip("/")
    assert stranger.evaluate(ends, address) == "refused"
    assert page.evaluate(ends, address) == "open", "from our own page it opens"
    stranger.close()


def test_the_first_look_is_there_before_the_app_and_stays(browser, cloud, tmp_path):
    files.save(painted(cloud, BLUE), tmp_path / "blue.ply")
    served = serve()
    served = first_look.show(served, first_look.glance(tmp_path / "blue.ply"))
    page = open_page(browser, served.url, 800)  # no window higher than wide: the app would move that camera
    shows(page, BLUE, 0.2)
    early = pixels(page)
    with view(tmp_path / "blue.ply", served=served) as app:
        until(page, lambda: page.get_by_role("tab", name="Compare").count(), "the panels come after it")
        drawn = threading.Event()
        app.slow.put(drawn.set)
        until(page, lambda: drawn.is_set() and app.displays.splats.nodes, "the display has drawn")
        shows(page, BLUE, 0.2)
        left = slice(0, 300)  # the panel covers the rest
        until(page, lambda: abs(pixels(page)[:, left] - early[:, left]).mean() < 2, "the same picture")
    assert not page.errors
    page.context.close()
