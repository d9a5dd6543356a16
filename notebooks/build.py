"""Make NN_name.ipynb out of NN_name.py: run it, keep pictures and text, throw away what lives only while it runs.

    python notebooks/build.py [02 03 ...]      # run and write these, or all
    python notebooks/build.py --text [03 ...]  # run nothing, take over new prose; fails if code has changed
    python notebooks/build.py --check          # run nothing; fail if a pair disagrees or an output is not fit to commit

Needs the extra [notebook]. Sizes are the full ones, whatever SPLATEDIT_QUICK says.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from PIL import Image

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
KEPT = ("image/png", "text/html", "text/latex", "text/markdown", "text/plain")
LIVE = re.compile(
    r"<\s*(?:script|iframe|object|embed)\b|\son\w+\s*=", re.IGNORECASE
)  # HTML that is more than tables and pictures
LOCAL = re.compile(
    r"(?<![\w.~-])/(?:home|root|work|tmp|usr|Users|opt|mnt)/|\b(?:localhost|127\.0\.0\.1):\d+| at 0x[0-9a-f]+"
)
WIDGET = "application/vnd.jupyter.widget-view+json"
LARGEST = 6_000_000  # bytes of all notebooks together
EXACT = 60_000  # bytes of a picture up to which it keeps all its colours


# --------------------------------------------------------------------------------------------------------------- making
def sources(numbers: list[str] | None = None) -> list[Path]:
    """The .py files whose names begin with one of `numbers`, or all; raises SystemExit for a number without a file."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py"))
    for number in numbers or []:
        if not any(path.name.startswith(number) for path in found):
            raise SystemExit(f"{number}: no such notebook; there are {', '.join(path.stem for path in found)}.")
    return [path for path in found if not numbers or path.name.startswith(tuple(numbers))]


def read(source: Path) -> Any:
    """The notebook that a .py file stands for, without outputs; its metadata and cell names are always the same."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index:02d}", nbformat.from_dict({})
    return notebook


def run(notebook: Any, seconds: int = 600) -> None:
    """Run every cell from top to bottom in a kernel of its own; raises SystemExit with the first error."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    )
    try:
        client.execute(env={**os.environ, "SPLATEDIT_QUICK": "", "OMP_WAIT_POLICY": "passive"})
    except CellExecutionError as error:
        raise SystemExit(str(error)) from None
    strip(notebook)


def reuse(notebook: Any, path: Path) -> None:
    """Give every code cell the outputs that it has in the .ipynb at `path`; raises SystemExit if code has changed."""
    old = nbformat.read(path, as_version=4)
    code, before = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (notebook, old))
    if [cell.source for cell in code] != [cell.source for cell in before]:
        raise SystemExit(f"{path.stem}: code has changed since it was run; build it without --text.")
    for cell, ran in zip(code, before, strict=True):
        cell.outputs, cell.execution_count = ran.outputs, ran.execution_count


def strip(notebook: Any) -> None:
    """Leave in each cell what looks the same everywhere: no live pages, no widgets, no progress bars, no warnings."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(stripped, cell.outputs) if output is not None]


def stripped(output: Any) -> Any | None:
    """One output with only the kinds in KEPT, or None if nothing of it is left."""
    if output.output_type == "error" or output.get("name") == "stdout":
        return output
    data = output.get("data", {})
    kept = {kind: data[kind] for kind in KEPT if kind in data}
    # Where a notebook is not trusted, Jupyter prefers HTML to the picture beside it, and then empties it.
    if "text/html" in kept and ("image/png" in kept or LIVE.search(kept["text/html"])):
        del kept["text/html"]
    # <IPython.core.display.HTML object> stands for what has just been thrown away; <Figure ...> says nothing either.
    if WIDGET in data or (kept.get("text/plain", "").startswith("<") and len(data) > 1):
        kept.pop("text/plain", None)
    if not kept:
        return None
    if "image/png" in kept:
        kept["image/png"] = base64.b64encode(smaller(base64.b64decode(kept["image/png"]))).decode()
    output.data, output.metadata = nbformat.from_dict(kept), nbformat.from_dict({})
    return output


def smaller(content: bytes) -> bytes:
    """A large PNG with the 256 colours that suit it best; a film, or what is small, as it is."""
    picture = Image.open(io.BytesIO(content))
    if len(content) <= EXACT or getattr(picture, "n_frames", 1) > 1:
        return content
    stream = io.BytesIO()
    picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3).save(stream, "PNG", optimize=True)
    return min(content, stream.getvalue(), key=len)


# ------------------------------------------------------------------------------------------------------------- checking
def problems(source: Path) -> Iterator[str]:
    """What is wrong with one pair, in words."""
    pair = source.with_suffix(".ipynb")
    if not pair.exists():
        yield "has not been run"
        return
    notebook = nbformat.read(pair, as_version=4)
    ours, theirs = ([(cell.cell_type, cell.source) for cell in book.cells] for book in (read(source), notebook))
    if ours != theirs:
        first = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        yield f"{source.name} and {pair.name} disagree from cell {first} on"
    if notebook.metadata != METADATA or any(cell.metadata for cell in notebook.cells):
        yield "has metadata beyond its kernel: run it by build.py, not by hand"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "was not run from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    if not any("image/png" in output.get("data", {}) for output in outputs):
        yield "shows no picture"
    for number, cell in enumerate(code, 1):
        yield from (f"cell [{number}]: {problem}" for output in cell.outputs for problem in unfit(output))


def unfit(output: Any) -> Iterator[str]:
    """Why an output may not be committed."""
    if output.output_type == "error":
        yield f"ended in {output.ename}: {output.evalue}"
    if output.output_type == "stream" and output.name != "stdout":
        yield f"wrote to {output.name}"
    data = output.get("data", {})
    for kind in data:
        if kind not in KEPT:
            yield f"holds {kind}"
    if LIVE.search(data.get("text/html", "")):
        yield "holds a live page"
    if "image/png" in data and not base64.b64decode(data["image/png"]).startswith(b"\x89PNG"):
        yield "its image/png is none"
    for text in (output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))):
        if found := LOCAL.search(text):
            around = text[max(found.start() - 20, 0) : found.end() + 20]
            yield f"says what holds on one machine only: {around!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="beginnings of names, such as 02; none is all")
    parser.add_argument("--text", action="store_true", help="run nothing, only the prose is new")
    parser.add_argument("--check", action="store_true", help="run nothing, only look")
    args = parser.parse_args()
    paths = sources(args.numbers)
    for path in paths if not args.check else []:
        start, notebook, pair = time.monotonic(), read(path), path.with_suffix(".ipynb")
        if args.text:
            reuse(notebook, pair)
        else:
            run(notebook)
        nbformat.write(notebook, pair)
        print(f"{path.stem}: {time.monotonic() - start:.0f} s, {pair.stat().st_size / 1e3:.0f} kB")
    bad = [f"{path.stem}: {problem}" for path in paths for problem in problems(path)]
    if (total := sum(path.stat().st_size for path in HERE.glob("*.ipynb"))) > LARGEST:
        bad.append(f"notebooks: {total / 1e6:.1f} MB, at most {LARGEST / 1e6:g}: smaller figures, fewer frames")
    print("\n".join(bad), file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
