"""What `splatedit diagnose` does: a scene or a picture and a prompt in, one page of tables and figures out."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape as plain

from splatedit import page
from splatedit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from splatedit.diagnostics import Row, Subject, Table
    from splatedit.priors import Prior

ENDINGS = (".html", ".htm")
ELEVATION = 12.0  # degrees of the circle from which a scene is drawn
# Of each table what is shown: the columns over which it does not take means, and the numbers.
SHOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "drift": (("solver", "t", "iteration"), ("drift", "rms", "kurtosis", "autocorrelation", "cost")),
    "cost": (("solver", "iteration", "on_front"), ("forwards", "backwards", "cost", "drift")),
    "residuals": (("solver", "t", "iteration"), ("residual", "rms", "kurtosis", "autocorrelation")),
    "means": (("noise", "t"), ("drift", "psnr")),
    "iterations": (("solver", "iteration"), ("drift", "psnr", "rms")),
    "maps": (("guidance", "t"), ("rms", "top_tenth")),
    "sweep": (("lam", "iters"), ("distance", "margin", "before", "psnr", "drift")),
    "invertibility": (("guidance",), ("moved", "psnr_edit", "distance", "psnr", "ssim", "lpips")),
}


class Plan(NamedTuple):
    """How much of everything."""

    views: int  # of a scene
    draws: int  # of noise, for each view and noise level
    levels: tuple[int, ...]  # steps of a schedule of 1000
    curve: int  # iterations of the residual curves
    guidances: tuple[str, ...]  # whose gradients are mapped
    lams: tuple[float, ...]
    iters: tuple[int, ...]
    sweep_steps: int
    edits: tuple[str, ...]  # guidances of the edits there and back
    edit_steps: int


FULL = Plan(
    views=2,
    draws=2,
    levels=(100, 300, 500, 700, 850),
    curve=8,
    guidances=("sds", "dds", "cds", "pds", "dreamcatalyst", "ids"),
    lams=(0.3, 1.0, 3.0),
    iters=(0, 1, 3),
    sweep_steps=40,
    edits=("dds", "cds", "pds", "ids"),
    edit_steps=100,
)
QUICK = FULL._replace(
    views=1,
    draws=1,
    levels=(300, 500, 850),
    curve=4,
    lams=(1.0, 3.0),
    sweep_steps=10,
    edits=("dds", "ids"),
    edit_steps=20,
)


def diagnose(
    path: str | Path,
    prompt: str,
    source: str | None = None,
    *,
    output: str | Path | None = None,
    model: str = "pocket",
    seed: int = 0,
    quick: bool = False,
    device: str = "auto",
    offline: bool = False,
    console: Console | None = None,
) -> Path:
    """Write a page on what a model makes of a splat scene or a picture on its way to `prompt`; returns its path.

    source: what is to be seen now; None: what the sidecar says, else what the model sees. output: None is
    `<name>-diagnosis.html` in the current folder. quick: fewer views, noise levels and steps. The same arguments give
    the same file on a CPU. The page is written whole or not at all; raises InputError for a mistake in an argument.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    path, target = Path(path), Path(output or f"{Path(path).stem}-diagnosis.html")
    check(path, prompt, target, seed)
    from splatedit.priors import check_prior

    check_prior(model, offline)
    from splatedit.editing import resolve_device
    from splatedit.files import atomic, sha256
    from splatedit.priors import load_prior

    plan = QUICK if quick else FULL
    with console.status("loading the model"):
        prior = load_prior(model, resolve_device(device), offline=offline)
    prior.text([prompt, *([] if source is None else [source])])  # words it does not know, before anything is drawn
    subject, origin = look(prior, path, prompt, source, plan.views, seed)
    console.print(plain(f"{path}: from {subject.source!r} ({origin}) to {prompt!r}, model {prior.name}"))
    sections = []
    for table in tables(subject, seed, plan, console):
        with console.status(f"drawing: {table.title.lower()}"):
            sections.append(section(table))
    about = {
        "file": str(path),
        "sha256": sha256(path),
        "source": f"{subject.source!r} ({origin})",
        "target": repr(prompt),
        "model": prior.name,
        "guidance scale": subject.denoise().scale,
        "views": len(subject.z),
        "seed": str(seed),
        "network rows forward": prior.evaluations,
    }
    title = f"{subject.source or 'the source'} → {prompt}: diagnosis"
    with atomic(target) as stream:
        stream.write(page.page(title, "\n".join([page.facts(about), *sections])).encode())
    return target


def check(path: Path, prompt: str, target: Path, seed: int) -> None:
    """Raise InputError for what can be told to be wrong before a model is loaded."""
    from splatedit.config import within
    from splatedit.figures import check_matplotlib

    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a splat file or a picture.")
    if not prompt.strip():
        raise InputError('prompt: it is empty; say what an edit shall show, as in "a pig".')
    if target.suffix.lower() not in ENDINGS:
        raise InputError(f"--output: found {str(target)!r}, expected a name that ends in .html.")
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"--output: {target} cannot be written; give a file in a folder that is there.")
    within("seed", seed, 0, 2**63 - 1)
    check_matplotlib()


