"""The edit tab."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splatedit.viewer.app import App


def build(app: App) -> None:
    """Build the tab."""
