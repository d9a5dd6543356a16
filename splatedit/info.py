"""What `splatedit info FILE` says about a splat file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

PERCENTILES = (1, 25, 50, 75, 99)


def describe(path: str | Path) -> dict[str, Any]:
    """Facts about a splat file as plain numbers, strings, lists and dicts, fit for JSON.

    Opacities are in [0, 1], scales are standard deviations in world units (of the longest axis), percentiles are keyed
    by PERCENTILES as text. `up` is the sidecar's if it names one; `cameras` says which file beside the scene an edit
    would look from, or why it would not. Raises InputError as `files.load` and `sidecar` do.
    """
    from splatedit.cameras import bounds, explain_up
    from splatedit.captures import find_capture
    from splatedit.files import load, sidecar

    gaussians, beside = load(path), sidecar(path)
    size = Path(path).expanduser().stat().st_size
    centre, radius = bounds(gaussians)
    up, why = (beside.up, "the sidecar says so") if beside.up else explain_up(gaussians)
    means = gaussians.means.double()
    return {
        "path": str(path),
        "bytes": size,
        "gaussians": gaussians.n,
        "sh_degree": gaussians.sh_degree,
        "bounds": {"centre": _rounded(centre.tolist()), "radius": _rounded(radius)},
        "box": {"low": _rounded(means.amin(0).tolist()), "high": _rounded(means.amax(0).tolist())},
        "up": up,
        "up_because": why,
        "cameras": find_capture("auto", path, gaussians)[1].removeprefix("cameras: ") or None,
        "opacity": _percentiles(gaussians.opacities.double().sigmoid().numpy()),
        "scale": _percentiles(gaussians.scales.double().exp().amax(1).numpy()),
        "extra": {name: str(column.dtype) for name, column in gaussians.extra.items()},
        "elements": {name: len(rows) for name, rows in gaussians.elements.items()},
        "comments": list(gaussians.comments),
        "obj_info": list(gaussians.obj_info),
        "source_prompt": beside.source_prompt,
    }


def format(description: dict[str, Any]) -> str:
    """The facts of `describe` as lines of plain text."""
    low, high = description["box"]["low"], description["box"]["high"]
    degree = description["sh_degree"]
    rows = [
        ("file", f"{description['path']} ({_megabytes(description['bytes'])})"),
        ("Gaussians", f"{description['gaussians']:,}"),
        ("SH degree", f"{degree} ({3 * (degree + 1) ** 2} colour numbers each)"),
        ("bounds", f"centre {_numbers(description['bounds']['centre'])}, radius {description['bounds']['radius']:.4g}"),
        ("all within", f"{_numbers(low)} to {_numbers(high)}"),
        ("up", f"{description['up']} ({description['up_because']})"),
        *([("cameras", description["cameras"])] if description["cameras"] else []),
        ("opacity", _spread(description["opacity"])),
        ("scale", _spread(description["scale"])),
        ("extra", ", ".join(f"{k} {v}" for k, v in description["extra"].items()) or "none"),
        *(("element", f"{name}, {count} rows") for name, count in description["elements"].items()),
        *(("comment", text) for text in description["comments"]),
        *(("obj_info", text) for text in description["obj_info"]),
        *([("shows", description["source_prompt"])] if description["source_prompt"] else []),
    ]
    return "\n".join(f"{name:<10}  {text}" for name, text in rows)


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {str(q): _rounded(v) for q, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def _spread(percentiles: dict[str, float]) -> str:
    return ", ".join(f"{q} % {value:.4g}" for q, value in percentiles.items()) + " (percentiles)"


def _rounded(value: Any) -> Any:
    """Six significant digits: the rest is noise of float32."""
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")


def _numbers(values: list[float]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:,} bytes"
