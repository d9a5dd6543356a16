"""How long the notebooks compute: the sizes that stand in them, or small ones when SPLATEDIT_QUICK is set."""

from __future__ import annotations

import os
from typing import TypeVar

QUICK = "SPLATEDIT_QUICK"
Value = TypeVar("Value")


def size(full: Value, quick: Value) -> Value:
    """`full`, or `quick` where the environment variable SPLATEDIT_QUICK is neither empty nor 0."""
    return quick if os.environ.get(QUICK, "") not in ("", "0") else full
