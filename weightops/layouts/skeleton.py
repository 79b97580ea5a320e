"""transformers' model of a config, without its weights: made from config.json alone, no code of others is run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, SourceMissing, UsageError
from weightops.io.escape import escape
from weightops.layouts.counts import beyond_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

META = torch.device("meta")
ONE_AT_A_TIME = threading.Lock()
"""Held where a model is made: what transformers changes for that time (the default dtype, how tensors are created and
initialised) belongs to the process, and two threads would put back what is not theirs."""
_PER_TENSOR, _AT_LEAST = 4, 1000
"""How many parameters a model may have for each tensor of its files (a fused one is several), and how many at least."""


class TooManyParts(Exception):
    """A model has many more parameters than its files have tensors."""


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """config.json as transformers' own class; raises for models that need code of their own, or other files."""
    shown = escape(checkpoint.name)
    config = checkpoint.config()
    if not config:
        raise SourceMissing(
            f"{shown}: has no config.json, so nothing says how to run it",
            hint="put config.json beside the weights; `weightops convert --to hf` makes one for LLaMA",
        )
    excess = beyond_files(config, checkpoint)
    if excess:
        raise IncompatibleInputs(f"{shown}: {excess}", hint="config.json and weights are of different models")
    return parse_config(config, shown)


def parse_config(config: Mapping[str, Any], shown: str) -> PretrainedConfig:
    """A document of config.json as transformers' own class, whatever it says of quantising.

    Raises `UsageError` for models of no known type or with code of their own, `IncompatibleInputs` for settings that
    transformers does not take.
    """
    from transformers import CONFIG_MAPPING

    if config.get("auto_map"):
        raise UsageError(
            f"{shown}: config.json's auto_map names Python files of its own, and code from checkpoints is never run",
            hint="if transformers knows the model by itself, take auto_map out of config.json",
        )
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UsageError(f"{shown}: transformers knows no model_type {escape(repr(model_type))}")
    plain = {key: _with_floats(value) for key, value in config.items() if key != "quantization_config"}
    try:
        return CONFIG_MAPPING[model_type].from_dict(plain)
    except Exception as error:  # transformers and its validators raise what they like
        raise IncompatibleInputs(
            f"{shown}: transformers does not take its config.json: {escape(' '.join(str(error).split()))[:300]}"
        ) from error


_ROPE = ("rope_theta", "rope_parameters", "rope_scaling")


def taken_for_granted(config: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """What config.json leaves to its class's defaults, of what every class of language models has a default for.

    Another class takes others: 10,000 for `rope_theta` is a Llama's, a Mixtral's is a million. Empty for types that
    transformers does not know. Raises as `parse_config` does.
    """
    keys = ("rms_norm_eps", "num_key_value_heads", "hidden_act", "max_position_embeddings")
    lacking = [key for key in keys if key not in config]
    has_rope = any(key in config for key in _ROPE)
    if not lacking and has_rope:
        return {}
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return {}
    full = parse_config({key: value for key, value in config.items() if key != "auto_map"}, shown).to_dict()
    found = {key: full[key] for key in lacking if full.get(key) is not None}
    rope = full.get("rope_parameters")
    if not has_rope and isinstance(rope, dict) and "rope_theta" in rope:
        found |= {"rope_theta": rope["rope_theta"], "rope_parameters": rope}
    return found


class EmptyOnMeta(TorchFunctionMode):
    """torch.empty gives tensors on meta. Parameters are made of it; buffers have values from the start.

    Raises `TooManyParts` for more than `most` of them.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self._left = most

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise TooManyParts
        return func(*args, **({**given, "device": META} if func is torch.empty else given))


def build_for_names(config: PretrainedConfig, architectures: object, n_tensors: int) -> PreTrainedModel:
    """The model that config.json names, wholly on meta, to be asked for names and shapes; it may be of any kind.

    It is in bfloat16, whatever config.json says: what is float32 then is float32 in every model of its class. Raises
    `TooManyParts` if it has many more parameters than the files' `n_tensors`, and what transformers raises.
    """
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights, no_tie_weights

    kind = _class_of(config, architectures)
    most = _PER_TENSOR * n_tensors + _AT_LEAST
    with (
        ONE_AT_A_TIME,
        torch.device("meta"),
        meta_device_safe_creation_ops(),
        no_init_weights(),
        no_tie_weights(),
        torch.no_grad(),
    ):
        with EmptyOnMeta(most):
            return kind._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-any-return]


def _class_of(config: PretrainedConfig, architectures: object) -> Any:
    """transformers' class that config.json names, if it is one for such a config; else what a config of its kind is."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for name in architectures if isinstance(architectures, list) else []:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if is_model and isinstance(config, getattr(kind, "config_class", None) or ()):
            return kind
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_MAPPING
    found = mapping[type(config)]
    return found[0] if isinstance(found, list | tuple) else found


def place(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a parameter or buffer in the place of another."""
    owner, _, leaf = name.rpartition(".")
    if isinstance(tensor, nn.Parameter):
        module.get_submodule(owner)._parameters[leaf] = tensor
    else:
        module.get_submodule(owner)._buffers[leaf] = tensor


def is_persistent(module: nn.Module, name: str) -> bool:
    """Whether a buffer is one that checkpoints hold."""
    owner, _, leaf = name.rpartition(".")
    return leaf not in module.get_submodule(owner)._non_persistent_buffers_set


def _with_floats(value: Any) -> Any:
    """With the numbers that JSON has no form for, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: _with_floats(each) for key, each in value.items()}
