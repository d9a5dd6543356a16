"""The export tab: what it writes is what was chosen, and nothing is replaced unasked."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from splatedit import files
from splatedit.config import Config
from splatedit.errors import InputError
from splatedit.formats import FORMATS
from splatedit.viewer import places
from splatedit.viewer.panels import export
from splatedit.viewer.panels.export import Wish
from splatedit.viewer.stage import opened

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shown(cloud, scene_file):
    """The cloud, and an edit of it: moved, the first ten splats gone, two added; every second one is selected."""
    rows = torch.cat([torch.arange(10, 300), torch.tensor([-1, -1])])
    moved = cloud.select(rows.clamp(min=0))
    moved = moved._replace(means=moved.means + 1)
    return opened(cloud, moved, path=scene_file)._replace(rows=rows, selection=torch.arange(300) % 2 == 0)


def equal(a, b):
    return all(torch.equal(value, b.parameters[name]) for name, value in a.parameters.items())


@pytest.mark.parametrize("format", export.writable())
def test_every_format_is_written_as_save_writes_it(shown, tmp_path, format):
    path = tmp_path / "new" / f"out{export.ending(format)}"
    count = export.save_as(shown, Wish("current", format, None), path)
    assert count == path.stat().st_size > 0
    found = files.load(path)
    assert found.n == shown.current.n
    if format == "ply":
        assert equal(found, shown.current) and np.array_equal(found.extra["label"], shown.current.extra["label"])
    assert export.as_bytes(shown, Wish("current", format, None), "x") == path.read_bytes(), "as it is downloaded"


def test_formats_that_are_only_read_are_not_offered():
    assert set(export.writable()) == {name for name, form in FORMATS.items() if form.write}
    assert "ksplat" not in export.writable()


def test_what_is_chosen_is_what_is_written(shown):
    assert export.chosen(shown, "before") is shown.source and export.chosen(shown, "current") is shown.current
    inside, rest = export.chosen(shown, "selection"), export.chosen(shown, "all but the selection")
    assert inside.extra["label"].tolist() == list(range(10, 300, 2))
    assert rest.extra["label"].tolist() == [*range(11, 300, 2), 0, 0], "added splats belong to no selection"
    assert (inside.means - shown.source.means[10::2]).mean().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "what", "said"),
    [
        ({"selection": None}, "selection", "nothing is selected"),
        ({"selection": torch.zeros(300, dtype=torch.bool)}, "selection", "nothing is selected"),
        ({"rows": None}, "selection", "which of these splats"),
        (
            {"selection": torch.ones(300, dtype=torch.bool), "rows": torch.arange(292)},
            "all but the selection",
            "no splat",
        ),
    ],
)
def test_a_selection_that_says_nothing_is_refused(shown, change, what, said):
    with pytest.raises(InputError, match=said):
        export.chosen(shown._replace(**change), what)
    assert said in export.told(shown._replace(**change), Wish(what, "ply", None))


def test_the_degree_and_what_is_lost(shown):
    assert export.prepared(shown, Wish("current", "ply", 0)).sh_degree == 0
    assert export.prepared(shown, Wish("current", "ply", 3)).sh_degree == 3
    assert export.losses(shown, Wish("current", "ply", None)) == []
    assert export.losses(shown, Wish("current", "ply", 0)) == ["spherical harmonics above degree 0"]
    assert "292 splats, SH degree 1. Nothing is lost." == export.told(shown, Wish("current", "ply", None))
    lost = export.told(shown, Wish("current", "splat", None))
    assert all(phrase in lost for phrase in FORMATS["splat"].losses(shown.current)) and "**Lost:**" in lost


def test_nothing_is_replaced_unasked(shown, scene_file, tmp_path):
    wish, path = Wish("current", "ply", None), tmp_path / "out.ply"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="say where"):
        export.save_as(shown, wish, Path(""))
    with pytest.raises(InputError, match="is there already; tick"):
        export.save_as(shown, wish, path)
    assert path.read_bytes() == b"mine"
    export.save_as(shown, wish, path, overwrite=True)
    assert equal(files.load(path), shown.current)
    content, link = scene_file.read_bytes(), tmp_path / "link.ply"
    os.symlink(scene_file, link)
    for shown_file in (scene_file, link):
        with pytest.raises(InputError, match="is the file that is shown"):
            export.save_as(shown, wish, shown_file, overwrite=True)
    assert scene_file.read_bytes() == content
    for wrong in ("out.spz", "out", "out.compressed.ply"):
        with pytest.raises(InputError, match="the name of a ply file ends in .ply; choose"):
            export.save_as(shown, wish, tmp_path / wrong)
    broken = shown._replace(current=shown.current._replace(means=shown.current.means * math.nan))
    with pytest.raises(InputError):
        export.save_as(broken, wish, path, overwrite=True)
    assert equal(files.load(path), shown.current), "a scene that cannot be written leaves the file as it was"


def test_where_things_go(shown, tmp_path):
    config = Config(output_dir=str(tmp_path / "outputs"))
    folder = places.folder_of(shown, config)
    assert folder == tmp_path / "outputs" / "ball"
    assert export.default_path(folder, "ball", Wish("selection", "spz", None)).name == "ball-export-selection.spz"
    run = tmp_path / "outputs" / "cat" / "a-pig@1"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert places.folder_of(shown._replace(path=run / "edited.ply"), config) == run
    assert places.stem(shown._replace(path=Path("a/cat.compressed.ply"))) == "cat"
    assert places.stem(shown._replace(path=None)) == "scene"
    (tmp_path / "film.mp4").touch()
    (tmp_path / "film-2.mp4").touch()
    assert places.unused(tmp_path / "film.mp4") == tmp_path / "film-3.mp4"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        files.made(tmp_path / "file" / "folder")


# ------------------------------------------------------------------------------------------------------ in a browser
@pytest.mark.browser
def test_a_file_is_saved_and_downloaded(browser, shown, tmp_path):
    from screen import keep, open_page, until

    from splatedit.viewer.app import App

    with App(shown, Config(scene=str(shown.path), output_dir=str(tmp_path / "outputs"))) as app:
        page = open_page(browser, app.url)
        page.get_by_role("tab", name="Export", exact=True).click()
        path = tmp_path / "outputs" / "ball" / "ball-export.ply"
        page.get_by_role("button", name="Save on the server").click()
        until(page, path.exists, "the file")
        assert equal(files.load(path), shown.current), "bit for bit"
        until(page, lambda: page.get_by_text(f"{path}: ").count() > 1, "its size, in the tab and in a message")
        page.get_by_role("button", name="Save on the server").click()
        until(page, lambda: page.get_by_text("is there already").count(), "it says that the file is there")
        page.get_by_role("button", name="Download", exact=True).click()
        link = page.get_by_text("ball-export.ply").last
        until(page, lambda: page.locator("a[download]").count(), "a link")
        with page.expect_download() as download:
            page.locator("a[download]").first.click()
        download.value.save_as(tmp_path / "downloaded.ply")
        assert (tmp_path / "downloaded.ply").read_bytes() == path.read_bytes()
        assert link is not None and page.errors == []
        keep(page, "export")
        page.context.close()
