"""The diagnose tab: what the model makes of the view in the browser: drift, posterior means, where an edit pulls."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from splatedit.errors import InputError
from splatedit.files import made
from splatedit.viewer import paths
from splatedit.viewer.places import editing, folder_of, unused, whenever

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from splatedit.config import Config
    from splatedit.diagnostics import Row, Subject, Table
    from splatedit.priors import Prior
    from splatedit.viewer.app import App
    from splatedit.viewer.paths import Key
    from splatedit.viewer.stage import Shown

STEPS, PULLS = (100, 300, 500, 700, 850), (300, 500, 700)  # noise levels of the drift and of the gradients, of 1000
JUDGED = 700  # the level that the verdict speaks of: there the outline is decided
MAPPED = ("sds", "dds", "cds", "pds", "dreamcatalyst", "ids")  # guidances whose gradients cost no training
# Of the drift after refining: up to the first share of the source's length the model sees the source, from the second
# on what it sees is as far from it as nothing at all would be. And by how much FPR may make it worse, or has to better.
HOLDS, LOST, WORSE, LITTLE = 0.7, 1.0, 1.1, 0.03
COLORS = ("#868e96", "#ffa94d", "#f76707", "#1c7ed6", "#1864ab")  # of the lines, unrefined first
TILE = 96  # pixels of a small picture


# -------------------------------------------------------------------------------------------------------------- values
class Asked(NamedTuple):
    """How the model is asked."""

    source: str
    target: str
    scale: float | None  # of classifier-free guidance; None: what suits the model
    guidance: str  # one of MAPPED
    solver: str
    iters: int
    lam: float
    seed: int


class Found(NamedTuple):
    """What came of it."""

    picture: Tensor  # (1, 3, s, s) in [0, 1], what the model was shown
    drift: Table
    means: Table
    maps: Table
    asked: Asked


def asked_of(config: Config, source: str) -> Asked:
    """The questions that these settings put to the model; without a prompt the target is the source."""
    guidance = config.guidance if config.guidance in MAPPED else "dds"
    return Asked(
        source,
        config.prompt.strip() or source,
        config.guidance_scale,
        guidance,
        config.solver,
        max(config.fpr_iters, 1),
        config.fpr_lambda,
        config.seed,
    )


def picture_of(shown: Shown, key: Key, aspect: float, size: int, device: str = "cpu") -> Tensor:
    """The source from a browser's camera as the model would be shown it, (1, 3, size, size) in [0, 1].

    aspect: width over height of the window, of which the middle square is taken; drawn twice as large and averaged
    down, as in edits. Raises InputError if nothing of the scene is to be seen.
    """
    import torch
    import torch.nn.functional as F

    from splatedit.render import render

    narrow = 2 * math.atan(math.tan(key.fov / 2) * min(aspect, 1.0))
    cameras = paths.cameras_of([key._replace(fov=narrow)], 2 * size, 2 * size)
    with torch.no_grad():
        drawing = render(shown.source.to(device), cameras, shown.background)
    if float(drawing.alpha.max()) < 0.05:
        raise InputError("diagnose: nothing of the scene is in this view; turn the camera towards it.")
    return F.avg_pool2d(drawing.rgb, 2).clamp(0, 1)


def source_prompt(config: Config, path: Path | None, prior: Prior, picture: Tensor) -> str:
    """What the scene shows, found as a run finds it: settings, sidecar, history, the model; else nothing."""
    import torch

    from splatedit.files import sidecar
    from splatedit.priors import find_prompt
    from splatedit.stack import shows

    said = config.source_prompt
    if said is None and path is not None:
        said = sidecar(path).source_prompt or shows(path)
    if said is None and prior.vocabulary is not None:
        with torch.no_grad():
            said, _ = find_prompt(prior, prior.encode(picture), torch.Generator(prior.device).manual_seed(config.seed))
    return said or ""


def ask(
    prior: Prior,
    picture: Tensor,
    asked: Asked,
    *,
    steps: Sequence[int] = STEPS,
    pulls: Sequence[int] = PULLS,
    tell: Callable[[float, str], None] = lambda share, words: None,
    stop: Callable[[], None] = lambda: None,
) -> Found:
    """Measure drift, posterior means and gradients of one picture (1, 3, s, s), level by level.

    Drift and means are what `diagnostics` finds in one call for all levels. tell: hears the share that is done, 0 to 1,
    and what comes next; stop: is called between any two parts, and raises to end it.
    """
    from splatedit import diagnostics

    subject = diagnostics.Subject(prior, asked.source, asked.target, pictures=picture, scale=asked.scale)
    again = {"iters": asked.iters, "lam": asked.lam}
    measures: tuple[tuple[str, Callable[..., Table], Sequence[int], dict[str, Any]], ...] = (
        ("drift", diagnostics.drift, steps, {"solvers": [asked.solver], **again}),
        ("posterior means", diagnostics.posterior_means, steps, {"solver": asked.solver, **again}),
        ("gradients", diagnostics.gradient_maps, pulls, {"guidances": [asked.guidance]}),
    )
    tables, done, total = [], 0, 2 * len(steps) + len(pulls)
    for words, measure, levels, options in measures:
        parts, generator = [], seeded(subject, asked.seed)
        for level in levels:
            stop()
            tell(done / total, f"{words} at t = {level}")
            parts.append(measure(subject, generator, steps=[level], **options))
            done += 1
        tables.append(joined(parts))
    tell(1.0, "")
    drift, means, maps = tables
    return Found(picture.cpu(), drift, means, maps, asked)


def seeded(subject: Subject, seed: int) -> torch.Generator:
    import torch

    return torch.Generator(subject.z.device).manual_seed(seed)


def joined(parts: Sequence[Table]) -> Table:
    """Tables of single noise levels as one of all."""
    import torch

    rows = [row for part in parts for row in part.rows]
    pictures = [part.pictures.cpu() for part in parts if part.pictures is not None]
    if not pictures:
        return parts[0]._replace(rows=rows)
    if parts[0].name == "means":  # the source stands before each level's
        pictures = [pictures[0], *(part[:, :, 1:] for part in pictures[1:])]
        return parts[0]._replace(rows=rows, pictures=torch.cat(pictures, 2))
    return parts[0]._replace(rows=rows, pictures=torch.cat(pictures, 1))


def curves(drift: Table) -> tuple[list[int], dict[str, list[float]]]:
    """Noise levels, and the drift there: without FPR, and after each of its iterations."""
    levels = sorted({row["t"] for row in drift.rows})
    found: dict[str, list[float]] = {}
    for row in sorted(drift.rows, key=lambda row: (row["iteration"], row["t"])):
        k = row["iteration"]
        found.setdefault(f"after {k}" if k else "no FPR", []).append(row["drift"])
    return levels, found


def verdict(rows: Sequence[Row], asked: Asked) -> str:
    """In a line: whether the model sees the source in what it is shown, and what FPR does for that."""
    off = {row["t"]: row["drift"] for row in rows if row["iteration"] == 0}
    last = max(row["iteration"] for row in rows)
    on = {row["t"]: row["drift"] for row in rows if row["iteration"] == last}
    bad = [t for t in off if not math.isfinite(on[t]) or on[t] > WORSE * off[t]]
    if bad:
        worst = max(bad, key=lambda t: on[t] / max(off[t], 1e-12) if math.isfinite(on[t]) else math.inf)
        return (
            f"diverges: FPR makes the drift at t={worst} {on[worst]:.2f} instead of {off[worst]:.2f}; lower "
            f"fpr_lambda (now {asked.lam:g}) or fpr_iters (now {asked.iters})"
        )
    t = min(on, key=lambda t: abs(t - JUDGED))
    gain = 1 - on[t] / max(off[t], 1e-12)
    taken = f"FPR takes {100 * gain:.0f} % off" if gain >= 0 else f"FPR adds {-100 * gain:.0f} %"
    if gain < LITTLE:
        taken += "; a higher fpr_lambda or more fpr_iters would do more"
    if on[t] >= LOST:
        return (
            f"identity is lost: drift {on[t]:.2f} at t={t}; is {asked.source!r} what is to be seen? Or lower the upper "
            f"end of t_range. {taken}"
        )
    return f"identity {'holds' if on[t] < HOLDS else 'is loose'}: drift {on[t]:.2f} at t={t}; {taken}"


# ------------------------------------------------------------------------------------------------------------ pictures
def strip(means: Table) -> np.ndarray:
    """Posterior means as one picture: random noise above refined, the source on the left, then by noise level."""
    from splatedit.media import sheet, to_bytes

    assert means.pictures is not None
    tiles = small(means.pictures[0].flatten(0, 1))
    return sheet(to_bytes(tiles), means.pictures.shape[2])


def small(pictures: Tensor) -> Tensor:
    """Pictures (b, c, h, w) at the size of a tile, none enlarged by halves of pixels."""
    import torch.nn.functional as F

    size = pictures.shape[-1]
    if size < TILE:
        return F.interpolate(pictures, scale_factor=-(-TILE // size), mode="nearest")
    return F.interpolate(pictures, size=(TILE, TILE), mode="area")


def pulls_over(found: Found) -> np.ndarray:
    """The picture, and it in grey under the map of the gradient at each noise level, each with a scale of its own."""
    import torch

    from splatedit.diagnostics import over_picture
    from splatedit.media import sheet, to_bytes
    from splatedit.viewer.looks import ramp

    assert found.maps.pictures is not None
    height, width = found.picture.shape[-2:]
    heat = over_picture(found.maps.pictures[0, :, 0].float(), (height, width))[:, None]  # (levels, 1, h, w) in [0, 1]
    table = ramp()
    color = table[(heat[:, 0] * (len(table) - 1)).round().long()].permute(0, 3, 1, 2)
    grey = found.picture.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1).mul(found.picture).sum(1, keepdim=True)
    mixed = torch.lerp(grey.expand(1, 3, height, width), color, heat.sqrt())
    return sheet(to_bytes(torch.cat([found.picture, mixed])), 1 + len(mixed))


def captions(found: Found) -> tuple[str, str]:
    """What stands under the strip and under the maps, from left to right."""
    levels = ", ".join(f"t={t}" for t in dict.fromkeys(row["t"] for row in found.means.rows))
    pulls = ", ".join(f"t={t}" for t in dict.fromkeys(row["t"] for row in found.maps.rows))
    said = found.asked
    pull = f"Where {said.guidance} pulls towards {said.target!r}: the view, {pulls}; each with a scale of its own."
    if said.target == said.source:
        pull = "Nothing pulls, as the target is the source: name a target in the Edit tab to see where it would."
    return (
        f"What the model sees in the noised view of {said.source!r}: the view itself, {levels}. Above as the noise was "
        f"drawn, below after {said.iters} iterations of {said.solver}.",
        pull,
    )


def write(found: Found, folder: Path) -> Path:
    """Tables as CSV, pictures as PNG, and where matplotlib is installed the figure of the drift; or InputError."""
    from splatedit.diagnose import as_csv
    from splatedit.files import atomic
    from splatedit.media import save_png, to_bytes

    made(folder)
    for table in (found.drift, found.means, found.maps):
        with atomic(folder / f"{table.name}.csv") as stream:
            stream.write(as_csv(table).encode())
    save_png(to_bytes(found.picture)[0], folder / "view.png")
    save_png(strip(found.means), folder / "means.png")
    save_png(pulls_over(found), folder / "maps.png")
    try:
        figure = found.drift.figure()
    except InputError:  # no matplotlib
        return folder
    with atomic(folder / "drift.png") as stream:
        figure.savefig(stream, format="png", dpi=150)
    return folder


def lines_of(names: Sequence[str]) -> tuple[Any, ...]:
    """The columns of the plot: noise levels, then a line of this name each, the first one grey."""
    from viser import uplot

    last = max(len(names) - 2, 1)
    shades = [COLORS[0], *(COLORS[1 + round(k * (len(COLORS) - 2) / last)] for k in range(len(names) - 1))]
    lines = (
        uplot.Series(label=name, stroke=color, width=2.0, points=uplot.Series_Points(show=True, size=5.0))
        for name, color in zip(names, shades, strict=True)
    )
    return uplot.Series(label="t"), *lines


# --------------------------------------------------------------------------------------------------------------- panel
class Panel:
    """The elements of the tab, and what was found last."""

    def __init__(self, app: App):
        from viser import Icon

        self.app, gui = app, app.server.gui
        self.found: Found | None = None
        self.waiting: Any = None  # the event that asked while an edit was running
        self.stop = threading.Event()
        self.start = gui.add_button("Diagnose this view", icon=Icon.STETHOSCOPE, hint="What the model sees in it.")
        self.bar = gui.add_progress_bar(0.0, visible=False, animated=True)
        self.cancel = gui.add_button("Cancel", visible=False)
        self.said = gui.add_markdown("Turn to a view, then ask: drift by noise level, without FPR and with it.")
        self.plot = self.empty_plot()
        self.strip = gui.add_image(np.full((2, 2, 3), 255, np.uint8), format="png", visible=False)
        self.under = gui.add_markdown("", visible=False)
        self.maps = gui.add_image(np.full((2, 2, 3), 255, np.uint8), format="png", visible=False)
        self.below = gui.add_markdown("", visible=False)
        self.save = gui.add_button("Save PNG and CSV", icon=Icon.DEVICE_FLOPPY, disabled=True)
        self.start.on_click(app.act(self.diagnose, slow=True))
        self.cancel.on_click(app.act(self.give_up))
        self.save.on_click(app.act(self.store, slow=True))
        whenever(app, self.held, self.begin_waiting)

    def empty_plot(self) -> Any:
        """A plot over noise levels, without lines."""
        from viser import uplot

        axes = [uplot.Axis(stroke=COLORS[0], size=size, font="10px sans-serif") for size in (30, 44)]
        return self.app.server.gui.add_uplot(
            (np.zeros(0), np.zeros(0)),
            lines_of(["no FPR"]),
            title="posterior-mean drift by noise level",
            scales={"x": uplot.Scale(time=False, auto=True)},  # its own default is clock time
            axes=tuple(axes),
            height=220,
            visible=False,
        )

    def held(self) -> bool:
        """Whether the machine is the edit's."""
        return editing(self.app) and self.app.job is not None and self.app.job.state != "paused"

    def diagnose(self, event: Any) -> None:
        """Ask the model about the view of the browser that asked; later, if an edit is running."""
        if self.held():
            self.waiting = event
            self.cancel.visible, self.start.disabled = True, True
            self.said.content = "An edit is running: this starts once it is paused or has ended."
            return
        self.stop.clear()
        self.busy(True)
        try:
            self.show(self.measure(event))
        except BaseException as error:
            self.said.content = ""
            if not (isinstance(error, InputError) and self.stop.is_set()):
                raise
            self.app.notify("Cancelled", str(error), color="blue", client=event.client)
        finally:
            self.busy(False)

    def measure(self, event: Any) -> Found:
        """Draw the view and ask; the model is one that no edit uses."""
        from splatedit.editing import resolve_device
        from splatedit.priors import borrowed

        config, shown, camera = self.app.config, self.app.stage.shown, event.client.camera
        key, aspect = paths.key_of(camera), camera.aspect
        device = resolve_device(config.device)
        self.tell(0.0, "loading the model")
        with borrowed(config.model, device, config.offline) as prior:
            self.check()
            picture = picture_of(shown, key, aspect, prior.image_size, device)
            asked = asked_of(config, source_prompt(config, shown.path, prior, picture))
            prior.text([asked.source, asked.target])  # words it does not know, before anything is measured
            return ask(prior, picture, asked, tell=self.tell, stop=self.check)

    def check(self) -> None:
        """Raise InputError if it shall end."""
        if self.stop.is_set() or self.app.stage.closed:
            raise InputError("the diagnosis was cancelled.")
        if self.held():
            raise InputError("the diagnosis was given up, for an edit has begun; ask again once it is paused or done.")

    def show(self, found: Found) -> None:
        """Put it all into the tab."""
        self.found = found
        said = found.asked
        levels, lines = curves(found.drift)
        with self.app.server.atomic():
            self.plot.series = lines_of(list(lines))
            self.plot.data = tuple(np.array(values, float) for values in (levels, *lines.values()))
        self.strip.image, self.maps.image = strip(found.means), pulls_over(found)
        self.under.content, self.below.content = map(escape, captions(found))
        for element in (self.plot, self.strip, self.under, self.maps, self.below):
            element.visible = True
        self.said.content = f"**{escape(verdict(found.drift.rows, said))}**"
        self.save.disabled = False

    def begin_waiting(self, _: Any) -> None:
        """The edit is paused or has ended: do what was asked meanwhile."""
        event, self.waiting = self.waiting, None
        if event is not None and not self.held():
            self.app.act(self.diagnose, slow=True)(event)
        else:
            self.waiting = event

    def give_up(self, _: Any) -> None:
        """Cancel, or no longer wait."""
        self.stop.set()
        if self.waiting is not None:
            self.waiting = None
            self.said.content = ""
            self.busy(False)

    def store(self, event: Any) -> None:
        """Write what was found last into a folder of its own."""
        if self.found is None:
            raise InputError("There is nothing to save yet: diagnose a view first.")
        place = folder_of(self.app.stage.shown, self.app.config) / f"diagnosis@{datetime.now():%Y%m%d-%H%M%S}"
        folder = write(self.found, unused(place))
        self.app.notify("Saved", str(folder), color="green", client=event.client)

    def tell(self, share: float, words: str) -> None:
        self.bar.value = 100 * share
        self.said.content = words

    def busy(self, yes: bool) -> None:
        """Show what there is to see while the model is asked."""
        self.bar.value = 0.0
        self.bar.visible = self.cancel.visible = yes
        self.start.disabled = yes


def build(app: App) -> None:
    """Build the tab."""
    Panel(app)
