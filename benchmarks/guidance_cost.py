"""What does a step of each guidance cost? Network evaluations, backward passes and seconds, side by side in one run.

    python benchmarks/guidance_cost.py [--scene scenes/cat.ply --source "a cat" --target "a pig"] [--steps 1000]

Evaluations are rows through a denoiser, counted by hooks on every U-Net (so that what a method trains is seen too), per
view and step; cost counts a backward pass as 1.15 of them. Seconds are medians of whole steps of the edit; of the
cached methods, the median of steps that fill a record and that of the others, weighed by how many there were. Methods
without a cache take --rounds steps; cached ones go through a whole edit of --steps, a share of it in every round, so
that all see the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Column, Table

import splatedit
from splatedit.editing import edit
from splatedit.files import sidecar
from splatedit.fpr import BACKWARD
from splatedit.priors import load_prior

PARTS = ("render", "encode", "prior", "optimise")
REFERENCE = "ids grad N=3"  # what the others are compared with
METHODS: dict[str, dict[str, Any]] = {
    REFERENCE: {"guidance": "ids", "solver": "grad", "fpr_iters": 3},
    "ids grad_polyak N=3": {"guidance": "ids", "solver": "grad_polyak", "fpr_iters": 3},
    "ids picard N=3": {"guidance": "ids", "solver": "picard", "fpr_iters": 3},
    "ids picard_null N=2": {"guidance": "ids", "solver": "picard_null", "fpr_iters": 2},
    "ids picard_null N=3": {"guidance": "ids", "solver": "picard_null", "fpr_iters": 3},
    "ids by_level N=3": {"guidance": "ids", "solver": "by_level", "fpr_iters": 3},
    "ids anderson N=3": {"guidance": "ids", "solver": "anderson", "fpr_iters": 3},
    "sds": {"guidance": "sds"},
    "dds": {"guidance": "dds"},
    "pds": {"guidance": "pds"},
    "dreamcatalyst": {"guidance": "dreamcatalyst"},
    "cds": {"guidance": "cds"},
    "sdi": {"guidance": "sdi"},
    "vsd": {"guidance": "vsd"},
    "cached ids grad N=3": {"guidance": "ids", "solver": "grad", "fpr_iters": 3, "source_cache": 2},
    "cached ids picard_null N=2": {"guidance": "ids", "solver": "picard_null", "fpr_iters": 2, "source_cache": 2},
    "cached dds": {"guidance": "dds", "source_cache": 2},
    "cached pds": {"guidance": "pds", "source_cache": 2},
}


class Count:
    """Rows that go through any U-Net, forward and back."""

    def __init__(self):
        from diffusers import UNet2DConditionModel

        self.kind, self.forward, self.back = UNet2DConditionModel, 0, 0
        torch.nn.modules.module.register_module_forward_hook(self.seen)

    def seen(self, module, inputs, output) -> None:
        if isinstance(module, self.kind):
            rows = output[0] if isinstance(output, tuple) else output.sample
            self.forward += len(rows)
            # A loss on features inside sends nothing back from the output, one on weights nothing to the input.
            watched = inputs[0] if inputs[0].requires_grad else rows
            if watched.requires_grad:
                watched.register_hook(self.sent_back)

    def sent_back(self, gradient) -> None:
        self.back += len(gradient)


class Contestant:
    """One method's edit, taken forward a few steps at a time."""

    def __init__(self, gaussians, prior, args, options: dict[str, Any]):
        self.cached = "source_cache" in options
        steps = args.steps if self.cached else args.rounds
        common = {"model": prior, "views_per_step": args.views_per_step, "cameras": "dome", "views": args.cameras}
        up = sidecar(args.scene).up
        self.edit = edit(gaussians, args.target, args.source, steps=steps, up=up, seed=0, **common, **options)
        self.seconds: list[float] = []
        self.parts: dict[str, list[float]] = {part: [] for part in PARTS}
        self.forward = self.back = 0
        self.cache: dict[str, int] = {}
        self.fills: list[bool] = []  # whether a step filled a record

    def go(self, count: Count, steps: int) -> None:
        """Take `steps` steps and write down what they cost."""
        for _ in range(steps):
            forward, back, start = count.forward, count.back, time.perf_counter()
            step = next(self.edit)
            if self.seconds or self.cached:  # the first step of an edit also draws and encodes the source
                self.forward += count.forward - forward
                self.back += count.back - back
            self.seconds.append(sum(step.seconds.values()) if not self.seconds else time.perf_counter() - start)
            for part in PARTS:
                self.parts[part].append(step.seconds[part])
            self.fills.append(step.cache.get("filled", 0) > self.cache.get("filled", 0))
            self.cache = dict(step.cache)

    def middle(self, seconds: list[float]) -> float:
        """Median of a step; of cached edits, medians of both kinds of steps in their proportions."""
        kinds = [[s for s, fills in zip(seconds, self.fills, strict=True) if fills == kind] for kind in (True, False)]
        return sum(statistics.median(kind) * len(kind) for kind in kinds if kind) / len(seconds)

    def result(self, views: int) -> dict[str, Any]:
        """Per view and step; seconds per step."""
        steps = len(self.seconds)
        rows = views * (steps if self.cached else steps - 1)
        forward, back = self.forward / rows, self.back / rows
        return {
            "forward": forward,
            "back": back,
            "cost": forward + BACKWARD * back,
            "seconds": self.middle(self.seconds),
            **{part: self.middle(spent) for part, spent in self.parts.items()},
            "steps": steps,
            "cache": self.cache,
        }


