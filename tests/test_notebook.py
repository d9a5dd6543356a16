"""The viewer and the progress of an edit in a cell: what is put out, in which order, and where the browser looks."""

import base64
import io
import os
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import splatedit
from splatedit import notebook
from splatedit.displays import job_numbers
from splatedit.errors import InputError
from splatedit.jobs import Job, launch

URL = "http://127.0.0.1:8123/secret/"


class Cell:
    """The outputs of a cell, as a notebook would hold them; those that can be renewed are."""

    def __init__(self):
        self.outputs = []

    def put(self, data):
        self.outputs.append(dict(data))
        return Handle(self, len(self.outputs) - 1)

    def kinds(self):
        return [sorted(set(output) - {"text/plain"}) for output in self.outputs]

    def picture(self, index):
        return Image.open(io.BytesIO(base64.b64decode(self.outputs[index]["image/png"])))


class Handle:
    def __init__(self, cell, index):
        self.cell, self.index = cell, index

    def update(self, data, raw):
        assert raw
        self.cell.outputs[self.index] = dict(data)


class FakeApp:
    """As much of a viewer as a cell needs."""

    def __init__(self, scene, other=None, **more):
        from splatedit.viewer.stage import opened

        source = scene if isinstance(scene, splatedit.Gaussians) else scene.source
        self.stage = type("Stage", (), {"shown": opened(source, other)})
        self.url, self.more, self.closed = URL, more, threading.Event()

    def close(self):
        self.closed.set()


@pytest.fixture
def cell(monkeypatch):
    """A cell, and viewers that are not opened."""
    import splatedit.viewer

    cell = Cell()
    for name in (notebook.BASE_URL, notebook.HUB_PREFIX):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(notebook, "put", cell.put)
    monkeypatch.setattr(notebook, "check_there", lambda otherwise: None)
    monkeypatch.setattr(notebook, "VIEWERS", {})
    monkeypatch.setattr(splatedit.viewer, "view", FakeApp)
    return cell


@pytest.fixture
def job(cloud):
    """An edit that waits for `job.go`, then has brightened the cloud, or failed with `job.go(error)`."""
    ready, failure = threading.Event(), []

    def edit(job):
        assert ready.wait(60)
        if failure:
            raise failure[0]
        job._result = cloud._replace(sh0=cloud.sh0 + 1)
        job.last = type("Last", (), {"gaussians": job._result, "loss": 0.5, "psnr_to_source": 20.0, "residuals": []})()
        job.done = job.steps

    def go(error=None):
        failure.extend([error] if error else [])
        ready.set()

    job = launch(Job(edit, 7, source=cloud))
    job.go = go
    yield job
    ready.set()


# ------------------------------------------------------------------------------------------------------------ addresses
@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, URL),
        ({"SPLATEDIT_BASE_URL": ""}, URL),
        ({"SPLATEDIT_BASE_URL": "/"}, "/proxy/8123/secret/"),
        ({"SPLATEDIT_BASE_URL": "/myhub/user/ann/"}, "/myhub/user/ann/proxy/8123/secret/"),
        ({"SPLATEDIT_BASE_URL": "/myhub/user/ann"}, "/myhub/user/ann/proxy/8123/secret/"),
        ({"SPLATEDIT_BASE_URL": "https://example.org/j/"}, "https://example.org/j/proxy/8123/secret/"),
        ({"SPLATEDIT_BASE_URL": "https://{port}.example.org/"}, "https://8123.example.org/secret/"),
        ({"SPLATEDIT_BASE_URL": "https://example.org/proxy/{{port}}"}, "https://example.org/proxy/8123/secret/"),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/ann/"}, "/user/ann/proxy/8123/secret/"),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/ann/", "SPLATEDIT_BASE_URL": "/b/"}, "/b/proxy/8123/secret/"),
    ],
)
def test_where_the_browser_looks(environment, found):
    assert notebook.address(URL, environment) == found


def test_pages_of_a_base_url_elsewhere_may_use_the_viewer(cell, cloud, monkeypatch):
    monkeypatch.setenv(notebook.BASE_URL, "https://example.org:8443/{port}/")
    cloud.show()
    ((_, app),) = notebook.VIEWERS.values()
    assert app.more == {"origins": ["https://example.org:8443"]}


def test_in_colab_its_own_function_is_asked(cell, cloud, monkeypatch):
    asked = []
    output = type("output", (), {"serve_kernel_port_as_iframe": lambda port, **more: asked.append((port, more))})
    monkeypatch.setitem(sys.modules, "google.colab", type("colab", (), {"output": output}))
    monkeypatch.setattr(FakeApp, "server", type("Server", (), {"get_port": lambda self: 8123})(), raising=False)
    monkeypatch.setattr(FakeApp, "token", "secret", raising=False)
    cloud.show(height=300)
    assert asked == [(8123, {"path": "/secret/", "height": "300"})] and cell.kinds() == [["image/png"]]


