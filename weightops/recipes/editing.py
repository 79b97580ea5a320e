"""Edits in recipes: the sources that steps mention, by name or by the place where they lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from weightops.io.yaml_document import Document, Place
from weightops.recipes.merging import Expanded
from weightops.recipes.steps import Location

_FIELDS = ("source", "steps", "config", "tokenizer", "architecture")
_NAMES = ("source", "from", "onto", "tokenizer")
"""The fields that name a source, at any depth."""


def with_sources(
    document: Document,
    place: Place,
    given: Any,
    known: Collection[str],
    there: Expanded,
    locate: Callable[[str], str],
) -> tuple[dict[str, Any], dict[str, Location]]:
    """An edit that names its sources, `other` among them; and the sources that it says the places of.

    What is no name of `known` is a place. Raises `UsageError` for fields that an edit has not.
    """
    fields = document.mapping(place, given)
    for name in fields:
        if name not in _FIELDS:
            document.fail((*place, str(name)), "unknown field", hint=f"an edit has {', '.join(_FIELDS)}")
    if "source" not in fields:
        document.fail(place, "lacks source", hint="it says what is edited")
    document.text((*place, "source"), fields["source"])
    found: dict[str, Location] = {}
    names: dict[str, str] = {}
    taken = {*known, *there.sources, *there.steps}

    def named(text: str) -> str:
        if text in known:
            return text
        if text not in names:
            last = text.partition("?")[0].rstrip("/").rpartition("/")[2].partition("@")[0] or "source"
            free = next(n for n in (last, *(f"{last}-{i}" for i in range(2, 10_000))) if n not in taken)
            taken.add(free)
            names[text], found[free] = free, Location(locate(text))
        return names[text]

    edited: dict[str, Any] = _named(fields, named)
    mentioned = list(dict.fromkeys(_mentions(edited)))
    other = [name for name in mentioned if name != edited["source"]]
    config = document.mapping((*place, "config"), edited.pop("config", {}))
    unknown = next((key for key in config if key not in ("set", "unset")), None)
    if unknown is not None:
        document.fail((*place, "config", unknown), "unknown field", hint="config: {set: {...}, unset: [...]}")
    return {**edited, **config, **({"other": other} if other else {})}, found


def _named(value: Any, named: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: named(below)
            if key in _NAMES and isinstance(below, str)
            else below
            if key == "set"
            else _named(below, named)
            for key, below in value.items()
        }
    return [_named(below, named) for below in value] if isinstance(value, list | tuple) else value


def _mentions(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [
            name
            for key, below in value.items()
            if key != "set"
            for name in ([below] if key in _NAMES and isinstance(below, str) else _mentions(below))
        ]
    return [name for below in value for name in _mentions(below)] if isinstance(value, list | tuple) else []
