"""report.html: a run on one page that stands alone, pictures, film and charts inside."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from splatedit import charts, slider
from splatedit.charts import Line, line_chart
from splatedit.config import TEXT, Config
from splatedit.files import atomic
from splatedit.page import address, facts, page, picture, show, table

FILM_BYTES = 6_000_000  # of the film in the page at most; a larger one is coded again, coarser
STYLE = (
    slider.STYLE
    + """
.views { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(max(9.5rem, 22%), 1fr)) }
figure { margin: 0 } figcaption { padding-top: .35rem }
button { font: inherit; font-size: .87rem; color: var(--ink); background: var(--card); border: 1px solid var(--soft);
  border-radius: .35rem; padding: .15rem .7rem; cursor: pointer } button[hidden] { display: none }
pre { background: var(--card); padding: .7rem .9rem; border-radius: .4rem; white-space: pre-wrap; margin: .4rem 0 }
.verdict { font-size: 1.15rem; font-weight: 600; margin: .2rem 0 }
.film, .still { width: 100%; border-radius: .4rem } .beside { display: flex } .turn { max-width: 44rem }
.beside > * { flex: 1; text-align: center }
.hint { display: none } .js .hint { display: block }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
@media print { button, .film { display: none }
  .views, .charts { grid-template-columns: 1fr 1fr } .js .hint { display: none } }
@media screen { .paper-only { display: none } }
"""
)
SCRIPT = (
    slider.SCRIPT
    + """document.documentElement.classList.add("js");
for (const button of document.querySelectorAll("button[data-copy]")) {
  const text = document.getElementById(button.dataset.copy), label = button.textContent;
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      getSelection().selectAllChildren(text);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  });
}
"""
)
VERDICTS = {
    "changed": "The scene changed.",
    "unchanged": "Nothing changed.",
    "noise": "The edit went to noise.",
    None: "The change was not measured.",
}
# Of the change report: what each number is called, and what it says.
CHANGE = {
    "changed_share": ("share of splats changed", "visibly moved, recoloured, faded, grown, added or removed; 0 to 1"),
    "psnr_to_source": ("PSNR to the source, dB", "of all views; above 45 nothing is to be seen"),
    "prefers_target": ("views in which the model prefers the target", "share, after the edit"),
    "preferred_target_before": ("the same before the edit", "share"),
    "margin": ("margin", "how much better the target explains the views, relative; after the edit"),
    "margin_before": ("margin before the edit", "negative: the source prompt explains them better"),
    "roughness": ("roughness", "mean difference of neighbouring pixels; white noise has 0.6"),
    "roughness_ratio": ("roughness, edited over source", "confetti raises it"),
    "coverage_ratio": ("coverage, edited over source", "pixels that splats cover"),
}
REGION = {
    "splats": "splats",
    "changed": "of these changed visibly",
    "added": "added",
    "removed": "removed",
    "changed_share": "share changed, added or removed",
    "mean_displacement": "mean displacement, scene radii",
    "mean_colour_change": "mean change of colour, 0 to 1",
    "mean_opacity_change": "mean change of opacity, 0 to 1",
    "bit_identical": "bit-identical to the source",
    "pixels": "share of the pictures",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
}


def write_report(
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    config: Config,
    folder: Path,
    history: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write report.html into a run's folder, whole or not at all.

    record: what run.json holds; metrics: what metrics.json holds, whose `pictures` lie in `folder` as turntable.mp4
    does; history: entries as of `stack.as_json`.
    """
    title = f"{record['source_prompt'] or 'the scene'} → {record['prompt']}"
    sections = [
        verdict(record, metrics),
        views(metrics["pictures"], record, folder),
        turntable(folder, metrics["pictures"]),
        regions(metrics["regions"], record),
        numbers(metrics),
        curves(metrics["curve"]),
        settings(config),
        repeat(config, record),
        edits(history),
        machine(record),
    ]
    content = page(title, "\n".join(filter(None, sections)), charts.STYLE + STYLE, SCRIPT)
    with atomic(folder / "report.html") as stream:
        stream.write(content.encode())


