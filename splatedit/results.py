"""What a run leaves in its folder: the splats, their history, the change report, pictures, a film, run.json."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from splatedit import __version__
from splatedit import work as settled  # its VIEWS and FRAMES are read when they are used
from splatedit.checkpoints import Keeper, Log
from splatedit.errors import DONE, INTERRUPTED, NOT_CHANGED, InputError
from splatedit.json_files import json_number, write_json
from splatedit.machine import device_name, peak_memory, versions
from splatedit.progress import warn
from splatedit.work import Work, seen_from, view_names, views_of_model, views_of_pictures

if TYPE_CHECKING:
    from torch import Tensor

    from splatedit.gaussians import Gaussians
    from splatedit.metrics import Report
    from splatedit.regions import PixelChange
    from splatedit.work import Work

FPS = 24  # of turntable.mp4


def write(work: Work, console: Console, folder: Path, log: Log, keeper: Keeper) -> dict[str, Any]:
    """Write everything but run.json, the edited splats first; return what run.json shall hold."""
    from splatedit.report import write_report

    raw, edited, lost = write_splats(work, folder, log)
    if log.last is not None and log.whole:
        keeper.write(log)
    record, report, regions, pictures = facts(work, log), None, {}, []
    if log.rows is not None:
        console.print(f"{record['splats_added']:,} splats added, {record['splats_removed']:,} removed")
    number = None
    try:
        number = remember(work, folder, log, record, console)
        with console.status("measuring the change"):
            report = measure(work, raw, log.rows)
        with console.status("drawing"):
            pictures, pixels = draw_pairs(work, folder, edited)
        regions = measure_regions(work, edited, log.rows, pixels)
    except KeyboardInterrupt:  # the splats are safe; the pictures are given up
        console.print("[bold yellow]Interrupted[/] while writing: the report and pictures not yet done are left out.")
    interrupted = log.interrupted or not pictures
    changed = report is not None and report.verdict == "changed"
    record["interrupted"] = interrupted
    record["exit_status"] = INTERRUPTED if interrupted else DONE if changed else NOT_CHANGED
    record["mended_splats"] = lost
    record["change"] = report.as_dict() if report else None
    record["network_evaluations"] = {
        "edit": log.evaluations,
        "all": work.prior.evaluations,
        "backward": log.backwards,
    }
    record["source_cache"] = log.cache
    record["peak_memory_mib"] = peak_memory()
    metrics = {
        "change": record["change"],
        "regions": regions,
        "views": views_of_report(work, report) if report else [],
        "pictures": pictures,
        "curve": curve(log),
    }
    write_json(metrics, folder / "metrics.json")
    history = note(folder, number, record) if number else []
    if pictures:
        write_report(record, metrics, work.config, folder, history)
    if report:
        tell(console, report, work.config.prompt, len(report.views))
    return record


def write_splats(work: Work, folder: Path, log: Log) -> tuple[Gaussians, Gaussians, int]:
    """Write edited.ply; return the splats as they came out of the edit, as they were written, and how many differ.

    If all steps had been taken before this run was resumed, the file is there, and is read.
    """
    from splatedit.files import load, save

    if log.last is None:
        edited = load(folder / "edited.ply")
        return edited, edited, 0
    raw, log.rows = without_lost(log.last.gaussians.to("cpu"), log.rows)
    edited, lost = mend(raw, work.gaussians, log.rows)
    save(edited._replace(comments=(*work.gaussians.comments, signature(work))), folder / "edited.ply")
    return raw, edited, lost


def remember(work: Work, folder: Path, log: Log, record: dict[str, Any], console: Console) -> int | None:
    """Record the edit in the history of edited.ply, on top of the scene's own; return its number, if that works."""
    from splatedit.stack import push

    facts = {**record, "config": asdict(work.config)}
    try:
        return push(folder / "edited.ply", work.gaussians, log.rows, facts, scene=work.config.scene).number
    except (InputError, OSError) as error:
        warn(console, f"{error} So this edit cannot be undone; edited.ply is complete all the same.")
        return None


