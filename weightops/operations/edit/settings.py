"""What an edit changes in config.json: values set and taken out, by their path."""

from __future__ import annotations

import copy
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


def _inner(config: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    for key in path:
        found = config.get(key)
        if not isinstance(found, dict):
            return None
        config = found
    return config
