"""Ids of tokens in the JSON files of a model: which keys hold them, and what they become when tokens move.

Sources: the configuration classes of transformers 5, tokenizers' documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from weightops.layouts.layer_config import TEXT_CONFIGS

_KEYS = re.compile(
    r".+_token_ids?|.+_token_index|(begin_)?suppress_tokens|bad_words_ids|force_words_ids|forced_decoder_ids"
    r"|lang_to_id|task_to_id"
)
"""Keys of config.json, generation_config.json and the configs of processors that hold ids, in lists and objects too."""
_PAIRS = ("forced_decoder_ids",)
"""Lists of pairs, of a position and an id."""
ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
"""What special tokens are for, as keys of configs have it: `eos_token`, `eos_token_id`."""
Named = tuple[str, int]
"""Where an id stands, `text_config.eos_token_id`, and the id."""


def text_parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of a config.json that describe the language model, the whole among them, with the way to each."""
    yield "", config
    for key in (*TEXT_CONFIGS, "thinker_config"):
        if isinstance(config.get(key), Mapping):
            yield from ((f"{key}.{way}", part) for way, part in text_parts(config[key]))


def with_parts(config: Mapping[str, Any], edit: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> dict[str, Any]:
    """A config.json whose parts, as `text_parts` gives them, are edited each."""
    edited = dict(edit(config))
    for key in (*TEXT_CONFIGS, "thinker_config"):
        if isinstance(config.get(key), Mapping):
            edited[key] = with_parts(config[key], edit)
    return edited


def named_ids(document: Mapping[str, Any]) -> list[Named]:
    """The ids that a config names, without those below zero, which stand for none; see `text_parts`."""
    return [
        (f"{way}{key}", number)
        for way, part in text_parts(document)
        for key, value in part.items()
        if _KEYS.fullmatch(key)
        for number in _ids(key, value)
        if number >= 0
    ]


def renamed_ids(document: Mapping[str, Any], new: Callable[[int], int | None]) -> dict[str, Any]:
    """The document with what `new` gives for each id; what is None there is left out of lists, and null elsewhere."""

    def edit(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {k: _moved(k, value, new) if _KEYS.fullmatch(k) else value for k, value in part.items()}

    return with_parts(document, edit)


def ids_elsewhere(document: Mapping[str, Any]) -> list[str]:
    """Keys of ids in parts that are of no language model, which may have tokens of their own."""
    known = {way for way, _ in text_parts(document)}
    return [
        f"{key}.{inner}"
        for key, part in document.items()
        if isinstance(part, Mapping) and f"{key}." not in known and not _KEYS.fullmatch(key)
        for inner, value in part.items()
        if _KEYS.fullmatch(inner) and any(number >= 0 for number in _ids(inner, value))
    ]


def _ids(key: str, value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, list):
        if key in _PAIRS:
            value = [pair[-1] for pair in value if isinstance(pair, list) and pair]
        for each in value:
            yield from _ids("", each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _ids("", each)


def _moved(key: str, value: Any, new: Callable[[int], int | None]) -> Any:
    if type(value) is int:
        return new(value) if value >= 0 else value
    if isinstance(value, list) and key in _PAIRS:
        return [[*pair[:-1], _moved("", pair[-1], new)] if isinstance(pair, list) and pair else pair for pair in value]
    if isinstance(value, list):
        moved = [(each, _moved("", each, new)) for each in value]
        return [found for each, found in moved if found is not None or each is None]
    if isinstance(value, Mapping):
        return {name: _moved("", each, new) for name, each in value.items()}
    return value


def processor_ids(part: Any, new: Callable[[int], int]) -> Any:
    """The post-processor of a tokenizer.json, or a part of it, with new ids."""
    match part:
        case {"type": "TemplateProcessing", "special_tokens": dict(tokens)}:
            moved = {name: {**token, "ids": [new(n) for n in token.get("ids", ())]} for name, token in tokens.items()}
            return {**part, "special_tokens": moved}
        case {"type": "RobertaProcessing" | "BertProcessing"}:
            pairs = {key: [part[key][0], new(part[key][1])] for key in ("sep", "cls") if key in part}
            return {**part, **pairs}
        case {"processors": list(processors)}:
            return {**part, "processors": [processor_ids(each, new) for each in processors]}
    return part
