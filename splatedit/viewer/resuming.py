"""Which run an edit can go on with, as `splatedit run --resume` does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from splatedit.config import Config, load_config
from splatedit.errors import InputError
from splatedit.folders import CHECKPOINT, finished, in_use, runs
from splatedit.jobs import Job


class Unfinished(NamedTuple):
    """A run that can go on, or why there is none."""

    words: str  # on the button
    folder: Path | None = None  # None: there is none
    config: Config | None = None  # what it goes on with

    @property
    def command(self) -> list[str]:
        """The words that do the same on the command line."""
        steps = [] if self.config is None else ["--steps", str(self.config.steps)]
        return ["splatedit", "run", "--resume", str(self.folder), *steps]


def unfinished(config: Config, job: Job | None, scene: Path | None) -> Unfinished:
    """What can be gone on with.

    The newest run of this viewer, up to as many steps as `config` asks for now; before there is one, the newest of
    this scene and prompt in the outputs that was cut off, with its own settings.
    """
    if job is not None and not job.ended:
        return Unfinished("Go on (an edit is under way)")
    if job is not None and job.folder is not None and (job.folder / "config.yaml").is_file():
        return at_folder(job.folder, config.steps)
    if scene is None or (job is not None and job.config is None):
        return Unfinished("Go on (no run was cut off)")
    found = [f for f in runs(replace(config, scene=str(scene))) if not finished(f) and not in_use(f)]
    return at_folder(found[-1]) if found else Unfinished("Go on (no run was cut off)")


def at_folder(folder: Path, steps: int | None = None) -> Unfinished:
    """The run in an outputs folder, up to so many steps, None: as many as it was begun with."""
    try:
        config = load_config(folder / "config.yaml")
    except InputError:
        return Unfinished("Go on (its config.yaml cannot be read)")
    config = replace(config, steps=steps or config.steps)
    done = steps_done(folder)
    if done is not None and not (folder / CHECKPOINT).exists():
        return Unfinished("Go on (its checkpoint is gone)")
    if done is not None and done >= config.steps:
        return Unfinished(f"Go on ({done} of {config.steps} steps are done)")
    where = "" if done is None else f" from step {done} of {config.steps}"
    return Unfinished(f"Go on{where}" if steps else f"Go on with {folder.name}{where}", folder, config)


def steps_done(folder: Path) -> int | None:
    """How many steps the run in this folder has taken, as far as it came to write that."""
    try:
        return int(json.loads((folder / "run.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
