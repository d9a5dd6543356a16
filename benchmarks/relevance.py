"""Does text relevance fall where the edit has to change something? Against the known truth of counterfactual pairs.

    python benchmarks/relevance.py --meshes FOLDER [--pairs cat:pig fox:dog] [--pictures FOLDER]

All Cube Pets share one body, so the target's mesh drawn from the same cameras is the true result of an edit. A splat's
truth is the difference of the two drawings, lifted as relevance is: in colour (beyond a quarter of the range) and in
shape (the silhouettes differ). Alone on white nearly all of an animal differs; so each scene is measured once more
with a grey floor of 6,000 splats under it, of which nothing has to change: the truth is then the animal's splats.
AUC is the chance that a splat that has to change is more relevant than one that has not; 0.5 is guessing.
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
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import splatedit
from splatedit.gaussians import SH_C0, Gaussians
from splatedit.mask_run import HIGHLIGHT
from splatedit.media import save_png, sheet, to_bytes
from splatedit.metrics import iou
from splatedit.pocket.meshes import load_mesh
from splatedit.pocket.scenes import UP, ground_truth
from splatedit.pocket.views import caption
from splatedit.priors import load_prior
from splatedit.relevance import MAPS, VIEWS, measure
from splatedit.render import fill_unseen, lift, render

PAIRS = ("cat:pig", "dog:fox", "fox:dog", "bear:panda", "penguin:bear")
COLUMNS = ("auc_colour", "auc_shape", "auc_animal", "iou_animal", "inside", "contrast", "agreement", "parted")


def auc(values: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of values (n,) for truth (n,) bool; nan if that is all one."""
    ranks = values.argsort().argsort().double() + 1
    yes, no = int(truth.sum()), int((~truth).sum())
    return (float(ranks[truth].sum()) - yes * (yes + 1) / 2) / (yes * no) if yes and no else math.nan


def on_a_floor(gaussians: Gaussians, count: int = 6000) -> Gaussians:
    """The scene (y down) on a grey slab of flat discs, which come after its own rows."""
    rng = torch.Generator().manual_seed(0)
    place = 2.2 * (torch.rand(count, 2, generator=rng) - 0.5)
    height = torch.full((count,), float(gaussians.means[:, 1].max()) + 0.02)
    grey = (0.55 + 0.1 * torch.rand(count, 1, generator=rng)).expand(count, 3)
    lying = torch.tensor([math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0])
    added = {
        "means": torch.stack([place[:, 0], height, place[:, 1]], 1),
        "quats": lying.repeat(count, 1),
        "scales": torch.tensor([0.03, 0.03, 0.003]).log().repeat(count, 1),
        "opacities": torch.full((count,), 3.0),
        "sh0": ((grey - 0.5) / SH_C0)[:, None],
        "shN": torch.zeros(count, *gaussians.shN.shape[1:]),
    }
    return gaussians._replace(**{k: torch.cat([v, added[k]]) for k, v in gaussians.parameters.items()}, extra={})


@torch.no_grad()
def measured(prior, gaussians: Gaussians, way: str, source: str, target: str):
    """The cameras and the relevance of all rows."""
    size = prior.image_size
    cameras = splatedit.dome(gaussians, VIEWS, size=size, up=UP)
    pictures = F.avg_pool2d(render(gaussians, cameras.resized(2 * size, 2 * size)).rgb, 2)
    maps = MAPS[way](prior, prior.encode(pictures), caption(target), caption(source), torch.Generator().manual_seed(0))
    return cameras, measure(gaussians, cameras, maps)


def parted(values: Tensor, cut: float) -> float:
    """Share of the variance of values (n,) that lies between the two parts; 0.64 for a bell, 0.75 for a flat top."""
    high = values > cut
    share = float(high.float().mean())
    if share in (0, 1):
        return 0.0
    gap = float(values[high].mean() - values[~high].mean())
    return share * (1 - share) * gap**2 / float(values.var())