# -------------------------------------------------------------------------------------------------------- its sections
def verdict(record: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """What came of it, in words, and what to try if that is not enough."""
    change, count = metrics["change"] or {}, len(metrics["views"])
    word = change.get("verdict")
    said = [f'<p class="verdict {"good" if word == "changed" else "bad"}">{VERDICTS[word]}</p>']
    if change:
        psnr = change["psnr_to_source"]
        near = "the pictures equal the source's" if psnr is None else f"{psnr:.1f} dB to the source"
        after, before = (round(change[k] * count) for k in ("prefers_target", "preferred_target_before"))
        line = f"{change['changed_share']:.0%} of the splats changed; {near}; the model prefers {record['prompt']!r}"
        said.append(f"<p>{escape(f'{line} in {after} of {count} views, before the edit in {before}.')}</p>")
        if word == "changed":
            said.extend(f"<p>{escape(hint[:1].upper() + hint[1:])}.</p>" for hint in change["advice"])
        else:
            said.append("<p>To try:</p><ul>" + "".join(f"<li>{escape(hint)}" for hint in change["advice"]) + "</ul>")
    if record["interrupted"]:
        done = f"Interrupted after {record['steps']} of {record['steps_asked']} steps."
        said.append(f'<p class="bad">{done}</p>')
    if lost := record["mended_splats"]:
        said.append(
            f'<p class="bad">{lost:,} splats could no longer be drawn and are as they were before the edit.</p>'
        )
    return "\n".join(said)


def views(pictures: Sequence[Mapping[str, Any]], record: Mapping[str, Any], folder: Path) -> str:
    """The pictures, before and after over one another."""
    figures = []
    for number, entry in enumerate(pictures, 1):
        name = f"View {number} of {len(pictures)}, {entry['view']}"
        images, said = [], []
        for when, prompt in (("before", record["source_prompt"]), ("after", record["prompt"])):
            images.append(np.asarray(Image.open(folder / entry[when]).convert("RGB")))
            said.append(f"{name}, {when} the edit" + f": {prompt}" * bool(prompt))
        height, width = images[0].shape[:2]
        label = f"{name}: how much of it is the picture before the edit, in percent"
        pair = slider.pair([picture(image) for image in images], (width, height), alt=said, label=label)
        figures.append(f"<figure>{pair}<figcaption>{escape(f'{name}: {likeness(entry)}')}</figcaption></figure>")
    hint = '<p class="note hint">Drag over a picture, or focus it and press the arrow keys.</p>'
    return f'<h2>Before and after</h2>\n{hint}\n<div class="views">\n' + "\n".join(figures) + "\n</div>"


def likeness(entry: Mapping[str, Any]) -> str:
    """How near a picture is to the source's, in a few words, also inside and outside the mask."""
    words = []
    for region in ("whole", "inside", "outside"):
        if region in entry:
            where = "" if region == "whole" else f"{region} "
            psnr, pixels = entry[region]["psnr"], entry[region]["pixels"]
            words.append(f"{where}{f'{psnr:.1f} dB' if psnr is not None else 'equal' if pixels else 'not in view'}")
    return ", ".join(words) + (f", SSIM {entry['whole']['ssim']:.3f}" if entry["whole"]["ssim"] is not None else "")


def turntable(folder: Path, pictures: Sequence[Mapping[str, Any]]) -> str:
    """The film, before and after side by side; on paper, and before it plays, its first frame."""
    from splatedit.media import first_frame, smaller_mp4

    path = folder / "turntable.mp4"
    film, still = smaller_mp4(path, FILM_BYTES), picture(first_frame(path))
    said = "Turntable: before the edit at the left, after it at the right"
    shown = f'<img class="still{" paper-only" if film else ""}" src="{still}" alt="{said}, first frame">'
    if film:
        source = f'poster="{still}" src="{address("video/mp4", film)}"'
        shown += f'<video class="film" {source} aria-label="{said}" controls loop muted playsinline></video>'
    else:
        shown += '<p class="note">The film is too large for this page: see turntable.mp4 beside it.</p>'
    words = '<div class="beside note" aria-hidden="true"><span>before</span><span>after</span></div>'
    return f'<h2>Turntable</h2>\n<div class="turn">\n{shown}\n{words}\n</div>'


def regions(found: Mapping[str, Mapping[str, Any]], record: Mapping[str, Any]) -> str:
    """What changed inside and outside the mask; without one, in the whole scene."""
    masked = "inside" in found
    said = [f"<h2>Change {'inside and outside the mask' if masked else 'of the scene'}</h2>"]
    if masked:
        free, same = record["splats_that_may_change"], found["outside"]["bit_identical"]
        line = f"{free:,} of {record['splats']:,} splats were free to change. "
        line += "Every splat outside the mask is bit for bit the source's."
        wrong = '<p class="bad">Splats outside the mask are not those of the source.</p>'
        said.append(wrong if same is False else f"<p>{line}</p>")
    rows = []
    for key, label in REGION.items():
        values = [region.get(key) for region in found.values()]
        if key in ("psnr", "ssim") and "pixels" in found["whole"]:
            values = ["equal" if v is None and r["pixels"] else v for v, r in zip(values, found.values(), strict=True)]
        rows.append([label, *values])
    said.append(table(["", *found], rows))
    inside = " A pixel is inside as far as the source's splats inside the mask make it up." if masked else ""
    said.append(f'<p class="note">PSNR and SSIM are of the pictures above, background included.{inside}</p>')
    return "\n".join(said)


def numbers(metrics: Mapping[str, Any]) -> str:
    """The change report, and what the model prefers in each view."""
    change, seen = metrics["change"] or {}, metrics["views"]
    if not change:
        return ""
    rows = [[label, show_psnr(key, change[key]), says] for key, (label, says) in CHANGE.items()]
    each = [
        [v["view"], show_psnr("psnr", v["psnr"]), v["ssim"], preferred(v["margin_before"]), v["margin_before"]]
        + [preferred(v["margin"]), v["margin"]]
        for v in seen
    ]
    note = (
        "The model is asked which prompt explains a view better, source or target; views lie between those above "
        "(from cameras of a file, they are the same). The margin is the difference of its errors, relative to them."
    )
    head = ["view", "PSNR, dB", "SSIM", "preferred before", "margin before", "preferred after", "margin after"]
    return (
        f"<h2>Change report</h2>\n{table(['', 'value', 'what it says'], rows)}\n"
        f'<h3>What the model prefers</h3>\n<p class="note">{note}</p>\n{table(head, each)}'
    )


def preferred(margin: float | None) -> str:
    """Which prompt a margin speaks for."""
    return show(None) if margin is None else "target" if margin > 0 else "source"


def show_psnr(key: str, value: Any) -> Any:
    """A PSNR of None is that of equal pictures."""
    return "equal" if value is None and key.startswith("psnr") else value


def curves(curve: Mapping[str, Sequence[Any]]) -> str:
    """Loss and PSNR over the steps; for ids how far refining came, over the steps and over its iterations."""
    count = range(1, len(curve["loss"]) + 1)
    drawn = [
        line_chart([Line("loss", count, curve["loss"])], title="Loss", x="step", y="loss", zero=True),
        line_chart(
            [Line("PSNR", count, curve["psnr"])], title="PSNR to the source", x="step", y="PSNR to the source, dB"
        ),
    ]
    said = "Loss is the rms of the gradient: how hard the model still pulls."
    if "fpr_drift" in curve:
        drift = curve["fpr_drift"]
        ends = [
            Line(name, count, [row[k] if row else None for row in drift])
            for name, k in (("at first", 0), ("at last", -1))
        ]
        drawn.append(line_chart(ends, title="FPR residual", x="step", y="residual", zero=True))
        for key, label in (("fpr_drift", "mean residual"), ("fpr_rms", "mean rms of the noise")):
            means = column_means(curve[key])
            line = Line(label, range(len(means)), means)
            drawn.append(line_chart([line], title=label, x="iteration", y=label, zero=key == "fpr_drift"))
        said += (
            " The residual of fixed-point regularisation is how far the model's idea of the source, from the noise, is "
            "from the source, relative to it: before any iteration (at first) and after all. Fresh noise has rms 1."
        )
    figures = "\n".join(drawn)
    return f'<h2>Steps</h2>\n<p class="note">{said}</p>\n<div class="charts">\n{figures}\n</div>'


def column_means(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Means of the k-th numbers of all rows that have one."""
    columns = [[row[k] for row in rows if len(row) > k] for k in range(max(map(len, rows), default=0))]
    found = [[v for v in column if v is not None] for column in columns]
    return [sum(column) / len(column) if column else None for column in found]


def settings(config: Config) -> str:
    """All settings, those that differ from the defaults first."""
    own, rest = differing(config), asdict(config)
    rest = {key: value for key, value in rest.items() if key not in own}
    return (
        "<h2>Settings</h2>\n<details open><summary>Other than the defaults</summary>\n"
        f"{facts({k: as_word(v) for k, v in own.items()})}\n</details>\n"
        f"<details><summary>Defaults</summary>\n{facts({k: as_word(v) for k, v in rest.items()})}\n</details>"
    )


def repeat(config: Config, record: Mapping[str, Any]) -> str:
    """The command that does the same again."""
    line = escape(shlex.join(command(config)))
    version, scene = escape(record["versions"]["splatedit"]), escape(record["sha256"])
    return (
        f'<h2>To repeat it</h2>\n<pre id="command" tabindex="0">{line}</pre>\n'
        '<button type="button" data-copy="command" hidden>Copy</button>\n'
        f'<p class="note">With splatedit {version} and the scene whose sha256 is {scene}.</p>'
    )


def edits(history: Sequence[Mapping[str, Any]]) -> str:
    """The edits that led to the file, the last one being this run's."""
    done = [entry for entry in history if entry["place"] == "done"]
    if not done:
        return ""
    rows = [
        [entry["number"], entry["title"], entry["record"].get("verdict"), entry["strength"], entry["changed"]]
        + [entry["added"], entry["removed"], entry["splats"], entry["time"][:16].replace("T", " ")]
        for entry in done
    ]
    head = ["#", "edit", "verdict", "strength", "changed", "added", "removed", "splats", "made"]
    note = "Each can be undone: splatedit undo, redo and strength with edited.ply."
    return f'<h2>History</h2>\n{table(head, rows)}\n<p class="note">{note}</p>'


def machine(record: Mapping[str, Any]) -> str:
    """Scene, model, time, machine and versions."""
    keys = ("scene", "sha256", "splats", "sh_degree", "up", "model", "guidance", "guidance_scale", "seed", "steps")
    rows = {key.replace("_", " "): record[key] for key in keys}
    rows["seed"] = str(record["seed"])  # no separators
    rows["source prompt"] = f"{record['source_prompt']!r} ({record['source_prompt_from']})"
    rows["cameras"] = ", ".join(f"{k.replace('_', ' ')} {show(v)}" for k, v in record["cameras"].items())
    rows["device"] = record["device"]
    rows["seconds per step"] = ", ".join(f"{k} {v:.3g}" for k, v in record["seconds_per_step"].items())
    rows["rows through the network"] = ", ".join(f"{k} {v:,}" for k, v in record["network_evaluations"].items())
    memory = record["peak_memory_mib"].items()
    rows["peak memory, MiB"] = ", ".join(f"{k} {v:,}" for k, v in memory if v is not None)
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return f"<h2>Run and machine</h2>\n{facts(rows)}"


# ------------------------------------------------------------------------------------------------------------- settings
def differing(config: Config) -> dict[str, Any]:
    """The settings that are not the defaults, by name."""
    default = asdict(Config())
    return {key: value for key, value in asdict(config).items() if value != default[key]}


def command(config: Config) -> list[str]:
    """The words of the command with these settings: `config.load_config` reads them back as they are."""
    own = {key: value for key, value in differing(config).items() if key not in ("scene", "prompt")}
    words = [config.scene, config.prompt, *(f"{key}={as_word(value, key)}" for key, value in own.items())]
    return ["splatedit", "run", *(["--"] if any(word.startswith("-") for word in words) else []), *words]


def as_word(value: Any, key: str = "") -> str:
    """A value as the right side of KEY=VALUE."""
    return value if key in TEXT or isinstance(value, str) else json.dumps(value)
