"""The tokenizer of a GGUF file as the files of a Hugging Face folder.

llama.cpp's tokenizer "llama" becomes a sentencepiece model and the tokenizer.json that is made of one; its "gpt2" a
tokenizer.json of byte-level BPE, with the patterns that its pre-tokenizer's name stands for.
Source: llama.cpp (llama-vocab.cpp, and TextModel of its converter, which this undoes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightops.errors import CorruptInput, UsageError
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.layouts.tokenizers import sentencepiece
from weightops.layouts.tokenizers.files import PIECES, SPECIAL_MAP, TOKENIZER, TOKENIZER_CONFIG
from weightops.layouts.tokenizers.hf import sentencepiece_document
from weightops.layouts.tokenizers.pieces_json import render
from weightops.layouts.tokenizers.pretokenizers import COMPOSED, PATTERNS, WHOLE_FIRST, WITH_BOS, step
from weightops.layouts.tokenizers.tokens import MAX_MERGES, MAX_TOKEN_BYTES, MAX_TOKENS, Kind, Token

_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}
_ENDS = ("eos", "eot", "eom")
_SPACE = "\u2581"
_ADDED = (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
_NO_TOKENIZER = "--tokenizer names one beside it, --no-tokenizer does without"


@dataclass(frozen=True)
class FoundTokenizer:
    """The files by name; and what config.json and generation_config.json say of ends of texts, by their fields."""

    files: Mapping[str, bytes]
    ids: Mapping[str, int]
    ends: tuple[int, ...]
    """All tokens that end what a model says."""


@dataclass(frozen=True)
class _Vocabulary:
    texts: Sequence[str]
    kinds: Sequence[Kind]
    scores: Sequence[float]
    ids: Mapping[str, int]
    where: str

    def tokens(self) -> list[tuple[int, str, Kind]]:
        """Those that are tokens: not what fills the vocabulary up to the rows of the embedding."""
        found = zip(self.texts, self.kinds, strict=True)
        return [(i, text, kind) for i, (text, kind) in enumerate(found) if not _is_filler(i, text, kind)]


def _is_filler(number: int, text: str, kind: Kind) -> bool:
    return kind is Kind.UNUSED and text == f"[PAD{number}]"


def find_tokenizer(values: Mapping[str, Any], rows: int, where: str) -> FoundTokenizer | None:
    """The tokenizer that the keys of a file say, without their types; None where there is none.

    Raises `UsageError` for kinds that are not known here, `CorruptInput` for tokens that make no tokenizer.
    """
    model = values.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return None
    vocabulary = _read(values, rows, where)
    if model == "llama":
        documents = _pieces(values, vocabulary)
    elif model == "gpt2":
        documents = {TOKENIZER: _bytes(values, vocabulary)}
    else:
        raise UsageError(f"{where}: a tokenizer of the kind {escape(str(model))[:80]} is not read", hint=_NO_TOKENIZER)
    names = {f"{name}_token": vocabulary.texts[i] for name, i in vocabulary.ids.items() if name in _NAMES.values()}
    documents[TOKENIZER_CONFIG] = strict_json.dumps(_config(values, names))
    documents[SPECIAL_MAP] = strict_json.dumps(names)
    ids = {f"{name}_token_id": vocabulary.ids[name] for name in ("bos", "eos", "pad") if name in vocabulary.ids}
    ends = tuple(dict.fromkeys(vocabulary.ids[name] for name in _ENDS if name in vocabulary.ids))
    return FoundTokenizer(documents, ids, ends)


def _read(values: Mapping[str, Any], rows: int, where: str) -> _Vocabulary:
    texts, kinds, scores = (values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "scores"))
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not 0 < len(texts) <= min(rows, MAX_TOKENS):
        count = len(texts) if isinstance(texts, Sequence) else 0
        raise CorruptInput(f"{where}: tokenizer.ggml.tokens has {count} tokens, the embedding {rows} rows")
    texts = list(texts)
    kinds = [Kind.NORMAL] * len(texts) if kinds is None else list(kinds)
    scores = [0.0] * len(texts) if scores is None else list(scores)
    if not len(texts) == len(kinds) == len(scores) or not {*kinds} <= {*Kind}:
        raise CorruptInput(f"{where}: tokenizer.ggml.token_type or scores do not fit the {len(texts)} tokens")
    if max(len(text.encode()) for text in texts) > MAX_TOKEN_BYTES:
        raise CorruptInput(f"{where}: a token of over {MAX_TOKEN_BYTES} bytes")
    ids = {}
    for key, name in {**_NAMES, "eot": "eot", "eom": "eom"}.items():
        found = values.get(f"tokenizer.ggml.{key}_token_id")
        if type(found) is int and 0 <= found < len(texts):
            ids[name] = found
    return _Vocabulary(texts, [Kind(kind) for kind in kinds], scores, ids, where)


def _config(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """tokenizer_config.json."""
    config: dict[str, Any] = {**names, "clean_up_tokenization_spaces": False}
    config |= {"model_input_names": ["input_ids", "attention_mask"], "tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos", "sep"):
        added = values.get(f"tokenizer.ggml.add_{name}_token")
        config |= {f"add_{name}_token": added} if isinstance(added, bool) else {}
    template = values.get("tokenizer.chat_template")
    named = {name: values.get(f"tokenizer.chat_template.{name}") for name in values.get("tokenizer.chat_templates", ())}
    more = [{"name": name, "template": text} for name, text in named.items() if isinstance(text, str)]
    if isinstance(template, str):
        config["chat_template"] = [{"name": "default", "template": template}, *more] if more else template
    return config


def _around(values: Mapping[str, Any], vocabulary: _Vocabulary, usual_bos: bool) -> dict[str, Any] | None:
    """tokenizer.json's template for what is put around a text."""
    wanted = {
        "bos": values.get("tokenizer.ggml.add_bos_token", usual_bos),
        "eos": values.get("tokenizer.ggml.add_eos_token", False),
    }
    named = {name: vocabulary.texts[vocabulary.ids[name]] for name in wanted if name in vocabulary.ids and wanted[name]}
    if not named:
        return None

    def part(letter: str, number: int) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = [{"Sequence": {"id": letter, "type_id": number}}]
        around = {name: {"SpecialToken": {"id": text, "type_id": number}} for name, text in named.items()}
        return [*([around["bos"]] if "bos" in around else []), *steps, *([around["eos"]] if "eos" in around else [])]

    tokens = {text: {"id": text, "ids": [vocabulary.ids[name]], "tokens": [text]} for name, text in named.items()}
    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": tokens,
    }


