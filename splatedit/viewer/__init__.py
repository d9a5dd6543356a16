"""The live viewer, by viser: `splatedit view`, `splatedit run --viewer`, `gaussians.show()`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splatedit.config import Config
    from splatedit.gaussians import Gaussians
    from splatedit.jobs import Job
    from splatedit.viewer.app import App
    from splatedit.viewer.server import Served


def view(
    scene: str | Path | Gaussians | Job,
    other: str | Path | Gaussians | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    up: str | None = None,
    origins: Sequence[str] = (),
    config: Config | None = None,
    served: Served | None = None,
) -> App:
    """Open a viewer of a scene, of two to compare, or of an edit that is under way; `App.url` is its address.

    scene: a splat file, Gaussians, or what `splatedit.start` gave; other: the one it is compared with, shown first; an
    edit is compared with its own source. host, port, origins: as of `server.serve`. up: one of cameras.UPS, None to
    take the sidecar's or guess. config: what the Edit panel begins with, if no edit says it; served: a server that runs
    already. Raises InputError.
    """
    from splatedit.config import Config
    from splatedit.gaussians import Gaussians
    from splatedit.viewer.app import App, read

    if isinstance(scene, (str, Path, Gaussians)):
        shown = read(scene, other, up=up)
        config = config or Config(scene=str(shown.path or ""), up=up)
        app = App(shown, config, host=host, port=port, origins=origins, served=served)
    else:
        config = config or scene.config
        up = up or (config.up if config is not None else None)
        shown = read(scene.config.scene if scene.config is not None else scene.snapshot(), up=up)
        app = App(shown, config, host=host, port=port, origins=origins, served=served)
        app.follow(scene)
    return app
