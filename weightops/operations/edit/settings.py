"""What an edit changes in config.json: values set and taken out, by their path."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.layouts.rope import rope_problems, with_rope

ROPE = "rope."
"""What stands before rotary settings, which are written as all versions of transformers read them."""


def with_settings(
    config: Mapping[str, Any], given: Mapping[str, Any], gone: Iterable[str], where: str
) -> dict[str, Any]:
    """config.json with values by path, and without others; `text_config.vocab_size` lies within text_config.

    Raises `UsageError` for a path that is not there, and for rotary settings with which the model would not load.
    """
    edited = copy.deepcopy(dict(config))
    for path, value in given.items():
        if not all(path.split(".")):
            raise UsageError(f"{where}: {escape(path)!r} is no name of a setting", hint="a.b is what is within a")
        _check_value(path, value, where)
    for path in gone:
        *above, last = path.split(".")
        inner = _inner(edited, above)
        if inner is None or last not in inner:
            raise UsageError(f"{where}/config.json has no {escape(path)} to take out")
        del inner[last]
    rope = {path.removeprefix(ROPE): value for path, value in given.items() if path.startswith(ROPE)}
    for path, value in given.items():
        if path.startswith(ROPE):
            continue
        *above, last = path.split(".")
        inner = _inner(edited, above)
        if inner is None:
            raise UsageError(f"{where}/config.json has no {escape('.'.join(above))} to set {escape(last)} in")
        inner[last] = value
    edited = with_rope(edited, rope) if rope else edited
    before = {problem.message for problem in rope_problems(config)}
    problem = next((p for p in rope_problems(edited) if p.severity == "error" and p.message not in before), None)
    if problem is not None:
        raise UsageError(f"{where}: {problem.message}", hint=problem.hint)
    return edited


def _check_value(path: str, value: Any, where: str) -> None:
    """Raise `UsageError` for what config.json cannot hold."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            if not isinstance(key, str):
                raise UsageError(f"{where}: {escape(path)}: {escape(repr(key))[:60]} is no text, as JSON has names")
            _check_value(f"{path}.{key}", below, where)
    elif isinstance(value, list | tuple):
        for below in value:
            _check_value(path, below, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where}: {escape(path)} is {value}, which JSON has no number for")
    elif isinstance(value, int) and abs(value) >= 1 << 64:
        raise UsageError(f"{where}: {escape(path)} is a number of more than 64 bits", hint="a misprint?")
    elif value is not None and not isinstance(value, str | int | float):
        raise UsageError(
            f"{where}: {escape(path)} is a {type(value).__name__}, which config.json cannot hold",
            hint="quotes make text of it",
        )


def _inner(config: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    for key in path:
        found = config.get(key)
        if not isinstance(found, dict):
            return None
        config = found
    return config
