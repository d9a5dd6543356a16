"""report.html and what stands in it: the page alone, its numbers, its charts, what changed inside and outside."""

import base64
import hashlib
import io
import json
import math
import re
import shlex
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from splatedit import charts, media, metrics, page, regions, report
from splatedit.charts import Line, line_chart, points, ticks
from splatedit.config import Config, load_config
from splatedit.regions import identical, pixel_changes, splat_changes

VOID = {"meta", "img", "input", "br"}
NASTY = "\"'></title></script><script>alert('x')</script><b onclick=\"y\">&amp; {} ${x} 猫"


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), the text of those that are asked for, and the cells of all tables."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.tables, self.open = [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.texts.setdefault(tag, []).append(data)
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] += data.strip("\n")

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def table(self, name):
        """The rows by their first cell of the table that has a row called so."""
        return next(rows for t in self.tables if name in (rows := {row[0]: row[1:] for row in t}))


def region(psnr=20.0):
    return {"pixels": 0.5, "psnr": psnr, "ssim": 0.9}


def made(folder, prompt="a pig", source="a cat", steps=30, views=2, **more):
    """What a run hands over, and a folder with its pictures."""
    rng = np.random.default_rng(0)
    (folder / "renders").mkdir()
    pictures = []
    for index in range(views):
        entry = {when: f"renders/{index:02d}_{when}.png" for when in ("before", "after")}
        for name, value in zip(entry.values(), (60, 200), strict=True):
            media.save_png(np.full((48, 64, 3), value, np.uint8), folder / name)
        pictures.append({"view": f"{180 * index}° around", **entry, "whole": region()})
    frames = [rng.integers(0, 255, (48, 128, 3), np.uint8) for _ in range(3)]
    media.save_frames(frames, folder / "turntable.mp4", 2)
    change = metrics.Report("changed", 0.5, 21.5, 0.02, 1.1, 0.99, 1.0, 0.0, 0.25, -0.125).as_dict()
    row = {"psnr": 21.0, "ssim": 0.875, "margin_before": -0.125, "margin": 0.25}
    whole = regions.SplatChange(10, 5, 0, 0, 0.5, 0.01, 0.02, 0.03, False)._asdict()
    content = {
        "change": change,
        "regions": {"whole": {**whole, **region()}},
        "views": [{"view": "90° around", **row}] * views,
        "pictures": pictures,
        "curve": {"loss": [1 / (k + 1) for k in range(steps)], "psnr": [None, *range(steps - 1)]},
    }
    content["curve"] |= {"fpr_drift": [[0.5, 0.25, 0.125]] * steps, "fpr_rms": [[1.0, 0.99, 0.98]] * steps}
    config = Config(scene="cat.ply", prompt=prompt, source_prompt=source, steps=steps)
    record = {
        "prompt": prompt,
        "source_prompt": source,
        "source_prompt_from": "option",
        "scene": "cat.ply",
        "sha256": "ab" * 32,
        "splats": 10,
        "splats_that_may_change": 10,
        "mended_splats": 0,
        "sh_degree": 0,
        "up": "-y",
        "model": "pocket",
        "guidance": "ids",
        "guidance_scale": 3.0,
        "seed": 1234,
        "steps": steps,
        "steps_asked": steps,
        "interrupted": False,
        "cameras": {"from": "dome", "edit": 48, "held_out": 0},
        "device": "cpu",
        "seconds_per_step": {"all": 1.5},
        "network_evaluations": {"edit": 1000},
        "peak_memory_mib": {"process": 700, "gpu": None},
        "versions": {"splatedit": "0.1.0", "torch": "2"},
    }
    return {**record, **more}, content, config