# ---------------------------------------------------------------------------------------------------------------- show
def test_a_picture_comes_before_the_viewer(cell, cloud):
    assert cloud.show(height=333) is None
    assert cell.kinds() == [["image/png"], ["text/html"]]
    html = cell.outputs[1]["text/html"]
    assert f'<iframe src="{URL}" width="100%" height="333"' in html and URL not in cell.outputs[0]["text/plain"]
    assert cell.picture(0).size == (256, 256)


def test_two_scenes_are_two_pictures(cell, cloud):
    cloud.show(cloud._replace(means=cloud.means + 1))
    assert cell.picture(0).width > 500


def test_shown_again_it_is_the_same_viewer(cell, cloud):
    for _ in range(2):
        cloud.show()
    assert len(notebook.VIEWERS) == 1
    ((_, first),) = notebook.VIEWERS.values()
    first.close()
    cloud.show()
    ((_, second),) = notebook.VIEWERS.values()
    assert second is not first, "one that was closed is not shown"


def test_another_scene_or_another_option_is_another_viewer(cell, cloud):
    """A scene of other colours shares its positions with the first one."""
    cloud.show()
    cloud._replace(sh0=-cloud.sh0).show()
    assert np.abs(np.asarray(cell.picture(0), int) - np.asarray(cell.picture(2), int)).max() > 50
    for _ in range(2):
        cloud.show(up="+z")
    assert [app.more for _, app in notebook.VIEWERS.values()] == [{}, {}, {"up": "+z"}]


def test_the_oldest_of_many_viewers_is_closed(cell, cloud):
    scenes = [cloud.detach() for _ in range(notebook.MOST + 1)]
    scenes[0].show()
    ((_, first),) = notebook.VIEWERS.values()
    for scene in scenes[1:]:
        scene.show()
    assert first.closed.is_set() and len(notebook.VIEWERS) == notebook.MOST


