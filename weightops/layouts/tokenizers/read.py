"""Tokenizers of the LLaMA family, apart from the files they come in."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from weightops.errors import CorruptInput, UsageError
from weightops.formats import sniff
from weightops.layouts.tokenizers.files import (
    CONFIG,
    GENERATION,
    PIECES,
    SENTENCEPIECE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TokenizerFiles,
)
from weightops.layouts.tokenizers.tokens import MAX_FILE_BYTES, Tokenizer


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
    from weightops.layouts.tokenizers import sentencepiece
    from weightops.layouts.tokenizers.tokenizer_json import read_tokenizer_json

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
    from weightops.layouts.tokenizers import pieces_json, ranks, sentencepiece
    from weightops.layouts.tokenizers.tokenizer_json import read_tokenizer_json

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
