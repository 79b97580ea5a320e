"""Adapters of mlx-lm: transformers' names, factors the other way round, and one scale in place of alpha.

Source: `tuner/lora.py` and `tuner/utils.py` of mlx-lm. lora_a is `[in, r]` and lora_b `[r, out]`, of an embedding
`[tokens, r]` and `[r, width]`. Layers that keys name and files do not have begin with a change of zero, and stay so.
"""

from __future__ import annotations

from collections.abc import Sequence

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.config import settings_of
from weightops.formats.adapter.dialects.common import (
    NUMBER,
    Stored,
    make_module,
    pairs_of,
    require_linear,
    uniform,
)
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.adapter.lora import LoraModule
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.transpose import transposed

A, B = ".lora_a", ".lora_b"


def read(checkpoint: Checkpoint, alpha: float | None) -> list[LoraModule]:
    """The modules of an adapter of mlx-lm; raises `UsageError` where nothing says what its scale is."""
    where, settings = escape(checkpoint.name), settings_of(checkpoint)
    if settings.get("fine_tune_type", "lora") != "lora":
        raise IncompatibleInputs(
            f"{where}: {CONFIG_NAME} has fine_tune_type {escape(str(settings['fine_tune_type']))}, expected lora",
            hint="only plain LoRA can be converted",
        )
    parameters = settings.get("lora_parameters", {})
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if alpha is None and not isinstance(scale, int | float):
        raise UsageError(
            f"{where}: nothing says what the scale is: {CONFIG_NAME} has no lora_parameters.scale",
            hint="--alpha, the scale times the rank",
        )
    found = []
    for path, parts in pairs_of(checkpoint, A, B).items():
        a, b = (parts[end] for end in (A, B))
        if len(a.spec.shape) != 2 or len(b.spec.shape) != 2:
            raise IncompatibleInputs(
                f"{where}: {escape(path)} has factors {a.spec} and {b.spec}, those of stacked experts",
                hint="only factors of matrices can be converted",
            )
        own = scale if alpha is None else alpha / b.spec.shape[0]
        assert isinstance(own, int | float)
        found.append(make_module(where, path, own, transposed(a), transposed(b)))
    return found


def write(modules: Sequence[LoraModule], base_name: str | None) -> Stored:
    """The adapter as mlx-lm has it; raises `IncompatibleInputs` for what it has no place for."""
    require_linear(modules, "mlx-lm", embeddings=True)
    same, notes = uniform(modules)
    tensors: dict[str, LazyTensor] = {}
    for module in same:
        own = module.factors
        tensors |= {f"{module.path}{A}": transposed(own.a), f"{module.path}{B}": transposed(own.b)}
    keys = {module.path[found.end() :] if (found := NUMBER.search(module.path)) else module.path for module in same}
    config = {
        "fine_tune_type": "lora",
        "model": base_name,
        "num_layers": -1,
        "lora_parameters": {
            "rank": same[0].rank,
            "scale": same[0].scale,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    return Stored(tensors, {CONFIG_NAME: written_json(config)}, "adapters", metadata={"format": "mlx"}, notes=notes)