def written(folder, *made, history=()):
    report.write_report(*made, folder, history)
    return (folder / "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- the page
def test_the_page_has_every_part_and_asks_nobody(tmp_path):
    entry = {"number": 1, "title": "'a cat' to 'a pig'", "place": "done", "strength": 1.0, "changed": 5, "added": 0}
    entry |= {"removed": 0, "splats": 10, "time": "2026-11-21T18:00:00+00:00", "record": {"verdict": "changed"}}
    text = written(tmp_path, *made(tmp_path), history=[entry, {**entry, "place": "undone", "title": "undone by hand"}])
    found = Page(text)
    for tag, attrs in found.elements:
        assert tag not in ("link", "iframe", "object", "base", "a"), tag
        for name in ("src", "href", "poster", "srcset", "data"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, name)
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"https?://|url\(|@import", re.sub(r'"data:[^"]*"', "", text))
    headings = found.texts["h2"]
    assert headings == [
        *("Before and after", "Turntable", "Change of the scene", "Change report", "Steps", "Settings"),
        *("To repeat it", "History", "Run and machine"),
    ]
    assert found.texts["h1"] == ["a cat → a pig"] and len(found.all("svg")) == 5 and len(found.all("video")) == 1
    assert len(found.all("input")) == 2 and all(attrs["aria-label"] for attrs in found.all("input"))
    assert len(found.all("img")) == 2 * 2 + 1 and all(attrs["alt"] for attrs in found.all("img"))
    assert "The scene changed." in text and "prefers &#x27;a pig&#x27; in 2 of 2 views, before the edit in 0." in text
    assert "undone by hand" not in text and found.table("sha256")["seed"] == ["1234"]
    assert "splatedit run cat.ply 'a pig' 'source_prompt=a cat' steps=30" in "".join(found.texts["pre"])


def test_pictures_and_film_are_inside(tmp_path):
    import av

    found = Page(written(tmp_path, *made(tmp_path)))
    shown = [attrs["src"] for attrs in found.all("img") if "class" not in attrs]
    colours = []
    for address in shown:
        kind, _, content = address.partition(";base64,")
        assert kind == "data:image/webp"
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        assert image.size == (64, 48)
        colours.append(round(np.asarray(image).mean()))
    assert [abs(c - w) <= 2 for c, w in zip(colours, (60, 200, 60, 200), strict=True)] == [True] * 4
    film = base64.b64decode(found.all("video")[0]["src"].partition(",")[2])
    assert film == (tmp_path / "turntable.mp4").read_bytes()
    with av.open(io.BytesIO(film)) as frames:
        assert len(list(frames.decode(video=0))) == 3


def test_only_the_own_script_may_run_and_nothing_may_be_loaded(tmp_path):
    found = Page(written(tmp_path, *made(tmp_path)))
    (policy,) = (attrs["content"] for attrs in found.all("meta") if "http-equiv" in attrs)
    own = base64.b64encode(hashlib.sha256("".join(found.texts["script"]).encode()).digest()).decode()
    assert f"script-src 'sha256-{own}'" in policy and policy.startswith("default-src 'none'; ")
    assert "script-src 'none'" in page.page("t", "<p>b</p>")


def luminance(colour):
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_has_contrast_in_light_and_dark():
    blocks = re.findall(r":root \{([^}]*)", page.STYLE)
    assert len(blocks) == 2
    for block in blocks:
        colour = {name: luminance(value) for name, value in re.findall(r"--([\w-]+): (#\w+)", block)}
        assert colour.keys() == {"page", "card", "ink", "soft", "rule", "good", "bad", "link", "line-0", "line-1"}
        for name in colour.keys() - {"page", "card", "rule"}:
            for behind in ("page", "card"):
                low, high = sorted((colour[name], colour[behind]))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, behind)


def test_user_text_is_text(tmp_path):
    record, content, config = made(tmp_path, prompt=NASTY, source=NASTY, scene=NASTY, device=NASTY)
    content["pictures"][0]["view"] = content["views"][0]["view"] = NASTY
    content["change"]["advice"] = [NASTY]
    config = replace(config, scene=NASTY, mask_rule=NASTY)
    entry = {"number": 1, "title": NASTY, "place": "done", "strength": 1.0, "changed": 5, "added": 0, "removed": 0}
    entry |= {"splats": 10, "time": NASTY, "record": {"verdict": NASTY}}
    text = written(tmp_path, record, content, config, history=[entry])
    found = Page(text)
    assert len(found.all("script")) == 1 and not found.all("b") and "".join(found.texts["script"]) == report.SCRIPT
    assert not any(name.startswith("on") for _, attrs in found.elements for name in attrs)
    assert "".join(found.texts["title"]).startswith(f"{NASTY} → {NASTY}")
    assert found.table("scene")["scene"] == [NASTY] and found.table("mask_rule")["mask_rule"] == [NASTY]
    assert f"View 1 of 2, {NASTY}, after the edit: {NASTY}" in [attrs["alt"] for attrs in found.all("img")]
    assert shlex.split("".join(found.texts["pre"]))[2:4] == [NASTY, NASTY]


