"""cast --scheme: what is written is read again, here and by transformers, and what does not fit stays and is listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import evaluate_all, given_tensor, write_checkpoint

import weightops
from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import UsageError, WeightopsError
from weightops.formats.folder import open_checkpoint
from weightops.operations.cast import Scheme, cast
from weightops.operations.dequantize import dequantize
from weightops.ops.fp8 import block_fp8
from weightops.ops.mxfp4 import mxfp4
from weightops.spec import DType

GOLDEN = Path(__file__).parents[1] / "golden" / "number_formats"
LAYER = "model.layers.0."


def saved(folder: Path, kind: str) -> Path:
    """A small model of transformers in bfloat16."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {**sizes, "hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
    few = {"num_experts_per_tok": 2, "num_local_experts": 3}
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide)),
        "grouped": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide | {"num_key_value_heads": 2})),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**wide, **few)),
        "gpt_oss": lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**wide | {"hidden_size": 64, "intermediate_size": 96}, **few, head_dim=32)
        ),
    }
    made[kind]().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("llama", "fp8-block"),
        ("grouped", "fp8-block"),
        ("mixtral", "fp8-block"),
        ("llama", "mxfp4"),
        ("mixtral", "mxfp4"),
        ("gpt_oss", "mxfp4"),
    ],
)
def test_transformers_has_the_weights_of_dequantize(tmp_path: Path, kind: str, scheme: Scheme) -> None:
    pytest.importorskip("compressed_tensors", reason="transformers loads mxfp4 through compressed-tensors")
    weightops.cast(saved(tmp_path / "model", kind), tmp_path / "out", scheme=scheme)
    weightops.dequantize(tmp_path / "out", tmp_path / "plain")
    is_oss = kind == "gpt_oss"
    how = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if is_oss else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, plain(tokens).logits)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


