"""What merge-lora refuses, before anything is written, and by which name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Made, State, edit_config, edit_tensors, state
from safetensors.torch import save_file

import weightops
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError, WeightopsError

Q = "base_model.model.model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens"


def refused(base: Path, adapters: Path | list[Path], **options: Any) -> WeightopsError:
    """The error of a merge that is refused, with a hint and no traces."""
    folder = base.parent / "refused"
    with pytest.raises(WeightopsError, match=r".") as caught:  # callers look at the sentence
        weightops.merge_lora(base, adapters, folder, **options)
    assert caught.value.hint
    assert not list(base.parent.glob("refused*"))
    return caught.value


def copied(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), CorruptInput, f"{Q}.lora_A.weight has no lora_B beside it"),
        (
            lambda t: t.update({f"{Q}.lora_diag": torch.ones(4)}),
            IncompatibleInputs,
            f"{Q}.lora_diag is no part of LoRA",
        ),
        (
            lambda t: t.update({"x.y.weight": torch.ones(4)}),
            IncompatibleInputs,
            "holds x.y.weight, which the base does",
        ),
        (
            lambda t: t.update({n.replace("layers.0.self", "layers.7.self"): v for n, v in t.items()}),
            IncompatibleInputs,
            "model.layers.7.self_attn.q_proj: the base has no such module",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 72), f"{Q}.lora_B.weight": torch.ones(72, 3)}),
            IncompatibleInputs,
            r"q_proj: lora_A is float32 \[3, 72\], adapter_config.json says r = 4",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 80)}),
            IncompatibleInputs,
            r"q_proj: the factors float32 \[4, 80\] and float32 \[72, 4\] do not fit float32 \[72, 72\], the base's",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4)}), CorruptInput, "they are not of one rank"),
        (
            lambda t: t[f"{Q}.lora_B.weight"].view(-1)[3].fill_(float("nan")),
            CorruptInput,
            f"{Q}.lora_B.weight holds values that are no numbers",
        ),
        (
            lambda t: [v.zero_() for n, v in t.items() if "lora_B" in n],
            IncompatibleInputs,
            "changes nothing: lora_B is zero everywhere",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(101, 64)}),
            IncompatibleInputs,
            r"lm_head.weight is float32 \[101, 64\], the base's lm_head.weight is float32 \[101, 72\]",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(110, 72)}),
            IncompatibleInputs,
            "an adapter holds lm_head.weight with 110 rows, and not the new ones of model.embed_tokens.weight",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.model.norm.lora_A.weight": torch.ones(4, 72),
                    "base_model.model.model.norm.lora_B.weight": torch.ones(1, 4),
                }
            ),
            IncompatibleInputs,
            r"model.norm: model.norm.weight is float32 \[72\], no matrix",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    made: Made, tmp_path: Path, change: Callable[[State], object], error: type[WeightopsError], words: str
) -> None:
    base, adapter = copied(made.base(), tmp_path / "base"), copied(made.adapter(), tmp_path / "adapter")

    def edit(tensors: State) -> State:
        change(tensors)
        return tensors

    edit_tensors(adapter, edit)
    found = refused(base, adapter)
    assert isinstance(found, error)
    assert re.search(words, str(found))


def test_names_from_files_are_escaped(made: Made, tmp_path: Path) -> None:
    base, adapter = copied(made.base(), tmp_path / "base"), copied(made.adapter(), tmp_path / "adapter")
    edit_tensors(adapter, lambda tensors: {**tensors, "evil\x1b[31m.weight": torch.ones(2)})
    assert r"evil\x1b[31m.weight" in str(refused(base, adapter))


def with_zeros(*letters: str, scale: float = 0) -> Callable[[State], State]:
    """An edit that takes these factors times `scale`."""
    return lambda t: {n: v * scale if any(f"lora_{letter}" in n for letter in letters) else v for n, v in t.items()}


def alternating(tensors: State) -> State:
    letters = {"q_proj": "lora_A", "down_proj": "lora_B"}
    return {n: v * 0 if any(m in n and f in n for m, f in letters.items()) else v for n, v in tensors.items()}


@pytest.mark.parametrize(
    ("settings", "edit", "config", "words"),
    [
        ({}, with_zeros("B"), {}, "lora_B is zero everywhere"),
        ({}, with_zeros("A"), {}, "lora_A is zero everywhere"),
        ({}, alternating, {}, "of each module lora_alpha, lora_A or lora_B is zero"),
        ({}, None, {"lora_alpha": 0}, "lora_alpha is zero everywhere"),
        ({}, None, {"alpha_pattern": {"q_proj": 0, "down_proj": 0}}, "lora_alpha is zero everywhere"),
        (
            {},
            with_zeros("A", scale=1e-30),
            {},
            "what it holds is what the base has, or too small for the base's numbers",
        ),
        ({"modules_to_save": ["norm"]}, "base", {}, "lora_B is zero everywhere"),
        ({"target_modules": ["embed_tokens"]}, with_zeros("embedding_B"), {}, "lora_B is zero everywhere"),
        ({"trainable_token_indices": [1, 5]}, "base", {}, "lora_B is zero everywhere"),
    ],
)
def test_adapters_of_nothing(
    made: Made, tmp_path: Path, settings: dict[str, Any], edit: Any, config: dict[str, Any], words: str
) -> None:
    base = copied(made.base(), tmp_path / "base")
    adapter = copied(made.adapter(**settings), tmp_path / "adapter")
    edit_config(adapter, **config)
    if edit == "base":
        before = state(base)
        known = {f"base_model.model.{name}": tensor for name, tensor in before.items()}
        known[f"{EMBED}.token_adapter.trainable_tokens_delta"] = before["model.embed_tokens.weight"][[1, 5]]
        edit_tensors(adapter, lambda t: {n: known.get(n, v * ("lora_B" not in n)) for n, v in t.items()})
    elif edit is not None:
        edit_tensors(adapter, edit)
    assert f"adapter: changes nothing: {words}" in str(refused(base, adapter))


def test_a_weight_of_nothing_changes_nothing(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    assert "changes nothing: its weight is 0" in str(refused(base, made.adapter(), weight=[0.0]))
    assert "changes nothing: its weight is 0" in str(
        refused(base, [made.adapter(), made.adapter(seed=2)], weight=[1, 0])
    )


def test_trained_weights_that_the_base_has_no_place_for(made: Made, tmp_path: Path) -> None:
    base, adapter = copied(made.base(), tmp_path / "base"), copied(made.adapter(), tmp_path / "adapter")
    save_file({"v_head.summary.weight": torch.ones(1, 72)}, adapter / "value_head.safetensors")
    found = refused(base, adapter)
    assert "adapter/value_head.safetensors: was trained with the adapter and holds v_head.summary.weight" in str(found)
    assert "move value_head.safetensors out of the folder" in str(found.hint)


def test_a_base_that_training_did_not_gather(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    tensors = {n: torch.empty(0) if "layers.1" in n else t for n, t in state(base).items()}
    save_file(tensors, base / "model.safetensors")
    found = refused(base, made.adapter())
    assert "layers.1.input_layernorm.weight is float32 [0], without elements" in str(found)
    assert "ZeRO-3" in str(found.hint)


@pytest.mark.parametrize(
    ("kind", "settings", "changes", "words"),
    [
        (
            "llama",
            {"modules_to_save": ["lm_head"]},
            {"modules_to_save": ["lm_head", "norm"]},
            "lacks model.norm.weight",
        ),
        ("llama", {"trainable_token_indices": [1, 5]}, {"trainable_token_indices": [1]}, "for the 1 rows in"),
        ("llama", {"trainable_token_indices": [1, 5]}, {"trainable_token_indices": [1, 101]}, "for the 2 rows in"),
        ("llama", {"trainable_token_indices": [1, 5]}, {"trainable_token_indices": [-1, 5]}, "for the 2 rows in"),
        ("llama", {"trainable_token_indices": [1, 5]}, {"trainable_token_indices": [5, 5]}, "for the 2 rows in"),
        (
            "tied",
            {"target_modules": ["lm_head"]},
            {"ensure_weight_tying": True},
            "peft adds the change of tied embeddings twice",
        ),
        (
            "qwen3_moe",
            {"target_parameters": ["experts.down_proj"]},
            {"target_parameters": ["experts.other"]},
            "no such module",
        ),
        ("qwen3_moe", {"target_parameters": ["experts.down_proj"]}, {"r": 2}, r"says r = 2 for each of 4 experts"),
    ],
)
def test_configs_that_do_not_fit_the_tensors(
    made: Made, tmp_path: Path, kind: str, settings: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    base = copied(made.base(kind), tmp_path / "base")
    adapter = copied(made.adapter(kind, **{"target_modules": ["q_proj"], **settings}), tmp_path / "adapter")
    edit_config(adapter, **changes)
    found = refused(base, adapter)
    assert re.search(words, str(found))


def test_a_bias_without_one_in_the_base(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    adapter = copied(made.adapter("biased", target_modules=["q_proj"], lora_bias=True), tmp_path / "adapter")
    assert "has a bias for model.layers.0.self_attn.q_proj.weight, and the base has none" in str(refused(base, adapter))


def test_factors_of_single_experts_with_rank_stabilised_scales(made: Made, tmp_path: Path) -> None:
    base = copied(made.base("qwen3_moe"), tmp_path / "base")
    adapter = copied(made.adapter("qwen3_moe", target_modules=["q_proj"], use_rslora=True), tmp_path / "adapter")
    expert = "base_model.model.model.layers.0.mlp.experts.0.up_proj"
    factors = {f"{expert}.lora_A.weight": torch.ones(4, 64), f"{expert}.lora_B.weight": torch.ones(48, 4)}
    edit_tensors(adapter, lambda tensors: tensors | factors)
    assert "with use_rslora, peft scales the factors of single experts" in str(refused(base, adapter))


# --- several adapters ---------------------------------------------------------------------------------------------


def test_several_adapters_that_replace_the_same(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    saved = [made.adapter(modules_to_save=["lm_head"], seed=seed) for seed in (1, 2)]
    assert "both replace lm_head.weight" in str(refused(base, saved))
    factors = made.adapter(target_modules=["lm_head"])
    assert "both replace lm_head.weight" in str(refused(base, [factors, saved[0]]))
    rows = [made.adapter(trainable_token_indices=[1, n], seed=n) for n in (2, 3)]
    assert "row 1 is replaced by two adapters" in str(refused(base, rows))
    assert "has rows of its own, and the same tensor is changed as a whole" in str(
        refused(base, [rows[0], made.adapter(target_modules=["embed_tokens"])])
    )


def test_weights_of_what_has_no_scale(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    for settings in ({"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"trainable_token_indices": [1]}):
        found = refused(base, made.adapter(**settings), weight=[0.5])
        assert isinstance(found, UsageError)
        assert "which has no scale that 0.5 could be a factor of" in str(found)
    assert "2 weights for 1 adapters" in str(refused(base, made.adapter(), weight=[1, 2]))
    assert "a weight must be a finite number" in str(refused(base, made.adapter(), weight=[float("nan")]))
    assert "there is no adapter" in str(refused(base, []))


# --- bases --------------------------------------------------------------------------------------------------------


def test_bases_that_are_quantised(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    tensors = state(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, base / "model.safetensors")
    assert f"{name} is int8 [72, 72], expected float32, float16 or bfloat16" in str(refused(base, made.adapter()))
    packed = {n: t for n, t in tensors.items() if n != name}
    save_file({**packed, name.replace("weight", "qweight"): torch.ones(9)}, base / "model.safetensors")
    assert "q_proj has no qzeros, expected qweight, qzeros and scales" in str(refused(base, made.adapter()))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "base: config.json: quantization_config: there is no required field bits" in str(
        refused(base, made.adapter())
    )


def test_bases_that_are_something_else(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    adapter = copied(made.adapter(), tmp_path / "adapter")
    assert "the base adapter is a LoRA adapter, not a model" in str(refused(adapter, adapter))
    assert "base: has no adapter_config.json" in str(refused(base, base))
    (base / "weightops-delta.json").write_text("{}")
    assert "the base base is a delta" in str(refused(base, adapter))


def test_a_head_that_is_not_there(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    save_file({n: t for n, t in state(base).items() if n != "lm_head.weight"}, base / "model.safetensors")
    found = refused(base, made.adapter(target_modules=["lm_head"]))
    assert "lm_head.weight, which the base does not have" in str(found)


def test_modules_of_which_the_base_has_two(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    twice = {f"{tower}.{n.removeprefix('model.')}": t for n, t in state(base).items() for tower in ("one", "two")}
    save_file({name: tensor.clone() for name, tensor in twice.items()}, base / "model.safetensors")
    words = "q_proj.weight may be one.layers.0.self_attn.q_proj.weight or two.layers.0.self_attn.q_proj.weight"
    assert words in str(refused(base, made.adapter(target_modules=["q_proj"])))


def test_modules_that_are_no_linear_layers(made: Made, tmp_path: Path) -> None:
    base = copied(made.base(), tmp_path / "base")
    tensors, name = state(base), "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: torch.ones(72, 72, 3)}, base / "model.safetensors")
    assert "a convolution" in str(refused(base, made.adapter()))
    other = {n: t for n, t in tensors.items() if n != name}
    save_file({**other, name.replace("weight", "in_proj_weight"): torch.ones(9, 9)}, base / "model.safetensors")
    assert "is a MultiheadAttention module in the base" in str(refused(base, made.adapter()))
