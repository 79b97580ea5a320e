"""The metadata of GGUF files: JSON data in which each value has its type, `{"llama.block_count": {"uint32": 32}}`.

An array is `{"array": ["float32", [0.0, -1.5]]}`; one of strings that was read is a `Strings`.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, overload

TYPE_KEY = "general.type"
ARCHITECTURE_KEY = "general.architecture"
_WITHOUT_TYPE = (("clip", "mmproj"), ("controlvector", "adapter"))
"""Architectures of files from before `general.type`, and what these are."""


class Strings(Sequence[str]):
    """Texts as they lie in a header, decoded when they are asked for: a vocabulary has hundreds of thousands."""

    __slots__ = ("_data", "_starts")

    def __init__(self, data: bytes, starts: array[int]) -> None:
        self._data, self._starts = data, starts
        """Texts in UTF-8, each after eight bytes; where each of these begin, and where the last text ends."""

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = range(len(self))[index]
        if isinstance(found, range):
            return [self[each] for each in found]
        return self._data[self._starts[found] + 8 : self._starts[found + 1]].decode()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings) and self._data == other._data:
            return self._starts == other._starts
        return (
            isinstance(other, list | tuple | Strings) and len(self) == len(other) and all(map(str.__eq__, self, other))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Strings({self[:3]!r}, {len(self)} in all)"


def is_typed(value: Any) -> bool:
    """Whether a value is one of GGUF's, which says its type; those of safetensors files are strings."""
    return isinstance(value, Mapping)


def untyped(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The values without their types, as JSON data; what is not GGUF's is left out."""
    return {key: plain(value) for key, value in metadata.items() if is_typed(value)}


def plain(value: Mapping[str, Any]) -> Any:
    """A value without its type; an array becomes a list."""
    ((kind, content),) = value.items()
    return list(content[1]) if kind == "array" else content


def text(metadata: Mapping[str, Any], key: str) -> str | None:
    """The string under a key, if there is one."""
    value = metadata.get(key)
    found = value.get("string") if is_typed(value) else None  # type: ignore[union-attr]
    return found if isinstance(found, str) else None


def number(metadata: Mapping[str, Any], key: str) -> int | None:
    """The integer under a key, if there is one."""
    value = metadata.get(key)
    found = next(iter(value.values()), None) if is_typed(value) else None  # type: ignore[union-attr]
    return found if type(found) is int else None


def kind_of(metadata: Mapping[str, Any]) -> str:
    """What a file is, by its `general.type`: model, adapter, mmproj (the half of a model that sees), imatrix, ...

    Files without one are older: their architecture or their other keys say it.
    """
    said = text(metadata, TYPE_KEY)
    if said:
        return said
    if any(key.startswith("adapter.") for key in metadata):
        return "adapter"
    if any(key.startswith("imatrix.") for key in metadata):
        return "imatrix"
    return dict(_WITHOUT_TYPE).get(text(metadata, ARCHITECTURE_KEY) or "", "model")
