"""Tokenizers as Hugging Face folders hold them: tokenizer.json, which needs no other library, and its companions.

`tokenizer_class` is PreTrainedTokenizerFast, with which transformers 4 and 5 take tokenizer.json as it is: with
LlamaTokenizer, 5 builds another pipeline, which loses one of several spaces at the beginning of a text.
Source: transformers (convert_slow_tokenizer.py, convert_llama_weights_to_hf.py of 4.47), sentencepiece (bpe_model.cc).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from weightops.errors import CorruptInput
from weightops.io import strict_json
from weightops.layouts.tokenizers import ranks
from weightops.layouts.tokenizers.files import CONFIG, GENERATION, TOKENIZER_CONFIG, TokenizerFiles
from weightops.layouts.tokenizers.special_vocab import special_vocab
from weightops.layouts.tokenizers.tokens import MAX_MERGES, Kind, Token, Tokenizer

_SPACE = "\u2581"


def hf_files(tokenizer: Tokenizer, context_length: int | None) -> dict[str, bytes]:
    """The tokenizer's files in a Hugging Face folder, by name; `context_length` is in tokens, None if unknown.

    Encoding with them prepends the bos token and else equals sentencepiece or tiktoken, but for two things: text that
    spells out a special token is taken for it, as transformers does; and see `inexact`. Raises `CorruptInput` for
    tokenizers that can be merged in absurdly many ways.
    """
    named = _named_tokens(tokenizer)
    config: dict[str, Any] = {
        **named,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if context_length is not None:
        config["model_max_length"] = context_length
    if tokenizer.kind == "sentencepiece":
        # For readers of tokenizer.model: tokenizer.json says so itself.
        config |= {"add_bos_token": tokenizer.bos_id is not None, "add_eos_token": False}
    document = sentencepiece_document(tokenizer) if tokenizer.kind == "sentencepiece" else _ranks(tokenizer)
    files = {
        "special_tokens_map.json": strict_json.dumps(named),
        "tokenizer.json": json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(),
        "tokenizer_config.json": strict_json.dumps(config),
    }
    return files | ({"tokenizer.model": tokenizer.data} if tokenizer.kind == "sentencepiece" else {})


def files_of(tokenizer: Tokenizer | None, files: TokenizerFiles) -> TokenizerFiles:
    """The files that a folder of transformers has: `files` if they are such, or what a tokenizer of LLaMA makes."""
    if tokenizer is None or files.is_hugging_face:
        return files
    made = hf_files(tokenizer, None)
    config = strict_json.load_object(made[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
    if tokenizer.kind == "sentencepiece" and not tokenizer.add_dummy_prefix:
        config["add_prefix_space"] = False
    defined = {
        str(i): {"content": token.data.decode(), "special": False}
        for i, token in enumerate(tokenizer.tokens)
        if token.kind is Kind.USER_DEFINED
    }
    if defined:
        config["added_tokens_decoder"] = defined
    made |= {TOKENIZER_CONFIG: strict_json.dumps(config), CONFIG: strict_json.dumps(special_ids(tokenizer))}
    return TokenizerFiles({**made, **files.files}, files.where)


def special_ids(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """What config.json and generation_config.json say of the tokenizer: bos, eos and pad, where there are such."""
    ends = list(tokenizer.eos_ids)
    ids: dict[str, int | list[int] | None] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": (ends[0] if len(ends) == 1 else ends) if ends else None,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def stated_ids(files: TokenizerFiles, rows: int) -> dict[str, int | list[int]]:
    """The same of the files of a tokenizer that go along as they are; what they were generated with comes first."""
    generation = files.document(GENERATION)
    found = special_vocab(files, rows).ids
    ids = {f"{kind}_token_id": found.get(kind) for kind in ("bos", "eos", "pad")}
    ids |= {name: generation[name] for name in ids if name in generation}
    return {name: value for name, value in ids.items() if value is not None}


def inexact(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Why tokenizer.json may cut some texts otherwise than sentencepiece does; empty for a model as it was trained.

    Merges in tokenizer.json stand in one order, and join tokens only.
    """
    if tokenizer.kind != "sentencepiece":
        return ()
    pieces = [(t.data.decode(), t.score) for t in tokenizer.tokens if t.kind in (Kind.NORMAL, Kind.UNUSED)]
    known = {text for text, _ in pieces}
    tied = sum(n for n in Counter(score for text, score in pieces if len(text) > 1).values() if n > 1)
    unused = sum(token.kind is Kind.UNUSED for token in tokenizer.tokens)
    strange = sum(len(text) > 1 and not known.issuperset(text) for text in known)
    symbols = sum(token.kind is Kind.USER_DEFINED for token in tokenizer.tokens) if tokenizer.add_dummy_prefix else 0
    return tuple(
        f"tokenizer.json may cut some texts otherwise than tokenizer.model does: {count} pieces {reason}"
        for count, reason in (
            (tied, "have the score of another, so that which is made first depends on the text"),
            (unused, "are marked as unused"),
            (strange, "hold characters that are no pieces themselves"),
            (symbols, "are defined by users, and get no space before them where they are all there is"),
        )
        if count
    )


