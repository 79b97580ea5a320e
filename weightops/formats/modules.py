"""What names of modules say of them, in transformers' models."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")


def last_part(module: str) -> str:
    """The name that a module has in the one that it is part of."""
    return module.rpartition(".")[2]


def is_conv1d(module: str, model_type: object) -> bool:
    """Whether a module is transformers' Conv1D: a Linear layer that keeps its weight as [in, out]."""
    return model_type in _CONV1D_MODELS and last_part(module) in _CONV1D


def shortest(modules: Iterable[str], known: Iterable[str]) -> list[str]:
    """`target_modules` that fits these of all `known` modules alone: ends of paths if those say it, or paths."""
    wanted = set(modules)
    ends = {last_part(module) for module in wanted}
    alike = {module for module in known if last_part(module) in ends}
    return sorted(ends) if alike == wanted else sorted(wanted)


NUMBERED = re.compile(r"(.*?)\.(\d{1,9})\.(.+)")
"""What stands before the first number in a name, that number, and what stands after it."""
