"""The tokenizer part of a GGUF file, from the files of a Hugging Face folder, as llama.cpp's converter takes it.

A sentencepiece model, or a tokenizer.json of that kind, is llama.cpp's tokenizer "llama"; any other BPE is its "gpt2",
with the pre-tokenizer's name.
Source: llama.cpp (TextModel and LlamaModel of its converter), gguf 0.19 (LlamaHfVocab).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.tokenizers import sentencepiece
from weightops.layouts.tokenizers.files import (
    CONFIG,
    GENERATION,
    PIECES,
    SENTENCEPIECE,
    SPECIAL_MAP,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TokenizerFiles,
)
from weightops.layouts.tokenizers.pieces_json import merges_by_score, piece_scores
from weightops.layouts.tokenizers.pretokenizers import name_of
from weightops.layouts.tokenizers.read import refuse_larger
from weightops.layouts.tokenizers.special_vocab import special_vocab
from weightops.layouts.tokenizers.tokenizer_json import TokenizerJson, is_byte, read_tokenizer_json
from weightops.layouts.tokenizers.tokens import Kind

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Metadata = dict[str, dict[str, Any]]

_SPACE, _BYTE_SPACE = "\u2581", "\u0120"
"""What stands for a space in sentencepiece's pieces, and in byte-level tokens."""
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_CODE_LLAMA_ROWS, _CODE_LLAMA_EOT, _GRANITE_ROWS = 32016, 32010, 49152
"""Models that llama.cpp's converter knows by the rows of their embedding, and what it says of them."""
_GEMMA_EOT = 107
_WITH_PIECES = ("llama", "pieces or bytes", "gemma", "gemma2", "gemma3", "phi3")
"""Families whose tokenizer.model is taken where there is one; others have byte-level BPE always."""
_ENDS_BY_NAME = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend▁of▁sentence\uff5c>", "[e~["),
)
"""What llama.cpp takes for an end by its text alone."""


@dataclass(frozen=True)
class Vocabulary:
    """The keys of a GGUF file, in their order, and what of the folder has no place in it."""

    metadata: Metadata
    warnings: tuple[str, ...]


@dataclass
class _Tokens:
    """Tokens by id: text, score and type; for which of llama.cpp's tokenizers, with what else that needs."""

    model: Literal["llama", "gpt2"]
    texts: list[str]
    scores: list[float]
    kinds: list[Kind]
    pre: str = "default"
    merges: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def unused(cls, model: Literal["llama", "gpt2"], count: int) -> _Tokens:
        return cls(model, [f"[PAD{i}]" for i in range(count)], [_UNUSED_SCORE] * count, [Kind.UNUSED] * count)

    def put(self, number: int, text: str, score: float, kind: Kind) -> None:
        self.texts[number], self.scores[number], self.kinds[number] = text, score, kind

    def metadata(self) -> Metadata:
        result: Metadata = {
            _key("model"): {"string": self.model},
            _key("pre"): {"string": self.pre},
            _key("tokens"): {"array": ["string", self.texts]},
        }
        if self.model == "llama":
            result[_key("scores")] = {"array": ["float32", self.scores]}
        result[_key("token_type")] = {"array": ["int32", [int(kind) for kind in self.kinds]]}
        return result | ({_key("merges"): {"array": ["string", self.merges]}} if self.merges else {})


def vocabulary(files: TokenizerFiles, rows: int, family: str = "llama", pre: str | None = None) -> Vocabulary:
    """The tokenizer in the files, of a model whose embedding has `rows`.

    `family` is for which models the converter does otherwise than for LLaMA's: see `weightops.layouts.gguf.families`.
    `pre` is the name of a byte-level BPE's pre-tokenizer where the tokenizer does not tell. Raises `UsageError` where
    there is none, for kinds that llama.cpp has no name for, and for more tokens than rows; `CorruptInput` for damaged
    files.
    """
    metadata = Metadata()
    if family == "llama" and isinstance(prefix := files.document(TOKENIZER_CONFIG).get("add_prefix_space"), bool):
        metadata[_key("add_space_prefix")] = {"bool": prefix}
    tokens, special = _tokens(files, rows, family, pre), special_vocab(files, rows)
    metadata |= tokens.metadata() | special.metadata()
    if family == "llama" and rows == _CODE_LLAMA_ROWS:
        metadata[_key("eot_token_id")] = {"uint32": _CODE_LLAMA_EOT}
    if family == "llama" and rows == _GRANITE_ROWS:
        metadata[_key("add_bos_token")] = {"bool": False}
    if family == "gemma" and rows > _GEMMA_EOT:
        metadata.setdefault(_key("eot_token_id"), {"uint32": _GEMMA_EOT})
    if family in ("gemma", "gemma2", "gemma3") and tokens.model == "llama":
        metadata[_key("add_space_prefix")] = {"bool": False}
    ends = {special.ids[kind] for kind in ("eos", "eot", "eom") if kind in special.ids}
    return Vocabulary(metadata, (*tokens.warnings, *special.warnings, *_other_ends(files, tokens.texts, ends)))


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _tokens(files: TokenizerFiles, rows: int, family: str, pre: str | None) -> _Tokens:
    if family in _WITH_PIECES and files.files.get(PIECES, b"").startswith(SENTENCEPIECE):
        return _of_pieces(files, rows, looks=family != "phi3")
    if TOKENIZER not in files:
        wanted = "neither tokenizer.model nor tokenizer.json" if family in _WITH_PIECES else "no tokenizer.json"
        raise UsageError(f"{files.where}: has no tokenizer that GGUF takes: {wanted}", hint="give --tokenizer FILE")
    found = read_tokenizer_json(files.files[TOKENIZER], files.shown(TOKENIZER))
    return _of_pieces_in_json(found, files, rows) if _is_pieces(found) else _of_bytes(found, files, rows, pre)


def _of_pieces(files: TokenizerFiles, rows: int, looks: bool = True) -> _Tokens:
    """The pieces of a sentencepiece model, those of added_tokens.json, and what tokenizer_config.json says of any.

    Without `looks` no token is special by its text alone, and tokenizer.json has the last word.
    """
    pieces = sentencepiece.parse(files.files[PIECES], files.shown(PIECES)).tokens
    refuse_larger(len(pieces), rows, files.shown(PIECES))
    tokens = _Tokens.unused("llama", rows)
    for number, piece in enumerate(pieces):
        role = Kind.NORMAL if piece.kind is Kind.USER_DEFINED else piece.kind
        tokens.put(number, piece.data.decode(), piece.score, role)
    beyond = set()
    added = list(files.added())
    if not looks and TOKENIZER in files:
        more = read_tokenizer_json(files.files[TOKENIZER], files.shown(TOKENIZER)).added
        added += [(number, t.data.decode(), t.kind is Kind.CONTROL) for number, t in more.items()]
    for number, text, special in added:
        if number >= rows:
            beyond.add((number, text))
        elif special or (looks and special is not None and _looks_special(text)):
            tokens.put(number, text, _ADDED_SCORE, Kind.CONTROL)
        else:
            shown = text.replace(_SPACE, " ") if looks and special is not None else text
            tokens.put(number, shown, _ADDED_SCORE, Kind.USER_DEFINED)
    tokens.warnings += [
        f"the token {escape(text)} ({number}) is left out: the embedding has {rows} rows"
        for number, text in sorted(beyond)
    ]
    return tokens


def _is_pieces(found: TokenizerJson) -> bool:
    match found.document.get("decoder"):
        case {"type": "Sequence"}:
            return found.is_byte_fallback
    return False


def _of_pieces_in_json(found: TokenizerJson, files: TokenizerFiles, rows: int) -> _Tokens:
    """The tokens of a tokenizer.json that was made from a sentencepiece model."""
    named = set(_named_tokens(files))
    if re.match("(Code)?Llama", str(files.document(TOKENIZER_CONFIG).get("tokenizer_class"))):
        named |= {"<s>", "</s>", "<unk>"}  # what these classes take where nothing is named
    count = max([*found.vocabulary.values(), *found.added], default=-1) + 1
    refuse_larger(count, rows, files.shown(TOKENIZER))
    tokens, scores = _Tokens.unused("llama", rows), piece_scores(found)
    if not merges_by_score(found):
        said = "its merges are not in the order of scores, so llama.cpp may cut some texts otherwise"
        tokens.warnings.append(f"{files.shown(TOKENIZER)}: {said}")
    for text, number in found.vocabulary.items():
        kind = Kind.BYTE if is_byte(text) else Kind.CONTROL if text in named else Kind.NORMAL
        # llama.cpp's converter gives all of them one score, and then llama.cpp merges them in another order.
        tokens.put(number, text, scores[text] if kind is Kind.NORMAL else _ADDED_SCORE, kind)
    for number, token in found.added.items():
        if (text := token.data.decode()) not in found.vocabulary:
            tokens.put(number, text, _ADDED_SCORE, Kind.CONTROL if text in named else Kind.USER_DEFINED)
    return tokens


def _of_bytes(found: TokenizerJson, files: TokenizerFiles, rows: int, pre: str | None) -> _Tokens:
    """The tokens of a byte-level BPE."""
    where = files.shown(TOKENIZER)
    if found.model != "BPE":
        raise UsageError(
            f"{where}: a tokenizer of the kind {escape(found.model)[:80]}, expected BPE, as LLaMA has",
            hint="--tokenizer names another",
        )
    backend = _backend(files)
    pre = pre or name_of(backend, found.document, files.document(TOKENIZER_CONFIG))
    if pre is None:
        raise UsageError(
            f"{where}: cuts texts in a way that llama.cpp has no name for, before it merges tokens",
            hint="if you know that it does as one that has a name, give --set pre=NAME; else llama.cpp would make other"
            " tokens; --tokenizer names another, such as that of the base model",
        )
    texts, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
    refuse_larger(max(texts.values(), default=-1) + 1, rows, where)
    tokens = _Tokens.unused("gpt2", rows)
    tokens.pre = pre
    tokens.merges = [" ".join(part.replace(" ", _BYTE_SPACE) for part in pair) for pair in found.merges]
    for text, number in texts.items():
        if number not in added:
            tokens.put(number, text, 0.0, Kind.NORMAL)
            continue
        if not added[number].normalized:  # llama.cpp looks for these in texts as they are
            text = backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if added[number].special or _looks_special(text):
            tokens.put(number, text, 0.0, Kind.CONTROL)
        else:
            tokens.put(number, text.replace(_SPACE, " "), 0.0, Kind.USER_DEFINED)
    return tokens


def _backend(files: TokenizerFiles) -> Tokenizer:
    """The tokenizer as transformers builds it: with the tokens that its other files add or name."""
    from tokenizers import AddedToken, Tokenizer

    try:
        backend = Tokenizer.from_str(files.files[TOKENIZER].decode())
    except Exception as error:  # the library raises no other
        raise CorruptInput(f"{files.shown(TOKENIZER)}: cannot be read: {escape(str(error))[:200]}") from None
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = list(_named_tokens(files))
    listed = sorted(each for each in files.added() if each[2] is not None)
    added = [(text, bool(special) or text in named) for _, text, special in listed]
    for text, special in (*added, *((text, True) for text in named)):
        if text not in known:
            known.add(text)
            backend.add_tokens([AddedToken(text, special=special, normalized=not special)])
    return backend


def _named_tokens(files: TokenizerFiles) -> Iterator[str]:
    """The tokens that have a role by name, and those that are only called special."""
    config, older = (files.document(name) for name in (TOKENIZER_CONFIG, SPECIAL_MAP))
    if "added_tokens_decoder" in config:
        older = {}  # which transformers then takes for what it says already
    both = {**config, **older}
    entries = [both.get(f"{name}_token") for name in _NAMED]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = both.get(name)
        entries += more if isinstance(more, list) else ()
    for entry in entries:
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text:
            yield text


def _looks_special(text: str) -> bool:
    """Whether a token that nobody called special is one, by its text: as llama.cpp's converter decides it."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _other_ends(files: TokenizerFiles, texts: Sequence[str], ends: set[int]) -> Iterator[str]:
    """Ends of a text that the model's configuration states, and a GGUF file does not: it has room for one."""
    said = set(ends)
    for name in (GENERATION, CONFIG):
        stated = files.document(name).get("eos_token_id")
        ids = [i for i in (stated if isinstance(stated, list) else [stated]) if type(i) is int and 0 <= i < len(texts)]
        lost = [i for i in ids if i not in said and texts[i] not in _ENDS_BY_NAME]
        said.update(lost)
        if lost:
            named = ", ".join(f"{escape(texts[i])} ({i})" for i in lost)
            yield f"{name} ends texts with {named} too: left out, since GGUF has a place for one end"
