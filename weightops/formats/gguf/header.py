"""The header of a GGUF file, number by number, in either order of bytes."""

from __future__ import annotations

import struct
from array import array
from itertools import pairwise
from typing import Any, Literal

from weightops.errors import CorruptInput
from weightops.formats.gguf.metadata import Strings
from weightops.formats.gguf.types import KINDS, SCALARS
from weightops.formats.safetensors import MAX_HEADER_NBYTES
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.stores.reader import FileReader

_MAX_ELEMENTS = 1 << 22
"""In all arrays of a file: several times what a tokenizer of half a million tokens has."""
_FIRST = 1 << 16
_MOST_AT_ONCE = 4 << 20
_TEXTS = 4096
"""That are looked at together."""


class Header:
    """A header from byte `position` on, read as far as it is asked for. Raises `CorruptInput` where it is malformed."""

    def __init__(self, file: SourceFile, files: FileReader, position: int) -> None:
        self.position = position
        """In the file, of what comes next."""
        self.order: Literal["<", ">"] = "<"
        self._file, self._files = file, files
        self._data = bytearray()
        """From byte 0 on, all that has been read."""
        self._elements = 0

    def _need(self, stop: int) -> None:
        """Have all bytes up to `stop`; raises where the file, or what a header may have, ends before."""
        if stop <= len(self._data):
            return
        if stop > min(self._file.nbytes, MAX_HEADER_NBYTES):
            raise CorruptInput(
                f"{self._file.shown}: the header goes on to byte {stop}, the file has {self._file.nbytes} bytes and a "
                f"header at most {MAX_HEADER_NBYTES}"
            )
        ahead = len(self._data) + min(max(len(self._data), _FIRST), _MOST_AT_ONCE)
        have = len(self._data)
        self._data += self._files.read(self._file, have, min(max(stop, ahead), self._file.nbytes) - have)

    def take(self, nbytes: int) -> bytes:
        """The next `nbytes`."""
        start, self.position = self.position, self.position + nbytes
        self._need(self.position)
        return bytes(self._data[start : self.position])

    def numbers(self, form: str) -> tuple[Any, ...]:
        """The next numbers, by their `struct` codes."""
        return struct.unpack(f"{self.order}{form}", self.take(struct.calcsize(f"{self.order}{form}")))

    def uint32(self) -> int:
        return int(self.numbers("I")[0])

    def uint64(self) -> int:
        return int(self.numbers("Q")[0])

    def count(self, most: int, what: str) -> int:
        """A number of things of which there may be so many."""
        found = self.uint64()
        if found > most:
            raise CorruptInput(f"{self._file.shown}: the header lists {found} {what}, at most {most} are read")
        return found

    def string(self) -> str:
        try:
            return self.take(self.uint64()).decode()
        except UnicodeDecodeError:
            raise CorruptInput(f"{self._file.shown}: a text before byte {self.position} is not UTF-8") from None

    def typed(self, key: str) -> dict[str, Any]:
        """A value and its type."""
        kind = self._kind(key)
        if kind == "string":
            return {kind: self.string()}
        if kind != "array":
            return {kind: self._values(kind, 1, key)[0]}
        inner, count = self._kind(key), self.uint64()
        self._elements += count
        if inner == "array" or self._elements > _MAX_ELEMENTS:
            where = f"{self._file.shown}: {escape(key)}"
            raise CorruptInput(f"{where}: arrays in arrays are not read, nor more than {_MAX_ELEMENTS} elements")
        return {"array": [inner, self._strings(count, key) if inner == "string" else self._values(inner, count, key)]}

    def _kind(self, key: str) -> str:
        number = self.uint32()
        if number not in KINDS:
            raise CorruptInput(f"{self._file.shown}: {escape(key)}: unknown type {number}")
        return KINDS[number]

    def _values(self, kind: str, count: int, key: str) -> list[Any]:
        code = SCALARS[kind][1]
        if kind != "bool":
            return list(self.numbers(f"{count}{code}"))
        data = self.take(count)
        if not {*data} <= {0, 1}:
            raise CorruptInput(f"{self._file.shown}: {escape(key)}: a bool must be 0 or 1")
        return [byte == 1 for byte in data]

    def _strings(self, count: int, key: str) -> Strings:
        """As many strings, each left as it lies there; whether they are UTF-8 is seen all at once."""
        first, data = self.position, self._data
        length, position = struct.Struct(f"{self.order}Q").unpack_from, self.position
        starts = array("Q", [0])
        for _ in range(count):
            if position + 8 > len(data):
                self._need(position + 8)
            position += 8 + length(data, position)[0]
            if position > len(data):
                self._need(position)
            starts.append(position - first)
        self.position = position
        found = bytes(data[first:position])
        if not _is_utf8(found, starts):
            raise CorruptInput(f"{self._file.shown}: {escape(key)}: a text in it is not UTF-8")
        return Strings(found, starts)


def _is_utf8(data: bytes, starts: array[int]) -> bool:
    """Whether each text is UTF-8: many in a row are, and none begins within a character."""
    for first in range(0, len(starts) - 1, _TEXTS):
        texts = [data[start + 8 : stop] for start, stop in pairwise(starts[first : first + _TEXTS + 1])]
        try:
            b"".join(texts).decode()
        except UnicodeDecodeError:
            return False
        if any(text and text[0] & 0xC0 == 0x80 for text in texts):
            return False
    return True
