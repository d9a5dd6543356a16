"""What several panels ask: where files go that the viewer makes, and when there is something new to say."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splatedit.config import Config
from splatedit.folders import slug

if TYPE_CHECKING:
    from splatedit.jobs import Job
    from splatedit.viewer.app import App
    from splatedit.viewer.stage import Shown


def editing(app: App) -> bool:
    """Whether an edit is under way, be it held up."""
    return app.job is not None and not app.job.ended


def folder_of(shown: Shown, config: Config) -> Path:
    """Where what is made of the shown scene goes: into the folder of its run, else beside the folders of its runs."""
    if shown.path is not None and (shown.path.parent / "config.yaml").is_file():
        return shown.path.parent
    return Path(config.output_dir).expanduser() / slug(stem(shown))


def stem(shown: Shown) -> str:
    """The name of the shown scene without its ending; "scene" if it has none."""
    return (shown.path.stem if shown.path is not None else "").removesuffix(".compressed") or "scene"


def unused(path: Path) -> Path:
    """The path, numbered -2, -3 ... if something is there already."""
    names = itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists())


def whenever(app: App, key: Callable[[], Any], refresh: Callable[[Any], None], *, slow: bool = False) -> None:
    """Call `refresh(None)` in turn with the app's actions (slow: as of `App.act`) whenever `key()` has changed."""
    last, followed, call = [key()], [app.job], app.act(refresh, newest=True, slow=slow)

    def check(*_: Any) -> None:
        now = key()
        if now != last[0]:
            last[0] = now
            call(None)

    def listener(*_: Any) -> None:
        job: Job | None = app.job
        if job is not None and job is not followed[0]:
            followed[0] = job
            job.listen(check)
        check()

    app.stage.listeners.append(listener)
