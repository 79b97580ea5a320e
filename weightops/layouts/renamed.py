"""The same tensors under other names, with what config.json says of modules by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.layouts.layers import with_names

_QUANTISATION = ("quantization_config", "compression_config", "quantization")


def without_names(source: Checkpoint, names: Collection[str], reason: str) -> Checkpoint:
    """`source` without these tensors, which are recorded with the reason."""
    gone = set(names)
    result = with_names(source, ((name, name) for name in source if name not in gone))
    return replace(result, dropped={**source.dropped, **dict.fromkeys(sorted(gone), reason)})


def renamed(source: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The tensors under the names that old ones map to; raises `UsageError` for names that no file can hold."""
    origins: dict[str, str] = {}
    for old, new in names.items():
        if new in origins:
            raise UsageError(
                f"{escape(origins[new])} and {escape(old)} would both be named {escape(new)}",
                hint="choose other names, or leave one of them out with --drop",
            )
        check_name(old, new)
        origins[new] = old
    result = with_names(source, origins.items()).with_config(lambda config: with_modules(config, names))
    stale = [key for key in _QUANTISATION if _names_any(result, key, names)]
    return result.warned(*(f"config.json: {key} names modules as they were named before" for key in stale))


def check_name(old: str, new: str) -> None:
    """Raise `UsageError` for a name that no file can hold."""
    if not new or new == "__metadata__" or not _is_text(new):
        raise UsageError(f"{escape(old)} would be named {escape(new)!r}, which no tensor can be")


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def with_modules(config: dict[str, Any], names: Mapping[str, str], lost: Collection[str] = ()) -> dict[str, Any]:
    """A configuration whose lists of modules that are quantised, or are not, have the modules' new names.

    `lost` are tensors that are left out, whose names others may have now: modules of which nothing is left are taken
    out of the lists.
    """
    known: dict[str, str | None] = {}

    def renamed(text: str) -> str | None:
        if text not in known:
            found = {
                new.removesuffix(old.removeprefix(text))
                for old, new in names.items()
                if old.startswith(f"{text}.") and new.endswith(old.removeprefix(text))
            }
            gone = not found and any(name.startswith(f"{text}.") for name in lost)
            gone = gone and not any(old.startswith(f"{text}.") for old in names)
            known[text] = found.pop() if len(found) == 1 else None if gone else text
        return known[text]

    def edited(value: Any) -> Any:
        if isinstance(value, str):
            return renamed(value)
        if isinstance(value, list):
            parts = [new for part in value for new in _written_out(part, names)]
            return [new for part in parts if (new := edited(part)) is not None or part is None]
        if isinstance(value, dict):
            return {new: edited(part) for key, part in value.items() if (new := renamed(key)) is not None}
        return value

    return {key: edited(value) if key in _QUANTISATION else value for key, value in config.items()}


_PATTERN = "re:"
"""How compressed-tensors marks a regular expression, which is held against the beginning of a module's name."""


def _written_out(part: Any, names: Mapping[str, str]) -> list[Any]:
    """A pattern that would match other modules by their new names, as the names (the old ones) that it stands for."""
    if not isinstance(part, str) or not part.startswith(_PATTERN):
        return [part]
    try:
        pattern = re.compile(part.removeprefix(_PATTERN))
    except (re.error, OverflowError, RecursionError):
        return [part]
    modules = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in names.items()}
    meant = [old for old in modules if pattern.match(old)]
    found = [old for old, new in modules.items() if pattern.match(new)]
    return [part] if meant == found else [name for name in meant if name]


def _names_any(source: Checkpoint, key: str, names: Mapping[str, str]) -> bool:
    """Whether a setting of config.json names a module whose tensors get other names."""
    settings = source.config().get(key)
    moved = [old for old, new in names.items() if old != new] if settings else []
    return any(old.startswith(f"{text}.") for text in _texts(settings) for old in moved)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value:
            yield from _texts(part)
        if isinstance(value, dict):
            yield from _texts(list(value.values()))
