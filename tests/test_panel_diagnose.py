"""The diagnose tab: what it asks of the model, what it makes of the answers, when it waits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from splatedit import diagnostics
from splatedit.config import Config
from splatedit.diagnostics import Table
from splatedit.errors import InputError
from splatedit.priors import load_prior
from splatedit.render import render
from splatedit.viewer import paths
from splatedit.viewer.app import App
from splatedit.viewer.panels import diagnose
from splatedit.viewer.panels.diagnose import Asked
from splatedit.viewer.stage import opened

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = Asked("a cat", "a pig", None, "ids", "grad", 2, 1.0, 0)


@pytest.fixture(scope="module")
def prior(tiny_model):
    return load_prior(str(tiny_model))


@pytest.fixture
def shown(cloud, scene_file):
    return opened(cloud, path=scene_file, up="-y")


@pytest.fixture(scope="module")
def found(prior):
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return diagnose.ask(prior, picture, ASKED, steps=(300, 700), pulls=(300, 500))


def front(shown):
    return paths.around(shown.extent.centre.double().numpy(), 4.0, 20, 10, "-y", 0.8)


# -------------------------------------------------------------------------------------------------------------- answers
def test_the_answers_are_those_of_the_library(prior, found):
    subject = diagnostics.Subject(prior, "a cat", "a pig", pictures=found.picture)
    make = torch.Generator().manual_seed
    drift = diagnostics.drift(subject, make(0), steps=(300, 700), solvers=["grad"], iters=2)
    means = diagnostics.posterior_means(subject, make(0), steps=(300, 700), solver="grad", iters=2)
    maps = diagnostics.gradient_maps(subject, make(0), steps=(300, 500), guidances=["ids"])
    assert found.drift.rows == drift.rows and found.means.rows == means.rows and found.maps.rows == maps.rows
    assert torch.equal(found.means.pictures, means.pictures) and torch.equal(found.maps.pictures, maps.pictures)
    levels, lines = diagnose.curves(found.drift)
    assert levels == [300, 700] and list(lines) == ["no FPR", "after 1", "after 2"]
    both = {(row["noise"], row["t"]): row["drift"] for row in found.means.rows}
    assert lines["no FPR"] == pytest.approx([both["random", 300], both["random", 700]])
    assert lines["after 2"] == pytest.approx([both["grad", 300], both["grad", 700]]), "plot and pictures agree"


def test_progress_is_told_and_it_can_be_ended(prior, found):
    told, asked = [], []

    def stop():
        asked.append(1)
        if len(asked) == 3:
            raise InputError("enough")

    with pytest.raises(InputError, match="enough"):
        diagnose.ask(
            prior, found.picture, ASKED, steps=(300, 700), pulls=(500,), tell=lambda *a: told.append(a), stop=stop
        )
    assert told == [(0.0, "drift at t = 300"), (0.2, "drift at t = 700")]


def rows(off, *on):
    """Rows of a drift table: without FPR and after each iteration, by level."""
    return [{"t": t, "iteration": k, "drift": drift} for k, line in enumerate((off, *on)) for t, drift in line.items()]


@pytest.mark.parametrize(
    ("off", "on", "said"),
    [
        ({300: 0.1, 700: 0.6}, {300: 0.08, 700: 0.42}, "identity holds: drift 0.42 at t=700; FPR takes 30 % off"),
        ({700: 0.6}, {700: 0.595}, "FPR takes 1 % off; a higher fpr_lambda or more fpr_iters would do more"),
        ({650: 1.0}, {650: 0.8}, "identity is loose: drift 0.80 at t=650; FPR takes 20 % off"),
        ({700: 2.0}, {700: 1.5}, "identity is lost: drift 1.50 at t=700; is 'a cat' what is to be seen?"),
        (
            {300: 0.1, 850: 0.8},
            {300: 0.2, 850: 2.8},
            "diverges: FPR makes the drift at t=850 2.80 instead of 0.80; low",
        ),
        ({300: 0.1}, {300: math.nan}, "diverges: FPR makes the drift at t=300 nan instead of 0.10; lower fpr_lambda"),
        ({700: 0.5}, {700: 0.52}, "FPR adds 4 %"),
    ],
)
def test_the_verdict_is_plain(off, on, said):
    assert said in diagnose.verdict(rows(off, on), ASKED)
    assert diagnose.verdict(rows(off, off, on), ASKED) == diagnose.verdict(rows(off, on), ASKED), "the last one counts"


# ------------------------------------------------------------------------------------------------------------- pictures
def test_the_view_is_what_the_browser_shows(shown, cloud):
    key = front(shown)
    wide = diagnose.picture_of(shown, key, 1.6, 32)
    again = render(cloud, paths.cameras_of([key], 64, 64)).rgb
    torch.testing.assert_close(wide, torch.nn.functional.avg_pool2d(again, 2).clamp(0, 1))
    assert torch.equal(diagnose.picture_of(shown, key, 1.0, 32), wide), "of a wide window the middle square"
    high = diagnose.picture_of(shown, key, 0.5, 32)
    covered = [float((picture < 0.95).any(1).float().mean()) for picture in (wide, high)]
    assert covered[1] > 1.5 * covered[0], "a high window is narrow: its square shows less around the scene"
    away = key._replace(target=2 * key.position - key.target)
    with pytest.raises(InputError, match="nothing of the scene is in this view"):
        diagnose.picture_of(shown, away, 1.0, 32)


def test_the_strip_and_the_maps_are_what_was_found(found):
    picture = diagnose.strip(found.means)
    assert found.means.pictures.shape == (1, 2, 3, 3, 32, 32)
    side = 96
    assert picture.shape == (2 * side + 2, 3 * side + 4, 3)
    tile = picture[side + 2 : 2 * side + 2, side + 2 : 2 * side + 2]  # refined, at the first level
    wanted = (found.means.pictures[0, 1, 1].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(tile[::3, ::3], wanted)
    maps = diagnose.pulls_over(found)
    assert maps.shape == (32, 3 * 32 + 4, 3)
    np.testing.assert_array_equal(maps[:, :32], (found.picture[0] * 255).round().byte().permute(1, 2, 0).numpy())
    strongest = found.maps.pictures[0, 0, 0].flatten().argmax().item()
    cold = found.maps._replace(pictures=torch.zeros_like(found.maps.pictures))
    grey = diagnose.pulls_over(found._replace(maps=cold))[:, 34:66]
    assert (grey[..., 0] == grey[..., 1]).all(), "where nothing pulls it is grey"
    y, x = (8 * (strongest // 4) + 4, 8 * (strongest % 4) + 4)
    hot = maps[y, 34 + x].astype(int)
    assert hot[0] - hot[2] > 40, "and hot where it pulls most"
    assert "t=300, t=700" in diagnose.captions(found)[0] and "t=300, t=500" in diagnose.captions(found)[1]
    still = found._replace(asked=found.asked._replace(target=found.asked.source))
    assert "name a target" in diagnose.captions(still)[1], "maps that are grey everywhere are explained"


def test_everything_is_kept_as_files(found, tmp_path, monkeypatch):
    def figure(_):
        raise InputError("figures: matplotlib is not installed")

    monkeypatch.setattr(Table, "figure", figure)  # with it there is drift.png too, see the test in a browser
    folder = diagnose.write(found, tmp_path / "new" / "diagnosis")
    names = {path.name for path in folder.iterdir()}
    assert names == {"drift.csv", "means.csv", "maps.csv", "view.png", "means.png", "maps.png"}
    lines = (folder / "drift.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3 and lines[0].startswith("solver,t,draw,view,iteration,drift")


# -------------------------------------------------------------------------------------------------------------- prompts
def test_the_questions_are_those_of_the_settings(prior, shown, scene_file):
    picture = diagnose.picture_of(shown, front(shown), 1.0, 32)
    config = Config(prompt=" a pig ", guidance="vsd", fpr_iters=0, solver="picard", fpr_lambda=2.0, guidance_scale=3.0)
    asked = diagnose.asked_of(config, "a cat")
    assert asked == Asked("a cat", "a pig", 3.0, "dds", "picard", 1, 2.0, 0), "vsd would train a network first"
    assert diagnose.asked_of(Config(), "a cat").target == "a cat"
    assert diagnose.source_prompt(config, scene_file, prior, picture) in ("a cat", "a pig", "a dog"), "the model says"
    scene_file.with_suffix(".yaml").write_text("source_prompt: a dog\n")
    assert diagnose.source_prompt(config, scene_file, prior, picture) == "a dog"
    config.source_prompt = "a cat"
    assert diagnose.source_prompt(config, scene_file, prior, picture) == "a cat"


# ---------------------------------------------------------------------------------------------------- beside an edit
class Edit:
    """An edit under way."""

    state, ended, outcome = "running", False, None

    def listen(self, callback):
        self.tell = lambda: callback(self)


class Camera:
    """A browser's."""

    def __init__(self, key):
        self.position, self.look_at, self.up_direction, self.fov, self.aspect = (*key, 1.0)


