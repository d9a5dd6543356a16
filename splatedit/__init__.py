"""Edit 3D Gaussian splats with text.

    import splatedit

    gaussians = splatedit.load("scenes/cat.ply")
    for step in splatedit.edit(gaussians, "a pig", source="a cat"):
        print(step.index, step.loss)
    splatedit.save(step.gaussians, "pig.ply")

Importing the package costs nothing: each name below fetches its module, and with it torch, when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splatedit.errors import InputError

if TYPE_CHECKING:
    from splatedit.cameras import Cameras, dome, orbit
    from splatedit.displays import animate, compare
    from splatedit.editing import edit
    from splatedit.files import load, save
    from splatedit.gaussians import Gaussians
    from splatedit.jobs import start
    from splatedit.viewer import view

__version__ = "0.1.0"
__all__ = [
    "Cameras",
    "Gaussians",
    "InputError",
    "__version__",
    "animate",
    "compare",
    "dome",
    "edit",
    "load",
    "orbit",
    "save",
    "start",
    "view",
]

# A public function must not share its name with a module: importing the module would replace the function.
_HOME = {
    "Cameras": "cameras",
    "Gaussians": "gaussians",
    "animate": "displays",
    "compare": "displays",
    "dome": "cameras",
    "edit": "editing",
    "load": "files",
    "orbit": "cameras",
    "save": "files",
    "start": "jobs",
    "view": "viewer",
}


def __getattr__(name: str) -> Any:
    if name in ("render", "stack"):  # modules of these names
        return import_module(f"splatedit.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'splatedit' has no attribute {name!r}")
    value = getattr(import_module(f"splatedit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "render", "stack"})
