"""What can be looked at: the splats before, after, both, and coloured by what was done to them."""

from __future__ import annotations

from collections.abc import Callable

from splatedit.gaussians import Gaussians
from splatedit.viewer.stage import Shown


def before(shown: Shown) -> Gaussians:
    """The source."""
    return shown.source


def after(shown: Shown) -> Gaussians:
    """The newest state."""
    return shown.current


# "split" is two pictures side by side, source on the left: only frames can show it, see frame_display.
LOOKS: dict[str, Callable[[Shown], Gaussians]] = {"after": after, "before": before, "split": after}
