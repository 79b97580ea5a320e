"""What an edit changes in config.json: values set and taken out, by their path."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import msgspec

from weightops.io.yaml_document import Document
from weightops.layouts.rope import rope_problems, with_rope

ROPE = "rope."


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """`set` values by path, `text_config.vocab_size` being what lies within text_config; `unset` takes paths out.

    `rope.type`, `rope.factor` and the like are rotary settings, which are written as all versions of transformers read
    them.
    """

    set: dict[str, Any] = {}
    unset: list[str] | str = []

    @property
    def gone(self) -> list[str]:
        return [self.unset] if isinstance(self.unset, str) else self.unset


def parse_config(document: Document, given: Mapping[str, Any] | None) -> Settings | None:
    """The `config` of an edit; raises `UsageError`."""
    if given is None:
        return None
    try:
        return msgspec.convert(dict(given), Settings)
    except msgspec.ValidationError as error:
        message = str(error)
        document.fail(
            ("config",), message[:1].lower() + message[1:].replace("`", ""), hint="config: {set: {}, unset: []}"
        )


def with_settings(
    config: Mapping[str, Any], settings: Settings | None, document: Document, where: str
) -> dict[str, Any]:
    """config.json with what is set and without what is not; raises `UsageError` for a path that is not there."""
    edited = copy.deepcopy(dict(config))
    for path in settings.gone if settings else ():
        *above, last = path.split(".")
        inner = _inner(edited, above)
        if inner is None or last not in inner:
            document.fail(("config", "unset"), f"{where}/config.json has no {path}")
        del inner[last]
    given = settings.set if settings else {}
    rope = {path.removeprefix(ROPE): value for path, value in given.items() if path.startswith(ROPE)}
    for path, value in given.items():
        if path.startswith(ROPE):
            continue
        *above, last = path.split(".")
        inner = _inner(edited, above)
        if inner is None:
            document.fail(("config", "set"), f"{where}/config.json has no {'.'.join(above)} to set {last} in")
        inner[last] = value
    edited = with_rope(edited, rope) if rope else edited
    before = {problem.message for problem in rope_problems(config)}
    problem = next((p for p in rope_problems(edited) if p.severity == "error" and p.message not in before), None)
    if problem is not None:
        document.fail(("config", "set"), f"{where}: {problem.message}", hint=problem.hint)
    return edited


def _inner(config: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    for key in path:
        found = config.get(key)
        if not isinstance(found, dict):
            return None
        config = found
    return config
