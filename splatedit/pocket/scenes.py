"""Make the splats in `scenes/` from the CC0 meshes: `python -m splatedit.pocket.scenes --meshes FOLDER cat dog`.

A scene starts as flat discs spread evenly over the surface that can be seen, and is then refined against pictures of
the mesh with the project's own renderer. Files are written y down, as COLMAP, INRIA's trainer and most viewers have it.
"""

from __future__ import annotations

import argparse
import difflib
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.gaussians import SH_C0, Gaussians
from splatedit.pocket.meshes import Mesh, draw, load_mesh, look_at, shade
from splatedit.pocket.views import FOV, caption

# From the y-up frame of meshes.py to the y-down frame of the scene files: half a turn about x, its own inverse.
FLIP = np.diag([1.0, -1.0, -1.0, 1.0]).astype(np.float32)
DISC = 0.75  # in-plane sigma of a fresh disc, in spacings; smaller ones let the background through
FLATNESS = 0.1  # its sigma along the normal, in in-plane sigmas
OPACITY = 3.0  # logit: 0.95, opaque yet not saturated, so that an edit's gradient still reaches it
UP = "-y"
COMMENTS = ("made by splatedit from Kenney Cube Pets (CC0)", f"Vertical axis: {UP}")


class Surface(NamedTuple):
    """Points on the visible surface of a mesh, in the scene frame."""

    points: np.ndarray  # (n, 3) float32
    normals: np.ndarray  # (n, 3) float32, unit length
    colors: np.ndarray  # (n, 3) float32, sRGB in [0, 1], shading included
    detailed: np.ndarray  # (n,) bool: a colour edge or a crease passes nearby


def to_scene(mesh: Mesh) -> Mesh:
    """The mesh in the y-down frame of the scene files, its colours replaced by the baked shading."""
    turn = FLIP[:3, :3]
    return Mesh(mesh.corners @ turn, mesh.normals @ turn, shade(mesh))


def cameras_from(matrices: list[np.ndarray], size: int, shift: np.ndarray | None = None) -> Cameras:
    """Square pinhole cameras of the default field of view; `shift` (c, 2) moves their principal points, in pixels."""
    focal = size / 2 / math.tan(math.radians(FOV) / 2)
    K = np.tile(np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], np.float32), (len(matrices), 1, 1))
    if shift is not None:
        K[:, :2, 2] += shift
    return Cameras(torch.from_numpy(np.stack(matrices).astype(np.float32)), torch.from_numpy(K), size, size)


def random_cameras(count: int, size: int, rng: np.random.Generator) -> Cameras:
    """Cameras in the scene frame that look at the whole animal from any side, below and above included."""
    matrices = []
    for _ in range(count):
        # Uniform in height covers the sphere evenly; the cut keeps a definite "up" at both poles.
        elevation = math.degrees(math.asin(rng.uniform(-0.9, 0.985)))
        matrices.append(look_at(rng.uniform(0, 360), elevation, rng.uniform(1.9, 2.7)) @ FLIP)
    return cameras_from(matrices, size, rng.uniform(-0.5, 0.5, (count, 2)).astype(np.float32))


def even_cameras(count: int, size: int, distance: float = 2.4) -> Cameras:
    """Cameras spread evenly over the sphere (Fibonacci lattice) around the animal, in the scene frame."""
    heights = 0.985 - 1.97 * (np.arange(count) + 0.5) / count
    turns = np.arange(count) * 180 * (3 - math.sqrt(5))
    angles = [(turn % 360, math.degrees(math.asin(h))) for turn, h in zip(turns, heights, strict=True)]
    return cameras_from([look_at(a, e, distance) @ FLIP for a, e in angles], size)


