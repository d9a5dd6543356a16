"""JSON that any parser reads: no NaN, no infinity, floats no longer than they are true."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def json_number(value: float) -> float | None:
    """The number, or None, JSON's null, for what JSON has no number for."""
    return value if math.isfinite(value) else None


def rounded(value: Any) -> Any:
    """The same plain value with every float at six significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_json(content: Any, path: Path) -> None:
    """Write JSON that any parser reads (no NaN, no infinity), floats to six significant digits."""
    from splatedit.files import atomic

    with atomic(path) as stream:
        stream.write((json.dumps(rounded(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())
