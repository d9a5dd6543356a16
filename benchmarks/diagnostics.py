"""The figures of docs/diagnostics.md, and the numbers beside them.

    python benchmarks/diagnostics.py [--scene scenes/cat.ply] [--prompt "a pig"] [--model pocket]

Writes docs/images/diagnostics_drift.png and diagnostics_means.png, and prints the means of all tables. The same
script takes Stable Diffusion.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table

from splatedit import diagnostics
from splatedit.diagnose import SHOWN, look
from splatedit.priors import load_prior

ROOT = Path(__file__).parent.parent
SHOWN_THERE = ("drift", "means")  # figures that docs/diagnostics.md shows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scene", type=Path, default=ROOT / "scenes" / "cat.ply", help="or a picture")
    parser.add_argument("--prompt", default="a pig")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--draws", type=int, default=4, help="of noise, for each view")
    parser.add_argument("--edit-steps", type=int, default=100, help="of the edits there and back")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    subject, _ = look(load_prior(args.model, args.device), args.scene, args.prompt, None, args.views, 0)

    def seeded() -> torch.Generator:
        return torch.Generator(subject.z.device).manual_seed(0)

    first = diagnostics.Subject(subject.prior, subject.source, subject.target, latents=subject.z[:1])
    drift = diagnostics.drift(subject, seeded(), draws=args.draws)
    means = diagnostics.posterior_means(first, seeded(), solver="picard_null")
    back = diagnostics.invertibility(subject, seeded(), steps=args.edit_steps)
    console = Console(width=140)
    for table in (drift, diagnostics.cost_versus_drift(drift), means, back):
        by, values = SHOWN[table.name]
        numbers = [name for name in values if name in table.columns]
        shown = Table(*by, *numbers, title=table.title)
        for row in diagnostics.averaged(table.rows, by, numbers):
            shown.add_row(*(str(row[name]) for name in by), *(diagnostics.with_error(row, name) for name in numbers))
        console.print(shown)
        if table.name in SHOWN_THERE:
            table.figure().savefig(args.output / f"diagnostics_{table.name}.png", dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
