"""Which guidance collapses, strays, stays or arrives: points of the plane under the exact score, as numbers.

    python benchmarks/points.py [--seeds 0 1 2] [--count 200] [--scales 1 3 7.5]

Prints, for each guidance scale and guidance, the mean over the seeds of what `splatedit.points.Journey` holds. The row
"best" is the way of the cheapest pairing of red and blue points: no other map to these points is as short.
"""

from __future__ import annotations

import argparse
import os
import statistics

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table

from splatedit.points import compare, moons, wasserstein

NUMBERS = ("moved", "spread", "distance", "arrived")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0, 7.5])
    args = parser.parse_args()
    torch.set_num_threads(1)
    plane = moons()
    best = []
    for seed in args.seeds:
        generator = torch.Generator().manual_seed(seed)
        red, blue = (plane.sample(weights, args.count, generator) for weights in (plane.red, plane.blue))
        best.append(wasserstein(red, blue, power=1))
    table = Table("scale", "guidance", *NUMBERS)
    table.add_row("", "best", f"{statistics.mean(best):.3f}", "1.000", "0.000", "")
    for scale in args.scales:
        runs = [compare(plane, scale=scale, seed=seed, count=args.count) for seed in args.seeds]
        for name in runs[0]:
            means = (statistics.mean(getattr(run[name], number) for run in runs) for number in NUMBERS)
            table.add_row(f"{scale:g}", name, *(f"{value:.3f}" for value in means))
    Console().print(table)


if __name__ == "__main__":
    main()
