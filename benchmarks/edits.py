"""Does the edit reach the target, and what does it keep? SDS, DDS and IDS side by side on counterfactual pairs.

    python benchmarks/edits.py --meshes FOLDER_OF_CUBE_PETS [--pairs cat:pig ...] [--seeds 0 1 2] [--output out.json]
                               [--methods ids ids:solver=picard_null,fpr_iters=2 dds ...]

All Cube Pets share one body, so the mesh of the target drawn from the source's cameras is the ground truth of an edit.
Views are 16 held-out orbit views (no edit camera looks from there). One run per method, pair and seed; it is measured
at several steps, so that methods can be compared at the *same target score* and not at the same number of steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table

import splatedit
from splatedit.cameras import bounds, orbit
from splatedit.config import parse_word, typed
from splatedit.diffusion import denoising_errors
from splatedit.editing import edit
from splatedit.metrics import changed_share, iou, psnr, roughness, ssim
from splatedit.pocket.judge import load_judge
from splatedit.pocket.meshes import load_mesh
from splatedit.pocket.scenes import ground_truth
from splatedit.priors import load_prior
from splatedit.render import WHITE, render
from splatedit.tuning import Tuning

PAIRS = ("cat:pig", "cat:fox", "dog:panda", "fox:cow", "penguin:bear")
VIEWS, ELEVATION, AZIMUTH = 16, 12.0, 11.25
COLUMNS = {
    "prior": "prior prefers target",
    "judge": "judge agrees",
    "log_odds": "judge log-odds",
    "bg_psnr": "bg PSNR",
    "bg_ssim": "bg SSIM",
    "iou": "mask IoU",
    "truth_psnr": "PSNR to truth",
    "source_psnr": "PSNR to source",
    "rough": "roughness",
}


class Ruler:
    """Measures edited splats of one pair over the held-out views."""

    def __init__(self, prior, source, source_name: str, target_name: str, meshes: Path, size: int):
        self.prior, self.source = prior, source
        self.judge, names = load_judge()
        self.index = names.index(source_name), names.index(target_name)
        self.cameras = orbit(source, VIEWS, elevation=ELEVATION, azimuth=AZIMUTH, size=size, up="-y")
        self.before = render(source, self.cameras)
        self.truth, mask = ground_truth(load_mesh(meshes / f"{target_name}.glb"), self.cameras, WHITE)
        self.mask = mask
        self.outside = ((self.before.alpha < 0.01) & (mask < 0.01)).float()
        self.texts = [prior.text([f"a {n}"]) for n in (source_name, target_name)]

    @torch.no_grad()
    def __call__(self, gaussians) -> dict[str, float]:
        after = render(gaussians, self.cameras)
        images = after.rgb.clamp(0, 1)
        errors = denoising_errors(
            self.prior.denoise,
            self.prior.encode(images),
            self.texts,
            self.prior.alphas_cumprod,
            torch.Generator().manual_seed(0),
        )
        logits = self.judge(images)
        odds = logits.log_softmax(1)[:, self.index[1]] - logits.log_softmax(1)[:, self.index[0]]
        return {
            "prior": float((errors[:, 1] < errors[:, 0]).float().mean()),
            "judge": float((logits.argmax(1) == self.index[1]).float().mean()),
            "log_odds": float(odds.mean()),
            "bg_psnr": min(psnr(images, self.before.rgb, self.outside), 80.0),
            "bg_ssim": ssim(images, self.before.rgb, self.outside),
            "iou": iou(after.alpha, self.mask),
            "truth_psnr": psnr(images, self.truth),
            "source_psnr": psnr(images, self.before.rgb),
            "rough": roughness(images) / roughness(self.before.rgb),
            "changed": changed_share(self.source, gaussians, bounds(self.source).radius),
        }


def run_one(prior, ruler: Ruler, prompt: str, source: str, method: str, seed: int, args) -> dict:
    """One edit, measured at `args.points` evenly spaced steps."""
    marks = {round(args.steps * (k + 1) / args.points) - 1 for k in range(args.points)}
    guidance, settings = read_method(method)
    options = {"guidance_scale": args.scale, "fpr_lambda": args.fpr_lambda, **settings}
    curve, spent, start = [], 0.0, time.perf_counter()
    for step in edit(
        ruler.source, prompt, source, model=prior, guidance=guidance, steps=args.steps, seed=seed, up="-y", **options
    ):
        if step.index in marks:
            spent += time.perf_counter() - start
            curve.append({"step": step.index + 1, "seconds": round(spent, 1), **ruler(step.gaussians)})
            start = time.perf_counter()
    return {"method": method, "seed": seed, "source": source, "prompt": prompt, "curve": curve}


def read_method(text: str) -> tuple[str, dict]:
    """`ids:solver=picard,fpr_iters=2` as a guidance and settings of it: of `edit`, or of `tuning.Tuning`."""
    name, _, words = text.partition(":")
    settings = {k: typed(k, parse_word(f"{k}={v}")[k]) for k, v in (w.split("=") for w in words.split(",") if w)}
    tuned = {k: settings.pop(k) for k in list(settings) if k in Tuning._fields}
    return name, {**settings, "tuning": Tuning(**tuned)}


def at_score(curve: list[dict], score: float, key: str = "log_odds") -> dict | None:
    """The measurements where `key` first crosses `score`, interpolated; None if it never does."""
    for before, after in zip([None, *curve], curve, strict=False):
        if after[key] >= score:
            if before is None or after[key] == before[key]:
                return dict(after)
            f = (score - before[key]) / (after[key] - before[key])
            return {k: before[k] + f * (after[k] - before[k]) for k in after}
    return None


def mean(rows: list[dict], key: str) -> float:
    values = [r[key] for r in rows if math.isfinite(r[key])]
    return sum(values) / len(values) if values else math.nan


def tables(runs: list[dict], score: float, console: Console) -> dict:
    """Print the final and the matched-score comparison; return them as plain data."""
    out: dict = {}
    for title, pick in (
        ("at the last step", lambda run: run["curve"][-1]),
        (f"where the judge's log-odds reach {score:g}", lambda run: at_score(run["curve"], score)),
    ):
        table = Table("method", "runs", *COLUMNS.values(), "step", "s", title=title)
        for method in dict.fromkeys(r["method"] for r in runs):
            rows = [pick(r) for r in runs if r["method"] == method]
            reached = [r for r in rows if r is not None]
            values = {k: mean(reached, k) for k in (*COLUMNS, "step", "seconds")}
            table.add_row(method, f"{len(reached)}/{len(rows)}", *(f"{v:.3g}" for v in values.values()))
            out[f"{method} {title}"] = {**values, "reached": len(reached), "of": len(rows)}
        console.print(table)
    per_pair = Table("pair", "method", *COLUMNS.values(), title="by pair, at the last step, mean over seeds")
    for key in dict.fromkeys((r["source"], r["prompt"], r["method"]) for r in runs):
        rows = [r["curve"][-1] for r in runs if (r["source"], r["prompt"], r["method"]) == key]
        per_pair.add_row(f"{key[0]} -> {key[1]}", key[2], *(f"{mean(rows, k):.3g}" for k in COLUMNS))
    console.print(per_pair)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--meshes", type=Path, help="folder of the Cube Pets .glb files (CC0)")
    parser.add_argument("--scenes", type=Path, default=Path(__file__).parent.parent / "scenes")
    parser.add_argument("--pairs", nargs="+", default=PAIRS)
    parser.add_argument("--methods", nargs="+", default=("ids", "dds", "sds"))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--points", type=int, default=10, help="measurements along each run")
    parser.add_argument("--fpr-lambda", type=float, default=1.0, help="of ids")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scale", type=float, help="one guidance scale for all methods (default: each its own)")
    parser.add_argument("--score", type=float, default=0.0, help="judge log-odds at which methods are compared")
    parser.add_argument("--output", type=Path, help="write all runs and tables here as JSON")
    parser.add_argument("--merge", nargs="+", type=Path, help="no runs: the tables of these earlier outputs together")
    args = parser.parse_args()
    if args.merge:
        parts = [json.loads(path.read_text()) for path in args.merge]
        runs = [run for part in parts for run in part["runs"]]
        facts = {k: parts[0][k] for k in ("machine", "date", "settings")}
        facts["settings"]["pairs"] = sorted({f"{r['source']} -> {r['prompt']}" for r in runs})
        facts["settings"]["seeds"] = sorted({r["seed"] for r in runs})
        finish(runs, args, facts)
        return
    if not args.meshes:
        parser.error("--meshes is needed")
    torch.set_num_threads(args.threads)
    console, prior, runs = Console(width=170), load_prior("pocket"), []
    for pair in args.pairs:
        a, b = pair.split(":")
        ruler = Ruler(prior, splatedit.load(args.scenes / f"{a}.ply"), a, b, args.meshes, prior.image_size)
        for seed in args.seeds:
            for method in args.methods:
                run = run_one(prior, ruler, f"a {b}", f"a {a}", method, seed, args)
                runs.append(run)
                last = run["curve"][-1]
                console.print(pair, seed, method, {k: round(v, 3) for k, v in last.items()})
                if args.output:  # after every run: a long benchmark may be cut off
                    args.output.write_text(json.dumps({"runs": runs}, indent=1))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("output", "merge", "meshes", "scenes")}
    finish(runs, args, {"machine": machine, "date": time.strftime("%Y-%m-%d"), "settings": settings})


def finish(runs: list[dict], args, facts: dict) -> None:
    """Print the tables and, if asked, write everything as JSON."""
    summary = tables(runs, args.score, Console(width=170))
    if args.output:
        args.output.write_text(json.dumps({**facts, "summary": summary, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
