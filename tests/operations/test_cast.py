"""cast against torch, and its fp8 form against the arithmetic and the files of compressed-tensors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import settings as settings_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import (
    evaluate,
    evaluate_all,
    from_bytes,
    given_tensor,
    random_tensor,
    same_bits,
    torch_dtype,
    write_checkpoint,
)

import weightops
from weightops.checkpoint import Checkpoint
from weightops.cli.main import run
from weightops.errors import IncompatibleInputs, UsageError
from weightops.operations.cast import operation
from weightops.operations.cast.operation import DTYPES
from weightops.ops import fp8
from weightops.ops.fp8 import SCALED, Strategy, scaled_fp8
from weightops.ops.transpose import Transpose, transposed
from weightops.spec import DType

State = dict[str, torch.Tensor]
cast = partial(operation.cast, evaluate=evaluate_all)


def model_of(kind: str) -> Any:
    """A tiny model of a family of the sweep."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings_of(kind)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def weights(folder: Path) -> State:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def checkpoint(tensors: State) -> Checkpoint:
    return Checkpoint("model", {name: given_tensor(tensor) for name, tensor in tensors.items()})


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


# --- a type -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_is_cast_as_torch_casts_it(tmp_path: Path, dtype: DType) -> None:
    state = {d.value: random_tensor(d, (3000,), i).nan_to_num(0, 1, -1) for i, d in enumerate(SCALED)}
    state |= {
        "small": normal(70, 30, dtype=torch.float8_e5m2),
        "ids": torch.arange(5),
        "mask": torch.ones(3, dtype=bool),
    }
    write_checkpoint(tmp_path / "model", state, shards=2)
    result = weightops.cast(tmp_path / "model", tmp_path / "out", dtype=dtype.value, on_overflow="saturate")
    largest = torch.finfo(torch_dtype(dtype)).max
    expected = {
        name: tensor.double().clamp(-largest, largest).to(torch_dtype(dtype))
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }
    found = weights(tmp_path / "out")
    assert same_bits(found, {**state, **expected})
    assert result.manifest is not None
    assert result.manifest.losses.keys() == {n for n, t in expected.items() if t.dtype != state[n].dtype}
    assert any("not floating-point, and left as they are: ids, mask" in text for text in result.warnings)


def test_kept_tensors_stay_and_take_those_along_that_share_their_memory(tmp_path: Path) -> None:
    state = {"embed.weight": normal(8, 4), "layer.weight": normal(8, 4, seed=1), "norm.weight": normal(4)}
    state["head.weight"] = state["embed.weight"]
    (tmp_path / "model").mkdir()
    torch.save(state, tmp_path / "model/pytorch_model.bin")
    result = weightops.cast(tmp_path / "model", tmp_path / "out", dtype="float32", keep=["*norm*", "head.*"])
    found = weights(tmp_path / "out")
    assert same_bits(found, {**state, "layer.weight": state["layer.weight"].float()})
    assert any(text.startswith("embed.weight: kept as well") for text in result.warnings)


def test_shared_tensors_are_stored_and_counted_once(tmp_path: Path) -> None:
    table = normal(8, 4, dtype=torch.float32)
    (tmp_path / "model").mkdir()
    torch.save({"embed.weight": table, "head.weight": table}, tmp_path / "model/pytorch_model.bin")
    result = weightops.cast(tmp_path / "model", tmp_path / "out", dtype="float16", format="torch")
    found = torch.load(tmp_path / "out/pytorch_model.bin")
    assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()
    assert torch.equal(found["head.weight"], table.half())
    assert result.manifest is not None
    assert {name: loss.elements for name, loss in result.manifest.losses.items()} == {"embed.weight": 32}