def test_a_running_edit_is_waited_for(shown, tiny_model, monkeypatch):
    monkeypatch.setattr("splatedit.viewer.panels.PANELS", {})  # this tab alone
    with App(shown, Config(scene=str(shown.path), prompt="a pig", model=str(tiny_model), fpr_iters=1)) as app:
        app.act = lambda handler, **_: lambda event: app.guard(handler, event)  # at once
        said = []
        app.notify = lambda title, body, **_: said.append(body)
        with app.server.gui.add_folder("tab"):
            panel = diagnose.Panel(app)
        event = SimpleNamespace(client=SimpleNamespace(camera=Camera(front(shown))))
        app.job = Edit()
        app.stage.change(pull=None)
        panel.diagnose(event)
        assert panel.waiting is event and panel.found is None and "once it is paused" in panel.said.content
        panel.give_up(None)
        app.job.state = "paused"
        app.job.tell()
        assert panel.found is None and not panel.start.disabled, "cancelled"
        app.job.state = "running"
        app.job.tell()
        panel.diagnose(event)
        app.job.state = "paused"
        app.job.tell()
        assert said == [] and panel.found is not None and panel.waiting is None
        assert panel.found.asked.solver == "grad" and len(panel.found.drift.rows) == 2 * len(diagnose.STEPS)
        assert [len(column) for column in panel.plot.data] == [5, 5, 5] and panel.plot.visible
        assert "t=700" in panel.said.content or "diverges" in panel.said.content
        assert panel.plot.scales["x"]["time"] is False


