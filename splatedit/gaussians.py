"""`Gaussians`: a scene as a named tuple of raw tensors, exactly what a splat file stores."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Rows of shN per spherical-harmonic degree: (degree + 1)^2 - 1, the constant term lives in sh0.
SH_REST = {0: 0, 1: 3, 2: 8, 3: 15}
SH_C0 = 0.28209479177387814  # the constant spherical harmonic: colour = 0.5 + SH_C0 * sh0
PARAMETERS = ("means", "quats", "scales", "opacities", "sh0", "shN")


class Gaussians(NamedTuple):
    """n anisotropic 3D Gaussians in gsplat's names; nothing is activated, nothing is normalised."""

    means: Tensor  # (n, 3) float32, world units
    quats: Tensor  # (n, 4) float32, w x y z; any length but 0
    scales: Tensor  # (n, 3) float32, log of the standard deviations
    opacities: Tensor  # (n,) float32, logit
    sh0: Tensor  # (n, 1, 3) float32, constant spherical harmonic, RGB
    shN: Tensor  # (n, k, 3) float32, k in {0, 3, 8, 15}: the higher ones, degree 0 to 3
    extra: dict[str, np.ndarray] = {}  # other columns of the file, (n,) each, dtype kept; read only
    comments: tuple[str, ...] = ()  # header comments, without the word "comment"
    obj_info: tuple[str, ...] = ()  # header obj_info lines, without the word "obj_info"
    elements: dict[str, np.ndarray] = {}  # other elements of the file, structured arrays; read only
    layout: tuple[str, ...] = ()  # order of the columns in the .ply they came from; () is INRIA's order

    @property
    def n(self) -> int:
        """How many Gaussians there are."""
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        """Degree of the spherical harmonics, 0 to 3."""
        return round((self.shN.shape[1] + 1) ** 0.5) - 1

    @property
    def sh(self) -> Tensor:
        """All spherical harmonics, (n, 1 + k, 3), differentiable."""
        return torch.cat([self.sh0, self.shN], 1)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The six tensors by name, in the order of PARAMETERS."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def drawable(self) -> Tensor:
        """Which ones can be drawn, (n,) bool: no number is infinite or NaN, nor a scale once it is no logarithm."""
        numbers = torch.cat([p.detach()[..., None].flatten(1) for p in self.parameters.values()], 1)
        return numbers.isfinite().all(1) & self.scales.detach().exp().isfinite().all(1)

    def __repr__(self) -> str:
        return f"Gaussians({self.n:,}, SH degree {self.sh_degree}, {self.means.device})"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        from splatedit.displays import gaussians_bundle

        return gaussians_bundle(self)

    def show(self, other: Gaussians | None = None, **more: Any) -> None:
        """Open the live viewer in the cell of a notebook, below a picture that stays; see `notebook.show_gaussians`."""
        from splatedit.notebook import show_gaussians

        show_gaussians(self, other, **more)

    def to(self, device: str | torch.device) -> Gaussians:
        """The same Gaussians with their six tensors on `device`."""
        return self._replace(**{name: value.to(device) for name, value in self.parameters.items()})

    def detach(self) -> Gaussians:
        """Copies cut from the graph; `Tensor.detach` alone shares memory with what the optimiser is about to move."""
        return self._replace(**{name: value.detach().clone() for name, value in self.parameters.items()})

    def select(self, index: Tensor | np.ndarray | slice | list[int] | list[bool]) -> Gaussians:
        """The rows named by an index list, a boolean mask of n entries or a slice; extra columns follow.

        Raises IndexError for a mask of another length or an index out of range.
        """
        if isinstance(index, slice):
            rows = torch.from_numpy(np.arange(self.n)[index].copy())  # torch has no negative steps
        else:
            rows = torch.as_tensor(index).cpu()
            if rows.dtype == torch.bool:
                if rows.shape != (self.n,):
                    raise IndexError(f"the mask has shape {tuple(rows.shape)}, the scene has {self.n} Gaussians")
                rows = rows.nonzero()[:, 0]
        rows = rows.long()
        chosen = {name: value[rows.to(value.device)] for name, value in self.parameters.items()}
        return self._replace(**chosen, extra={name: column[rows.numpy()] for name, column in self.extra.items()})
