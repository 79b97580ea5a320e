"""Reads the sentencepiece models of LLaMA 1 and 2, Code Llama and Mistral: `tokenizer.model`, a protobuf message.

Source: sentencepiece_model.proto, and the checks that the library itself makes when it loads a model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import TypeVar

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.tokenizers.tokens import MAX_TOKEN_BYTES, MAX_TOKENS, Kind, Token, Tokenizer

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_BPE = 2

# By number of field: its wire type. Other fields say how the model was trained, and are skipped.
_MODEL = {1: _BYTES, 2: _BYTES, 3: _BYTES}
_PIECE = {1: _BYTES, 2: _FIXED32, 3: _VARINT}
_TRAINER = {3: _VARINT, 24: _VARINT, 35: _VARINT, 46: _BYTES, 47: _BYTES, 48: _BYTES}
_NORMALIZER = {2: _BYTES, 3: _VARINT, 4: _VARINT, 5: _VARINT}

_T = TypeVar("_T", int, bytes)


def parse(data: bytes, what: str) -> Tokenizer:
    """The tokenizer in the bytes of a `tokenizer.model`; `what` names the file in errors.

    Raises `CorruptInput` for what the sentencepiece library would not load either, and `UsageError` for models that
    no LLaMA uses: unigram ones, and those that rewrite text before they cut it.
    """
    tokens: list[Token] = []
    specs: dict[int, bytes] = {}
    for number, value in fields(data, _MODEL, what):
        assert isinstance(value, bytes)
        if number == 1:
            if len(tokens) == MAX_TOKENS:
                raise CorruptInput(f"{what}: over {MAX_TOKENS} pieces")
            tokens.append(_piece(value, f"{what}: piece {len(tokens)}"))
        elif number in specs:
            raise CorruptInput(f"{what}: field {number} occurs twice")
        else:
            specs[number] = value
    if not tokens or len(specs) != 2:
        raise CorruptInput(
            f"{what}: {len(tokens)} pieces and {len(specs)} of 2 parts on training and normalisation: cut short, or no"
            " sentencepiece model"
        )
    spec = _message(specs[2], _TRAINER, f"{what}: trainer")
    _check_trainer(spec, what)
    add_dummy_prefix = _check_normalizer(_message(specs[3], _NORMALIZER, f"{what}: normaliser"), what)
    ids = _check_pieces(tokens, byte_fallback=bool(_get(spec, 35, 0)), what=what)

    def control(number: int, default: bytes) -> int | None:
        """The id of a token by the name in the trainer's field: as the library does it, not by the id stored there."""
        found = ids.get(_get(spec, number, b"") or default)
        return found if found is not None and tokens[found].kind is Kind.CONTROL else None

    eos = control(47, b"</s>")
    return Tokenizer(
        kind="sentencepiece",
        tokens=tuple(tokens),
        bos_id=control(46, b"<s>"),
        eos_ids=() if eos is None else (eos,),
        unk_id=next(i for i, token in enumerate(tokens) if token.kind is Kind.UNKNOWN),
        pad_id=control(48, b"<pad>"),
        add_dummy_prefix=add_dummy_prefix,
        data=data,
    )


def _piece(data: bytes, where: str) -> Token:
    fields = _message(data, _PIECE, where)
    text = _get(fields, 1, b"")
    (score,) = struct.unpack("<f", _get(fields, 2, b"\0\0\0\0"))
    number = _get(fields, 3, Kind.NORMAL.value)
    if not 0 < len(text) <= MAX_TOKEN_BYTES:
        raise CorruptInput(f"{where}: {len(text)} bytes long, expected 1 to {MAX_TOKEN_BYTES}")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise CorruptInput(f"{where}: not UTF-8") from None
    if not math.isfinite(score):
        raise CorruptInput(f"{where}: its score is {score}, expected a finite number")
    if not 1 <= number <= max(Kind):
        raise CorruptInput(f"{where}: of type {number}, expected 1 to {max(Kind)}")
    return Token(text, Kind(number), score)


