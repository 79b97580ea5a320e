"""Adapters of torchtune: its own names, one rank and alpha in adapter_config.json, q and k in Meta's rotary order.

Source: `tune_to_peft_adapter_weights` of torchtune 0.6 (`models/convert_weights.py`), and back. Its Qwen models keep
the order of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.config import settings_of
from weightops.formats.adapter.dialects.common import (
    Base,
    Stored,
    Table,
    make_module,
    pairs_of,
    require_linear,
    uniform,
    unknown,
)
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.adapter.lora import LoraModule
from weightops.formats.adapter.written import lora_config
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.arrange import halves_to_pairs, pairs_to_halves

A, B = ".lora_a.weight", ".lora_b.weight"
_TABLE = Table(
    {
        "model.layers.{}.self_attn.q_proj": "layers.{}.attn.q_proj",
        "model.layers.{}.self_attn.k_proj": "layers.{}.attn.k_proj",
        "model.layers.{}.self_attn.v_proj": "layers.{}.attn.v_proj",
        "model.layers.{}.self_attn.o_proj": "layers.{}.attn.output_proj",
        "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.w1",
        "model.layers.{}.mlp.up_proj": "layers.{}.mlp.w3",
        "model.layers.{}.mlp.down_proj": "layers.{}.mlp.w2",
        "lm_head": "output",
    }
)
_IN_HALVES = ("qwen2", "qwen3")


def read(checkpoint: Checkpoint, base: Base, heads: int | None, alpha: float | None) -> list[LoraModule]:
    """The modules of an adapter of torchtune, by transformers' names and in its order of rows.

    Raises `UsageError` where nothing says how many heads q and k have, or what alpha is.
    """
    where, settings = escape(checkpoint.name), settings_of(checkpoint)
    alpha = settings.get("lora_alpha") if alpha is None else alpha
    if not isinstance(alpha, int | float):
        raise UsageError(f"{where}: nothing says what lora_alpha is", hint="--alpha, as in the recipe of the training")
    found = []
    for name, parts in pairs_of(checkpoint, A, B).items():
        path = _TABLE.ours(name)
        if path is None:
            raise unknown(name, "transformers")
        module = make_module(where, path, alpha / parts[A].spec.shape[0], parts[A], parts[B])
        found.append(module)
    return [_reordered(module, pairs_to_halves, found, base, heads) for module in found]


def write(modules: Sequence[LoraModule], base: Base, heads: int | None) -> Stored:
    """The adapter as torchtune has it; raises `IncompatibleInputs` for what it has no place for."""
    require_linear(modules, "torchtune")
    same, notes = uniform(modules)
    tensors: dict[str, LazyTensor] = {}
    for module in same:
        name = _TABLE.theirs(module.path)
        if name is None:
            raise unknown(module.path, "torchtune")
        own = _reordered(module, halves_to_pairs, same, base, heads).factors
        tensors |= {f"{name}{A}": own.a, f"{name}{B}": own.b}
    config = lora_config(same, base_model_name_or_path=base.name)
    return Stored(tensors, {CONFIG_NAME: written_json(config)}, notes=notes)


def _reordered(
    module: LoraModule,
    reorder: Callable[[LazyTensor, int], LazyTensor],
    modules: Sequence[LoraModule],
    base: Base,
    heads: int | None,
) -> LoraModule:
    """The module with the rows of B in the other order, where it is one of q or k."""
    last = module.path.rpartition(".")[2]
    if last not in ("q_proj", "k_proj") or base.model_type in _IN_HALVES:
        return module
    rows = module.factors.b.spec.shape[0]
    queries = {each.factors.b.spec.shape[0] for each in modules if each.path.endswith(".q_proj")}
    heads = heads or base.heads
    size = base.head_dim or (max(queries) // heads if queries and heads else None)
    if size is None:
        raise UsageError(
            f"{escape(module.path)}: its rows are in another order in torchtune, by heads, and nothing says how many "
            "there are",
            hint="--base MODEL, whose config.json says it, or --heads",
        )
    if rows % size or size % 2:
        raise IncompatibleInputs(
            f"{escape(module.path)}: {rows} rows of B are no whole number of heads of {size}",
            hint="is this the base that the adapter was trained on?",
        )
    return replace(module, factors=replace(module.factors, b=reorder(module.factors.b, rows // size)))
