"""What check says of quantised models of any format: real parameters, scales, contradictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightops
from weightops.formats.folder import open_checkpoint
from weightops.operations.check import check

GOLDEN = Path(__file__).parents[2] / "golden" / "number_formats"


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shutil.copytree(GOLDEN / request.param, tmp_path / "model")
    return tmp_path / "model"


def said(folder: Path) -> str:
    report = check(open_checkpoint(folder), architecture=False)
    return "\n".join(f"{f.severity} {f.code}: {f.message}" for f in report.findings if f.code == "quantization")


@pytest.mark.parametrize("folder", ["ct-pack-w4-g128", "bnb-nf4", "mlx-4bit-g64", "fp8-block-128"], indirect=True)
def test_parameters_are_those_of_the_weights(folder: Path) -> None:
    assert said(folder) == ""
    expected = json.loads((folder / "expected.json").read_text())["tensors"]
    found = weightops.inspect(folder)
    assert found.parameters == sum(torch.Size(about["shape"]).numel() for about in expected.values())
    assert sum(found.quantised.schemes.values()) == len(expected) - 1


@pytest.mark.parametrize("folder", ["fp8-block-128"], indirect=True)
def test_scales_below_zero_and_scales_that_are_missing_are_errors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file({**tensors, name: -tensors[name]}, folder / "model.safetensors")
    assert f"error quantization: 1 scales hold numbers below zero: {name}" in said(folder)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors")
    assert f"{name.removesuffix('_scale_inv')}: is float8_e4m3fn [64, 128] and has no scales" in said(folder)


@pytest.mark.parametrize("folder", ["awq-gemm-g32"], indirect=True)
def test_tensors_without_a_configuration_and_with_that_of_another_format(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert "error quantization: 2 weights are quantised (awq gemm" in said(folder)
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {**quantization, "quant_method": "fp8"}})
    )
    assert "config.json says quant_method fp8, the tensors of" in said(folder)
