"""What a user says of a model, held against what its files say; and what the user is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.model import Model
from weightops.layouts.source import Source
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.spec import DType

_FIELDS = {
    "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "n_heads": "num_attention_heads",
    "rope_theta": "rope_theta",
    "rope_factor": "factor",
}
"""Where config.json says what users may say."""


def with_settings(config: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """config.json with what the user says, where that is not there; raises `UsageError` where it is something else."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    result = dict(config)
    for name, key in _FIELDS.items():
        stated = result.get(key, rope.get(key) if isinstance(rope, dict) else None)
        if name in source.settings and stated is None:
            result[key] = source.settings[name]
        elif name in source.settings and stated != source.settings[name]:
            raise UsageError(f"{source.where}: by its own files, {name} is {stated}, not {source.settings[name]}")
    return result


def check_settings(model: Model, source: Source) -> None:
    """Refuse what the user says of a model whose files say something else."""
    h = model.hyperparameters
    found = {
        "context_length": h.context_length,
        "n_heads": h.n_heads,
        "norm_eps": h.norm_eps,
        "rope_theta": h.rope_theta,
        "rope_factor": h.rope_scaling.factor if h.rope_scaling else None,
    }
    for name, value in found.items():
        given = source.settings.get(name)
        if given is not None and given != value:
            raise UsageError(f"{source.where}: by its own files, {name} is {value}, not {given}")


def check_norms(tensors: Mapping[str, LazyTensor], source: Source) -> None:
    """Refuse norms with values that are no numbers: they are small, and a model with one says nothing."""
    for name, tensor in tensors.items():
        if len(tensor.spec.shape) == 1 and not np.isfinite(_values(tensor, source)).all():
            raise CorruptInput(
                f"{source.where}: {escape(name)} holds values that are no numbers",
                hint="the file was damaged, or saved from a training run that had failed",
            )


def _values(tensor: LazyTensor, source: Source) -> np.ndarray:
    return np.frombuffer(source.evaluate(cast(tensor, DType.F32)), dtype=np.float32)


def left_out(dropped: Mapping[str, str]) -> list[str]:
    """What there is to say of tensors that are left out, each with its reason."""
    said = [f"{escape(name)} is left out: {reason}" for name, reason in sorted(dropped.items())[:1]]
    return [*said, f"and {len(dropped) - 1} more are left out; the manifest names them"] if len(dropped) > 1 else said
