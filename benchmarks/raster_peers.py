"""What the CPU renderer is compared with, each as one function from a scene to (image, alphas).

A scene is a dictionary of arguments of `splatedit.render.rasterization`. None of the peers is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

from splatedit.errors import InputError
from splatedit.render import rasterization
from splatedit.render.constants import ALPHA_MAX, ALPHA_MIN, T_STOP

Scene = dict[str, Any]
LEAVES = ("means", "quats", "scales", "opacities", "colors")


class Renderer(NamedTuple):
    """One participant."""

    name: str
    draw: Callable[[Scene], tuple[Tensor, Tensor | None]]
    most_gaussians: float = math.inf  # rows beyond these would take minutes, or more memory than there is
    most_pixels: float = math.inf
    mode: Scene = {}  # what of the scene it cannot do, and is compared with ours without
    against: str = "splatedit"  # the participant its ratio is formed with
    uninvited: bool = False  # found on this machine; other versions of it may not work

    def bears(self, gaussians: int, pixels: int) -> bool:
        return gaussians <= self.most_gaussians and pixels <= self.most_pixels


# ---------------------------------------------------------------- the scene


def cameras(count: int, width: int, height: int) -> tuple[Tensor, Tensor]:
    """viewmats and Ks on a circle of radius 3 around the origin, 17 degrees above it, 45 degrees wide."""
    focal = 0.5 * min(width, height) / math.tan(math.radians(22.5))
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    views = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    for i, view in enumerate(views):
        turn, tilt = 2 * math.pi * i / count + 0.3, 0.3
        eye = [math.cos(turn) * math.cos(tilt), math.sin(turn) * math.cos(tilt), math.sin(tilt)]
        z = -torch.tensor(eye, dtype=torch.float64)
        x = nnf.normalize(torch.linalg.cross(z, torch.tensor([0, 0, 1.0], dtype=torch.float64)), dim=0)
        view[:3, :3] = torch.stack([x, torch.linalg.cross(z, x), z])
        view[:3, 3] = torch.tensor([0, 0, 3.0])
    return views.float(), K.repeat(count, 1, 1)


def ball(n: int, width: int, height: int, *, count: int = 1, degree: int = 3) -> Scene:
    """A fuzzy ball of n Gaussians in the middle of the picture, about 60 % of a square one.

    Half lie on a shell, half in the volume below it. Sizes fall with n, so that the layers over a pixel stay about as
    many, until the blur of 0.3 square pixels keeps them from getting smaller on screen.
    """
    g = torch.Generator().manual_seed(0)
    direction = nnf.normalize(torch.randn(n, 3, generator=g), dim=-1)
    means = direction * (1 - 0.35 * torch.rand(n, 1, generator=g) ** 2)
    scales = torch.exp(0.5 * torch.randn(n, 1, generator=g) + math.log(1.15 / math.sqrt(n)))
    scales = scales * torch.exp(0.4 * torch.randn(n, 3, generator=g))
    quats = torch.randn(n, 4, generator=g)
    opacities = torch.sigmoid(1.5 * torch.randn(n, generator=g) - 0.5)
    colors = 0.15 * torch.randn(n, (degree + 1) ** 2, 3, generator=g)
    colors[:, 0] += torch.rand(n, 3, generator=g)
    viewmats, Ks = cameras(count, width, height)
    return {
        "means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": colors,
        "viewmats": viewmats, "Ks": Ks, "width": width, "height": height, "sh_degree": degree,
        "backgrounds": torch.ones(count, 3), "render_mode": "RGB+ED", "rasterize_mode": "antialiased",
    }  # fmt: skip


# ---------------------------------------------------------------- participants


def ours(backend: str) -> Callable[[Scene], tuple[Tensor, Tensor]]:
    return lambda scene: rasterization(**scene, backend=backend)[:2]


def participants(modules: list[str], opensplat: str | None) -> list[Renderer]:
    """Ours first; then what is installed or pointed to."""
    found = [Renderer("splatedit", ours("cpu")), Renderer("torch twin", ours("torch"), 10_000, 512**2)]
    if importlib.util.find_spec("gsplat"):
        found.append(Renderer("gsplat torch reference", gsplat_reference, 10_000, 256**2, uninvited=True))
    found += [load(path) for path in modules]
    if opensplat:
        mode = {"render_mode": "RGB", "rasterize_mode": "classic"}
        found.append(Renderer("splatedit, RGB, classic", ours("cpu"), mode=mode))
        found.append(Renderer("OpenSplat", OpenSplat(opensplat), mode=mode, against="splatedit, RGB, classic"))
    return found


def load(path: str) -> Renderer:
    """Any file with gsplat's `rasterization`, another version of this package too: OLD/splatedit/render/__init__.py.

    Its folder goes on sys.path; of a file in a package, the folder of the package. Modules that are loaded already and
    would get in its way, this version of the package above all, are put aside while it loads and draws for the first
    time, since parts of it may be imported only then.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"--peer {path}: there is no such file.")
    names = [] if file.stem == "__init__" else [file.stem]
    root = file.parent
    while (root / "__init__.py").exists():
        names.insert(0, root.name)
        root = root.parent
    module, aside = ".".join(names), {}
    for name in list(sys.modules):
        if name.partition(".")[0] == names[0] or (root / f"{name}.py").exists():
            aside[name] = sys.modules.pop(name)
    sys.path.insert(0, str(root))
    try:
        draw = importlib.import_module(module).rasterization
        small = ball(20, 16, 16)
        image, alphas, *_ = draw(**small | {k: small[k].requires_grad_() for k in LEAVES})
        (image.sum() + alphas.sum()).backward()
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.partition(".")[0] == names[0]]:
            del sys.modules[name]
        sys.modules.update(aside)
    return Renderer(f"{root.name}/{module}", lambda scene: draw(**scene)[:2])


