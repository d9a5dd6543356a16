"""The decorator of all kernels: numba's cache on disk, made to notice every change, and a word while it compiles.

numba keeps machine code in __pycache__, or NUMBA_CACHE_DIR, or the user's cache folder, in files that are named after
the function and taken for fresh as long as the one file that holds the function stays the same. It misses a change in
a module from which the kernel gets its vectors, constants or helpers, and a package that was renamed, whose classes it
then cannot find. Here the name of a function ends in a digest of all this, and so do those of its files.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import event

PACKAGE = __name__.rpartition(".")[0]
PATIENCE = 1.0  # seconds of compiling after which the user is told

_IMPORT = re.compile(r"^\s*(?:from\s+(\S+)\s+)?import\s+(\([^)]*\)|.*)", re.M)
_caches: set[tuple[Path, str, str]] = set()  # folder, stem of the source file, digest: where machine code is kept


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with these options and a cache on disk that knows all that the function is compiled from.

    Where nothing can be written, each process compiles anew.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        source = Path(function.__code__.co_filename)
        mark = digest(source, function.__module__)
        function.__qualname__ += f"_{mark}"
        try:
            dispatcher = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba: "no locator available", no folder that can be written
            return numba.njit(**options)(function)
        _keep(Path(str(dispatcher.stats.cache_path)), source.stem, mark)
        return dispatcher

    _listen()
    return decorate


# ---------------------------------------------------------------- which files


@functools.cache
def digest(source: Path, module: str) -> str:
    """Twelve hexadecimal digits of a module's name, and the text of it and of all its neighbours that it imports."""
    total = hashlib.sha256(module.encode())
    for path in sorted(sources(source)):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def sources(source: Path) -> set[Path]:
    """The file, if it exists, and all in its folder that it imports, at any remove."""
    found: set[Path] = set()
    waiting = {source}
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        words = (w for line in _IMPORT.findall(path.read_text("utf-8")) for w in re.findall(r"\w+", " ".join(line)))
        waiting |= {path.with_name(f"{word}.py") for word in words}
    return found


def _keep(folder: Path, stem: str, mark: str) -> None:
    """Note where a module's machine code is, and remove, the first time, what other states of the module left there."""
    if (folder, stem, mark) in _caches:
        return
    _caches.add((folder, stem, mark))
    _remove(path for path in _files(folder, stem) if mark not in path.name)


def clear() -> None:
    """Remove the machine code of all kernels on disk; they are compiled again when next used in a new process."""
    for folder, stem, _ in list(_caches):
        _remove(_files(folder, stem))


def _files(folder: Path, stem: str) -> list[Path]:
    return [path for kind in ("nbi", "nbc") for path in folder.glob(f"{stem}.*.{kind}")]


def _remove(paths: Any) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError:  # another user's
            pass


# ---------------------------------------------------------------- a word while it compiles


class _Progress(event.Listener):
    """Says once, on stderr, that kernels are being compiled, if that takes longer than PATIENCE in all."""

    def __init__(self) -> None:
        self.depth, self.spent, self.began, self.said = 0, 0.0, 0.0, False
        self.timer = threading.Timer(PATIENCE, self.say)

    def on_start(self, event: Any) -> None:
        if not _is_ours(event):
            return
        self.depth += 1
        if self.depth == 1:
            self.began = time.monotonic()
            self.timer = threading.Timer(max(0.0, PATIENCE - self.spent), self.say)
            self.timer.daemon = True
            self.timer.start()

    def on_end(self, event: Any) -> None:
        if not _is_ours(event):
            return
        self.depth -= 1
        if self.depth == 0:
            self.timer.cancel()
            self.spent += time.monotonic() - self.began

    def say(self) -> None:
        if not self.said:
            self.said = True
            print("splatedit: compiling the CPU renderer, once (about 15 s)", file=sys.stderr, flush=True)


def _is_ours(event: Any) -> bool:
    return event.data["dispatcher"].py_func.__module__.startswith(PACKAGE)


@functools.cache
def _listen() -> None:
    event.register("numba:compile", _Progress())
