"""Llama 3's tokenizer: `tokenizer.model` with a line `base64 rank` for each token, or a `tokenizer.json` made of one.

Source: Meta's llama3 and llama-models (tokenizer.py), tiktoken (load.py), transformers (TikTokenConverter).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.tokenizers.tokenizer_json import TokenizerJson
from weightops.layouts.tokenizers.tokens import MAX_MERGES, MAX_TOKEN_BYTES, MAX_TOKENS, Kind, Token, Tokenizer

Generation = Literal["3", "3.1"]
"""Which special tokens there are: those of Llama 3, or those of 3.1, 3.2, 3.3 and Llama Guard 3."""

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""What cuts a text into the pieces within which tokens are merged."""

SPECIALS = 256


def _specials(first: str, reserved: int) -> tuple[str, ...]:
    names = [f"<|{name}|>" for name in first.split()]
    names += [f"<|reserved_special_token_{reserved + i}|>" for i in range(SPECIALS - len(names))]
    return tuple(names)


# Names as in the published Hugging Face repositories: Meta's later code calls the sixth of 3.1 <|step_id|>, and counts
# the reserved ones after it from 2. No file of Meta's holds the names, and none of these is ever in a text.
SPECIAL_TOKENS: Mapping[Generation, tuple[str, ...]] = {
    "3": _specials(
        "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 reserved_special_token_2"
        " reserved_special_token_3 start_header_id end_header_id reserved_special_token_4 eot_id",
        5,
    ),
    "3.1": _specials(
        "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id"
        " reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag",
        3,
    ),
}
"""The special tokens that follow the ranks, in order of their ids."""

_BOS, _EOS, _EOM, _EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"


def _byte_alphabet() -> str:
    """A visible character for each byte, as in GPT-2: itself where it is one, or else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in visible else next(others)) for byte in range(256))


ALPHABET = _byte_alphabet()
_TO_UNICODE = dict(enumerate(ALPHABET))
_FROM_UNICODE = {ord(character): byte for byte, character in enumerate(ALPHABET)}


def to_unicode(data: bytes) -> str:
    """Bytes as tokenizer.json writes them: one visible character each."""
    return data.decode("latin-1").translate(_TO_UNICODE)


def from_unicode(text: str) -> bytes:
    """The bytes that `to_unicode` wrote; raises `ValueError` for characters that it never writes."""
    try:
        return bytes([_FROM_UNICODE[ord(character)] for character in text])
    except KeyError:
        raise ValueError(text) from None


def parse(data: bytes, *, generation: Generation, instruct: bool, what: str = "tokenizer.model") -> Tokenizer:
    """The tokenizer in the bytes of Llama 3's `tokenizer.model`, with the special tokens that code adds to it.

    `instruct`: whether ends of turns end a text as well. `what` names the file in errors; raises `CorruptInput`.
    """
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        rank, token = _line(line, f"{what}: line {number}")
        if rank in ranks:
            raise CorruptInput(f"{what}: line {number}: the rank {rank} has been given before")
        ranks[rank] = token
    gap = next((rank for rank in range(len(ranks)) if rank not in ranks), None)
    if gap is not None:
        raise CorruptInput(f"{what}: no line has the rank {gap}, though {len(ranks)} lines have others")
    tokens = [ranks[rank] for rank in range(len(ranks))]
    _check(tokens, what)
    specials = [Token(name.encode(), Kind.CONTROL) for name in SPECIAL_TOKENS[generation]]
    tokenizer = _tokenizer(tokens, specials, data, what)
    return as_instruct(tokenizer, what) if instruct else tokenizer


def as_instruct(tokenizer: Tokenizer, what: str) -> Tokenizer:
    """The tokenizer of an instruct model: ends of messages and turns end what it says, too."""
    ids = [_find(tokenizer.tokens, name) for name in (_EOS, _EOM, _EOT)]
    if ids[-1] is None:
        raise CorruptInput(f"{what}: there is no token {_EOT}")
    return replace(tokenizer, eos_ids=tuple(i for i in ids if i is not None))


def rank_file(tokenizer: Tokenizer) -> bytes:
    """The `tokenizer.model` of such a tokenizer.

    Raises `UsageError` unless it has 256 special tokens, since Meta's code adds as many to any file.
    """
    ranks = [token.data for token in tokenizer.tokens if token.kind is Kind.NORMAL]
    specials = len(tokenizer.tokens) - len(ranks)
    if tokenizer.kind != "ranks" or specials != SPECIALS:
        raise UsageError(
            f"the tokenizer has {specials} special tokens, expected {SPECIALS}, as Meta's code adds to tokenizer.model",
            hint="tokens that were added later have no place in Meta's layout",
        )
    return _render(ranks)


def merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes up a token: by its rank, then by the ranks of the two.

    Raises `CorruptInput` if they are absurdly many.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    result: list[tuple[bytes, bytes]] = []
    for token in tokens:
        pairs = [
            (ranks[left], ranks[right])
            for cut in range(1, len(token))
            if (left := token[:cut]) in ranks and (right := token[cut:]) in ranks
        ]
        result += [(tokens[left], tokens[right]) for left, right in sorted(pairs)]
        if len(result) > MAX_MERGES:
            raise CorruptInput(f"the tokenizer's tokens can be merged in over {MAX_MERGES} ways")
    return result


def from_tokenizer_json(found: TokenizerJson, what: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer in a `tokenizer.json` of Llama 3, with the special tokens that it names, as of a base model.

    The rank file is made anew, which works because ids of tokens are ranks: merges are checked to say the same.
    Raises `CorruptInput` for a damaged file, and `UsageError` for tokenizers of other kinds.
    """
    if not _cuts_like_llama(found.document):
        raise UsageError(
            f"{what}: not a tokenizer of Llama 3, nor of sentencepiece's kind: tokenizer.model cannot hold it",
            hint="--to gguf takes it; --no-tokenizer converts the weights alone",
        )
    vocabulary, added = found.vocabulary, found.added
    count = len(vocabulary.keys() - {token.data.decode() for token in added.values()})
    ranks = {number: token for token, number in vocabulary.items() if number not in added}
    try:
        tokens = [from_unicode(ranks[number]) for number in range(count)]
        specials = [added[number] for number in range(count, count + len(added))]
    except KeyError as missing:
        raise CorruptInput(f"{what}: no token has the id {missing}") from None
    except ValueError as error:
        raise CorruptInput(f"{what}: the token {escape(str(error))!r} does not stand for bytes") from None
    _check(tokens, what)
    _check_merges(found.merges, tokens, what)
    return _tokenizer(tokens, specials, _render(tokens), what)


