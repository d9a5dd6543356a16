"""report.html: one file, pictures inside, that opens anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from splatedit.files import atomic

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
figure {{ display: inline-block; margin: 0 .6rem .6rem 0 }}
figure img {{ width: 12rem; display: block; border: 1px solid #ddd }}
figcaption {{ font-size: 85%; color: #666 }}
table {{ border-collapse: collapse }} td {{ padding: .15rem 1rem .15rem 0; vertical-align: top }}
td:first-child {{ color: #666 }} .bad {{ color: #b00 }} video {{ max-width: 100% }}
</style>
<h1>{title}</h1>
<p class="{mood}">{verdict}</p>
<h2>Before and after</h2>
{pairs}
<h2>Turntable</h2>
<video src="turntable.mp4" controls loop muted></video>
<h2>Numbers</h2>
<table>{rows}</table>
</html>
"""
LABELS = {
    "changed_share": "share of splats changed",
    "psnr_to_source": "PSNR to the source, dB",
    "prefers_target": "views in which the model prefers the target",
    "preferred_target_before": "the same, before the edit",
    "roughness_ratio": "roughness, edited over source",
    "coverage_ratio": "coverage, edited over source",
}


def write_report(record: dict[str, Any], pairs: Sequence[tuple[str, str]], path: Path) -> None:
    """Write the page for what run.json holds; `pairs` are before and after pictures, relative to the page's folder."""
    change = record["change"] or {}
    verdict = change.get("verdict", "not measured")
    advice = "".join(f"; try {hint}" for hint in change.get("advice", []))
    title = f"{record['source_prompt'] or 'the scene'} → {record['prompt']}"
    if record["interrupted"]:
        verdict += f", interrupted after {record['steps']} of {record['steps_asked']} steps"
    figures = "\n".join(
        f'<figure><img src="{inline(path.parent / name)}" alt=""><figcaption>view {index}, {when}</figcaption></figure>'
        for index, pair in enumerate(pairs)
        for when, name in zip(("before", "after"), pair, strict=True)
    )
    numbers = {label: change[key] for key, label in LABELS.items() if key in change}
    for key in ("scene", "sha256", "splats", "model", "guidance", "guidance_scale", "seed", "steps", "device"):
        numbers[key.replace("_", " ")] = record[key]
    numbers["source prompt from"] = record["source_prompt_from"]
    numbers["seconds per step"] = ", ".join(f"{k} {v:g}" for k, v in record["seconds_per_step"].items())
    numbers["peak memory, MiB"] = ", ".join(f"{k} {v}" for k, v in record["peak_memory_mib"].items() if v is not None)
    numbers["versions"] = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    rows = "\n".join(f"<tr><td>{escape(k)}<td>{escape(show(v))}" for k, v in numbers.items())
    page = PAGE.format(
        title=escape(title),
        mood="good" if change.get("verdict") == "changed" else "bad",
        verdict=escape(f"Verdict: {verdict}{advice}."),
        pairs=figures,
        rows=rows,
    )
    with atomic(path) as stream:
        stream.write(page.encode())


def inline(path: Path) -> str:
    """A PNG as a data address, so that the page can be sent alone."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def show(value: Any) -> str:
    """A number as people write it; infinity was stored as None."""
    if value is None:
        return "infinite"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
