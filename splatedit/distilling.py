"""Prompts, noise levels, guidance and cache of the source bound together: what asks the prior, step after step."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from splatedit.diffusion import guided, repeat
from splatedit.errors import InputError
from splatedit.fpr import FPR, SOLVERS
from splatedit.guidance import BACKWARDS, GUIDANCE, Request
from splatedit.source_cache import SERVED, SourceCache, digest, fingerprint, source_side
from splatedit.timesteps import PUBLISHED, check_draws, edit_draw
from splatedit.tuning import Tuning, bind
from splatedit.variational import check_peft

if TYPE_CHECKING:
    from splatedit.priors import Prior

FPR_OPTIONS = ("iters", "lam", "solver", "t_range", "sphere", "keep_best", "stop")  # of ids that are of fpr.fpr


class Method(NamedTuple):
    """How an edit asks its prior: the arguments of `editing.edit` of the same names, explained there."""

    guidance: str = "ids"
    guidance_scale: float | None = None
    t_range: tuple[float, float] = (0.05, 0.95)
    timesteps: str | None = None
    anneal: float = 0.5
    tuning: Tuning = Tuning()
    solver: str = "grad"
    fpr_iters: int = 3
    fpr_lambda: float = 1.0
    source_cache: int = 0
    cache_refresh: int = 0
    cache_mb: float = 256.0
    cache_dir: str | None = None

    @property
    def way(self) -> str:
        """How noise levels are drawn, a key of `timesteps.TIMESTEPS`."""
        return self.timesteps or PUBLISHED.get(self.guidance, "uniform")

    def scale(self, prior: Prior) -> float:
        """The classifier-free guidance scale; raises InputError for one that the prior cannot be asked for."""
        scale = prior.default_scale(self.guidance) if self.guidance_scale is None else self.guidance_scale
        prior.check_scale(scale)
        return scale

    def check(self) -> None:
        """Raise InputError for what can be told to be wrong before any model is loaded."""
        if self.guidance not in GUIDANCE:
            raise InputError(f"guidance: {self.guidance!r} is not known; choose one of {', '.join(GUIDANCE)}.")
        if self.solver not in SOLVERS:
            raise InputError(f"solver: {self.solver!r} is not known; choose one of {', '.join(SOLVERS)}.")
        if self.source_cache and self.guidance not in SERVED:
            raise InputError(f"source_cache: {self.guidance} cannot use one; choose 0, or one of {', '.join(SERVED)}.")
        check_draws(self.way, self.t_range)
        if self.guidance == "vsd":
            check_peft()


class Pull(NamedTuple):
    """One answer of the prior."""

    gradient: Tensor  # like the latents
    fpr: FPR | None  # what fixed-point regularisation did; None but for ids


class Distiller:
    """Gradients on the latents of the views of one edit.

    latents: (n, c, h, w) of the unedited scene, one for each view. cameras: (n, 16), see `score.Request`. generator: of
    all randomness in an answer; seed: of the records of the cache. Raises InputError for a mistake in the method.
    """

    def __init__(
        self,
        prior: Prior,
        method: Method,
        prompt: str,
        source: str,
        latents: Tensor,
        generator: torch.Generator,
        seed: int = 0,
        cameras: Tensor | None = None,
    ):
        method.check()
        self.prior, self.method, self.latents, self.generator, self.cameras = prior, method, latents, generator, cameras
        self.alphas_cumprod = prior.alphas_cumprod
        self.denoise = guided(prior.denoise, prior.null(1), method.scale(prior))
        self.target, self.source = prior.text([prompt]), prior.text([source])
        self.options = bind(method.guidance, prior, generator, method.tuning)
        if method.guidance == "ids":
            self.options |= {"iters": method.fpr_iters, "lam": method.fpr_lambda, "solver": method.solver}
        self.cache = self.open_cache(prior, seed) if method.source_cache else None
        self.drawn = self.spent = 0

    def open_cache(self, prior: Prior, seed: int) -> SourceCache:
        """The records of the source, under a key of everything that they depend on."""
        method = self.method
        refining = {k: v for k, v in self.options.items() if method.guidance == "ids" and k in FPR_OPTIONS}
        key = digest(
            fingerprint(prior), self.source, self.denoise.null, self.denoise.scale, sorted(refining.items()), seed
        )
        return SourceCache(
            source_side(self.denoise, self.source, **refining),
            self.latents,
            self.alphas_cumprod,
            method.t_range,
            key,
            strata=method.source_cache,
            refresh=method.cache_refresh,
            megabytes=method.cache_mb,
            folder=method.cache_dir,
        )

    @torch.no_grad()
    def __call__(self, z: Tensor, views: list[int], done: float = 0.0) -> Pull:
        """Where the latents z (b, c, h, w) of these views are to go, when the edit is `done`, from 0 to 1."""
        method = self.method
        at = {"done": done, "drawn": self.drawn, "anneal": method.anneal}
        draw = edit_draw(method.way, self.alphas_cumprod, z, method.t_range, self.generator, **at)
        target, source = (repeat(text, len(z)) for text in (self.target, self.source))
        camera = None if self.cameras is None else self.cameras[views]
        request = Request(target, source, self.latents[views], camera=camera)
        if self.cache is not None:
            draw, score = self.cache(views, draw.t)
            request = request._replace(source_score=score)
        history: list[FPR] = []
        more = {"history": history} if method.guidance == "ids" else {}
        gradient = GUIDANCE[method.guidance](self.denoise, z.detach(), draw, request, **self.options, **more)
        self.drawn += len(z)
        self.spent += history[0].backwards if history else len(z) * BACKWARDS.get(method.guidance, 0)
        return Pull(gradient, history[0] if history else None)

    @property
    def backwards(self) -> int:
        """Network rows through which gradients were sent back so far, beside those of the pictures."""
        return self.spent + (self.cache.backwards if self.cache else 0)

    def state_dict(self) -> dict[str, Any]:
        """What an answer depends on beside the generator: draws made, what vsd has learnt, how often each record of the
        cache was used. The records are functions of their names and are made anew.
        """
        particle, cache = self.options.get("particle"), self.cache
        state: dict[str, Any] = {"drawn": self.drawn, "spent": self.spent}
        if particle is not None:
            state["particle"] = particle.state_dict()
        if cache is not None:
            state |= {"source_cache_visits": dict(cache.visits), "source_cache_counts": dict(cache.counts)}
            state["source_cache_rows"] = (cache.evaluations, cache.backwards)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises InputError if that was another guidance."""
        particle, cache = self.options.get("particle"), self.cache
        for name, part in (("particle", particle), ("source_cache_visits", cache)):
            if (name in state) != (part is not None):
                raise InputError("resume: the state is of another guidance or source_cache; give the same settings.")
        self.drawn, self.spent = state["drawn"], state["spent"]
        if particle is not None:
            particle.load_state_dict(state["particle"])
        if cache is not None:
            cache.visits = Counter(state["source_cache_visits"])
            cache.counts = Counter(state["source_cache_counts"])
            cache.evaluations, cache.backwards = state["source_cache_rows"]
