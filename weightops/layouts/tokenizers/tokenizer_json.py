"""tokenizer.json, the form that the tokenizers library reads: its parts, each held against what there can be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightops.errors import CorruptInput
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.layouts.tokenizers.tokens import MAX_MERGES, MAX_TOKEN_BYTES, MAX_TOKENS, Kind, Token


@dataclass(frozen=True)
class TokenizerJson:
    """`model` is its type (BPE, Unigram, ...), `vocabulary` its tokens by text, `added` those beside it by id.

    `merges` are those of a BPE model in their order, `document` all there is.
    """

    document: Mapping[str, Any]
    model: str
    vocabulary: Mapping[str, int]
    added: Mapping[int, Token]
    merges: tuple[tuple[str, str], ...]

    @property
    def is_byte_fallback(self) -> bool:
        """Whether it is sentencepiece's kind of BPE, which falls back to bytes for characters that it lacks."""
        return self.model == "BPE" and self.document["model"].get("byte_fallback") is True


def read_tokenizer_json(data: bytes, what: str) -> TokenizerJson:
    """The parts of a tokenizer.json, of other models than BPE without a vocabulary; raises `CorruptInput`."""
    document = strict_json.load_object(data, what)
    model = document.get("model")
    if not isinstance(model, dict):
        raise CorruptInput(f"{what}: has no model")
    kind = str(model.get("type", "BPE" if "merges" in model else None))
    added = added_tokens(document.get("added_tokens"), f"{what}: added_tokens")
    if kind != "BPE":
        return TokenizerJson(document, kind, {}, added, ())
    vocabulary = token_ids(model.get("vocab"), f"{what}: vocab")
    for token, number in vocabulary.items():
        if number in added and added[number].data != token.encode():
            raise CorruptInput(f"{what}: the id {number} is given to two tokens")
    return TokenizerJson(document, kind, vocabulary, added, merge_pairs(model.get("merges"), f"{what}: merges"))


def is_byte(text: str) -> bool:
    """Whether a token stands for a byte, as sentencepiece's do."""
    return re.fullmatch("<0x[0-9A-Fa-f]{2}>", text) is not None


def token_ids(value: object, where: str) -> dict[str, int]:
    """The ids of tokens by their text."""
    if not isinstance(value, dict) or len(value) > MAX_TOKENS:
        raise CorruptInput(f"{where}: expected an object of at most {MAX_TOKENS} tokens")
    for token, number in value.items():
        if type(number) is not int or number < 0:
            raise CorruptInput(f"{where}: the id of {escape(token)[:80]!r} is no number")
        if len(token) > MAX_TOKEN_BYTES:
            raise CorruptInput(f"{where}: a token of {len(token)} characters, at most {MAX_TOKEN_BYTES} are read")
    if len(set(value.values())) != len(value):
        raise CorruptInput(f"{where}: an id is given to two tokens")
    return value


def added_tokens(value: object, where: str) -> dict[int, Token]:
    """Added tokens by id; those that are not special are kept as what users define."""
    result: dict[int, Token] = {}
    for entry in value if isinstance(value, list) else [None]:
        match entry:
            case {"id": int(number), "content": str(content), "special": bool(special)} if content:
                if number in result or len(result) == MAX_TOKENS:
                    raise CorruptInput(f"{where}: the id {number} is given to two tokens")
                result[number] = Token(content.encode(), Kind.CONTROL if special else Kind.USER_DEFINED)
            case _:
                raise CorruptInput(f"{where}: expected a list of objects with id, content and special")
    if len({token.data for token in result.values()}) != len(result):
        raise CorruptInput(f"{where}: a token occurs twice")
    return result


def merge_pairs(value: object, where: str) -> tuple[tuple[str, str], ...]:
    """Merges in their order, written as `left right` or, since transformers 4.45, as two texts."""
    if not isinstance(value, list) or len(value) > MAX_MERGES:
        raise CorruptInput(f"{where}: expected a list of at most {MAX_MERGES} pairs")
    pairs = []
    for entry in value:
        match entry.split(" ") if isinstance(entry, str) else entry:
            case [str(left), str(right)]:
                pairs.append((left, right))
            case _:
                raise CorruptInput(f"{where}: {escape(repr(entry))[:80]} is no pair of tokens")
    return tuple(pairs)
