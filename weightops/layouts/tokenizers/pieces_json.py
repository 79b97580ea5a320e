"""A sentencepiece model out of the tokenizer.json that was made of it, which is all that transformers 5 saves.

The scores of pieces are not kept there, only the order of merges that they led to. Scores that give this order again
cut every text as the original does; where pieces stand in the order of their merges, as LLaMA's do, they are the
original's.
Source: sentencepiece_model.proto, transformers (convert_slow_tokenizer.py, tokenization_llama.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from weightops.errors import CorruptInput, UsageError
from weightops.layouts.tokenizers import sentencepiece
from weightops.layouts.tokenizers.files import TOKENIZER, TOKENIZER_CONFIG, TokenizerFiles
from weightops.layouts.tokenizers.tokenizer_json import TokenizerJson, is_byte
from weightops.layouts.tokenizers.tokens import Kind, Token, Tokenizer

_SPACE = "\u2581"


def piece_scores(found: TokenizerJson) -> dict[str, float]:
    """A score for each token: of two, the one whose merge comes first has the higher.

    Tokens that no merge makes come last.
    """
    made = list(dict.fromkeys(left + right for left, right in found.merges))
    ids = [number for text in made if (number := found.vocabulary.get(text)) is not None]
    if ids == sorted(ids):
        first = ids[0] if ids else 0
        return {text: float(min(0, first - number)) for text, number in found.vocabulary.items()}
    order = {text: -float(i) for i, text in enumerate(made)}
    return {text: order.get(text, -float(len(made))) for text in found.vocabulary}


def from_tokenizer_json(found: TokenizerJson, files: TokenizerFiles) -> Tokenizer:
    """The tokenizer with a `tokenizer.model` made for it; tokens that were added behind the model's are not in it.

    Raises `UsageError` where sentencepiece would not do what the tokenizer does, `CorruptInput` for damaged files.
    """
    what = files.shown(TOKENIZER)
    texts = {number: text for text, number in found.vocabulary.items()}
    if sorted(texts) != list(range(len(texts))):
        raise CorruptInput(f"{what}: {len(texts)} tokens do not have the ids 0 to {len(texts) - 1}")
    if not merges_by_score(found):
        raise UsageError(
            f"{what}: its merges are not those of a sentencepiece model, in the order of scores",
            hint="it was trained by another library, and tokenizer.model cannot hold it; --no-tokenizer does without",
        )
    unknown = found.document["model"].get("unk_token")
    scores = piece_scores(found)
    tokens = []
    for number, text in sorted(texts.items()):
        kind = _kind(number, text, found, unknown)
        tokens.append(Token(text.encode(), kind, scores[text] if kind is Kind.NORMAL else 0.0))
    named = {name: _name(files, name) for name in ("bos", "eos", "pad")} | {"unk": unknown}
    names = {name: text for name, text in named.items() if isinstance(text, str) and text in found.vocabulary}
    data = render(tokens, names, puts_space=_puts_space(found.document, what), has_bytes=True)
    return sentencepiece.parse(data, what)


def render(tokens: Iterable[Token], names: Mapping[str, str], *, puts_space: bool, has_bytes: bool) -> bytes:
    """A tokenizer.model with these tokens; `names` are the texts of unk, bos, eos and pad, as far as there are such."""
    pieces, count = bytearray(), 0
    for token in tokens:
        score = b"\x15" + struct.pack("<f", token.score)
        pieces += _field(1, _field(1, token.data) + score + _field(3, int(token.kind)))
        count += 1
    trainer = _field(3, 2) + _field(4, count) + _field(35, int(has_bytes))
    for number, name in ((45, "unk"), (46, "bos"), (47, "eos"), (48, "pad")):
        if name in names:
            trainer += _field(number, names[name].encode())
    normalizer = _field(1, b"identity") + _field(3, int(puts_space)) + _field(4, 0) + _field(5, 1)
    return bytes(pieces) + _field(2, trainer) + _field(3, normalizer)


def _kind(number: int, text: str, found: TokenizerJson, unknown: object) -> Kind:
    if text == unknown:
        return Kind.UNKNOWN
    if is_byte(text):
        return Kind.BYTE
    return found.added[number].kind if number in found.added else Kind.NORMAL


def _name(files: TokenizerFiles, name: str) -> object:
    token = files.document(TOKENIZER_CONFIG).get(f"{name}_token")
    return token.get("content") if isinstance(token, dict) else token


def _puts_space(document: Mapping[str, Any], what: str) -> bool:
    """Whether a space is put before a text; raises `UsageError` for whatever else would be done to it."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    match document.get("normalizer"), document.get("pre_tokenizer"):
        case {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, step]}, None:
            if step == replaced:
                return True
        case step, None:
            if step in (replaced, {"type": "Sequence", "normalizers": [replaced]}):
                return False
        case None, {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": str(scheme), "split": False}:
            return scheme != "never"
    raise UsageError(
        f"{what}: prepares text in another way than sentencepiece models do that LLaMA has",
        hint="put the tokenizer.model that it was made from into the folder",
    )


def merges_by_score(found: TokenizerJson) -> bool:
    """Whether its merges are what `piece_scores` lead to, where whatever makes up a piece is merged."""
    scores, known = piece_scores(found), found.vocabulary.keys() - {t.data.decode() for t in found.added.values()}
    order = [scores.get(left + right, 1.0) for left, right in found.merges]
    pairs = set(found.merges)
    return order == sorted(order, reverse=True) and all(
        (text[:cut], text[cut:]) in pairs
        for text in known
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    )


def _field(number: int, value: bytes | int) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return sentencepiece.encode_varint(number << 3) + sentencepiece.encode_varint(value)
    return sentencepiece.encode_varint(number << 3 | 2) + sentencepiece.encode_varint(len(value)) + value