def test_a_number_out_of_range_stops_the_run_and_nothing_is_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"a": normal(100), "b": normal(5000), "c": normal(100)}
    state["b"][[7, 4000]] = torch.tensor([-1e30, 70000.0], dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "model", state)
    assert run(["cast", str(tmp_path / "model"), "--dtype", "fp16", "--out", str(tmp_path / "out"), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "b: at least 2 values are too large for float16: the largest so far is 1.00025555e+30, that of" in said
    assert "--keep b" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("policy", "expected"), [("saturate", [-65504.0, 65504.0]), ("inf", [-torch.inf, torch.inf])])
def test_out_of_range_numbers_become_what_was_asked_for(tmp_path: Path, policy: Any, expected: list[float]) -> None:
    write_checkpoint(tmp_path / "model", {"a": torch.tensor([-1e30, 70000.0, 1.0, torch.inf, torch.nan])})
    result = weightops.cast(tmp_path / "model", tmp_path / "out", dtype="float16", on_overflow=policy)
    found = weights(tmp_path / "out")["a"]
    assert found[:4].tolist() == [*expected, 1.0, torch.inf]
    assert result.manifest is not None
    loss = result.manifest.losses["a"]
    counts = (loss.overflowed, loss.saturated, loss.infinite, loss.nan, loss.changed)
    assert counts == ((0, 2) if policy == "saturate" else (2, 0)) + (1, 1, 2)


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        ({"torch_dtype": "float32"}, "bfloat16", {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, "float16", {"dtype": "float16"}),
        ({}, "float64", {"dtype": "float64"}),
        ({"dtype": "float16"}, "float8_e5m2", {"dtype": "float16"}),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e5m2", {"torch_dtype": "bfloat16"}),
        ({}, "float8_e4m3fn", {"dtype": "bfloat16"}),
    ],
)
def test_the_configuration_names_a_type_to_compute_in(
    tmp_path: Path, config: dict[str, Any], dtype: str, expected: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path / "model", {"a": normal(4, dtype=torch.float32)}, config)
    weightops.cast(tmp_path / "model", tmp_path / "out", dtype=dtype)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "llama", **expected}


def test_transformers_loads_what_was_cast_to_eight_bits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(tmp_path / "model")
    weightops.cast(tmp_path / "model", tmp_path / "out", dtype="float8_e4m3fn")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert same_bits(
        dict(loaded.state_dict()),
        {name: tensor.to(torch.float8_e4m3fn).to(torch.bfloat16) for name, tensor in model.state_dict().items()},
    )


def test_a_cast_that_changes_nothing_says_so(tmp_path: Path) -> None:
    result = cast(checkpoint({"a": normal(4), "b": normal(4, dtype=torch.float32)}), dtype=DType.BF16, keep=["b"])
    assert result.warnings == ("nothing is cast: there is no floating-point tensor that is not bfloat16 or kept",)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "a cast needs a type or a scheme"),
        ({"dtype": DType.F8_E8M0}, "weights are not cast to float8_e8m0fnu"),
        ({"dtype": DType.I8}, "weights are not cast to int8"),
        ({"dtype": DType.F16, "strategy": "tensor"}, "only --scheme fp8 has scales"),
        ({"dtype": DType.F16, "scheme": "fp8"}, "--scheme fp8 stores float8_e4m3fn, --dtype says float16"),
        ({"scheme": "fp8", "cast_all": True}, "--scheme fp8 casts linear layers alone"),
        ({"scheme": "fp8", "on_overflow": "inf"}, "nothing overflows with --scheme fp8"),
        ({"dtype": DType.F16, "keep": ["*.weight", "*.wieght"]}, r"model: no tensor matches --keep \*\.wieght"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        cast(checkpoint({Q_PROJ: normal(4, 4)}), **options)


def test_a_quantised_model_is_cast_as_the_plain_one_that_it_stands_for() -> None:
    for scale in (f"{Q_PROJ}_scale_inv", f"{Q_PROJ}_scale"):
        state = {Q_PROJ: normal(4, 4).to(torch.float8_e4m3fn), scale: torch.rand(1, 1), "n": torch.ones(4)}
        source = checkpoint(state)
        found = cast(source, dtype=DType.F16)
        plain = (state[Q_PROJ].float() * state[scale]).bfloat16()
        assert list(found) == [Q_PROJ, "n"]
        assert same_bits({Q_PROJ: found[Q_PROJ].torch()}, {Q_PROJ: plain.half()})
        assert any("is quantised (fp8, one scale a tensor), and read as bfloat16" in note for note in found.warnings)


def test_scales_that_belong_to_no_quantised_weight_are_cast_like_others() -> None:
    state = {"norm.scale": torch.ones(4), "attn.weight": torch.ones(4, 4), "attn.scales": torch.ones(4)}
    assert {tensor.spec.dtype for tensor in cast(checkpoint(state), dtype=DType.BF16).values()} == {DType.BF16}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["deepseek_v3", "ernie4_5_moe", "gpt_oss", "phimoe"])
