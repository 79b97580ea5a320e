"""What the scripts that make checkpoints of number formats share: tiny models, and weights as a library has them.

A case is a folder: `model` as the library saves it, `native.safetensors` and `float32.safetensors` the weights as the
library dequantises them, by the name that they have in a plain checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def llama(
    hidden: int = 64, inner: int = 160, vocab: int = 83, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Any:
    """Random weights with a few outliers, zeros, and rows of equal values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=vocab,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return planted(LlamaForCausalLM(config)).to(dtype).eval()


def mixtral(dtype: torch.dtype = torch.bfloat16) -> Any:
    """A mixture of three experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        num_local_experts=3,
        vocab_size=48,
        max_position_embeddings=64,
    )
    return planted(MixtralForCausalLM(config)).to(dtype).eval()


def planted(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter.ndim == 1))
            if parameter.ndim == 2 and len(parameter) > 3:
                parameter[0] = 0.0
                parameter[1, 3] = 7.0
                parameter[2] = -0.3
                parameter[3] *= 1e-6
    return model


def case(
    out: Path, name: str, native: dict[str, torch.Tensor], float32: dict[str, torch.Tensor], model: Path | None = None
) -> Path:
    """Writes what a library makes of a case's weights; returns where its model is, or is to be put."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in (("native", native), ("float32", float32)):
        if tensors:
            save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, folder / f"{file}.safetensors")
    return folder / "model"


def save(model: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shards: int = 1) -> None:
    """A folder as transformers writes it, in several files where asked: parts of a weight in different ones."""
    model.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
    (model / "config.json").write_text(json.dumps(config))
    tensors = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
    if shards == 1:
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in list(tensors)[i::shards]}
        save_file(part, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def load(model: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(model.glob("*.safetensors")) for n, t in load_file(file).items()}


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith("_proj.weight")
