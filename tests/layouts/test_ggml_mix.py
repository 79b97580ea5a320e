"""The types that llama-quantize chooses, against what it chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mixed_models import SMALL, mixed_model

from weightops.errors import IncompatibleInputs, UsageError
from weightops.layouts.ggml_mix import FILE_TYPES, MixModel, file_order, file_type, mix
from weightops.spec import DType, TensorSpec

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden/ggml/mixes.json").read_text())
TYPES = {"f32": DType.F32, "f16": DType.F16, "bf16": DType.BF16} | {dtype.value: dtype for dtype in DType}


@pytest.mark.parametrize("number", range(len(GOLDEN["models"])))
def test_every_mix_of_a_model_is_that_of_llama_quantize(number: int) -> None:
    case = GOLDEN["models"][number]
    model = mixed_model(MixModel(**case["facts"]), **case["sizes"])
    for name, types in case["types"].items():
        kind, _, importance = name.partition(".")
        letters = case["types"][kind] if types == "same" else types
        found = mix(kind, model.tensors, model.facts, has_importance=bool(importance))
        assert list(found.values()) == [TYPES[GOLDEN["letters"][letter]] for letter in letters], name


@pytest.mark.parametrize("name", GOLDEN["files"])
def test_files_of_llama_quantize_have_these_types(name: str) -> None:
    file = GOLDEN["files"][name]
    sources = {
        tensor: TensorSpec(DType.F32 if kind == "f32" else DType.F16, tuple(shape))
        for tensor, (shape, kind) in reversed(file["tensors"].items())
    }
    found = mix(name.removesuffix("-tails"), sources, MixModel(**file["facts"]))
    assert list(found.items()) == [(tensor, TYPES[kind]) for tensor, (_, kind) in file["tensors"].items()]


def test_names_of_file_types() -> None:
    assert [file_type(name) for name in ("q4_k_m", "Q4-K", "Q3_K", "q5_k", "bf16")] == [
        "Q4_K_M", "Q4_K_M", "Q3_K_M", "Q5_K_M", "BF16",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="IQ3_XS is not written") as caught:
        file_type("iq3_xs")
    assert caught.value.hint == "Q3_K_S is the nearest that is"
    with pytest.raises(UsageError, match="no file type 'Q9'") as caught:
        file_type("Q9")
    assert "Q4_K_M, Q4_K_S" in str(caught.value.hint)
    assert len({number for number, _ in FILE_TYPES.values()}) == len(FILE_TYPES)


def test_tensors_come_layer_by_layer() -> None:
    names = ["blk.10.b", "blk.2.b", "output.weight", "blk.2.a", "a", "blk.x"]
    assert file_order(names) == ["a", "blk.x", "output.weight", "blk.2.a", "blk.2.b", "blk.10.b"]


def of_name(name: str, part: str, **options: Any) -> DType:
    return mix(name, SMALL.tensors, SMALL.facts, **options)[part]


def test_what_is_asked_for_goes_before_rules() -> None:
    down, value = "blk.0.ffn_down.weight", "blk.0.attn_v.weight"
    assert of_name("Q4_K_M", down) is DType.Q6_K
    assert of_name("Q4_K_M", down, pure=True) is DType.Q4_K
    assert of_name("Q4_K_M", "output.weight", pure=True) is DType.Q4_K
    assert of_name("Q4_K_M", down, overrides=[("FFN", DType.Q5_0), ("down", DType.Q3_K)]) is DType.Q5_0
    assert of_name("Q4_K_M", "output.weight", output=DType.F16, overrides=[("output", DType.Q3_K)]) is DType.F16
    assert of_name("Q4_K_M", "token_embd.weight", embedding=DType.Q8_0) is DType.Q8_0
    # A tensor that was asked for is not counted, so that the rules go on from the one before.
    assert of_name("Q3_K_M", "blk.1.attn_v.weight") is DType.Q4_K
    assert of_name("Q3_K_M", "blk.1.attn_v.weight", overrides=[(value, DType.Q8_0)]) is DType.Q5_K


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match=r"attn_k\.weight: Q2_K_S needs an importance matrix"):
        mix("Q2_K_S", SMALL.tensors, SMALL.facts)
    with pytest.raises(UsageError, match="iq2_xs is not written"):
        of_name("Q4_K_M", "", overrides=[("x", DType.IQ2_XS)])
    with pytest.raises(UsageError, match="'\\(' is no regular expression"):
        of_name("Q4_K_M", "", overrides=[("(", DType.Q4_K)])
    narrow = {"output.weight": TensorSpec(DType.F16, (8, 48))}
    with pytest.raises(UsageError, match=r"output\.weight: has rows of 48, q8_0 takes multiples of 32"):
        mix("Q4_K_M", narrow, SMALL.facts, output=DType.Q8_0)
    experts = MixModel(architecture="llama", layers=2, heads=1, kv_heads=1, experts=4)
    with pytest.raises(IncompatibleInputs, match=r"blk\.2\.ffn_down_exps\.weight: is of none of the 2 layers"):
        mix("Q4_K_M", {"blk.2.ffn_down_exps.weight": TensorSpec(DType.F16, (4, 8, 256))}, experts)