def test_what_transformers_has_in_float32_is_float32(tmp_path: Path, kind: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    model_of(kind).save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype).save_pretrained(tmp_path / "expected")
    result = weightops.cast(tmp_path / "model", tmp_path / "out", dtype=dtype)
    expected = weights(tmp_path / "expected")
    assert same_bits(weights(tmp_path / "out"), expected)
    wide = {name for name, tensor in expected.items() if tensor.dtype is torch.float32}
    assert bool(wide) == any("float32, as transformers has them" in text for text in result.warnings)
    assert bool(wide) == (kind in ("deepseek_v3", "ernie4_5_moe") or (kind, dtype) == ("gpt_oss", "float16"))


def test_what_transformers_has_in_float32_is_cast_if_all_are(tmp_path: Path) -> None:
    model_of("deepseek_v3").save_pretrained(tmp_path / "model")
    result = weightops.cast(tmp_path / "model", tmp_path / "out", dtype="bfloat16", cast_all=True)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert result.warnings == ()


def test_types_that_are_no_numbers_by_themselves_are_refused_by_name() -> None:
    tensors = {"a": given_tensor(torch.zeros(4, dtype=torch.uint8), DType.F8_E8M0)}
    with pytest.raises(UsageError, match="a is float8_e8m0fnu, which is not cast"):
        cast(Checkpoint("model", tensors), dtype=DType.BF16)


# --- fp8 with scales --------------------------------------------------------------------------------------------------


def quantise(x: torch.Tensor, strategy: Strategy) -> tuple[torch.Tensor, torch.Tensor]:
    """`calculate_qparams` and `quantize` of compressed-tensors 0.20 for symmetric fp8, less what does not apply."""
    largest = x.abs().amax(dim=1, keepdim=True) if strategy == "channel" else x.abs().amax().reshape(1)
    scale = largest / torch.tensor(448.0).to(x.dtype)
    scale = torch.where(scale == 0, torch.tensor(torch.finfo(x.dtype).eps, dtype=x.dtype), scale)
    scaled = x / scale + torch.zeros_like(scale)
    return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCALED),
    st.sampled_from(("channel", "tensor")),
    st.tuples(st.integers(1, 9), st.integers(1, 300)),
    st.sampled_from((1.0, 1e-4, 1e-7, 1e-42)),
    st.integers(0, 2**32),
    st.integers(100, 4000),
)
def test_scales_and_bits_are_those_of_compressed_tensors(
    dtype: DType, strategy: Strategy, shape: tuple[int, int], size: float, seed: int, block: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    x[seed % 5 :: 5] *= torch.tensor([0.0, -0.0, 1e-3, 1e-6])[seed % 4]
    x = x.to(torch_dtype(dtype))
    weight, scale = scaled_fp8(given_tensor(x), strategy, "x")
    expected = quantise(x, strategy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "_BLOCK", block)
        patch.setattr(fp8, "_PIECE", block // 3 + 1)
        found = [from_bytes(evaluate(t, block), torch_dtype(t.spec.dtype), t.spec.shape) for t in (weight, scale)]
    assert same_bits(dict(enumerate(found)), dict(enumerate(expected)))


def test_what_is_computed_whole_is_computed_once_for_its_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    x, fill, calls = normal(64, 96), Transpose.fill, []
    monkeypatch.setattr(Transpose, "fill", lambda *given: (calls.append(1), fill(*given)))
    monkeypatch.setattr(fp8, "_BLOCK", 100)
    weight, scale = scaled_fp8(transposed(given_tensor(x)), "channel", "x")
    expected = quantise(x.T.contiguous(), "channel")
    assert from_bytes(evaluate(scale, 1 << 20), torch.bfloat16, scale.spec.shape).equal(expected[1])
    assert len(calls) == 1
    found = from_bytes(evaluate(weight, 1 << 20), torch.float8_e4m3fn, weight.spec.shape)
    assert same_bits({"x": found}, {"x": expected[0]})
    assert len(calls) == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_what_has_no_scale_is_refused_by_name(tmp_path: Path, value: float, strategy: Strategy) -> None:
    state = {Q_PROJ: normal(6, 8)}
    state[Q_PROJ][3, 4] = value
    write_checkpoint(tmp_path / "model", state)
    with pytest.raises(IncompatibleInputs, match=f"{Q_PROJ} holds a NaN or an infinity"):
        weightops.cast(tmp_path / "model", tmp_path / "out", scheme="fp8", strategy=strategy)
    assert not (tmp_path / "out").exists()


LAYERS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.mlp.experts.0.down_proj",
    "model.layers.1.mlp.shared_expert.up_proj",
]
IGNORED = [
    "model.embed_tokens",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.shared_expert_gate",
    "model.layers.2.block_sparse_moe.router.layer",
    "model.layers.2.self_attn.o_proj",
    "model.visual.blocks.0.attn.qkv",
    "lm_head",
]
REST = ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "model.experts.gate_up_proj"]


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_the_form_is_that_of_compressed_tensors(tmp_path: Path, strategy: Strategy) -> None:
    state = {f"{name}.weight": normal(6, 16, seed=i) for i, name in enumerate([*LAYERS, *IGNORED])}
    state |= {name: normal(*((2, 6, 16) if "experts" in name else (6,))) for name in REST}
    write_checkpoint(tmp_path / "model", state, {"dtype": "bfloat16"}, shards=2)
    result = weightops.cast(
        tmp_path / "model",
        tmp_path / "out",
        scheme="fp8",
        strategy=strategy,
        keep=["model.layers.2.self_attn.*"],
        max_shard_size="source",
    )
    found = weights(tmp_path / "out")
    expected = dict(state)
    for name in LAYERS:
        expected[f"{name}.weight"], expected[f"{name}.weight_scale"] = quantise(state[f"{name}.weight"], strategy)
    assert same_bits(found, expected)
    assert {len(scale.shape) for name, scale in found.items() if name.endswith("_scale")} == {
        1 + (strategy == "channel")
    }
    assert result.manifest is not None
    files = {name: entry.file for name, entry in result.manifest.tensors.items()}
    assert all(files[f"{name}.weight"] == files[f"{name}.weight_scale"] for name in LAYERS)
    assert result.manifest.losses.keys() == {f"{name}.weight" for name in LAYERS}
    assert any("no matrices, and left as they are: model.experts.gate_up_proj" in text for text in result.warnings)
    arguments = {"group_size": None, "num_bits": 8, "symmetric": True, "type": "float"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert set(config["quantization_config"].pop("ignore")) == set(IGNORED)
    assert config == {
        "model_type": "llama",
        "dtype": "bfloat16",
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "format": "float-quantized",
                    "input_activations": {"dynamic": True, "strategy": "token", **arguments},
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {"dynamic": False, "strategy": strategy, **arguments},
                }
            },
            "format": "float-quantized",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        },
    }


