"""Differentiable rasterisation of 3D Gaussians: gsplat's call, on CUDA by gsplat, on a CPU by compiled kernels."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from splatedit.errors import InputError
from splatedit.render.constants import TILE

__all__ = ["BACKENDS", "rasterization"]

RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
RASTERIZE_MODES = ("classic", "antialiased")

# what gsplat can do beyond the signature of `rasterization`, with the value that asks for nothing
GSPLAT_ONLY = {
    "covars": None,
    "segmented": False,
    "distributed": False,
    "camera_model": "pinhole",
    "with_ut": False,
    "with_eval3d": False,
    "radial_coeffs": None,
    "tangential_coeffs": None,
    "thin_prism_coeffs": None,
    "ftheta_coeffs": None,
    "rolling_shutter": None,
    "viewmats_rs": None,
}


def rasterization(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = False,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    render_mode: str = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: str = "classic",
    channel_chunk: int = 32,
    *,
    backend: str = "auto",
    **others: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Draw n 3D Gaussians in c pinhole cameras, as gsplat.rasterization does, with gsplat's names and defaults.

    means: (n, 3), scene units.
    quats: (n, 4), wxyz, of any length but 0.
    scales: (n, 3), standard deviations, above 0.
    opacities: (n,), in [0, 1].
    colors: with `sh_degree` (0 to 3) coefficients of spherical harmonics (n, k, 3), k at least (sh_degree + 1)^2, of
        the colour max(SH + 1/2, 0); without it values (n, d) or (c, n, d) of any number of channels.
    viewmats: (c, 4, 4), world to camera, OpenCV axes: x right, y down, z forward.
    Ks: (c, 3, 3) in pixels, the centre of the first pixel being at (0.5, 0.5). Not differentiable.
    width, height: pixels.
    near_plane, far_plane: a Gaussian whose centre is nearer or farther is not drawn. Scene units.
    radius_clip: a Gaussian of at most this radius on screen is not drawn. Pixels.
    eps2d: variance added on screen, square pixels; "antialiased" dims a Gaussian by what this spreads it.
    backgrounds: (c, d) or None, which is 0.
    render_mode: "RGB" the colours, "D" the depth along the view axis summed with the same weights, "ED" that divided by
        alpha; "RGB+D" and "RGB+ED" have it as the last channel.
    absgrad: let backward leave the sums over pixels of absolute gradients in meta["means2d"].absgrad, (c, n, 2); on a
        CPU these are summed over groups of four channels as well.
    packed, sparse_grad: must be False; they give `meta` other shapes.
    tile_size, channel_chunk: gsplat's; on a CPU the tile has 16 pixels and channels go in groups of four.
    backend: a key of BACKENDS. "auto" is "gsplat" for float32 CUDA tensors, "cpu" for float32 CPU tensors (or, with one
        warning, "torch" where numba is missing or cannot compile), and "torch" for everything else.
    others: further arguments of gsplat.rasterization, which only gsplat can do.

    Returns image (c, height, width, d), alphas (c, height, width, 1), and meta, of which all backends have
    `radii` (c, n, 2) int32, 0 where a Gaussian is not drawn; `means2d` (c, n, 2) pixels, an intermediate result to call
    retain_grad() on; `depths` (c, n); `conics` (c, n, 3); `opacities` (c, n), dimmed if "antialiased"; `width`,
    `height`, `n_cameras`, `tile_size`, `tile_width`, `tile_height`; `gaussian_ids` and `camera_ids`, None.

    Gradients reach means, quats, scales, opacities, colors, viewmats and backgrounds. "cpu" runs on
    torch.get_num_threads() threads and gives the same bits with any number of them; it may be called from several
    threads at once, and in a forked child (where torch itself wants torch.set_num_threads(1)).

    Raises InputError, naming the argument, for what is wrong or what the backend cannot do.
    """
    arguments = {k: v for k, v in locals().items() if k not in ("others", "backend")}
    _check(**arguments)
    for name in others:
        if name not in GSPLAT_ONLY:
            raise TypeError(f"rasterization() got an unexpected keyword argument {name!r}")
    return _backend(backend)(**arguments, **others)


# ---------------------------------------------------------------- backends


def _gsplat(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    means = arguments["means"]
    if not means.is_cuda or means.dtype != torch.float32:
        raise InputError(
            f'rasterization: backend "gsplat" takes float32 CUDA tensors, means is {means.dtype} on {means.device}.'
        )
    try:
        from gsplat import rasterization as gsplat_rasterization  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"rasterization: CUDA tensors need gsplat, which cannot be imported ({error}); "
            "`pip install splatedit[cuda]`, or move the tensors to the CPU."
        ) from error
    return gsplat_rasterization(**arguments)


def _cpu(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    _refuse(arguments, "cpu")
    means, colors = arguments["means"], arguments["colors"]
    if means.device.type != "cpu" or means.dtype != torch.float32:
        raise InputError(
            f'rasterization: backend "cpu" takes float32 tensors on the CPU, means is {means.dtype} on {means.device}; '
            'backend "torch" takes any.'
        )
    if arguments["sh_degree"] is not None and colors.dim() == 4:
        raise InputError(
            f'rasterization: colors {_shape(colors)} are SH coefficients per camera, which backend "cpu" has not; '
            '(n, k, 3) expected, or backend "torch".'
        )
    return _compiled().rasterize(**arguments)


def _torch(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    from splatedit.render import twin

    _refuse(arguments, "torch")
    return twin.rasterize(**arguments)


def _auto(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    means = arguments["means"]
    if means.is_cuda and means.dtype == torch.float32:
        return _gsplat(**arguments)
    if means.device.type == "cpu" and means.dtype == torch.float32 and _can_compile():
        return _cpu(**arguments)
    return _torch(**arguments)


BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor, dict[str, Any]]]] = {
    "auto": _auto,
    "cpu": _cpu,
    "torch": _torch,
    "gsplat": _gsplat,
}


