"""`splatedit diagnose`: one page, whole or not at all, the same for the same words."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from splatedit import diagnose as module
from splatedit.cli import main
from splatedit.diagnose import QUICK, diagnose
from splatedit.figures import FIGURES

SHORT = QUICK._replace(levels=(500,), curve=2, lams=(1.0,), sweep_steps=2, edit_steps=2, guidances=("dds", "cds"))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(module, "QUICK", SHORT)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def call(monkeypatch, capfd, *words):
    monkeypatch.setattr(sys, "argv", ["splatedit", "diagnose", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capfd.readouterr()


def test_page_of_a_scene(scene_file, tiny_model, tmp_path, monkeypatch, capfd, short):
    page = tmp_path / "page.html"
    words = (scene_file, "a pig", "--source", "a cat", "--model", tiny_model, "-o", page, "--quick", "--seed", 3)
    status, out, err = call(monkeypatch, capfd, *words)
    assert status == 0 and out.strip() == str(page), err
    text = page.read_text(encoding="utf-8")
    assert "a cat → a pig" in text and text.count('src="data:image/svg+xml;base64,') == len(FIGURES)
    assert set(re.findall(r'download="(\w+)\.csv"', text)) == set(FIGURES)
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in re.sub(r'"data:[^"]*"|http-equiv', "", text)
    assert "solver t iteration drift" in re.sub(r'<th scope="col">(\w+)', r" \1", text) and "picard_null" in text


def test_page_of_a_picture_is_the_same_again(photo, tiny_model, tmp_path, monkeypatch, short):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("splatedit.figures.svg", lambda figure: b"")  # test_diagnostics draws one twice
    options = {"source": "a cat", "model": str(tiny_model), "quick": True, "device": "cpu"}
    first = diagnose(photo, "a dog", **options)
    assert first.name == "photo-diagnosis.html"
    assert first.read_bytes() == diagnose(photo, "a dog", output="again.html", **options).read_bytes()


def test_full_plan_measures_every_guidance_and_solver():
    from splatedit.guidance import GUIDANCE

    assert {*module.FULL.edits} == {"dds", "cds", "pds", "ids"}
    assert {*GUIDANCE} - {*module.FULL.guidances} == {"vsd", "sdi"}  # one learns, the other inverts: no single draw
    assert {*module.SHOWN} == {*FIGURES}


def test_source_prompt_of_the_sidecar(photo, tiny_model):
    from splatedit.priors import load_prior

    prior = load_prior(str(tiny_model))
    photo.with_suffix(".yaml").write_text("source_prompt: a pig\n")
    assert module.look(prior, photo, "a dog", None, 1, 0)[0].source == "a pig"
    assert module.look(prior, photo, "a dog", "a cat", 1, 0)[0].source == "a cat"
    photo.with_suffix(".yaml").unlink()
    found, origin = module.look(prior, photo, "a dog", None, 1, 0)
    assert found.source in prior.vocabulary and origin == "found by the model"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: "nothing.ply"}, "nothing.ply: no such file"),
        ({1: " "}, "prompt: it is empty"),
        ({3: "page.pdf"}, "ends in .html"),
        ({3: "no/folder/page.html"}, "cannot be written"),
        ({5: "-1"}, "seed"),
        ({7: "no-such-model"}, "no-such-model"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(change, words, photo, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    given = [photo, "a pig", "-o", "page.html", "--seed", "0", "--model", "pocket", "--offline"]
    for place, word in change.items():
        given[place] = word
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(monkeypatch, capfd, *given)
    assert status == 2 and not out and len(err.splitlines()) == 1 and words in err
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_kind_of_file(tmp_path, tiny_model, monkeypatch, capfd):
    (tmp_path / "a.txt").write_text("x")
    status, _, err = call(
        monkeypatch, capfd, tmp_path / "a.txt", "a pig", "--model", tiny_model, "-o", tmp_path / "b.html"
    )
    assert status == 2 and "neither a splat file" in err and not (tmp_path / "b.html").exists()


def test_without_matplotlib_the_extra_is_named(photo, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = call(monkeypatch, capfd, photo, "a pig", "-o", tmp_path / "page.html")
    assert status == 2 and 'pip install "splatedit[notebook]"' in err and len(err.splitlines()) == 1


def test_nothing_is_written_when_it_breaks(photo, tiny_model, tmp_path, monkeypatch, short):
    def broken(table):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "section", broken)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        diagnose(photo, "a pig", "a cat", model=str(tiny_model), output=tmp_path / "page.html", quick=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_documented_python_runs(photo, tiny_model, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    for old, new in (('"cat.png", 128', f"{str(photo)!r}, 32"), ('"pocket"', repr(str(tiny_model)))):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "diagnostics.md", "exec"), {})
    assert (tmp_path / "drift.png").stat().st_size > 0
