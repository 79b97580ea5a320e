"""YAML with places: every value of a recipe knows its line, so that an error can name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from weightops.errors import UsageError, WeightopsError
from weightops.io.escape import escape

Place = tuple[str, ...]
_MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 20


@dataclass(frozen=True)
class Document:
    """A mapping as it was written, called `shown` in messages, with the line of each field."""

    data: Mapping[str, Any]
    shown: str
    lines: Mapping[Place, int] = field(default_factory=dict)

    def fail(self, place: Place, message: str, hint: str | None = None) -> NoReturn:
        """Raise `UsageError`, with file, line and field."""
        raise UsageError(f"{self._at(place)}{message}", hint=hint)

    def blame(self, place: Place, error: WeightopsError) -> WeightopsError:
        """`error` with file, line and field before its message."""
        blamed = type(error)(f"{self._at(place)}{error}", hint=error.hint)
        blamed.exit_code = error.exit_code
        return blamed

    def _at(self, place: Place) -> str:
        line = next((self.lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in self.lines), None)
        name = ".".join(map(escape, place))
        return f"{self.shown}{f':{line}' if line else ''}: {f'{name}: ' if name else ''}"

    def mapping(self, place: Place, value: Any) -> Mapping[str, Any]:
        """`value`, which must be a mapping."""
        if not isinstance(value, Mapping):
            self.fail(place, f"expected a mapping, found {_described(value)}")
        return value

    def text(self, place: Place, value: Any) -> str:
        """`value`, which must be text."""
        if not isinstance(value, str) or not value:
            self.fail(place, f"expected text, found {_described(value)}")
        return value

    def names(self, place: Place, value: Any) -> tuple[str, ...]:
        """`value`, which must be a name or a list of names."""
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(self.text(place, each) for each in values)


def read_document(text: str, shown: str) -> Document:
    """The mapping in a YAML text; raises `UsageError` naming the line.

    Anchors are refused, for a few lines of them make a document of any size; so are fields that are given twice.
    """
    if len(text) > _MAX_CHARACTERS:
        raise UsageError(f"{shown}: too long for a recipe ({len(text)} characters)")
    lines: dict[Place, int] = {}
    try:
        _refuse_alarming(text, shown)
        root = yaml.compose(text, yaml.SafeLoader)
        document = Document({}, shown, lines)
        data = _plain(root, (), document, lines) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{shown}{line}: not YAML ({escape(str(error.problem))})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{shown}: not YAML ({escape(' '.join(str(error).split()))})") from None
    return Document(document.mapping((), data), shown, lines)


def _refuse_alarming(text: str, shown: str) -> None:
    """Raise `UsageError` for aliases and for depths that no recipe has."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = f":{event.start_mark.line + 1}" if event.start_mark else ""
        if depth > _MAX_DEPTH:
            raise UsageError(f"{shown}{line}: nested too deep")
        if isinstance(event, yaml.AliasEvent):
            raise UsageError(f"{shown}{line}: holds an alias (*name)", hint="write out what it stands for")


def _plain(node: yaml.Node, place: Place, document: Document, lines: dict[Place, int]) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*place, str(i)), document, lines) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, document, place)
    found: dict[str, Any] = {}
    for name, key, value in _fields(node):
        below = (*place, name)
        lines[below] = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            document.fail(place, "a field's name must be text")
        if name in found:
            document.fail(below, "is given twice")
        found[name] = _plain(value, below, document, lines)
    return found


def _fields(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    for key, value in node.value:
        yield str(key.value) if isinstance(key, yaml.ScalarNode) else "", key, value


def _scalar(node: yaml.Node, document: Document, place: Place) -> Any:
    """Text, a number, a truth value or nothing: of dates and the like the text; fails for a tag that does not fit."""
    kind = node.tag.rpartition(":")[2]
    if kind not in ("int", "float", "bool", "null"):
        return str(node.value)
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, LookupError, ArithmeticError, yaml.YAMLError):
        document.fail(place, f"{escape(repr(node.value))[:60]} is no {kind}", hint="put text into quotes")


def _described(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing", bool: "a truth value"}
    return kinds.get(type(value), escape(repr(value))[:60])
