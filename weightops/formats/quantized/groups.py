"""The groups of modules of a compressed-tensors configuration, and which of them a module belongs to.

A target is the name of a module, `re:` and a pattern matched from the name's beginning, or the name of a class; the
most specific that matches counts. Source: `match_named_modules` and `is_match` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weightops.errors import CorruptInput
from weightops.io.escape import escape

_TIMEOUT_S = 1
_CLASSES = ("Linear", "Embedding", "LinearBase")


def groups(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The groups that a configuration has."""
    found = settings.get("config_groups")
    yield from (g for g in found.values() if isinstance(g, Mapping)) if isinstance(found, Mapping) else ()


def group_of(settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The group of a module by the most specific of its targets; empty where none matches."""
    best = 0
    chosen: Mapping[str, Any] = {}
    for group in groups(settings):
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else ():
            rank = _rank(str(target), module)
            if rank > best:
                best, chosen = rank, group
    return chosen


def weight_settings(settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What a configuration says of the weight of a module."""
    weights = group_of(settings, module).get("weights")
    return weights if isinstance(weights, Mapping) else {}


def format_of(settings: Mapping[str, Any], module: str) -> str:
    """The format of a module: its group's, or else that of all."""
    return str(group_of(settings, module).get("format") or settings.get("format") or "")


def _rank(target: str, module: str) -> int:
    """How specifically a target names a module: 3 by name, 2 by pattern, 1 by class, 0 not at all.

    Raises `CorruptInput` for a pattern whose matching does not end.
    """
    import regex

    if target == module:
        return 3
    if target.startswith("re:"):
        # Python's own `re` cannot be stopped, and a hostile pattern takes it for years.
        try:
            return 2 if regex.match(target[3:], module, timeout=_TIMEOUT_S) else 0
        except (regex.error, OverflowError, RecursionError, MemoryError):
            return 0
        except TimeoutError:
            raise CorruptInput(
                f"the pattern {escape(target)[:80]} of config_groups takes more than {_TIMEOUT_S} s on "
                f"{escape(module)[:80]}",
                hint="no library can match it: correct it in config.json",
            ) from None
    return 1 if target in _CLASSES else 0