def model(config: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> Checkpoint:
    """A checkpoint of layers by their names below the first block, `q_proj` and the like."""
    state = {
        f"{LAYER}{name.replace('__', '.')}": torch.randn(shape, generator=torch.Generator().manual_seed(i)).bfloat16()
        for i, (name, shape) in enumerate(shapes.items())
    }
    files = {"config.json": written_json(config or {"dtype": "bfloat16"})}
    return Checkpoint("model", {name: given_tensor(tensor) for name, tensor in state.items()}, files)


def test_blocks_have_the_form_of_deepseek() -> None:
    source = model(mlp__down_proj__weight=(256, 384))
    made = cast(source, scheme="fp8-block", evaluate=evaluate_all)
    name = f"{LAYER}mlp.down_proj.weight"
    assert list(made) == [name, f"{name}_scale_inv"]
    codes, scale = block_fp8(source[name], 128, name)
    assert (made[name], made[f"{name}_scale_inv"]) == (codes, scale)
    assert (scale.spec.dtype, scale.spec.shape) == (DType.F32, (2, 3))
    assert made.config()["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "ignored_layers": ["lm_head"],
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_mxfp4_has_the_form_of_compressed_tensors() -> None:
    source = model(mlp__down_proj__weight=(6, 96))
    made = cast(source, scheme="mxfp4", evaluate=evaluate_all)
    name = f"{LAYER}mlp.down_proj"
    assert list(made) == [f"{name}.weight_packed", f"{name}.weight_scale"]
    assert tuple(made.values()) == mxfp4(source[f"{name}.weight"], f"{name}.weight")
    own = json.loads((GOLDEN / "ct-mxfp4/config.json").read_text())["quantization_config"]
    said = made.config()["quantization_config"]
    assert {key: own[key] for key in said} == said


def test_what_is_no_whole_block_and_what_vllm_joins_with_it_stays_and_is_listed() -> None:
    rows = {"q_proj": 256, "k_proj": 64, "v_proj": 128, "o_proj": 128}
    source = model(
        **{f"self_attn__{name}__weight": (n, 128) for name, n in rows.items()},
        mlp__gate_proj__weight=(128, 128),
        mlp__up_proj__weight=(128, 128),
        mlp__down_proj__weight=(128, 192),
    )
    made = cast(source, scheme="fp8-block", evaluate=evaluate_all)
    left = [f"{LAYER}{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")]
    assert {name for name in made if made[name] is source.get(name)} == {f"{name}.weight" for name in left}
    said = made.config()["quantization_config"]
    assert said["ignored_layers"] == said["modules_to_not_convert"] == ["lm_head", *left]
    assert any("no whole blocks of 128 x 128" in note and left[0] in note for note in made.warnings)
    with pytest.raises(UsageError, match="no linear layer to quantise") as caught:
        cast(model(mlp__down_proj__weight=(128, 40)), scheme="mxfp4", evaluate=evaluate_all)
    assert "no whole groups of 32" in str(caught.value.hint)


def test_stacked_experts_that_blocks_do_not_reach_are_listed(tmp_path: Path) -> None:
    """Else transformers would take them for quantised."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=40,
        num_key_value_heads=4, num_local_experts=2,
    )  # fmt: skip
    plain = transformers.MixtralForCausalLM(config).bfloat16()
    state = dict(plain.state_dict())
    assert any(tensor.dim() == 3 for tensor in state.values())
    write_checkpoint(tmp_path / "model", state, config.to_dict() | {"architectures": ["MixtralForCausalLM"]})
    made = cast(open_checkpoint(tmp_path / "model"), scheme="fp8-block", evaluate=evaluate_all)
    assert f"{LAYER}mlp.experts" in made.config()["quantization_config"]["modules_to_not_convert"]
    assert f"{LAYER}self_attn.q_proj.weight_scale_inv" in made


def test_experts_of_gpt_oss_keep_what_they_had_in_four_bits() -> None:
    """Numbers that MXFP4 holds come out of it as they were; so does what OpenAI publishes."""
    plain = dequantize(open_checkpoint(GOLDEN / "mxfp4-gpt-oss"), evaluate=evaluate_all)
    made = cast(plain, scheme="mxfp4", evaluate=evaluate_all)
    published = open_checkpoint(GOLDEN / "mxfp4-gpt-oss")
    assert {n: t.spec for n, t in made.items()} == {n: t.spec for n, t in published.items()}
    assert made.config()["quantization_config"] == published.config()["quantization_config"]
    again = dequantize(made, evaluate=evaluate_all)
    assert all(again[name].torch().equal(tensor.torch()) for name, tensor in plain.items())


def oss(**shapes: tuple[int, ...]) -> Checkpoint:
    return model({"model_type": "gpt_oss", "dtype": "bfloat16"}, **shapes)


REFUSED: list[tuple[Checkpoint, dict[str, Any], type[WeightopsError], str]] = [
    (oss(mlp__experts__down_proj=(2, 40, 64)), {"scheme": "mxfp4"}, UsageError, "no whole groups of 32"),
    (oss(mlp__router__weight=(2, 64)), {"scheme": "mxfp4"}, UsageError, "no experts to quantise"),
    (
        oss(mlp__experts__down_proj=(2, 64, 64), mlp__experts__gate_up_proj=(2, 64, 64)),
        {"scheme": "mxfp4", "keep": ["*.down_proj"]},
        UsageError,
        "in MXFP4 or nothing",
    ),
    (model(q_proj__weight=(64, 64)), {"scheme": "mxfp4", "strategy": "tensor"}, UsageError, "scales of its own kind"),
    (
        model(q_proj__weight=(64, 64)),
        {"scheme": "mxfp4", "dtype": DType.F8_E4M3},
        UsageError,
        "stores float4_e2m1fn, --dtype says float8",
    ),
]


@pytest.mark.parametrize(("source", "options", "error", "text"), REFUSED)
def test_what_cannot_be_meant_is_refused(
    source: Checkpoint, options: dict[str, Any], error: type[WeightopsError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        cast(source, **options, evaluate=evaluate_all)
    assert caught.value.hint