def ground_truth(
    mesh: Mesh, cameras: Cameras, background=(1.0, 1.0, 1.0), supersample: int = 4
) -> tuple[Tensor, Tensor]:
    """Draw the mesh as the cameras of a scene file (y down) see it.

    mesh: as `load_mesh` gives it (y up). background: three numbers in [0, 1], or (c, 3) with one colour per camera.
    Returns images (c, 3, h, w) in [0, 1] and coverage masks (c, 1, h, w) in [0, 1]. Raises InputError if the pixels
    of a camera are not square.
    """
    scene = to_scene(mesh)
    colors = np.broadcast_to(np.asarray(background, np.float32), (cameras.n, 3))
    size, images, masks = max(cameras.width, cameras.height), [], []
    for w2c, K, color in zip(cameras.w2c.cpu().numpy(), cameras.K.cpu().numpy(), colors, strict=True):
        if abs(K[0, 0] - K[1, 1]) > 1e-3 * K[0, 0]:
            raise InputError(f"camera: focal lengths {K[0, 0]:g} and {K[1, 1]:g} differ; square pixels are needed.")
        image, mask = draw(
            scene.corners, scene.colors, w2c.astype(np.float32), float(K[0, 0]), K[:2, 2], size, color, supersample
        )
        images.append(image[: cameras.height, : cameras.width])
        masks.append(mask[: cameras.height, : cameras.width, None])
    drawn, covered = (torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).contiguous() for x in (images, masks))
    return drawn, covered


# -------------------------------------------------------------------------------------------------- sampled from views
def visible_surface(mesh: Mesh, count: int, rng: np.random.Generator, views: int = 96, size: int = 256) -> Surface:
    """`count` random points of the surface that can be seen from outside (fewer if the views show fewer).

    The mesh is drawn with positions and normals in place of colours, so that what is hidden is never sampled.
    """
    scene, cameras, parts = to_scene(mesh), even_cameras(views, size), []
    for w2c, K in zip(cameras.w2c.numpy(), cameras.K.numpy(), strict=True):
        maps = [
            draw(scene.corners, np.ascontiguousarray(v), w2c, float(K[0, 0]), K[:2, 2], size, (0.0, 0.0, 0.0), 1)
            for v in scene
        ]
        covered = maps[0][1] > 0
        point, normal, color = (image for image, _ in maps)
        seen = [v[covered] for v in (point, normal, color, _detail(point, normal, color, covered))]
        parts.append(seen)
    points, normals, colors, detailed = (np.concatenate(v) for v in zip(*parts, strict=True))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    order = rng.permutation(len(points))[:count]
    return Surface(points[order], normals[order], colors[order], detailed[order])


def _detail(point, normal, color, covered, reach: int = 2) -> np.ndarray:
    """Pixels (h, w) of the drawn maps with a colour edge or crease of the same surface within `reach` pixels."""
    found = np.zeros_like(covered)
    for dy, dx in ((0, reach), (reach, 0), (0, -reach), (-reach, 0)):
        other = [np.roll(v, (dy, dx), (0, 1)) for v in (point, normal, color, covered)]
        near = np.linalg.norm(point - other[0], axis=-1) < 0.05  # not across the gap between an ear and the back
        crease = (normal * other[1]).sum(-1) < 0.8
        edge = np.abs(color - other[2]).max(-1) > 0.08
        found |= near & other[3] & (crease | edge)
    return found & covered


