"""The sidecar: what the yaml file beside a scene says about it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

from splatedit.errors import InputError
from splatedit.extents import UPS
from splatedit.yaml_files import check_yaml


class Sidecar(NamedTuple):
    """What the yaml file beside a scene says about it."""

    source_prompt: str | None = None  # what the scene shows, e.g. "a cat"
    up: str | None = None  # one of UPS


def sidecar(path: str | Path) -> Sidecar:
    """Read `<stem>.yaml` beside a scene, if there is one; raises InputError for an unknown key or a bad value.

    The stem of `cat.compressed.ply` is `cat.compressed`, else `cat`.
    """
    import yaml

    path = Path(path).expanduser()
    beside = path.parent / f"{path.stem}.yaml"
    if not beside.is_file() and path.suffixes[-2:-1] == [".compressed"]:
        beside = path.parent / f"{Path(path.stem).stem}.yaml"
    if not path.name or not beside.is_file():
        return Sidecar()
    try:
        check_yaml(beside)
        content = yaml.safe_load(beside.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise InputError(f"{beside}: not readable as yaml ({' '.join(str(error).split())}).") from error
    if content is None:
        return Sidecar()
    if not isinstance(content, dict):
        raise InputError(f"{beside}: found {type(content).__name__}, expected lines like `source_prompt: a cat`.")
    for key, value in content.items():
        if key not in Sidecar._fields:
            near = difflib.get_close_matches(str(key), Sidecar._fields, 1, 0.3)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(Sidecar._fields)}."
            raise InputError(f"{beside}: unknown key {key!r}; {hint}")
        if value is not None and not isinstance(value, str):
            raise InputError(f"{beside}: {key} is {value!r}, expected text; put it in quotes.")
    if content.get("up") not in (None, *UPS):
        raise InputError(f"{beside}: up is {content['up']!r}, expected one of {', '.join(UPS)}.")
    return Sidecar(**content)
