"""How far an edit went, and whether it went where it was asked to go."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from splatedit.cameras import Cameras
from splatedit.diffusion import denoising_errors
from splatedit.gaussians import SH_C0, Gaussians
from splatedit.render import WHITE, render

# A Gaussian counts as changed beyond: a share of the scene radius, a colour step, an opacity step, a log-scale step.
CHANGED = {"means": 0.002, "color": 2 / 255, "opacity": 0.01, "scale": 0.02}
ROUGH = 0.08  # white noise has about 0.6, renders of splats 0.01 to 0.05


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two pictures in [0, 1]; `mask` (broadcastable, in [0, 1]) weighs pixels.

    Equal pictures give infinity; an empty mask gives nan.
    """
    error = (a.clamp(0, 1) - b.clamp(0, 1)).square()
    if mask is not None:
        weight = mask.expand_as(error)
        if float(weight.sum()) == 0:
            return math.nan
        mse = float((error * weight).sum() / weight.sum())
    else:
        mse = float(error.mean())
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity per pixel of pictures (b, c, h, w) in [0, 1]; 11-tap Gaussian window of sigma 1.5."""
    taps = torch.exp(-(torch.arange(11, dtype=a.dtype, device=a.device) - 5).square() / (2 * 1.5**2))
    taps = taps / taps.sum()
    channels = a.shape[1]

    def blur(x: Tensor) -> Tensor:
        x = F.pad(x, (5, 5, 5, 5), mode="reflect")
        x = F.conv2d(x, taps.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)
        return F.conv2d(x, taps.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Mean structural similarity (Wang et al. 2004), optionally weighed by `mask`; 1 for equal pictures."""
    values = ssim_map(a.clamp(0, 1), b.clamp(0, 1))
    if mask is None:
        return float(values.mean())
    weight = mask.expand_as(values)
    return float((values * weight).sum() / weight.sum()) if float(weight.sum()) else math.nan


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two coverage masks, cut at one half; nan if both are empty."""
    a, b = a > 0.5, b > 0.5
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else math.nan


def roughness(images: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels: what confetti raises and a clean edit does not."""
    return float(images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean())


def changed(source: Gaussians, edited: Gaussians, radius: float) -> Tensor:
    """Which Gaussians, (n,) bool, moved, turned another colour, faded or grew by a visible amount; row by row."""
    moved = (edited.means - source.means).norm(dim=1) > CHANGED["means"] * radius
    color = ((edited.sh0 - source.sh0) * SH_C0).flatten(1).abs().amax(1) > CHANGED["color"]
    faded = (edited.opacities.sigmoid() - source.opacities.sigmoid()).abs() > CHANGED["opacity"]
    grown = (edited.scales - source.scales).abs().amax(1) > CHANGED["scale"]
    return moved | color | faded | grown


def changed_share(source: Gaussians, edited: Gaussians, radius: float, rows: Tensor | None = None) -> float:
    """Share of all Gaussians there were or are, in [0, 1], that changed visibly, were added or were removed.

    rows: (m,) int64 source row that each edited one continues, -1 if it was added; None: edited has the source's rows.
    """
    if rows is None:
        return float(changed(source, edited, radius).float().mean())
    stayed = rows >= 0
    different = changed(source.select(rows[stayed]), edited.select(stayed), radius)
    added, removed = count_rows(rows, source.n)
    return (int(different.sum()) + added + removed) / (source.n + added)


def count_rows(rows: Tensor | None, n: int) -> tuple[int, int]:
    """How many rows were added to the n of the source, and how many removed; rows as in `changed_share`."""
    if rows is None:
        return 0, 0
    added = int((rows < 0).sum())
    return added, n - (len(rows) - added)


class ViewChange(NamedTuple):
    """What the change report saw in one view."""

    psnr: float  # dB to the source; inf if they are equal
    ssim: float
    margin_before: float  # error(source prompt) - error(target prompt), relative to the error, of the source splat
    margin: float  # of the edited one; positive: the prior prefers the target


@dataclass
class Report:
    """Did it change? The answer in one word, the numbers behind it, and what to try when the word is not 'changed'."""

    verdict: str  # "changed", "unchanged" or "noise"
    changed_share: float  # of the Gaussians there were or are
    psnr_to_source: float  # dB over the report's views; inf if nothing changed
    roughness: float  # of the edited renders
    roughness_ratio: float  # of the edited renders to the source's
    coverage_ratio: float  # of the edited alpha to the source's
    prefers_target: float  # share of views in which the prior's error is lower for the target prompt, edited splat
    preferred_target_before: float  # the same for the source splat
    margin: float  # mean error(source prompt) - error(target prompt) on the edited splat, relative to the error
    margin_before: float
    advice: list[str] = field(default_factory=list)
    views: list[ViewChange] = field(default_factory=list)  # the same of each single view

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        from splatedit.displays import report_bundle

        return report_bundle(self)

    def as_dict(self) -> dict:
        """All but the views as plain values for JSON; infinities become None."""
        return {k: plain(v) for k, v in asdict(self).items() if k != "views"}

    def view_dicts(self) -> list[dict]:
        """The views as plain values for JSON; infinities become None."""
        return [{k: plain(v) for k, v in view._asdict().items()} for view in self.views]


