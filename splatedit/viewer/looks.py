"""What can be looked at: the splats before, after, both, and coloured by what was done to them.

A look is a pure function from what is shown to splats that any display can draw. A million splats take about 0.1 s of
processor time at most (`benchmarks/viewer.py looks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from splatedit.gaussians import SH_C0, Gaussians
from splatedit.metrics import CHANGED
from splatedit.viewer.stage import Shown

# sRGB at equal steps: magma without its ends, which would be lost on black and on white.
RAMP = (
    (0.32, 0.07, 0.49),
    (0.51, 0.14, 0.51),
    (0.70, 0.21, 0.48),
    (0.87, 0.29, 0.41),
    (0.97, 0.45, 0.36),
    (0.99, 0.64, 0.43),
    (1.00, 0.83, 0.58),
)
TINT, TINTED = (0.0, 0.85, 0.65), 0.6  # of what is selected: a colour that no heat has, and its share
DIM, DIMMED = (0.62, 0.62, 0.62), 0.35  # of the rest
PALE, WASHED, GHOST = (0.45, 0.65, 1.0), 0.75, 0.2  # the ghost's colour, its share, and the factor of opacity
FULL = 128.0  # just visible changes that are shown as the hottest: as from black to white
TOP = 0.99  # quantile of the pulls that is shown as the hottest
SAMPLE = 100_000  # splats that a quantile is taken of


class Scale(NamedTuple):
    """What the two ends of the heat say."""

    low: str
    high: str
    unit: str


def before(shown: Shown) -> Gaussians:
    """The source."""
    return highlight(shown.source, marks(shown, shown.source.n, None))


def after(shown: Shown) -> Gaussians:
    """The newest state."""
    return highlight(shown.current, marks(shown, shown.current.n, shown.rows))


def ghost(shown: Shown) -> Gaussians:
    """The newest state, and after its rows those of the source as a pale, transparent ghost."""
    now, then = flat(after(shown)), flat(before(shown))
    washed = torch.lerp(colors(then), then.sh0.new_tensor(PALE).expand(then.n, 3), WASHED)
    spirit = recoloured(then, washed)._replace(opacities=(then.opacities.sigmoid() * GHOST).logit(1e-6))
    both = {name: torch.cat([value, spirit.parameters[name]]) for name, value in now.parameters.items()}
    return now._replace(**both, extra={})


def difference(shown: Shown) -> Gaussians:
    """The newest state, coloured by `change`; grey where nothing visible changed. `after`, if `incomparable`."""
    if incomparable(shown):
        return after(shown)
    far = change(shown)
    share = torch.where(far > 1, (far / FULL).clamp(max=1).sqrt(), 0.0)  # roots, so that small changes are told apart
    return recoloured(shown.current, tinted(heat(shown.current, share), marks(shown, shown.current.n, shown.rows)))


def gradient(shown: Shown) -> Gaussians:
    """The newest state, coloured by how hard the newest step pulled; `after` while there is no step."""
    if unpulled(shown):
        return after(shown)
    assert shown.pull is not None
    share = (shown.pull / strongest(shown.pull)).nan_to_num(1.0).clamp(0, 1).sqrt()
    return recoloured(shown.current, tinted(heat(shown.current, share), marks(shown, shown.current.n, shown.rows)))


# "split" is two pictures side by side, source on the left: only frames can show it, see frame_display.
LOOKS: dict[str, Callable[[Shown], Gaussians]] = {
    "after": after,
    "before": before,
    "split": after,
    "ghost": ghost,
    "difference": difference,
    "gradient": gradient,
}


# ----------------------------------------------------------------------------------------------------------- in numbers
def incomparable(shown: Shown) -> str:
    """Why the states cannot be compared splat by splat, as a clause; empty if they can."""
    unknown = shown.source.n != shown.current.n if shown.rows is None else not bool((shown.rows >= 0).any())
    if unknown:
        return f"{shown.source.n:,} and {shown.current.n:,} splats, and nothing says which continues which"
    return ""


def unpulled(shown: Shown) -> str:
    """Why the pull of the newest step cannot be shown, as a clause; empty if it can."""
    if shown.pull is None or len(shown.pull) != shown.current.n:
        return "there is no gradient before an edit has taken a step"
    return ""


def change(shown: Shown) -> Tensor:
    """How far each current splat (m,) is from its source row: in changes that are just visible; infinite if added.

    The largest of what `metrics.CHANGED` lists (place, colour, opacity, log size), each over its threshold there, so
    above 1 is what `metrics.changed` calls changed. What is no number any more is infinitely far.
    """
    source, current, rows = shown.source, shown.current, shown.rows
    then = source.parameters
    if rows is not None:
        at = rows.clamp(min=0)
        then = {name: then[name].index_select(0, at) for name in ("means", "sh0", "opacities", "scales")}
    faded = (current.opacities.sigmoid() - then["opacities"].sigmoid()).abs_()
    parts = {
        "means": (current.means - then["means"]).square_().sum(1).sqrt() / shown.extent.radius,
        "color": (current.sh0 - then["sh0"]).abs_().flatten(1).amax(1) * SH_C0,
        "opacity": faded,
        "scale": (current.scales - then["scales"]).abs_().amax(1),
    }
    far = torch.stack([part / CHANGED[name] for name, part in parts.items()]).amax(0).nan_to_num(math.inf)
    return far if rows is None else far.masked_fill(rows < 0, math.inf)


def strongest(pull: Tensor) -> float:
    """The pull (m,) that is shown as the hottest, above 0: the quantile TOP of those that are not 0."""
    some = pull[:: max(1, len(pull) // SAMPLE)]
    some = some[(some > 0) & some.isfinite()].sort().values
    return float(some[int(TOP * (len(some) - 1))]) if len(some) else 1.0


def scale(shown: Shown) -> Scale | None:
    """What the heat of a look says; None if the look has none, or it cannot be shown."""
    if shown.look == "difference" and not incomparable(shown):
        return Scale("1", f"{FULL:g} and more, or added", "just visible changes of colour, place, size or opacity")
    if shown.look == "gradient" and not unpulled(shown):
        assert shown.pull is not None
        return Scale("0", f"{strongest(shown.pull):.2g} and more", "change of the model's score by a just visible one")
    return None


def selected(shown: Shown, n: int, rows: Tensor | None) -> Tensor | None:
    """Which of n splats are selected, (n,) bool; rows: the source rows they continue, see `Shown`; None: nothing is."""
    chosen = shown.selection
    if chosen is None or len(chosen) != shown.source.n:
        return None
    if rows is None:
        return chosen if n == len(chosen) else None
    return chosen[rows.clamp(min=0)] & (rows >= 0) if bool((rows >= 0).any()) else None


def marks(shown: Shown, n: int, rows: Tensor | None) -> Tensor | None:
    """Which of n splats are to be marked; None: there is nothing to mark, or it is not wanted."""
    return selected(shown, n, rows) if shown.marked else None


# ----------------------------------------------------------------------------------------------------------- in colours
def highlight(gaussians: Gaussians, chosen: Tensor | None) -> Gaussians:
    """The same with the chosen ones (n,) bool tinted and the others dimmed; then it looks the same from all sides."""
    return gaussians if chosen is None else recoloured(gaussians, tinted(colors(gaussians), chosen))


def tinted(rgb: Tensor, chosen: Tensor | None) -> Tensor:
    """Colours (n, 3) with those of the chosen ones (n,) bool tinted and the others dimmed; None: as they are."""
    if chosen is None:
        return rgb
    rest, most = rgb.lerp(rgb.new_tensor(DIM).expand_as(rgb), DIMMED), rgb.new_tensor(TINT).expand_as(rgb)
    return torch.where(chosen[:, None], rgb.lerp(most, TINTED), rest)


def heat(gaussians: Gaussians, share: Tensor) -> Tensor:
    """Colours (n, 3) by numbers (n,) in [0, 1]; where these are 0, a dim grey by how light the splat is."""
    light = 0.25 + 0.35 * (colors(gaussians) @ share.new_tensor([0.299, 0.587, 0.114]))
    table = ramp().to(share)
    hot = table.index_select(0, (share * (len(table) - 1)).round().long())
    return torch.where(share[:, None] > 0, hot, light[:, None])


def ramp(steps: int = 256) -> Tensor:
    """Colours (steps, 3) along RAMP."""
    place = torch.linspace(0, len(RAMP) - 1, steps)
    low = place.long().clamp(max=len(RAMP) - 2)
    anchors = torch.tensor(RAMP)
    return torch.lerp(anchors[low], anchors[low + 1], (place - low)[:, None])


def colors(gaussians: Gaussians) -> Tensor:
    """Colours (n, 3) in [0, 1] without what depends on the view; never NaN."""
    return (gaussians.sh0[:, 0] * SH_C0).add_(0.5).nan_to_num_(0.5).clamp_(0, 1)


def recoloured(gaussians: Gaussians, rgb: Tensor) -> Gaussians:
    """The same in colours (n, 3) that do not depend on the view."""
    return gaussians._replace(sh0=rgb.sub(0.5).div_(SH_C0)[:, None], shN=gaussians.shN[:, :0])


def flat(gaussians: Gaussians) -> Gaussians:
    """The same without what depends on the view."""
    return gaussians._replace(shN=gaussians.shN[:, :0])
