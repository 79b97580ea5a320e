"""Which tokens a tokenizer needs to cut a corpus as it does, and to spell any text that it could spell.

BPE needs the tokens on the way too: whatever is merged into a token that is kept. So for each token that is kept, the
parts of all merges that make it are. Then no merge that happened in the corpus is gone, those that are gone never did,
and the others keep their order. Of Unigram models the best path stays the best while its pieces are there; WordPiece
takes the longest piece that there is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import xxhash

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.tokenizers.files import TOKENIZER
from weightops.layouts.tokenizers.pieces import Pieces
from weightops.layouts.tokenizers.ranks import ALPHABET
from weightops.layouts.tokenizers.tokenizer_json import is_byte, merge_pairs
from weightops.layouts.tokenizers.tokens import Kind

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
_BATCH = 1000
Parts = dict[str, set[str]]
"""By token the tokens that are merged into it."""


class Cuts:
    """How texts were cut into tokens, as a digest: two tokenizers that have the same one cut them alike."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def add(self, tokens: Iterable[str]) -> None:
        """The next text's tokens."""
        self._state.update("\0".join(tokens).encode() + b"\n")

    @property
    def digest(self) -> str:
        return self._state.hexdigest()


def opened(data: bytes, where: str) -> Tokenizer:
    """A tokenizer.json as the tokenizers library reads it; raises `CorruptInput`."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no other
        raise CorruptInput(f"{where}/{TOKENIZER}: {escape(str(error))[:300]}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokens_of(
    document: Mapping[str, Any], tokenizer: Tokenizer, texts: Iterable[str], where: str, cuts: Cuts
) -> set[str]:
    """The tokens of a tokenizer.json's model that texts need, and those that spell any text; see `parts_of` for BPE.

    How the texts are cut goes into `cuts`.

    Raises `UsageError` for kinds of models that nobody here knows.
    """
    model = document["model"]
    kind = kind_of(model)
    if kind == "Unigram":
        scores = dict(model["vocab"])
        used = _used(tokenizer, texts, cuts)
        spelled = _spelled(scores, bool(model.get("byte_fallback")))
        unknown = model.get("unk_id")
        return used | spelled | _extremes(scores) | ({model["vocab"][unknown][0]} if unknown is not None else set())
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    own = {unknown} if unknown is not None else set()
    if kind == "BPE":
        letters = set(ALPHABET) if is_byte_level(document) else None
        spelled = _spelled(vocabulary, bool(model.get("byte_fallback")), letters)
        return own | spelled | _used(tokenizer, texts, cuts)
    if kind == "WordLevel":
        return own | _used(tokenizer, texts, cuts)
    if kind == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        kept = _spelled(vocabulary, False, prefix=prefix)
        return own | kept | set(_of_words(tokenizer, texts, vocabulary, prefix, cuts))
    raise UsageError(
        f"{where}/{TOKENIZER}: a model of the kind {escape(str(kind))[:80]}, of which no tokens are taken out",
        hint="known are BPE, Unigram, WordPiece and WordLevel",
    )


def kind_of(model: Mapping[str, Any]) -> str:
    """The kind of a tokenizer.json's model, which old files leave out."""
    return str(model.get("type") or ("BPE" if "merges" in model else None))


