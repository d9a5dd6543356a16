"""Does the network find the source again? Posterior-mean drift |z_src - zhat| / |z_src| after each solver of FPR.

    python benchmarks/drift.py [--scene scenes/cat.ply --source "a cat"] [--scale 3] [--model pocket]

Drift is of the guided score under the source prompt, mean over views and draws of noise, the same draws for all rows.
Beside it stand what the noise has become (rms and kurtosis, 1 and 3 if untouched) and what it cost: network rows
forward and back of one sample, and cost with a backward pass counted as 1.15. The same script takes Stable Diffusion.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Column, Table

import splatedit
from splatedit.diffusion import Draw, guided, repeat, scales
from splatedit.files import sidecar
from splatedit.fpr import BACKWARD, SOLVERS, fpr
from splatedit.priors import load_prior
from splatedit.render import render

STEPS = (300, 500, 700, 850)
VARIANTS = ("", "+sphere", "+best")


@torch.no_grad()
def source_latents(prior, scene: str, views: int) -> torch.Tensor:
    """Latents (views, c, h, w) of a scene seen from a circle of cameras."""
    gaussians = splatedit.load(scene).to(prior.device)
    cameras = splatedit.orbit(gaussians, views, elevation=12.0, size=prior.image_size, up=sidecar(scene).up)
    return prior.encode(render(gaussians, cameras).rgb)


def measure(denoise, z: torch.Tensor, draws: list[Draw], text, solver: str, iters: int, variant: str, lam: float):
    """Means over the draws, by step of the schedule: drift, rms, kurtosis, autocorrelation; and cost of one sample."""
    options: dict[str, Any] = {"sphere": "sphere" in variant, "keep_best": "best" in variant}
    rows, size = [], z.flatten(1).norm(dim=1)
    for draw in draws:
        found = fpr(denoise, z, draw, text, iters, lam, solver or "grad", **options)
        with torch.no_grad():
            gap = denoise(draw.a * z + draw.s * found.noise, draw.t, text) - found.noise
        drift = (draw.s / draw.a * gap).flatten(1).norm(dim=1) / size
        rows.append(torch.stack([drift, found.rms[-1], found.kurtosis[-1], found.autocorrelation[-1]]).mean(1))
    backwards = found.backwards / len(z)
    # The source score that keep_best comes by is one that an edit needs anyway: it is not counted here.
    forwards = found.evaluations / len(z) - (denoise.rows if found.score is not None else 0)
    drift, rms, kurtosis, autocorrelation = torch.stack(rows).mean(0).tolist()
    return {
        "drift": drift,
        "rms": rms,
        "kurtosis": kurtosis,
        "autocorrelation": autocorrelation,
        "forwards": forwards,
        "backwards": backwards,
        "cost": forwards + BACKWARD * backwards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scene", default=str(Path(__file__).parent.parent / "scenes" / "cat.ply"))
    parser.add_argument("--source", default="a cat", help="what the scene shows")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=float, help="classifier-free guidance (default: the model's for ids)")
    parser.add_argument("--fpr-lambda", type=float, default=1.0)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--draws", type=int, default=4, help="of noise, for each view")
    parser.add_argument("--iters", type=int, nargs="+", default=(1, 2, 3, 5))
    parser.add_argument("--solvers", nargs="+", default=tuple(SOLVERS))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="of each solver: '', +sphere, +best")
    parser.add_argument("--output", type=Path, help="write all numbers here as JSON")
    args = parser.parse_args()
    prior = load_prior(args.model, args.device)
    scale = prior.default_scale("ids") if args.scale is None else args.scale
    denoise, z = guided(prior.denoise, prior.null(1), scale), source_latents(prior, args.scene, args.views)
    text, generator = repeat(prior.text([args.source]), len(z)), torch.Generator(prior.device).manual_seed(0)
    console, rows = Console(width=160), []
    headings = [f"{word} t={t}" for t in STEPS for word in ("drift", "rms")]
    table = Table(
        Column("noise", no_wrap=True),
        "N",
        "forward",
        "back",
        "cost",
        *headings,
        title=f"{args.source}, scale {scale:g}",
    )
    draws = {}
    for t in STEPS:
        steps = torch.full((len(z),), t, device=z.device)
        noises = (torch.randn(z.shape, generator=generator, device=z.device) for _ in range(args.draws))
        draws[t] = [Draw(steps, *scales(prior.alphas_cumprod, steps, z), noise) for noise in noises]
    jobs = [("", 0, "")] + [(s, n, v) for s in args.solvers for v in args.variants for n in args.iters]
    for solver, iters, variant in jobs:
        found = {t: measure(denoise, z, draws[t], text, solver, iters, variant, args.fpr_lambda) for t in STEPS}
        rows.append({"solver": solver or "random", "variant": variant, "iters": iters, "scale": scale, "at": found})
        spent = [f"{sum(f[k] for f in found.values()) / len(found):.3g}" for k in ("forwards", "backwards", "cost")]
        numbers = [f"{found[t][key]:.3f}" for t in STEPS for key in ("drift", "rms")]
        table.add_row((solver or "random") + variant, str(iters), *spent, *numbers)
    console.print(table)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    if args.output:
        settings = {k: str(v) for k, v in vars(args).items() if k != "output"}
        facts = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "settings": settings}
        args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