# ------------------------------------------------------------------------------------------------------ in a browser
@pytest.mark.browser
def test_a_view_is_diagnosed(browser, shown, tiny_model, tmp_path):
    from screen import keep, open_page, pixels, until

    config = Config(scene=str(shown.path), prompt="a pig", source_prompt="a cat", model=str(tiny_model))
    config.output_dir = str(tmp_path / "outputs")
    with App(shown, config) as app:
        page = open_page(browser, app.url, 700, 800)
        until(page, lambda: np.mean(pixels(page)[:, :300].min(2) < 200) > 0.05, "the scene")
        page.get_by_role("tab", name="Diagnose", exact=True).click()
        page.get_by_role("button", name="Diagnose this view").click()
        until(page, lambda: page.locator(".u-over").count() and page.get_by_text("by the noise").count() == 0, "a plot")
        until(page, lambda: page.get_by_text("at t=").count(), "a verdict")
        until(page, lambda: page.locator("img").count() >= 2, "the strip and the maps")
        keep(page, "diagnose")
        button = page.get_by_role("button", name="Save PNG and CSV")
        button.scroll_into_view_if_needed()
        button.click()
        until(page, lambda: list(tmp_path.glob("outputs/ball/diagnosis@*/drift.png")), "the files")
        assert page.errors == []
        page.context.close()
