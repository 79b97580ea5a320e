"""`weightops inspect`: what it counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gptq_models import Scheme, llama, quantised
from safetensors.torch import load_file
from support import write_checkpoint

import weightops
from weightops.ops.numbers.bitpack import BITS


@pytest.mark.parametrize(
    "scheme", [*(Scheme(bits=bits) for bits in BITS), Scheme(group_size=-1), Scheme(group_size=40)]
)
def test_packed_modules_count_as_the_weights_that_they_stand_for(tmp_path: Path, scheme: Scheme) -> None:
    model = llama()
    found = weightops.inspect(quantised(model, scheme).save(tmp_path / "model"))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_awq_packs_outputs(tmp_path: Path) -> None:
    parts = {"qweight": (128, 64 // 8), "qzeros": (2, 64 // 8)}
    tensors = {f"m.{part}": torch.zeros(shape, dtype=torch.int32) for part, shape in parts.items()}
    write_checkpoint(tmp_path, {**tensors, "m.scales": torch.zeros(2, 64).half(), "m.bias": torch.zeros(64).half()})
    assert weightops.inspect(tmp_path).parameters == 128 * 64 + 64


def test_what_only_looks_packed_counts_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, {"m.qweight": torch.zeros(4, 4), "n.qweight": torch.zeros(3), "n.scales": torch.zeros(2)}
    )
    assert weightops.inspect(tmp_path).parameters == 16 + 3 + 2


def test_files_are_counted_with_their_tensors_and_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4), "b": torch.zeros(3).half(), "c": torch.zeros(2), "d": torch.zeros(1)}
    source = write_checkpoint(tmp_path / "model", tensors, shards=2)
    by_file: dict[str, tuple[int, int]] = {}
    for path in sorted(source.glob("*.safetensors")):
        held = load_file(path)
        by_file[path.name] = (len(held), sum(tensor.nbytes for tensor in held.values()))
    found = weightops.inspect(source)
    assert found.by_shard() == by_file
    assert found.by_dtype() == {"float32": 28, "float16": 6}
