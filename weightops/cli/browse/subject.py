"""What is browsed, apart from any screen: one checkpoint or two, their tensors by name, and the text of their files."""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import click

from weightops.checkpoint import Checkpoint
from weightops.cli import inspection
from weightops.cli.browse.rows import Row, aligned_rows, rows_by_name
from weightops.cli.output import escape_lines
from weightops.engine.control import Control
from weightops.errors import Interrupted, WeightopsError
from weightops.formats.adapter.files import looks_like_adapter
from weightops.formats.folder import open_adapter, read_place
from weightops.formats.gguf.metadata import is_typed
from weightops.formats.places import find_place
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.operations.compare import Alignment, align
from weightops.operations.inspect import Inspection, Module, inspect, modules_of

_MAX_LINES = 5000
"""Lines of a text that are shown, and characters of one: tokenizers are in files of their own."""
_MAX_CHARS = 400
_ITEMS = 8
"""Of a list in metadata, such as the tokens of a GGUF file."""


@dataclass(frozen=True)
class Side:
    """A checkpoint and its inventory, made of headers alone."""

    checkpoint: Checkpoint
    inspection: Inspection

    @property
    def shown(self) -> str:
        """Its path, safe for a terminal."""
        return escape(self.inspection.path)

    @cached_property
    def config(self) -> list[str]:
        """config.json in lines, or why there is none to show."""
        try:
            data = self.checkpoint.sidecar("config.json")
            if data is None and self.checkpoint.folder is not None and self.checkpoint.folder.has("config.json"):
                data = self.checkpoint.folder.get("config.json")  # beside a weight file that was named by itself
            if data is None:
                return ["There is no config.json."]
            found = strict_json.load_object(data, "config.json", constants=True)
        except WeightopsError as error:
            return _lines(str(error))
        return _lines(json.dumps(found, indent=2, ensure_ascii=False))

    def metadata(self) -> list[str]:
        """Files, sizes and metadata, in lines."""
        found = self.inspection
        told = inspection.adapter(found.adapter, None) if found.adapter is not None else ""
        parts = (inspection.inventory(found), told, inspection.files(found), inspection.beside(found))
        text = "\n\n".join(click.unstyle(part) for part in parts if part)
        lines = [*_lines(text), *_lines("\n".join(f"Warning: {each}" for each in self.inspection.warnings))]
        pairs = {k: next(iter(v.values())) if is_typed(v) else v for k, v in self.checkpoint.metadata.items()}
        return [*lines, "", "metadata", *(f"  {escape(key)}: {_value(value)}" for key, value in pairs.items())]


def open_side(path: str | os.PathLike[str], control: Control) -> Side:
    """The checkpoint at a path, on a hub or a server; raises as `open_checkpoint` does."""
    place = find_place(path, control.stores)
    checkpoint = read_place(place, control.stores)
    adapter = open_adapter(path, control.stores) if looks_like_adapter(checkpoint) else None
    return Side(checkpoint, inspect(checkpoint, place, os.fspath(path), adapter=adapter, control=control))


def _lines(text: str) -> list[str]:
    """A text from a file in lines that a terminal shows and does nothing else with."""
    lines = text.split("\n")
    shown = [escape_lines(line if len(line) <= _MAX_CHARS else f"{line[:_MAX_CHARS]}…") for line in lines[:_MAX_LINES]]
    return [*shown, *([f"… {len(lines) - _MAX_LINES} more lines"] if len(lines) > _MAX_LINES else [])] if text else []


def _value(value: Any) -> str:
    """A value of metadata in a line; of arrays, which GGUF has as type and items, the first items."""
    if isinstance(value, list):
        kind, items = value
        more = f", … {len(items)} in all" if len(items) > _ITEMS else ""
        return f"{kind} [{', '.join(escape(str(item)) for item in items[:_ITEMS])}{more}]"
    return escape(str(value))


@dataclass(frozen=True)
class Subject:
    """One checkpoint, or two that are held side by side, tensor by tensor as `compare` pairs them.

    `notes` are what there is to say of how they were paired.
    """

    sides: tuple[Side, ...]
    rows: Mapping[str, Row]
    alignment: Alignment | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, *sides: Side, control: Control) -> Subject:
        """Pairs by alignment; by equal names, with a note, where one of the two is damaged and cannot be aligned."""
        if len(sides) == 1:
            return cls(sides, rows_by_name(sides[0].checkpoint, {}))
        one, two = (side.checkpoint for side in sides)
        try:
            found = align(one, two, control)
        except Interrupted:
            raise
        except WeightopsError as error:
            note = f"paired by equal names, and not compared: {error}"
            return cls(sides, rows_by_name(one, two, note), notes=(note,))
        return cls(sides, aligned_rows(found), found, found.notes)

    @property
    def is_pair(self) -> bool:
        return len(self.sides) == 2

    @cached_property
    def modules(self) -> Module:
        """The tree of all names."""
        return modules_of(self.rows)

    def mark(self, name: str) -> str:
        """How a tensor's two sides differ by their headers; see `Row.mark`."""
        return self.rows[name].mark if self.is_pair else ""

    def find(self, text: str) -> list[str]:
        """The tensors of which a name, on either side, holds `text`, in any case, or matches it where it is a glob."""
        wanted = text.casefold()
        pattern = f"*{wanted}*" if set("*?[") & set(wanted) else None

        def matches(name: str) -> bool:
            return wanted in name.casefold() if pattern is None else fnmatch.fnmatchcase(name.casefold(), pattern)

        return [name for name, row in self.rows.items() if any(map(matches, (name, *row.names)))] if wanted else []

    def nbytes(self, names: Iterable[str]) -> int:
        """The bytes of tensors in the files, of the first side that has each."""
        return sum(
            next(m.nbytes(side.checkpoint) for m, side in zip(self.rows[name].members, self.sides, strict=False) if m)
            for name in names
        )

    def config(self) -> Iterator[str]:
        """config.json, or with two what differs between theirs, as lines with - and +."""
        if not self.is_pair:
            yield from self.sides[0].config
            return
        one, two = (side.config for side in self.sides)
        if one == two:
            yield "Both have the same config.json:"
            yield ""
            yield from one
        else:
            yield from (
                line.rstrip("\n") for line in difflib.unified_diff(one, two, "first", "second", n=3, lineterm="")
            )
