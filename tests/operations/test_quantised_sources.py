"""What verbs do with quantised sources: those that need values take the plain model, those that move tensors carry."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import evaluate_all, write_checkpoint
from tiny_models import save_tiny

import weightops
from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.folder import open_checkpoint
from weightops.lazy import LazyTensor
from weightops.operations.dequantize import dequantize
from weightops.ops.rows import Given

GOLDEN = Path(__file__).parents[1] / "golden" / "number_formats"
NAMES = ("fp8-block-128", "ct-pack-w4-g32-asym", "bnb-nf4-double", "awq-gemm-g32", "mlx-4bit-g64")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: bytes(tensor.read()) for name, tensor in open_checkpoint(folder).items()}


@pytest.fixture(params=NAMES)
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shutil.copytree(GOLDEN / request.param, tmp_path / "model")
    (tmp_path / "model" / "expected.json").unlink()
    return tmp_path / "model"


def test_verbs_that_need_values_equal_dequantising_first(folder: Path, tmp_path: Path) -> None:
    weightops.dequantize(folder, tmp_path / "plain")
    for source in ("model", "plain"):
        weightops.cast(tmp_path / source, tmp_path / f"cast-{source}", dtype="float32")
        (tmp_path / "merge.yml").write_text(
            "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: " + str(tmp_path / source) + "}]\n"
        )
        weightops.merge(tmp_path / "merge.yml", out=tmp_path / f"merged-{source}")
    for kind in ("cast", "merged"):
        assert contents(tmp_path / f"{kind}-model") == contents(tmp_path / f"{kind}-plain")
        assert "quantization" not in (tmp_path / f"{kind}-model" / "config.json").read_text()
    (report,) = weightops.compare(folder, tmp_path / "plain").comparisons
    assert "dequantised, byte for byte" in report.relation


def test_verbs_that_move_tensors_carry_the_parts_and_name_the_modules_anew(folder: Path, tmp_path: Path) -> None:
    weightops.shard(folder, tmp_path / "moved", rename={r"^model\.": "language.model."}, max_shard_size="1KB")
    moved, source = open_checkpoint(tmp_path / "moved"), open_checkpoint(folder)
    assert len(moved) == len(source)
    found, expected = (dequantize(each, evaluate=evaluate_all) for each in (moved, source))
    renamed = {name.removeprefix("language."): tensor.read() for name, tensor in found.items()}
    assert renamed == {name: tensor.read() for name, tensor in expected.items()}
    by_module: dict[str, set[str]] = {}
    for name, file in moved.shards.items():
        by_module.setdefault(name.split("_proj.")[0], set()).add(file)
    assert all(len(files) == 1 for files in by_module.values()), "the parts of a weight lie in one file"


def test_an_exact_delta_of_packed_tensors_gives_them_back(folder: Path, tmp_path: Path) -> None:
    source = open_checkpoint(folder)
    changed = {
        name: LazyTensor.make(Given(tensor.spec.dtype, tensor.spec.shape, bytes(byte ^ 1 for byte in tensor.read())))
        for name, tensor in source.items()
        if tensor.spec.dtype.itemsize == 1 or not tensor.spec.dtype.is_float
    }
    weightops.save(replace(source, tensors={**source.tensors, **changed}), tmp_path / "tuned")
    weightops.diff(folder, tmp_path / "tuned", tmp_path / "delta")
    weightops.recover(folder, tmp_path / "delta", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "tuned") != contents(folder)


def test_a_diff_is_not_added_to_packed_weights(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "diff", {"model.norm.weight": torch.zeros(64)})
    with pytest.raises(IncompatibleInputs, match=r"is quantised .*: a diff is added to plain weights") as caught:
        weightops.recover(folder, tmp_path / "diff", tmp_path / "out")
    assert "weightops dequantize" in str(caught.value.hint)


def test_lists_of_modules_in_the_configuration_get_the_new_names(tmp_path: Path) -> None:
    tensors = {"model.lm_head.weight": torch.ones(4, 4), "model.layers.0.q.weight": torch.ones(4, 4)}
    quantization = {
        "quant_method": "compressed-tensors",
        "ignore": ["model.lm_head", "re:.*norm"],
        "config_groups": {"group_0": {"targets": ["model.layers.0.q", "Linear"]}},
    }
    write_checkpoint(tmp_path / "model", tensors, config={"quantization_config": quantization})
    weightops.shard(tmp_path / "model", tmp_path / "out", drop_prefix="model.")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["ignore"] == ["lm_head", "re:.*norm"]
    assert found["config_groups"]["group_0"]["targets"] == ["layers.0.q", "Linear"]


def test_blocks_of_gguf_files_are_numbers_to_verbs_that_need_them(tmp_path: Path) -> None:
    weights = torch.randn(8, 256).numpy()
    blocks = {"blk.0.attn_q.weight": weightops.quantize_blocks(weights, "q4_k")}
    metadata = {"general.architecture": {"string": "llama"}}
    weightops.save(Checkpoint("m", blocks, metadata=metadata, container="gguf"), tmp_path / "m")
    (file,) = (tmp_path / "m").glob("*.gguf")
    weightops.cast(file, tmp_path / "cast", dtype="float32")
    weightops.dequantize(file, tmp_path / "plain")
    weightops.cast(tmp_path / "plain", tmp_path / "again", dtype="float32")
    assert contents(tmp_path / "cast") == contents(tmp_path / "again")


def test_a_quantised_model_is_converted_as_the_plain_one(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    weightops.cast(tmp_path / "model", tmp_path / "fp8", scheme="fp8")
    weightops.dequantize(tmp_path / "fp8", tmp_path / "plain")
    for source in ("fp8", "plain"):
        weightops.convert(tmp_path / source, tmp_path / f"meta-{source}", to="meta", tokenizer=False)
        weightops.convert(tmp_path / source, tmp_path / f"hf-{source}", to="hf", dtype="bfloat16")
    for layout in ("meta", "hf"):
        assert contents(tmp_path / f"{layout}-fp8") == contents(tmp_path / f"{layout}-plain")
