"""Small models for tests of merging, in memory; and merge files as published models carry them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from support import evaluate, given_tensor

from weightops.checkpoint import Checkpoint, Sidecar, written_json
from weightops.lazy import LazyTensor
from weightops.operations.merge import parse_stages
from weightops.operations.merge.stage import Stage

PUBLISHED = {path.stem: path for path in sorted((Path(__file__).parent / "data" / "merges").glob("*.yml"))}
VOCABULARY, WIDTH = 6, 4
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCABULARY}
KINDS = ("input_layernorm", "mlp.up_proj", "self_attn.q_proj")
Edit = Callable[[dict[str, torch.Tensor]], object]


def values(layers: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A LLaMA model's tensors, few and small."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for n in range(layers):
        shapes |= {f"model.layers.{n}.{kind}.weight": (WIDTH,) if "norm" in kind else (WIDTH, WIDTH) for kind in KINDS}
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def model(
    name: str,
    layers: int = 4,
    *,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    edit: Edit | None = None,
    sidecars: Mapping[str, Sidecar] | None = None,
    **config: Any,
) -> Checkpoint:
    """A model as `values` has it, edited; its config.json says what else is given."""
    tensors = values(layers, zlib.crc32(name.encode()) if seed is None else seed, dtype)
    if edit is not None:
        edit(tensors)
    said = {**CONFIG, "num_hidden_layers": layers, "torch_dtype": str(dtype).removeprefix("torch."), **config}
    lazy = {n: given_tensor(t) for n, t in tensors.items()}
    files = {"config.json": written_json({k: v for k, v in said.items() if v is not None}), **(sidecars or {})}
    return Checkpoint(name, lazy, files, dict.fromkeys(lazy, "model.safetensors"))


def stage(text: str) -> Stage:
    """The only stage of a merge file in which every path exists."""
    (found,) = parse_stages(text, "m.yml", lambda path: True)
    return found


def evaluated(tensors: Sequence[LazyTensor]) -> list[bytes]:
    """What operations take to look at values."""
    return [evaluate(tensor) for tensor in tensors]
