"""The live viewer and the progress of an edit in a notebook cell; what is committed with the notebook is a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splatedit.gaussians import Gaussians
    from splatedit.jobs import Job
    from splatedit.viewer.app import App


def show_gaussians(gaussians: Gaussians, other: Gaussians | None = None, *, height: int = 480, **more: Any) -> App:
    """A picture, then the live viewer in the cell; other: what the splats became, for its Compare tab."""
    ...


def show_job(job: Job, *, height: int = 480, **more: Any) -> App:
    """A picture, renewed when the edit ends, then the live viewer of the edit in the cell."""
    ...


def progress(job: Job) -> Any:
    """A widget with the progress of an edit and buttons that hold, step and stop it."""
    ...