def _line(line: bytes, where: str) -> tuple[int, bytes]:
    parts = line.split(b" ")
    if len(parts) != 2:
        raise CorruptInput(f"{where}: expected a token in base64, a space and its rank, found {_show(line)}")
    text, rank = parts
    try:
        token = base64.b64decode(text, validate=True)
    except binascii.Error:
        token = b""
    if base64.b64encode(token) != text or not token:
        raise CorruptInput(f"{where}: expected a token in base64, found {_show(text)}")
    if not rank.isdigit() or len(rank) > 7 or b"%d" % int(rank) != rank:
        raise CorruptInput(f"{where}: expected a rank, found {_show(rank)}")
    return int(rank), token


def _show(data: bytes) -> str:
    return repr(escape(data[:80].decode("utf-8", "replace")))


def _check(tokens: Sequence[bytes], what: str) -> None:
    if len(tokens) > MAX_TOKENS:
        raise CorruptInput(f"{what}: {len(tokens)} tokens, at most {MAX_TOKENS} are read")
    long = max((len(token) for token in tokens), default=0)
    if long > MAX_TOKEN_BYTES:
        raise CorruptInput(f"{what}: a token of {long} bytes, at most {MAX_TOKEN_BYTES} are read")
    known = set(tokens)
    if len(known) != len(tokens):
        raise CorruptInput(f"{what}: {len(tokens) - len(known)} tokens occur twice")
    missing = [byte for byte in range(256) if bytes([byte]) not in known]
    if missing:
        raise CorruptInput(f"{what}: no token for the byte {missing[0]:#04x}, so not every text can be written")


def _tokenizer(tokens: Sequence[bytes], specials: Sequence[Token], data: bytes, what: str) -> Tokenizer:
    everything = (*map(Token, tokens), *specials)
    bos, eos = _find(everything, _BOS), _find(everything, _EOS)
    if bos is None or eos is None:
        raise CorruptInput(f"{what}: there is no token {_BOS if bos is None else _EOS}")
    return Tokenizer(kind="ranks", tokens=everything, bos_id=bos, eos_ids=(eos,), add_dummy_prefix=False, data=data)


def _find(tokens: Sequence[Token], name: str) -> int | None:
    data = name.encode()
    return next((i for i, t in enumerate(tokens) if t.data == data and t.kind is Kind.CONTROL), None)


def _render(tokens: Iterable[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def _cuts_like_llama(document: Mapping[str, Any]) -> bool:
    """Whether text is cut by Llama 3's pattern and nothing else, and written as bytes."""
    match document:
        case {
            "model": {"type": "BPE"},
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            },
        }:
            return bool(pattern == PATTERN and document.get("normalizer") is None)
    return False


def _check_merges(pairs: Iterable[tuple[str, str]], tokens: Sequence[bytes], what: str) -> None:
    """Refuse merges in another order than that of ranks, as of a vocabulary whose ids are not ranks.

    Writers list all pairs that make up a token, or only the one that happens: either is taken.
    """
    expected = {(to_unicode(a), to_unicode(b)): a + b for a, b in merges(tokens)}
    ranks = {token: rank for rank, token in enumerate(tokens)}
    before, made = -1, set()
    for pair in pairs:
        token = expected.get(pair)
        if token is None:
            raise CorruptInput(f"{what}: merges: {escape(repr(' '.join(pair)))} does not make up a token of two")
        rank = ranks[token]
        if rank < before:
            raise UsageError(f"{what}: merges are not in the order of ids, so ids are no ranks as in Llama 3")
        before = rank
        made.add(token)
    lacking = len(set(expected.values()) - made)
    if lacking:
        raise CorruptInput(f"{what}: merges: none makes up {lacking} tokens that two others make up")