def main() -> None:
    root = Path(__file__).parent.parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scene", default=str(root / "scenes" / "cat.ply"))
    parser.add_argument("--source", default="a cat")
    parser.add_argument("--target", default="a pig")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--views-per-step", type=int, default=2)
    parser.add_argument("--cameras", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000, help="of the cached edits")
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=tuple(METHODS), metavar="METHOD")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write all numbers here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prior, gaussians, count = load_prior(args.model, args.device), splatedit.load(args.scene), Count()
    Contestant(gaussians, prior, args, METHODS["dds"]).go(count, 1)  # the renderer is compiled in nobody's time
    contestants = {name: Contestant(gaussians, prior, args, METHODS[name]) for name in args.methods}
    for turn in range(args.rounds):
        for contestant in contestants.values():
            share = args.steps * (turn + 1) // args.rounds - args.steps * turn // args.rounds
            contestant.go(count, share if contestant.cached else 1)
    found = {name: contestant.result(args.views_per_step) for name, contestant in contestants.items()}
    show(found, args, Console(width=150))
    if args.output:
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        settings = {k: str(v) for k, v in vars(args).items() if k != "output"}
        facts = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "settings": settings}
        args.output.write_text(json.dumps({**facts, "methods": found}, indent=1) + "\n")


def show(found: dict[str, dict[str, Any]], args: argparse.Namespace, console: Console) -> None:
    """Print the table."""
    title = f"{args.source} to {args.target}, {args.views_per_step} views per step, cached over {args.steps} steps"
    table = Table(
        Column("method", no_wrap=True),
        "forward",
        "back",
        "cost",
        "s/step",
        *PARTS,
        "faster",
        "prior faster",
        "records",
        title=title,
    )
    reference = found.get(REFERENCE)
    for name, row in found.items():
        ratios = [f"{reference[k] / row[k]:.2f}" if reference else "" for k in ("seconds", "prior")]
        numbers = [f"{row[k]:.2f}" for k in ("forward", "back", "cost")]
        seconds = [f"{row[k]:.3f}" for k in ("seconds", *PARTS)]
        table.add_row(name, *numbers, *seconds, *ratios, str(row["cache"].get("filled", "")))
    console.print(table)


if __name__ == "__main__":
    main()
