"""The GPTQ format: configs in both directions, modules from their tensors, and what is written of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from gptq_models import Scheme, rounded
from hypothesis import given
from hypothesis import strategies as st
from support import evaluate, given_tensor

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.quantized.gptq import (
    QuantizeConfig,
    is_act_order,
    modules,
    parse_config,
    read_config,
    write_module,
)
from weightops.lazy import LazyTensor
from weightops.ops.gptq.tensors import Pack
from weightops.ops.numbers.bitpack import BITS, unpack, unpack_columns

MINIMAL = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "quant_method": "gptq"}
AUTOGPTQ = {
    **MINIMAL,
    "damp_percent": 0.01,
    "static_groups": False,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "is_marlin_format": False,
}
TRANSFORMERS = {
    **MINIMAL,
    "batch_size": 1,
    "block_name_to_quantize": None,
    "checkpoint_format": "gptq",
    "dataset": None,
    "damp_percent": 0.1,
    "meta": None,
    "tokenizer": None,
}
GPTQMODEL = {
    **MINIMAL,
    "sym": False,
    "checkpoint_format": "gptq_v2",
    "format": "gptq_v2",
    "lm_head": False,
    "method": "gptq",
    "pack_dtype": "int32",
    "dynamic": {r"-:.*down_proj.*": {}},
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_auto_increment": 0.01, "act_group_aware": True},
}


@pytest.mark.parametrize("document", [MINIMAL, AUTOGPTQ, TRANSFORMERS, GPTQMODEL], ids=len)
def test_configs_of_all_programs_are_read(document: dict[str, Any]) -> None:
    found = parse_config(document, "here")
    stated = {key: value for key, value in document.items() if key in found.__struct_fields__ and value is not None}
    assert {key: getattr(found, key) for key in stated} == stated
    assert found.quantizers == (("gptqmodel:7.7.0",) if document is GPTQMODEL else ())


@given(
    st.builds(
        QuantizeConfig,
        bits=st.sampled_from(BITS),
        group_size=st.one_of(st.just(-1), st.integers(1, 4096)),
        desc_act=st.booleans(),
        sym=st.booleans(),
        checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
        damp_percent=st.one_of(st.none(), st.floats(0, 1)),
        meta=st.one_of(st.none(), st.just({"quantizer": ["weightops:1"]})),
    )
)
def test_a_config_comes_back_from_json(config: QuantizeConfig) -> None:
    assert parse_config(json.loads(json.dumps(config.to_json())), "here") == config


@pytest.mark.parametrize(
    ("document", "error", "text"),
    [
        ({"quant_method": "awq", "bits": 4}, IncompatibleInputs, "quantised by awq, expected gptq"),
        ({**MINIMAL, "checkpoint_format": "marlin"}, IncompatibleInputs, "in the format marlin"),
        ({**AUTOGPTQ, "is_marlin_format": True}, IncompatibleInputs, "in the format marlin"),
        ({**MINIMAL, "checkpoint_format": "gptq", "format": "gptq_v2"}, CorruptInput, "is gptq, format is gptq_v2"),
        ({"group_size": 128}, CorruptInput, "there is no required field bits|required field bits"),
        ({**MINIMAL, "bits": 5}, CorruptInput, "bits is 5, expected one of 2, 3, 4, 8"),
        ({**MINIMAL, "bits": "4"}, CorruptInput, "Expected int, got str: bits"),
        ({**MINIMAL, "group_size": 0}, CorruptInput, "group_size is 0, expected -1"),
        ({**MINIMAL, "sym": 1}, CorruptInput, "Expected bool, got int: sym"),
        ({**MINIMAL, "pack_dtype": "int16"}, CorruptInput, "pack_dtype"),
    ],
)
def test_configs_that_mean_something_else_are_refused(document: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        parse_config(document, "here")


def test_two_configs_have_to_agree() -> None:
    files = {
        "config.json": written_json({"quantization_config": MINIMAL}),
        "quantize_config.json": written_json({**AUTOGPTQ, "group_size": 64}),
    }
    with pytest.raises(CorruptInput, match=r"config\.json says group_size 128, quantize_config\.json says 64"):
        read_config(Checkpoint("m", {}, files))
    assert read_config(Checkpoint("m", {}, {})) is None


# --- modules ----------------------------------------------------------------------------------------------------------


def stored(scheme: Scheme = Scheme(), bias: bool = True) -> dict[str, np.ndarray]:  # noqa: B008  # a value
    made = rounded(np.random.default_rng(0).normal(0, 0.1, (64, 96)), scheme)
    values = np.linspace(-1, 1, 64, dtype=np.float32) if bias else None
    arguments = (made.q, made.zeros, made.scales, made.g_idx, values, scheme.bits, scheme.checkpoint_format)
    return write_module("a.b", *arguments)


def opened(tensors: dict[str, np.ndarray]) -> Checkpoint:
    return Checkpoint("model", {name: given_tensor(torch.from_numpy(array)) for name, array in tensors.items()})


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 32, 96])
def test_sizes_and_bits_come_from_the_tensors(bits: int, group_size: int) -> None:
    scheme = Scheme(bits=bits, group_size=group_size)
    for tensors in (stored(scheme), {n: a for n, a in stored(scheme).items() if not n.endswith(("g_idx", "bias"))}):
        (module,) = modules(opened(tensors)).values()
        expected = ("a.b", 96, 64, 3 if group_size == 32 else 1, bits, 32 if group_size == 32 else 96)
        assert (
            module.prefix,
            module.in_features,
            module.out_features,
            module.groups,
            module.bits,
            module.group_size,
        ) == expected
        modules(opened(tensors), scheme.config)


def test_other_settings_for_some_modules_are_left_to_the_tensors() -> None:
    config = QuantizeConfig(bits=8, group_size=64, dynamic={"+:a": {"bits": 4, "group_size": 32}})
    assert modules(opened(stored()), config)["a.b"].bits == 4
    with pytest.raises(IncompatibleInputs, match="the tensors have 4 bits, the config says 8"):
        modules(opened(stored()), QuantizeConfig(bits=8, dynamic={"-:c": {}}))


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("qweight", np.zeros((12, 32), np.int32), r"qweight \[12, 32\], qzeros \[3, 8\] and scales \[3, 64\] do not"),
        ("qweight", np.zeros((12, 64), np.int64), r"a\.b\.qweight is int64 \[12, 64\], expected int32 of 2 dimensions"),
        ("qweight", np.zeros((11, 64), np.int32), "has 88 inputs and 64 outputs at 4 bits, expected multiples of 32"),
        ("qzeros", np.zeros((2, 8), np.int32), r"qzeros \[2, 8\] and scales \[3, 64\] do not fit"),
        ("qzeros", np.zeros((3, 10), np.int32), r"qzeros \[3, 10\] and scales \[3, 64\] do not fit"),
        ("qzeros", np.zeros((3, 0), np.int32), r"a\.b\.qzeros is int32 \[3, 0\]"),
        ("scales", np.zeros((3, 64), np.int32), r"a\.b\.scales is int32 \[3, 64\], expected float16 or bfloat16"),
        ("g_idx", np.zeros(95, np.int32), r"g_idx is \[95\], expected \[96\]"),
        ("g_idx", np.zeros(96, np.int64), r"a\.b\.g_idx is int64 \[96\], expected int32 of 1 dimension"),
        ("bias", np.zeros(63, np.float16), r"bias is \[63\], expected \[64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, array: np.ndarray, text: str) -> None:
    with pytest.raises(CorruptInput, match=text):
        modules(opened({**stored(), f"a.b.{name}": array}))


def test_old_float_zeros_are_named() -> None:
    tensors = {"a.b.qweight": stored()["a.b.qweight"], "a.b.zeros": np.zeros((64, 1), np.float32)}
    with pytest.raises(CorruptInput, match=r"a\.b has no qzeros") as error:
        modules(opened(tensors))
    assert "zeros in float" in (error.value.hint or "")


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_a_written_module_holds_the_integers_and_zero_points_less_one_in_v1(bits: int, checkpoint_format: Any) -> None:
    scheme = Scheme(bits=bits, sym=False, ends=True, shuffled=True, checkpoint_format=checkpoint_format)
    made = rounded(np.random.default_rng(0).normal(0, 0.1, (64, 96)), scheme)
    bias = np.linspace(-1, 1, 64)
    found = write_module("p", made.q, made.zeros, made.scales, made.g_idx, bias, bits, checkpoint_format)
    assert list(found) == [f"p.{part}" for part in ("qweight", "qzeros", "scales", "g_idx", "bias")]
    assert np.array_equal(unpack(found["p.qweight"], bits), made.q)
    less = 1 if checkpoint_format == "gptq" else 0
    assert np.array_equal(unpack_columns(found["p.qzeros"], bits), made.zeros - less)
    assert np.array_equal(found["p.scales"], made.scales)
    assert np.array_equal(found["p.g_idx"], made.g_idx)
    kinds = ["int32", "int32", "float16", "int32", "float16"]
    assert [array.dtype.name for array in found.values()] == kinds
    assert is_act_order(found["p.g_idx"])


def test_symmetric_zero_points_are_the_known_words() -> None:
    for checkpoint_format, word in (("gptq", 0x77777777), ("gptq_v2", 0x88888888)):
        scheme = Scheme(checkpoint_format=checkpoint_format)  # type: ignore[arg-type]
        assert (stored(scheme)["a.b.qzeros"].view(np.uint32) == word).all()


def arrays(**edits: Any) -> list[Any]:
    parts = {
        "q": np.zeros((64, 32), np.uint8),
        "zeros": np.full((2, 32), 8, np.uint8),
        "scales": np.full((2, 32), 0.5, np.float16),
        "g_idx": np.arange(64) // 32,
        "bias": None,
    }
    return [*{**parts, **edits}.values(), 4]


def with_scale(value: float) -> np.ndarray:
    scales = np.full((2, 32), 0.5, np.float16)
    scales[1, 3] = value
    return scales


@pytest.mark.parametrize(
    ("edits", "text"),
    [
        ({"scales": with_scale(0)}, r"p\.scales holds 0\.0 for group 1 of output 3, and 0 more"),
        ({"scales": with_scale(6e-5)}, r"p\.scales holds 6\.0?\S*e-05 for group 1"),
        ({"scales": with_scale(np.inf)}, r"p\.scales holds inf"),
        ({"scales": np.ones((2, 32), np.float32)}, r"p\.scales is float32, expected float16"),
        ({"zeros": np.zeros((2, 32), np.uint8)}, r"p\.zeros holds a zero point of 0, which checkpoint_format gptq"),
        ({"q": np.full((64, 32), 16, np.uint8)}, r"p\.q holds 16, expected 0 to 15"),
        (
            {"q": np.zeros((63, 32), np.uint8), "g_idx": np.zeros(63)},
            "has 63 inputs and 32 outputs, expected multiples",
        ),
        ({"g_idx": np.full(64, 2)}, r"p\.g_idx names group 2, expected 0 to 1"),
        ({"g_idx": np.zeros(32)}, "do not fit each other"),
        ({"bias": np.full(32, 1e6)}, r"p\.bias \[32\]: expected 32 numbers within float16"),
        ({"bias": np.full(32, np.nan)}, r"p\.bias \[32\]: expected 32 numbers within float16"),
    ],
)
def test_what_cannot_be_stored_is_refused(edits: dict[str, Any], text: str) -> None:
    with pytest.raises(IncompatibleInputs, match=text):
        write_module("p", *arrays(**edits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_packed_alike_whatever_part_is_asked_for(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.ops.gptq.tensors._READ_NBYTES", 1)
    integers = given_tensor(torch.randint(0, 1 << bits, (192, 8), dtype=torch.int32))
    packed = LazyTensor.make(Pack("x", bits), integers)
    whole = evaluate(packed)
    assert evaluate(packed, packed.grain) == whole
    assert evaluate(packed, 3 * packed.grain + 1) == whole
