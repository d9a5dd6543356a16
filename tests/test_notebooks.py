"""The notebooks: every pair agrees, its outputs are fit to be committed, and the builder sees what is not.

That they run is the business of nbmake: SPLATEDIT_QUICK=1 pytest --nbmake notebooks
"""

import base64
import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from splatedit.sizes import QUICK, size

pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair(build, tmp_path):
    """A notebook of one text and one call, as `build` would have written it."""
    source = tmp_path / "99_test.py"
    source.write_text("# %% [markdown]\n# # A title\n\n# %%\nprint(1)\n")
    png = io.BytesIO()
    Image.new("RGB", (2, 2)).save(png, "PNG")
    notebook = build.read(source)
    notebook.cells[1].execution_count = 1
    notebook.cells[1].outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="1\n"),
        nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(png.getvalue()).decode()}),
    ]
    return source, notebook


def write(source, notebook):
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return source


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_each_pair_agrees_and_its_outputs_are_fit(build, source):
    assert list(build.problems(source)) == []


def test_all_are_there_small_and_in_the_readme(build):
    assert len(SOURCES) == len(list(FOLDER.glob("*.ipynb"))) >= 2
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) <= build.LARGEST
    linked = re.findall(r"\((\d\d_\w+\.ipynb)\)", (FOLDER / "README.md").read_text())
    assert linked == [source.with_suffix(".ipynb").name for source in SOURCES]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_each_teaches(build, source):
    """Opens with a title, explains what it calls, and keeps its cells short."""
    cells = build.read(source).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    code = [cell.source.splitlines() for cell in cells if cell.cell_type == "code"]
    assert len(cells) - len(code) >= len(code) / 2
    assert max(map(len, code)) <= 30, "a cell of more than 30 lines: does the library lack a function?"


def test_a_sound_pair_has_no_problems(build, pair):
    assert list(build.problems(write(*pair))) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda cells: cells[0].update(source="# Another title"), "disagree from cell 0"),
        (lambda cells: cells.append(nbformat.v4.new_markdown_cell("more")), "disagree from cell 2"),
        (lambda cells: cells[1].update(execution_count=7), "not run from top to bottom"),
        (lambda cells: cells[1].update(metadata={"execution": {"iopub.execute_input": "2026"}}), "metadata"),
        (lambda cells: cells[1].outputs.pop(), "shows no picture"),
        (lambda cells: cells[1].outputs[0].update(name="stderr"), "wrote to stderr"),
        (lambda cells: cells[1].outputs[0].update(text="saved /home/ann/pig.ply"), "one machine only"),
        (lambda cells: cells[1].outputs[0].update(text="http://127.0.0.1:8080/abc"), "one machine only"),
        (lambda cells: cells[1].outputs[1].data.update({"text/html": "<iframe src=x>"}), "holds a live page"),
        (lambda cells: cells[1].outputs[1].data.update({"application/json": {}}), "holds application/json"),
        (lambda cells: cells[1].outputs[1].data.update({"image/png": base64.b64encode(b"GIF89a").decode()}), "is none"),
        (
            lambda cells: cells[1].outputs.append(nbformat.v4.new_output("error", ename="InputError", evalue="no")),
            r"cell \[1\]: ended in InputError: no",
        ),
    ],
)
def test_what_is_not_fit_to_commit_is_named(build, pair, spoil, words):
    source, notebook = pair
    spoil(notebook.cells)
    found = list(build.problems(write(source, notebook)))
    assert len(found) == 1 and re.search(words, found[0])


def test_a_notebook_that_was_never_run_is_named(build, pair):
    assert list(build.problems(pair[0])) == ["has not been run"]


