"""What `splatedit image` does between reading the words and printing the paths: a folder of edited pictures."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from splatedit.config import GUIDANCES, SOLVERS, Config, choose, within
from splatedit.errors import DONE, INTERRUPTED, NOT_CHANGED, InputError
from splatedit.folders import output_folder, slug
from splatedit.json_files import json_number, write_json
from splatedit.machine import versions
from splatedit.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from splatedit.priors import Prior

# Of grid.png: pixels of height for a line of text, the longest side of a tile, and how many rows it has at most.
LABEL, TILE, ROWS = 18, 256, 100


@dataclass
class ImageOptions:
    """The words of `splatedit image`, named as there."""

    picture: str  # a file or a folder
    prompts: tuple[str, ...]
    source: str | None = None
    guidances: tuple[str, ...] = ("ids",)
    guidance_scale: float | None = None
    model: str = "pocket"
    steps: int | None = None
    rate: float | None = None
    seed: int = 0
    solver: str = "grad"
    fpr_iters: int = 3
    fpr_lambda: float = 1.0
    batch: int = 4
    fit: str = "crop"
    output_dir: str = "outputs"
    device: str = "auto"
    offline: bool = False


class Sight(NamedTuple):
    """A picture as the model is given it."""

    name: str  # its own among those of a run, fit for a file
    path: Path
    pixels: Tensor  # (3, s, s) in [0, 1]
    source: str  # what it shows
    origin: str  # of that prompt: "option", "model" or "none"


class Edited(NamedTuple):
    """What one guidance made of one picture for one prompt."""

    sight: Sight
    prompt: str
    guidance: str
    pixels: Tensor  # (3, s, s) in [0, 1]
    record: dict[str, Any]  # its entry in metrics.json


class ImageOutcome(NamedTuple):
    """What a run leaves behind."""

    folder: Path
    files: list[Path]  # the edited pictures, by picture, prompt and guidance
    record: dict[str, Any]  # what run.json holds
    status: int  # DONE, NOT_CHANGED or INTERRUPTED


def edit_files(
    options: ImageOptions, console: Console | None = None, command: Sequence[str] | None = None
) -> ImageOutcome:
    """Edit a picture, or all in a folder, and write a new folder; progress and messages go to `console` (stderr).

    A KeyboardInterrupt keeps the edits that are whole; before the first one is, nothing is left behind. Raises
    InputError for a mistake in the options, a picture or the model, before the first step.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    started, clock = datetime.now().astimezone(), time.perf_counter()
    check(options)
    from splatedit.images import find_pictures
    from splatedit.priors import check_prior

    paths = find_pictures(options.picture)
    check_prior(options.model, options.offline)
    named = Config(scene=str(options.picture), prompt=options.prompts[0], output_dir=options.output_dir)
    with output_folder(named) as folder:
        (folder / "cmd.txt").write_text(shlex.join(command or sys.argv) + "\n", encoding="utf-8")
        prior = load(options, console)
        sights = look(options, prior, paths, console)
        edits, interrupted = edit_all(options, prior, sights, console)
        if not edits:
            raise KeyboardInterrupt
        files = write(options, folder, sights, edits)
    status = INTERRUPTED if interrupted else DONE if any(changed(e) for e in edits) else NOT_CHANGED
    record = {
        "options": vars(options),
        "interrupted": interrupted,
        "exit_status": status,
        "model": prior.name,
        "device": str(prior.device),
        "network_evaluations": prior.evaluations,
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": time.perf_counter() - clock,
    }
    write_json(record, folder / "run.json")
    tell(edits, console)
    return ImageOutcome(folder, files, record, status)