@pytest.mark.parametrize(("verdict", "words"), [("unchanged", "Nothing changed."), ("noise", "went to noise")])
def test_an_edit_that_failed_says_so(tmp_path, verdict, words):
    record, content, config = made(tmp_path, interrupted=True, steps_asked=99, mended_splats=7)
    content["change"] |= {"verdict": verdict, "psnr_to_source": None, "advice": ["more steps"]}
    content["views"][0] |= {"psnr": None, "margin": None}
    text = written(tmp_path, record, content, config)
    assert words in text and "<li>more steps" in text and "the pictures equal the source" in text
    assert "Interrupted after 30 of 99 steps." in text and "7 splats could no longer be drawn" in text
    assert Page(text).table("90° around")


def test_without_a_change_report_or_fpr(tmp_path):
    record, content, config = made(tmp_path)
    content |= {"change": None, "views": [], "curve": {"loss": [0.5], "psnr": [None]}}
    text = written(tmp_path, record, content, config)
    assert "The change was not measured." in text and len(Page(text).all("svg")) == 1 and "no finite number" in text


def test_a_film_too_large_is_made_coarser_or_left_out(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (64, 128, 3), np.uint8) for _ in range(4)]
    media.save_frames(frames, tmp_path / "film.mp4", 2)
    size = (tmp_path / "film.mp4").stat().st_size
    assert media.smaller_mp4(tmp_path / "film.mp4", size) == (tmp_path / "film.mp4").read_bytes()
    coarse = media.smaller_mp4(tmp_path / "film.mp4", size * 3 // 4)
    assert coarse is not None and len(coarse) <= size * 3 // 4
    assert media.smaller_mp4(tmp_path / "film.mp4", 100) is None
    monkeypatch.setattr(report, "FILM_BYTES", 100)
    text = written(tmp_path, *made(tmp_path))
    assert "see turntable.mp4 beside it" in text and not Page(text).all("video")


# ------------------------------------------------------------------------------------------------------------ real runs
def masked_run(scene_file, tiny_model, tmp_path, *words):
    from splatedit.run import run

    options = {"scene": str(scene_file), "prompt": "a pig", "model": str(tiny_model), "output_dir": str(tmp_path / "o")}
    fast = ["source_prompt=a cat", "steps=2", "cameras=dome:2", "device=cpu", "guidance=ids", "fpr_iters=1"]
    return run(load_config(options=options, words=[*fast, *words]))


def close(cell, value):
    """Whether a cell shows a number of metrics.json, to the digits that it has."""
    if value is None or isinstance(value, bool):
        return cell == {None: "–", True: "yes", False: "no"}[value]
    return math.isclose(float(cell.replace(",", "")), value, rel_tol=1e-3, abs_tol=1e-9)


def test_numbers_of_a_masked_run_are_those_of_metrics_json(scene_file, tiny_model, tmp_path, few_frames):
    outcome = masked_run(scene_file, tiny_model, tmp_path, "mask_rule=x > 0.5")

    def no_constant(name):
        raise AssertionError(name)

    found = Page((outcome.folder / "report.html").read_text(encoding="utf-8"))
    content = json.loads((outcome.folder / "metrics.json").read_text(), parse_constant=no_constant)
    assert list(content) == ["change", "regions", "views", "pictures", "curve"]
    assert list(content["regions"]) == ["whole", "inside", "outside"]
    outside, inside = content["regions"]["outside"], content["regions"]["inside"]
    assert outside["bit_identical"] is True and outside["changed"] == outside["mean_displacement"] == 0
    assert inside["bit_identical"] is False and inside["mean_colour_change"] > 0 and inside["pixels"] > 0
    assert inside["splats"] + outside["splats"] == 300 == content["regions"]["whole"]["splats"]
    assert content["regions"]["whole"]["changed_share"] == content["change"]["changed_share"]
    table = found.table("splats")
    for key, label in report.REGION.items():
        for cell, values in zip(table[label], content["regions"].values(), strict=True):
            assert close(cell, values[key]), (key, cell)
    table = found.table("margin")
    for key, (label, _) in report.CHANGE.items():
        assert close(table[label][0], content["change"][key]), key
    table = found.table("90° around")
    assert [view["view"] for view in content["views"]] == ["90° around", "270° around"]
    for view in content["views"]:
        psnr, ssim, _, before, preferred, after = table[view["view"]]
        pairs = ((psnr, "psnr"), (ssim, "ssim"), (before, "margin_before"), (after, "margin"))
        assert all(close(cell, view[key]) for cell, key in pairs)
        assert preferred == ("target" if view["margin"] > 0 else "source")
    captions = found.texts["figcaption"]
    for entry, caption in zip(content["pictures"], captions, strict=True):
        assert (outcome.folder / entry["before"]).is_file() and entry["view"] in caption
        assert f"inside {entry['inside']['psnr']:.1f} dB" in caption
    assert "Every splat outside the mask is bit for bit the source's." in "".join(found.texts["p"])
    assert found.table("1")["1"][0] == "'a cat' to 'a pig'" and found.table("1")["1"][3].isdecimal()
    documented(content)


def documented(content):
    """Every key of metrics.json stands in the guide."""
    guide = (Path(__file__).parent.parent / "docs" / "usage.md").read_text(encoding="utf-8")
    section = guide.partition("### What is written")[2].partition("### Going on")[0]
    keys = {*content, *content["change"], *content["views"][0], *content["pictures"][0], *content["curve"]}
    for values in content["regions"].values():
        keys |= values.keys()
    missing = [key for key in sorted(keys) if f"`{key}`" not in section]
    assert not missing


def test_cameras_of_a_file_give_the_views_their_names(scene_file, tiny_model, tmp_path, few_frames):
    from splatedit.camera_files import save_cameras
    from splatedit.cameras import orbit
    from splatedit.files import load

    cameras = orbit(load(scene_file), 9, size=(48, 32))
    save_cameras(cameras, tmp_path / "transforms.json")
    outcome = masked_run(scene_file, tiny_model, tmp_path, f"cameras={tmp_path / 'transforms.json'}")
    content = json.loads((outcome.folder / "metrics.json").read_text())
    names = [entry["view"] for entry in content["pictures"]]
    assert names == [entry["view"] for entry in content["views"]] and len({*names}) == 2
    assert list(content["regions"]) == ["whole"], "no mask"
    text = (outcome.folder / "report.html").read_text(encoding="utf-8")
    assert all(name in text for name in names) and "Change of the scene" in text


# ------------------------------------------------------------------------------------------------- inside and outside
def test_what_changed_where(cloud):
    inside = torch.zeros(300, dtype=torch.bool)
    inside[:100] = True
    means, sh0 = cloud.means.clone(), cloud.sh0.clone()
    means[:50, 0] += 0.5
    sh0[:100] += 0.1 / 0.28209479177387814
    found = splat_changes(cloud, cloud._replace(means=means, sh0=sh0), 2.0, None, inside)
    assert [c.splats for c in found.values()] == [300, 100, 200] and [c.changed for c in found.values()] == [
        100,
        100,
        0,
    ]
    assert found["inside"].mean_displacement == pytest.approx(0.125)
    assert found["whole"].mean_displacement == pytest.approx(0.125 / 3)
    assert found["inside"].mean_colour_change == pytest.approx(0.1)
    assert found["outside"] == regions.SplatChange(200, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, True)
    assert found["whole"].bit_identical is False and found["whole"].changed_share == pytest.approx(1 / 3)
    assert list(splat_changes(cloud, cloud, 2.0)) == ["whole"]


def test_rows_added_and_removed(cloud):
    rows = torch.tensor([*range(5, 300), -1, -1, -1])
    edited = cloud.select(rows.clamp_min(0))
    inside = torch.arange(300) < 20
    found = splat_changes(cloud, edited, 1.0, rows, inside)
    assert found["inside"][:5] == (20, 0, 3, 5, 8 / 23) and found["outside"].bit_identical is True
    assert found["whole"].changed_share == metrics.changed_share(cloud, edited, 1.0, rows)
    wrong = splat_changes(cloud, edited, 1.0, rows, ~inside)
    assert wrong["outside"].removed == 5 and wrong["outside"].bit_identical is False
    none = splat_changes(cloud, edited.select(torch.arange(295, 298)), 1.0, rows[295:], inside)
    assert none["whole"].removed == 300 and none["whole"].mean_displacement is None


def test_everything_or_nothing_inside(cloud):
    everything = torch.ones(300, dtype=torch.bool)
    found = splat_changes(cloud, cloud, 1.0, None, everything)
    assert found["outside"] == regions.SplatChange(0, 0, 0, 0, None, None, None, None, None)
    assert found["inside"].bit_identical is True


def test_identical_is_of_bits(cloud):
    other = {k: v.clone() for k, v in cloud.parameters.items()}
    other["means"][3, 0] = math.nan
    both = cloud._replace(**other)
    assert identical(both, both).all(), "a NaN is itself"
    zero, minus = (cloud._replace(opacities=torch.full((300,), v)) for v in (0.0, -0.0))
    assert not identical(zero, minus).any()
    assert identical(cloud, both).tolist() == [k != 3 for k in range(300)]


def test_pixels_inside_and_outside():
    rng = np.random.default_rng(0)
    before = [rng.integers(0, 255, (16, 20, 3), np.uint8) for _ in range(2)]
    after = [image.copy() for image in before]
    after[0][:, :10] = 255 - after[0][:, :10]
    cover = np.zeros((16, 20, 3), np.uint8)
    cover[:, :10] = 255
    together, each = pixel_changes(before, after, [cover, cover])
    a, b = (torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2) / 255 for x in (before, after))
    weight = torch.from_numpy(cover[..., 0] / 255).float()
    assert together["whole"].psnr == pytest.approx(metrics.psnr(a, b), rel=1e-5)
    assert together["whole"].ssim == pytest.approx(metrics.ssim(a, b), rel=1e-5)
    assert each[0]["inside"].psnr == pytest.approx(metrics.psnr(a[:1], b[:1], weight), rel=1e-5)
    assert each[0]["inside"].ssim == pytest.approx(metrics.ssim(a[:1], b[:1], weight), rel=1e-5)
    assert each[0]["outside"].psnr is None and each[0]["outside"].pixels == 0.5
    assert each[1]["whole"].psnr is None and each[1]["whole"].ssim == pytest.approx(1)
    _, unseen = pixel_changes(before, after, [cover * 0, cover])
    assert unseen[0]["inside"] == regions.PixelChange(0.0, None, None)