def _check_trainer(spec: Mapping[int, int | bytes], what: str) -> None:
    model_type = _get(spec, 3, 1)
    if model_type != _BPE:
        name = _MODEL_TYPES.get(model_type)
        if name is None:
            raise CorruptInput(f"{what}: sentencepiece model of type {model_type}, expected {_BPE} (BPE)")
        raise UsageError(f"{what}: a {name} model of sentencepiece, expected a BPE one as LLaMA has")
    if _get(spec, 24, 0):
        raise UsageError(f"{what}: puts spaces after words, expected before them as in LLaMA")


def _check_normalizer(spec: Mapping[int, int | bytes], what: str) -> bool:
    """Whether a space is put before a text; raises `UsageError` for whatever else would be done to it."""
    hint = "only sentencepiece models that leave text as it is (normalisation rule `identity`) can be converted"
    if _get(spec, 2, b""):
        raise UsageError(f"{what}: rewrites characters before it cuts text into tokens", hint=hint)
    if _get(spec, 4, 1):
        raise UsageError(f"{what}: removes repeated spaces from text", hint=hint)
    if not _get(spec, 5, 1):
        raise UsageError(f"{what}: leaves spaces as they are, expected '\u2581' for them", hint=hint)
    return bool(_get(spec, 3, 1))


def _check_pieces(tokens: list[Token], *, byte_fallback: bool, what: str) -> dict[bytes, int]:
    """The ids of tokens by their text."""
    ids = {token.data: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token.data for i, token in enumerate(tokens) if ids[token.data] != i)
        raise CorruptInput(f"{what}: the piece {escape(twice.decode())!r} occurs twice")
    unknown = sum(token.kind is Kind.UNKNOWN for token in tokens)
    if unknown != 1:
        raise CorruptInput(f"{what}: {unknown} pieces for what is unknown, expected one")
    found = {token.data for token in tokens if token.kind is Kind.BYTE}
    expected = {b"<0x%02X>" % i for i in range(256)} if byte_fallback else set()
    if found != expected:
        raise CorruptInput(f"{what}: {len(found)} pieces for bytes, expected {len(expected)} (<0x00> to <0xFF>)")
    return ids


def _message(data: bytes, known: Mapping[int, int], where: str) -> dict[int, int | bytes]:
    """The known fields of a message, each at most once."""
    result: dict[int, int | bytes] = {}
    for number, value in fields(data, known, where):
        if number in result:
            raise CorruptInput(f"{where}: field {number} occurs twice")
        result[number] = value
    return result


def _get(fields: Mapping[int, int | bytes], number: int, default: _T) -> _T:
    """A field of the type of its default; `fields` has checked which that is."""
    value = fields.get(number, default)
    assert isinstance(value, type(default))
    return value


def fields(data: bytes, known: Mapping[int, int], where: str) -> Iterator[tuple[int, int | bytes]]:
    """The known fields of a message in order: varints as numbers, everything else as its bytes."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at, where)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise CorruptInput(f"{where}: there is no protobuf field {number}")
        if known.get(number, wire) != wire:
            raise CorruptInput(f"{where}: field {number} has wire type {wire}, expected {known[number]}")
        value: int | bytes
        if wire == _VARINT:
            value, at = varint(data, at, where)
        else:
            if wire == _BYTES:
                length, at = varint(data, at, where)
            elif wire in (_FIXED32, _FIXED64):
                length = 4 if wire == _FIXED32 else 8
            else:
                raise CorruptInput(f"{where}: field {number} has wire type {wire}, which is not read")
            if length > len(data) - at:
                raise CorruptInput(f"{where}: cut short, field {number} wants {length} of {len(data) - at} bytes left")
            value, at = data[at : at + length], at + length
        if number in known:
            yield number, value


def varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    """A number of up to 64 bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise CorruptInput(f"{where}: cut short within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise CorruptInput(f"{where}: holds a number of over 64 bits")


def encode_varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])
