"""`weightops merge` in a folder with three small models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from merging import CONFIG, values
from safetensors.torch import load_file
from support import write_checkpoint

LAYERS = 3
Say = Callable[[str], tuple[int, str, str]]
"""Runs a command line: exit code, stdout, stderr."""


def make_models(folder: Path) -> None:
    """A base and two models that were tuned from it, in float32."""
    base = values(LAYERS, 0)
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 4}
    config = {**CONFIG, **sizes, "num_hidden_layers": LAYERS, "torch_dtype": "float32"}
    for seed, name in enumerate(("base", "a", "b")):
        change = values(LAYERS, seed)
        tensors = {n: t + 0.01 * change[n] if seed else t for n, t in base.items()}
        write_checkpoint(folder / name, tensors, config, shards=1 + (name == "a"))


def state(folder: str | Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(path).items()}


def written(name: str, document: dict[str, Any]) -> str:
    Path(name).write_text(yaml.safe_dump(document))
    return name
