"""What a recipe is made of: places of sources, and operations on named checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightops.recipes.names import field_of
from weightops.recipes.verbs import find_verb


@dataclass(frozen=True)
class Location:
    """Where a source lies: a path, hub repository or URL; `weights` is a glob for the weight files to go by."""

    path: str
    weights: str | None = None


@dataclass(frozen=True)
class Step:
    """An operation on named checkpoints. `inputs` gives the names for each of its roles.

    `given` is handed to the operation besides, and is no part of what made the result.
    """

    verb: str
    inputs: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> dict[str, Any]:
        """The options, as JSON, that are not what they would be anyway."""
        defaults = find_verb(self.verb).defaults
        chosen = {k: v for k, v in self.options.items() if v not in (None, (), [], {}) and v != defaults.get(k)}
        return {field_of(k): plain(v) for k, v in chosen.items()}


def plain(value: Any) -> Any:
    """A value as JSON, which does not keep the order of a mapping's fields: several texts become a list of pairs."""
    if isinstance(value, Mapping) and len(value) > 1 and all(isinstance(each, str) for each in value.values()):
        return [list(pair) for pair in value.items()]
    return list(value) if isinstance(value, tuple) else value
