"""JupyterLab on the notebooks: copied to where the user works, with a kernel and a proxy that fit."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from splatedit.errors import InputError
from splatedit.notebook import BASE_URL

PARTS = {
    "notebooks": (".ipynb", ".py", ".toml", ".md"),
    "scenes": (".ply", ".yaml", ".md"),
}  # endings of what is copied
NOT_FOR_USERS = ("build.py",)


def lab(folder: Path, words: Sequence[str], say: Callable[[str], None]) -> int:
    """Open JupyterLab on `folder`, with the notebooks and the scenes they read inside; returns its exit status.

    words: options of `jupyter lab`. Files that are there already are left as they are. Raises InputError without
    JupyterLab, or if `folder` cannot be written.
    """
    for module in ("jupyterlab", "ipykernel"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f'lab: {module} is not installed here; pip install "splatedit[notebook]"')
    for line in bring(bundled(), folder):
        say(line)
    for module, lack in (
        ("jupyter_server_proxy", "viewers are seen on this machine alone"),
        ("jupytext", "a notebook and the .py beside it are not kept alike"),
        ("ipywidgets", "edits have no buttons in their cells"),
    ):
        if importlib.util.find_spec(module) is None:
            say(f'{module} is not installed: {lack}; pip install "splatedit[notebook]"')
    with kernels() as data:
        return attended(command(folder, words), environment(os.environ, words, data))


def bundled() -> Path:
    """The folder that holds the bundled notebooks and scenes: the checkout, or where the package was installed to."""
    places = [Path(__file__).parent.parent, *(Path(p) / "share" / "splatedit" for p in installed())]
    for place in places:
        if any((place / "notebooks").glob("[0-9][0-9]_*.ipynb")) and (place / "scenes").is_dir():
            return place
    raise InputError(
        f"lab: the bundled notebooks are in none of {', '.join(map(str, places))}; install splatedit anew."
    )


def installed() -> list[str]:
    """Where pip puts the data of packages: beside this one by --target, for this environment, and for this user."""
    beside = str(Path(__file__).parent.parent)  # first: the environment may hold another version
    return [beside, sysconfig.get_path("data"), sysconfig.get_path("data", f"{os.name}_user")]


def bring(place: Path, folder: Path) -> Iterator[str]:
    """Copy what is not there yet; what was done, in lines. Raises InputError if that cannot be."""
    for part, endings in PARTS.items():
        source, target = place / part, folder / part
        if target.resolve() == source.resolve():
            continue
        names = [f.name for f in sorted(source.iterdir()) if f.suffix in endings and f.name not in NOT_FOR_USERS]
        missing = [name for name in names if not (target / name).exists()]
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name in missing:
                part_way = target / f".{name}.part"
                shutil.copyfile(source / name, part_way)
                part_way.replace(target / name)
        except OSError as error:
            raise InputError(f"lab: {target} cannot be written to ({error.strerror or error}); name another.") from None
        kept = [name for name in names if name not in missing and not same(source / name, target / name)]
        if missing:
            yield f"{target}: {len(missing)} files copied"
        if kept:
            yield f"{target}: yours, left as they are: {', '.join(kept)}"


def same(a: Path, b: Path) -> bool:
    """Whether two files hold the same bytes."""
    return b.is_file() and a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()


@contextmanager
def kernels() -> Iterator[Path]:
    """A folder of Jupyter's data in which the kernel "python3" is this Python, whatever the user has installed."""
    with tempfile.TemporaryDirectory(prefix="splatedit-lab-") as data:
        spec = Path(data) / "kernels" / "python3"
        spec.mkdir(parents=True)
        words = {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python 3 (splatedit)",
            "language": "python",
            "metadata": {"debugger": True},
        }
        (spec / "kernel.json").write_text(json.dumps(words))
        yield Path(data)


def command(folder: Path, words: Sequence[str]) -> list[str]:
    """The command line of JupyterLab; the user's words come last and so have the last say."""
    proxy = importlib.util.find_spec("jupyter_server_proxy") is not None
    return [
        *(sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder.resolve()}"),
        "--LabApp.default_url=/lab/tree/notebooks",
        *(["--ServerApp.jpserver_extensions=jupyter_server_proxy=True"] if proxy else []),
        *words,
    ]


def environment(given: dict[str, str] | os._Environ[str], words: Sequence[str], data: Path) -> dict[str, str]:
    """What JupyterLab and its kernels see: our kernel first, this package, and how a browser gets at viewers."""
    ours = str(Path(__file__).parent.parent)
    new = {**given, "JUPYTER_PATH": os.pathsep.join(filter(None, [str(data), given.get("JUPYTER_PATH")]))}
    if importlib.util.find_spec("jupyter_server_proxy") is not None and not given.get("JUPYTERHUB_SERVICE_PREFIX"):
        new.setdefault(BASE_URL, base_url(words))
    if (Path(ours) / "pyproject.toml").exists():  # a checkout, which need not be installed
        new["PYTHONPATH"] = os.pathsep.join(filter(None, [ours, given.get("PYTHONPATH")]))
    new.setdefault("OMP_WAIT_POLICY", "passive")
    return new


def base_url(words: Sequence[str]) -> str:
    """The base URL that options of `jupyter lab` ask for; "/" if none does."""
    for index, word in enumerate(words):
        name, mark, value = word.partition("=")
        if name in ("--ServerApp.base_url", "--base-url", "--LabApp.base_url"):
            value = value if mark else "".join(words[index + 1 : index + 2])
            return f"/{value.strip('/')}/" if value.strip("/") else "/"
    return "/"


def attended(words: Sequence[str], environment: dict[str, str]) -> int:
    """Run a program to its end: Ctrl-C is its own business, what ends us ends it."""
    child = subprocess.Popen(words, env=environment)
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.terminate()),
    }
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            child.terminate()