def spread(surface: Surface, count: int, tolerance: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Choose about `count` evenly spaced points by dart throwing, closer together where there is detail.

    Returns their indices and the spacing kept around each, scene units.
    """
    factor = np.where(surface.detailed, 0.7, 1.1)
    low, high, spacing = 0.0, 0.2, 0.02
    for _ in range(20):
        chosen = _throw(surface, spacing * factor, 0.5 * spacing)
        if abs(len(chosen) - count) <= tolerance * count:
            break
        low, high = (spacing, high) if len(chosen) > count else (low, spacing)
        # The count falls with the square of the spacing; bisect where that guess leaves the bracket.
        guess = spacing * math.sqrt(len(chosen) / count)
        spacing = guess if low < guess < high else (low + high) / 2
    return chosen, spacing * factor[chosen]


def _throw(surface: Surface, radius: np.ndarray, lift: float) -> np.ndarray:
    """Accept the points in order, dropping those within `radius` of an accepted one."""
    from scipy.spatial import KDTree

    # Lifted by the normal: the two sides of a thin ear, or of a crease, do not compete for the same place.
    lifted = np.concatenate([surface.points, lift * surface.normals], 1)
    tree, free, chosen = KDTree(lifted), np.ones(len(lifted), bool), []
    for i in range(len(lifted)):
        if free[i]:
            chosen.append(i)
            free[tree.query_ball_point(lifted[i], radius[i])] = False
    return np.array(chosen)


def discs(surface: Surface, chosen: np.ndarray, spacing: np.ndarray) -> Gaussians:
    """Flat opaque discs, degree 0, lying on the surface at the chosen points."""
    flat = torch.from_numpy(np.log(DISC * spacing).astype(np.float32))
    colors = torch.from_numpy(surface.colors[chosen].astype(np.float32))
    return Gaussians(
        means=torch.from_numpy(surface.points[chosen].astype(np.float32)),
        quats=quats_along(torch.from_numpy(surface.normals[chosen].astype(np.float32))),
        scales=torch.stack([flat, flat, flat + math.log(FLATNESS)], 1),
        opacities=torch.full((len(chosen),), OPACITY),
        sh0=((colors - 0.5) / SH_C0)[:, None],
        shN=torch.zeros(len(chosen), 0, 3),
        comments=COMMENTS,
    )


def quats_along(normals: Tensor) -> Tensor:
    """Unit quaternions wxyz (n, 4) of the shortest rotations that take +z to the normals (n, 3)."""
    x, y, z = normals.unbind(-1)
    quats = torch.stack([1 + z, -y, x, torch.zeros_like(z)], -1)
    quats[z < -0.9999] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # half a turn about x, where the formula vanishes
    return quats / quats.norm(dim=-1, keepdim=True)


# ------------------------------------------------------------------------------------------- refined against the mesh
RATES = {"means": 3e-4, "quats": 5e-3, "scales": 1e-2, "opacities": 2e-2, "sh0": 2e-2}  # Adam, at the first step
SIZES = (
    (256, 4),
    (512, 1),
    (256, 4),
    (128, 8),
)  # pixels and views of the steps, in turn


def refine(
    gaussians: Gaussians,
    mesh: Mesh,
    spacing: Tensor,
    rng: np.random.Generator,
    steps: int = 500,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    backend: str = "auto",
) -> Gaussians:
    """Fit the splats to pictures of the mesh from all sides, on backgrounds of all colours.

    spacing: (n,), scene units; the discs stay of that size, near their first place and opaque. sizes: pixels and
    number of views of the steps, in turn.
    """
    from splatedit.render import render

    start = gaussians.detach()
    values = {k: getattr(start, k).clone().requires_grad_() for k in RATES}
    optimizer = torch.optim.Adam([{"params": [v], "lr": RATES[k], "name": k} for k, v in values.items()], eps=1e-15)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATES[group["name"]] * (0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2)
        size, views = sizes[step % len(sizes)]
        cameras = random_cameras(views, size, rng)
        # A splat that is not opaque, or sticks out, shows against a background it was not drawn on before.
        colors = np.where(rng.random((views, 1)) < 0.3, 1, rng.random((views, 3))).astype(np.float32)
        images, masks = ground_truth(mesh, cameras, colors, supersample=3)
        drawn = render(start._replace(**values), cameras, torch.from_numpy(colors), backend=backend)
        loss = picture_loss(drawn.rgb, images) + (drawn.alpha - masks).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        keep_shape(values, start, spacing)
    result = {k: v.detach() for k, v in values.items()}
    result["quats"] = result["quats"] / result["quats"].norm(dim=-1, keepdim=True)
    return start._replace(**result)


def picture_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """L1 plus twice L2: the second cares most for what stands out. (SSIM was tried: same pictures, slower.)"""
    error = drawn - wanted
    return error.abs().mean() + 2 * error.square().mean()


@torch.no_grad()
def keep_shape(values: dict[str, Tensor], start: Gaussians, spacing: Tensor) -> None:
    """Put the splats back within bounds: no needles, no giants, none transparent or astray, no colour from nowhere."""
    flat = (DISC * spacing).log()[:, None]
    values["scales"][:, :2].clamp_(flat - math.log(2.5), flat + math.log(1.5))
    values["scales"][:, 2:].clamp_(flat + math.log(FLATNESS / 2), flat + math.log(FLATNESS * 2))
    values["means"].clamp_(start.means - spacing[:, None], start.means + spacing[:, None])
    values["opacities"].clamp_(OPACITY - 1, OPACITY + 0.5)
    # Beside an edge a splat would like to be bluer than anything on the mesh, to make up for its yellow neighbour.
    drift = 0.1 / SH_C0
    values["sh0"].clamp_(start.sh0 - drift, start.sh0 + drift).clamp_(-0.5 / SH_C0, 0.5 / SH_C0)


def make_scene(
    mesh: Mesh,
    seed: int = 0,
    *,
    count: int = 15_000,
    steps: int = 500,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    backend: str = "auto",
) -> Gaussians:
    """Splats of one mesh: about `count` discs on its visible surface, refined for `steps` Adam steps.

    sizes: see `refine`. The same seed gives the same splats, bit for bit, on a CPU.
    """
    rng = np.random.default_rng(seed)
    surface = visible_surface(mesh, 20 * count, rng)
    chosen, spacing = spread(surface, count)
    gaussians = discs(surface, chosen, spacing)
    return refine(gaussians, mesh, torch.from_numpy(spacing.astype(np.float32)), rng, steps, sizes, backend)


@torch.no_grad()
def score(gaussians: Gaussians, mesh: Mesh, size: int = 256, views: int = 24) -> float:
    """Mean PSNR in dB to the mesh on white, over views from all sides; none of them was fitted to."""
    from splatedit.metrics import psnr
    from splatedit.render import render

    cameras = even_cameras(views, size)
    images, _ = ground_truth(mesh, cameras)
    drawn = render(gaussians, cameras).rgb
    return sum(psnr(a, b) for a, b in zip(drawn, images, strict=True)) / views


# ----------------------------------------------------------------------------------------------------- the command line
def write_scene(gaussians: Gaussians, name: str, path: Path) -> None:
    """Save the splats with the sidecar that says what they show and which way is up."""
    from splatedit.files import save

    path.parent.mkdir(parents=True, exist_ok=True)
    save(gaussians, path)
    path.with_suffix(".yaml").write_text(f'source_prompt: {caption(name)}\nup: "{UP}"\n', encoding="utf-8")


def wanted(names: list[str], pairs: list[str], known: list[str]) -> dict[str, str]:
    """File stem -> animal of everything asked for; raises InputError for an animal without a mesh.

    The target of the pair "cat:pig" is the pig itself, for all pets share one frame: file `cat-pig`.
    """
    jobs = {name: name for name in names}
    for pair in pairs:
        source, colon, target = pair.partition(":")
        if not colon or source not in known:
            raise InputError(
                f"--pair {pair}: expected SOURCE:TARGET, for example cat:pig; known are {', '.join(known)}."
            )
        jobs[f"{source}-{target}"] = target
    for name in jobs.values():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)
            hint = f"did you mean {near[0]}?" if near else "the folder holds no .glb file."
            raise InputError(f"no mesh {name}.glb in the folder of --meshes; {hint}")
    if not jobs:
        raise InputError("nothing to make: name some animals, for example cat dog, or a --pair cat:pig.")
    return jobs


def preview(scenes: list[Gaussians], path: Path, size: int = 192) -> None:
    """Write a sheet: each scene from the front left, the side, behind, above and below, in a row."""
    from splatedit.media import draw as frames
    from splatedit.media import save_png, sheet

    angles = ((-30, 15), (75, 10), (200, 20), (-30, 60), (30, -35))
    cameras = cameras_from([look_at(a, e, 2.4) @ FLIP for a, e in angles], size)
    save_png(sheet([tile for scene in scenes for tile in frames(scene, cameras)], len(angles)), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="animals: stems of .glb files in the folder of --meshes")
    parser.add_argument("--meshes", type=Path, required=True, help="folder of the 24 Cube Pets .glb files (CC0)")
    parser.add_argument("--output", type=Path, default=Path("scenes"), help="folder to write; default: scenes")
    parser.add_argument("--pair", action="append", default=[], help="SOURCE:TARGET: the true result of that edit")
    parser.add_argument("--preview", type=Path, help="also write a picture of all the scenes made")
    parser.add_argument("--count", type=int, default=15_000, help="Gaussians of a scene, about")
    parser.add_argument("--steps", type=int, default=500, help="Adam steps of the refinement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        jobs = wanted(args.names, args.pair, sorted(p.stem for p in args.meshes.glob("*.glb")))
    except InputError as error:
        parser.error(str(error))
    made = []
    for stem, name in jobs.items():
        began = time.perf_counter()
        mesh, path = load_mesh(args.meshes / f"{name}.glb"), args.output / f"{stem}.ply"
        made.append(make_scene(mesh, args.seed, count=args.count, steps=args.steps))
        write_scene(made[-1], name, path)
        print(
            f"{path}: {made[-1].n} Gaussians, {path.stat().st_size / 2**20:.2f} MiB, "
            f"PSNR {score(made[-1], mesh):.1f} dB at 256 px, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    if args.preview:
        preview(made, args.preview)


if __name__ == "__main__":
    main()
