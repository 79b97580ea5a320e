"""Mixtures made of dense models: what a model's class takes for granted, and what no mixture can be made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import weightops
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError

IDS = torch.tensor([[3, 5, 9, 17, 33]])


def dense(folder: Path, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
    save_tiny(folder, kind, seed, **{**COMMON, **FAMILIES.get(kind, {}), **changes})
    return folder


def changed(folder: Path, gone: tuple[str, ...] = (), **settings: Any) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in gone}
    path.write_text(json.dumps({**config, **settings}))


def logits(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def mixed(*models: Path, **fields: Any) -> dict[str, Any]:
    experts = [{"source_model": str(model)} for model in models]
    return {"base_model": str(models[0]), "gate_mode": "random", "experts": experts, **fields}


@pytest.mark.parametrize(
    "gone",
    [("rms_norm_eps",), ("rope_theta", "rope_parameters", "rope_scaling"), ("num_key_value_heads",), ("hidden_act",)],
)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_copies_answer_as_the_one_did_whose_config_leaves_much_unsaid(
    kind: str, gone: tuple[str, ...], tmp_path: Path
) -> None:
    heads = {"llama": 4, "mistral": 8, "qwen3": 32}[kind]
    model = dense(
        tmp_path / "model", kind, sliding_window=None, num_attention_heads=heads, num_key_value_heads=heads, head_dim=4
    )
    changed(model, gone)
    before = logits(model)
    weightops.experts(None, tmp_path / "out", from_dense=mixed(model, model), seed=1)
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "dtype is int8, expected one of 16 bits"),
        ({"dtype": "float8_e4m3fn"}, "expected one of 16 bits"),
        ({"architecture": "qwen"}, "architecture is qwen, and these models make a mixtral"),
    ],
)
def test_a_document_that_cannot_be_meant(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    with pytest.raises(UsageError, match=message):
        weightops.experts(None, tmp_path / "out", from_dense=mixed(model, model, **fields), seed=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-1, 1 << 70])
def test_a_seed_that_is_none(seed: int, tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    with pytest.raises(UsageError, match="a seed is a whole number from 0"):
        weightops.experts(None, tmp_path / "out", from_dense=mixed(model, model), seed=seed)


def test_no_document_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="from_dense is a list"):
        weightops.experts(None, tmp_path / "out", from_dense=[1])  # type: ignore[arg-type]


def test_an_expert_that_computes_with_another_function(tmp_path: Path) -> None:
    one, other = dense(tmp_path / "one"), dense(tmp_path / "other", hidden_act="gelu")
    with pytest.raises(IncompatibleInputs, match=r"other/config\.json: hidden_act is gelu, expected silu as in one"):
        weightops.experts(None, tmp_path / "out", from_dense=mixed(one, other), seed=1)
    assert not (tmp_path / "out").exists()


def test_prompts_whose_tokens_have_no_numbers(tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][5:] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    experts = [{"source_model": str(model), "positive_prompts": [text]} for text in ("one", "two")]
    document = {"base_model": str(model), "gate_mode": "cheap_embed", "experts": experts}
    with pytest.raises(CorruptInput, match="rows of tokens in the prompts that are not finite"):
        weightops.experts(None, tmp_path / "out", from_dense=document)
    assert not (tmp_path / "out").exists()
