"""What can be optimised. A scene maps view numbers to pictures (b, 3, h, w); it knows nothing of diffusion."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.errors import InputError
from splatedit.gaussians import SH_C0, Gaussians
from splatedit.render import Rendering, densify, render
from splatedit.render.densify import Rows


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


class Hold(NamedTuple):
    """What keeps an edit near its source, beside a mask; both are off by default."""

    anchor: float = 0.0  # share of the way back to the source that a Gaussian is taken in each step; see `Splats.hold`
    outside: float = 0.0  # pull of the pixels outside the mask to their source; see `editing.outside_pull`
    relevance: Tensor | None = None  # (n,) in [0, 1]: the anchor is multiplied by 1 - relevance; None is 0 everywhere

    def check(self, n: int) -> None:
        """Raise InputError for what is out of range, or a relevance that is not of n Gaussians."""
        if not 0 <= self.anchor <= 1:
            raise InputError(f"anchor: found {self.anchor}, expected 0 (off) to 1.")
        if not 0 <= self.outside < math.inf:
            raise InputError(f"outside: found {self.outside}, expected 0 (off) or more.")
        given = self.relevance
        if given is not None and (given.shape != (n,) or not bool(((given >= 0) & (given <= 1)).all())):
            raise InputError(f"relevance: found shape {list(given.shape)}, expected [{n}] of numbers in [0, 1].")

    def anchors(self, means: Tensor) -> Tensor | None:
        """How far each Gaussian of the source is taken back in a step, (n,), on the device of these; None: nowhere."""
        if self.anchor == 0:
            return None
        weight = means.new_full((len(means),), self.anchor)
        return weight if self.relevance is None else weight * (1 - self.relevance.to(means))


class Splats:
    """Gaussians seen by a fixed set of cameras, with the Adam state and the averaging that keep an edit clean.

    mask: (n,) bool, which Gaussians may change. `parameters` are the rows of these alone; the others keep their bits
    and cost neither gradients nor moments. supersample: pictures are drawn this many times larger and averaged down, so
    that the prior sees no aliasing to chase. neighbours: each parameter gradient is averaged over this many nearest
    Gaussians (of the source, inside the mask), so that groups move together; without it Adam gives every splat its own
    noise-sized step, which low-resolution views cannot see and a close look shows as confetti. 0 turns it off.

    The rows of `parameters` may be changed by `render.densify` if `follow` is told. The whole scene then has the rows
    of the source that are left, in their order, and after them the added ones; `rows` says which is which.

    Raises InputError for a mask of another shape, or of nothing.
    """

    def __init__(
        self,
        gaussians: Gaussians,
        cameras: Cameras,
        radius: float,
        rates: Rates = Rates(),  # noqa: B008  (an immutable named tuple)
        *,
        mask: Tensor | None = None,
        hold: Hold = Hold(),  # noqa: B008
        background: tuple[float, float, float] = (1.0, 1.0, 1.0),
        supersample: int = 2,
        neighbours: int = 16,
        backend: str = "auto",
    ):
        self.source, self.cameras, self.radius, self.background = gaussians.detach(), cameras, radius, background
        self.supersample, self.neighbours, self.backend = supersample, neighbours, backend
        self.fine = cameras.resized(cameras.width * supersample, cameras.height * supersample)
        hold.check(self.source.n)
        self.inside = check_mask(mask, self.source)
        self.parent = self.inside.nonzero()[:, 0]  # (k,) source row of each row under edit; an added one's ancestor
        self.added = torch.zeros_like(self.parent, dtype=torch.bool)  # (k,)
        self.rates = {k: r * radius if k == "means" else r for k, r in rates._asdict().items()}
        self.trained = [k for k, v in self.source.parameters.items() if self.rates[k] > 0 and v.numel()]
        self.parameters = {k: v[self.parent] for k, v in self.source.parameters.items()}
        for name in {*self.trained, "means"}:  # Grower reads what reaches the means on screen
            self.parameters[name].requires_grad_()
        self.optimizer = torch.optim.Adam(
            [{"params": [self.parameters[k]], "lr": self.rates[k], "name": k} for k in self.trained],
            betas=(0.9, 0.99),
            eps=1e-15,
        )
        self.anchor = hold.anchors(self.source.means)
        self.mean: dict[str, Tensor] | None = None
        self.averaged = 0
        self.felt = torch.zeros_like(self.parent, dtype=torch.float32)  # (k,), see `feel`
        held = [*self.trained, "means"] if hold.anchor else ["means"]
        began = self.source if mask is None else self.source.select(self.parent)
        self.home = {k: began.parameters[k] for k in held}
        self.settle()

    def settle(self) -> None:
        """Find the place of each row under edit in the whole scene, and its neighbours."""
        left = ~self.inside
        left[self.parent[~self.added]] = True
        kept, born = left.nonzero()[:, 0], self.parent[self.added]
        same = len(kept) == self.source.n and not len(born)
        self.base = self.source if same else self.source.select(torch.cat([kept, born]))
        self.rows = None if same else torch.cat([kept, torch.full_like(born, -1)])
        last = torch.arange(len(kept), self.base.n, device=kept.device)
        at = torch.cat([(left.cumsum(0) - 1)[self.parent[~self.added]], last])
        self.at = None if len(at) == self.base.n else at  # (k,) int64; None: all rows are under edit
        self.nearest = nearest(self.home["means"], self.neighbours) if self.neighbours > 1 else None

    @property
    def n(self) -> int:
        """How many Gaussians the whole scene has."""
        return self.base.n

    @property
    def gaussians(self) -> Gaussians:
        """The current splats, differentiable."""
        return self.whole(self.parameters)

    def whole(self, values: dict[str, Tensor]) -> Gaussians:
        """The scene with these values, by parameter name, in the rows under edit."""
        if self.at is None:
            return self.base._replace(**values)
        moved = values if self.rows is not None else self.trained
        whole = {k: self.base.parameters[k].index_copy(0, self.at, values[k]) for k in moved}
        return self.base._replace(**whole)

    def result(self) -> Gaussians:
        """The averaged iterates if averaging has begun, else the current splats; detached copies."""
        values = self.mean if self.mean is not None else self.parameters
        return self.whole({k: v.detach() for k, v in values.items()}).detach()

    def __call__(
        self,
        views: Tensor | list[int],
        gaussians: Gaussians | None = None,
        background: tuple[float, float, float] | None = None,
    ) -> Rendering:
        """Draw `views` (indices into the cameras), of the current splats or of the given ones."""
        behind = background or self.background
        drawn = render(gaussians or self.gaussians, self.fine.pick(views), behind, backend=self.backend)
        if self.supersample == 1:
            return drawn
        rgb, alpha = (F.avg_pool2d(x, self.supersample) for x in (drawn.rgb, drawn.alpha))
        return drawn._replace(rgb=rgb, alpha=alpha, depth=F.avg_pool2d(drawn.depth, self.supersample))

    @torch.no_grad()
    def coverage(self, views: Tensor | list[int]) -> Tensor:
        """How much of each pixel of the source the Gaussians inside the mask make up, (b, 1, h, w) in [0, 1]."""
        return self(views, marked(self.source, self.inside), (0.0, 0.0, 0.0)).rgb[:, :1].clamp(0, 1)

    @torch.no_grad()
    def feel(self, means: float, color: float) -> None:
        """Keep how hard the gradients that backward() left pull at each row under edit, for `pull`.

        It is the rms over its three position and three colour gradients, each times a step: means, in scene radii;
        color, of a picture in [0, 1]. So it says by how much such a step changes what is minimised. Frozen colours
        count as 0. It follows the rows when these change; halves take what pulled at the whole.
        """
        place, paint = (self.parameters[name].grad for name in ("means", "sh0"))
        total = torch.zeros_like(self.felt)
        if place is not None:
            total += (place * (means * self.radius)).square().sum(1)
        if paint is not None:
            total += (paint[:, 0] * (color / SH_C0)).square().sum(1)
        self.felt = (total / 6).sqrt()

    @property
    def pull(self) -> Tensor:
        """(n,) what `feel` kept of each Gaussian of the whole scene, at least 0; exactly 0 outside the mask."""
        return self.felt if self.at is None else self.felt.new_zeros(self.n).index_copy(0, self.at, self.felt)

    def step(self, fraction: float, final_rate: float) -> None:
        """One Adam step on the gradients left by backward(); rates fall exponentially to `final_rate` of the first."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * final_rate**fraction
            (parameter,) = group["params"]
            if self.nearest is not None and parameter.grad is not None:
                parameter.grad = parameter.grad[self.nearest].mean(1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.parameters["means"].grad = None  # which may be frozen
        if self.anchor is not None:
            self.hold(final_rate**fraction)

    @torch.no_grad()
    def hold(self, share: float) -> None:
        """Take every Gaussian under edit `anchor * share` of the way back to the source.

        The gradient step of anchor/2 |theta - theta_0|^2, decoupled from Adam like AdamW's weight decay (arXiv
        1711.05101) and falling with the rates: inside Adam, which divides by the gradient's size, its strength would
        depend on how hard the prior happens to pull. A parameter pulled one way in every step comes rate / anchor far.
        An added Gaussian is held where it was born.
        """
        assert self.anchor is not None
        weight = share * self.anchor[self.parent]
        for name in self.trained:
            parameter = self.parameters[name]
            parameter.lerp_(self.home[name], weight.view(-1, *[1] * (parameter.dim() - 1)))

    @torch.no_grad()
    def follow(self, changed: Rows) -> None:
        """Let all that is kept of each row follow a change of the rows of `parameters` (and `optimizer`)."""

        def carried(kept: dict[str, Tensor]) -> dict[str, Tensor]:
            new = {k: v[changed.source] for k, v in kept.items()}
            for k, v in new.items():
                v[changed.fresh] = self.parameters[k].detach()[changed.fresh]
            return new

        self.parent, self.added = self.parent[changed.source], self.added[changed.source] | changed.fresh
        self.felt = self.felt[changed.source]
        self.home = carried(self.home)
        self.mean = None if self.mean is None else carried(self.mean)
        self.settle()

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
            "inside": self.inside,
            "parent": self.parent,
            "added": self.added,
            "born": {k: v[self.added] for k, v in self.home.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises InputError if that was another scene, mask, or other rates."""
        self.check_state(state)
        place = self.parent.device
        parent, added = state["parent"].to(place), state["added"].to(place)
        if added.any() or not torch.equal(parent, self.parent):
            self.regrow(parent, added, state["born"])
        for k, p in self.parameters.items():
            p.copy_(state["parameters"][k])
        mean = state["mean"]
        self.mean = None if mean is None else {k: v.to(self.parameters[k], copy=True) for k, v in mean.items()}
        self.averaged = state["averaged"]
        self.optimizer.load_state_dict(state["optimizer"])

    def regrow(self, parent: Tensor, added: Tensor, born: dict[str, Tensor]) -> None:
        """Have the rows of a state, of whatever value; `born` is where the added ones are held."""
        blank = torch.zeros_like(parent)
        densify.rearrange(self.parameters, self.optimizer, blank, torch.ones_like(added))
        self.parent, self.added = parent, added
        self.felt = torch.zeros_like(parent, dtype=torch.float32)
        for k, v in born.items():
            began = self.source.parameters[k][parent[~added]]
            self.home[k] = torch.cat([began, v.to(began)])
        self.settle()

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise InputError for a state that is not of this scene, mask, rates and anchor."""
        shapes = {"splats": len(self.inside), **{k: tuple(p.shape[1:]) for k, p in self.parameters.items()}}
        found = {"splats": len(state["inside"]), **{k: tuple(p.shape[1:]) for k, p in state["parameters"].items()}}
        if found != shapes:
            raise InputError(f"resume: the state is of a scene with {found}, expected {shapes}; give its own scene.")
        if not torch.equal(state["inside"].to(self.inside.device), self.inside):
            raise InputError("resume: the state is of an edit with another mask; give the same mask.")
        trained = [group["name"] for group in state["optimizer"]["param_groups"]]
        if trained != self.trained:
            raise InputError(f"resume: the state is of an edit of {', '.join(trained)}; give the same rates.")
        if state["born"].keys() != self.home.keys():
            raise InputError("resume: the state is of an edit with another anchor; give the same.")


def marked(gaussians: Gaussians, inside: Tensor) -> Gaussians:
    """The same splats, white inside a mask (n,) bool and black outside: drawn on black, the share of each pixel."""
    white = (inside.to(gaussians.sh0)[:, None, None].expand(-1, 1, 3) - 0.5) / SH_C0
    return gaussians._replace(sh0=white, shN=gaussians.shN[:, :0])


def check_mask(mask: Tensor | None, gaussians: Gaussians) -> Tensor:
    """The mask on the device of the scene, all of it for None; raises InputError for one that cannot be of it."""
    n = gaussians.n
    if mask is None:
        return torch.ones(n, dtype=torch.bool, device=gaussians.means.device)
    if mask.dtype != torch.bool or mask.shape != (n,):
        raise InputError(f"mask: found shape {list(mask.shape)} of {mask.dtype}, expected [{n}] of torch.bool.")
    if not mask.any():
        raise InputError(f"mask: none of the {n:,} Gaussians is inside, so nothing could change; widen it.")
    return mask.to(gaussians.means.device)


def nearest(points: Tensor, count: int) -> Tensor:
    """Indices (n, count) of the nearest points of each point, itself included."""
    from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  (scipy ships no stubs)

    host = points.detach().cpu().numpy()
    _, index = cKDTree(host).query(host, k=min(count, len(host)))
    return torch.from_numpy(index.reshape(len(host), -1)).to(points.device)