def look(prior: Prior, path: Path, prompt: str, source: str | None, views: int, seed: int) -> tuple[Subject, str]:
    """The scene from a circle of cameras, or the picture, as a Subject; and where its source prompt comes from."""
    import torch

    from splatedit.diagnostics import Subject
    from splatedit.files import sidecar
    from splatedit.formats import endings, format_of
    from splatedit.images import ENDINGS as PICTURES
    from splatedit.images import read_picture
    from splatedit.priors import find_prompt

    if path.suffix.lower() in PICTURES:
        pictures = read_picture(path, prior.image_size)[None]
    elif format_of(path) is not None:
        pictures = drawn(path, prior, views)
    else:
        raise InputError(
            f"{path}: neither a splat file ({', '.join(endings(read=True))}) nor a picture ({', '.join(PICTURES)})."
        )
    pictures, origin = pictures.to(prior.device), "as given"
    beside = sidecar(path).source_prompt
    if source is None and beside is not None:
        source, origin = beside, "from its sidecar"
    if source is None:
        with torch.no_grad():
            z = prior.encode(pictures)
        source, _ = find_prompt(prior, z, torch.Generator(prior.device).manual_seed(seed))
        origin = "found by the model" if prior.vocabulary else "empty: --source says what is to be seen"
    prior.text([source])
    return Subject(prior, source, prompt, pictures=pictures), origin


def drawn(path: Path, prior: Prior, views: int) -> Tensor:
    """Pictures (views, 3, s, s) of a scene from a circle of cameras, averaged down from twice the size as in edits."""
    import torch
    import torch.nn.functional as F

    from splatedit.cameras import orbit
    from splatedit.files import load, sidecar
    from splatedit.render import render

    size = prior.image_size
    gaussians = load(path).to(prior.device)
    cameras = orbit(gaussians, views, elevation=ELEVATION, size=2 * size, up=sidecar(path).up)
    with torch.no_grad():
        drawing = render(gaussians, cameras)
    if float(drawing.alpha.max()) < 0.05:
        raise InputError(f"{path}: nothing of it is to be seen from a circle around it.")
    return F.avg_pool2d(drawing.rgb, 2)


def tables(subject: Subject, seed: int, plan: Plan, console: Console) -> Iterator[Table]:
    """Everything that `diagnostics` measures, each from a generator of its own. Whole edits are of the first view."""
    import torch

    from splatedit import diagnostics as d

    first = d.Subject(subject.prior, subject.source, subject.target, latents=subject.z[:1])

    def run(name: str, measure: Callable[..., Table], *args: Any, **options: Any) -> Table:
        with console.status(f"measuring: {name}"):
            return measure(*args, torch.Generator(subject.z.device).manual_seed(seed), **options)

    drift = run("drift", d.drift, subject, steps=plan.levels, draws=plan.draws)
    yield drift
    yield d.cost_versus_drift(drift)
    upper = [t for t in plan.levels if t >= 300]  # below, all solvers agree
    yield run("residuals", d.residual_curves, subject, steps=upper, iters=plan.curve, draws=plan.draws)
    yield run("posterior means", d.posterior_means, subject, steps=plan.levels)
    yield run("iterations", d.iterations, first, solvers=("grad", "picard_null"))
    yield run("gradients", d.gradient_maps, subject, guidances=plan.guidances, draws=plan.draws)
    options = {"lams": plan.lams, "iters": plan.iters, "steps": plan.sweep_steps}
    yield run("lambda and N", d.sweep, first, **options)
    yield run("edits there and back", d.invertibility, first, guidances=plan.edits, steps=plan.edit_steps)


# ------------------------------------------------------------------------------------------------------------- the page
def section(table: Table) -> str:
    """A heading, what it means, the figure, the means, and all rows as CSV to keep."""
    from splatedit.diagnostics import averaged
    from splatedit.figures import svg

    by, values = SHOWN[table.name]
    means = averaged(table.rows, by, [name for name in values if name in table.columns])
    said = "Numbers" if means[0]["n"] == 1 else f"Numbers: means over {means[0]['n']} rows each"
    image = page.address("image/svg+xml", svg(table.figure()))
    kept = page.address("text/csv", as_csv(table).encode())
    return "\n".join(
        [
            f"<h2>{escape(table.title)}</h2>",
            f"<p>{escape(table.says)}</p>",
            f'<img class="paper" src="{image}" alt="{escape(table.title)}">',
            f"<details><summary>{said}</summary>{as_html(means)}</details>",
            f'<p><a download="{table.name}.csv" href="{kept}">All {len(table.rows)} rows as CSV</a></p>',
        ]
    )


def as_html(rows: list[Row]) -> str:
    """Means as a table, with a standard error beside each mean that has one."""
    from splatedit.diagnostics import headings, with_error

    names = headings(rows)
    return page.table(names, [[with_error(row, name) for name in names] for row in rows])


def as_csv(table: Table) -> str:
    """All rows, numbers to their last digit."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, table.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return stream.getvalue()
