"""Every published format against weights that its own library wrote and dequantised."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support import evaluate_all

from weightops.formats.folder import open_checkpoint
from weightops.operations.dequantize import dequantize
from weightops.spec import parse_dtype

GOLDEN = Path(__file__).parents[2] / "golden" / "number_formats"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_library_in_every_type(name: str) -> None:
    expected: dict[str, Any] = json.loads((GOLDEN / name / "expected.json").read_text())
    source = open_checkpoint(GOLDEN / name)
    quantised = False
    for dtype in (None, "float32", "bfloat16", "float16"):
        found = dequantize(source, dtype=parse_dtype(dtype), evaluate=evaluate_all)
        assert found.keys() >= expected["tensors"].keys()
        for tensor, about in expected["tensors"].items():
            spec = found[tensor].spec
            assert list(spec.shape) == about["shape"]
            if source.get(tensor) is found[tensor]:
                continue
            quantised = True
            assert spec.dtype.value == (dtype or expected["native"])
            if spec.dtype.value in about["sha256"]:
                digest = hashlib.sha256(found[tensor].read()).hexdigest()
                assert digest in about["sha256"][spec.dtype.value], f"{tensor} in {spec.dtype.value}"
    assert quantised


def test_the_configuration_is_that_of_a_plain_model() -> None:
    for name in NAMES:
        found = dequantize(open_checkpoint(GOLDEN / name), evaluate=evaluate_all)
        config = found.config()
        assert not {"quantization_config", "quantization"} & config.keys()
        assert (
            config.get("torch_dtype", config.get("dtype"))
            == json.loads((GOLDEN / name / "expected.json").read_text())["native"]
        )
        assert not {"quanto_qmap.json", "hf_quant_config.json"} & found.sidecars.keys()
