"""What can be tuned in each guidance, and what each needs of a prior. Importing this costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from splatedit.errors import InputError

if TYPE_CHECKING:
    import torch

    from splatedit.priors import Prior


class Tuning(NamedTuple):
    """Settings of single guidances; the defaults are those of the papers' code. All are keys of config.Config too."""

    weight: str | None = None  # w(t), a key of score.WEIGHTS; None: what the paper takes. Not of pds, dreamcatalyst
    identity_weight: float = 1.0  # pds, dreamcatalyst: factor on the term that holds the edit at the source
    pds_stride: int = 2  # see posterior.pds_weights
    fpr_t_range: tuple[float, float] = (0.0, 1.0)  # ids: fractions of the schedule at which noise is refined
    fpr_sphere: bool = False  # ids: the noise keeps the length it was drawn with
    fpr_keep_best: bool = False  # ids: an iteration that makes it worse is taken back
    fpr_stop: float = 0.0  # ids: share of |z_source| below which the residual is small enough
    cds_weight: float = 3.0  # of the contrastive loss
    sdi_steps: int = 10  # of an inversion through the whole schedule
    sdi_scale: float | None = None  # guidance scale of the inversion; None: minus that of the score
    sdi_eta: float = 0.3  # fresh noise in the inversion
    vsd_rank: int = 4  # of the LoRA
    vsd_rate: float = 1e-4  # its learning rate


RANGES: dict[str, tuple[float, float]] = {
    "identity_weight": (0.0, math.inf),
    "pds_stride": (1, 100),
    "fpr_stop": (0.0, math.inf),
    "cds_weight": (0.0, math.inf),
    "sdi_steps": (1, 1000),
    "sdi_eta": (0.0, math.inf),
    "vsd_rank": (1, 1024),
    "vsd_rate": (0.0, math.inf),
}


def bind(name: str, prior: Prior, generator: torch.Generator, tuning: Tuning = Tuning()) -> dict[str, Any]:  # noqa: B008
    """The keyword options with which a key of `guidance.GUIDANCE` is called for this prior.

    generator: of all randomness in a guidance. `vsd` gets a denoiser of its own, made by the call, under "particle".
    Raises InputError for a value out of range.
    """
    for key, (low, high) in RANGES.items():
        value = getattr(tuning, key)
        if not (low <= value <= high and math.isfinite(value)):
            raise InputError(
                f"{key}: found {value}, expected {low} or more{f', at most {high}' * math.isfinite(high)}."
            )
    if tuning.weight is not None and name in ("pds", "dreamcatalyst"):
        raise InputError(f"weight: found {tuning.weight!r}, but {name} has weights of its own; use identity_weight.")
    weight = {} if tuning.weight is None else {"weight": tuning.weight}
    return {**NEEDS[name](prior, generator, tuning), **weight}


def refined_steps(fractions: tuple[float, float], steps: int) -> tuple[int, int] | None:
    """The first and last step that lie in these fractions of a schedule, None for all; raises InputError."""
    low, high = fractions
    if not 0 <= low <= high <= 1:
        raise InputError(f"fpr_t_range: found {list(fractions)}, expected two numbers, 0 <= low <= high <= 1.")
    return None if (low, high) == (0, 1) else (math.ceil(low * steps), math.floor(high * steps))


Needs = Callable[["Prior", "torch.Generator", Tuning], dict[str, Any]]
NEEDS: dict[str, Needs] = {
    "sds": lambda prior, generator, tuning: {},
    "dds": lambda prior, generator, tuning: {},
    "ids": lambda prior, generator, tuning: {
        "t_range": refined_steps(tuning.fpr_t_range, len(prior.alphas_cumprod)),
        "sphere": tuning.fpr_sphere,
        "keep_best": tuning.fpr_keep_best,
        "stop": tuning.fpr_stop,
    },
    "cds": lambda prior, generator, tuning: {
        "record": prior.self_attention,
        "generator": generator,
        "contrast": tuning.cds_weight,
    },
    "pds": lambda prior, generator, tuning: {
        "alphas_cumprod": prior.alphas_cumprod,
        "stride": tuning.pds_stride,
        "identity": tuning.identity_weight,
    },
    "dreamcatalyst": lambda prior, generator, tuning: {
        "alphas_cumprod": prior.alphas_cumprod,
        "identity": tuning.identity_weight,
    },
    "vsd": lambda prior, generator, tuning: {
        "particle": prior.particle(generator, tuning.vsd_rank, tuning.vsd_rate),
        "generator": generator,
    },
    "sdi": lambda prior, generator, tuning: {
        "alphas_cumprod": prior.alphas_cumprod,
        "generator": generator,
        "steps": tuning.sdi_steps,
        "scale": tuning.sdi_scale,
        "eta": tuning.sdi_eta,
    },
}
