"""The history tab: what it says, what it puts onto the screen, and that it is the command line's history."""

import shutil

import numpy as np
import pytest
import torch

from splatedit import files
from splatedit.errors import InputError
from splatedit.stack import Stack, push
from splatedit.viewer.app import App
from splatedit.viewer.panels import history
from splatedit.viewer.stage import opened

pytestmark = pytest.mark.usefixtures("one_thread")


def coloured(gaussians, rgb):
    """The same splats in one colour."""
    return gaussians._replace(sh0=((torch.tensor(rgb) - 0.5) / 0.28209479177387814).expand(gaussians.n, 1, 3).clone())


@pytest.fixture
def chain(cloud, scene_file, tmp_path):
    """A file that was edited twice: made green, then every third splat taken away and two added."""
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "edited.ply"
    green = coloured(cloud, (0.1, 0.8, 0.1))
    files.save(green, path)
    record = {"prompt": "a <green> ball", "source_prompt": "a ball", "guidance": "ids", "steps": 7, "seed": 3}
    push(
        path, files.load(scene_file), None, {**record, "scene": str(scene_file), "verdict": "changed"}, scene=scene_file
    )
    rows = torch.cat([torch.arange(0, 300, 3), torch.tensor([-1, -1])])
    Stack.open(path).push(files.load(path).select(rows.clamp(min=0)), rows, {"prompt": "a third"})
    return path


def test_the_rows_of_another_state_are_found_by_their_numbers():
    assert history.rows_of(np.array([4, 7, 9]), np.array([4, 7, 9])) is None
    assert history.rows_of(np.array([4, 9, 7]), np.array([9, 12, 4, 99, 0])).tolist() == [1, -1, 0, -1, -1]


def test_a_moment_is_the_last_edit_that_is_done(chain, cloud):
    stack = Stack.open(chain)
    found = history.moment(stack)
    assert (found.before.n, found.now.n) == (300, 102)
    assert found.rows.tolist() == [*range(0, 300, 3), -1, -1]
    assert torch.equal(found.before.means[found.rows[:100]], found.now.means[:100])
    stack.undo()
    found = history.moment(stack)
    assert torch.equal(found.before.sh0, cloud.sh0) and found.now.n == 300 and found.rows is None
    stack.undo()
    found = history.moment(stack)
    assert torch.equal(found.before.sh0, found.now.sh0)


def test_the_table_says_what_was_done_and_what_is_undone(chain):
    stack = Stack.open(chain)
    stack.strength(0.5, 1)
    text = history.table(stack)
    assert text.count("<tr") == 5 and "ball.ply" in text
    assert "a &lt;green&gt; ball" in text and "<green>" not in text, "a prompt is no markup"
    assert "ids, 7 steps, seed 3" in text and "changed, at strength 0.5" in text
    stack.undo(2)
    lines = history.table(stack).split("<tr")[2:]
    assert ["▸" in line for line in lines] == [False, True, False, False]
    assert ["undone" in line for line in lines] == [False, False, True, True]


def test_why_nothing_can_be_done_is_said_in_words(chain, scene_file):
    stack = Stack.open(chain)
    assert history.why_not(chain, stack, False) == ""
    assert "comes from no file" in history.why_not(None, None, False)
    assert "No history lies beside ball.ply" in history.why_not(scene_file, Stack.open(scene_file), False)
    assert "under way" in history.why_not(chain, stack, True)
    files.save(files.load(scene_file)._replace(comments=("by another program",)), chain)
    assert "changed by another program" in history.why_not(chain, Stack.open(chain), False)


class Told:
    """What the app has to say."""

    def __init__(self, app):
        self.said = []
        app.notify = lambda title, body, **_: self.said.append(body)


@pytest.fixture
def panel(chain, monkeypatch):
    """The tab, alone in an app without a browser."""
    monkeypatch.setattr("splatedit.viewer.panels.PANELS", {})
    gaussians = files.load(chain)
    app = App(opened(gaussians, path=chain))
    app.act = lambda handler, **_: lambda event: app.guard(handler, event)  # at once
    with app.server.gui.add_folder("tab"):
        panel = history.Panel(app)
    yield panel
    app.close()


def shown(panel):
    return panel.app.stage.shown


def test_undo_redo_and_jumps_change_the_file_and_the_screen_alike(panel, chain, scene_file, cloud):
    told = Told(panel.app)
    assert (shown(panel).source.n, shown(panel).current.n) == (300, 102), "opened beside what its edit began with"
    assert not panel.back.disabled and panel.forth.disabled
    panel.undo()
    assert files.sha256(chain) == Stack.open(chain).digest(1)
    assert torch.equal(shown(panel).current.sh0, coloured(cloud, (0.1, 0.8, 0.1)).sh0)
    panel.undo()
    assert chain.read_bytes() == scene_file.read_bytes() and panel.back.disabled
    assert torch.equal(shown(panel).current.sh0, cloud.sh0)
    panel.redo()
    panel.states.value = next(label for label in panel.states.options if label.startswith("2:"))
    panel.change(lambda stack: stack.goto(history.number_of(panel.states.value)))
    assert shown(panel).current.n == 102 and Stack.open(chain).at == 2 and shown(panel).rows is not None
    assert told.said == []


