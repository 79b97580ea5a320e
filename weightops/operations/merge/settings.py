"""What a merge file says of parameters: values, lists over the layers, rules by name; each checked and of its type."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from weightops.io.escape import escape
from weightops.io.yaml_document import Document, Place, described
from weightops.operations.merge.fields import belongs, known_parameters
from weightops.ops.merging.method import Method, Parameter

Scalar = float | int | bool
_TEXTS = {"true": True, "false": False}


@dataclass(frozen=True)
class Rule:
    """A value, or a tuple of values over the layers, for names that hold `filter`; for all where it is None."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None


Settings = Mapping[str, tuple[Rule, ...]]
"""By parameter the rules of which the first that fits a tensor's name counts."""


def read_settings(
    document: Document, place: Place, value: Any, method: Method, *, of_source: bool, unused: list[str]
) -> dict[str, tuple[Rule, ...]]:
    """The parameters that the method has; the names of those that it lacks go to `unused`.

    Those shared by all models may not stand with a source (`of_source`), where mergekit does not look for them.
    Raises `UsageError` for names that no method has, and for values that are none.
    """
    found = {}
    for name, given in document.mapping(place, value if value is not None else {}).items():
        own = (*place, name)
        parameter = method.parameters.get(name)
        if parameter is None:
            if name not in known_parameters():
                document.fail(own, "unknown parameter", hint=belongs(name, (), _of(method)))
            unused.append(".".join(own))
        elif of_source and not parameter.of_each:
            document.fail(
                own,
                f"{escape(name)} is one value for all models, and is not looked for here",
                hint="write it under parameters: at the top of the file, or of the slice",
            )
        else:
            found[name] = tuple(_rules(document, own, given, parameter))
    return found


def _of(method: Method) -> str:
    return f"{method.name} has {', '.join(method.parameters) or 'none'}"


def _rules(document: Document, place: Place, given: Any, parameter: Parameter) -> Iterator[Rule]:
    if isinstance(given, Mapping):
        yield _rule(document, place, given, parameter)
    elif isinstance(given, list) and any(isinstance(each, Mapping) for each in given):
        for i, each in enumerate(given):
            below = (*place, str(i))
            if not isinstance(each, Mapping):
                document.fail(below, f"expected a rule with filter and value, found {described(each)}")
            yield _rule(document, below, each, parameter)
    else:
        yield Rule(_value(document, place, given, parameter))


def _rule(document: Document, place: Place, given: Mapping[str, Any], parameter: Parameter) -> Rule:
    unknown = next((name for name in given if name not in ("filter", "value")), None)
    if unknown is not None:
        document.fail((*place, unknown), "unknown field", hint="a rule has filter and value")
    if "value" not in given:
        document.fail(place, "lacks value", hint="a rule has filter and value")
    wanted = given.get("filter")
    value = _value(document, (*place, "value"), given["value"], parameter)
    if wanted is None or wanted == "*":
        return Rule(value)
    return Rule(value, document.text((*place, "filter"), wanted))


def _value(document: Document, place: Place, given: Any, parameter: Parameter) -> Scalar | tuple[Scalar, ...]:
    if not isinstance(given, list | tuple):
        return _scalar(document, place, given, parameter)
    if not given:
        document.fail(place, "an empty list is no value", hint="leave the field out, or write a number")
    if len(given) == 1:
        shown = escape(str(given[0]))
        document.fail(
            place,
            "a list of one value says nothing between the first layer and the last",
            hint=f"write {shown} without brackets, or the values at both ends",
        )
    return tuple(_scalar(document, (*place, str(i)), each, parameter) for i, each in enumerate(given))


def _scalar(document: Document, place: Place, given: Any, parameter: Parameter) -> Scalar:
    """The value in the parameter's type; texts such as `1e-3`, which YAML takes to be text, are numbers."""

    def refuse(wanted: str) -> NoReturn:
        document.fail(place, f"expected {wanted}, found {described(given)}")

    if parameter.kind is bool:
        value = _TEXTS.get(given.lower(), given) if isinstance(given, str) else given
        if value not in (True, False):
            refuse("true or false")
        return bool(value)
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        refuse("a number")
    try:
        number = float(given)
    except (ValueError, OverflowError):
        refuse("a number")
    if not math.isfinite(number):
        refuse("a finite number")
    if parameter.kind is float:
        return number
    if not number.is_integer():
        refuse("a whole number")
    return int(number)


def plain_settings(settings: Settings) -> dict[str, Any]:
    """The settings as a merge file says them."""
    return {name: _plain(rules) for name, rules in settings.items()}


def _plain(rules: tuple[Rule, ...]) -> Any:
    values = [list(rule.value) if isinstance(rule.value, tuple) else rule.value for rule in rules]
    if len(rules) == 1 and rules[0].filter is None:
        return values[0]
    return [
        {"value": value} if rule.filter is None else {"filter": rule.filter, "value": value}
        for rule, value in zip(rules, values, strict=True)
    ]
