"""YAML of settings: what a file may cost before it is read."""

from __future__ import annotations

from pathlib import Path

from splatedit.errors import InputError

LARGEST = 1 << 20  # bytes
DEEPEST = 10  # lists and mappings within each other


def check_yaml(path: Path) -> None:
    """Raise InputError for a yaml file that is no list of settings, before anything is built of it.

    Of a few lines, aliases make structures of any size, and brackets such of any depth; settings need neither.
    """
    import yaml

    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {LARGEST} of settings.")
    depth = 0
    try:
        for event in yaml.parse(path.read_text(encoding="utf-8"), yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST or isinstance(event, yaml.AliasEvent):
                found = "an alias" if depth <= DEEPEST else f"more than {DEEPEST} levels"
                line = event.start_mark.line + 1
                raise InputError(f"{path}: line {line}: found {found}, expected lines like `key: value`.")
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # the reader says it better
