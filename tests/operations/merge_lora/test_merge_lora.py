"""merge-lora against peft: the tensors of `merge_and_unload`, to the bit, and models that say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import (
    DTYPES,
    LINEAR,
    Made,
    State,
    merged_by_peft,
    state,
)
from safetensors.torch import save_file

import weightops

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def said(config: dict[str, Any], name: str) -> Any:
    return config.get(name, config.get("text_config", {}).get(name))


def check(base: Path, adapters: list[Path], out: Path, rows: int | None = None, **options: Any) -> State:
    """Merge, and hold every tensor and what config.json says of embeddings against peft."""
    expected, settings = merged_by_peft(
        base, adapters, out / "peft", options.get("weight", ()), options.get("two_roundings", False), rows
    )
    weightops.merge_lora(base, adapters, out / "ours", **options)
    found = state(out / "ours")
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if t.dtype != found[n].dtype or not torch.equal(t, found[n])] == []
    own = json.loads((out / "ours" / "config.json").read_text())
    for name in ("tie_word_embeddings", "vocab_size"):
        assert said(own, name) == said(settings, name)
    before = state(base)
    changed = [n for n, t in found.items() if n not in before or not torch.equal(t, before[n])]
    assert changed != []
    return found


KINDS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "all linear layers": ("llama", [{"target_modules": LINEAR}], {}),
    "two roundings": ("llama", [{}], {"two_roundings": True}),
    "rank-stabilised": ("llama", [{"use_rslora": True}], {}),
    "patterns": (
        "llama",
        [
            {
                "rank_pattern": {"q_proj": 7, r"layers\.1\..*down": 2},
                "alpha_pattern": {"0.self_attn.q_proj": 3, "q_proj": 9},
            }
        ],
        {},
    ),
    "dora": ("llama", [{"use_dora": True}], {}),
    "dora, two roundings": ("llama", [{"use_dora": True}], {"two_roundings": True}),
    "bias of factors": ("biased", [{"target_modules": ["q_proj"], "lora_bias": True}], {}),
    "biases of the base": ("biased", [{"target_modules": ["q_proj"], "bias": "all"}], {}),
    "biases of layers": ("biased", [{"target_modules": ["q_proj"], "bias": "lora_only"}], {}),
    "embedding": ("llama", [{"target_modules": ["q_proj", "embed_tokens"]}], {}),
    "embedding, dora": ("llama", [{"target_modules": ["embed_tokens"], "use_dora": True}], {}),
    "head": ("llama", [{"target_modules": ["q_proj", "lm_head"]}], {}),
    "saved whole": ("llama", [{"modules_to_save": ["lm_head", "norm"]}], {}),
    "rows": ("llama", [{"trainable_token_indices": [1, 5, 100]}], {}),
    "rows of both": ("llama", [{"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}}], {}),
    "tied": ("tied", [{"target_modules": LINEAR}], {}),
    "tied, head": ("tied", [{"target_modules": ["q_proj", "lm_head"]}], {}),
    "tied, both": ("tied", [{"target_modules": ["embed_tokens", "lm_head"]}], {}),
    "tied, head saved": ("tied", [{"modules_to_save": ["lm_head"]}], {}),
    "tied, embedding saved": ("tied", [{"modules_to_save": ["embed_tokens"]}], {}),
    "tied, both saved": ("tied", [{"modules_to_save": ["embed_tokens", "lm_head"]}], {}),
    "tied, saved as one": ("tied", [{"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}], {}),
    "tied, rows": ("tied", [{"trainable_token_indices": [1, 5]}], {}),
    "stored in float16": ("llama", [{"target_modules": [*LINEAR, "embed_tokens"], "dtype": torch.float16}], {}),
    "stored in bfloat16": ("llama", [{"use_dora": True, "dtype": torch.bfloat16}], {}),
    "two adapters": ("llama", [{}, {"target_modules": ["q_proj", "v_proj"], "r": 8, "seed": 2}], {}),
    "two with weights": ("llama", [{}, {"use_rslora": True, "seed": 2}], {"weight": (0.3, 1.7)}),
    "two with dora": ("llama", [{"use_dora": True}, {"use_dora": True, "seed": 2}], {}),
    "dora after lora": ("llama", [{}, {"use_dora": True, "seed": 2}], {}),
    "dora after a bias": (
        "biased",
        [{"target_modules": ["q_proj"], "lora_bias": True}, {"target_modules": ["q_proj"], "use_dora": True}],
        {},
    ),
    "Conv1D": ("gpt2", [{"target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "fan_in_fan_out": True}], {}),
    "Conv1D, dora": ("gpt2", [{"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}], {}),
    "fused projections": ("phi3", [{"target_modules": ["qkv_proj", "gate_up_proj"]}], {}),
    "renamed head": ("gpt_neox", [{"target_modules": ["query_key_value", "embed_out"]}], {}),
    "experts, renamed": ("mixtral", [{**EXPERTS, "rank_pattern": {"experts.down_proj": 3}}], {}),
    "experts, one after the other": ("qwen3_moe", [EXPERTS, {**EXPERTS, "seed": 2}], {}),
    "router": ("mixtral", [{"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}], {}),
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=() if i % len(DTYPES) == j else pytest.mark.slow)
        for i, kind in enumerate(KINDS)
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_merges_as_peft_does(made: Made, tmp_path: Path, kind: str, dtype: str) -> None:
    model, adapters, options = KINDS[kind]
    check(made.base(model, dtype), [made.adapter(model, **settings) for settings in adapters], tmp_path, **options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # transformers keeps norms in float32 where the rest is float16
def test_merges_into_stacked_experts_stored_as_they_are(made: Made, tmp_path: Path, dtype: str) -> None:
    check(made.base("gpt_oss", dtype), [made.adapter("gpt_oss", **EXPERTS)], tmp_path)


@pytest.mark.parametrize(("kind", "leaves"), [("mixtral", ["w1", "w2", "w3"]), ("qwen3_moe", LINEAR[4:])])
def test_merges_factors_of_single_experts(made: Made, tmp_path: Path, kind: str, leaves: list[str]) -> None:
    base, tensors = made.base(kind, "bf16"), {}
    torch.manual_seed(5)
    for name, weight in state(base).items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in [*leaves, "q_proj", "gate"]:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, weight.shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(weight.shape[0], 4) * 0.1
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": [*leaves, "q_proj", "gate"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    check(base, [tmp_path / "a"], tmp_path)


RESIZED: list[dict[str, Any]] = [
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"trainable_token_indices": [1, 89]},
    {"trainable_token_indices": {"embed_tokens": [1, 89]}},
    {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}},
]


@pytest.mark.parametrize("rows", [110, 90])
@pytest.mark.parametrize("model", ["llama", "tied"])
@pytest.mark.parametrize("settings", RESIZED, ids=str)
def test_another_vocabulary_is_taken_from_the_adapter(
    made: Made, tmp_path: Path, model: str, settings: dict[str, Any], rows: int
) -> None:
    adapter = made.adapter(model, rows=rows, **settings)
    found = check(made.base(model, "fp16"), [adapter], tmp_path, rows=rows)
    assert found["model.embed_tokens.weight"].shape[0] == rows


@pytest.mark.parametrize(("model", "rows"), [("llama", 90), ("tied", 90), ("tied", 110)])
def test_a_resized_head_that_has_factors_is_saved_alone(made: Made, tmp_path: Path, model: str, rows: int) -> None:
    """Of the untied embedding a larger vocabulary would need rows that nobody saved."""
    adapter = made.adapter(model, rows=rows, target_modules=["q_proj", "lm_head"])
    check(made.base(model, "fp16"), [adapter], tmp_path, rows=rows)
    if model == "llama":
        found = weightops.merge_lora(made.base(model), adapter, tmp_path / "again")
        assert "model.embed_tokens.weight is cut to the 90 rows that an adapter has of lm_head.weight" in found.warnings


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llava", {"target_modules": "all-linear"}),
        ("llava", {"modules_to_save": ["multi_modal_projector", "lm_head"]}),
        ("gemma3", {"target_modules": "all-linear"}),
        ("gemma3", {"modules_to_save": ["lm_head"]}),
        ("qwen2_vl", {"modules_to_save": ["merger"]}),
        ("phimoe", {"target_modules": "all-linear"}),
        ("gpt_neox", {"target_modules": ["dense"], "modules_to_save": ["embed_out"]}),
    ],
    ids=str,
)
def test_names_that_transformers_changes_when_it_loads(
    made: Made, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    check(made.base(kind, "bf16"), [made.adapter(kind, **settings)], tmp_path)