def check(options: ImageOptions) -> None:
    """Raise InputError for what can be told to be wrong before anything is loaded."""
    if not options.prompts or not all(p.strip() for p in options.prompts):
        raise InputError('prompt: it is empty; say what the picture shall show, as in "a pig".')
    twice = [g for g in options.guidances if options.guidances.count(g) > 1]
    if twice or len(set(options.prompts)) < len(options.prompts):
        raise InputError(f"{'--compare' if twice else 'prompt'}: the same thing is asked for twice; once is enough.")
    for name in options.guidances:
        choose("guidance", name, GUIDANCES)
    choose("solver", options.solver, SOLVERS)
    for name, value, low in (("steps", options.steps, 1), ("guidance_scale", options.guidance_scale, 0.0)):
        if value is not None:
            within(name, value, low, math.inf)
    if options.rate is not None and not 0 < options.rate < math.inf:
        raise InputError(f"rate: found {options.rate}, expected more than 0.")
    spans = (("seed", 0, 2**63 - 1), ("batch", 1, 1024), ("fpr_iters", 0, math.inf), ("fpr_lambda", 0.0, math.inf))
    for name, low, high in spans:
        within(name, getattr(options, name), low, high)


# ---------------------------------------------------------------------------------------------------------- beforehand
def load(options: ImageOptions, console: Console) -> Prior:
    """The model; raises InputError for one that is not there, and for a prompt or a scale that it cannot take."""
    from splatedit.distilling import Method
    from splatedit.editing import resolve_device
    from splatedit.images import suited_scale
    from splatedit.priors import load_prior

    for name in options.guidances:
        Method(name).check()  # what vsd needs may not be installed: better known before the others have been waited for
    with console.status("loading the model"):
        prior = load_prior(options.model, resolve_device(options.device), offline=options.offline)
    prior.text([*options.prompts, *([] if options.source is None else [options.source])])
    for name in options.guidances:
        prior.check_scale(suited_scale(prior, name, options.guidance_scale))
    return prior


def look(options: ImageOptions, prior: Prior, paths: Sequence[Path], console: Console) -> list[Sight]:
    """The pictures at the model's size, and what each shows: as given, or as the model sees it."""
    import torch

    from splatedit.images import encode, read_picture
    from splatedit.priors import find_prompt

    pixels = [read_picture(path, prior.image_size, options.fit) for path in paths]
    sights = []
    for path, picture, name in zip(paths, pixels, file_names([path.stem for path in paths]), strict=True):
        source, origin = options.source, "option"
        if source is None and prior.vocabulary is not None:
            generator = torch.Generator(prior.device).manual_seed(options.seed)
            with console.status(f"asking the model what {path.name} shows"):
                (source, _), origin = find_prompt(prior, encode(prior, picture[None]), generator), "model"
        elif source is None:
            source, origin = "", "none"
        sights.append(Sight(name, path, picture, source, origin))
        said = {"option": "as given", "model": "found by the model; --source overrides it", "none": "empty"}[origin]
        console.print(escape(f"{path.name}: from {source!r} ({said})"))
    if sights[0].origin == "none":
        console.print("[bold yellow]No source prompt:[/] the empty one is used; --source usually gives a better edit.")
    return sights


def file_names(texts: Sequence[str]) -> list[str]:
    """A name for each text that is fit for a file and unlike the others."""
    names: list[str] = []
    for text in texts:
        name, count = slug(text), 1
        while name in names:
            count += 1
            name = f"{slug(text)}-{count}"
        names.append(name)
    return names


# ----------------------------------------------------------------------------------------------------------- the edits
def edit_all(
    options: ImageOptions, prior: Prior, sights: Sequence[Sight], console: Console
) -> tuple[list[Edited], bool]:
    """Every prompt by every guidance on every picture, in batches of one source prompt; and if it was cut short."""
    edits: list[Edited] = []
    try:
        for batch in batches(sights, options.batch):
            for prompt in options.prompts:
                for guidance in options.guidances:
                    edits += edit_batch(options, prior, batch, prompt, guidance, console)
    except KeyboardInterrupt:
        if edits:
            console.print(f"[bold yellow]Interrupted[/] after {len(edits)} edits; these are written.")
        return edits, True
    return edits, False


