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
from weightops.formats.folder import open_checkpoint
from weightops.inference.model import BlockModel

DATA = Path(__file__).parents[1] / "data/tiny-llama"
CALIBRATION = {"calibration": [DATA / "calibration.txt"], "samples": 8, "seq_len": 128}

pytestmark = pytest.mark.usefixtures("one_thread")
needs_triton = pytest.mark.skipif(launch.available() is not None, reason=str(launch.available()))


@pytest.fixture(
    scope="module",
    params=[{"method": "rtn"}, {"bits": 3, "act_order": True, **CALIBRATION}],
    ids=["4 bits", "3 bits, act-order"],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with the trained model `quantised`, and dequantised `plain`; and its bits."""
    folder = tmp_path_factory.mktemp("trained")
    options: dict[str, Any] = request.param
    weightops.quantize(DATA, folder / "quantised", **options)
    weightops.dequantize(folder / "quantised", folder / "plain", dtype="float32")
    return folder, options.get("bits", 4)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return AutoTokenizer.from_pretrained(DATA)("In the beginning was the Word", return_tensors="pt").input_ids


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 2e-6), pytest.param("bfloat16", 2e-2, marks=pytest.mark.slow), ("float16", 2e-3)],
)
def test_packed_logits_are_those_of_the_dequantised_model(
    trained: tuple[Path, int], tokens: torch.Tensor, dtype: str, tolerance: float
) -> None:
    folder, _ = trained
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32)
    model = BlockModel(open_checkpoint(folder / "quantised"), dtype=getattr(torch, dtype))
    model.keep_packed()
    with model.loaded("", *model.blocks), torch.no_grad():
        assert sum(isinstance(module, QuantLinear) for module in model.module.modules()) == 28
        assert distance(model.module(tokens).logits, plain(tokens).logits) < tolerance


@needs_triton
def test_triton_logits_are_those_of_the_dequantised_model(trained: tuple[Path, int], tokens: torch.Tensor) -> None:
    folder, bits = trained
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float16)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float16)
    tensors = load_file(folder / "quantised/model.safetensors")
    for name in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        parts = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
        # On a CPU it is only taken where it is named.
        model.set_submodule(name, QuantLinear.from_tensors(*parts, bits=bits).prepare("triton"))
    with torch.no_grad():
        assert distance(model(tokens).logits, plain(tokens).logits) < 5e-3