# ---------------------------------------------------------------------------------------------------------- the command
SETTINGS = {
    "steps": st.integers(1, 10**6),
    "guidance_scale": st.none() | st.floats(0, 1e6),
    "source_prompt": st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"])).filter(lambda t: t != "null"),
    "mask_rule": st.none() | st.sampled_from(["opacity > 0.5 and x < 1", "${oc.env:HOME}", "a=b", "[1, 2]"]),
    "t_range": st.sampled_from([[0.05, 0.95], [0.1, 0.9], [1e-05, 1.0]]),
    "offline": st.booleans(),
    "lr_means": st.floats(0, 1),
    "up": st.sampled_from([None, "-y", "+z"]),
}


@settings(max_examples=15, deadline=None)
@given(st.fixed_dictionaries({}, optional=SETTINGS), st.sampled_from(["a pig", "-a", 'it\'s "x" & $HOME', "steps=3"]))
def test_the_command_repeats_the_settings(own, prompt):
    config = Config(scene="my scene.ply", prompt=prompt, **own)
    words = shlex.split(shlex.join(report.command(config)))
    assert words[:2] == ["splatedit", "run"]
    rest = words[2:]
    if rest[0] == "--":
        rest = rest[1:]
    assert load_config(options={"scene": rest[0], "prompt": rest[1]}, words=rest[2:]) == config


