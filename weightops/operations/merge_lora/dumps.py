"""Bases out of training: what a run has saved of a model that peft had wrapped, factors and all.

There a layer's own weight is `q_proj.base_layer.weight` beside `q_proj.lora_A.default.weight`, and every name may begin
with `base_model.model.`. peft before 0.6 put factors into the layer, whose weight has its own name then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput
from weightops.formats.adapter.files import CONFIG_NAME, find_adapter
from weightops.formats.adapter.names import Kind, parse_name
from weightops.io.escape import escape
from weightops.lazy import LazyTensor

_OF_BASE = (Kind.BASE, Kind.WHOLE, Kind.ORIGINAL)


def out_of_training(base: Checkpoint) -> Checkpoint:
    """The model that peft had wrapped, by its own names, where `base` is such a one; else `base` as it is.

    Factors, and what was trained in the place of a module, are left to the adapter. Raises `CorruptInput` where two
    tensors would have one name, `IncompatibleInputs` for parts of other adapters than LoRA.
    """
    is_wrapped = any(".base_layer." in name or ".lora_A." in name for name in base)
    if not is_wrapped or find_adapter(base.shards.values()) is not None:
        return base
    where = escape(base.name)
    tensors: dict[str, LazyTensor] = {}
    names: dict[str, str] = {}
    for text, tensor in base.items():
        name = parse_name(text, where)
        if name.kind not in _OF_BASE:
            continue
        if name.path in names:
            raise CorruptInput(
                f"{where}: {escape(names[name.path])} and {escape(text)} are one weight of the base",
                hint="save the model once more",
            )
        tensors[name.path], names[name.path] = tensor, text
    if not tensors:
        return base  # an adapter, whatever its file is called
    return replace(
        base,
        tensors=tensors,
        sidecars={name: file for name, file in base.sidecars.items() if name != CONFIG_NAME},
        shards=_renamed(base.shards, names),
        digests=_renamed(base.digests, names),
        total_size=None,
        content_id=None,
    )


def _renamed(values: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {new: values[old] for new, old in names.items() if old in values}