def batches(sights: Sequence[Sight], size: int) -> list[list[Sight]]:
    """Pictures that show the same, in order, at most `size` together."""
    groups: dict[str, list[Sight]] = {}
    for sight in sights:
        groups.setdefault(sight.source, []).append(sight)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def edit_batch(
    options: ImageOptions, prior: Prior, batch: Sequence[Sight], prompt: str, guidance: str, console: Console
) -> list[Edited]:
    """One prompt by one guidance on some pictures, measured."""
    import torch

    from splatedit.images import edit_images, preset

    count = preset(guidance).steps if options.steps is None else options.steps
    same = ("guidance_scale", "steps", "rate", "seed", "solver", "fpr_iters", "fpr_lambda")
    before, source = torch.stack([sight.pixels for sight in batch]), batch[0].source
    rows, start, pace = prior.evaluations, time.perf_counter(), 0.0
    console.print(escape(f"{', '.join(s.path.name for s in batch)}: {source!r} to {prompt!r} by {guidance}"))
    steps = edit_images(
        before, prompt, source, model=prior, guidance=guidance, **{k: getattr(options, k) for k in same}
    )
    last = None
    with progress_bar(console, count) as show:
        for last in steps:
            pace = (time.perf_counter() - start) / (last.index + 1)
            show(last, pace)
    assert last is not None
    seconds = time.perf_counter() - start
    if not math.isfinite(last.loss):
        console.print(
            f"[bold red]The edit is lost:[/] the loss is {last.loss}; try a lower --rate or --guidance-scale."
        )
    spent = {
        "steps": last.index + 1,
        "evaluations": (last.evaluations - rows) // len(batch),
        "backwards": last.backwards // len(batch),
        "seconds": seconds / len(batch),
    }
    after = last.pictures().nan_to_num()
    measured = measure(prior, before, after, prompt, source, options.seed)
    settings = {"guidance": guidance, **chosen(options, prior, guidance), **spent}
    each = zip(batch, after, measured, strict=True)
    return [Edited(sight, prompt, guidance, new, {**settings, **numbers}) for sight, new, numbers in each]


def chosen(options: ImageOptions, prior: Prior, guidance: str) -> dict[str, Any]:
    """The settings that an edit by this guidance has in the end."""
    from splatedit.images import preset, suited_scale

    published = preset(guidance)
    settings = {
        "guidance_scale": suited_scale(prior, guidance, options.guidance_scale),
        "rate": published.rate if options.rate is None else options.rate,
        "t_range": list(published.t_range),
        "settings_from": published.source,
    }
    refining = {k: getattr(options, k) for k in ("solver", "fpr_iters", "fpr_lambda")}
    return {**settings, **refining} if guidance == "ids" else settings


def measure(
    prior: Prior, before: Tensor, after: Tensor, prompt: str, source: str, seed: int
) -> list[dict[str, float | str | None]]:
    """For each picture: PSNR (dB) and SSIM to the source, what the model makes of both, and a verdict."""
    from splatedit.images import decode, encode
    from splatedit.metrics import ROUGH, margins, psnr, roughness, ssim

    before, after = before.to(prior.device), after.to(prior.device)
    plain = decode(prior, encode(prior, before))  # what the autoencoder alone does to it
    asked = [margins(prior, images, prompt, source, seed).tolist() for images in (before, after)]
    rows = []
    for index in range(len(before)):
        old, new, same = (images[index : index + 1] for images in (before, after, plain))
        rough = roughness(new) > ROUGH and roughness(new) > 2.5 * roughness(same)
        still = psnr(new, same) > 45
        rows.append(
            {
                "verdict": "noise" if rough else "unchanged" if still else "changed",
                "psnr_to_source": json_number(psnr(new, old)),
                "ssim_to_source": ssim(new, old),
                "autoencoder_psnr": json_number(psnr(same, old)),
                "autoencoder_ssim": ssim(same, old),
                "prefers_target": asked[1][index] > 0,
                "preferred_target_before": asked[0][index] > 0,
                "margin": json_number(asked[1][index]),
                "margin_before": json_number(asked[0][index]),
            }
        )
    return rows


def changed(edit: Edited) -> bool:
    return edit.record["verdict"] == "changed"


