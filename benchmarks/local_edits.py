"""Edits that hold: what a mask, `outside`, `anchor` and growth do to one edit of a scene, side by side in one run.

    python benchmarks/local_edits.py [--scene scenes/cat.ply --target "a pig"] [--steps 120] [--only off anchor=0.02]

Each row is one edit from the same seed. inside, outside: mean |edited - source| over the pixels that the mask covers in
the source and those that it does not, in steps of 255, over 12 views between those of the edit. moved: mean way of the
splats that may change, per mille of the scene's radius. margin, prefers: as in the change report. The mask is the half
of the scene below its middle along the last axis.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import deque
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table

import splatedit
from splatedit.cameras import bounds, orbit
from splatedit.editing import Step, edit
from splatedit.files import sidecar
from splatedit.gaussians import Gaussians
from splatedit.growth import Growth
from splatedit.media import draw, save_png, sheet
from splatedit.metrics import count_rows, margins
from splatedit.priors import Prior, load_prior
from splatedit.scenes import Hold, Splats

EDITS: dict[str, dict[str, Any]] = {
    "whole": {},
    "anchor=0.01": {"hold": Hold(anchor=0.01)},
    "anchor=0.05": {"hold": Hold(anchor=0.05)},
    "masked": {"mask": True},
    "masked, outside=0.3": {"mask": True, "hold": Hold(outside=0.3)},
    "masked, outside=1": {"mask": True, "hold": Hold(outside=1)},
    "masked, outside=3": {"mask": True, "hold": Hold(outside=3)},
    "grow_percent=5": {"growth": Growth(percent=5, every=10)},
    "grow_percent=20": {"growth": Growth(percent=20, every=10)},
    "masked, grow_percent=5": {"mask": True, "growth": Growth(percent=5, every=10)},
}
VIEWS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", default="scenes/cat.ply")
    parser.add_argument("--target", default="a pig")
    parser.add_argument("--guidance", default="dds")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=EDITS, default=list(EDITS), metavar="ROW")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prior, gaussians = load_prior("pocket"), splatedit.load(options.scene)
    source = sidecar(options.scene).source_prompt or ""
    mask = gaussians.means[:, 2] < bounds(gaussians).centre[2]
    rows = {}
    for name in options.only:
        settings = {**EDITS[name], "guidance": options.guidance, "steps": options.steps}
        settings["mask"] = mask if settings.get("mask") else None
        start = time.perf_counter()
        last = deque(edit(gaussians, options.target, source, model=prior, **settings), maxlen=1).pop()
        seconds = (time.perf_counter() - start) / options.steps
        rows[name] = {**measure(prior, gaussians, last, mask, source, options.target), "seconds per step": seconds}
        if options.pictures:
            options.pictures.mkdir(parents=True, exist_ok=True)
            views = orbit(gaussians, 4, elevation=12, size=320)
            path = options.pictures / f"{name.replace(', ', '-').replace('=', '')}.png"
            save_png(sheet([*draw(last.gaussians, views, (1.0, 1.0, 1.0))], 4), path)
    show(rows, options.steps)
    if options.json:
        about = {"machine": platform.processor(), "scene": options.scene, "target": options.target}
        about |= {"guidance": options.guidance, "steps": options.steps, "rows": rows}
        options.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(
    prior: Prior, gaussians: Gaussians, last: Step, mask: torch.Tensor, source: str, target: str
) -> dict[str, float]:
    """One row of the table."""
    extent = bounds(gaussians)
    cameras = orbit(gaussians, VIEWS, elevation=12, azimuth=180 / VIEWS, size=prior.image_size)
    scene, views = Splats(gaussians, cameras, extent.radius, mask=mask), list(range(VIEWS))
    inside = scene.coverage(views)
    before, after = scene(views, gaussians).rgb, scene(views, last.gaussians).rgb
    difference = (after - before).abs().mean(1, keepdim=True) * 255
    rows = torch.arange(gaussians.n) if last.rows is None else last.rows
    stayed = (rows >= 0) & mask[rows]
    way = (last.gaussians.means[stayed] - gaussians.means[rows[stayed]]).norm(dim=1).mean() / extent.radius
    gaps = margins(prior, after, target, source)
    added, removed = count_rows(last.rows, gaussians.n)
    return {
        "inside": float((inside * difference).sum() / inside.sum()),
        "outside": float(((1 - inside) * difference).sum() / (1 - inside).sum()),
        "moved": float(way) * 1000,
        "margin": float(gaps.mean()),
        "prefers": float((gaps > 0).float().mean()),
        "added": added,
        "removed": removed,
    }


def show(rows: dict[str, dict[str, float]], steps: int) -> None:
    """The rows as a table."""
    names = list(next(iter(rows.values())))
    table = Table("edit", *names, title=f"{steps} steps")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[k]:d}" if isinstance(row[k], int) else f"{row[k]:.3g}" for k in names))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
