"""What packing costs: bytes, CPU seconds and the look of a scene in every format that can be written.

    python benchmarks/packed.py [SCENE] [--sh-degree 3] [--count 1000000]

A scene without higher harmonics gets smooth ones for --sh-degree, waves over the scene. --count repeats the scene,
moved by a little noise, until there are so many. PSNR: four cameras around the scene, 256 pixels, original against what
came back.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch

from splatedit.cameras import orbit
from splatedit.errors import LossWarning
from splatedit.files import load, save
from splatedit.formats import FORMATS
from splatedit.gaussians import SH_REST, Gaussians
from splatedit.render import render


def main() -> None:
    """Print a table, one line for each format."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("scene", nargs="?", default="scenes/cat.ply")
    options.add_argument("--sh-degree", type=int, choices=sorted(SH_REST), default=None)
    options.add_argument("--count", type=int, default=None)
    chosen = options.parse_args()
    scene = enlarged(load(chosen.scene), chosen.count)
    if chosen.sh_degree is not None:
        scene = scene._replace(shN=waves(scene.means, SH_REST[chosen.sh_degree]))
    cameras = orbit(scene, 4, size=256)
    with torch.no_grad():
        picture = render(scene, cameras).rgb.clamp(0, 1)
    print(f"{scene.n} Gaussians, SH degree {scene.sh_degree}, CPU seconds of all threads together\n")
    print(f"{'format':16}{'bytes':>12}{'write s':>9}{'read s':>9}{'PSNR dB':>9}")
    for form in FORMATS.values():
        if form.write:
            print(f"{form.name:16}" + measured(scene, form.suffixes[0], cameras, picture))


def measured(scene: Gaussians, ending: str, cameras, picture: torch.Tensor) -> str:
    """Bytes, CPU seconds of writing and reading, and PSNR of the pictures, as one line."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        path = Path(folder) / f"scene{ending}"
        start = time.process_time()
        save(scene, path)
        written = time.process_time()
        back = load(path)
        read = time.process_time()
        error = (render(back, cameras).rgb.clamp(0, 1) - picture).square().mean()
        size = path.stat().st_size
    psnr = "same" if error == 0 else f"{-10 * torch.log10(error):.1f}"
    return f"{size:12}{written - start:9.2f}{read - written:9.2f}{psnr:>9}"


def enlarged(scene: Gaussians, count: int | None) -> Gaussians:
    """The scene over and over, `count` Gaussians, each copy moved by a thousandth of the scene's spread."""
    if not count:
        return scene
    draw = torch.Generator().manual_seed(0)
    many = scene.select(torch.arange(count) % scene.n)
    noise = torch.randn(many.means.shape, generator=draw) * scene.means.std(0) * 1e-3
    return many._replace(means=many.means + noise)


def waves(means: torch.Tensor, k: int) -> torch.Tensor:
    """Harmonics (n, k, 3) within 0.1 that change smoothly over the scene."""
    draw = torch.Generator().manual_seed(0)
    return 0.1 * torch.sin(means @ torch.randn(3, 3 * k, generator=draw)).reshape(len(means), k, 3)


if __name__ == "__main__":
    main()
