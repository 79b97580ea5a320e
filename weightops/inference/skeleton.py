"""transformers' model of a checkpoint, without its weights: made from config.json alone, no code of others is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, SourceMissing, UsageError
from weightops.formats.adapter import CONFIG_NAME as ADAPTER_CONFIG
from weightops.inference.linears import make_linears
from weightops.io.escape import escape
from weightops.operations.modules import last_part

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_META = torch.device("meta")


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty gives tensors on meta. Parameters are made of it; buffers have values from the start."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        return func(*args, **({**given, "device": _META} if func is torch.empty else given))


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """config.json as transformers' own class; raises for models that need code of their own, or other files."""
    from transformers import CONFIG_MAPPING

    shown = escape(checkpoint.name)
    config = checkpoint.config()
    is_adapter = ADAPTER_CONFIG in checkpoint.sidecars
    if is_adapter and (not config or all(name.startswith("base_model.") for name in checkpoint)):
        raise UsageError(
            f"{shown}: is an adapter, no model",
            hint=f"`weightops merge-lora --base BASE --adapter {shown} --out OUT` makes a model of it and its base",
        )
    if not config:
        raise SourceMissing(
            f"{shown}: has no config.json, so nothing says how to run it",
            hint="put config.json beside the weights; `weightops convert --to hf` makes one for LLaMA",
        )
    if config.get("auto_map"):
        raise UsageError(
            f"{shown}: config.json's auto_map names Python files of its own, and code from checkpoints is never run",
            hint="if transformers knows the model by itself, take auto_map out of config.json",
        )
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UsageError(f"{shown}: transformers knows no model_type {escape(repr(model_type))}")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise UsageError(
            f"{shown}: its weights are quantised by {escape(repr(method))}, and of these only gptq is run here"
        )
    plain = {key: _with_floats(value) for key, value in config.items() if key != "quantization_config"}
    try:
        return CONFIG_MAPPING[model_type].from_dict(plain)
    except Exception as error:  # transformers and its validators raise what they like
        raise IncompatibleInputs(
            f"{shown}: transformers does not take its config.json: {escape(' '.join(str(error).split()))[:300]}"
        ) from error


def _with_floats(value: Any) -> Any:
    """With the numbers that JSON has no form for, which transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: _with_floats(each) for key, each in value.items()}


def build(config: PretrainedConfig, shown: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on meta, and buffers as they are computed when it is made.

    Its matrices are those of linear layers wherever that is known (`make_linears`).
    """
    from transformers import AutoModelForCausalLM

    if config.is_encoder_decoder:
        raise UsageError(f"{shown}: {escape(config.model_type)} has an encoder; only models of one decoder are run")
    try:
        with _EmptyOnMeta(), torch.no_grad():
            module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise UsageError(
            f"{shown}: transformers makes no language model of {escape(config.model_type)} from its config.json: "
            f"{escape(str(error).splitlines()[0] if str(error) else type(error).__name__)}"
        ) from error
    module.train(False).requires_grad_(False)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter.device != _META:
            place(module, name, made.setdefault(id(parameter), nn.Parameter(parameter.to(_META), requires_grad=False)))
    make_linears(module)
    for name, buffer in module.named_buffers():
        if buffer.device == _META and not is_persistent(module, name):
            raise UsageError(f"{shown}: {type(module).__name__} cannot be made without weights ({name})")
    return module


def place(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a parameter or buffer in the place of another."""
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(tensor, nn.Parameter):
        owner._parameters[last_part(name)] = tensor
    else:
        owner._buffers[last_part(name)] = tensor


def is_persistent(module: nn.Module, name: str) -> bool:
    """Whether a buffer is one that checkpoints hold."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return last_part(name) not in owner._non_persistent_buffers_set


def find_blocks(module: PreTrainedModel, shown: str) -> list[str]:
    """The names of the decoder blocks, in order: the outermost list of modules that is as long as the model is deep."""
    depth = getattr(module.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    outermost = [(n, p) for n, p in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    found = [(name, part) for name, part in outermost if len(part) == depth]
    if len(found) != 1:
        listed = ", ".join(f"{name} ({len(part)})" for name, part in outermost) or "none"
        raise UsageError(
            f"{shown}: {type(module).__name__} keeps its {depth} blocks in no single list of modules (found: {listed})"
        )
    ((name, part),) = found
    return [f"{name}.{i}" for i in range(len(part))]
