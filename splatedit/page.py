"""HTML pages that stand alone: the skeleton and its style, tables, pictures and files inside; all text escaped."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image, features

# Nothing is ever asked of a network, and no script runs but the page's own.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src {script}"
SKELETON = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
{script}
</body>
</html>
"""
# Every colour has a contrast of 4.5 or more to the page and to cards (a test computes it).
STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f4f5f7; --ink: #1b1f24; --soft: #57606a; --rule: #d5dae0;
  --good: #12692f; --bad: #b3261e; --link: #0b57b0; --line-0: #0b57b0; --line-1: #b84a00 }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1e2329; --ink: #e5e9ee; --soft: #a3adb8; --rule: #3a424c;
    --good: #6fd08c; --bad: #ff9d94; --link: #86b9ff; --line-0: #78b0ff; --line-1: #ffa657 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
p, li, .note { max-width: 48rem } .note, figcaption { color: var(--soft); font-size: .87rem }
a { color: var(--link) }
img, video, svg { max-width: 100%; height: auto; display: block }
.paper { background: #fff; border-radius: .4rem; margin: .6rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 }
td, th { padding: .22rem 1.4rem .22rem 0; text-align: left; vertical-align: top }
tr + tr > *, thead + tbody > tr > * { border-top: 1px solid var(--rule) }
th { color: var(--soft); font-weight: normal } thead th, .number { white-space: nowrap }
.wide td:not(.number) { min-width: 6rem } .facts td { overflow-wrap: anywhere }
td.number, th.number { text-align: right }
details { margin: .5rem 0 } summary { cursor: pointer; padding: .2rem 0 }
.good { color: var(--good) } .bad { color: var(--bad) }
@media (max-width: 34rem) { td, th { padding-right: .7rem } }
@media print { main { max-width: none; padding: 0 } h2 { break-after: avoid } figure, tr, svg { break-inside: avoid } }
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page with a main heading; body is HTML, title is text."""
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else "'none'"
    return SKELETON.format(
        title=escape(title),
        policy=POLICY.format(script=allowed),
        style=STYLE + style,
        body=body,
        script=f"<script>{script}</script>" if script else "",
    )


def address(kind: str, content: bytes) -> str:
    """Content as a data address, so that the page can be sent alone; kind is its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(image: np.ndarray, quality: int = 90) -> str:
    """A picture (h, w, 3) uint8 as a data address: WebP, or PNG where Pillow cannot write that."""
    stream, kind = io.BytesIO(), "webp" if features.check("webp") else "png"
    Image.fromarray(image).save(stream, format=kind, quality=quality, method=4)
    return address(f"image/{kind}", stream.getvalue())


def facts(rows: Mapping[str, Any]) -> str:
    """Names and values as a table of two columns."""
    lines = (f'<tr><th scope="row">{escape(name)}<td>{escape(show(value))}' for name, value in rows.items())
    return '<table class="facts">\n' + "\n".join(lines) + "\n</table>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose first column names the rows; numbers stand at the right."""
    rows = [list(row) for row in rows]
    right = [any(isinstance(row[k], (int, float)) for row in rows) for k in range(len(head))]
    kind = [' class="number"' if yes else "" for yes in right]
    top = "".join(f'<th scope="col"{kind[k]}>{escape(name)}' for k, name in enumerate(head))
    lines = (
        f'<tr><th scope="row">{escape(show(row[0]))}'
        + "".join(f"<td{kind[k]}>{escape(show(value))}" for k, value in enumerate(row[1:], 1))
        for row in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def show(value: Any) -> str:
    """A value as people write it: numbers to four digits, counts with separators, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
