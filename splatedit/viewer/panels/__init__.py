"""The tabs of the viewer: one module each, with one function that builds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from splatedit.viewer.panels import camera, compare, diagnose, edit, export, history, select

if TYPE_CHECKING:
    from splatedit.viewer.app import App

# Called inside the tab of this name, once for each viewer.
PANELS: dict[str, Callable[[App], None]] = {
    "Edit": edit.build,
    "Compare": compare.build,
    "Select": select.build,
    "Diagnose": diagnose.build,
    "Camera": camera.build,
    "History": history.build,
    "Export": export.build,
}
