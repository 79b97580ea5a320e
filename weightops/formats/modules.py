"""What names of modules say of them, in transformers' models."""

from __future__ import annotations

import re

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")


def last_part(module: str) -> str:
    """The name that a module has in the one that it is part of."""
    return module.rpartition(".")[2]


def is_conv1d(module: str, model_type: object) -> bool:
    """Whether a module is transformers' Conv1D: a Linear layer that keeps its weight as [in, out]."""
    return model_type in _CONV1D_MODELS and last_part(module) in _CONV1D


NUMBERED = re.compile(r"(.*?)\.(\d{1,9})\.(.+)")
"""What stands before the first number in a name, that number, and what stands after it."""
