"""Kernels in the place of a trained model's layers: logits equal those of the dequantised model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from weightops_kernels import launch
from weightops_kernels.linear import QuantLinear

import weightops

DATA = Path(__file__).parents[1] / "data/tiny-llama"


needs_triton = pytest.mark.skipif(launch.available() is not None, reason=str(launch.available()))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", [{}, {"bits": 3, "act_order": True}])
@pytest.mark.parametrize(
    ("engine", "dtype", "tolerance"),
    [("cpu", "float32", 1e-5), pytest.param("triton", "float16", 5e-3, marks=needs_triton)],
)
def test_logits_are_those_of_the_dequantised_model(
    tmp_path: Path, engine: str, dtype: str, tolerance: float, options: dict[str, Any]
) -> None:
    text = {"calibration": [DATA / "calibration.txt"], "samples": 8, "seq_len": 128}
    weightops.quantize(DATA, tmp_path / "quantised", **text, **options)
    weightops.dequantize(tmp_path / "quantised", tmp_path / "plain", dtype="float32")
    kind = getattr(torch, dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=kind)
    tensors = load_file(tmp_path / "quantised/model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    for name in modules:
        parts = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
        layer = QuantLinear.from_tensors(*parts, bits=options.get("bits", 4))
        layer.prepare(engine, dtype=kind)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    tokens = AutoTokenizer.from_pretrained(DATA)("In the beginning was the Word", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = plain(tokens).logits.float(), model(tokens).logits.float()
    assert len(modules) == 28
    assert ((found - expected).norm() / expected.norm()).item() < tolerance
