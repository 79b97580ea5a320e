"""Copies of layers that change nothing until they are trained (LLaMA-Pro), held against transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM

import weightops
from weightops.errors import UsageError

IDS = torch.tensor([[3, 5, 9, 17, 33]])
KINDS = ["llama", "qwen2", "gemma2", "olmo2", "gpt2", "gpt_neox", "bloom", "mixtral", "qwen3_moe", "granitemoe", "phi"]
KINDS += ["opt", "xglm", "gpt_neo", "gptj", "lfm2", "mamba", "jetmoe"]


def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_to_the_bit(kind: str, tmp_path: Path) -> None:
    settings = {**COMMON, **FAMILIES.get(kind, {}), "mlp_only_layers": []}
    if "sliding_window" in settings:
        settings |= {"layer_types": ["full_attention"] * 4}
    tiny(kind, **settings).save_pretrained(tmp_path / "model")
    result = weightops.shard(tmp_path / "model", tmp_path / "out", layers="0-1,1=,2-3,3=")
    assert any("layers 2, 5 are silent" in sentence for sentence in result.done)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(tmp_path / "out", dtype), logits(tmp_path / "model", dtype))


def test_what_a_block_writes_is_not_known(tmp_path: Path) -> None:
    tiny("llama", **COMMON).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    renamed = {name.replace("down_proj", "somewhere"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"cannot tell what model\.layers\.1\.mlp adds to the residual"):
        weightops.shard(tmp_path / "model", tmp_path / "out", layers="0,0=,1-3")


def test_a_quantised_layer_is_not_silenced(tmp_path: Path) -> None:
    tiny("llama", **COMMON).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UsageError, match="part of a quantised weight"):
        weightops.shard(tmp_path / "model", tmp_path / "out", layers="0,0=,1-3")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma3n_text", {}, r"cannot tell what model\.layers\.1\.altup adds"),
        ("gemma4_text", {}, r"cannot tell what model\.layers\.1\.layer_scalar adds"),
        ("opt", {"do_layer_norm_before": False}, "norms lie in the residual .do_layer_norm_before is false"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "norms lie in the residual"),
        ("openai-gpt", {"n_embd": 64, "n_layer": 4, "n_head": 4}, "norms lie in the residual .it is a openai-gpt"),
    ],
)
def test_a_layer_that_cannot_add_nothing(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny(kind, **{**COMMON, **FAMILIES.get(kind, {}), **changes}).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=message):
        weightops.shard(tmp_path / "model", tmp_path / "out", layers="0,0=,1-3")
    assert not (tmp_path / "out").exists()
