"""`edit(gaussians, prompt)`: the optimisation loop, as a generator of Steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from splatedit.cameras import RIGS, Bounds, Cameras, bounds
from splatedit.captures import load_capture
from splatedit.distilling import Distiller, Method
from splatedit.errors import InputError, Lost
from splatedit.formats.checks import check_read
from splatedit.fpr import FPR
from splatedit.gaussians import Gaussians
from splatedit.growth import Grower, Growth
from splatedit.metrics import CHANGED, psnr
from splatedit.render import Rendering
from splatedit.scenes import Hold, Rates, Splats
from splatedit.tuning import Tuning

if TYPE_CHECKING:
    from splatedit.priors import Prior


class Step(NamedTuple):
    """What one step of an edit leaves behind."""

    index: int  # from 0
    steps: int  # how many there will be
    loss: float  # rms of the guidance gradient: how hard the prior still pulls
    image: Tensor  # (b, 3, h, w) this step's renders, detached
    gaussians: Gaussians  # the splats after this step (averaged at the end), detached
    seconds: dict[str, float]  # of this step: render, encode, prior, optimise
    evaluations: int  # network rows evaluated so far
    residuals: list[float]  # posterior-mean drift |z_src - z_0| / |z_src| after each FPR iteration; empty but for ids
    psnr_to_source: float  # dB, of this step's renders
    state: Callable[[], dict[str, Any]]  # everything that decides the next step; call it before taking that step
    fpr: FPR | None = None  # what fixed-point regularisation did in this step; None but for ids
    backwards: int = 0  # network rows through which gradients were sent back so far
    rows: Tensor | None = None  # (m,) source row that each one continues, -1 if it was added; None: all as they were
    cache: Mapping[str, int] = {}  # of the source cache so far: hits, filled, read, dropped; empty if it is off
    pull: Tensor | None = None  # (m,) how hard this step pulled at each splat, at least 0; see `Splats.feel`

    def __repr__(self) -> str:
        far = f", drift {self.residuals[-1]:.3g}" if self.residuals else ""
        return (
            f"Step({self.index + 1} of {self.steps}, loss {self.loss:.4g}, {self.psnr_to_source:.1f} dB to the "
            f"source{far})"
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        from splatedit.displays import step_bundle

        return step_bundle(self)


class Stopwatch:
    """Seconds by name."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {"render": 0.0, "encode": 0.0, "prior": 0.0, "optimise": 0.0}
        self.cuda = device.type == "cuda"

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start


