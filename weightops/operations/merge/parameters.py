"""The value that a parameter has for one tensor: by level, by the tensor's name, by its place among the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

from weightops.operations.merge.settings import Rule, Scalar, Settings
from weightops.ops.merging.method import Parameter, Value


def values(
    parameters: Mapping[str, Parameter],
    levels: Iterable[Settings],
    name: str,
    position: float,
    missing: Callable[[str], NoReturn],
) -> dict[str, Value]:
    """All parameters for the tensor `name`; the first of the levels that says something of it counts.

    `position` is that of its layer, 0 the first and 1 the last. `missing` is called with the name of a parameter that
    has to be said and is not.
    """
    levels = tuple(levels)
    found: dict[str, Value] = {}
    for key, parameter in parameters.items():
        said = (value for level in levels if (value := _find(level.get(key, ()), name, position)) is not None)
        found[key] = next(said, parameter.default)
        if found[key] is None and parameter.is_needed:
            missing(key)
    return found


def _find(rules: Iterable[Rule], name: str, position: float) -> Scalar | None:
    """The value of the first rule that fits the name; None if none does."""
    rule = next((rule for rule in rules if rule.filter is None or rule.filter in name), None)
    if rule is None:
        return None
    return _between(rule.value, position) if isinstance(rule.value, tuple) else rule.value


def _between(points: tuple[Scalar, ...], position: float) -> Scalar:
    """The value at `position` of those from 0 to 1, evenly spaced; truth values count until the next one."""
    at = position * (len(points) - 1)
    low = int(at)
    if isinstance(points[0], bool):
        return points[low]
    high, part = min(low + 1, len(points) - 1), at - low
    value = (1 - part) * points[low] + part * points[high]
    return int(value) if isinstance(points[0], int) else value


def position(layer: int, count: int) -> float:
    """Where a layer is among `count`: 0 for the first, 1 for the last, and for the only one."""
    return layer / (count - 1) if count > 1 else 1.0
