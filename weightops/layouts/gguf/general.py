"""The general part of GGUF's metadata: what a model is called, of whom it is, how its tokens are to be chosen.

Names, sizes and versions are found in the names of folders and in model cards by the gguf package's own rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from weightops.errors import WeightopsError
from weightops.io.yaml_document import read_document
from weightops.layouts.gguf.parameters import Metadata, value_of
from weightops.layouts.gguf.saved import Saved
from weightops.layouts.tokenizers.files import GENERATION, TokenizerFiles
from weightops.spec import TensorSpec

_SAMPLING: Mapping[str, tuple[str, type]] = {
    "sequence": ("sequence", str),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "xtc_probability": ("xtc_probability", float),
    "xtc_threshold": ("xtc_threshold", float),
    "temperature": ("temp", float),
    "penalty_last_n": ("penalty_last_n", int),
    "penalty_repeat": ("penalty_repeat", float),
    "repetition_penalty": ("penalty_repeat", float),
    "mirostat": ("mirostat", int),
    "mirostat_tau": ("mirostat_tau", float),
    "mirostat_eta": ("mirostat_eta", float),
}
"""What gguf takes of generation_config.json: the keys there, those under `general.sampling.`, and their types."""
_KINDS = {str: "string", int: "int32", float: "float32", bool: "bool"}


def general(
    saved: Saved, tensors: Mapping[str, TensorSpec], *, adapter: bool = False
) -> tuple[Metadata, tuple[str, ...]]:
    """The keys, in their order, of a model with these tensors in GGUF; and what there is to say of a card left out."""
    named, warnings = _named(saved, tensors)
    kind = {"general.type": "adapter", "adapter.type": "lora"} if adapter else {"general.type": "model"}
    return {**{key: {"string": value} for key, value in kind.items()}, **_sampling(saved.files), **named}, warnings


def _sampling(files: TokenizerFiles) -> Metadata:
    """How the model wants its tokens to be chosen, as far as the format has keys for it."""
    stated, result = files.document(GENERATION), Metadata()
    for name, (key, kind) in _SAMPLING.items():
        value = stated.get(name)
        if type(value) is kind or (kind is float and type(value) is int):
            result.setdefault(f"general.sampling.{key}", {_KINDS[kind]: value})
    return result


def sampling_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The same on the way back: fields of generation_config.json."""
    names = {key: name for name, (key, _) in _SAMPLING.items() if name != "penalty_repeat"}
    prefix = "general.sampling."
    found = {key.removeprefix(prefix): value_of(metadata, key) for key in metadata if key.startswith(prefix)}
    return {names[key]: value for key, value in found.items() if key in names}


def _named(saved: Saved, tensors: Mapping[str, TensorSpec]) -> tuple[Metadata, tuple[str, ...]]:
    import gguf

    total, shared, experts, count = _counts(tensors)
    card, warnings = _card(saved)
    path = PurePosixPath(saved.name)
    try:
        found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, dict(saved.config), path, total)  # type: ignore[arg-type]
    except Exception:  # a card may hold anything, and gguf expects what it expects
        found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), {}, {}, path, total)  # type: ignore[arg-type]
        warnings = (f"{saved.name}: README.md: its front matter is not what gguf takes; left out",)
    found.name = found.name or saved.name
    if total > 0:
        found.size_label = found.size_label or gguf.size_label(total, shared, experts, count)
    writer = gguf.GGUFWriter(path=None, arch="")
    before = set(writer.kv_data[0])
    found.set_gguf_meta_model(writer)
    return {key: _typed(value) for key, value in writer.kv_data[0].items() if key not in before}, warnings


def _typed(value: Any) -> dict[str, Any]:
    """A value of gguf's writer with its type, as `weightops.formats.gguf` has it."""
    kind = value.type.name.lower()
    if kind != "array":
        return {kind: value.value}
    items = list(value.value)
    return {"array": [_KINDS[type(items[0])], items]}


def _counts(tensors: Mapping[str, TensorSpec]) -> tuple[int, int, int, int]:
    """Parameters in all, shared ones, those of one expert of each layer, and how many experts a layer has.

    Of an adapter they are those that its factors change, in all as a number below zero.
    Source: gguf's `GGUFWriter.get_total_parameter_count`.
    """
    total = shared = one = counted = stacks = 0
    columns: int | None = None
    for name, spec in tensors.items():
        if name.endswith(".lora_a"):
            columns = spec.shape[-1]
            continue
        shape = (*spec.shape[:-1], columns) if columns is not None and name.endswith(".lora_b") else spec.shape
        numel = math.prod(shape)
        total += numel
        if "_exps." in name and len(shape) >= 3:
            count = shape[-2 if ".bias" in name else -3]
            one += numel // count
            counted += count
            stacks += 1
        else:
            shared += numel
    return total if columns is None else -total, shared, one, counted // stacks if stacks else 0


def _card(saved: Saved) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The front matter of the model card, as gguf reads it: without tabs, and with Norway's language as a text."""
    lines = (saved.card or b"").decode(errors="replace").splitlines()
    if lines[:1] != ["---"]:
        return {}, ()
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    text = "\n".join(lines[1:end]) + "\n"
    text = text.replace("- no\n", '- "no"\n').replace("\t", "  ")
    try:
        found = dict(read_document(text, "README.md").data)
    except WeightopsError as error:
        return {}, (f"{error}: the card's front matter is left out",)
    return found, ()