def test_only_what_stays_true_is_kept(build, pair):
    """Of a live viewer its picture stays, of a progress bar nothing; a table stays."""
    source, notebook = pair
    new, picture = nbformat.v4.new_output, dict(notebook.cells[1].outputs[1].data)
    plain = "<IPython.core.display.HTML object>"
    notebook.cells[1].outputs = [
        new("display_data", picture),
        new("display_data", {"text/html": "<iframe src='http://127.0.0.1:1'>", "text/plain": plain}),
        new("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": plain}),
        new("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "HBox(children=())"}),
        new("stream", name="stderr", text="  3%|"),
        new("display_data", {"text/html": "<table><script>x()</script>", "text/plain": "drift 0.2"}),
        new("execute_result", {"text/html": "<table>", "text/plain": "drift 0.2"}, execution_count=1),
        new("display_data", {**picture, "text/html": "<table>"}),
        new("display_data", {**picture, "text/plain": "<Figure size 640x480>"}, metadata={"needs_background": "light"}),
    ]
    notebook.cells[1].metadata["collapsed"] = False
    build.strip(notebook)
    plain, table = {"text/plain": "drift 0.2"}, {"text/html": "<table>", "text/plain": "drift 0.2"}
    assert [dict(output.data) for output in notebook.cells[1].outputs] == [picture, plain, table, picture, picture]
    assert list(build.problems(write(source, notebook))) == []


def test_a_notebook_reads_the_same_twice(build):
    for source in SOURCES[:1]:
        assert nbformat.writes(build.read(source)) == nbformat.writes(build.read(source))


def test_sizes(monkeypatch):
    for value, found in ((None, 600), ("", 600), ("0", 600), ("1", 60)):
        monkeypatch.delenv(QUICK, raising=False)
        if value is not None:
            monkeypatch.setenv(QUICK, value)
        assert size(600, quick=60) == found


def test_large_pictures_lose_colours_but_not_their_looks(build, monkeypatch):
    monkeypatch.setattr(build, "EXACT", 5_000)
    ramp = np.linspace(0, 250, 100)
    smooth = np.stack([*np.meshgrid(ramp, ramp), np.zeros((100, 100))], 2)
    picture = Image.fromarray((smooth + np.random.default_rng(0).integers(0, 4, (100, 100, 1))).astype(np.uint8))

    def png(**options):
        stream = io.BytesIO()
        picture.save(stream, "PNG", **options)
        return stream.getvalue()

    small = build.smaller(png())
    assert len(small) < len(png()) / 2
    seen = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    assert np.abs(seen - np.asarray(picture)).mean() < 8
    film = png(save_all=True, append_images=[picture.transpose(Image.Transpose.TRANSPOSE)])
    assert build.smaller(film) == film


def test_new_prose_keeps_the_outputs_and_new_code_does_not(build, pair):
    source, notebook = pair
    write(source, notebook)
    source.write_text("# %% [markdown]\n# # A better title\n\n# %%\nprint(1)\n")
    fresh = build.read(source)
    build.reuse(fresh, source.with_suffix(".ipynb"))
    write(source, fresh)
    assert list(build.problems(source)) == [] and fresh.cells[1].outputs == notebook.cells[1].outputs
    source.write_text("# %% [markdown]\n# # A better title\n\n# %%\nprint(2)\n")
    with pytest.raises(SystemExit, match="code has changed"):
        build.reuse(build.read(source), source.with_suffix(".ipynb"))


@pytest.mark.slow  # starts kernels
def test_a_notebook_is_run_in_full_size_and_its_first_error_is_told(build, tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv(QUICK, "1")
    source = tmp_path / "99_test.py"
    source.write_text("# %%\nfrom splatedit.sizes import size\n\nsize(600, quick=60)\n")
    notebook = build.read(source)
    build.run(notebook)
    assert notebook.cells[0].outputs[0].data == {"text/plain": "600"} and notebook.cells[0].execution_count == 1
    source.write_text("# %%\nprint(1)\n\n# %%\n1 / 0\n")
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        build.run(build.read(source))


@pytest.mark.slow
def test_the_cells_that_need_a_gpu_run_with_the_bundled_model_instead(build, tmp_path):
    source = (FOLDER / "07_your_own_scene.py").read_text()
    for old, new in (
        ('MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"', 'MODEL = "pocket"'),
        ('DEVICE = "cuda"', 'DEVICE = "cpu"'),
        ("STEPS = 500", "STEPS = 10"),
        ('"vram": 12', f'"output_dir": {str(tmp_path)!r}'),
    ):
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "07_cpu.py").write_text(source)
    notebook = build.read(tmp_path / "07_cpu.py")
    build.run(notebook)
    said = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "All there." in said and "verdict:" in said
    drawn = [o for cell in notebook.cells[-8:] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(drawn) >= 3, "two views first, the edited scene, the comparison"
