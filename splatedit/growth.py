"""Geometry that may change: Gaussians are added where an edit pulls hardest on screen, and faint ones removed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from splatedit.errors import InputError
from splatedit.render import Rendering, densify
from splatedit.render.densify import Rows
from splatedit.scenes import Splats


class Growth(NamedTuple):
    """When Gaussians are added and removed; by default never."""

    percent: float = 0.0  # of the Gaussians that may change, each time; 0 to 100, 0 turns all of this off
    every: int = 25  # steps
    window: tuple[float, float] = (0.1, 0.6)  # share of the steps after which it begins, and ends
    max_gaussians: int | None = None  # in the whole scene; None: twice as many as it has
    prune_opacity: float = 0.005  # a fainter one is removed, each time

    def limit(self, n: int) -> int:
        """The most Gaussians that a scene of n may come to have; raises InputError if it has more already."""
        if self.max_gaussians is None:
            return 2 * n
        if self.max_gaussians < n:
            raise InputError(
                f"max_gaussians: found {self.max_gaussians:,}, but the scene has {n:,} already; "
                "expected at least as many (an edit does not thin a scene out)."
            )
        return self.max_gaussians

    def check(self) -> None:
        """Raise InputError for what is out of range."""
        if not 0 <= self.percent <= 100:
            raise InputError(f"grow_percent: found {self.percent}, expected 0 (off) to 100.")
        if self.every < 1:
            raise InputError(f"grow_every: found {self.every}, expected 1 step or more.")
        if not 0 <= self.window[0] <= self.window[1] <= 1:
            raise InputError(f"grow_range: found {list(self.window)}, expected two numbers, 0 <= from <= to <= 1.")
        if not 0 <= self.prune_opacity < 1:
            raise InputError(f"prune_opacity: found {self.prune_opacity}, expected 0 (off) or more, below 1.")


class Grower:
    """Changes the rows of a scene under edit: those inside its mask, by the gradients of their places on screen.

    As in 3DGS (arXiv 2308.04079) and gsplat's DefaultStrategy the gradient's length is averaged over the cameras that
    see a Gaussian, and what is fainter than a threshold goes. Two things differ. The threshold of the gradient is a
    percentile: a score's gradient has no unit for which one could be known (GaussianEditor's max_densify_percent, arXiv
    2311.14521). And the chosen are halved (`densify.halve`), neither doubled nor split at random, which would leave a
    picture that no prior of few pixels repairs. One code for all backends. Nothing happens while `growth.percent` is 0.
    Raises InputError for a mistake in `growth`.
    """

    def __init__(self, growth: Growth, scene: Splats, steps: int):
        growth.check()
        self.growth, self.scene = growth, scene
        self.limit = growth.limit(scene.source.n)
        self.begin, self.end = (round(share * steps) if growth.percent else 0 for share in growth.window)
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        opacities = self.scene.parameters["opacities"].detach()
        self.pulled, self.seen = torch.zeros_like(opacities), torch.zeros_like(opacities, dtype=torch.int64)

    def watch(self, index: int, drawn: Rendering) -> None:
        """Before backward: keep the gradient that `step` will read, if step `index` counts."""
        if self.begin <= index < self.end:
            drawn.means2d.retain_grad()

    def step(self, index: int, drawn: Rendering) -> None:
        """After the optimiser's step `index`, from 0: count, and change the rows if it is time to."""
        if not self.begin <= index < self.end:
            return
        pulled, seen = densify.screen_gradients(drawn.meta)
        at = self.scene.at
        self.pulled += pulled if at is None else pulled[at]
        self.seen += seen if at is None else seen[at]
        if (index + 1 - self.begin) % self.growth.every == 0:
            refine(self.scene, self.pulled / self.seen.clamp(min=1), self.growth, self.limit)
            self.forget()

    def state_dict(self) -> dict[str, Any]:
        """What has been counted since rows last changed."""
        return {"pulled": self.pulled, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, the scene's own state having been loaded."""
        self.forget()
        self.pulled.copy_(state["pulled"])
        self.seen.copy_(state["seen"])


@torch.no_grad()
def refine(scene: Splats, pull: Tensor, growth: Growth, limit: int) -> None:
    """Remove the faint, then halve `growth.percent` of the others, those of the highest `pull` (k,).

    The scene never has more than `limit` Gaussians.
    """
    gone = faint(scene.parameters["opacities"], growth.prune_opacity)
    pruned = densify.prune(scene.parameters, scene.optimizer, gone)
    chosen = strongest(pull[pruned.source], growth.percent, limit - scene.n + int(gone.sum()))
    halved = densify.halve(scene.parameters, scene.optimizer, chosen)
    scene.follow(Rows(pruned.source[halved.source], halved.fresh))


def faint(opacities: Tensor, threshold: float) -> Tensor:
    """Which opacities (k,), logits, are below the threshold; never all of them."""
    below = opacities.detach().sigmoid() < threshold
    if below.all():
        below[opacities.argmax()] = False
    return below


def strongest(pull: Tensor, percent: float, room: int) -> Tensor:
    """The `percent` of the rows with the highest pull (k,), at most `room`, none that nothing pulls at; (k,) bool."""
    count = max(min(round(len(pull) * percent / 100), room), 0)
    chosen = torch.zeros_like(pull, dtype=torch.bool)
    chosen[pull.argsort(descending=True, stable=True)[:count]] = True
    return chosen & (pull > 0)
