"""Small line charts as SVG, drawn by arithmetic alone: axes, labels, a legend, a tooltip at every point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 30, 44  # margins around the axes
MOST = 160  # points of a line; longer ones are averaged in equal parts
STYLE = """
.chart text { fill: var(--soft); font: 12px system-ui, sans-serif }
.chart .grid { stroke: var(--rule) } .chart .hit { fill: transparent } .chart .hit:hover { fill: var(--ink) }
.chart .line-0 { stroke: var(--line-0) } .chart .line-1 { stroke: var(--line-1); stroke-dasharray: 5 3 }
.chart polyline, .chart .key { fill: none; stroke-width: 1.8; stroke-linejoin: round } .chart .dot { stroke-width: 5;
  stroke-linecap: round }
"""


class Line(NamedTuple):
    """One curve; None where there is no number. There are styles for two in one chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


class Point(NamedTuple):
    """A point of a curve and what its tooltip says; y is None in a gap."""

    x: float
    y: float | None
    words: str


def line_chart(lines: Sequence[Line], *, title: str, x: str, y: str, zero: bool = False) -> str:
    """Curves over one pair of axes; x and y are the axes' labels, zero: the y axis begins there.

    Numbers have to be finite. Colours are the page's, see `page.STYLE`; STYLE belongs into the page too.
    """
    curves = [points(line) for line in lines]
    found = [p for curve in curves for p in curve if p.y is not None]
    if not found:
        return f"<p>{escape(title)}: no finite number.</p>"
    across = ticks(min(p.x for p in found), max(p.x for p in found), 6, whole=True)
    low, high = min(p.y or 0 for p in found), max(p.y or 0 for p in found)
    up = ticks(min(low, 0) if zero else low, high, 5)
    left, right = min(p.x for p in found), max(p.x for p in found)
    across = [tick for tick in across if left <= tick <= right] or [left]

    def place(p: Point) -> tuple[float, float]:
        share = (p.x - left) / (right - left) if right > left else 0.5
        rise = ((p.y or 0) - up[0]) / (up[-1] - up[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - rise * (HEIGHT - TOP - BOTTOM)

    drawn = [frame([place(Point(v, up[0], "")) for v in across], across, [place(Point(left, v, "")) for v in up], up)]
    drawn.append(labels(x, y))
    for number, (line, curve) in enumerate(zip(lines, curves, strict=True)):
        drawn.append(stroke(number, [None if p.y is None else place(p) for p in curve]))
        drawn.extend(hit(*place(p), f"{line.name}, {p.words}") for p in curve if p.y is not None)
    if len(lines) > 1:
        drawn.append(legend([line.name for line in lines]))
    said = "; ".join(summary(line.name, curve) for line, curve in zip(lines, curves, strict=True))
    box = f'class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg {box} role="img" aria-label="{escape(title)}: {escape(said)}">\n' + "\n".join(drawn) + "\n</svg>"


def points(line: Line, most: int = MOST) -> list[Point]:
    """The curve's points, of a long one the means over equal stretches of it."""
    size = -(-len(line.y) // most) if line.y else 1
    found = []
    for start in range(0, len(line.y), size):
        xs, ys = line.x[start : start + size], [v for v in line.y[start : start + size] if v is not None]
        at = f"{xs[0]:g}" if len(xs) == 1 else f"mean of {xs[0]:g} to {xs[-1]:g}"
        value = sum(ys) / len(ys) if ys else None
        found.append(Point(sum(xs) / len(xs), value, f"{at}: {value:.4g}" if ys else ""))
    return found


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers from at most low to at least high, evenly spaced by 1, 2 or 5 times a power of 10."""
    if high <= low:
        low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def frame(
    xs: Sequence[tuple[float, float]], across: Sequence[float], ys: Sequence[tuple[float, float]], up: Sequence[float]
) -> str:
    """Lines of the grid and the numbers on both axes."""
    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    drawn = [f'<path class="grid" d="M{LEFT} {y:.1f}H{end}"/>' for _, y in ys]
    drawn += [f'<path class="grid" d="M{x:.1f} {base}v4"/>' for x, _ in xs]
    drawn += [
        f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{round(v, 12):g}</text>'
        for (_, y), v in zip(ys, up, strict=True)
    ]
    drawn += [
        f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{v:g}</text>'
        for (x, _), v in zip(xs, across, strict=True)
    ]
    return "\n".join(drawn)


def labels(x: str, y: str) -> str:
    """What the axes are: x below the middle, y above the left end."""
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>\n'
        f'<text x="4" y="16">{escape(y)}</text>'
    )


def stroke(number: int, places: Sequence[tuple[float, float] | None]) -> str:
    """A curve, broken where there is no number; a single point is a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if place is None:
            runs.append([])
        else:
            runs[-1].append(place)
    drawn = []
    for run in filter(None, runs):
        kind = f"line-{number}" if len(run) > 1 else f"line-{number} dot"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (run if len(run) > 1 else run * 2))
        drawn.append(f'<polyline class="{kind}" points="{path}"/>')
    return "\n".join(drawn)


def hit(x: float, y: float, words: str) -> str:
    """A point to hover over."""
    return f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(words)}</title></circle>'


def legend(names: Sequence[str]) -> str:
    """The names of the curves in the upper right corner, one after the other."""
    drawn, right = [], WIDTH - RIGHT
    for number, name in reversed(list(enumerate(names))):
        drawn.append(f'<text x="{right}" y="16" text-anchor="end">{escape(name)}</text>')
        right -= 6.4 * len(name) + 8  # about as wide as the text
        drawn.append(f'<path class="key line-{number}" d="M{right - 20:.0f} 12h20"/>')
        right -= 34
    return "\n".join(drawn)


def summary(name: str, curve: Sequence[Point]) -> str:
    """A curve in words, for those who cannot see it."""
    found = [p for p in curve if p.y is not None]
    return f"{name} from {found[0].y:.4g} to {found[-1].y:.4g}" if found else f"{name} without a finite number"
