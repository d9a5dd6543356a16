"""`splatedit lab`: what it copies and starts, and, in a real browser, a notebook in which an edit is watched live."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from splatedit import lab
from splatedit.errors import InputError
from tests.screen import keep, open_page, until

ROOT = Path(__file__).parent.parent
FRAME, CANVAS = ".jp-OutputArea iframe", "canvas[data-engine]"
ITS_TOKEN, TOKEN = "--IdentityProvider.token", "for-the-test"


# ----------------------------------------------------------------------------------------------------------- no browser
@pytest.fixture
def place(tmp_path):
    """Something like the bundled notebooks."""
    for name in ("notebooks/01_a.ipynb", "notebooks/01_a.py", "notebooks/build.py", "scenes/cat.ply"):
        path = tmp_path / "bundled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "bundled"


def test_what_is_missing_is_copied_and_what_is_yours_stays(place, tmp_path):
    target = tmp_path / "mine"
    assert len(list(lab.bring(place, target))) == 2
    assert sorted(p.name for p in target.rglob("*") if p.is_file()) == ["01_a.ipynb", "01_a.py", "cat.ply"]
    assert list(lab.bring(place, target)) == [], "all is there already"
    (target / "notebooks" / "01_a.ipynb").write_text("mine")
    (target / "notebooks" / "01_a.py").unlink()
    copied, kept = lab.bring(place, target)
    assert "1 files copied" in copied and "yours" in kept and "01_a.ipynb" in kept
    assert (target / "notebooks" / "01_a.ipynb").read_text() == "mine"
    assert (target / "notebooks" / "01_a.py").read_text() == "notebooks/01_a.py"


def test_in_the_checkout_nothing_is_copied(place):
    before = sorted(place.rglob("*"))
    assert list(lab.bring(place, place)) == [] and sorted(place.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*cannot be written to"):
        list(lab.bring(place, tmp_path / "file"))


def test_the_checkout_is_found():
    assert lab.bundled() == ROOT


def test_an_installed_package_has_them_in_its_data(place, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "site-packages" / "splatedit" / "lab.py"))
    monkeypatch.setattr(lab, "installed", lambda: [str(tmp_path / "env")])
    with pytest.raises(InputError, match="notebooks are in none of .*env.*; install splatedit anew"):
        lab.bundled()
    (tmp_path / "env" / "share").mkdir(parents=True)
    place.rename(tmp_path / "env" / "share" / "splatedit")
    assert lab.bundled() == tmp_path / "env" / "share" / "splatedit"


def test_they_are_found_beside_a_package_that_pip_was_given_a_target_for(place, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "target" / "splatedit" / "lab.py"))
    (tmp_path / "target" / "share").mkdir(parents=True)
    place.rename(tmp_path / "target" / "share" / "splatedit")
    shutil.copytree(tmp_path / "target" / "share", tmp_path / "env" / "share")  # that of another version
    monkeypatch.setattr(lab.sysconfig, "get_path", lambda *_: str(tmp_path / "env"))
    assert lab.bundled() == tmp_path / "target" / "share" / "splatedit"


def test_the_kernel_is_this_python():
    with lab.kernels() as data:
        (spec,) = data.glob("kernels/*/kernel.json")
        assert spec.parent.name == "python3" and json.loads(spec.read_text())["argv"][0] == sys.executable
    assert not data.exists()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "/"),
        (["--no-browser"], "/"),
        (["--ServerApp.base_url=/hub/ann"], "/hub/ann/"),
        (["--ServerApp.base_url", "hub/ann/"], "/hub/ann/"),
        (["--ServerApp.base_url=/"], "/"),
    ],
)
def test_base_url(words, found):
    assert lab.base_url(words) == found


def test_kernels_are_told_how_to_reach_viewers(tmp_path):
    pytest.importorskip("jupyter_server_proxy")
    told = lab.environment({"JUPYTER_PATH": "/mine", "PYTHONPATH": "/theirs"}, ["--ServerApp.base_url=/x"], tmp_path)
    assert told["SPLATEDIT_BASE_URL"] == "/x/"
    assert told["JUPYTER_PATH"] == f"{tmp_path}{os.pathsep}/mine", "our kernel comes first"
    assert told["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/theirs"]
    said = lab.environment({"SPLATEDIT_BASE_URL": "https://mine/"}, [], tmp_path)
    assert said["SPLATEDIT_BASE_URL"] == "https://mine/", "the user's word is the last"
    assert "SPLATEDIT_BASE_URL" not in lab.environment({"JUPYTERHUB_SERVICE_PREFIX": "/user/ann/"}, [], tmp_path)


def test_options_of_jupyter_are_passed_on(monkeypatch, call, tmp_path):
    pytest.importorskip("jupyterlab")
    started = []
    monkeypatch.setattr(lab, "attended", lambda words, environment: started.append(words) or 0)
    monkeypatch.setattr(lab, "bring", lambda place, folder: [])
    assert call("lab", tmp_path, "--port", "8123", "--no-browser", "--ip", "0.0.0.0")[0] == 0
    assert call("lab", "--no-browser")[0] == 0
    first, second = started
    assert f"--ServerApp.root_dir={tmp_path}" in first and f"--ServerApp.root_dir={Path.cwd()}" in second
    assert first[-4:] == ["--no-browser", "--ip", "0.0.0.0", "--ServerApp.port=8123"]
    assert second[-1] == "--no-browser"
    assert not any("token" in word for word in first), "Jupyter's own token stays on"


def test_without_jupyterlab_it_says_what_to_install(monkeypatch, call, tmp_path):
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None)
    status, out, err = call("lab", tmp_path)
    assert status == 2 and 'pip install "splatedit[notebook]"' in err and not out
    assert not any(tmp_path.iterdir())


def test_it_ends_as_the_program_that_it_started():
    assert lab.attended([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == 3


# --------------------------------------------------------------------------------------------------------- in a browser
CELLS = (
    "import splatedit\ngaussians = splatedit.load({scene!r})\ngaussians",
    'job = splatedit.start(gaussians, "a pig", source="a cat", model={model!r}, steps=5000, views=3)\njob.pause()\njob',
    "job.show(height=320)",
    "splatedit.compare(gaussians, gaussians._replace(sh0=-gaussians.sh0), size=200)",
)


@pytest.fixture
def notebook(scene_file, tiny_model, tmp_path):
    """A notebook in which a small edit is started and shown."""
    nbformat = pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(cell.format(scene=str(scene_file), model=str(tiny_model))) for cell in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}  # or Lab asks
    path = tmp_path / "work" / "notebooks" / "try.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a notebook by `splatedit lab`, as one who types the command would."""
    pytest.importorskip("jupyterlab")
    started = []

    def open_lab(path: Path, **environment: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = [
            "--no-browser",
            "--allow-root",
            f"--IdentityProvider.token={TOKEN}",
            "--LabApp.expose_app_in_browser=True",
        ]
        places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTERLAB_SETTINGS_DIR": "settings"}
        config = {name: str(tmp_path / place) for name, place in places.items()}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "splatedit", "lab", path.parent.parent, "--port", str(port), *words],
                cwd=ROOT,
                env={**os.environ, **config, **environment},
                stderr=subprocess.DEVNULL,
            )
        )
        answers(f"http://127.0.0.1:{port}/api/status?token={TOKEN}")
        page = open_page(browser, f"http://127.0.0.1:{port}/lab/tree/notebooks/{path.name}?token={TOKEN}", 1280, 1000)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        until(page, lambda: page.evaluate(IDLE), "a kernel")
        return page

    yield open_lab
    for server in started:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) is not None


