"""Tokenizers of the LLaMA family, apart from the files they come in."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Literal

from weightops.errors import CorruptInput, UsageError
from weightops.formats import sniff
from weightops.layouts.tokenizer_files import (
    CONFIG,
    GENERATION,
    PIECES,
    SENTENCEPIECE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TokenizerFiles,
)

MAX_FILE_BYTES = 1 << 25
MAX_TOKENS = 1 << 19
MAX_TOKEN_BYTES = 512
MAX_MERGES = 1 << 21
"""Far above any real tokenizer, and low enough that a hostile one costs half a minute."""


class Kind(enum.IntEnum):
    """What a token is; the numbers are those of sentencepiece's `ModelProto.SentencePiece.Type`, and of ggml."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its text for sentencepiece, its bytes for ranks; `score` orders merges for sentencepiece."""

    data: bytes
    kind: Kind = Kind.NORMAL
    score: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """All tokens by id, special ones included, and the ids that a model needs.

    `sentencepiece`: LLaMA 1 and 2, Mistral: BPE over characters by score, with byte fallback. `ranks`: Llama 3:
    byte-level BPE, where the rank of a token is its id. `eos_ids`: the first ends a text; all of them end what an
    instruct model says. `data` are the bytes of the file `tokenizer.model` that it came from, or that it makes.
    """

    kind: Literal["sentencepiece", "ranks"]
    tokens: tuple[Token, ...] = field(repr=False)
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unk_id: int | None = None
    pad_id: int | None = None
    add_dummy_prefix: bool = True
    data: bytes = field(repr=False)


def refuse_larger(count: int, rows: int, what: str) -> None:
    """Raise `UsageError` for a tokenizer with more tokens than an embedding has rows; `what` names it."""
    if count > rows:
        raise UsageError(
            f"{what}: the tokenizer has {count} tokens, the embedding only {rows} rows",
            hint="is it that of this model? --tokenizer names another, --no-tokenizer does without",
        )


def count_tokens(files: TokenizerFiles, rows: int) -> int | None:
    """How many tokens a tokenizer has, without those that were added behind the `rows` of the embedding.

    None if there is no tokenizer. Raises `CorruptInput`, and `UsageError` as `refuse_larger` does.
    """
    from weightops.layouts import sentencepiece
    from weightops.layouts.tokenizer_json import read_tokenizer_json

    name = _decisive(files)
    if name is None:
        return None
    data, what = files.files[name], files.shown(name)
    if name == PIECES:
        count = len(sentencepiece.parse(data, what).tokens)
    else:
        found = read_tokenizer_json(data, what)
        count = max([*found.vocabulary.values(), *found.added], default=-1) + 1
    refuse_larger(count, rows, what)
    return max([count, *(number + 1 for number, _, _ in files.added() if number < rows)])


def _decisive(files: TokenizerFiles) -> str | None:
    """The file that has the tokens: tokenizer.model, but for a list of ranks, which says less than tokenizer.json."""
    names = [name for name in (PIECES, TOKENIZER) if name in files]
    for name in names:
        _refuse_stand_ins(files.files[name], files.shown(name))
    if len(names) == 2 and not files.files[PIECES].startswith(SENTENCEPIECE):
        return TOKENIZER
    if PIECES in names and len(files.files[PIECES]) > MAX_FILE_BYTES:
        nbytes = len(files.files[PIECES])
        raise CorruptInput(f"{files.shown(PIECES)}: {nbytes} bytes, at most {MAX_FILE_BYTES} are read")
    return names[0] if names else None


def read_tokenizer(
    files: TokenizerFiles, *, generation: Literal["3", "3.1"], instruct: bool | None
) -> Tokenizer | None:
    """The tokenizer of a folder; None if there is none.

    Read are tokenizer.model, or else tokenizer.json; with the latter, what tokenizer_config.json,
    generation_config.json and config.json name as ends stands in for an unknown `instruct`. `generation` and
    `instruct` matter for Llama 3 only (see `ranks`). Raises `CorruptInput` for damaged files, and `UsageError` for
    tokenizers that no tokenizer.model holds, or where an unknown `instruct` is needed.
    """
    # These modules make tokenizers, and so import this one.
    from weightops.layouts import pieces_json, ranks, sentencepiece
    from weightops.layouts.tokenizer_json import read_tokenizer_json

    name = _decisive(files)
    if name is None:
        return None
    data, what = files.files[name], files.shown(name)
    if name == TOKENIZER:
        found = read_tokenizer_json(data, what)
        if found.is_byte_fallback:
            return pieces_json.from_tokenizer_json(found, files)
        tokenizer = ranks.from_tokenizer_json(found, what)
        if instruct is None:
            return replace(tokenizer, eos_ids=_stated_ends(files, tokenizer))
        return ranks.as_instruct(tokenizer, what) if instruct else tokenizer
    if data.startswith(SENTENCEPIECE):
        return sentencepiece.parse(data, what)
    if not data[:1].isalnum() and data[:1] not in (b"+", b"/"):
        raise CorruptInput(f"{what}: neither a sentencepiece model nor a list of ranks in base64")
    if instruct is None:
        raise UsageError(
            f"{what}: does not say whether the model is an instruct one, whose turns end with <|eot_id|>",
            hint="give --set instruct=true or --set instruct=false",
        )
    return ranks.parse(data, generation=generation, instruct=instruct, what=what)


def _refuse_stand_ins(data: bytes, what: str) -> None:
    if data.startswith(sniff.LFS_MAGIC):
        raise CorruptInput(
            f"{what}: this is a Git LFS pointer, not the tokenizer",
            hint="run `git lfs pull`, or download the file itself",
        )
    sniff.check_head(data[:64], what)
    if not data:
        raise CorruptInput(f"{what}: empty")


def _stated_ends(files: TokenizerFiles, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a text, and whatever else the configuration of an HF folder says ends what the model says."""
    token = files.document(TOKENIZER_CONFIG).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    stated = {i for i, t in enumerate(tokenizer.tokens) if isinstance(text, str) and t.data == text.encode()}
    for name in (GENERATION, CONFIG):
        ids = files.document(name).get("eos_token_id")
        stated |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
    (end,) = tokenizer.eos_ids
    return (end, *sorted(i for i in stated if i != end and 0 <= i < len(tokenizer.tokens)))
