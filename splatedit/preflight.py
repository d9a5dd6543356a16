"""What an edit would take, before it is paid for: `splatedit run --dry-run`. A few steps are timed in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console

from splatedit import mask_settings, vram
from splatedit import work as settled
from splatedit.checkpoints import SECONDS
from splatedit.config import Config
from splatedit.editing import edit
from splatedit.errors import InputError, OutOfMemory
from splatedit.folders import nearest, place
from splatedit.fpr import BACKWARD
from splatedit.json_files import rounded
from splatedit.machine import device_name, peak_memory
from splatedit.media import draw
from splatedit.model_files import NETWORKS, first_line
from splatedit.progress import warn
from splatedit.work import check_run, options, prepare, seen_from, views_of_model, views_of_pictures

if TYPE_CHECKING:
    from splatedit.work import Work

WARM, TIMED = 1, 3  # steps that are taken: the first fills caches and is not counted
ASKED = 2 * 2 * 8  # evaluations of a view in the change report: before and after, two prompts, eight noise levels
MIB = 2**20


class Timed(NamedTuple):
    """What a few steps of an edit took."""

    source: float  # seconds of drawing and encoding the source
    steps: tuple[float, ...]  # seconds of each timed step
    prior: float  # seconds of the model in these, on average
    evaluations: float  # rows through the denoiser, a step, counted in all steps taken
    backwards: float  # rows sent back, likewise
    filled: float  # records of the source cache made, likewise
    peak: float  # MiB: of the GPU that torch held in these steps, on a CPU of the process so far
    state: float  # MiB that a checkpoint holds


class Cost(NamedTuple):
    """What a whole edit takes."""

    evaluations: float
    backwards: float
    seconds: float  # of the steps


def plan(config: Config, console: Console) -> dict[str, Any]:
    """Everything that `lines` says, as plain values; loads scene and model and takes a few steps in memory.

    Raises InputError for whatever a run would before it begins, and OutOfMemory if there is no room.
    """
    check_run(config)
    folder = future_folder(config)
    clock = time.perf_counter()
    work = prepare(config, console)
    work = work._replace(mask=mask_settings.of(work, console))
    here = work.gaussians.to(work.prior.device)
    list(draw(here, views_of_model(work, 1), work.background))  # what is compiled, is now
    loading = time.perf_counter() - clock
    try:
        with console.status("timing a few steps"):
            timed = take_steps(work)
    except Exception as error:
        if not vram.out_of_memory(error):
            raise
        hint = "a smaller --vram" if config.vram != min(vram.VRAM) else "a smaller model"
        raise OutOfMemory(f"out of memory in the first steps ({first_line(error)}); try {hint}.") from error
    return {
        **described(work),
        **costs(work, timed, loading),
        "memory_mib": memory(work, timed),
        "output": output(work, folder, timed),
    }


def described(work: Work) -> dict[str, Any]:
    """What the run would do."""
    config, n = work.config, work.gaussians.n
    return {
        "scene": {
            "file": config.scene,
            "splats": n,
            "sh_degree": work.gaussians.sh_degree,
            "may_change": n if work.mask is None else int(work.mask.sum()),
        },
        "cameras": {**seen_from(work), "in_each_step": config.views_per_step},
        "source_prompt": work.source_prompt,
        "source_prompt_from": work.origin,
        "prompt": config.prompt,
        "model": {"name": work.prior.name, "device": device_name(work.prior.device), "picture": work.prior.image_size},
        "guidance": {"name": config.guidance, "scale": scale_of(work), "solver": config.solver},
        "steps": config.steps,
    }


def costs(work: Work, timed: Timed, loading: float) -> dict[str, Any]:
    """Evaluations and seconds, of a step and of all."""
    cost, after, steps = whole(work, timed), report_seconds(work, timed), work.config.steps
    return {
        "evaluations": {
            "a_step": timed.evaluations,
            "backward_a_step": timed.backwards,
            "counted_in_steps": min(WARM + TIMED, steps),
            "at_most": work.config.guidance == "sdi",  # whose inversions get shorter as noise levels fall
            "all": round(cost.evaluations),
            "backward": round(cost.backwards),
        },
        "seconds": {
            "loading": loading,
            "source": timed.source,
            "a_step": cost.seconds / steps,
            "timed_steps": list(timed.steps),
            "steps": cost.seconds,
            "report": after,
            "all": loading + timed.source + cost.seconds + after,
        },
    }


def take_steps(work: Work) -> Timed:
    """The first steps of the edit, in memory alone."""
    device, config = work.prior.device, work.config
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    settings = {**options(work), "cache_dir": None}
    before, walls, prior, source, step = work.prior.evaluations, [], [], 0.0, None
    steps = edit(work.gaussians, config.prompt, work.source_prompt, model=work.prior, up=work.up, **settings)
    count = min(WARM + TIMED, config.steps)
    for index in range(count):
        start = time.perf_counter()
        step = next(steps)
        wall, own = time.perf_counter() - start, sum(step.seconds.values())
        if index == 0:
            source = wall - own
        if index >= WARM or count <= WARM:
            walls.append(wall if index else own)
            prior.append(step.seconds["prior"])
    del steps
    assert step is not None
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / MIB if on_gpu else peak_memory()["process"] or 0
    return Timed(
        source,
        tuple(walls),
        sum(prior) / len(prior),
        (step.evaluations - before) / count,
        step.backwards / count,
        step.cache.get("filled", 0) / count,
        float(peak),
        size_of(step.state()) / MIB,
    )


def size_of(state: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(size_of(value) for value in state.values())
    return sum(size_of(value) for value in state) if isinstance(state, (list, tuple)) else 0


def whole(work: Work, timed: Timed) -> Cost:
    """The cost of all steps, from that of a few.

    With a source cache the first steps make records that later ones find: D draws among R records, each as likely,
    leave R (1 - 1/R)^D of them unmade.
    """
    config, wall = work.config, sum(timed.steps) / len(timed.steps)
    a_step = (timed.evaluations, timed.backwards)
    evaluations, backwards = (config.steps * part for part in a_step)
    if config.source_cache and timed.filled:
        draws = config.views_per_step * config.steps
        served = config.views_per_step * (1 if scale_of(work) in (0, 1) else 2)  # what the edit alone takes of a step
        records = seen_from(work)["edit"] * config.source_cache
        fills = records * (1 - (1 - 1 / records) ** draws) if records > 1 else 1.0
        fills = max(fills, draws / config.cache_refresh) if config.cache_refresh else fills
        evaluations = config.steps * served + fills * (timed.evaluations - served) / timed.filled
        backwards = fills * timed.backwards / timed.filled
    unit = timed.prior / max(timed.evaluations + BACKWARD * timed.backwards, 1e-9)
    return Cost(
        evaluations, backwards, config.steps * (wall - timed.prior) + unit * (evaluations + BACKWARD * backwards)
    )


def scale_of(work: Work) -> float:
    """The classifier-free guidance scale of the edit."""
    given = work.config.guidance_scale
    return work.prior.default_scale(work.config.guidance) if given is None else given


def report_seconds(work: Work, timed: Timed) -> float:
    """Of the change report, the pictures and the film after the edit, from one picture of each kind."""
    row = timed.prior / max(timed.evaluations + BACKWARD * timed.backwards, 1e-9)
    seconds, there = settled.VIEWS * ASKED * row, work.gaussians.to(work.prior.device)
    for cameras in views_of_pictures(work):
        start = time.perf_counter()
        list(draw(there, cameras.pick([0]), work.background))
        seconds += 2 * cameras.n * (time.perf_counter() - start)
    return seconds


# -------------------------------------------------------------------------------------------------------------- memory
def memory(work: Work, timed: Timed) -> dict[str, Any]:
    """MiB: the peak of the timed steps, what of it is known by formula, and what later steps add."""
    parts, later = known(work)
    device = work.prior.device
    on_device = sum(v for k, v in parts.items() if device.type == "cpu" or k not in ("source_pictures", "source_cache"))
    return {
        "on": "the GPU" if device.type == "cuda" else "the process",
        "measured": timed.peak,
        "parts": {**parts, "activations_libraries_and_the_rest": max(timed.peak - on_device, 0.0)},
        "later": later,
        "all": timed.peak + sum(later.values()),
        "available": available(device),
    }


def known(work: Work) -> tuple[dict[str, float], dict[str, float]]:
    """MiB of what an edit keeps, by formula, and of what comes after the first steps."""
    config, g = work.config, work.gaussians
    per = {k: v.element_size() * v[0].numel() for k, v in g.parameters.items()}  # bytes of one splat
    trained = sum(size for k, size in per.items() if getattr(config, f"lr_{k}") > 0)
    inside = g.n if work.mask is None else int(work.mask.sum())
    cameras, side = seen_from(work)["edit"], work.prior.image_size
    latent = work.prior.latent_channels * (side // 2 ** (len(work.prior.vae.config.block_out_channels) - 1)) ** 2
    networks = [getattr(work.prior.pipeline, part, None) for part in NETWORKS]
    weights = sum(
        p.numel() * p.element_size() for network in networks if network is not None for p in network.parameters()
    )
    each = sum(per.values())
    parts = {
        "model": float(weights),
        "splats": each * g.n,
        "parameters_and_gradients": inside * (each + trained),
        "adam_moments": 2 * inside * trained,
        "source_latents": 4 * cameras * latent,
        "source_pictures": 4 * cameras * 3 * side**2,
    }
    later: dict[str, float] = {"averages": float(inside * each) if config.average_last else 0.0}
    if config.source_cache:
        later["source_cache"] = min(config.cache_mb * MIB, 8 * cameras * config.source_cache * latent)
    if config.grow_percent:
        limit = vram.cap(vars(config), g.n) or 2 * g.n
        later["added_splats"] = max(limit - g.n, 0) * (3 * each + 3 * trained)
    return tuple({k: v / MIB for k, v in group.items()} for group in (parts, later))  # pyright: ignore[reportReturnType]


def available(device: torch.device) -> float | None:
    """MiB that the edit could have: of a GPU what is free or torch's, else main memory that is free or ours."""
    if device.type == "cuda":
        return (vram.room(device) or 0.0) * 1e9 / MIB
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return int(lines["MemAvailable"].split()[0]) / 1024 + own / MIB
    except (OSError, ValueError, KeyError, IndexError):
        return None