def edit(
    gaussians: Gaussians,
    prompt: str,
    source: str | None = None,
    *,
    model: str | Prior = "pocket",
    guidance: str = "ids",
    guidance_scale: float | None = None,
    steps: int = 300,
    seed: int = 0,
    cameras: Cameras | str = "dome",
    views: int = 48,
    up: str | None = None,
    views_per_step: int = 2,
    t_range: tuple[float, float] = (0.05, 0.95),
    timesteps: str | None = None,
    anneal: float = 0.5,
    tuning: Tuning = Tuning(),  # noqa: B008  (an immutable named tuple)
    solver: str = "grad",
    fpr_iters: int = 3,
    fpr_lambda: float = 1.0,
    source_cache: int = 0,
    cache_refresh: int = 0,
    cache_mb: float = 256.0,
    cache_dir: str | None = None,
    rates: Rates = Rates(),  # noqa: B008  (an immutable named tuple)
    final_rate: float = 0.1,
    average_last: float = 0.25,
    supersample: int = 2,
    neighbours: int = 16,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: str = "auto",
    offline: bool = False,
    mask: Tensor | None = None,
    hold: Hold = Hold(),  # noqa: B008
    growth: Growth = Growth(),  # noqa: B008
    resume: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """Edit splats by score distillation; iterate to make it happen, keep the last Step's `gaussians`.

    prompt, source: what the scene shall show and what it shows now; without `source` the prior looks for it (see
    `priors.find_prompt`). model: "pocket", a hub id, a folder, or a Prior. guidance: a key of `guidance.GUIDANCE`;
    guidance_scale: classifier-free guidance, 1 is off, None the prior's default. cameras: a rig by name with `views`
    cameras, a file or folder of cameras (at most `views` of them, see `captures`), or Cameras of the prior's picture
    size. t_range: fractions of the noise schedule; timesteps: how they are drawn, a key of `timesteps.TIMESTEPS`, None
    what the guidance's paper does; anneal: how far the upper end falls by the last step (0 keeps it, 1 brings it down
    to the lower end). tuning: of single guidances. solver, a key of `fpr.SOLVERS`, and fpr_*: of ids, see `fpr.fpr`.
    source_cache: records of the source kept for each camera, one for each of as many equal parts of t_range, so that a
    step evaluates the edit alone; 0 is off.
    cache_*: see `source_cache.SourceCache`. rates fall to `final_rate` of themselves; the last `average_last` of the
    steps are averaged into the result. mask: (n,) bool, which Gaussians may change; the others come back bit for bit.
    hold: what keeps these near the source as well; growth: whether Gaussians are added and removed (`Step.rows` then
    says which). resume: what `Step.state` of the same edit gave; the edit goes on after that step. More `steps` than it
    had then are allowed, and rates and averaging are then those of the longer edit from there on. The same arguments
    give the same splats bit for bit on a CPU, resumed or not.
    Raises InputError for a mistake in an argument.
    """
    from splatedit.priors import Prior, find_prompt, load_prior

    refining, caching = (solver, fpr_iters, fpr_lambda), (source_cache, cache_refresh, cache_mb, cache_dir)
    method = Method(guidance, guidance_scale, t_range, timesteps, anneal, tuning, *refining, *caching)
    method.check()
    check_read(gaussians, "scene")
    prior = model if isinstance(model, Prior) else load_prior(model, resolve_device(device), offline=offline)
    method.scale(prior)
    place, gaussians = prior.device, gaussians.to(prior.device)
    extent = bounds(gaussians)
    rig = rig_for(gaussians, cameras, views, prior.image_size, up)
    drawing = {"background": background, "supersample": supersample}
    scene = Splats(gaussians, rig, extent.radius, rates, mask=mask, hold=hold, neighbours=neighbours, **drawing)
    generator = torch.Generator(place).manual_seed(seed)
    grower = Grower(growth, scene, steps)
    images, latents = source_views(scene, prior)
    if source is None:
        source, _ = find_prompt(prior, latents, generator)
    poses = camera_numbers(rig, extent).to(place)
    distiller = Distiller(prior, method, prompt, source, latents, generator, seed, poses)
    order = view_order(rig.n, steps * views_per_step, generator).view(steps, views_per_step)
    elsewhere = 1 - torch.cat([scene.coverage([view]).cpu() for view in range(rig.n)]) if hold.outside else None
    parts = Parts(scene, grower, distiller, generator)
    first = 0 if resume is None else restore(resume, parts, steps)
    if first < steps * (1 - average_last):
        scene.forget_average()  # of a shorter edit

    for index in range(first, steps):
        watch = Stopwatch(place)
        chosen = order[index].tolist()
        with watch("render"):
            drawn = look(scene, chosen, index)
            grower.watch(index, drawn)
        image = drawn.rgb
        pixels = image.detach().requires_grad_()
        with watch("encode"):
            z = prior.encode(pixels)
        with watch("prior"):
            pull = distiller(z.detach(), chosen, index / max(steps - 1, 1))
        # One backward, in two halves so that each is billed to its own account.
        with watch("encode"):
            (upstream,) = torch.autograd.grad(z, pixels, pull.gradient)
        if elsewhere is not None:
            seen, weight = (part[chosen].to(place) for part in (images, elsewhere))
            upstream += outside_pull(pixels, seen, weight, hold.outside * rms(upstream))
        with watch("render"):
            image.backward(upstream)
        with watch("optimise"):
            scene.feel(CHANGED["means"], CHANGED["color"])  # so the unit is a change that is just visible
            scene.step(index / steps, final_rate)
            if index >= steps * (1 - average_last):
                scene.average()
            grower.step(index, drawn)
        yield Step(
            index=index,
            steps=steps,
            loss=float(rms(pull.gradient)),
            image=image.detach(),
            gaussians=scene.result(),
            rows=scene.rows,
            pull=scene.pull,
            seconds=watch.seconds,
            evaluations=prior.evaluations,
            backwards=distiller.backwards,
            cache=dict(distiller.cache.counts) if distiller.cache else {},
            residuals=drift(pull.fpr.residuals, latents[chosen]) if pull.fpr else [],
            fpr=pull.fpr,
            psnr_to_source=psnr(image.detach(), images[chosen].to(place)),
            state=partial(state, parts, index + 1),
        )


def look(scene: Splats, views: list[int], done: int) -> Rendering:
    """What is seen of the current splats; raises Lost if some of these cannot be drawn any more after `done` steps."""
    try:
        return scene(views)
    except InputError as error:
        drawable = scene.gaussians.drawable()
        if drawable.all():
            raise
        raise Lost(
            f"edit: after {done} steps {int((~drawable).sum())} of {len(drawable)} splats are no longer finite; "
            "lower the rates (lr_*) or the guidance scale."
        ) from error


def rms(x: Tensor) -> Tensor:
    """Root of the mean square."""
    return x.square().mean().sqrt()


@torch.no_grad()
def outside_pull(images: Tensor, source: Tensor, elsewhere: Tensor, weight: Tensor | float) -> Tensor:
    """The gradient of weight * sum elsewhere |images - source|: pixels outside the mask go back to the source's.

    images, source: (b, 3, h, w). elsewhere: (b, 1, h, w) in [0, 1], how much of a pixel is outside.
    """
    return weight * elsewhere * (images - source).sign()


class Parts(NamedTuple):
    """What an edit is made of, as far as it changes from step to step."""

    scene: Splats
    grower: Grower
    distiller: Distiller
    generator: torch.Generator


def state(parts: Parts, done: int) -> dict[str, Any]:
    """What a checkpoint holds: steps done, the state of all parts, rows evaluated."""
    return {
        **parts.distiller.state_dict(),
        **parts.scene.state_dict(),
        **parts.grower.state_dict(),
        "step": done,
        "generator": parts.generator.get_state(),
        "evaluations": parts.distiller.prior.evaluations,
    }


def restore(state: dict[str, Any], parts: Parts, steps: int) -> int:
    """Put back what `state` gave and return the index of the next step; raises InputError if it is of another edit."""
    if state["step"] > steps:
        raise InputError(f"resume: the state is of {state['step']} steps, but steps is {steps}; give as many or more.")
    if state["generator"].shape != parts.generator.get_state().shape:
        raise InputError("resume: the state was made on another kind of device (CPU or CUDA); go on there, see device.")
    parts.scene.load_state_dict(state)
    parts.grower.load_state_dict(state)
    parts.distiller.load_state_dict(state)
    parts.generator.set_state(state["generator"])
    parts.distiller.prior.evaluations = state["evaluations"]
    return state["step"]


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device: {device!r} was asked for, but this torch sees no CUDA GPU; use cpu or auto.")
    return device


def camera_numbers(cameras: Cameras, extent: Bounds) -> Tensor:
    """Camera-to-world matrices as rows (n, 16), in the scene's own measure: its centre is 0, its radius 1."""
    c2w = torch.linalg.inv(cameras.w2c.cpu().double())
    c2w[:, :3, 3] = (c2w[:, :3, 3] - extent.centre.to(c2w)) / extent.radius
    return c2w.flatten(1).float()


def rig_for(gaussians: Gaussians, cameras: Cameras | str, views: int, size: int, up: str | None) -> Cameras:
    """The cameras of an edit: a rig by name, those of a file, or the given ones, of the prior's picture size."""
    if isinstance(cameras, str):
        if cameras in RIGS:
            return RIGS[cameras](gaussians, views, size=size, up=up)
        capture = load_capture(cameras, gaussians, most=views)
        return capture.square(capture.edit, size)
    if (cameras.width, cameras.height) != (size, size):
        found = f"{cameras.width}x{cameras.height}"
        raise InputError(f"cameras: pictures of {found}, but the prior wants {size}x{size}; use cameras.resized.")
    return cameras


@torch.no_grad()
def source_views(scene: Splats, prior: Prior, chunk: int = 8) -> tuple[Tensor, Tensor]:
    """Renders and latents of the frozen source, once per camera; raises InputError if no camera sees anything.

    The renders are in main memory, wherever the edit is: of each step only a few are looked at.
    """
    images, latents, seen = [], [], 0.0
    for start in range(0, scene.cameras.n, chunk):
        drawn = scene(list(range(start, min(start + chunk, scene.cameras.n))), scene.source)
        images.append(drawn.rgb.cpu())
        latents.append(prior.encode(drawn.rgb))
        seen = max(seen, float(drawn.alpha.max()))
    if seen < 0.05:
        raise InputError("cameras: none of them sees any Gaussian of the scene; check --up and the cameras.")
    return torch.cat(images), torch.cat(latents)


def view_order(count: int, draws: int, generator: torch.Generator) -> Tensor:
    """Every camera once, in random order, then again: no view waits long for its turn."""
    rounds = -(-draws // count)
    orders = [torch.randperm(count, generator=generator, device=generator.device) for _ in range(rounds)]
    return torch.cat(orders)[:draws]


def drift(residuals: Tensor, z_source: Tensor) -> list[float]:
    """Posterior-mean drift |z_src - z_0| / |z_src| from residuals (k, b), mean over the views for which it is known."""
    return (residuals / z_source.flatten(1).norm(dim=1)).nanmean(1).tolist()