def _named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_ids[-1] if tokenizer.eos_ids else None,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    return {name: tokenizer.tokens[i].data.decode() for name, i in ids.items() if i is not None}


def sentencepiece_document(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of a sentencepiece model."""
    texts = [token.data.decode() for token in tokenizer.tokens]
    has_bytes = any(token.kind is Kind.BYTE for token in tokenizer.tokens)
    symbols = [text for text, token in zip(texts, tokenizer.tokens, strict=True) if token.kind is Kind.USER_DEFINED]
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    if tokenizer.add_dummy_prefix and symbols:
        # Added tokens that users define are normalised as texts are, and must come out without the space.
        pattern = rf"\A(?!(?:{'|'.join(map(re.escape, symbols))})?\z)"
        normalizers.insert(0, {"type": "Replace", "pattern": {"Regex": pattern}, "content": _SPACE})
    elif tokenizer.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}] if has_bytes else []
    decoders += [{"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if tokenizer.add_dummy_prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _prepend_bos(tokenizer),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if tokenizer.unk_id is None else texts[tokenizer.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": _merge_list(_merges_by_score(tokenizer.tokens)),
        },
    }


def _ranks(tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = [token.data for token in tokenizer.tokens if token.kind is Kind.NORMAL]
    text = {token: ranks.to_unicode(token) for token in tokens}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": ranks.PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [byte_level, _prepend_bos(tokenizer)]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text[token]: rank for rank, token in enumerate(tokens)},
            "merges": _merge_list((text[left], text[right]) for left, right in ranks.merges(tokens)),
        },
    }


def _added_tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Tokens that are found in text as a whole; only what users define takes part in normalization."""
    return [
        {
            "id": i,
            "content": token.data.decode(),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": token.kind is Kind.USER_DEFINED and tokenizer.kind == "sentencepiece",
            "special": token.kind is not Kind.USER_DEFINED,
        }
        for i, token in enumerate(tokenizer.tokens)
        if token.kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
    ]


def _prepend_bos(tokenizer: Tokenizer) -> dict[str, Any] | None:
    if tokenizer.bos_id is None:
        return None
    name = tokenizer.tokens[tokenizer.bos_id].data.decode()

    def part(letter: str, type_id: int) -> list[dict[str, Any]]:
        bos = {"SpecialToken": {"id": name, "type_id": type_id}}
        return [bos, {"Sequence": {"id": letter, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}},
    }


def _merges_by_score(tokens: Sequence[Token]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes up a piece, in the order in which sentencepiece prefers them.

    Pairs of one score are in the order of transformers: longer left sides first.
    """
    pieces = {token.data.decode(): token.score for token in tokens if token.kind is Kind.NORMAL}
    found: list[tuple[str, str]] = []
    for piece in pieces:
        found += [
            (left, right)
            for cut in range(1, len(piece))
            if (left := piece[:cut]) in pieces and (right := piece[cut:]) in pieces
        ]
        if len(found) > MAX_MERGES:
            raise CorruptInput(f"the tokenizer's pieces can be merged in over {MAX_MERGES} ways")
    return sorted(found, key=lambda pair: (-pieces[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))


def _merge_list(merges: Iterable[tuple[str, str]]) -> list[str] | list[tuple[str, str]]:
    """Merges as all readers know them, or as newer ones do where the older form has two meanings."""
    pairs = list(merges)
    if any(" " in left or " " in right or left.startswith("#version") for left, right in pairs):
        return pairs
    return [f"{left} {right}" for left, right in pairs]