@pytest.mark.parametrize(
    ("state", "config", "error", "problem"),
    [
        (
            {Q_PROJ: (4, 4)},
            {"quantization_config": {"quant_method": "gptq"}},
            IncompatibleInputs,
            r"already \(gptq, says",
        ),
        ({Q_PROJ: (4, 4), f"{Q_PROJ}_scale": (4, 1)}, {}, IncompatibleInputs, f"already: it holds {Q_PROJ}_scale"),
        (
            {"h.0.attn.c_attn.weight": (4, 12)},
            {"model_type": "gpt2"},
            UsageError,
            "there is no linear layer to quantise",
        ),
        ({"lm_head.weight": (4, 4)}, {}, UsageError, "there is no linear layer to quantise"),
    ],
)
def test_models_that_cannot_be_quantised_are_refused(
    tmp_path: Path, state: dict[str, tuple[int, ...]], config: dict[str, Any], error: type[Exception], problem: str
) -> None:
    write_checkpoint(tmp_path / "model", {name: normal(*shape) for name, shape in state.items()}, config)
    with pytest.raises(error, match=problem):
        weightops.cast(tmp_path / "model", tmp_path / "out", scheme="fp8")


def test_layers_that_are_transposed_stay_and_are_named(tmp_path: Path) -> None:
    state = {"h.0.attn.c_attn.weight": normal(4, 12), Q_PROJ: normal(4, 4)}
    write_checkpoint(tmp_path / "model", state, {"model_type": "gpt2", "n_layer": 99})
    result = weightops.cast(tmp_path / "model", tmp_path / "out", scheme="fp8")
    assert {name for name in weights(tmp_path / "out") if name.endswith("_scale")} == {f"{Q_PROJ}_scale"}
    text = "Conv1D, with transposed weights, and left as they are: h.0.attn.c_attn"
    assert text in result.warnings