def note(folder: Path, number: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Add to the history what came of the edit; return the history, see `stack.as_json`."""
    from splatedit.stack import Stack, as_json

    with suppress(InputError):
        stack = Stack(folder / "edited.ply")
        stack.note(number, verdict=(record["change"] or {}).get("verdict"), change=record["change"])
        stack.read()
        return as_json(stack)["entries"]
    return []


def without_lost(edited: Gaussians, rows: Tensor | None) -> tuple[Gaussians, Tensor | None]:
    """Leave out added splats that cannot be drawn, for which no source has values; rows as in `Step`."""
    if rows is None:
        return edited, None
    rows = rows.to("cpu")
    good = edited.drawable() | (rows >= 0)
    return (edited, rows) if good.all() else (edited.select(good), rows[good])


def mend(edited: Gaussians, source: Gaussians, rows: Tensor | None = None) -> tuple[Gaussians, int]:
    """Put back the source's values where a splat cannot be drawn, so that the file can be opened; and how many.

    rows: the source row that each splat continues, see `Step`; None: its own.
    """
    bad = ~edited.drawable()
    if not bad.any():
        return edited, 0
    fixed = {k: v.clone() for k, v in edited.parameters.items()}
    for name, value in fixed.items():
        value[bad] = source.parameters[name][bad if rows is None else rows[bad]]
    return edited._replace(**fixed), int(bad.sum())


def signature(work: Work) -> str:
    """One line for the header of edited.ply. No time of day: the same run gives the same file."""
    config = work.config
    how = f"{config.guidance}, {work.prior.name}, {config.steps} steps, seed {config.seed}"
    return f"splatedit {__version__}: {work.source_prompt!r} to {config.prompt!r}, {how}"


def measure(work: Work, edited: Gaussians, rows: Tensor | None) -> Report:
    """The change report over views held out, or of a rig such that lie between those of the pictures."""
    from splatedit.cameras import bounds
    from splatedit.metrics import change_report

    source, prior = work.gaussians, work.prior
    return change_report(
        source.to(prior.device),
        edited.to(prior.device),
        prior,
        views_of_model(work, settled.VIEWS, azimuth=180 / settled.VIEWS),
        work.config.prompt,
        work.source_prompt,
        bounds(source).radius,
        seed=work.config.seed,
        background=work.background,
        rows=rows,
        inside=work.inside,
    )


def measure_regions(
    work: Work, edited: Gaussians, rows: Tensor | None, pixels: dict[str, PixelChange]
) -> dict[str, dict[str, Any]]:
    """What metrics.json says of the whole scene and, with a mask, of its inside and outside."""
    from splatedit.cameras import bounds
    from splatedit.regions import as_dicts, splat_changes

    radius = bounds(work.gaussians).radius
    return as_dicts(splat_changes(work.gaussians, edited.to("cpu"), radius, rows, work.mask), pixels)


def views_of_report(work: Work, report: Report) -> list[dict[str, Any]]:
    """What metrics.json says of each view of the change report."""
    names = view_names(work, len(report.views), azimuth=180 / settled.VIEWS)
    return [{"view": name, **numbers} for name, numbers in zip(names, report.view_dicts(), strict=True)]


def draw_pairs(work: Work, folder: Path, edited: Gaussians) -> tuple[list[dict[str, Any]], dict[str, PixelChange]]:
    """Write renders/*.png, before and after, and turntable.mp4.

    Returns what metrics.json says of each pair, its paths within the folder, and how all pairs changed, by region.
    """
    from splatedit import media
    from splatedit.regions import pixel_changes
    from splatedit.scenes import marked

    both = work.gaussians.to(work.prior.device), edited.to(work.prior.device)
    cameras, turn = views_of_pictures(work)
    before, after = (list(media.draw(g, cameras, work.background)) for g in both)
    inside = None if work.mask is None else list(media.draw(marked(both[0], work.mask), cameras, (0.0, 0.0, 0.0)))
    together, each = pixel_changes(before, after, inside)
    (folder / "renders").mkdir(exist_ok=True)
    pictures = []
    for index, name in enumerate(view_names(work, cameras.n)):
        paths = {when: f"renders/{index:02d}_{when}.png" for when in ("before", "after")}
        media.save_png(before[index], folder / paths["before"])
        media.save_png(after[index], folder / paths["after"])
        pictures.append({"view": name, **paths, **{region: c._asdict() for region, c in each[index].items()}})
    media.save_png(media.sheet([*before, *after], cameras.n), folder / "renders" / "sheet.png")
    film = media.beside(*(media.draw(g, turn, work.background) for g in both))
    media.save_frames(film, folder / "turntable.mp4", max(FPS * turn.n / settled.FRAMES, 2))
    return pictures, together


def facts(work: Work, log: Log) -> dict[str, Any]:
    """What run.json says of the run itself."""
    from splatedit.cameras import guess_up
    from splatedit.metrics import count_rows

    config, prior, done = work.config, work.prior, len(log.loss)
    added, removed = count_rows(log.rows, work.gaussians.n)
    scale = prior.default_scale(config.guidance) if config.guidance_scale is None else config.guidance_scale
    return {
        "scene": config.scene,
        "sha256": work.sha256,
        "splats": work.gaussians.n,
        "splats_that_may_change": work.gaussians.n if work.mask is None else int(work.mask.sum()),
        "splats_added": added,
        "splats_removed": removed,
        "sh_degree": work.gaussians.sh_degree,
        "up": work.up or guess_up(work.gaussians),
        "cameras": seen_from(work),
        "prompt": config.prompt,
        "source_prompt": work.source_prompt,
        "source_prompt_from": work.origin,
        "model": prior.name,
        "guidance": config.guidance,
        "guidance_scale": scale,
        "seed": config.seed,
        "steps": done,
        "steps_asked": config.steps,
        "resumed_after": log.resumed,
        "stepped_down": log.stepped_down,
        "seconds_per_step": {"all": log.wall / done, **{k: v / done for k, v in log.seconds.items()}},
        "source_seconds": log.before,
        "edit_seconds": log.wall,
        "device": device_name(prior.device),
        "versions": versions(),
    }


def curve(log: Log) -> dict[str, list]:
    """Loss, PSNR to the source and (ids) drift and rms of the noise in every step; what is not finite becomes null."""
    lines: dict[str, list] = {"loss": [json_number(v) for v in log.loss], "psnr": [json_number(v) for v in log.psnr]}
    if any(log.drift):
        lines["fpr_drift"] = [[json_number(v) for v in row] for row in log.drift]
        lines["fpr_rms"] = [[json_number(v) for v in row] for row in log.rms]
    return lines


def tell(console: Console, report: Report, prompt: str, count: int) -> None:
    """The change report, over `count` views, in a line, or a loud box with what to try."""
    from rich.panel import Panel

    views = round(report.prefers_target * count)
    line = (
        f"{report.changed_share:.0%} of the splats changed, {report.psnr_to_source:.1f} dB to the source, "
        f"the model prefers {prompt!r} in {views} of {count} views"
    )
    if report.verdict == "changed":
        console.print(escape(f"changed: {line}"))
        for hint in report.advice:
            console.print(f"[yellow]{escape(hint)}")
        return
    title = {"unchanged": "NOTHING CHANGED", "noise": "THE EDIT WENT TO NOISE"}[report.verdict]
    text = "\n".join([line, *(f"  try {hint}" for hint in report.advice)])
    console.print(Panel(escape(text), title=f"[bold red]{title}", border_style="red", expand=False), soft_wrap=False)
