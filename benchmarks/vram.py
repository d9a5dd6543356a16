"""What the presets of --vram take: peak memory and seconds per step, on a GPU if there is one.

    python benchmarks/vram.py --scene my.ply --source-prompt "a bear" --prompt "a panda" \
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --guidance ids dds cds --output benchmarks/results/vram.json

Every line is a short `splatedit run` in a process of its own, report and pictures included, so that its peak is the
peak of a real run; with growth to the preset's limit if --grow is given. Memory is what torch held on the GPU, without
one the resident size of the process (which says nothing of the GPU, but shows which settings help). A preset fits if
its peak and the half gigabyte that CUDA takes for itself are below its number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from splatedit.vram import VRAM

CONTEXT = 512  # MiB of a CUDA context, which torch does not count
PRESETS: tuple[int | None, ...] = (None, *sorted(VRAM, reverse=True))
# What each saving brings by itself.
ALONE = ("checkpointing=true", "rows_at_once=2", "vae_slicing=true", "attention_slicing=true", "supersample=1")


def measure(args: argparse.Namespace, guidance: str, words: list[str]) -> dict[str, Any]:
    """One run with these words; what it took, or why it did not end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "splatedit", "run", args.scene, args.prompt, "--model", args.model]
        command += ["--source-prompt", args.source_prompt, "--guidance", guidance, "--steps", str(args.steps)]
        command += ["--device", args.device, "-o", folder, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 3):
            return {"words": words, "guidance": guidance, "error": done.stderr.strip().splitlines()[-1:]}
        record = json.loads((Path(done.stdout.strip()).parent / "run.json").read_text())
    peak = record["peak_memory_mib"]
    return {
        "words": words,
        "guidance": guidance,
        "peak_mib": peak["gpu"] if peak["gpu"] is not None else peak["process"],
        "on": "gpu" if peak["gpu"] is not None else "process",
        "seconds_per_step": record["seconds_per_step"]["all"],
        "splats": record["splats"] + record["splats_added"],
        "stepped_down": record["stepped_down"],
        "device": record["device"],
        "versions": record["versions"],
    }


def line(row: dict[str, Any], preset: int | None) -> str:
    """One row of the table."""
    name = " ".join(row["words"]) or "no preset"
    if "error" in row:
        return f"| {row['guidance']} | {name} | failed | | {' '.join(row['error'])} |"
    fits = ""
    if preset is not None and row["on"] == "gpu":
        fits = "yes" if row["peak_mib"] + CONTEXT <= preset * 1e9 / 2**20 else "NO"
    if row["stepped_down"]:
        fits += f" after a step down to {row['stepped_down']['vram']}"
    peak, pace = f"{row['peak_mib']:,} MiB ({row['on']})", f"{row['seconds_per_step']:.2f}"
    return f"| {row['guidance']} | {name} | {peak} | {pace} | {fits} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scene", default="scenes/cat.ply")
    parser.add_argument("--prompt", default="a pig")
    parser.add_argument("--source-prompt", default="a cat")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--guidance", nargs="+", default=["ids"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--grow", action="store_true", help="let splats be added up to the limit of the preset")
    parser.add_argument("--alone", action="store_true", help="also what each saving brings by itself")
    parser.add_argument("--output", type=Path, help="also write all numbers as JSON")
    args = parser.parse_args()
    grow = ["grow_percent=100", "grow_every=1", "grow_range=[0.0, 0.9]"] if args.grow else []
    rows = []
    print("| guidance | settings | peak | s/step | fits |\n|---|---|---|---|---|", flush=True)
    for guidance in args.guidance:
        for preset in PRESETS:
            rows.append(measure(args, guidance, [*([] if preset is None else [f"vram={preset}"]), *grow]))
            print(line(rows[-1], preset), flush=True)
        for word in ALONE if args.alone else ():
            rows.append(measure(args, guidance, [word]))
            print(line(rows[-1], None), flush=True)
    device = next((row["device"] for row in rows if "device" in row), "nothing ran")
    print(f"\n{device}, {date.today()}, model {args.model}, {args.steps} steps")
    if args.output:
        args.output.write_text(
            json.dumps({"date": str(date.today()), "model": args.model, "runs": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
