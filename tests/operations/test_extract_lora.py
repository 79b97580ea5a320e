"""extract_lora, held against peft: it loads the adapter, and merging it into the base gives the tuned model."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import digests, evaluate, from_bytes, given_tensor, torch_dtype, write_checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

import weightops
from weightops.checkpoint import Checkpoint, Written
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.delta import NAME as DELTA_NAME
from weightops.formats.folder import open_checkpoint
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.operations.extract_lora.operation import extract_lora
from weightops.ops.stored import Stored
from weightops.spec import DType

State = dict[str, torch.Tensor]
Model = Any
PREFIX = "base_model.model."
SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "tied llama": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2, whose q, k and v have biases": lambda: Qwen2Config(**LLAMA),
    "gpt2, which is tied and keeps weights as [in, out]": lambda: GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16
    ),
    "gpt-neox, whose head has another name in files": lambda: GPTNeoXConfig(**SMALL, num_attention_heads=4),
    "mixtral, whose experts are stacked": lambda: MixtralConfig(**LLAMA, num_local_experts=4),
    "qwen2_moe, whose shared experts are layers": lambda: of_kind("qwen2_moe", num_experts=4, **SHARED),
    "qwen3_moe, whose first layer is dense": lambda: of_kind("qwen3_moe", num_experts=4, mlp_only_layers=[0], **MOE),
    "deepseek_v3, which has both": lambda: of_kind("deepseek_v3", n_routed_experts=4, **LATENT),
    "phimoe, whose router has another name in files": lambda: of_kind("phimoe", num_local_experts=4, **TOP),
    "minimax_m2, whose router is no layer": lambda: of_kind("minimax_m2", num_local_experts=4, head_dim=8, **TOP),
    "granitemoe, whose files stack experts otherwise": lambda: of_kind("granitemoe", num_local_experts=4, **TOP),
    "ernie, whose router has parts": lambda: of_kind("ernie4_5_moe", moe_num_experts=4, moe_k=2, **MOE),
}
TOP = {"num_experts_per_tok": 2}
MOE = {"moe_intermediate_size": 24, **TOP}
SHARED = {"shared_expert_intermediate_size": 40, **MOE}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, **MOE}


def of_kind(kind: str, **settings: Any) -> Any:
    return AutoConfig.for_model(kind, **{**LLAMA, **settings})


def values(tensors: Sequence[LazyTensor]) -> list[bytes]:
    return [evaluate(tensor) for tensor in tensors]


def extract(base: Checkpoint | Path, tuned: Checkpoint | Path, **options: Any) -> Checkpoint:
    opened = (c if isinstance(c, Checkpoint) else open_checkpoint(c) for c in (base, tuned))
    return extract_lora(*opened, evaluate=values, **options)


def save_model(model: Model, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> Model:
    return AutoModelForCausalLM.from_pretrained(folder)


def make_models(folder: Path, config: Any, change: Callable[[Model], object]) -> tuple[Path, Path]:
    """Folders of a model with random parameters, and of the same one after `change`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.05
    base = save_model(model, folder / "base")
    change(model)
    return base, save_model(model, folder / "tuned")


def change_everything(model: Model) -> None:
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02


def merged(base: Path, adapter: Checkpoint, folder: Path, vocabulary: int | None = None) -> State:
    """The model that peft makes of base and adapter."""
    weightops.save(adapter, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(base)
        if vocabulary is not None:
            model.resize_token_embeddings(vocabulary)
        state: State = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return state


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.double() - right.double()).norm() / right.double().norm())


def is_factored(name: str) -> bool:
    return name.endswith((".weight", "gate_up_proj", "down_proj")) and not any(
        part in name for part in ("norm", "embed", "lm_head", "wte", "wpe", "ln_", ".gate.weight")
    )