def judge(found, truths: dict[str, Tensor]) -> dict[str, float]:
    values = found.values
    row = {name: auc(values, truth) for name, truth in truths.items()}
    if "auc_animal" in truths:
        row["iou_animal"] = iou((values > found.cut).float(), truths["auc_animal"].float())
    facts = {"contrast": found.contrast, "agreement": found.agreement, "parted": parted(values, found.cut)}
    return {**row, "inside": float((values > found.cut).float().mean()), **facts}


def truth(gaussians: Gaussians, cameras, source: str, target: str, meshes: Path) -> dict[str, Tensor]:
    """Which splats (n,) have to change: in colour, in shape."""
    (a, inside_a), (b, inside_b) = (
        ground_truth(load_mesh(meshes / f"{name}.glb"), cameras) for name in (source, target)
    )
    maps = torch.cat([(a - b).abs().amax(1, keepdim=True), (inside_a - inside_b).abs()], 1)
    lifted = lift(gaussians, cameras, maps)
    color, shape = fill_unseen(lifted.mean(), lifted.seen, gaussians.means).unbind(1)
    return {"auc_colour": color > 0.25, "auc_shape": shape > 0.5}


def picture(gaussians: Gaussians, values: Tensor, cut: float, path: Path) -> None:
    """Four views of the relevance (dark to light), and of the mask."""
    level = values.clamp(0, 1)[:, None].expand(-1, 3)
    inside = torch.where(values[:, None] > cut, level.new_tensor(HIGHLIGHT), 0.75)
    cameras = splatedit.orbit(gaussians, 4, elevation=15, azimuth=20, size=256, up=UP)
    with torch.no_grad():
        shown = [render(gaussians._replace(sh0=((c - 0.5) / SH_C0)[:, None]), cameras).rgb for c in (level, inside)]
    save_png(sheet(to_bytes(torch.cat(shown)), 4), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--meshes", type=Path, required=True, help="folder of the Cube Pets .glb files (CC0)")
    parser.add_argument("--scenes", type=Path, default=Path(__file__).parent.parent / "scenes")
    parser.add_argument("--pairs", nargs="+", default=PAIRS)
    parser.add_argument("--ways", nargs="+", default=tuple(MAPS))
    parser.add_argument("--pictures", type=Path, help="folder for pictures of relevance and mask")
    parser.add_argument("--output", type=Path, help="write the table here as JSON")
    args = parser.parse_args()
    prior, rows, console = load_prior("pocket"), [], Console(width=160)
    for pair in args.pairs:
        source, target = pair.split(":")
        alone = splatedit.load(args.scenes / f"{source}.ply")
        for scene, gaussians in (("alone", alone), ("floor", on_a_floor(alone))):
            for way in args.ways:
                began = time.perf_counter()
                cameras, found = measured(prior, gaussians, way, source, target)
                seconds = time.perf_counter() - began
                if scene == "alone":
                    truths = truth(gaussians, cameras, source, target, args.meshes)
                else:
                    truths = {"auc_animal": torch.arange(gaussians.n) < alone.n}
                row = {"pair": pair, "scene": scene, "way": way, **judge(found, truths), "seconds": seconds}
                rows.append(row)
                console.print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
                if args.pictures:
                    args.pictures.mkdir(parents=True, exist_ok=True)
                    name = f"{source}-{target}-{scene}-{way}.png"
                    picture(gaussians, found.values, found.cut, args.pictures / name)
    table = Table("pair", "scene", "way", *COLUMNS, "seconds")
    for row in rows:
        numbers = (f"{row[k]:.2f}" if k in row else "" for k in COLUMNS)
        table.add_row(row["pair"], row["scene"], row["way"], *numbers, f"{row['seconds']:.0f}")
    console.print(table)
    if args.output:
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        facts = {"machine": machine, "date": time.strftime("%Y-%m-%d")}
        args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