@functools.cache
def _compiled() -> ModuleType:
    """The kernels, compiled on their first call. Importing numba takes a while, so it waits until here."""
    try:
        from splatedit.render import autograd
    except Exception as error:  # a broken numba raises more than ImportError
        raise InputError(f'rasterization: backend "cpu" needs numba, which cannot be used here ({error}).') from error
    return autograd


@functools.cache
def _can_compile() -> bool:
    """Whether numba is there and makes vector code for this machine; warns, once, if not."""
    try:
        _compiled().probe()
        return True
    except Exception as error:
        warnings.warn(f"splatedit draws with plain torch, which is slow: {error}", RuntimeWarning, stacklevel=4)
        return False


# ---------------------------------------------------------------- what the user may get wrong


def _backend(name: str) -> Callable[..., tuple[Tensor, Tensor, dict[str, Any]]]:
    if name not in BACKENDS:
        raise InputError(f"rasterization: backend {name!r} is not one of {', '.join(map(repr, BACKENDS))}.")
    return BACKENDS[name]


def _refuse(arguments: dict[str, Any], backend: str) -> None:
    """What only gsplat can do."""
    for name, neutral in GSPLAT_ONLY.items():
        value = arguments.get(name, neutral)
        if value is not neutral and value != neutral and getattr(value, "name", None) != "GLOBAL":
            raise InputError(
                f'rasterization: {name}={value!r} is something only backend "gsplat" can do; '
                f'leave it out, or {neutral!r}, for backend "{backend}".'
            )
    if arguments["tile_size"] != TILE:
        found = arguments["tile_size"]
        raise InputError(
            f'rasterization: tile_size={found} on backend "{backend}", which has tiles of {TILE} pixels only.'
        )


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _check(**a: Any) -> None:
    """Shapes, types and choices."""
    tensors = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "backgrounds")
    for name in tensors:
        if not isinstance(a[name], Tensor) and not (name == "backgrounds" and a[name] is None):
            raise InputError(f"rasterization: {name} is a {type(a[name]).__name__} where a tensor is expected.")
    means, viewmats, colors, degree = a["means"], a["viewmats"], a["colors"], a["sh_degree"]
    if means.dim() != 2:
        raise InputError(f"rasterization: means {_shape(means)} where (n, 3) is expected: no batch dimensions.")
    n, c = means.shape[0], viewmats.shape[0] if viewmats.dim() else 0
    expected = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,)}
    expected |= {"viewmats": (c, 4, 4), "Ks": (c, 3, 3)}
    for name, shape in expected.items():
        if tuple(a[name].shape) != shape:
            wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
            raise InputError(f"rasterization: {name} {_shape(a[name])} where {wanted} is expected.")
    _check_colors(colors, degree, n, c)
    if a["backgrounds"] is not None:
        channels = 3 if degree is not None else colors.shape[-1]
        if tuple(a["backgrounds"].shape) != (c, channels):
            raise InputError(
                f"rasterization: backgrounds {_shape(a['backgrounds'])} where ({c}, {channels}) is expected."
            )
    if c == 0:
        raise InputError("rasterization: viewmats (0, 4, 4) where at least one camera is expected.")
    for name in tensors:
        t = a[name]
        if t is not None and (t.dtype != means.dtype or t.device != means.device):
            raise InputError(
                f"rasterization: {name} is {t.dtype} on {t.device}, means is {means.dtype} on {means.device}; "
                "the same is expected."
            )
    if means.dtype not in (torch.float32, torch.float64):
        raise InputError(f"rasterization: means is {means.dtype} where torch.float32 is expected.")
    for name, choices in (("render_mode", RENDER_MODES), ("rasterize_mode", RASTERIZE_MODES)):
        if a[name] not in choices:
            raise InputError(f"rasterization: {name} {a[name]!r} is not one of {', '.join(map(repr, choices))}.")
    for name in ("packed", "sparse_grad"):
        if a[name]:
            raise InputError(f"rasterization: {name}=True is not supported; {name}=False is expected.")
    for name in ("width", "height"):
        if a[name] < 1:
            raise InputError(f"rasterization: {name} {a[name]} where at least 1 pixel is expected.")


def _check_colors(colors: Tensor, degree: int | None, n: int, c: int) -> None:
    if degree is None:
        if tuple(colors.shape[:-1]) not in ((n,), (c, n)) or colors.dim() < 2:
            raise InputError(
                f"rasterization: colors {_shape(colors)} where ({n}, d) or ({c}, {n}, d) is expected without sh_degree."
            )
        return
    if degree not in (0, 1, 2, 3):
        raise InputError(f"rasterization: sh_degree {degree} is not one of 0, 1, 2, 3.")
    k = (degree + 1) ** 2
    shape = tuple(colors.shape)
    if len(shape) < 3 or shape[-1] != 3 or shape[-2] < k or shape[:-2] not in ((n,), (c, n)):
        raise InputError(
            f"rasterization: colors {_shape(colors)} where ({n}, k, 3) with k at least {k} is expected "
            f"for sh_degree {degree}."
        )
