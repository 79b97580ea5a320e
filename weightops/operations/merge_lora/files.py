"""The files of a merged model that are not weights: whose tokenizer, and what config.json has to say now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weightops.checkpoint import Checkpoint, Sidecar
from weightops.formats.sidecars import Kind, is_tokenizer_file, kind_of
from weightops.io.escape import escape

_VOCABULARIES = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
)


def merged_sidecars(base: Checkpoint, adapters: Sequence[Checkpoint]) -> tuple[dict[str, Sidecar], list[str]]:
    """The base's files, with the tokenizer of the last adapter that has a whole one; and what there is to say of that.

    A chat template counts also without a tokenizer.
    """
    files = dict(base.sidecars)
    notes = []
    whole = [a for a in adapters if any(vocabulary <= a.sidecars.keys() for vocabulary in _VOCABULARIES)]
    if whole:
        files = {name: file for name, file in files.items() if not is_tokenizer_file(name)}
        files |= {name: file for name, file in whole[-1].sidecars.items() if is_tokenizer_file(name)}
        notes.append(f"the tokenizer is that of {escape(whole[-1].name)}")
    for adapter in adapters:
        chat = {name: file for name, file in adapter.sidecars.items() if kind_of(name) is Kind.TEMPLATE}
        if chat and adapter not in whole:
            files = {name: file for name, file in files.items() if kind_of(name) is not Kind.TEMPLATE} | chat
    return files, notes


def with_settings(checkpoint: Checkpoint, vocab_size: int | None, is_untied: bool) -> Checkpoint:
    """The checkpoint with the number of its embedding's rows in config.json, and with embeddings that are not tied."""

    def edit(config: dict[str, Any]) -> dict[str, Any]:
        text = config.get("text_config")
        nested = dict(text) if isinstance(text, Mapping) else None
        if vocab_size is not None:
            (nested if nested is not None and "vocab_size" not in config else config)["vocab_size"] = vocab_size
            if nested is not None and "vocab_size" in nested:
                nested["vocab_size"] = vocab_size
        if is_untied:
            config["tie_word_embeddings"] = False
            if nested is not None and "tie_word_embeddings" in nested:
                nested["tie_word_embeddings"] = False
        return config if nested is None else {**config, "text_config": nested}

    edited = checkpoint.with_config(edit)
    if is_untied and edited is checkpoint and not checkpoint.config():
        note = "the embeddings are no longer tied, and there is no config.json to say so"
        return replace(edited, warnings=(*edited.warnings, note))
    return edited