IDLE = """() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"""


def answers(url: str, seconds: float = 60.0) -> None:
    """Wait until somebody answers there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {url}")


def middle(page) -> np.ndarray:
    """What the viewer in the cell shows where neither its panel nor a notification covers it, (h, w, 3) int."""
    page.locator(FRAME).scroll_into_view_if_needed()
    box = page.frame_locator(FRAME).locator(CANVAS).bounding_box()
    part = {"x": box["x"] + box["width"] / 8, "y": box["y"] + box["height"] / 2}
    shot = page.screenshot(clip={**part, "width": box["width"] * 3 / 8, "height": box["height"] / 2})
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def drawn(image: np.ndarray) -> float:
    """Share of the pixels that are not of one colour, the background's at the lower left."""
    return float((np.abs(image - image[-3, 2]) > 24).any(2).mean())


def run(page, which: str, cell: int = 0) -> None:
    """Run cells: "all-cells", "all-above" this one, "all-below" from it on, or this "cell"."""
    page.evaluate(f"() => {{ window.jupyterapp.shell.currentWidget.content.activeCellIndex = {cell} }}")
    page.evaluate(f"() => {{ window.jupyterapp.commands.execute('notebook:run-{which}') }}")


def watched(page) -> np.ndarray:
    """What the live viewer in its cell shows, once splats are to be seen there and nothing moves."""
    page.locator(FRAME).wait_for(timeout=120_000)
    assert page.locator(FRAME).get_attribute("src").startswith("/proxy/"), "through JupyterLab"
    page.frame_locator(FRAME).locator(CANVAS).wait_for(timeout=120_000)
    until(page, lambda: drawn(middle(page)) > 0.03, "splats in the cell", 120)
    past: list[np.ndarray] = []

    def still() -> bool:
        past.append(middle(page))
        return len(past) > 3 and all(np.abs(past[-1] - other).max() < 4 for other in past[-4:-1])

    until(page, still, "the scene has faded in", 120)
    assert np.abs(middle(page) - past[-1]).mean() < 0.5, "nothing moves while the edit is held"
    return past[-1]