# ---------------------------------------------------------------- gsplat's torch reference


def gsplat_reference(scene: Scene) -> tuple[Tensor, Tensor]:
    """gsplat.cuda._torch_impl, the definition that gsplat tests its kernels with, put together to a `rasterization`.

    Two things it takes from elsewhere exist for CUDA only and are given here in torch: gsplat's kernel that lists which
    Gaussian colours which pixel, and two functions of the package nerfacc.
    """
    from gsplat.cuda import _torch_impl as reference  # pyright: ignore[reportMissingImports]
    from gsplat.cuda import _wrapper  # pyright: ignore[reportMissingImports]

    _wrapper.rasterize_to_indices_in_range = _indices_in_range
    sys.modules["nerfacc"] = types.ModuleType("nerfacc")
    sys.modules["nerfacc"].__dict__.update(
        render_weight_from_alpha=_weights_along_rays, accumulate_along_rays=_sum_along_rays
    )
    means, viewmats, width, height = (scene[k] for k in ("means", "viewmats", "width", "height"))
    covars, _ = reference._quat_scale_to_covar_preci(scene["quats"], scene["scales"], True, False)
    assert covars is not None  # asked for
    radii, means2d, depths, conics, compensations = reference._fully_fused_projection(
        means, covars, viewmats, scene["Ks"], width, height, calc_compensations=True
    )
    directions = means - torch.linalg.inv(viewmats)[:, None, :3, 3]
    coefficients = scene["colors"].expand(len(viewmats), -1, -1, -1)
    colors = reference._spherical_harmonics(scene["sh_degree"], directions, coefficients)
    colors = torch.cat([(colors + 0.5).clamp_min(0), depths[..., None]], -1)
    tiles = -(-width // 16), -(-height // 16)
    _, ids, order = reference._isect_tiles(means2d.detach(), radii, depths.detach(), 16, *tiles)
    offsets = reference._isect_offset_encode(ids, len(viewmats), *tiles)
    backgrounds = nnf.pad(scene["backgrounds"], (0, 1))
    image, alphas = reference._rasterize_to_pixels(
        means2d, conics, colors, scene["opacities"] * compensations, width, height, 16, offsets, order, backgrounds
    )
    return torch.cat([image[..., :3], image[..., 3:] / alphas.clamp_min(1e-10)], -1), alphas


@torch.no_grad()
def _indices_in_range(
    begin, end, transmittances, means2d, conics, opacities, width, height, tile, offsets, order
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian, pixel and image of each contribution by pairs 256 begin .. 256 end of each tile, pixel by pixel."""
    n, columns, per_image = means2d.shape[1], offsets.shape[2], offsets.shape[1] * offsets.shape[2]
    starts = [*offsets.flatten().tolist(), len(order)]
    found = []
    for number, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        picks = order[start + begin * tile * tile : min(start + end * tile * tile, stop)].long()
        row, column = number % per_image // columns, number % columns
        y, x = torch.meshgrid(
            torch.arange(row * tile, min(row * tile + tile, height)),
            torch.arange(column * tile, min(column * tile + tile, width)),
            indexing="ij",
        )
        pixels = torch.stack([x.flatten(), y.flatten()], -1)
        dx, dy = (means2d.flatten(0, 1)[picks][:, None] - pixels - 0.5).unbind(-1)
        a, b, c = conics.flatten(0, 1)[picks][:, None].unbind(-1)
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opacities.flatten()[picks][:, None] * torch.exp(-sigma)).clamp_max(ALPHA_MAX)
        hit = (sigma >= 0) & (alpha >= ALPHA_MIN)
        image = number // per_image
        before = transmittances[image, pixels[:, 1], pixels[:, 0]]
        hit &= torch.where(hit, 1 - alpha, 1.0).cumprod(0) * before > T_STOP
        which, who = hit.T.nonzero(as_tuple=True)
        flat = image * width * height + pixels[:, 1] * width + pixels[:, 0]
        found.append(torch.stack([picks[who] % n, flat[which]]))
    gaussians, flat = torch.cat(found, 1)
    flat, by_pixel = flat.sort(stable=True)
    return gaussians[by_pixel], flat % (width * height), flat // (width * height)


def _weights_along_rays(alphas: Tensor, ray_indices: Tensor, n_rays: int) -> tuple[Tensor, Tensor]:
    """alpha_i prod over j before i on the same ray of (1 - alpha_j), and that product."""
    logs = torch.log1p(-alphas.double())
    before = logs.cumsum(0) - logs
    first = torch.full((n_rays,), math.inf, dtype=torch.float64).scatter_reduce(0, ray_indices, -before, "amin")
    through = torch.exp(before + first[ray_indices]).float()
    return alphas * through, through


def _sum_along_rays(weights: Tensor, values: Tensor | None, ray_indices: Tensor, n_rays: int) -> Tensor:
    rows = weights[:, None] if values is None else weights[:, None] * values
    return rows.new_zeros(n_rays, rows.shape[1]).index_add(0, ray_indices, rows)


# ---------------------------------------------------------------- OpenSplat

OPENSPLAT_BINDING = """
#include "project_gaussians.hpp"
#include "rasterize_gaussians.hpp"
#include "spherical_harmonics.hpp"
#include <torch/extension.h>
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("project", &ProjectGaussiansCPU::apply);
  m.def("harmonics", [](int degree, torch::Tensor directions, torch::Tensor coefficients) {
    return SphericalHarmonicsCPU::apply(degree, directions, coefficients); });
  m.def("rasterize", [](torch::Tensor xys, torch::Tensor radii, torch::Tensor conics, torch::Tensor colors,
                        torch::Tensor opacity, torch::Tensor cov2d, torch::Tensor depths, int height, int width,
                        torch::Tensor background) {
    return RasterizeGaussiansCPU::apply(xys, radii, conics, colors, opacity, cov2d, depths, height, width, background);
  });
}
"""


class OpenSplat:
    """The CPU rasteriser of an OpenSplat checkout (github.com/pierotofy/OpenSplat, AGPL-3), built here for measuring.

    Needs a C++ compiler and ninja; the first build takes minutes. Written after OpenSplat's headers and **not run by
    the authors**: names and places have moved between its versions, so expect to adapt `SOURCES` or the binding. One
    camera, RGB, classic, no alpha.
    """

    SOURCES = ("project_gaussians.cpp", "rasterize_gaussians.cpp", "spherical_harmonics.cpp", "**/gsplat_cpu.cpp")

    def __init__(self, checkout: str) -> None:
        root = Path(checkout).resolve()
        files = [str(f) for pattern in self.SOURCES for f in sorted(root.glob(pattern))[:1]]
        if len(files) < len(self.SOURCES):
            raise InputError(f"--opensplat {checkout}: {', '.join(self.SOURCES)} expected in it, found {files}.")
        from torch.utils import cpp_extension

        folder = Path(cpp_extension._get_build_directory("splatedit_opensplat", verbose=False))
        (folder / "binding.cpp").write_text(OPENSPLAT_BINDING)
        include = [str(root), str(Path(files[-1]).parent)]
        self.code: Any = cpp_extension.load(
            "splatedit_opensplat", [*files, str(folder / "binding.cpp")], extra_include_paths=include,
            extra_cflags=["-O3", "-march=native"], build_directory=str(folder),
        )  # fmt: skip

    def __call__(self, scene: Scene) -> tuple[Tensor, None]:
        means, view, K = scene["means"], scene["viewmats"][0], scene["Ks"][0]
        width, height, near, far = scene["width"], scene["height"], 0.5, 10.0  # these only order the depths
        fx, fy, cx, cy = (float(K[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
        projection = torch.diag(torch.tensor([2 * fx / width, 2 * fy / height, (far + near) / (far - near), 0]))
        projection[2, 3], projection[3, 2] = -far * near / (far - near), 1
        quats = nnf.normalize(scene["quats"], dim=-1)
        xys, radii, conics, cov2d, depths = self.code.project(
            means, scene["scales"], 1.0, quats, view, projection @ view, fx, fy, cx, cy, height, width, 0.01
        )
        directions = nnf.normalize(means.detach() - torch.linalg.inv(view)[:3, 3], dim=-1)
        colors = (self.code.harmonics(scene["sh_degree"], directions, scene["colors"]) + 0.5).clamp_min(0)
        image = self.code.rasterize(
            xys, radii, conics, colors, scene["opacities"][:, None], cov2d, depths, height, width,
            scene["backgrounds"][0],
        )  # fmt: skip
        return image[None], None
