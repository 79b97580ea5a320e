"""repack: the same numbers in every container that can hold them, and nothing where one cannot."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_models import Scheme, llama, quantised
from support import evaluate_all, given_tensor

import weightops
from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError, WeightopsError
from weightops.formats.folder import open_checkpoint
from weightops.formats.quantized.containers import Container
from weightops.formats.quantized.weights import CONFIG_KEY
from weightops.operations.dequantize import dequantize
from weightops.operations.repack import repack
from weightops.spec import DType

GOLDEN = Path(__file__).parents[1] / "golden" / "number_formats"


def bytes_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: bytes(tensor.read()) for name, tensor in checkpoint.items()}


def plain(checkpoint: Checkpoint, dtype: DType | None = None) -> dict[str, bytes]:
    return bytes_of(dequantize(checkpoint, dtype=dtype, evaluate=evaluate_all))


def packed(checkpoint: Checkpoint, to: Container) -> Checkpoint:
    return repack(checkpoint, to=to, evaluate=evaluate_all)


# Golden, container, and whether scales keep their type.
MOVES: list[tuple[str, Container, bool]] = [
    ("awq-gemm-g128", "gptq_v2", True),
    ("awq-gemm-g32", "compressed-tensors", True),
    ("awq-gemm-g32", "awq", True),
    ("ct-pack-w4-channel-asym", "awq", True),
    ("ct-pack-w4-channel-asym", "gptq_v2", True),
    ("ct-pack-w4-g128", "gptq", False),
    ("ct-pack-w4-g32-asym", "compressed-tensors", True),
    ("ct-pack-w3-g32", "compressed-tensors", True),
    ("ct-pack-w8-channel", "gptq", False),
]


@pytest.mark.parametrize(("name", "to", "same_scales"), MOVES)
def test_the_librarys_own_files_move_and_come_back_to_the_bit(name: str, to: Container, same_scales: bool) -> None:
    """So what is written is what autoawq and compressed-tensors pack of the same integers."""
    source = open_checkpoint(GOLDEN / name)
    moved = packed(source, to)
    assert plain(moved, DType.F32) == plain(source, DType.F32)
    if same_scales:
        assert plain(moved) == plain(source)
        home: Container = "awq" if name.startswith("awq") else "compressed-tensors"
        assert bytes_of(packed(moved, home)) == bytes_of(source)


def test_other_layouts_of_a_container_become_its_usual_one() -> None:
    for name, to in (("awq-gemv-g64", "awq"), ("ct-old-pack-w3-padded", "compressed-tensors")):
        source = open_checkpoint(GOLDEN / name)
        moved = packed(source, to)  # type: ignore[arg-type]
        assert plain(moved) == plain(source)
        assert {n: t.spec for n, t in moved.items()} != {n: t.spec for n, t in source.items()}


SCHEMES: list[tuple[Scheme, tuple[Container, ...]]] = [
    (Scheme(), ("awq", "compressed-tensors", "gptq_v2")),
    (Scheme(sym=False, ends=True, checkpoint_format="gptq_v2"), ("awq", "compressed-tensors")),
    (Scheme(sym=False, group_size=-1), ("awq", "compressed-tensors")),
    (Scheme(bits=3, sym=False, checkpoint_format="gptq_v2"), ("compressed-tensors", "gptq")),
    (Scheme(bits=8), ("compressed-tensors",)),
    (Scheme(bits=2, sym=False, shuffled=True), ("gptq_v2",)),
]


@pytest.mark.parametrize(("scheme", "containers"), SCHEMES)
def test_gptq_goes_through_other_containers_and_comes_back_to_the_bit(
    scheme: Scheme, containers: tuple[Container, ...]
) -> None:
    source = quantised(llama(), scheme).checkpoint
    expected = plain(source)
    for container in containers:
        moved = packed(source, container)
        assert plain(moved) == expected
        back = packed(moved, scheme.checkpoint_format)
        assert bytes_of(back) == bytes_of(source)
        said, before = (c.config()[CONFIG_KEY] for c in (back, source))
        for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method"):
            assert said[key] == before[key], key


def test_the_configuration_is_what_loaders_ask_for() -> None:
    source = quantised(llama(), Scheme()).checkpoint
    made = packed(source, "compressed-tensors")
    assert "quantize_config.json" not in made.sidecars
    said = made.config()[CONFIG_KEY]
    assert {key: said[key] for key in ("quant_method", "format", "quantization_status", "ignore", "version")} == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "version": "0.20.0",
    }
    (group,) = said["config_groups"].values()
    assert (group["targets"], group["input_activations"]) == (["Linear"], None)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    assert weights.items() <= group["weights"].items()
    assert not any(name.endswith("zero_point") for name in made)
    said = packed(source, "awq").config()[CONFIG_KEY]
    assert said == {
        "bits": 4,
        "group_size": 32,
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"


def mixed() -> Checkpoint:
    """A model with one layer in 8 bits, and one that is not quantised."""
    four, eight = (quantised(llama(), Scheme(bits=bits)) for bits in (4, 8))
    state = {n: eight.state[n] if n.startswith(DOWN) else t for n, t in four.state.items() if not n.startswith(UP)}
    document = {**four.scheme.config.to_json(), "dynamic": {"+:.*down_proj": {"bits": 8}}}
    files = {"config.json": written_json({**four.config, CONFIG_KEY: document})}
    state[f"{UP}.weight"] = torch.ones(96, 64).half()
    return Checkpoint("model", {name: given_tensor(tensor) for name, tensor in state.items()}, files)


def test_layers_of_several_kinds_are_groups_by_name_and_plain_ones_are_listed() -> None:
    source = mixed()
    made = packed(source, "compressed-tensors")
    said = made.config()[CONFIG_KEY]
    assert [(group["targets"], group["weights"]["num_bits"]) for group in said["config_groups"].values()] == [
        (["Linear"], 4),
        ([DOWN], 8),
    ]
    assert said["ignore"] == ["lm_head", UP]
    assert plain(made) == plain(source)
    four = replace(made, tensors={name: tensor for name, tensor in made.items() if not name.startswith(DOWN)})
    assert list(packed(four, "gptq").config()[CONFIG_KEY]["dynamic"]) == [rf"-:^{re.escape(UP)}$"]
    assert packed(four, "awq").config()[CONFIG_KEY]["modules_to_not_convert"] == ["lm_head", UP]


def golden(name: str) -> Callable[[], Checkpoint]:
    return lambda: open_checkpoint(GOLDEN / name)


def gptq(**options: Any) -> Callable[[], Checkpoint]:
    return lambda: quantised(llama(), Scheme(**options)).checkpoint


def without_config() -> Checkpoint:
    return replace(gptq()(), sidecars={})


def below_zero() -> Checkpoint:
    found = quantised(llama(), Scheme())
    name = f"{DOWN}.scales"
    return replace(found, state={**found.state, name: -found.state[name]}).checkpoint


def not_a_number() -> Checkpoint:
    found = quantised(llama(), Scheme())
    name = f"{DOWN}.scales"
    return replace(found, state={**found.state, name: found.state[name] * torch.nan}).checkpoint


REFUSED: list[tuple[Callable[[], Checkpoint], Container, type[WeightopsError], str]] = [
    (gptq(bits=8), "awq", IncompatibleInputs, r"has 8 bits, awq holds 4"),
    (gptq(shuffled=True), "awq", IncompatibleInputs, r"\(act-order\), which awq cannot say"),
    (golden("ct-old-pack-w4-gidx"), "compressed-tensors", IncompatibleInputs, r"act-order"),
    (gptq(group_size=40), "compressed-tensors", IncompatibleInputs, r"64 inputs in groups of 40"),
    (golden("awq-gemm-g32"), "gptq", IncompatibleInputs, r"a zero point of 0, which gptq cannot store"),
    (golden("ct-pack-w4-g32-asym"), "awq", IncompatibleInputs, r"in bfloat16, which is no number of float16"),
    (golden("ct-nvfp4"), "gptq", IncompatibleInputs, r"scales of activations"),
    (golden("ct-int8-w8a8"), "gptq", IncompatibleInputs, r"activations of .* are quantised as well"),
    (golden("mlx-4bit-g64"), "gptq", IncompatibleInputs, r"expected integers with a scale for each row"),
    (mixed, "gptq", IncompatibleInputs, r"has 4 bits, model\.layers\.1\.mlp\.down_proj 8: gptq has one number"),
    (without_config, "awq", UsageError, r"has no config\.json, where awq is said"),
    (below_zero, "compressed-tensors", IncompatibleInputs, r"has scales below zero"),
    (not_a_number, "awq", IncompatibleInputs, r"has scales that are NaN"),
]


@pytest.mark.parametrize(("source", "to", "error", "text"), REFUSED)
def test_what_the_container_cannot_hold_is_refused_by_name(
    source: Callable[[], Checkpoint], to: Container, error: type[WeightopsError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        packed(source(), to)
    assert caught.value.hint


def test_a_plain_model_is_refused() -> None:
    source = dequantize(gptq()(), evaluate=evaluate_all)
    with pytest.raises(IncompatibleInputs, match="holds no quantised weight"):
        packed(source, "awq")


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True), (3, False)])
def test_transformers_has_the_weights_of_dequantize(tmp_path: Path, bits: int, sym: bool) -> None:
    pytest.importorskip("compressed_tensors", reason="transformers loads the format through compressed-tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    quantised(llama(), Scheme(bits=bits, sym=sym)).save(tmp_path / "gptq")
    done = weightops.repack(tmp_path / "gptq", tmp_path / "out", to="compressed-tensors")
    assert any("dequantize=True" in text for text in done.warnings) != sym
    # Its other way in does not know packed zero points; both are the same for symmetric ones.
    how = {} if sym else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16, **how)
    loaded(torch.arange(4)[None])
    expected = dequantize(open_checkpoint(tmp_path / "gptq"), evaluate=evaluate_all)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor.torch()) for name, tensor in expected.items())