def test_show_in_a_script_says_what_to_do(cloud, job, monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    with pytest.raises(InputError, match="no notebook here.*splatedit.view"):
        cloud.show()
    with pytest.raises(InputError, match="no notebook here.*splatedit.view"):
        job.show()


def test_show_in_ipython_in_a_terminal_says_it_too(cloud, job, monkeypatch, capsys):
    """There each renewed output would be one more line, a second: a job is its line alone."""
    terminal = pytest.importorskip("IPython.terminal.interactiveshell").TerminalInteractiveShell
    monkeypatch.setattr(terminal, "initialized", lambda: True)
    monkeypatch.setattr("IPython.get_ipython", lambda: terminal)
    monkeypatch.setattr(notebook, "put", lambda data: pytest.fail("something was displayed"))
    with pytest.raises(InputError, match="no notebook here.*splatedit.view"):
        cloud.show()
    job._ipython_display_()
    assert capsys.readouterr().out == f"{job}\n"


def test_what_is_no_scene_cannot_be_shown_beside_one(cell, cloud):
    with pytest.raises(InputError, match="found str, expected Gaussians; splatedit.load"):
        cloud.show("pig.ply")


def test_the_picture_of_an_edit_is_renewed_at_its_end(cell, job):
    job.show()
    assert cell.kinds() == [["image/png"], ["text/html"]] and cell.picture(0).size == (256, 256)
    job.go()
    job.result(60)
    assert cell.picture(0).width > 500, "before and after"


def test_whoever_waits_renews_it_too(cell, job):
    """A notebook that runs unattended drops what another thread puts out while another cell runs."""
    job.show()
    job.go()
    job.thread.join(60)
    before = cell.outputs[0]
    cell.outputs[0] = {}
    assert job.wait(60) and cell.outputs[0] == before


# ------------------------------------------------------------------------------------------------------------- progress
def test_a_job_in_a_cell_is_a_picture_and_a_widget(cell, job):
    pytest.importorskip("ipywidgets")
    job._ipython_display_()
    assert cell.kinds()[0] == ["image/png"] and "widget-view" in cell.kinds()[1][0]
    assert cell.outputs[1]["text/plain"].startswith("<"), "which the builder of notebooks drops"


def test_a_run_that_has_not_loaded_its_scene_gets_its_picture_at_the_end(cell, job, cloud):
    pytest.importorskip("ipywidgets")
    job.source = None
    job._ipython_display_()
    assert cell.kinds()[0] == [] and cell.outputs[0]["text/plain"] == repr(job)
    job.source = cloud
    job.go()
    ended(job)
    assert cell.picture(0).width > 500, "before and after"


def ended(job):
    """The job once all that follows it has seen its end."""
    job.wait(60)
    for thread in threading.enumerate():
        if thread.name in ("splatedit-progress", "splatedit-edit"):
            thread.join(60)


def parts(widget):
    """All widgets inside one another, by kind."""
    found = {}
    waiting = [widget]
    while waiting:
        widget = waiting.pop(0)
        found.setdefault(type(widget).__name__, []).append(widget)
        waiting += getattr(widget, "children", ())
    return found


def test_the_widget_follows_the_edit_and_its_buttons_steer_it(job, monkeypatch):
    pytest.importorskip("ipywidgets")
    did = []
    for name in ("pause", "resume", "step", "stop"):
        monkeypatch.setattr(job, name, lambda name=name: did.append(name))
    seen = parts(job.progress())
    (bar,), (picture,), (pause, step, stop) = seen["FloatProgress"], seen["Image"], seen["Button"]
    numbers, _, state = seen["HTML"]
    assert bar.value == 0 and Image.open(io.BytesIO(picture.value)).size == (192, 192)
    job._state = "running"
    for button in (pause, step, stop):
        button.click()
    job._state = "paused"
    pause.click()
    assert did == ["pause", "step", "stop", "resume"]
    job.go()
    ended(job)
    assert bar.value == 1 and bar.bar_style == "success" and pause.disabled and stop.disabled
    assert "7 of 7 steps, loss 0.5" in numbers.value and "done" in state.value


@pytest.mark.parametrize(
    ("error", "words"),
    [(InputError("prompt: <b> is no word."), "prompt: &lt;b&gt; is no word."), (KeyError("k"), "KeyError")],
)
def test_what_goes_wrong_is_seen_in_the_cell(job, error, words):
    pytest.importorskip("ipywidgets")
    seen = parts(job.progress())
    job.go(error)
    ended(job)
    assert words in seen["HTML"][1].value and seen["FloatProgress"][0].bar_style == "danger"
    with pytest.raises(type(error)):
        job.result()
    assert words in job._repr_mimebundle_()["text/html"]


def test_without_ipywidgets_the_output_is_renewed(cell, job, monkeypatch):
    monkeypatch.setattr(notebook, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(InputError, match='pip install "splatedit'):
        job.progress()
    job._ipython_display_()
    assert cell.kinds() == [["text/html"]] and "0 of 7 steps" in cell.outputs[0]["text/html"]
    job.go()
    ended(job)
    assert "7 of 7 steps" in cell.outputs[0]["text/html"] and "<b>done</b>" in cell.outputs[0]["text/html"]


def test_a_job_is_a_short_line(job):
    assert repr(job) == "Job(starting, 0 of 7 steps)" and job_numbers(job) == "0 of 7 steps"


# ------------------------------------------------------------------------------------------------------------- mistakes
def test_a_mistake_is_one_line_in_ipython(capsys):
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shell.run_cell("from splatedit.errors import InputError\nraise InputError('steps: found 0, expected 1.')")
    out = capsys.readouterr().out
    assert "InputError: steps: found 0, expected 1." in out and "Traceback" not in out and len(out.splitlines()) <= 2


def test_steps_can_be_waited_for(cloud, tiny_model, one_thread):
    """As notebook 01 does: held before the first step, two steps, the rest."""
    job = splatedit.start(cloud, "a pig", "a cat", model=str(tiny_model), steps=4, views=2)
    job.pause()
    assert job.settle(60) and job.done == 0 and job.last is None
    job.step(2)
    assert job.settle(60) and job.done == 2 and job.state == "paused"
    job.resume()
    assert job.result(60).n == 300 and job.settle(0) and job.done == 4


# -------------------------------------------------------------------------------------------------------- in a notebook
@pytest.mark.slow
def test_a_notebook_that_runs_unattended_holds_the_result(tmp_path, scene_file, tiny_model):
    """Start, show, wait: what is left in the file is before and after, then what was live."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    cells = [
        f"import splatedit\ngaussians = splatedit.load({str(scene_file)!r})",
        f'job = splatedit.start(gaussians, "a pig", "a cat", model={str(tiny_model)!r}, steps=3, views=3)\njob.show()',
        "job",
        "pig = job.result()",
        'splatedit.start(gaussians, "a zzz", "a cat", steps=2, views=2).result()',
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client.NotebookClient(book, timeout=240, allow_errors=True, kernel_name="python3").execute(env=dict(os.environ))
    picture, live = (output["data"] for output in book.cells[1].outputs)
    assert Image.open(io.BytesIO(base64.b64decode(picture["image/png"]))).width > 500, "before and after"
    assert "<iframe" in live["text/html"] and "image/png" not in live
    (error,) = book.cells[4].outputs
    assert error["ename"] == "InputError" and len(error["traceback"]) == 1 and "zzz" in error["traceback"][0]