class Moved:
    """A slider that somebody moved in a browser."""

    client = object()


def test_part_strength_is_seen_before_it_is_written_and_is_that_of_the_command_line(panel, chain, tmp_path):
    twin = tmp_path / "twin"
    twin.mkdir()
    shutil.copy(chain, twin / chain.name)
    shutil.copytree(chain.with_name("edited.ply.history"), twin / "edited.ply.history")
    Stack.open(twin / chain.name).strength(0.25, 1)
    content = chain.read_bytes()
    panel.edits.value = next(label for label in panel.edits.options if label.startswith("1:"))
    panel.slider.value = 0.25
    panel.preview(Moved)
    assert chain.read_bytes() == content and len(Stack.open(chain).entries) == 2
    wanted = files.load(twin / chain.name)
    for name, value in shown(panel).current.parameters.items():
        assert torch.equal(value, wanted.parameters[name]), name
    panel.change(panel.weaken)
    assert chain.read_bytes() == (twin / chain.name).read_bytes()
    panel.undo()
    assert chain.read_bytes() == content


def test_a_file_that_changed_behind_the_screen_is_shown_and_left_alone(panel, chain):
    Stack.open(chain).undo()  # as in a terminal
    content = chain.read_bytes()
    with pytest.raises(InputError, match="was changed since it was read"):
        panel.undo()
    assert chain.read_bytes() == content and shown(panel).current.n == 300
    panel.undo()
    assert Stack.open(chain).at == 0
    files.save(files.load(chain)._replace(comments=("by another program",)), chain)
    content = chain.read_bytes()
    with pytest.raises(InputError, match="changed by another program"):
        panel.redo()
    assert chain.read_bytes() == content


def test_nothing_changes_while_an_edit_is_under_way(panel, chain):
    class Busy:
        ended = False

    content, panel.app.job = chain.read_bytes(), Busy()
    panel.refresh()
    assert panel.back.disabled and panel.slider.disabled and "under way" in panel.said.content
    for action in (panel.undo, panel.reread):
        with pytest.raises(InputError, match="under way"):
            action()
    assert chain.read_bytes() == content and panel.again.disabled
    panel.app.job.ended = True
    panel.refresh()
    assert not panel.back.disabled and not panel.again.disabled


# ------------------------------------------------------------------------------------------------------ in a browser
@pytest.mark.browser
def test_undo_restores_the_picture(browser, chain):
    from screen import keep, open_page, pixels, until

    content = [chain.read_bytes()]
    Stack.open(chain).goto(0)
    content.insert(0, chain.read_bytes())
    with App(opened(files.load(chain), path=chain, up="-y")) as app:
        page = open_page(browser, app.url)

        def colours(page=page):
            """Shares of the picture that are green, and red or blue."""
            red, green, blue = np.moveaxis(pixels(page)[:, :300], 2, 0)  # left of the panel
            return np.mean(green > np.maximum(red, blue) + 40), np.mean(abs(red - blue) > 60)

        def still():
            """The picture, once it no longer changes; also a busy browser draws in between."""
            first = pixels(page)
            for _ in range(3):
                page.wait_for_timeout(150)
                if np.abs(pixels(page) - first).mean() >= 0.05:
                    return []
            return [first]

        until(page, lambda: colours()[1] > 0.1 and colours()[0] < 0.01, "the scene before the edits")
        (before,) = until(page, still, "a picture that stands still")
        page.get_by_role("tab", name="History", exact=True).click()
        page.get_by_role("button", name="Redo", exact=True).click()
        until(page, lambda: colours()[0] > 0.1 and colours()[1] < 0.01, "the edited scene, green")
        assert Stack.open(chain).at == 1
        keep(page, "history")
        (after,) = until(page, still, "a picture that stands still")
        page.get_by_role("button", name="Undo", exact=True).click()
        until(page, lambda: colours()[1] > 0.1 and colours()[0] < 0.01, "the scene before the edits again")
        assert chain.read_bytes() == content[0]
        (again,) = until(page, still, "a picture that stands still")
        left = np.s_[:, :300]
        assert np.abs(after - before)[left].mean() > 10 > 1 > np.abs(again - before)[left].mean()
        page.locator("canvas[data-engine]").click(position={"x": 20, "y": 380})
        page.keyboard.press("Control+Shift+Z")
        until(page, lambda: colours()[0] > 0.1, "redone by the keyboard")
        page.keyboard.press("Control+Z")
        until(page, lambda: colours()[1] > 0.1 and colours()[0] < 0.01, "undone by the keyboard")
        assert chain.read_bytes() == content[0] and page.errors == []
        page.context.close()
