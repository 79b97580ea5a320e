"""The models of a merge as plain tensors: whole models, of one architecture, in the type that the file asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.adapter.files import looks_like_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.io.escape import escape
from weightops.layouts.embeddings import embeddings_and_heads
from weightops.layouts.layer_config import TEXT_CONFIGS
from weightops.lazy import Evaluate
from weightops.operations.dequantize import plain_if_quantised
from weightops.ops.elementwise import cast
from weightops.spec import DType

TIE = "tie_word_embeddings"
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "n_embed")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_NUMBERS = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "sliding_window"),
    *("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
)
"""Settings that change what weights of the same shapes mean."""


def setting(config: Mapping[str, Any], key: str) -> Any:
    """What config.json says under a key, in the part for the language model too."""
    parts = [config, *(config[part] for part in TEXT_CONFIGS if isinstance(config.get(part), Mapping))]
    return next((part[key] for part in parts if part.get(key) is not None), None)


def refuse_what_is_no_model(name: str, checkpoint: Checkpoint) -> None:
    """Raise `IncompatibleInputs` for adapters and deltas."""
    shown = escape(name)
    if looks_like_adapter(checkpoint):
        raise IncompatibleInputs(
            f"{shown} is a LoRA adapter alone, not a model",
            hint=f"write base+adapter in the merge file, the model that it was trained on before it: MODEL+{shown}",
        )
    refuse_delta(checkpoint, "the model")
    refuse_parts(checkpoint)


def refuse_strangers(models: Mapping[str, Checkpoint], *, same_layers: bool) -> list[str]:
    """Raise `IncompatibleInputs` for models of different architectures, by what config.json says.

    All are held against the first, whose config.json the result has. Returns notes on settings in which models differ
    that have the same shapes. With `same_layers` they must have the same number of layers. Models without config.json
    are told apart by their tensors alone.
    """
    configs = {name: config for name, model in models.items() if (config := model.config())}
    notes = []
    for name in [*configs][1:]:
        first = next(iter(configs))
        differ = _differing(configs[first], configs[name])
        for key, (ours, theirs) in differ.items():
            said = f"config.json says {key} {_shown(ours)} for {escape(first)}, and {_shown(theirs)} for {escape(name)}"
            if key in _NUMBERS:
                notes.append(f"{said}: the result has that of {escape(first)}")
            elif key not in _COUNTS:
                raise IncompatibleInputs(said, hint="only models of one architecture and size are merged")
            elif same_layers:
                raise IncompatibleInputs(said, hint="slices: takes layers of models that have more and fewer")
    return notes


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that both have, and that are not the same."""
    keys = ("model_type", "architectures", *_WIDTHS, *_COUNTS, *_NUMBERS)
    pairs = {key: (setting(one, key), setting(other, key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if None not in pair and pair[0] != pair[1]}


def _shown(value: Any) -> str:
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def plain(checkpoint: Checkpoint, dtype: DType | None, evaluate: Evaluate) -> Checkpoint:
    """The model with its floating-point tensors in `dtype`, if there is one; dequantised first if it is quantised."""
    checkpoint = plain_if_quantised(checkpoint, evaluate)
    if dtype is None:
        return checkpoint
    return replace(
        checkpoint,
        tensors={n: cast(t, dtype) if t.spec.dtype.is_float else t for n, t in checkpoint.tensors.items()},
        digests={},
    )


def with_heads(models: Mapping[str, Checkpoint]) -> tuple[dict[str, Checkpoint], list[str]]:
    """The models, each with a head if one of them has it: the embedding is that of a model whose head is tied to it.

    Returns notes too. A model that says its embeddings are not tied lacks its head, and gets none.
    """
    heads = {
        head: embedding
        for model in models.values()
        for embedding, candidates in embeddings_and_heads(model)
        for head in candidates
        if head in model
    }
    found, notes = dict(models), []
    for name, model in models.items():
        is_tied = setting(model.config(), TIE)
        for head, embedding in heads.items():
            if head in model and is_tied is True and embedding in model and model[head] != model[embedding]:
                notes.append(
                    f"{escape(name)}: config.json says that embeddings are tied, and there is a {escape(head)}: it is "
                    "taken as it is stored"
                )
            if head not in model and embedding in model and is_tied is not False:
                found[name] = replace(model, tensors={**model.tensors, head: model[embedding]})
                notes.append(f"{escape(name)}: {escape(embedding)} is its {escape(head)} too, which others have")
    return found, notes
