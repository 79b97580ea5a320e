"""The language of `edit`: each step selects tensors by name, does one thing with them, and names the results."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.io.yaml_document import Document, Place

Axis = int
Number = int | float


class Take(msgspec.Struct, forbid_unknown_fields=True):
    """Places along a dimension: a `list`, or by the group `by` of the name, or a `range`; each `unit` elements long."""

    axis: int = 0
    numbers: list[int] | dict[str, list[int]] | None = msgspec.field(default=None, name="list")
    range_: list[int] | None = msgspec.field(default=None, name="range")
    by: str | None = None
    unit: int | str = 1


class Split(msgspec.Struct, forbid_unknown_fields=True):
    """Pieces along a dimension: of `sizes`, so many equal `parts`, or q, k and v by the `heads` of config.json."""

    axis: int = 0
    sizes: list[int | str] | None = None
    parts: int | None = None
    heads: list[Literal["q", "k", "v"]] | None = None


class Concat(msgspec.Struct, forbid_unknown_fields=True):
    """Tensors that get one name, one after another along a dimension, in the order of the group `by`."""

    by: str
    axis: int = 0
    order: list[str] | None = None


class Stack(msgspec.Struct, forbid_unknown_fields=True):
    """Tensors that get one name, in a new first dimension, in the order of the group `by`."""

    by: str
    order: list[str] | None = None


class Fill(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor of one `value`, as large as the one selected or of `shape`; or with `rows`, more rows or fewer.

    New rows are the `mean` of those that are there, `copy:N`, or the value.
    """

    value: Number = 0.0
    shape: list[int | str] | None = None
    rows: int | None = None
    with_: str | None = msgspec.field(default=None, name="with")


class Scale(msgspec.Struct, forbid_unknown_fields=True):
    """Times a number, or a vector along a dimension: the tensor of that name, to which `shift` is added first."""

    by: Number | str
    axis: int = 0
    shift: float = 0.0
    from_: str | None = msgspec.field(default=None, name="from")


class LowRank(msgspec.Struct, forbid_unknown_fields=True):
    """Plus `scale` times the product of B `[rows, rank]` and A `[rank, columns]`, tensors of those names."""

    a: str
    b: str
    scale: float = 1.0
    from_: str | None = msgspec.field(default=None, name="from")


class Combine(msgspec.Struct, forbid_unknown_fields=True):
    """`weight` times the tensor plus those of other names or sources, each times its own."""

    with_: list[Other] = msgspec.field(name="with")
    weight: float = 1.0