# -------------------------------------------------------------------------------------------------------------- output
def future_folder(config: Config) -> Path:
    """The folder that a run begun now would make; raises InputError where it could not be made."""
    folder = place(config)
    there = nearest(folder.parent)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "Permission denied" if there.is_dir() else "Not a directory"
        raise InputError(
            f"output_dir: {config.output_dir} cannot be written to ({reason}); choose another with -o."
        ) from None
    return folder


def output(work: Work, folder: Path, timed: Timed) -> dict[str, Any]:
    """Where results would go, how large the large ones are (MiB), and how much room there is."""
    config, g = work.config, work.gaussians
    each = sum(v.element_size() * v[0].numel() for v in g.parameters.values())
    more = sum(column.nbytes for column in g.extra.values()) + 12 * g.n * (not g.layout or "nx" in g.layout)  # normals
    inside = g.n if work.mask is None else int(work.mask.sum())
    every = config.checkpoint_every
    return {
        "folder": str(folder),
        "edited_ply": (each * g.n + more) / MIB,
        "history": 2 * each * inside / MIB,
        "checkpoint": timed.state + (each * inside / MIB if config.average_last else 0.0),
        "checkpoints": f"about every {SECONDS:.0f} s"
        if every is None
        else f"every {every} steps"
        if every
        else "at the end",
        "free": shutil.disk_usage(nearest(folder)).free / MIB,
    }


