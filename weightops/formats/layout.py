"""The layout of a file to be written: known to the byte before any tensor is computed, but for what is compressed.

A container format's writer is a pure function from names and specs to a layout; the engine streams it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Crcs = Mapping[str, int]
"""CRC-32 of each tensor's bytes, by tensor name."""


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes known now."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Data:
    """The bytes of the tensor `name`."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Late:
    """`nbytes` bytes that depend on the CRC-32 of tensors placed before them."""

    nbytes: int
    render: Callable[[Crcs], bytes]


@dataclass(frozen=True, slots=True)
class Coded:
    """The bytes of the tensor `name` in blocks of `block_nbytes`, each as `code` puts it: never more than it has.

    So its `nbytes` are the most that it can take.
    """

    name: str
    nbytes: int
    block_nbytes: int
    code: Callable[[memoryview], bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Lengths:
    """`nbytes` bytes that depend on how many each of the coded blocks placed before them takes."""

    nbytes: int
    render: Callable[[Sequence[int]], bytes]


Piece = Literal | Data | Late | Coded | Lengths


@dataclass(frozen=True, slots=True)
class Layout:
    """A file, piece by piece, without gaps. `aliases` names tensors that share the bytes of an earlier one."""

    pieces: tuple[Piece, ...]
    aliases: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the file: of one that is compressed the most that it can have."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def least_nbytes(self) -> int:
        """Bytes that the file has in any case."""
        return sum(piece.nbytes for piece in self.pieces if not isinstance(piece, Coded))

    @property
    def needs_crc(self) -> bool:
        return any(isinstance(piece, Late) for piece in self.pieces)
