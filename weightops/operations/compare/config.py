"""What the configurations of two checkpoints differ in, by JSON pointer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from weightops.errors import CorruptInput, UsageError
from weightops.formats.gguf.metadata import untyped
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.layouts.source import Source, beside
from weightops.lazy import Evaluate
from weightops.operations.compare.entries import Entries
from weightops.operations.compare.report import ConfigChange
from weightops.operations.convert import READERS

_FILES = ("config.json", "generation_config.json", "params.json")
_FORM = ("torch_dtype", "dtype")
"""What weights are stored in, which is no difference."""
_HARMLESS = {
    *("transformers_version", "_name_or_path", "name_or_path", "_from_model_config", "use_cache", "initializer_range"),
    *("initializer_factor", "pretraining_tp", "gradient_checkpointing", "return_dict", "output_attentions"),
    *("output_hidden_states", "torchscript", "id2label", "label2id", "task_specific_params", "finetuning_task"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "max_batch_size"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "summary_first_dropout", "max_seq_len", "_commit_hash"),
}
"""Keys, wherever they are, that change nothing of what a model computes."""
_DECISIVE = ("sliding_window",)
"""Keys whose absence stands for a value other than null."""
_MAX_VALUE = 400
_MAX_DEPTH = 32
"""Below that, objects are compared as a whole."""
_OF_GGUF = {
    "block_count": "n_layers",
    "embedding_length": "dim",
    "feed_forward_length": "ffn_dim",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "context_length",
}
_SINGLE = 1e-6
"""GGUF has such numbers in float32."""


def config_changes(a: Entries, b: Entries, evaluate: Evaluate) -> tuple[list[ConfigChange], list[str]]:
    """Every key that differs; and what there is to say where the two cannot be compared."""
    if a.layout == b.layout == "gguf":
        return list(_differences("metadata", _gguf(a.metadata), _gguf(b.metadata))), []
    if not {a.layout, b.layout} <= {None, "hf"}:
        return _by_parameters(a, b, evaluate)
    found, notes = list[ConfigChange](), list[str]()
    for name in _FILES:
        documents = []
        for entries in (a, b):
            try:
                documents.append(_document(entries, name))
            except (CorruptInput, UsageError) as error:
                notes.append(f"{name} is not compared: {error}")
        if len(documents) == 2:
            found += _differences(name, documents[0], documents[1])
    return found, notes


def _document(entries: Entries, name: str) -> dict[str, Any]:
    data = beside(entries.checkpoint, None)(name)
    if data is None:
        return {}
    where = f"{escape(entries.checkpoint.name)}/{name}"
    return _in_one_dialect(strict_json.load_object(data, where, constants=True))


def _in_one_dialect(document: dict[str, Any]) -> dict[str, Any]:
    """With rotary settings where transformers 4 has them, so that it and 5 can be compared."""
    parameters, result = document.get("rope_parameters"), dict(document)
    if isinstance(parameters, dict) and not any(isinstance(value, dict) for value in parameters.values()):
        parameters = dict(result.pop("rope_parameters"))
        theta = parameters.pop("rope_theta", None)
        if theta is not None:
            result.setdefault("rope_theta", theta)
        result.setdefault("rope_scaling", parameters)
    scaling = result.get("rope_scaling")
    if isinstance(scaling, dict):
        renamed = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
        result["rope_scaling"] = renamed
        if renamed.get("rope_type", "default") == "default":
            del result["rope_scaling"]
    elif "rope_scaling" in result and scaling is None:
        del result["rope_scaling"]
    return result


def _by_parameters(a: Entries, b: Entries, evaluate: Evaluate) -> tuple[list[ConfigChange], list[str]]:
    """By what both layouts say of the model, and mean where they say nothing, under the names that are used here."""
    sides = []
    for entries in (a, b):
        try:
            sides.append(_hyperparameters(entries, evaluate))
        except (CorruptInput, UsageError) as error:
            return [], [f"the configurations are not compared: {error}"]
    known = sides[0].keys() & sides[1].keys()
    one, other = ({key: side[key] for key in sorted(known)} for side in sides)
    for key, value in one.items():
        if isinstance(value, float) and isinstance(other[key], float | int):
            is_alike = abs(value - other[key]) <= _SINGLE * abs(value)
            other[key] = value if is_alike else other[key]
    return list(_differences("parameters", one, other)), []


def _hyperparameters(entries: Entries, evaluate: Evaluate) -> dict[str, Any]:
    if entries.layout == "gguf":
        name = entries.metadata.get("general.architecture", {}).get("string")
        found = _gguf(entries.metadata)
        return {ours: found[f"{name}.{key}"] for key, ours in _OF_GGUF.items() if f"{name}.{key}" in found}
    checkpoint = entries.checkpoint
    source = Source(checkpoint, beside(checkpoint, None), lambda tensor: evaluate([tensor])[0])
    h = READERS[entries.layout or "hf"](source).hyperparameters
    values = {name: getattr(h, name) for name in type(h).__dataclass_fields__ if name not in ("family", "rope_scaling")}
    return {name: value for name, value in values.items() if value is not None}


def _gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What GGUF metadata says of the model, without types; the tokenizer's part is compared elsewhere."""
    kept = {key: value for key, value in metadata.items() if not key.startswith(("tokenizer.", "general."))}
    return untyped(kept)


def _differences(
    file: str, a: Mapping[str, Any], b: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[ConfigChange]:
    """Values that differ, by JSON pointer (RFC 6901); an object that is in one of the two alone is one of them."""
    for key in dict.fromkeys([*a, *b]):
        old, new, path = a.get(key, msgspec.UNSET), b.get(key, msgspec.UNSET), (*above, key)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and len(path) < _MAX_DEPTH:
            yield from _differences(file, old, new, path)
            continue
        one, other = _text(old), _text(new)
        if one == other or key in _FORM:
            continue
        is_unsaid = {one, other} == {None, "null"} and key not in _DECISIVE
        harmless = is_unsaid or any(each in _HARMLESS for each in path)
        pointer = "".join(f"/{each.replace('~', '~0').replace('/', '~1')}" for each in path)
        yield ConfigChange(file=file, pointer=pointer, a=one, b=other, changes_results=not harmless)


def _text(value: Any) -> str | None:
    """A value as JSON, of which numbers that are equal are written alike; None for what is absent."""
    if value is msgspec.UNSET:
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        value = int(value)
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}…"
