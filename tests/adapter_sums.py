"""What adapters change, read anew from their files; and what peft makes of several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from adapters import load_model, quietly, state
from peft import PeftModel
from peft.tuners.lora import LoraLayer

Changes = dict[str, torch.Tensor]
PREFIX = "base_model.model."


def changes_of(folder: Path) -> Changes:
    """scale B A of every module in float64, by adapter_config.json; those of embeddings are [width, tokens]."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), state(folder)
    found = {}
    for name, a in tensors.items():
        for kind in (".lora_A", ".lora_embedding_A"):
            module, is_a, _ = name.partition(kind)
            if is_a:
                path = module.removeprefix(PREFIX)
                rank = _of(config.get("rank_pattern"), path, config["r"])
                alpha = _of(config.get("alpha_pattern"), path, config["lora_alpha"])
                assert a.shape[0] == rank, path
                b = tensors[name.replace(kind, kind.replace("A", "B"))]
                scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
                found[path] = scale * b.double() @ a.double()
    return found


def _of(pattern: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    return next((number for end, number in (pattern or {}).items() if f".{path}".endswith(f".{end}")), otherwise)


def total(folders: Sequence[Path], weights: Sequence[float]) -> Changes:
    """The weighted sum of what adapters change."""
    found: Changes = {}
    for folder, weight in zip(folders, weights, strict=True):
        for path, change in changes_of(folder).items():
            found[path] = found.get(path, 0) + weight * change
    return found


def distance(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> float:
    """The largest relative distance between changes of modules."""
    assert one.keys() == two.keys()
    return max(float((one[n].double() - two[n].double()).norm() / two[n].norm()) for n in two)


def loaded(base: Path, folders: Sequence[Path]) -> Any:
    """A model with adapters a0, a1, ... in peft, which must find all of their tensors and no others."""
    with quietly():
        model = PeftModel.from_pretrained(load_model(base), folders[0], adapter_name="a0")
        for i, folder in enumerate(folders[1:], 1):
            result = model.load_adapter(folder, adapter_name=f"a{i}")
            assert not result.unexpected_keys
            assert not [key for key in result.missing_keys if f".a{i}" in key]
    return model


def combined_by_peft(base: Path, folders: Sequence[Path], weights: Sequence[float], method: str, **options: Any) -> Any:
    """A model whose adapter `made` is what peft's `add_weighted_adapter` makes of others."""
    model = loaded(base, folders)
    with quietly():
        names = [f"a{i}" for i in range(len(folders))]
        model.add_weighted_adapter(names, list(weights), "made", combination_type=method, **options)
    return model


def changes_in(model: Any, adapter: str) -> Changes:
    """What peft says that an adapter changes; of embeddings the other way round, as `changes_of` has them."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A):
            change = module.get_delta_weight(adapter).detach()
            is_turned = adapter in module.lora_embedding_A or getattr(module, "fan_in_fan_out", False)
            found[name] = change.T if is_turned else change
    return found


def factors_in(model: Any, adapter: str) -> Changes:
    """A and B of an adapter in peft, by the names of its file."""
    end = f".{adapter}.weight"
    return {
        name.replace(end, ".weight"): tensor.detach()
        for name, tensor in model.state_dict().items()
        if name.endswith(end)
    }
