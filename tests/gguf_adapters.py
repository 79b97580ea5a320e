"""LoRA adapters for the small models of GGUF's families, with factors of everything that llama.cpp has factors of."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_models import save_family
from safetensors import safe_open
from safetensors.torch import save_file

PREFIX = "base_model.model."
_NOT_THERE = re.compile(
    r"(.*\.kv_b_proj|.*\.experts\.(gate_up|down)_proj.*|.*_norm|.*\.router|lm_head|.*embed_tokens)\.weight"
)
"""Weights that llama.cpp takes apart, that are no Linear layers, and those that only some tests give factors."""


def shapes_of(base: Path) -> dict[str, list[int]]:
    """The shapes of a model's tensors by name."""
    with safe_open(base / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # it is no mapping


def save_lora(
    folder: Path,
    base: Path,
    *,
    only: str = r".*",
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    embedding: bool = False,
    norms: bool = False,
    **settings: Any,
) -> Path:
    """An adapter for all matrices of a model whose names match, as peft names their factors; values from a generator.

    `embedding`: it changes the embedding of tokens too; `norms`: it keeps the norms of layers whole.
    """
    chance = np.random.default_rng(11)
    tensors, targets, whole = dict[str, torch.Tensor](), set[str](), []

    def drawn(*shape: int) -> torch.Tensor:
        return torch.from_numpy((chance.normal(size=shape) / 3).astype(np.float32)).to(dtype)

    for name, shape in shapes_of(base).items():
        module = name.removesuffix(".weight")
        if norms and name.endswith("layernorm.weight"):
            # Multiples of 2**-8, which come back from Gemma's sums with 1 as they were.
            tensors[f"{PREFIX}{name}"] = (drawn(*shape) * 64).round() / 256 + 0.0
            whole.append(module)
        elif embedding and name == "model.embed_tokens.weight":
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = drawn(rank, shape[0])
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = drawn(shape[1], rank)
            targets.add("embed_tokens")
        elif len(shape) == 2 and name.endswith(".weight") and not _NOT_THERE.fullmatch(name) and re.search(only, name):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = drawn(rank, shape[1])
            tensors[f"{PREFIX}{module}.lora_B.weight"] = drawn(shape[0], rank)
            targets.add(module.rpartition(".")[2])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    config |= {"target_modules": sorted(targets), "modules_to_save": whole or None, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


@functools.cache
def made() -> Path:
    """Bases, each made once for the tests of a process, with an adapter for each."""
    folder = Path(tempfile.mkdtemp())
    for name in ("llama", "qwen2", "gemma", "mixtral", "deepseek3"):
        save_family(folder / name, name)
    more: dict[str, dict[str, Any]] = {"qwen2": {"embedding": True, "norms": True}, "gemma": {"norms": True}}
    for name in ("llama", "qwen2", "gemma", "mixtral", "deepseek3"):
        save_lora(folder / f"{name}-lora", folder / name, **more.get(name, {}))
    return folder
