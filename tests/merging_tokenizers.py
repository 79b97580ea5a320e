"""Small tokenizers whose tokens are easily counted, as files of Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
LETTERS = ("<unk>", "<s>", "</s>", "a", "b", "c", "d")


def entry(number: int, text: str, **flags: bool) -> dict[str, Any]:
    """An added token of a tokenizer.json."""
    return {"id": number, "content": text, **dict.fromkeys(FLAGS, False), "special": True, **flags}


def bpe(merges: Sequence[tuple[str, str]] = (), added: Iterable[str | dict[str, Any]] = ()) -> dict[str, Any]:
    """Seven tokens, those that merges make, then added ones; three of the first are added ones too."""
    vocabulary = {text: i for i, text in enumerate(LETTERS)}
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    tokens = [entry(i, text) for i, text in enumerate(LETTERS[:3])]
    for each in added:
        number = len(vocabulary) + len(tokens) - 3
        tokens.append(entry(number, each) if isinstance(each, str) else {**entry(number, ""), **each})
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocabulary, "merges": [list(pair) for pair in merges],
    }  # fmt: skip
    return document(model, tokens)


def unigram(texts: Sequence[str], added: Sequence[str] = ()) -> dict[str, Any]:
    """Pieces of Unigram, of which the first is the unknown one."""
    model = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [[t, -float(i)] for i, t in enumerate(texts)],
        "byte_fallback": False,
    }
    return document(model, [entry(len(texts) + i, text) for i, text in enumerate(added)])


def document(model: Mapping[str, Any], tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **parts, "added_tokens": list(tokens), "model": model}


def files(tokenizer: Mapping[str, Any], **config: Any) -> dict[str, bytes]:
    """The files of a folder; `config` is what tokenizer_config.json says."""
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    return {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(said).encode()}
