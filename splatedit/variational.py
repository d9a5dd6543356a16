"""Variational score distillation: a second denoiser that learns, while the edit runs, what its renders look like."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from splatedit.diffusion import SMALLEST, Denoise, Draw, Text, sample_draw
from splatedit.errors import InputError
from splatedit.score import Request, weighed

if TYPE_CHECKING:
    from splatedit.priors import Prior

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention: what the LoRA is added to
CAMERA = 16  # numbers that describe a view, see score.Request


class Particle(Protocol):
    """A denoiser of the renders, told the view, and trained on them one step at a time."""

    def __call__(self, x: Tensor, t: Tensor, text: Text, camera: Tensor | None) -> Tensor: ...

    def learn(self, z: Tensor, text: Text, camera: Tensor | None, generator: torch.Generator) -> float: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def vsd(
    denoise: Denoise,
    z: Tensor,
    draw: Draw,
    request: Request,
    *,
    particle: Particle,
    generator: torch.Generator,
    weight: str = "sigma2",
) -> Tensor:
    """Variational score distillation (ProlificDreamer, arXiv 2305.16213): w(t) (ehat - ehat of the renders).

    After the gradient, `particle` takes one step of its training on z, at a draw of its own from `generator`.
    """
    x = draw.noised(z)
    gap = denoise(x, draw.t, request.target) - particle(x, draw.t, request.target, request.camera)
    particle.learn(z.detach(), request.target, request.camera, generator)
    return weighed(gap, draw, weight)


class LoraDenoiser:
    """A prior's network with a LoRA (arXiv 2106.09685) and a camera of its own; the prior's weights are shared, frozen.

    At first it is the unguided prior, whatever the camera. Its own weights are float32 whatever the network's type.
    rate: of AdamW, as published, without warm-up. forget: share of training samples that are not told their camera.
    Raises InputError without peft (extra `vsd`), or if the network has class labels already.
    """

    def __init__(
        self, prior: Prior, generator: torch.Generator, rank: int = 4, rate: float = 1e-4, forget: float = 0.1
    ):
        self.prior, self.forget = prior, forget
        self.unet = adapted(prior.unet, rank, generator, prior.name)
        self.weights = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=rate)

    def __call__(self, x: Tensor, t: Tensor, text: Text, camera: Tensor | None) -> Tensor:
        camera = x.new_zeros(len(x), CAMERA) if camera is None else camera
        return self.prior.denoise(x, t, text, self.unet, camera.float())

    def learn(self, z: Tensor, text: Text, camera: Tensor | None, generator: torch.Generator) -> float:
        """One step of training to denoise z (b, c, h, w); the mean squared error of the network's output before it."""
        draw = sample_draw(self.prior.alphas_cumprod, z, (0.0, 1.0), generator)
        known = torch.rand(len(z), 1, generator=generator, device=generator.device).to(z.device) >= self.forget
        camera = None if camera is None else camera * known
        share = output_share(draw, self.prior.prediction_type)
        boost = 2.0 ** round(math.log2(z.numel()))  # undoes the mean, whose gradients half precision would lose
        with torch.enable_grad():
            error = (share * (self(draw.noised(z), draw.t, text, camera) - draw.noise)).square().mean()
            weights = list(self.weights.values())
            grads = torch.autograd.grad(boost * error, weights, allow_unused=True)
        if all(grad is None or bool(grad.isfinite().all()) for grad in grads):
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = None if grad is None else grad / boost
            self.optimizer.step()
        return float(error.detach())

    def state_dict(self) -> dict[str, Any]:
        """Its own weights and its optimiser; not those of the prior."""
        return {"weights": {k: p.detach() for k, p in self.weights.items()}, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        assert state["weights"].keys() == self.weights.keys(), "the state of another network or rank"
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def output_share(draw: Draw, prediction_type: str) -> Tensor | float:
    """How far a network's output is off for each unit by which its ehat is off, at one x_t; see `to_eps_x0`."""
    if prediction_type == "epsilon":
        return 1.0
    return (draw.s if prediction_type == "sample" else 1.0) / draw.a.clamp_min(SMALLEST)


def adapted(unet: Any, rank: int, generator: torch.Generator, name: str = "unet") -> Any:
    """A second network on the parameters of `unet`, with a LoRA on every attention and an embedding of the camera.

    Only what was added takes gradients. It starts from `generator`, in a state that changes nothing; `unet` and torch's
    own generators are left as they are.
    """
    check_peft()
    from diffusers.models.embeddings import TimestepEmbedding
    from peft import LoraConfig, inject_adapter_in_model

    if getattr(unet, "class_embedding", None) is not None:
        raise InputError(f"guidance vsd: {name} has class labels where the camera would go; use ids, dds or sds.")
    same = {id(part): part for part in (*unet.parameters(), *unet.buffers())}
    twin = copy.deepcopy(unet, same)
    with torch.random.fork_rng(devices=[]):  # both draw starting values, which are drawn again below
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), twin)
        twin.class_embedding = TimestepEmbedding(CAMERA, unet.time_embedding.linear_2.out_features)
    twin.class_embedding.to(next(unet.parameters()).device)
    for key, weight in twin.named_parameters():
        added = "lora_" in key or key.startswith("class_embedding.")
        weight.requires_grad_(added)
        if added:
            weight.data = weight.data.float()
            start(key, weight, generator)
    return twin


def check_peft() -> None:
    """Raise InputError if the optional package that makes the LoRA is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise InputError('guidance vsd: the package peft is missing; pip install "splatedit[vsd]".')


@torch.no_grad()
def start(key: str, weight: Tensor, generator: torch.Generator) -> None:
    """Starting values of one added weight: zeros where its layer ends, torch's own law for linear layers elsewhere."""
    if "lora_B" in key or "linear_2" in key or weight.ndim == 1:
        weight.zero_()
    else:
        drawn = torch.empty(weight.shape, device=generator.device)
        weight.copy_(torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