def test_a_prompt_that_looks_like_an_option_is_given_as_a_word():
    assert report.command(Config(scene="a.ply", prompt="-x"))[2] == "--"
    assert asdict(Config()) == {**asdict(Config()), **report.differing(Config())} and not report.differing(Config())


# --------------------------------------------------------------------------------------------------------------- charts
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_even_and_reach_over_the_data(low, span, count):
    found = ticks(low, low + span, count)
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * span and found[-1] >= low + span - 1e-6 * span and len(found) <= count + 2
    digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(digits - d) for d in (1, 2, 5, 10)) < 1e-2


def test_ticks_of_one_value():
    assert ticks(3, 3, 5)[0] < 3 < ticks(3, 3, 5)[-1] and ticks(0, 0, 5)[0] < 0 < ticks(0, 0, 5)[-1]
    assert all(v == round(v) for v in ticks(1, 3, 6, whole=True))


@settings(max_examples=25)
@given(st.lists(st.none() | st.floats(-1e9, 1e9), min_size=1, max_size=400), st.booleans())
def test_every_curve_stays_within_its_axes(values, zero):
    drawn = line_chart([Line("a <b>", range(len(values)), values)], title="T", x="x & y", y="y", zero=zero)
    if all(v is None for v in values):
        assert "no finite number" in drawn
        return
    found = Page(drawn)
    for attrs in found.all("polyline"):
        for pair in attrs["points"].split():
            x, y = map(float, pair.split(","))
            assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT + 0.1
            assert charts.TOP - 0.1 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1
    assert "nan" not in drawn and len(found.all("circle")) <= charts.MOST
    assert "T: a <b> from" in found.all("svg")[0]["aria-label"] and "x & y" in found.texts["text"]


