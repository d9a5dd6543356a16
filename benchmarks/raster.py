"""Time the compiled rasteriser against its plain-torch twin, in turn, in one process.

    python benchmarks/raster.py                      # 15000 Gaussians, 128 pixels, 1 and 4 cameras
    python benchmarks/raster.py --gaussians 100000 --size 512 --cameras 1 --degree 3 --repeats 9

CPU time is summed over threads: on a shared machine compare that, and only within one run. Medians.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its idle threads would count as CPU time

import argparse
import math
import platform
import statistics
import time
from typing import Any

import torch

from splatedit.render import rasterization


def ball(n: int, cameras: int, size: int, degree: int) -> dict[str, Any]:
    """A fuzzy ball of n Gaussians whose sizes fall with n, so that the layers over a pixel stay about as many."""
    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=1)
    scales = (
        1.15 / math.sqrt(n) * torch.exp(0.5 * torch.randn(n, 1, generator=g) + 0.4 * torch.randn(n, 3, generator=g))
    )
    colors = 0.15 * torch.randn(n, (degree + 1) ** 2, 3, generator=g)
    views = torch.eye(4).repeat(cameras, 1, 1)
    turn = torch.arange(cameras) * (2 * math.pi / cameras)
    views[:, 0, 0], views[:, 0, 2] = turn.cos(), turn.sin()
    views[:, 2, 0], views[:, 2, 2] = -turn.sin(), turn.cos()
    views[:, 2, 3] = 3.0
    focal = 0.5 * size / math.tan(math.radians(22.5))
    K = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    return {
        "means": direction * (1 - 0.35 * torch.rand(n, 1, generator=g) ** 2),
        "quats": torch.randn(n, 4, generator=g),
        "scales": scales,
        "opacities": torch.sigmoid(1.5 * torch.randn(n, generator=g) - 0.5),
        "colors": colors,
        "viewmats": views,
        "Ks": K.expand(cameras, 3, 3).contiguous(),
        "width": size,
        "height": size,
        "sh_degree": degree,
        "backgrounds": torch.ones(cameras, 3),
        "render_mode": "RGB+ED",
        "rasterize_mode": "antialiased",
    }


def forward(scene: dict[str, Any], backend: str) -> None:
    with torch.no_grad():
        rasterization(**scene, backend=backend)


def forward_and_backward(scene: dict[str, Any], backend: str) -> None:
    leaves = {k: scene[k].requires_grad_() for k in ("means", "quats", "scales", "opacities", "colors")}
    image, alphas, _ = rasterization(**scene, backend=backend)
    torch.autograd.grad(image.sum() + alphas.sum(), list(leaves.values()))


def milliseconds(function: Any, *args: Any) -> tuple[float, float]:
    """Wall and CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    function(*args)
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}{load}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaussians", type=int, default=15000)
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--degree", type=int, default=0, help="of the spherical harmonics")
    parser.add_argument("--repeats", type=int, default=15, help="of the kernels; the twin gets one for every five")
    options = parser.parse_args()
    print(machine())
    print(f"{options.gaussians} Gaussians, {options.size} px, SH {options.degree}, RGB+ED, antialiased; ms wall / CPU")
    for cameras in options.cameras:
        scene = ball(options.gaussians, cameras, options.size, options.degree)
        for name, function in (("fwd", forward), ("fwd+bwd", forward_and_backward)):
            function(scene, "cpu")  # compiles
            times: dict[str, list[tuple[float, float]]] = {"cpu": [], "torch": []}
            for repeat in range(options.repeats):
                times["cpu"].append(milliseconds(function, scene, "cpu"))
                if repeat % 5 == 0:
                    times["torch"].append(milliseconds(function, scene, "torch"))
            (wall, cpu), (twin_wall, twin_cpu) = (
                [statistics.median(column) for column in zip(*rows, strict=True)] for rows in times.values()
            )
            print(
                f"{cameras} cameras {name:8} kernels {wall:8.1f} / {cpu:8.1f}   "
                f"twin {twin_wall:9.1f} / {twin_cpu:9.1f}   x{twin_cpu / cpu:.0f} CPU"
            )


if __name__ == "__main__":
    main()
