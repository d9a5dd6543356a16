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
from splatedit.render import checks

__all__ = ["BACKENDS", "rasterization", "warm"]


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
    quats: (n, 4), wxyz, of any length but 0 (float32 allows 1e-18 to 1e18).
    scales: (n, 3), standard deviations, at least 0.
    opacities: (n,), in [0, 1].
    colors: with `sh_degree` (0 to 3) coefficients of spherical harmonics (n, k, 3), k at least (sh_degree + 1)^2, of
        the colour max(SH + 1/2, 0); without it values (n, d) or (c, n, d) of any number of channels.
    viewmats: (c, 4, 4), world to camera, OpenCV axes: x right, y down, z forward; the last row is (0, 0, 0, 1).
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

    Raises InputError, naming the argument, for what is wrong or what the backend cannot do: NaN and infinities in any
    tensor as well, of Gaussians that nobody sees too. Large and small finite numbers are drawn.
    """
    arguments = {k: v for k, v in locals().items() if k not in ("others", "backend")}
    checks.arguments(arguments)
    for name in others:
        if name not in checks.GSPLAT_ONLY:
            raise TypeError(f"rasterization() got an unexpected keyword argument {name!r}")
    return BACKENDS[chosen(backend, means)](**arguments, **others)


def chosen(backend: str, means: Tensor) -> str:
    """The key of BACKENDS that draws these Gaussians: what "auto" is for them, or `backend` itself, if it can."""
    if backend not in BACKENDS:
        raise InputError(f"rasterization: backend {backend!r} is not one of {', '.join(map(repr, BACKENDS))}.")
    on_cuda = means.is_cuda and means.dtype == torch.float32
    on_cpu = not on_cuda and means.device.type == "cpu" and means.dtype == torch.float32
    if backend == "auto":
        return "gsplat" if on_cuda else "cpu" if on_cpu and _can_compile() else "torch"
    if (backend == "gsplat" and not on_cuda) or (backend == "cpu" and not on_cpu):
        wish = "float32 CUDA tensors" if backend == "gsplat" else "float32 tensors on the CPU"
        raise InputError(
            f'rasterization: backend "{backend}" takes {wish}, means is {means.dtype} on {means.device}; '
            'backend "torch" takes any.'
        )
    return backend


# ---------------------------------------------------------------- backends


def _gsplat(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    try:
        from gsplat import rasterization as gsplat_rasterization  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"rasterization: CUDA tensors need gsplat, which cannot be imported ({error}); "
            "`pip install splatedit[cuda]`, or move the tensors to the CPU."
        ) from error
    checks.values(arguments)
    return gsplat_rasterization(**arguments)


def _cpu(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    checks.refuse(arguments, "cpu")
    colors = arguments["colors"]
    if arguments["sh_degree"] is not None and colors.dim() == 4:
        raise InputError(
            f"rasterization: colors {checks.shape_of(colors)} are SH coefficients per camera, "
            'which backend "cpu" has not; (n, k, 3) expected, or backend "torch".'
        )
    checks.values(arguments, parameters=False)  # the kernels look at these while they read them
    return _compiled().rasterize(**arguments)


def _torch(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    from splatedit.render import twin

    checks.refuse(arguments, "torch")
    checks.values(arguments)
    return twin.rasterize(**arguments)


def _auto(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return BACKENDS[chosen("auto", arguments["means"])](**arguments)


BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor, dict[str, Any]]]] = {
    "auto": _auto,
    "cpu": _cpu,
    "torch": _torch,
    "gsplat": _gsplat,
}


@functools.cache
def _compiled() -> ModuleType:
    """The kernels, of which some have run. Importing numba takes a while, so it waits until here.

    Raises InputError where numba is missing or makes no vector code for this machine.
    """
    try:
        from splatedit.render import autograd, kernel_cache

        try:
            autograd.probe()
        except Exception:  # perhaps machine code on disk that cannot be read: the second time without any
            kernel_cache.clear()
            autograd.probe()
    except Exception as error:  # a broken numba raises more than ImportError
        raise InputError(f'rasterization: backend "cpu" needs numba, which cannot be used here ({error}).') from error
    return autograd


@functools.cache
def _can_compile() -> bool:
    """Whether the kernels run here; warns, once, if not."""
    try:
        _compiled()
        return True
    except InputError as error:
        warnings.warn(f"splatedit draws with plain torch, which is slow: {error}", RuntimeWarning, stacklevel=4)
        return False


# ---------------------------------------------------------------- the first time


def warm(backward: bool = True) -> None:
    """Compile the CPU renderer, or load it from disk, so that the first picture comes as fast as the next.

    backward: what gradients need as well. Compiling takes about as long as the line says that it prints on stderr, once
    on a machine: numba keeps the machine code in __pycache__, NUMBA_CACHE_DIR or the user's cache folder. Does nothing
    where "auto" draws with plain torch.
    """
    if not _can_compile():
        return
    n, size = 40, 24  # two whole blocks of Gaussians and a rest, two tiles and a rest
    means = torch.linspace(-1, 1, 3 * n).reshape(n, 3) + torch.tensor([0.0, 0.0, 4.0])
    scene: dict[str, Any] = dict(
        means=means, quats=torch.ones(n, 4), scales=torch.full((n, 3), 0.1), opacities=torch.full((n,), 0.5)
    )
    scene |= dict(viewmats=torch.eye(4)[None], backgrounds=torch.zeros(1, 3))
    colors = {3: torch.zeros(n, 16, 3), None: torch.zeros(n, 5)}  # SH, and features in more than one group of four
    Ks = torch.tensor([[[size, 0.0, size / 2], [0.0, size, size / 2], [0.0, 0.0, 1.0]]])
    more = ((3, {"render_mode": "RGB+ED"}), (None, {"backgrounds": None, "absgrad": True}))
    with torch.inference_mode(False), torch.set_grad_enabled(backward):
        for degree, options in more:
            given: dict[str, Any] = {
                k: v.clone().requires_grad_(backward) for k, v in (scene | {"colors": colors[degree]}).items()
            }
            given |= dict(Ks=Ks, width=size, height=size, sh_degree=degree, backend="cpu", **options)
            image, alphas, _ = rasterization(**given)
            if backward:
                (image.sum() + alphas.sum()).backward()
