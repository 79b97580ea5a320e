"""transformers' model of a checkpoint, as it is run here: one decoder of linear layers, its blocks in one list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from weightops.errors import UsageError
from weightops.inference.linears import make_linears
from weightops.io.escape import escape
from weightops.layouts.skeleton import META, ONE_AT_A_TIME, EmptyOnMeta, is_persistent, place

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build(config: PretrainedConfig, shown: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on meta, and buffers as they are computed when it is made.

    Its matrices are those of linear layers wherever that is known (`make_linears`).
    """
    from transformers import AutoModelForCausalLM

    if config.is_encoder_decoder:
        raise UsageError(f"{shown}: {escape(config.model_type)} has an encoder; only models of one decoder are run")
    try:
        with ONE_AT_A_TIME, EmptyOnMeta(), torch.no_grad():
            module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise UsageError(
            f"{shown}: transformers makes no language model of {escape(config.model_type)} from its config.json: "
            f"{escape(str(error).splitlines()[0] if str(error) else type(error).__name__)}"
        ) from error
    module.train(False).requires_grad_(False)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter.device != META:
            place(module, name, made.setdefault(id(parameter), nn.Parameter(parameter.to(META), requires_grad=False)))
    make_linears(module)
    for name, buffer in module.named_buffers():
        if buffer.device == META and not is_persistent(module, name):
            raise UsageError(f"{shown}: {type(module).__name__} cannot be made without weights ({name})")
    return module


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