def is_byte_level(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json turns bytes into visible characters, as GPT-2's does."""
    return any("ByteLevel" in str(document.get(key)) for key in ("pre_tokenizer", "normalizer"))


def parts_of(model: Mapping[str, Any], where: str) -> Parts:
    """By token the tokens of every merge that makes it, of a BPE model in tokenizer.json."""
    prefix = model.get("continuing_subword_prefix") or ""
    found: Parts = {}
    for left, right in merge_pairs(model.get("merges"), f"{where}/{TOKENIZER}: merges"):
        found.setdefault(left + right.removeprefix(prefix), set()).update((left, right))
    return found


def with_parts(tokens: Iterable[str], *parts: Parts) -> set[str]:
    """Tokens, and all that is merged into them."""
    found = set(tokens)
    todo = list(found)
    while todo:
        token = todo.pop()
        new = {part for each in parts for part in each.get(token, ())} - found
        found |= new
        todo += new
    return found


def pieces_of(model: Pieces, data: bytes, texts: Iterable[str], cuts: Cuts) -> set[str]:
    """The pieces of a sentencepiece model that texts need, those that spell any text, and those of other kinds."""
    normal = {p.text: p.score for p in model.pieces if p.kind is Kind.NORMAL}
    others = {p.text for p in model.pieces if p.kind is not Kind.NORMAL}
    used: set[str] = set()
    for pieces in encoded_pieces(data, texts):
        cuts.add(pieces)
        used.update(pieces)
    found = others | (used & normal.keys()) | _spelled(normal, model.has_bytes)
    return found if model.is_bpe else found | _extremes(normal)


def parts_of_pieces(model: Pieces) -> Parts:
    """By piece what may be merged into it: of sentencepiece's BPE any two pieces that make it up."""
    known = {piece.text for piece in model.pieces if piece.kind in (Kind.NORMAL, Kind.UNUSED)}
    found: Parts = {}
    for text in known if model.is_bpe else ():
        for cut in range(1, len(text)):
            if text[:cut] in known and text[cut:] in known:
                found.setdefault(text, set()).update((text[:cut], text[cut:]))
    return found


def _used(tokenizer: Tokenizer, texts: Iterable[str], cuts: Cuts) -> set[str]:
    used: set[str] = set()
    for tokens in encoded(tokenizer, texts):
        cuts.add(tokens)
        used.update(tokens)
    return used


def encoded_pieces(data: bytes, texts: Iterable[str]) -> Iterator[list[str]]:
    """The pieces of each text, by a sentencepiece model."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=data)
    for batch in _batches(texts):
        yield from ([processor.id_to_piece(i) for i in ids] for ids in processor.encode(batch))


def encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[str]]:
    """The tokens of each text, without those that are put around it."""
    for batch in _batches(texts):
        yield from (each.tokens for each in tokenizer.encode_batch(batch, add_special_tokens=False))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _spelled(
    vocabulary: Collection[str], has_bytes: bool, letters: set[str] | None = None, prefix: str = ""
) -> set[str]:
    """The tokens that spell any text: of bytes, of the letters that stand for them, or of single characters."""
    if has_bytes:
        return {text for text in vocabulary if is_byte(text)}
    if letters is not None:
        return {text for text in vocabulary if text in letters}
    starts = (SPACE, prefix) if prefix else (SPACE,)
    ends = ("</w>",)
    return {text for text in vocabulary if len(_bare(text, starts, ends)) <= 1}


def _bare(text: str, starts: tuple[str, ...], ends: tuple[str, ...]) -> str:
    for start in starts:
        text = text.removeprefix(start)
    for end in ends:
        text = text.removesuffix(end)
    return text


def _extremes(scores: Mapping[str, float]) -> set[str]:
    """Pieces with the lowest and the highest score: what is unknown or defined by users is scored by them."""
    return {min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)} if scores else set()


def _of_words(
    tokenizer: Tokenizer, texts: Iterable[str], vocabulary: Mapping[str, int], prefix: str, cuts: Cuts
) -> Iterator[str]:
    """The pieces of texts, and those of words that fail after some: without them a shorter piece would be taken."""
    yield from _used(tokenizer, texts, cuts)
    words: set[str] = set()
    for text in texts if tokenizer.pre_tokenizer else ():
        clean = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(clean))
    for word in words:
        start = 0
        while start < len(word):
            before = prefix if start else ""
            stops = range(len(word), start, -1)
            stop = next((stop for stop in stops if before + word[start:stop] in vocabulary), None)
            if stop is None:
                break
            yield before + word[start:stop]
            start = stop
