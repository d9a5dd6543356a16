"""From one splat file to another: another format, another degree of spherical harmonics, another axis up."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from splatedit.camera_files import WORLD
from splatedit.cameras import check_up, explain_up
from splatedit.errors import InputError, LossWarning
from splatedit.extents import up_in_text
from splatedit.files import check_target, load, save, sidecar
from splatedit.formats.ply import NORMALS
from splatedit.gaussians import SH_REST, Gaussians


def convert_file(
    source: str | Path, target: str | Path, sh_degree: int | None = None, up: str | None = None
) -> list[str]:
    """Read `source` and write it as `target`, whose ending says the format; the lines returned say what was done.

    `up`, one of UPS, is the axis that is up in the written file: the scene is turned from the one its sidecar names, or
    that `explain_up` finds. What is lost is said by LossWarnings. Raises InputError, and nothing is written, for a
    target that is the source or cannot be written.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    check_target(target)
    if source.exists() and target.exists() and os.path.samefile(source, target):
        raise InputError(f"{target}: is the file to convert; give the new file another name.")
    if up is not None:
        check_up(up)
    gaussians = load(source)
    notes = [f"{source}: {gaussians.n} Gaussians, SH degree {gaussians.sh_degree}"]
    if sh_degree is not None:
        if gaussians.shN[:, SH_REST[sh_degree] :].any():
            text = f"{target}: spherical harmonics above degree {sh_degree} are dropped."
            warnings.warn(text, LossWarning, stacklevel=2)
        gaussians = with_degree(gaussians, sh_degree)
    if up is not None:
        said = sidecar(source).up
        now, why = (said, "the sidecar says so") if said else explain_up(gaussians)
        gaussians = turned_up(gaussians, now, up)
        notes.append(f"up was {now} ({why}), is {up}" if now != up else f"up is {up} already ({why})")
    save(gaussians, target)
    return [*notes, f"{target}: {target.stat().st_size / 1e6:.1f} MB"]


def with_degree(gaussians: Gaussians, degree: int) -> Gaussians:
    """The same splats with spherical harmonics of degree 0 to 3: higher ones are dropped, missing ones zeros."""
    k, rows = gaussians.shN.shape[1], SH_REST[degree]
    zeros = gaussians.shN.new_zeros(gaussians.n, max(0, rows - k), 3)
    return gaussians._replace(shN=torch.cat([gaussians.shN[:, :rows], zeros], 1).contiguous())


def turned_up(gaussians: Gaussians, now: str, up: str) -> Gaussians:
    """The scene turned by quarter or half turns so that its axis `now` becomes `up`, both of UPS.

    Comments that speak of the axis are replaced by one that tells the truth; one on nerfstudio's world is left out of a
    scene that is turned out of it.
    """
    comments = gaussians.comments if now == up else [c for c in gaussians.comments if not c.startswith(WORLD)]
    kept = tuple(text for text in comments if not up_in_text(text))
    told = gaussians._replace(comments=(*kept, f"Vertical axis: {up}"))
    return told if now == up else rotated(told, turn(now, up))


def turn(now: str, up: str) -> Tensor:
    """The rotation (3, 3) float64 that takes one of UPS to another: none, a quarter turn, or half a turn.

    Half a turn is about x, or about z if x itself is turned over: y-down and y-up files are usually converted so.
    """
    axes = torch.eye(3, dtype=torch.float64)
    a, b = (axes["xyz".index(axis[1])] * (1 if axis[0] == "+" else -1) for axis in (now, up))
    if now == up:
        return axes
    if now[1] == up[1]:
        about = axes[2] if now[1] == "x" else axes[0]
        return 2 * torch.outer(about, about) - axes
    c = torch.linalg.cross(a, b)
    return torch.outer(b, a) - torch.outer(a, b) + torch.outer(c, c)


def rotated(gaussians: Gaussians, rotation: Tensor) -> Gaussians:
    """The scene turned about the origin by a rotation (3, 3): positions, orientations, harmonics, normals.

    Seen by a camera turned along, the picture is the same.
    """
    R = rotation.double().cpu()
    means = (gaussians.means.double() @ R.T.to(gaussians.means.device)).float()
    turned = gaussians._replace(
        means=means, quats=_turn_quats(gaussians.quats, R), shN=_turn_harmonics(gaussians.shN, R)
    )
    if not all(name in gaussians.extra for name in NORMALS):
        return turned
    normals = np.stack([gaussians.extra[name] for name in NORMALS], 1) @ R.T.numpy()
    columns = {name: normals[:, i].astype(gaussians.extra[name].dtype) for i, name in enumerate(NORMALS)}
    return turned._replace(extra={**gaussians.extra, **columns})


def _turn_quats(quats: Tensor, R: Tensor) -> Tensor:
    """The quaternion of R times each of `quats` (n, 4), w x y z; lengths are kept."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = torch.from_numpy(Rotation.from_matrix(R.numpy()).as_quat(canonical=True)).to(quats.device)
    left = torch.stack([w, -x, -y, -z, x, w, -z, y, y, z, w, -x, z, -y, x, w]).reshape(4, 4)  # Hamilton product
    return (quats.double() @ left.T).float()


def _turn_harmonics(shN: Tensor, R: Tensor) -> Tensor:
    """Coefficients (n, k, 3) of the same functions on the sphere, turned: f'(d) = f(R^-1 d), degree by degree.

    Each degree is a space of its own under rotation; its matrix follows from the values in enough directions.
    """
    from splatedit.render.twin import basis

    if not shN.shape[1]:
        return shN
    degree = round((shN.shape[1] + 1) ** 0.5) - 1
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 3, generator=draw, dtype=torch.float64), dim=1)
    there, here = basis(degree, directions), basis(degree, directions @ R)  # rows of `directions @ R` are R^-1 d
    out = torch.empty_like(shN)
    for band in range(1, degree + 1):
        rows = slice(band**2, (band + 1) ** 2)
        D = torch.linalg.lstsq(there[:, rows], here[:, rows]).solution.to(shN.device)
        kept = slice(band**2 - 1, (band + 1) ** 2 - 1)
        out[:, kept] = torch.einsum("ij,njc->nic", D, shN[:, kept].double()).float()
    return out
