"""YAML with places: every value of a recipe or merge file knows its line, so that an error can name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from weightops.errors import UsageError, WeightopsError
from weightops.io.escape import escape

Place = tuple[str, ...]
_MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 20
_MAX_VALUES = 100_000
_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Document:
    """A mapping as it was written, called `shown` in messages, with the line of each field.

    `anchored` are the places of values that others repeat by an alias; `inside` is where the mapping itself stands in
    what is called `shown`, if that holds more.
    """

    data: Mapping[str, Any]
    shown: str
    lines: Mapping[Place, int] = field(default_factory=dict)
    anchored: frozenset[Place] = frozenset()
    inside: Place = ()

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
        name = ".".join(map(escape, (*self.inside, *place)))
        return f"{self.shown}{f':{line}' if line else ''}: {f'{name}: ' if name else ''}"

    def mapping(self, place: Place, value: Any) -> Mapping[str, Any]:
        """`value`, which must be a mapping."""
        if not isinstance(value, Mapping):
            self.fail(place, f"expected a mapping, found {described(value)}")
        return value

    def text(self, place: Place, value: Any) -> str:
        """`value`, which must be text."""
        if not isinstance(value, str) or not value:
            self.fail(place, f"expected text, found {described(value)}")
        return value

    def names(self, place: Place, value: Any) -> tuple[str, ...]:
        """`value`, which must be a name or a list of names."""
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(self.text(place, each) for each in values)


def read_document(text: str, shown: str) -> Document:
    """The mapping in a YAML text; raises `UsageError` naming the line.

    Anchors are refused, for a few lines of them make a document of any size; so are fields that are given twice.
    """
    return _read(text, shown, aliases=False, several=False)[0]


def read_documents(text: str, shown: str) -> list[Document]:
    """The mappings in a YAML text of one or more documents, which may have anchors, aliases and merge keys.

    Raises `UsageError` naming the line; for aliases that make a document much larger than it was written too.
    """
    return _read(text, shown, aliases=True, several=True)


def _read(text: str, shown: str, *, aliases: bool, several: bool) -> list[Document]:
    if len(text) > _MAX_CHARACTERS:
        raise UsageError(f"{shown}: too long ({len(text)} characters)")
    try:
        _refuse_alarming(text, shown, aliases)
        roots = list(yaml.compose_all(text, yaml.SafeLoader)) if several else [yaml.compose(text, yaml.SafeLoader)]
        roots = [None if several and root is not None and root.tag == _NULL else root for root in roots]
        return [_Reader(shown).read(root) for root in roots or [None]]
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{shown}{line}: not YAML ({escape(str(error.problem))})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{shown}: not YAML ({escape(' '.join(str(error).split()))})") from None


def _refuse_alarming(text: str, shown: str, aliases: bool) -> None:
    """Raise `UsageError` for depths that no document has, and for aliases where there may be none."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = f":{event.start_mark.line + 1}" if event.start_mark else ""
        if depth > _MAX_DEPTH:
            raise UsageError(f"{shown}{line}: nested too deep")
        if isinstance(event, yaml.AliasEvent) and not aliases:
            raise UsageError(f"{shown}{line}: holds an alias (*name)", hint="write out what it stands for")


class _Reader:
    """Makes plain values of one document's nodes. An alias is the very node that it repeats."""

    def __init__(self, shown: str) -> None:
        self.lines: dict[Place, int] = {}
        self.document = Document({}, shown, self.lines)
        self.first: dict[yaml.Node, Place] = {}
        self.anchored: set[Place] = set()
        self.count = 0

    def read(self, root: yaml.Node | None) -> Document:
        data = self.plain(root, ()) if root is not None else {}
        mapping = self.document.mapping((), data)
        return Document(mapping, self.document.shown, self.lines, frozenset(self.anchored))

    def plain(self, node: yaml.Node, place: Place) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        self.visit(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(child, (*place, str(i))) for i, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return _scalar(node, self.document, place)
        found: dict[str, Any] = {}
        for name, key, value in self.fields(node, place):
            below = (*place, name)
            self.lines[below] = key.start_mark.line + 1
            found[name] = self.plain(value, below)
        return found

    def visit(self, node: yaml.Node, place: Place) -> None:
        """Count a value, and note what is there once more."""
        self.count += 1
        if self.count > _MAX_VALUES or len(place) > _MAX_DEPTH:
            self.document.fail(place, "too large or nested too deep, aliases being what they repeat")
        if node in self.first:
            self.anchored.add(self.first[node])
        else:
            self.first[node] = place

    def fields(self, node: yaml.MappingNode, place: Place) -> list[tuple[str, yaml.Node, yaml.Node]]:
        """A mapping's own fields, then those of the mappings that `<<` names and that it does not have itself."""
        own: dict[str, tuple[str, yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.document.fail(place, "a field's name must be text")
            name = str(key.value)
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            if name in own:
                self.lines[(*place, name)] = key.start_mark.line + 1
                self.document.fail((*place, name), "is given twice")
            own[name] = (name, key, value)
        for other in merged:
            if not isinstance(other, yaml.MappingNode):
                self.document.fail((*place, "<<"), "expected a mapping, or a list of mappings")
            self.visit(other, (*place, "<<"))
            for field_ in self.fields(other, (*place, "<<")):
                own.setdefault(field_[0], field_)
        return list(own.values())


def _scalar(node: yaml.Node, document: Document, place: Place) -> Any:
    """Text, a number, a truth value or nothing: of dates and the like the text; fails for a tag that does not fit."""
    kind = node.tag.rpartition(":")[2]
    if kind not in ("int", "float", "bool", "null"):
        return str(node.value)
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, LookupError, ArithmeticError, yaml.YAMLError):
        document.fail(place, f"{escape(repr(node.value))[:60]} is no {kind}", hint="put text into quotes")


def described(value: Any) -> str:
    """What kind of value it is, in words; numbers and texts as they are."""
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing", bool: "a truth value"}
    return kinds.get(type(value), escape(repr(value))[:60])
