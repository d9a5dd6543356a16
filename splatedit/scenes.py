"""What can be optimised. A scene maps view numbers to pictures (b, 3, h, w); it knows nothing of diffusion."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.gaussians import Gaussians
from splatedit.render import Rendering, render


class Rates(NamedTuple):
    """Adam learning rates of the parameter groups at the first step.

    means is a fraction of the scene radius; the others are in the units the file stores: log scale, raw quaternion,
    logit opacity, SH coefficient. 0 freezes a group.
    """

    means: float = 1.5e-3
    quats: float = 1e-3
    scales: float = 3e-3
    opacities: float = 2e-2
    sh0: float = 3e-2
    shN: float = 0.0


class Splats:
    """Gaussians seen by a fixed set of cameras, with the Adam state and the averaging that keep an edit clean.

    supersample: pictures are drawn this many times larger and averaged down, so that the prior sees no aliasing to
    chase. neighbours: each parameter gradient is averaged over this many nearest Gaussians of the source, so that
    groups move together; without it Adam gives every splat its own noise-sized step, which low-resolution views cannot
    see and a close look shows as confetti. 0 turns it off.
    """

    def __init__(
        self,
        gaussians: Gaussians,
        cameras: Cameras,
        radius: float,
        rates: Rates = Rates(),  # noqa: B008  (an immutable named tuple)
        *,
        background: tuple[float, float, float] = (1.0, 1.0, 1.0),
        supersample: int = 2,
        neighbours: int = 16,
        backend: str = "auto",
    ):
        self.source, self.cameras, self.background = gaussians.detach(), cameras, background
        self.supersample, self.backend = supersample, backend
        self.fine = cameras.resized(cameras.width * supersample, cameras.height * supersample)
        self.parameters = {k: v.clone().requires_grad_() for k, v in self.source.parameters.items()}
        self.rates = {k: r * radius if k == "means" else r for k, r in rates._asdict().items()}
        live = [(k, p) for k, p in self.parameters.items() if self.rates[k] > 0 and p.numel()]
        self.optimizer = torch.optim.Adam(
            [{"params": [p], "lr": self.rates[k], "name": k} for k, p in live], betas=(0.9, 0.99), eps=1e-15
        )
        self.nearest = nearest(self.source.means, neighbours) if neighbours > 1 else None
        self.mean: dict[str, Tensor] | None = None
        self.averaged = 0

    @property
    def gaussians(self) -> Gaussians:
        """The current splats, differentiable."""
        return self.source._replace(**self.parameters)

    def result(self) -> Gaussians:
        """The averaged iterates if averaging has begun, else the current splats; detached copies."""
        values = self.mean if self.mean is not None else self.parameters
        return self.source._replace(**{k: v.detach().clone() for k, v in values.items()})

    def __call__(self, views: Tensor | list[int], gaussians: Gaussians | None = None) -> Rendering:
        """Draw `views` (indices into the cameras), of the current splats or of the given ones."""
        drawn = render(gaussians or self.gaussians, self.fine.pick(views), self.background, backend=self.backend)
        if self.supersample == 1:
            return drawn
        rgb, alpha = (F.avg_pool2d(x, self.supersample) for x in (drawn.rgb, drawn.alpha))
        return drawn._replace(rgb=rgb, alpha=alpha, depth=F.avg_pool2d(drawn.depth, self.supersample))

    def step(self, fraction: float, final_rate: float) -> None:
        """One Adam step on the gradients left by backward(); rates fall exponentially to `final_rate` of the first."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * final_rate**fraction
            (parameter,) = group["params"]
            if self.nearest is not None and parameter.grad is not None:
                parameter.grad = parameter.grad[self.nearest].mean(1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def average(self) -> None:
        """Take the current iterate into the running mean that `result` returns."""
        self.averaged += 1
        if self.mean is None:
            self.mean = {k: p.detach().clone() for k, p in self.parameters.items()}
        for k, p in self.parameters.items():
            self.mean[k].lerp_(p, 1 / self.averaged)

    def forget_average(self) -> None:
        """Let `result` return the current splats again, until averaging begins."""
        self.mean, self.averaged = None, 0

    def state_dict(self) -> dict[str, Any]:
        """What the next step and the result depend on; its tensors are those of the scene, so save it before that."""
        return {
            "parameters": {k: p.detach() for k, p in self.parameters.items()},
            "mean": self.mean,
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises InputError if that was another scene, or one with other rates."""
        shapes = {k: tuple(p.shape) for k, p in self.parameters.items()}
        found = {k: tuple(p.shape) for k, p in state["parameters"].items()}
        if found != shapes:
            raise InputError(f"resume: the state is of a scene with {found}, expected {shapes}; give its own scene.")
        trained = [group["name"] for group in state["optimizer"]["param_groups"]]
        if trained != [group["name"] for group in self.optimizer.param_groups]:
            raise InputError(f"resume: the state is of an edit of {', '.join(trained)}; give the same rates.")
        for k, p in self.parameters.items():
            p.copy_(state["parameters"][k])
        mean = state["mean"]
        self.mean = None if mean is None else {k: v.to(self.parameters[k], copy=True) for k, v in mean.items()}
        self.averaged = state["averaged"]
        self.optimizer.load_state_dict(state["optimizer"])


def nearest(points: Tensor, count: int) -> Tensor:
    """Indices (n, count) of the nearest points of each point, itself included."""
    from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  (scipy ships no stubs)

    host = points.detach().cpu().numpy()
    _, index = cKDTree(host).query(host, k=min(count, len(host)))
    return torch.from_numpy(index.reshape(len(host), -1)).to(points.device)