class Other(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor to be added: of this name, or of the same; from this source, or the one that is edited."""

    weight: float
    tensor: str = "{0}"
    from_: str | None = msgspec.field(default=None, name="from")


class Project(msgspec.Struct, forbid_unknown_fields=True):
    """Less `weight` times the part along a direction: a source with one vector, or one for each layer (group `by`).

    `side`: whether rows of the matrix (output) or its columns (input) have the direction's size; told by the shape
    where only one has.
    """

    onto: str
    weight: float = 1.0
    tensor: str | None = None
    by: str | None = None
    side: Literal["output", "input"] | None = None


PRIMITIVES: Mapping[str, Any] = {
    "drop": Literal[True],
    "take": Take,
    "split": Split,
    "concat": Concat,
    "stack": Stack,
    "unstack": Literal[True],
    "transpose": Literal[True] | list[int],
    "view": list[int | str],
    "fill": Fill,
    "scale": Scale,
    "lowrank": LowRank,
    "combine": Combine,
    "project": Project,
    "unit_rows": Literal[True],
    "fold": Literal[True],
}
"""What a step may do with what it selects, and what is said of it; without any it renames, or copies."""
_FIELDS = ("select", "from", "name", "keep", "replace")
_SEVERAL = ("split", "unstack")
"""What gives several tensors of one."""
_NAMELESS = ("drop", "fold")
"""What leaves tensors out, or changes them where they are."""
_MOST = 1 << 62
"""The largest whole number that any size, place or factor may be."""


@dataclass(frozen=True)
class Step:
    """A step, checked. One of `patterns` matches a whole name; `names` are templates of the results' names."""

    place: Place
    patterns: tuple[re.Pattern[str], ...]
    source: str | None
    names: tuple[str, ...]
    keep: bool
    replace: bool
    primitive: str
    arguments: Any = field(default=None)

    def match(self, name: str) -> re.Match[str] | None:
        """How the first pattern that fits matches the whole name; groups are those of that pattern."""
        return next((found for pattern in self.patterns if (found := pattern.fullmatch(name))), None)


def parse_steps(document: Document, given: Any) -> list[Step]:
    """The steps of a document; raises `UsageError` with line and field."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        document.fail(
            ("steps",), "expected a list of steps", hint="- {select: 'model\\.norm\\.weight', scale: {by: 2}}"
        )
    return [_step(document, ("steps", str(i)), step) for i, step in enumerate(given)]


def _step(document: Document, place: Place, value: Any) -> Step:
    fields = document.mapping(place, value)
    known = (*_FIELDS, *PRIMITIVES)
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"is {near[0]} meant?" if near else f"a step has {', '.join(known)}"
            document.fail((*place, str(name)), "unknown field", hint=hint)
    primitives = [name for name in PRIMITIVES if name in fields]
    if len(primitives) > 1:
        document.fail(place, f"does two things, {primitives[0]} and {primitives[1]}", hint="write a step for each")
    primitive = primitives[0] if primitives else "name"
    patterns = _patterns(document, (*place, "select"), fields.get("select"))
    arguments = None
    if primitives:
        arguments = _converted(document, (*place, primitive), fields[primitive], PRIMITIVES[primitive])
    names = document.names((*place, "name"), fields["name"]) if "name" in fields else ()
    if primitive in (*_SEVERAL, "concat", "stack", "name") and not names:
        document.fail(
            place, "lacks name, for the results", hint="groups of select stand in it as {group}, {0} is the old name"
        )
    if len(names) > 1 and primitive != "split":
        document.fail((*place, "name"), f"{len(names)} names, expected one")
    for key in ("keep", "replace"):
        if not isinstance(fields.get(key, False), bool):
            document.fail((*place, key), "expected true or false")
    source = document.text((*place, "from"), fields["from"]) if "from" in fields else None
    if source is not None and primitive in ("drop", "fold"):
        document.fail((*place, "from"), f"{primitive} is done to what is edited")
    for key in ("name", "keep", "replace") if primitive in _NAMELESS else ():
        if fields.get(key):
            document.fail((*place, key), f"{primitive} gives nothing that it could be said of")
    keep, replace = fields.get("keep", False), fields.get("replace", False)
    return Step(place, patterns, source, names, keep, replace, primitive, arguments)


def _converted(document: Document, place: Place, value: Any, kind: Any) -> Any:
    _check_numbers(document, place, value)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$.")
        below = (*place, *at.rstrip("`").split(".")) if at else place
        document.fail(below, message[:1].lower() + message[1:].replace("`", ""))


def _check_numbers(document: Document, place: Place, value: Any) -> None:
    """Refuse what is no number, or none that a tensor could hold; infinities only as what a tensor is filled with."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            _check_numbers(document, (*place, str(key)), below)
    elif isinstance(value, list | tuple):
        for number, below in enumerate(value):
            _check_numbers(document, (*place, str(number)), below)
    elif isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value) or place[-2:] != ("fill", "value"):
            document.fail(place, f"is {value}, expected a finite number")
    elif isinstance(value, int) and not -_MOST <= value <= _MOST:
        document.fail(place, "is a number of more than 62 bits", hint="a misprint?")


def _patterns(document: Document, place: Place, value: Any) -> tuple[re.Pattern[str], ...]:
    texts = document.names(place, value) if value is not None else ()
    if not texts:
        document.fail(place[:-1], "lacks select", hint="a regular expression that whole names match")
    found = []
    for text in texts:
        try:
            found.append(re.compile(text))
        except (re.error, OverflowError, RecursionError) as error:
            document.fail(place, f"no regular expression: {escape(str(error))}", hint="\\. is a dot, \\d+ a number")
    return tuple(found)


def fill_in(template: str, match: re.Match[str], n: int | None = None) -> str:
    """A template with what the groups of a match hold: `{0}` the whole, `{name}` a group, `{n}` a number.

    Raises `UsageError` for a group that is not there.
    """
    known = {**{k: v for k, v in match.groupdict().items() if v is not None}}
    known |= {str(i): g for i, g in enumerate((match[0], *match.groups())) if g is not None}
    if n is not None:
        known.setdefault("n", str(n))

    def value(found: re.Match[str]) -> str:
        if found[1] not in known:
            raise UsageError(
                f"{{{escape(found[1])}}} is no group of select, for {escape(match[0])}",
                hint="(?P<name>...) names a group; there are " + ", ".join(map(escape, known)),
            )
        return known[found[1]]

    return re.sub(r"\{([^{}]*)\}", value, template)