# --------------------------------------------------------------------------------------------------------------- words
def size(mib: float) -> str:
    """`812 MiB`, `3.4 GiB`."""
    return f"{mib / 1024:.1f} GiB" if mib >= 1000 else f"{mib:.1f} MiB" if mib < 10 else f"{mib:.0f} MiB"


def duration(seconds: float) -> str:
    """`8.3 s`, `2 min 10 s`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The plan as rows of a short table."""
    scene, cameras, guidance, out = plan["scene"], plan["cameras"], plan["guidance"], plan["output"]
    rows, seconds, used = plan["evaluations"], plan["seconds"], plan["memory_mib"]
    inside = "all may change" if scene["may_change"] == scene["splats"] else f"{scene['may_change']:,} may change"
    solver = f", solver {guidance['solver']}" if guidance["name"] == "ids" else ""
    spread = f"{min(seconds['timed_steps']):.2g} to {max(seconds['timed_steps']):.2g}"
    parts = ", ".join(f"{k.replace('_', ' ')} {size(v)}" for k, v in used["parts"].items() if v >= 0.05)
    later = ", ".join(f"{k.replace('_', ' ')} {size(v)}" for k, v in used["later"].items() if v >= 0.05)
    have = "" if used["available"] is None else f", of {size(used['available'])} there is"
    back = f", {rows['backward']:,.0f} of them sent back" if rows["backward"] else ""
    return [
        ("scene", f"{scene['file']}: {scene['splats']:,} splats, SH degree {scene['sh_degree']}, {inside}"),
        ("cameras", f"{cameras['from']}: {cameras['edit']} views, {cameras['held_out']} held out, "
                    f"{cameras['in_each_step']} in each step"),
        ("prompts", f"from {plan['source_prompt']!r} ({plan['source_prompt_from']}) to {plan['prompt']!r}"),
        ("model", f"{plan['model']['name']}, {plan['model']['picture']} pixels, on {plan['model']['device']}"),
        ("guidance", f"{guidance['name']}, scale {guidance['scale']:g}{solver}, {plan['steps']} steps"),
        ("evaluations", f"{rows['a_step']:.3g} a step (counted in {rows['counted_in_steps']}), "
                        f"{'at most ' * rows['at_most']}{rows['all']:,} in all{back}"),
        ("time", f"about {duration(seconds['all'])}: {seconds['a_step']:.2g} s a step ({len(seconds['timed_steps'])} "
                 f"timed, {spread}), {duration(seconds['source'])} for the source, {duration(seconds['report'])} for "
                 f"report and pictures, {duration(seconds['loading'])} to load"),
        ("memory", f"about {size(used['all'])} of {used['on']}{have}"),
        ("", f"measured {size(used['measured'])} in these steps: {parts}"),
        *([("", f"by formula, later: {later}")] if later else []),
        ("checkpoints", f"{out['checkpoints']}, {size(out['checkpoint'])}, the last one stays"),
        ("output", f"{out['folder']} (not made): edited.ply {size(out['edited_ply'])}, history {size(out['history'])} "
                   f"at most; {size(out['free'])} free"),
    ]  # fmt: skip


def warnings(plan: dict[str, Any]) -> list[str]:
    """What speaks against starting this run."""
    used, out, found = plan["memory_mib"], plan["output"], []
    if used["available"] is not None and used["all"] > used["available"]:
        fitting = [
            gb for gb in sorted(vram.VRAM) if gb * 1e9 / MIB <= max(used["available"], min(vram.VRAM) * 1e9 / MIB)
        ]
        found.append(f"it may not fit into the memory there is; try --vram {max(fitting)}.")
    need = out["edited_ply"] + out["history"] + out["checkpoint"]
    if need > out["free"]:
        found.append(f"the results take about {size(need)}, but only {size(out['free'])} are free there.")
    if not math.isfinite(plan["seconds"]["all"]):
        found.append("the steps could not be timed.")
    return found


def tell(config: Config, as_json: bool = False) -> None:
    """Print the plan of a run on stdout, as a table or as JSON; progress and warnings go to stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    found = plan(config, console)
    if as_json:
        print(json.dumps(rounded(found), indent=1, ensure_ascii=False))
    else:
        for name, text in lines(found):
            print(f"{name:<12}{text}")
    for line in warnings(found):
        warn(console, line)
