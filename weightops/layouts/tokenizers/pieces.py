"""Fewer pieces in a sentencepiece model, of any kind that sentencepiece has; all else stays as it is, to the byte.

Source: sentencepiece_model.proto and unigram_model.cc of sentencepiece 0.2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from weightops.errors import CorruptInput
from weightops.io.escape import escape
from weightops.layouts.tokenizers.sentencepiece import encode_varint, fields, varint
from weightops.layouts.tokenizers.tokens import MAX_TOKENS, Kind

_VARINT, _BYTES, _FIXED32, _FIXED64 = 0, 2, 5, 1
_PIECES, _TRAINER, _SELF_TEST = 1, 2, 4
_IDS = (40, 41, 42, 43)
"""Of the trainer: unk_id, bos_id, eos_id and pad_id."""
_VOCAB_SIZE, _MODEL_TYPE, _BYTE_FALLBACK = 4, 3, 35
_NONE = (1 << 64) - 1


@dataclass(frozen=True)
class Piece:
    """A piece of a model, and its bytes there."""

    text: str
    score: float
    kind: Kind
    data: bytes


@dataclass(frozen=True)
class Pieces:
    """A sentencepiece model: its pieces by id, and its other fields as `(number, wire type, value)`."""

    pieces: tuple[Piece, ...]
    others: tuple[tuple[int, int, bytes | int], ...]

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The ids of pieces by their text."""
        return {piece.text: i for i, piece in enumerate(self.pieces)}

    @property
    def is_bpe(self) -> bool:
        """Whether pieces are merged, best score first; else the best path of all is taken."""
        return self._trained(_MODEL_TYPE, 1) == 2

    @property
    def has_bytes(self) -> bool:
        """Whether characters that are no pieces become bytes."""
        return bool(self._trained(_BYTE_FALLBACK, 0))

    def _trained(self, number: int, default: int) -> int:
        spec = next((value for n, _, value in self.others if n == _TRAINER and isinstance(value, bytes)), b"")
        found = dict(fields(spec, {number: _VARINT}, "trainer"))
        value = found.get(number, default)
        return value if isinstance(value, int) else default

    def keeping(self, new: Mapping[int, int]) -> bytes:
        """The model with the pieces whose ids `new` has, in their order; those are to become 0, 1, 2, ..."""
        body = b"".join(_field(_PIECES, _BYTES, p.data) for i, p in enumerate(self.pieces) if i in new)
        for number, wire, value in self.others:
            if number == _SELF_TEST:
                continue  # pieces of sample texts, which the library holds itself against when it loads the model
            if number == _TRAINER and isinstance(value, bytes):
                value = _renumbered(value, new, sum(i in new for i in range(len(self.pieces))))
            body += _field(number, wire, value)
        return body


def read_pieces(data: bytes, what: str) -> Pieces:
    """The pieces of a `tokenizer.model`; `what` names it in errors. Raises `CorruptInput`."""
    pieces: list[Piece] = []
    others: list[tuple[int, int, bytes | int]] = []
    for number, wire, value in _all_fields(data, what):
        if number != _PIECES:
            others.append((number, wire, value))
            continue
        if not isinstance(value, bytes) or len(pieces) == MAX_TOKENS:
            raise CorruptInput(f"{what}: piece {len(pieces)}: no message, or over {MAX_TOKENS} of them")
        pieces.append(_piece(value, f"{what}: piece {len(pieces)}"))
    if not pieces or not any(number == _TRAINER for number, _, _ in others):
        raise CorruptInput(f"{what}: {len(pieces)} pieces: cut short, or no sentencepiece model")
    return Pieces(tuple(pieces), tuple(others))


def _piece(data: bytes, where: str) -> Piece:
    found = dict(fields(data, {1: _BYTES, 2: _FIXED32, 3: _VARINT}, where))
    text, score, kind = found.get(1, b""), found.get(2, b"\0\0\0\0"), found.get(3, 1)
    try:
        assert isinstance(text, bytes)
        assert isinstance(score, bytes)
        assert isinstance(kind, int)
        return Piece(text.decode(), struct.unpack("<f", score)[0], Kind(kind), data)
    except (UnicodeDecodeError, ValueError):
        raise CorruptInput(f"{where}: {escape(repr(text))[:80]} of kind {kind!r} is no piece") from None


def _renumbered(spec: bytes, new: Mapping[int, int], count: int) -> bytes:
    """The trainer's part: how many pieces there are, and the ids of special ones."""
    result = b""
    for number, wire, value in _all_fields(spec, "trainer"):
        if number == _VOCAB_SIZE:
            value = count
        elif number in _IDS and isinstance(value, int) and value < 1 << 31:
            value = new.get(value, _NONE)
        result += _field(number, wire, value)
    return result


def _all_fields(data: bytes, where: str) -> Iterator[tuple[int, int, bytes | int]]:
    at = 0
    while at < len(data):
        tag, start = varint(data, at, where)
        ((number, value),) = fields(data[at : _end(data, start, tag & 7, where)], {tag >> 3: tag & 7}, where)
        yield number, tag & 7, value
        at = _end(data, start, tag & 7, where)


def _end(data: bytes, at: int, wire: int, where: str) -> int:
    """Where a value ends that begins at `at`."""
    if wire == _BYTES:
        length, at = varint(data, at, where)
        return min(at + length, len(data))
    if wire == _VARINT:
        return varint(data, at, where)[1]
    return at + (4 if wire == _FIXED32 else 8)


def _field(number: int, wire: int, value: bytes | int) -> bytes:
    head = encode_varint(number << 3 | wire)
    if isinstance(value, int):
        return head + encode_varint(value)
    return head + (encode_varint(len(value)) if wire == _BYTES else b"") + value