# ----------------------------------------------------------------------------------------------------------- afterwards
def write(options: ImageOptions, folder: Path, sights: Sequence[Sight], edits: list[Edited]) -> list[Path]:
    """Write the pictures, the grid and metrics.json; the paths of the edited pictures, in the order of the grid."""
    from splatedit.media import save_png, to_bytes

    names, prompts, guidances = [s.name for s in sights], options.prompts, options.guidances
    edits.sort(key=lambda e: (names.index(e.sight.name), prompts.index(e.prompt), guidances.index(e.guidance)))
    words = dict(zip(prompts, file_names(prompts), strict=True))
    for edit in edits:
        edit.record["file"] = f"{edit.sight.name}_{words[edit.prompt]}_{edit.guidance}.png"
    done = {e.sight.name for e in edits}
    (folder / "sources").mkdir()
    for sight in sights:
        if sight.name in done:
            save_png(to_bytes(sight.pixels[None])[0], folder / "sources" / f"{sight.name}.png")
    for edit in edits:
        save_png(to_bytes(edit.pixels[None])[0], folder / edit.record["file"])
    save_png(grid(options, edits), folder / "grid.png")
    entries = [
        {
            "picture": str(e.sight.path),
            "source_prompt": e.sight.source,
            "source_prompt_from": e.sight.origin,
            "prompt": e.prompt,
            **e.record,
        }
        for e in edits
    ]
    write_json({"edits": entries}, folder / "metrics.json")
    return [folder / e.record["file"] for e in edits]


def grid(options: ImageOptions, edits: Sequence[Edited]) -> np.ndarray:
    """One row for each picture and prompt, one column for the source and each guidance, words above each (h, w, 3)."""
    from itertools import islice

    from splatedit.media import sheet, to_bytes

    tiles = []
    for row in islice(dict.fromkeys((e.sight.name, e.prompt) for e in edits), ROWS):
        made = {e.guidance: e for e in edits if (e.sight.name, e.prompt) == row}
        sight = next(iter(made.values())).sight
        source = to_bytes(sight.pixels[None])[0]
        tiles.append(labelled(source, [sight.path.name, sight.source or "no prompt"]))
        for name in options.guidances:
            picture = to_bytes(made[name].pixels[None])[0] if name in made else source * 0 + 255
            tiles.append(labelled(picture, [name.upper(), row[1] if name in made else "not done"]))
    return sheet(tiles, 1 + len(options.guidances), gap=4)


def labelled(picture: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """A picture (h, w, 3), at most TILE pixels a side, below lines of black text on white, cut to its width."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    tile = Image.fromarray(picture)
    tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    width, height = tile.size
    font = ImageFont.load_default()
    page = Image.new("RGB", (width, height + LABEL * len(lines)), "white")
    pen = ImageDraw.Draw(page)
    for index, line in enumerate(lines):
        while len(line) > 1 and pen.textlength(drawable(line, font), font=font) > width - 4:
            line = line.rstrip("…")[:-1] + "…"
        pen.text((2, 3 + LABEL * index), drawable(line, font), fill="black", font=font)
    page.paste(tile, (0, LABEL * len(lines)))
    return np.asarray(page)


def drawable(text: str, font: Any) -> str:
    """Text that the font can draw: the plain bitmap font of a Pillow without FreeType knows Latin-1 alone."""
    from PIL import ImageFont

    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")


def tell(edits: Sequence[Edited], console: Console) -> None:
    """One line for each edit, and what to try if nothing came of any."""
    for edit in edits:
        record = edit.record
        prefers = "prefers" if record["prefers_target"] else "does not prefer"
        distance = "no difference" if record["psnr_to_source"] is None else f"{record['psnr_to_source']:.1f} dB"
        console.print(
            escape(
                f"{record['verdict']}: {record['file']}: {distance} to the source, "
                f"the model {prefers} {edit.prompt!r}, {record['evaluations']} evaluations, {record['seconds']:.1f} s"
            )
        )
    if not any(changed(edit) for edit in edits):
        noise = any(edit.record["verdict"] == "noise" for edit in edits)
        hint = "a lower --rate or --guidance-scale" if noise else "more --steps, a higher --rate or --guidance-scale"
        console.print(f"[bold red]{'ONLY NOISE' if noise else 'NOTHING CHANGED'}:[/] try {hint}.")