@pytest.mark.browser
def test_an_edit_is_watched_in_a_cell(notebook, opened):
    page = opened(notebook)
    run(page, "all-cells")
    first = watched(page)
    keep(page, "lab_paused")
    kinds = page.evaluate(OUTPUTS)
    assert kinds[0] == ["text/html"] and kinds[2] == ["image/png", "text/html"], "a picture, then what is live"
    assert kinds[1][0] == "image/png" and "widget-view" in kinds[1][1]
    page.get_by_role("button", name="Resume").click()
    until(page, lambda: np.abs(middle(page) - first).mean() > 3, "the splats change while the edit runs")
    keep(page, "lab_running")
    page.get_by_role("button", name="Stop").click()
    until(page, lambda: page.get_by_text("stopped", exact=True).count(), "Stop, in the cell of `job`, stops the edit")
    keep(page, "lab_stopped")
    pair, handle = page.locator(".pair.live"), page.locator(".pair.live input")

    def clicked() -> bool:  # again if outputs above it are put in their place meanwhile
        pair.scroll_into_view_if_needed()
        box = pair.bounding_box()
        page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
        return 20 <= int(handle.input_value()) <= 30

    until(page, clicked, "the handle goes where the mouse is")
    page.keyboard.press("ArrowLeft")
    assert 19 <= int(handle.input_value()) <= 29, "and the arrow keys are its own"
    keep(page, "lab_slider")
    assert not [error for error in page.errors if "splatedit" in error]


@pytest.mark.browser
def test_notebook_01_in_the_lab(opened, tmp_path):
    """The first notebook, as `splatedit lab` brings it: its viewer changes while the cells below it run."""
    nbformat = pytest.importorskip("nbformat")
    name = "01_first_edit.ipynb"
    page = opened(tmp_path / "mine" / "notebooks" / name, SPLATEDIT_QUICK="1")
    sources = [cell.source for cell in nbformat.read(tmp_path / "mine" / "notebooks" / name, 4).cells]
    shown = sources.index("job.show()")
    run(page, "all-above", shown)
    run(page, "cell", shown)
    first = watched(page)
    keep(page, "lab_01_held")
    run(page, "all-below", shown + 1)
    until(page, lambda: np.abs(middle(page) - first).mean() > 1, "the viewer shows the edit", 180)
    keep(page, "lab_01_edited")
    until(page, lambda: page.evaluate(COUNTS)[-1] is not None, "the last cell has run", 180)
    assert "error" not in page.evaluate(KINDS)
    assert (tmp_path / "mine" / "outputs" / "pig.ply").stat().st_size > 500_000


CODE = "window.jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code')"
COUNTS = f"() => {CODE}.map(cell => cell.model.executionCount)"
KINDS = f"() => {CODE}.flatMap(cell => cell.model.outputs.toJSON().map(output => output.output_type))"
# Of each cell the kinds of its outputs.
OUTPUTS = """() => window.jupyterapp.shell.currentWidget.content.widgets.map(cell =>
  cell.model.outputs.toJSON().map(output => Object.keys(output.data || {}).filter(k => k !== 'text/plain').join()))"""