def plain(value: Any) -> Any:
    """The value, or None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def margins(prior, images: Tensor, prompt: str, source_prompt: str, seed: int = 0) -> Tensor:
    """How much better `prompt` explains each of the images (b, 3, h, w) than `source_prompt` does, (b,).

    The difference of the prior's denoising errors over their mean, positive where it prefers `prompt`: a diffusion
    classifier (arXiv 2303.16203). The same seed gives the same noise, so that two sets of images can be compared.
    """
    images = images.clamp(0, 1).nan_to_num()
    generator = torch.Generator(images.device).manual_seed(seed)
    texts = [prior.text([source_prompt]), prior.text([prompt])]
    errors = denoising_errors(prior.denoise, prior.encode(images), texts, prior.alphas_cumprod, generator)
    return (errors[:, 0] - errors[:, 1]) / errors.mean(1)


@torch.no_grad()
def change_report(
    source: Gaussians,
    edited: Gaussians,
    prior,
    cameras: Cameras,
    prompt: str,
    source_prompt: str,
    radius: float,
    *,
    seed: int = 0,
    background: tuple[float, float, float] = WHITE,
    rows: Tensor | None = None,
    inside: float = 1.0,
) -> Report:
    """Compare an edited splat with its source over `cameras` (at the prior's picture size).

    rows: see `changed_share`. inside: share of the Gaussians that were free to change. The prior is asked as a
    diffusion classifier (arXiv 2303.16203) which of the two prompts explains each view better.
    """
    drawable = edited.drawable()
    finite = bool(drawable.all())
    before, after = (render(g, cameras, background) for g in (source, edited if finite else edited.select(drawable)))
    rough_before, rough_after = roughness(before.rgb), roughness(after.rgb)
    gaps = [margins(prior, drawn.rgb, prompt, source_prompt, seed) for drawn in (before, after)]
    columns = [*zip(before.rgb[:, None], after.rgb[:, None], *(gap.tolist() for gap in gaps), strict=True)]
    report = Report(
        verdict="changed",
        changed_share=changed_share(source, edited, radius, rows),
        psnr_to_source=psnr(before.rgb, after.rgb),
        roughness=rough_after,
        roughness_ratio=rough_after / max(rough_before, 1e-6),
        coverage_ratio=float(after.alpha.mean() / before.alpha.mean().clamp_min(1e-6)),
        prefers_target=float((gaps[1] > 0).float().mean()),
        preferred_target_before=float((gaps[0] > 0).float().mean()),
        margin=float(gaps[1].mean()),
        margin_before=float(gaps[0].mean()),
        views=[ViewChange(psnr(a, b), ssim(a, b), *pulls) for a, b, *pulls in columns],
    )
    return judge(report, finite, same_prompt=prompt.strip() == source_prompt.strip(), inside=inside)


def still(psnr_to_source: float, inside: float = 1.0) -> bool:
    """Whether pictures equal those of the source; a small part that may change, a share `inside`, changes them less."""
    return psnr_to_source > 45 - 10 * math.log10(inside)


def judge(report: Report, finite: bool = True, same_prompt: bool = False, inside: float = 1.0) -> Report:
    """Fill in verdict and advice from the numbers; inside: share of the Gaussians that were free to change."""
    # A flat source gets rough by any edit, so the ratio alone is no proof.
    rough = report.roughness_ratio > 2.5 and report.roughness > ROUGH
    if not finite or rough or not 0.25 < report.coverage_ratio < 4:
        report.verdict = "noise"
        report.advice = [
            "lower the guidance scale (--guidance-scale)",
            "lower the learning rates (lr_sh0=0.01 lr_means=0.0005)",
            "raise the smoothing (neighbours=32)",
        ]
    elif report.changed_share < 0.01 * inside or still(report.psnr_to_source, inside):
        report.verdict = "unchanged"
        report.advice = ["more steps (--steps)", "a higher guidance scale (--guidance-scale)", "--guidance dds"]
        if same_prompt:
            report.advice.insert(0, "another target: it equals the source prompt")
    elif report.prefers_target < 0.5:
        report.advice = [
            "the splat changed, but the prior does not see the target in most views: more steps, or a higher scale"
        ]
    return report