def test_points_of_a_long_line_are_means_and_gaps_stay():
    assert [p.y for p in points(Line("", range(6), [1, 3, None, 5, None, None]), most=3)] == [2, 5, None]
    assert points(Line("", range(1, 7), [1, 3, None, 5, 0, 0]), most=3)[0].words == "mean of 1 to 2: 2"
    drawn = Page(line_chart([Line("a", range(5), [1, 2, None, 3, 4])], title="", x="", y=""))
    assert len(drawn.all("polyline")) == 2 and drawn.texts["title"][0] == "a, 0: 1"


def test_column_means_of_uneven_rows():
    assert report.column_means([[1.0, 2.0], [3.0], [None], []]) == [2.0, 2.0] and report.column_means([[]]) == []


# ------------------------------------------------------------------------------------------------------------ a browser
def shade(view, box, x):
    """The mean of a strip of the picture in view, at a share of its width."""
    image = np.asarray(Image.open(io.BytesIO(view.screenshot())).convert("L"))
    at, top = round(box["x"] + x * box["width"]), round(box["y"] + box["height"] / 2)
    return float(image[top : top + 10, at - 3 : at + 3].mean())


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_slider_is_dragged_touched_and_moved_by_keys(tmp_path, browser, scheme):
    written(tmp_path, *made(tmp_path, prompt="a pig <script>alert(1)</script>"))
    context = browser.new_context(viewport={"width": 1000, "height": 900}, color_scheme=scheme)
    view, asked, said = context.new_page(), [], []
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto((tmp_path / "report.html").as_uri())
    box = view.locator(".pair").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    assert shade(view, box, 0.3) < 80 and shade(view, box, 0.7) > 180, "dark before at the left, bright after"
    view.mouse.move(box["x"] + box["width"] / 2, middle)
    view.mouse.down()
    view.mouse.move(box["x"] + box["width"] * 0.9, middle, steps=5)
    view.mouse.up()
    assert shade(view, box, 0.7) < 80 and shade(view, box, 0.97) > 180
    view.mouse.move(box["x"] + box["width"] * 0.1, middle)
    assert shade(view, box, 0.7) < 80, "released, it stays"
    view.keyboard.press("Home")
    assert shade(view, box, 0.3) > 180
    slider = view.get_by_role("slider").first
    for _ in range(3):
        view.keyboard.press("ArrowRight")
    assert slider.input_value() == "3" and slider.get_attribute("aria-valuetext") == "3 % before, 97 % after"
    view.get_by_role("button", name="Copy").click()
    view.get_by_role("button", name="Copied").wait_for()
    assert all(url.startswith(("file:", "data:")) for url in asked) and not said
    context.close()


@pytest.mark.browser
def test_a_narrow_touch_screen_and_paper(tmp_path, browser):
    written(tmp_path, *made(tmp_path))
    context = browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True, is_mobile=True)
    view = context.new_page()
    view.goto((tmp_path / "report.html").as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") == 400, "nothing sticks out"
    box = view.locator(".pair").first.bounding_box()
    view.touchscreen.tap(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
    assert view.get_by_role("slider").first.input_value() == "90" and shade(view, box, 0.6) < 80
    played = "v => v.play().then(() => new Promise(done => v.ontimeupdate = () => v.currentTime > 0 && done(true)))"
    assert view.locator("video").evaluate(played) is True
    view.emulate_media(media="print")
    first, second = (view.locator(".pair img").nth(k).bounding_box() for k in (0, 1))
    assert second["x"] >= first["x"] + first["width"] - 1, "both pictures side by side"
    assert view.locator("video").is_hidden() and view.locator(".still").is_visible()
    context.close()


@pytest.mark.browser
def test_without_scripts_both_pictures_are_seen(tmp_path, browser):
    written(tmp_path, *made(tmp_path))
    context = browser.new_context(java_script_enabled=False)
    view = context.new_page()
    view.goto((tmp_path / "report.html").as_uri())
    first, second = (view.locator(".pair img").nth(k).bounding_box() for k in (0, 1))
    assert second["x"] >= first["x"] + first["width"] - 1
    assert view.get_by_role("button", name="Copy").is_hidden()
    context.close()