def test_a_model_without_a_configuration_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model: has no config\.json"):
        cast(checkpoint({Q_PROJ: normal(4, 4)}), scheme="fp8")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.decoder.embed_positions.weight", True),
        ("vision.patch_embedding.weight", True),
        ("transformer.wpe.weight", True),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", True),
        ("model.layers.0.layernorm.weight", True),
        ("model.layers.0.mlp.gate.weight", True),
        ("model.layers.0.mlp.router.classifier.weight", True),
        ("lm_head.weight", True),
        ("embed_out.weight", True),
        ("visual.blocks.0.attn.qkv.weight", True),
        ("audio_tower.layers.0.fc1.weight", True),
        ("model.layers.0.mlp.gate_proj.weight", False),
        ("model.layers.0.self_attn.q_proj.weight", False),
        ("bert.encoder.layer.0.output.dense.weight", False),
    ],
)
def test_what_its_name_says_is_no_linear_layer_to_quantise(tmp_path: Path, name: str, expected: bool) -> None:
    write_checkpoint(tmp_path / "model", {Q_PROJ: normal(4, 4), name: normal(4, 8)}, {"model_type": "novel"})
    result = weightops.cast(tmp_path / "model", tmp_path / "out", scheme="fp8")
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert (f"{name}_scale" not in weights(tmp_path / "out")) == expected == (name.removesuffix(".weight") in ignored)
    assert any("transformers makes no model of this config.json" in text for text in result.warnings)


@pytest.mark.parametrize(
    ("kind", "layers", "ignored"),
    [
        ("phimoe", 64, "model.layers.0.mlp.router"),
        ("phimoe", 64, "model.layers.0.block_sparse_moe.gate"),
        ("llama4_text", 52, "model.layers.1.feed_forward.router"),
        ("gpt_oss", 16, "lm_head"),
        ("qwen3_next", 74, "model.layers.0.mlp.shared_expert_gate"),
        ("granitemoe", 16, "model.layers.0.block_sparse_moe.router.layer"),
    ],
)
def test_transformers_finds_every_scale_and_no_other(tmp_path: Path, kind: str, layers: int, ignored: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is the reference for its own format")
    from transformers import AutoModelForCausalLM

    model_of(kind).save_pretrained(tmp_path / "model")
    weightops.cast(tmp_path / "model", tmp_path / "out", scheme="fp8")
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert sum(name.endswith("_scale") for name in weights(tmp_path / "out")) == layers
    assert ignored in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]


@pytest.mark.parametrize(
    ("kind", "keep", "problem"),
    [
        (
            "mixtral",
            "*.experts.1.w1.weight",
            "transformers stacks 8 matrices to model.layers.0.mlp.experts",
        ),
        ("llama4_text", "*.experts.gate_up_proj", "transformers takes these experts apart in a quantised model"),
    ],
)
def test_experts_that_the_loader_could_not_stack_are_refused(
    tmp_path: Path, kind: str, keep: str, problem: str
) -> None:
    model_of(kind).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=problem):
        weightops.cast(tmp_path / "model", tmp_path / "out", scheme="fp8", keep=[keep])


def test_experts_are_kept_as_one(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is the reference for its own format")
    from transformers import AutoModelForCausalLM

    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "model")
    weightops.cast(tmp_path / "model", tmp_path / "out", scheme="fp8", keep=["*.experts.*"])
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def llama(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(torch.bfloat16)
    write_checkpoint(folder, dict(model.state_dict()), model.config.to_dict() | {"dtype": "bfloat16"})
    return model


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors_reads_it_and_computes_the_same(tmp_path: Path, strategy: Strategy) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is the reference for its own format")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    llama(tmp_path / "model")
    weightops.cast(tmp_path / "model", tmp_path / "out", scheme="fp8", strategy=strategy)
    state, found = weights(tmp_path / "model"), weights(tmp_path / "out")
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    )
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    layers = [name.removesuffix("_scale") for name in found if name.endswith("_scale")]
    assert len(layers) == 14
    for name in layers:
        x = state[name] if strategy == "channel" else state[name].reshape(1, -1)
        scale, _ = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), scheme.weights)
        scale = scale if strategy == "channel" else scale.reshape(1)
        made = compressor.compress({"weight": state[name], "weight_scale": scale}, scheme)
        assert same_bits({"weight": found[name], "weight_scale": found[f"{name}_scale"]}, made)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded(torch.arange(4)[None])
    for name in layers:
        expected = found[name].to(torch.bfloat16) * found[f"{name}_scale"]
        assert torch.equal(loaded.state_dict()[name], expected)
