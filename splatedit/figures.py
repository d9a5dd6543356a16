"""The figures of the tables of `diagnostics`. matplotlib is imported here alone, when a figure is asked for."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from splatedit.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from splatedit.diagnostics import Row, Table


def new(rows: int = 1, columns: int = 1, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[list[Any]]]:
    """A figure with a grid of axes, each so many inches large, which a notebook shows as it is.

    Raises InputError if matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    class Alone(Figure):
        """Not of pyplot, which would keep the figure and look for a display; IPython only knows how to show those."""

        def _repr_png_(self) -> bytes:
            return png(self)

    figure = Alone(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def check_matplotlib() -> None:
    """Raise InputError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError('figures: matplotlib is not installed; pip install "splatedit[notebook]" brings it.') from None


def svg(figure: Figure) -> bytes:
    """A figure as SVG, the same bytes for the same figure: no date, no random names, letters as outlines."""
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "splatedit", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": "splatedit"})
    return stream.getvalue()


def png(figure: Figure, dpi: int = 100) -> bytes:
    """A figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


def pixels(figure: Figure, dpi: int = 100) -> np.ndarray:
    """A figure as a picture (h, w, 3) uint8, such as one frame of `displays.animate`."""
    return np.asarray(Image.open(io.BytesIO(png(figure, dpi))).convert("RGB"))


def colour(name: str) -> str:
    """The colour of a solver, the same in every figure; grey for what is none."""
    from splatedit.fpr import SOLVERS

    return f"C{list(SOLVERS).index(name)}" if name in SOLVERS else "0.4"


def curves(axes: Any, rows: Sequence[Row], x: str, y: str, by: str, colours: Callable[[str], str] = colour) -> None:
    """One line for each value of the column `by`, with bars of one standard error where there is one."""
    for name in dict.fromkeys(row[by] for row in rows):
        points = sorted((row for row in rows if row[by] == name), key=lambda row: row[x])
        bars = [0.0 if math.isnan(row[f"{y}_se"]) else row[f"{y}_se"] for row in points]
        look = {"marker": "o", "ms": 3.5, "lw": 1.3, "capsize": 2, "color": colours(name)}
        axes.errorbar([row[x] for row in points], [row[y] for row in points], bars, label=str(name), **look)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def logarithmic(axes: Any) -> None:
    """A logarithmic y axis with plain numbers on it."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels where matplotlib wants one, without its powers of ten."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:.3g}" if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1.2, 0.4)))
    axes.tick_params(axis="y", which="both", labelsize=8)


def of_drift(table: Table) -> Figure:
    """Drift over noise levels after the last iteration of each solver; and over iterations, at each noise level."""
    from splatedit.diagnostics import averaged

    means = averaged(table.rows, ("solver", "t", "iteration"), ("drift",))
    last = max(row["iteration"] for row in means)
    steps = sorted({row["t"] for row in means})
    first = next(iter(row["solver"] for row in means))
    random = [{**row, "solver": "random"} for row in means if row["iteration"] == 0 and row["solver"] == first]
    count = 1 + len(steps)
    columns = min(count, 3 if count < 8 else 4)  # so that labels can still be read on a page
    figure, grid = new(-(-count // columns), columns, 3.4, 2.9)
    left, *panels = (axes for row in grid for axes in row)
    for spare in panels[len(steps) :]:
        spare.set_axis_off()
    panels = panels[: len(steps)]
    curves(left, [*random, *(row for row in means if row["iteration"] == last)], "t", "drift", "solver")
    left.set_title(f"after {last} iterations")
    for axes, t in zip(panels, steps, strict=True):
        curves(axes, [row for row in means if row["t"] == t], "iteration", "drift", "solver")
        axes.set_title(f"t = {t}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, *panels):
        logarithmic(axes)
    left.legend(fontsize=8)
    return figure


def of_cost(table: Table) -> Figure:
    """Drift over cost: one line for each solver, stopped after each iteration; what nothing beats is ringed."""
    figure, ((axes,),) = new(1, 1, 7.2, 3.6)
    # No bars: the spread is that of noise levels, over which the mean is taken, and not of chance.
    curves(axes, [{**row, "drift_se": math.nan} for row in table.rows], "cost", "drift", "solver")
    front = [row for row in table.rows if row["on_front"]]
    axes.plot(
        [r["cost"] for r in front], [r["drift"] for r in front], "o", ms=9, mfc="none", mec="black", label="front"
    )
    axes.set_xlabel("cost, rows forward + 1.15 rows back")
    logarithmic(axes)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def of_residuals(table: Table) -> Figure:
    """Residual over iterations, above the rms of the noise; a column for each noise level."""
    from splatedit.diagnostics import averaged

    means = averaged(table.rows, ("solver", "t", "iteration"), ("residual", "rms"))
    steps = sorted({row["t"] for row in means})
    figure, grid = new(2, len(steps), 3.4, 2.8)
    for column, t in enumerate(steps):
        here = [row for row in means if row["t"] == t]
        for axes, name in zip((grid[0][column], grid[1][column]), ("residual", "rms"), strict=True):
            curves(axes, here, "iteration", name, "solver")
            logarithmic(axes)
        grid[0][column].set_title(f"t = {t}")
    grid[0][0].legend(fontsize=8)
    return figure


def picture(axes: Any, image: Tensor, title: str = "") -> None:
    """A picture (3, h, w) in [0, 1], or a map (h, w), without axes."""
    shown = image.detach().float().cpu()
    axes.imshow(shown.clamp(0, 1).permute(1, 2, 0).numpy() if shown.ndim == 3 else shown.numpy(), cmap="magma")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8)


def strips(rows: Mapping[str, Tensor], titles: Mapping[str, Sequence[str]] | Sequence[str] = ()) -> Figure:
    """Rows of pictures (n, 3, h, w) in [0, 1] or of maps (n, h, w), a name left of each row.

    titles: above the pictures of every row, or of the row of that name; without them the rows stand close together.
    """
    above = titles if isinstance(titles, Mapping) else {next(iter(rows)): titles}
    close = not isinstance(titles, Mapping)
    figure, grid = new(len(rows), max(map(len, rows.values())), 1.5, 1.55 if close else 1.75)
    for (name, pictures), line in zip(rows.items(), grid, strict=True):
        heads = [*above.get(name, ()), *[""] * len(line)]
        for axes in line[len(pictures) :]:
            axes.set_axis_off()
        for axes, image, head in zip(line, pictures, heads, strict=False):
            picture(axes, image, head)
        line[0].set_ylabel(name, fontsize=9)
    return figure


def of_iterations(table: Table) -> Figure:
    """A strip for each solver and view: the source, then the posterior mean after each iteration."""
    assert table.pictures is not None
    solvers, views = (list(dict.fromkeys(row[key] for row in table.rows)) for key in ("solver", "view"))
    names = {(g, v): name if len(views) == 1 else f"{name}, {v}" for g, name in enumerate(solvers) for v in views}
    drift = {(row["solver"], row["view"], row["iteration"]): row["drift"] for row in table.rows}
    last = max(row["iteration"] for row in table.rows)
    titles = {
        names[g, v]: ["source", *(f"k = {k}, drift {drift[name, v, k]:.3f}" for k in range(last + 1))]
        for g, name in enumerate(solvers)
        for v in views
    }
    return strips({name: table.pictures[v, g] for (g, v), name in names.items()}, titles)


def of_means(table: Table) -> Figure:
    """A strip for each view: the source, then posterior means by noise level, random noise above refined."""
    assert table.pictures is not None
    views, _, columns = table.pictures.shape[:3]
    names, steps = (list(dict.fromkeys(row[key] for row in table.rows)) for key in ("noise", "t"))
    drift = {(row["noise"], row["t"], row["view"]): row["drift"] for row in table.rows}
    figure, grid = new(2 * views, columns, 1.5, 1.7)
    for view in range(views):
        for line, name in enumerate(names):
            axes = grid[2 * view + line]
            picture(axes[0], table.pictures[view, line, 0], "source")
            axes[0].set_ylabel(name, fontsize=8)
            for column, t in enumerate(steps, 1):
                title = f"t = {t}, drift {drift[name, t, view]:.2f}"
                picture(axes[column], table.pictures[view, line, column], title)
    return figure


def of_maps(table: Table) -> Figure:
    """A row for each guidance, a column for each noise level, of the first view."""
    from splatedit.diagnostics import over_picture

    assert table.pictures is not None
    guidances, steps = (list(dict.fromkeys(row[key] for row in table.rows)) for key in ("guidance", "t"))
    height, width = (8 * size for size in table.pictures.shape[-2:])
    maps = over_picture(table.pictures[:, :, 0], (height, width))
    rms = {(row["guidance"], row["t"]): row["rms"] for row in table.rows if row["view"] == 0}
    figure, grid = new(len(guidances), len(steps), 1.7, 1.9)
    for g, name in enumerate(guidances):
        grid[g][0].set_ylabel(name, fontsize=8)
        for i, t in enumerate(steps):
            picture(grid[g][i], maps[g, i], f"t = {t}, rms {rms[name, t]:.2g}")
            grid[g][i].images[0].set_clim(0, 1)
    return figure


def of_sweep(table: Table) -> Figure:
    """Which target is reached at which distance from the source: a line for each number of iterations, DDS a star."""
    from splatedit.diagnostics import averaged

    means = averaged(table.rows, ("lam", "iters"), ("distance", "margin", "drift"))
    dds = [row for row in means if not row["iters"]]
    figure, ((left, middle, right),) = new(1, 3)
    refined = [row for row in means if row["iters"]]
    named = [{**row, "N": f"N = {row['iters']}", "lambda": row["lam"]} for row in refined]
    order = list(dict.fromkeys(row["N"] for row in named))
    lams = sorted({row["lam"] for row in named if row["lam"] > 0})

    def colours(name: str) -> str:
        return f"C{order.index(name)}"

    for axes, name in ((left, "distance"), (middle, "drift")):
        curves(axes, named, "lambda", name, "N", colours)
        axes.set_xscale("log")
        axes.set_xticks(lams, [f"{lam:g}" for lam in lams])
        axes.set_xticks([], minor=True)
        for row in dds:
            axes.axhline(row[name], ls=":", color="black", label="DDS")
    curves(right, named, "distance", "margin", "N", colours)
    right.plot([row["distance"] for row in dds], [row["margin"] for row in dds], "k*", ms=10, label="DDS")
    left.legend(fontsize=8)
    return figure


def of_invertibility(table: Table) -> Figure:
    """Source, edit and what came back, of the first view; a row for each guidance."""
    assert table.pictures is not None
    guidances = list(dict.fromkeys(row["guidance"] for row in table.rows))
    first = {row["guidance"]: row for row in table.rows if row["view"] == 0}
    figure, grid = new(len(guidances), 3, 2, 2.2)
    for g, name in enumerate(guidances):
        row = first[name]
        titles = ("source", f"edit, {row['psnr_edit']:.1f} dB", f"back, {row['psnr']:.1f} dB")
        for axes, image, title in zip(grid[g], table.pictures[g, 0], titles, strict=True):
            picture(axes, image, title)
        grid[g][0].set_ylabel(name, fontsize=8)
    return figure


FIGURES: dict[str, Callable[[Table], Figure]] = {
    "drift": of_drift,
    "cost": of_cost,
    "residuals": of_residuals,
    "means": of_means,
    "iterations": of_iterations,
    "maps": of_maps,
    "sweep": of_sweep,
    "invertibility": of_invertibility,
}
