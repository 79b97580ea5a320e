"""Quantised checkpoints as people publish them: other files, prefixes, shapes and names than the libraries' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import evaluate_all

from weightops.checkpoint import Checkpoint, written_json
from weightops.formats.folder import open_checkpoint
from weightops.formats.quantized.weights import reshaped
from weightops.lazy import LazyTensor
from weightops.operations.dequantize import dequantize
from weightops.ops.elementwise import cast
from weightops.spec import DType

GOLDEN = Path(__file__).parents[2] / "golden" / "number_formats"
KEYS = ("quantization_config", "quantization")
Tensors = Mapping[str, LazyTensor]


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def reshape(end: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        n: reshaped(t, shape or (t.spec.numel,)) if n.endswith(end) else t for n, t in tensors.items()
    }


def as_int32(tensors: Tensors) -> Tensors:
    return {n: cast(t, DType.I32) if n.endswith("weight_shape") else t for n, t in tensors.items()}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in KEYS}


def with_settings(**edit: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda config: {**config, "quantization_config": {**config["quantization_config"], **edit}}


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**plain(config), "text_config": {"quantization_config": config["quantization_config"]}}


AWQ_FILE = {"quant_config.json": {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}}
MODELOPT_FILE = {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}}
AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32}
CASES: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "a file of llm-awq's": ("awq-gemm-g32", None, plain, AWQ_FILE),
    "AWQ of auto-round": ("awq-gemm-g32", None, lambda c: {**c, "quantization_config": AUTO_ROUND}, {}),
    "a method in capitals": ("awq-gemm-g32", None, with_settings(quant_method="AWQ"), {}),
    "MLX's own key alone": ("mlx-4bit-g64", None, lambda c: {**plain(c), "quantization": c["quantization"]}, {}),
    "settings of the language model": ("fp8-block-128", None, nested, {}),
    "no settings, fp8": ("fp8-block-128", None, plain, {}),
    "no settings, twice quantised": ("bnb-nf4-double", None, plain, {}),
    "a prefix": ("fp8-block-128", renamed("model.", "model.language_model."), None, {}),
    "a wrapper": ("fp8-block-128", renamed("model.", "module.model."), None, {}),
    "DeepSeek V4's names": ("fp8-block-ue8m0", renamed(".weight_scale_inv", ".scale"), None, {}),
    "modelopt before 2025": ("modelopt-fp8", None, plain, MODELOPT_FILE),
    "scales without a column": ("fp8-fbgemm-row", reshape("weight_scale"), None, {}),
    "a shape of int32": ("ct-pack-w4-g128", as_int32, None, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_same(case: str) -> None:
    golden, edit, configure, files = CASES[case]
    source = open_checkpoint(GOLDEN / golden)
    expected = {n: t.read() for n, t in dequantize(source, evaluate=evaluate_all).items()}
    tensors = dict(edit(source.tensors)) if edit else dict(source.tensors)
    sidecars = {**source.sidecars, **{name: written_json(document) for name, document in files.items()}}
    given = Checkpoint("m", tensors, sidecars=sidecars, metadata=source.metadata)
    given = replace(given.with_config(configure) if configure else given)
    found = dequantize(given, evaluate=evaluate_all)
    assert [t.read() for t in found.values()] == list(expected.values())
    assert "quant" not in str(found.config())
    assert not files.keys() & found.sidecars.keys()