def _pieces(values: Mapping[str, Any], vocabulary: _Vocabulary) -> dict[str, bytes]:
    """tokenizer.model and tokenizer.json."""
    found, where = vocabulary.tokens(), vocabulary.where
    if [number for number, _, _ in found] != list(range(len(found))):
        raise CorruptInput(f"{where}: the tokens of tokenizer.ggml.tokens have gaps between them")
    texts = [text.replace(" ", _SPACE) if kind is Kind.USER_DEFINED else text for _, text, kind in found]
    kinds = [kind for _, _, kind in found]
    if Kind.UNKNOWN not in kinds:  # the converter calls it special, where tokenizer_config.json does
        named = texts.index("<unk>") if "<unk>" in texts else 0
        unknown = vocabulary.ids.get("unk", named)
        kinds[unknown if unknown < len(kinds) else 0] = Kind.UNKNOWN
    has_dummy = values.get("tokenizer.ggml.add_space_prefix", True) is not False
    names = {name: texts[i] for name, i in vocabulary.ids.items() if i < len(texts)}
    tokens = [
        Token(text.encode(), kind, score if kind in (Kind.NORMAL, Kind.UNUSED) else 0.0)
        for text, kind, score in zip(texts, kinds, vocabulary.scores, strict=False)
    ]
    data = render(tokens, names, puts_space=has_dummy, has_bytes=Kind.BYTE in kinds)
    tokenizer = sentencepiece.parse(data, f"{where}: tokenizer.ggml.tokens")
    tokenizer = replace(tokenizer, bos_id=vocabulary.ids.get("bos"), eos_ids=(), pad_id=vocabulary.ids.get("pad"))
    document = {**sentencepiece_document(tokenizer), "post_processor": _around(values, vocabulary, usual_bos=True)}
    return {PIECES: data, TOKENIZER: _dumped(document)}


def _bytes(values: Mapping[str, Any], vocabulary: _Vocabulary) -> bytes:
    """tokenizer.json of a byte-level BPE."""
    where, pre = vocabulary.where, str(values.get("tokenizer.ggml.pre", "default"))
    if pre not in PATTERNS:
        raise UsageError(
            f"{where}: how its pre-tokenizer {escape(pre)[:80]} cuts texts is not known here", hint=_NO_TOKENIZER
        )
    plain = {text: i for i, text, kind in vocabulary.tokens() if kind not in _ADDED}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    steps = [step(pattern) for pattern in PATTERNS[pre]]
    steps += [] if steps[-1]["type"] == "ByteLevel" else [level]
    states_bos = isinstance(values.get("tokenizer.ggml.add_bos_token"), bool)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, text, kind) for i, text, kind in vocabulary.tokens() if kind in _ADDED],
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _around(values, vocabulary, pre in WITH_BOS) or (level if states_bos else None),
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE_FIRST,
            "vocab": plain,
            "merges": _merges(
                values, {text for text, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True)}, where
            ),
        },
    }
    return _dumped(document)


def _added(number: int, text: str, kind: Kind) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **flags, "special": kind is not Kind.USER_DEFINED}


def _merges(values: Mapping[str, Any], known: set[str], where: str) -> list[list[str]]:
    """Pairs; raises `CorruptInput` for what is none, or joins what are no tokens."""
    found = values.get("tokenizer.ggml.merges")
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) > MAX_MERGES:
        raise CorruptInput(f"{where}: tokenizer.ggml.merges is missing, or has over {MAX_MERGES} merges")
    pairs = [merge.split(" ") for merge in found]
    odd = next((p for p in pairs if len(p) != 2 or not {p[0], p[1], p[0] + p[1]} <= known), None)
    if odd is not None:
        raise CorruptInput(f"{where}: tokenizer.ggml.merges: {escape(' '.join(odd))[:80]!r} does not join two tokens")
    return pairs


def _dumped(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