def config_of(adapter: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(adapter.sidecar("adapter_config.json") or b"")
    return found


def tensors_of(adapter: Checkpoint) -> State:
    return {n: from_bytes(evaluate(t), torch_dtype(t.spec.dtype), t.spec.shape) for n, t in adapter.items()}


# --- peft as the oracle -------------------------------------------------------------------------------------------


def test_the_change_that_peft_merged_is_given_back(tmp_path: Path) -> None:
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"])

    def train(model: Model) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained = get_peft_model(model, settings)
            for name, parameter in trained.named_parameters():
                if "lora_" in name:
                    parameter.data = torch.randn_like(parameter)
            trained.merge_and_unload()

    base, tuned = make_models(tmp_path, LlamaConfig(**LLAMA), train)
    adapter = extract(base, tuned, rank=4)
    config = config_of(adapter)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert adapter.warnings == ()
    by_peft = merged(base, adapter, tmp_path / "lora")
    weightops.merge_lora(base, [tmp_path / "lora"], tmp_path / "ours")
    before = load_file(base / "model.safetensors")
    for found in (by_peft, load_file(tmp_path / "ours/model.safetensors")):
        for name, tensor in load_file(tuned / "model.safetensors").items():
            change = tensor - before[name]
            assert difference(found[name] - before[name], change) < 1e-5 if change.any() else found[name].equal(tensor)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_which_everything_changed_comes_back_from_factors_of_full_rank(tmp_path: Path, name: str) -> None:
    base, tuned = make_models(tmp_path, CONFIGS[name](), change_everything)
    found = merged(base, extract(base, tuned, rank=64), tmp_path / "lora")
    expected = load_model(tuned).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert difference(found[key], tensor) < 1e-6 if is_factored(key) else found[key].equal(tensor), key


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_vocabulary_is_kept_whole(tmp_path: Path, tied: bool) -> None:
    def grow(model: Model) -> None:
        change_everything(model)
        model.resize_token_embeddings(43)

    base, tuned = make_models(tmp_path, LlamaConfig(**LLAMA, tie_word_embeddings=tied), grow)
    adapter = extract(base, tuned, rank=64)
    assert any("resize_token_embeddings(43)" in warning for warning in adapter.warnings)
    found, expected = merged(base, adapter, tmp_path / "lora", vocabulary=43), load_model(tuned).state_dict()
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert found[key].equal(expected[key])


def test_experts_get_factors_of_one_rank_also_where_only_one_of_them_differs(tmp_path: Path) -> None:
    """Attention has more layers, and needs a higher rank; peft takes stacked factors to be of the usual rank."""

    def change(model: Model) -> None:
        weights = model.model.layers[1].mlp.experts.down_proj.data
        weights[0] += torch.randn(32, 2) @ torch.randn(2, 48)
        weights[1] += torch.randn(32, 1) @ torch.randn(1, 48)
        for name, parameter in model.named_parameters():
            if "self_attn" in name:
                parameter.data += torch.randn(32, 8) @ torch.randn(8, 32)

    config = MixtralConfig(**{**LLAMA, "num_key_value_heads": 4}, num_local_experts=2)
    base, tuned = make_models(tmp_path, config, change)
    adapter = extract(base, tuned, energy=1.0, target=["self_attn.*", "w2"])
    assert config_of(adapter)["r"] == 2
    ranks = config_of(adapter)["rank_pattern"]
    assert ranks.pop("model.layers.1.mlp.experts.gate_up_proj") == 4, "peft puts those of two layers side by side"
    assert set(ranks.values()) == {8}
    found, expected = merged(base, adapter, tmp_path / "lora"), load_model(tuned).state_dict()
    assert all(difference(found[key], tensor) < 1e-5 for key, tensor in expected.items())


@pytest.mark.parametrize("changed", [r"\.1\.mlp\.experts\.", r"q_proj|experts", r"shared_expert\."])
def test_peft_changes_the_experts_that_differ_and_no_other_layer(tmp_path: Path, changed: str) -> None:
    def change(model: Model) -> None:
        for name, parameter in model.named_parameters():
            if re.search(changed, name):
                parameter.data += torch.randn_like(parameter) * 0.02

    config = of_kind("qwen2_moe", num_experts=4, **SHARED)
    base, tuned = make_models(tmp_path, config, change)
    found = merged(base, extract(base, tuned, rank=64), tmp_path / "lora")
    before, expected = load_model(base).state_dict(), load_model(tuned).state_dict()
    for key, tensor in expected.items():
        assert difference(found[key], tensor) < 1e-6 if re.search(changed, key) else found[key].equal(before[key]), key
    weightops.merge_lora(base, [tmp_path / "lora"], tmp_path / "ours")
    ours, files = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", tuned))
    assert all(difference(ours[name], tensor) < 1e-6 for name, tensor in files.items())


def test_targets_are_found_by_the_names_of_files_and_of_peft(tmp_path: Path) -> None:
    config = of_kind("phimoe", num_local_experts=2, **TOP)
    base, tuned = make_models(tmp_path, config, change_everything)
    for target in ("*.block_sparse_moe.experts.1.w2", "*.mlp.experts.1.w2"):
        adapter = extract(base, tuned, rank=4, target=[target], rest="drop")
        assert config_of(adapter)["target_modules"] == []
        assert config_of(adapter)["target_parameters"] == [
            f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("down_proj", "gate_up_proj")
        ]
        factors = {n: t for n, t in tensors_of(adapter).items() if t.any()}
        assert factors.keys() == {
            f"{PREFIX}model.layers.{layer}.mlp.experts.1.w2.lora_{letter}.weight" for layer in (0, 1) for letter in "AB"
        }


# --- small state dicts --------------------------------------------------------------------------------------------

Q, K, UP, NORM = (
    f"model.layers.0.{name}.weight"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm")
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def state(seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (40, 16), Q: (16, 16), K: (8, 16), UP: (24, 16), NORM: (16,), HEAD: (40, 16)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def checkpoint(tensors: State, name: str = "base", config: dict[str, Any] | None = None) -> Checkpoint:
    sidecars = {"config.json": Written(json.dumps(config or {"model_type": "llama"}).encode())}
    return Checkpoint(name, {n: given_tensor(t) for n, t in tensors.items()}, sidecars)


def changed(*names: str, by: State | None = None) -> Checkpoint:
    """The state with some tensors of another seed, and whatever else `by` says."""
    other = state(1)
    return checkpoint({**state(), **{name: other[name] for name in names}, **(by or {})}, "tuned")


BASE = checkpoint(state())


def energy_of(change: torch.Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(change.double()).square()
    return float(squares[:rank].sum() / squares.sum())


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy_chooses_the_least_rank_that_holds_it(energy: float) -> None:
    adapter = extract(BASE, changed(Q, K, UP), energy=energy)
    config, factors = config_of(adapter), tensors_of(adapter)
    for name in (Q, K, UP):
        module = name.removesuffix(".weight")
        rank = config["rank_pattern"].get(module, config["r"])
        change = state(1)[name] - state()[name]
        assert energy_of(change, rank) >= energy - 1e-6
        assert energy_of(change, rank - 1) < energy
        a, b = (factors[f"{PREFIX}{module}.lora_{letter}.weight"] for letter in "AB")
        assert (a.shape, b.shape) == ((rank, 16), (len(change), rank))
        residual = float((change - b @ a).double().norm() / change.double().norm())
        assert residual**2 <= 1 - energy + 1e-6
    assert config["alpha_pattern"] == config["rank_pattern"]


@pytest.mark.parametrize("limit", [{"rank": 3}, {"max_rank": 3}])
def test_modules_that_need_more_than_the_largest_rank_are_named(limit: dict[str, int]) -> None:
    adapter = extract(BASE, changed(Q), energy=0.9, **limit)
    share = 100 * energy_of(state(1)[Q] - state()[Q], 3)
    assert adapter.warnings == (
        f"a rank of 3 holds less than 90 % of the change of model.layers.0.self_attn.q_proj ({share:.3g} %)",
    )
    assert config_of(adapter)["r"] == 3


def test_a_rank_is_cut_to_what_a_matrix_has() -> None:
    config = config_of(extract(BASE, changed(Q, K, UP), rank=12))
    assert (config["r"], config["rank_pattern"]) == (12, {"model.layers.0.self_attn.k_proj": 8})


def test_what_does_not_differ_has_no_place_in_the_adapter() -> None:
    factors = [f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{letter}.weight" for letter in "AB"]
    assert list(extract(BASE, changed(Q), rank=2)) == factors
    saved = extract(BASE, changed(Q, NORM), rank=2)
    assert list(saved) == [*factors, f"{PREFIX}{NORM}"]
    assert config_of(saved)["modules_to_save"] == ["model.layers.0.input_layernorm"]


def test_names_are_short_only_if_they_say_which_modules_are_meant() -> None:
    second = Q.replace("0", "1")
    base = checkpoint({**state(), second: state()[Q]})
    only_first, both = {second: state()[Q]}, {second: state(2)[Q]}
    assert config_of(extract(base, changed(Q, by=only_first), rank=2))["target_modules"] == [Q.removesuffix(".weight")]
    assert config_of(extract(base, changed(Q, by=both), rank=2))["target_modules"] == ["q_proj"]


def test_the_rest_is_refused_by_name_or_left_out_with_a_warning() -> None:
    tuned = changed(Q, EMBEDDING, NORM)
    with pytest.raises(IncompatibleInputs, match=rf"{EMBEDDING}, {NORM}: the values differ"):
        extract(BASE, tuned, rank=2, rest="refuse")
    adapter = extract(BASE, tuned, rank=2, rest="drop")
    assert len(adapter) == 2
    assert adapter.warnings == (f"left out, because they are no Linear weights: the changes of {EMBEDDING}, {NORM}",)
    assert config_of(adapter)["modules_to_save"] is None


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (["q_proj"], {"q_proj"}),
        (["*.mlp.*", "k_proj"], {"k_proj", "up_proj"}),
        (["model.layers.0.self_attn.*"], {"q_proj", "k_proj"}),
        (["lm_head", "q_proj"], {"lm_head", "q_proj"}),
    ],
)
def test_targets_get_factors_and_other_layers_are_named(targets: list[str], modules: set[str]) -> None:
    adapter = extract(BASE, changed(Q, K, UP, HEAD), rank=2, target=targets)
    config = config_of(adapter)
    assert set(config["target_modules"]) == modules
    assert config["modules_to_save"] == (None if "lm_head" in modules else ["lm_head"])
    left_out = [name for name in (K, UP, Q) if name.split(".")[-2] not in modules]
    assert any(f"no target matches: the changes of {', '.join(sorted(left_out))}" in w for w in adapter.warnings)


def test_every_option_of_the_python_function_reaches_the_operation(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", state())
    tuned = write_checkpoint(tmp_path / "tuned", {**state(1), K: state()[K]})
    options = {"rank": 2, "energy": 0.5, "seed": 7, "dtype": "bfloat16", "target": ["mlp.*"]}
    weightops.extract_lora(base, tuned, tmp_path / "out", rest="drop", **options)
    expected = extract(base, tuned, rest="drop", **{**options, "dtype": DType.BF16})
    found = open_checkpoint(tmp_path / "out")
    assert config_of(found)["target_modules"] == ["up_proj"]
    assert found.sidecar("adapter_config.json") == expected.sidecar("adapter_config.json")
    assert {n: t.tolist() for n, t in tensors_of(found).items()} == {
        n: t.tolist() for n, t in tensors_of(expected).items()
    }


def test_the_dtype_is_that_of_the_factors_alone() -> None:
    tuned = changed(Q, NORM)
    half, single = tensors_of(extract(BASE, tuned, rank=2, dtype=DType.BF16)), tensors_of(extract(BASE, tuned, rank=2))
    for name, tensor in single.items():
        assert half[name].equal(tensor.bfloat16() if "lora_" in name else tensor)


def test_it_is_written_as_peft_names_it_with_the_tokenizer_and_what_was_found(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", state(), {"_name_or_path": "org/base"})
    tuned = write_checkpoint(tmp_path / "tuned", {**state(), Q: state(1)[Q]})
    (tuned / "tokenizer.json").write_text("{}")
    first, second = (weightops.save(extract(base, tuned, rank=2), tmp_path / out) for out in ("one", "two"))
    assert {p.name for p in first.out.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "weightops-manifest.json",
    }
    assert json.loads((first.out / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "org/base"
    assert digests(first.out) == digests(second.out)
    assert first.manifest is not None
    change = state(1)[Q] - state()[Q]
    found = first.manifest.notes["model.layers.0.self_attn.q_proj"]
    assert found["energy"] == pytest.approx(energy_of(change, 2), abs=1e-6)
    assert found["change"] == pytest.approx(float(change.norm() / state()[Q].norm()), rel=1e-5)


def test_mixed_dtypes_are_compared_by_value() -> None:
    base, tuned = state(dtype=torch.bfloat16), {n: t.float() for n, t in state(dtype=torch.bfloat16).items()}
    tuned[Q] = tuned[Q] + 2.0**-20
    assert list(config_of(extract(checkpoint(base), checkpoint(tuned, "tuned"), rank=1))["target_modules"]) == [
        "q_proj"
    ]


def test_a_bias_is_kept_beside_factors_or_with_its_layer() -> None:
    base = state() | {name.replace("weight", "bias"): torch.zeros(len(state()[name])) for name in (Q, K)}
    tuned = base | {Q: state(1)[Q]} | {name.replace("weight", "bias"): torch.ones(len(base[name])) for name in (Q, K)}
    adapter = extract(checkpoint(base), checkpoint(tuned), rank=2)
    module = K.removesuffix(".weight")
    assert [n.removeprefix(PREFIX) for n in adapter if "lora_" not in n] == [
        Q.replace("weight", "base_layer.bias"),
        K,
        K.replace("weight", "bias"),
    ]
    config = config_of(adapter)
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", [module])


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 1e-10), (torch.float32, 1e-19), (torch.float32, 1e19)], ids=str
)
def test_changes_of_any_size_come_back(dtype: torch.dtype, size: float) -> None:
    """Products of the smallest and largest leave float32's range, and float32 does not see the one in float64."""
    base = state(dtype=dtype) | {Q: torch.ones(16, 16, dtype=dtype) * (dtype is torch.float64)}
    tuned = base | {Q: base[Q] + size * torch.outer(torch.arange(16), torch.ones(16)).to(dtype)}
    factors = tensors_of(extract(checkpoint(base), checkpoint(tuned), rank=1))
    a, b = (factors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{letter}.weight"].double() for letter in "AB")
    assert difference(b @ a, tuned[Q].double() - base[Q].double()) < 1e-5


def test_names_without_a_prefix_are_those_of_a_model_without_its_head() -> None:
    base, tuned = ({n.removeprefix("model."): t for n, t in state(seed).items()} for seed in (0, 1))
    adapter = extract(checkpoint(base), checkpoint({**base, Q[6:]: tuned[Q[6:]]}), rank=2)
    assert config_of(adapter)["task_type"] is None
    assert "what AutoModel loads" in adapter.warnings[0]


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither a rank nor an energy"),
        ({"rank": 0}, "a rank of 0"),
        ({"energy": 0.0}, "an energy of 0"),
        ({"energy": 1.01}, "an energy of 1.01"),
        ({"energy": float("nan")}, "an energy of nan"),
        ({"energy": 0.9, "max_rank": 0}, "a largest rank of 0"),
        ({"energy": 0.9, "rank": 2, "max_rank": 3}, "for an energy without a rank"),
        ({"rank": 2, "max_rank": 3}, "for an energy without a rank"),
        ({"rank": 1, "seed": -1}, "the seed -1"),
        ({"rank": 1, "dtype": DType.F64}, "an adapter in float64"),
        ({"rank": 1, "target": ["q_proj", "nothing"]}, "the target 'nothing' matches no Linear layer"),
        ({"rank": 1, "target": ["embed_tokens"]}, "the target 'embed_tokens' matches no Linear layer"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        extract(BASE, changed(Q), **options)


def without(name: str) -> State:
    return {n: t for n, t in state().items() if n != name}


def test_models_that_are_not_the_same() -> None:
    pairs = [
        (checkpoint(without(K)), changed(Q), f"base lacks {K}"),
        (BASE, checkpoint(without(K)), f"tuned lacks {K}"),
        (BASE, changed(by={Q: torch.zeros(16, 15)}), rf"{Q}: base is float32 \[16, 16\], tuned is float32 \[16, 15\]"),
        (BASE, changed(by={EMBEDDING: torch.zeros(41, 15)}), rf"{EMBEDDING}: base is .*, tuned is .* \[41, 15\]"),
        (BASE, BASE, "base and tuned base hold the same values: there is nothing to extract"),
        (BASE, changed(EMBEDDING, NORM), f"no Linear weight that is a target differs, only {EMBEDDING}, {NORM}"),
    ]
    for base, tuned, message in pairs:
        with pytest.raises(IncompatibleInputs, match=message):
            extract(base, tuned, rank=2)


def test_what_is_no_whole_model_in_plain_numbers() -> None:
    quantised = checkpoint({**state(), Q: torch.zeros(16, 16, dtype=torch.int8)}, "tuned")
    by_config = checkpoint(state(1), config={"quantization_config": {"quant_method": "gptq"}})
    for side, message in (
        (replace(BASE, sidecars={DELTA_NAME: Written(b"")}), "is a delta, not a model"),
        (replace(BASE, sidecars={"adapter_config.json": Written(b"")}), "is a LoRA adapter, not a model"),
        (by_config, "quant_method gptq, and every weight is plain"),
        (quantised, f"{Q}: found int8, expected one of float32, float16, bfloat16, float64"),
    ):
        for pair in ((side, changed(Q)), (BASE, side)):
            with pytest.raises(IncompatibleInputs, match=message):
                extract(*pair, rank=2)


def test_a_server_is_not_asked_five_times_for_the_same() -> None:
    remote = LazyTensor.make(Stored(SourceFile("https://example.org/x", 1024, 0), 0, DType.F32, (16, 16)))
    with pytest.raises(UsageError, match=r"is on a server, and would be fetched 5 times or more"):
        extract(BASE, replace(BASE, tensors={**BASE.tensors, Q: remote}), rank=2)


@pytest.mark.parametrize(("side", "number"), [("base", np.nan), ("tuned", np.inf)])
def test_numbers_that_have_no_change_are_refused_by_name(side: str, number: float) -> None:
    odd = state()[Q].clone()
    odd[3, 4] = number
    base, tuned = (checkpoint({**state(), Q: odd}) if role == side else changed(Q) for role in ("base", "tuned"))
    with pytest.raises(CorruptInput, match=rf"{Q}: {side} holds NaN or infinity"):
        extract(base, tuned, rank=2)


def test_numbers_that_are_the_same_may_be_anything() -> None:
    odd = torch.full((24, 16), torch.nan)
    base, tuned = checkpoint({**state(), UP: odd}), changed(Q, by={UP: odd.clone()})
    assert config_of(extract(base, tuned, rank=2))["target_modules"] == ["q_proj"]


def test_parameters_that_no_module_holds_are_refused_by_name_or_dropped() -> None:
    sinks = "model.layers.0.self_attn.sinks"
    base = checkpoint({**state(), sinks: torch.zeros(4)})
    tuned = changed(Q, by={sinks: torch.ones(4)})
    with pytest.raises(IncompatibleInputs, match=f"{sinks}: the values differ, and an adapter has no place for them"):
        extract(base, tuned, rank=2)
    assert len(extract(base, tuned, rank=2, rest="drop")) == 2


def test_integers_that_differ_have_no_place_in_an_adapter() -> None:
    counts = "model.layers.0.mlp.counts"
    base = checkpoint({**state(), counts: torch.zeros(4, dtype=torch.int64)})
    tuned = changed(Q, by={counts: torch.ones(4, dtype=torch.int64)})
    with pytest.raises(IncompatibleInputs, match=f"{counts}: the values differ, and an adapter has no place for them"):
        extract(base, tuned, rank=2)


def test_names_of_files_are_kept_where_transformers_knows_no_model() -> None:
    """Also where a config asks for more layers than there are tensors for: no such model is made."""
    for config in ({"model_type": "of its own"}, {"model_type": "llama", "num_hidden_layers": 10**9}):
        base, tuned = ({f"language_model.{n}": t for n, t in state(seed).items()} for seed in (0, 1))
        name = f"language_model.{Q}"
        adapter = extract(
            checkpoint(base, config=config), checkpoint({**base, name: tuned[name]}, config=config), rank=2
        )
        assert config_of(adapter)["target_modules"] == ["q_proj"]
        assert "peft may not find the modules" in adapter.warnings[0]


def test_factors_for_a_tied_head_would_change_the_embedding_too() -> None:
    config = {"tie_word_embeddings": True}
    base, tuned = checkpoint(state(), config=config), checkpoint(state(1), config=config)
    with pytest.raises(UsageError, match=r"lm_head.weight: is the input embedding too in base"):
        extract(base, tuned, rank=2, target=["lm_head"])
