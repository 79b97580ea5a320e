"""`weightops.quantize_blocks`: arrays of every kind, and tensors of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_checkpoint

import weightops
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.spec import DType, TensorSpec

VALUES = np.random.default_rng(4).standard_normal((2, 3, 256), np.float32)


def test_arrays_and_tensors_give_the_same_blocks(tmp_path: Path) -> None:
    importance = np.arange(768).reshape(3, 256).T[:, ::-1].T  # float64 in the end, and of odd strides
    weights = torch.from_numpy(VALUES).transpose(0, 1).contiguous().transpose(0, 1).bfloat16()
    write_checkpoint(tmp_path / "model", {"w": weights.contiguous()})
    stored = weightops.open_checkpoint(tmp_path / "model")["w"]
    found = [
        weightops.quantize_blocks(values, dtype, importance=vector)
        for values, dtype, vector in (
            (stored, "q4_k", importance[0]),
            (weights, DType.Q4_K, torch.from_numpy(importance[0].copy()).double()),
            (weights.float().numpy()[::-1][::-1], "Q4_K", list(importance[0])),
        )
    ]
    assert {tensor.spec for tensor in found} == {TensorSpec(DType.Q4_K, (2, 3, 256))}
    assert len({bytes(tensor.read()) for tensor in found}) == 1
    assert weightops.quantize_blocks(weights, "q4_k").read() != found[0].read()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no type 'q4_k_m'"):
        weightops.quantize_blocks(VALUES, "q4_k_m")
    with pytest.raises(UsageError, match="arrays of object hold no weights"):
        weightops.quantize_blocks(np.array([None]), "q4_k")
    with pytest.raises(IncompatibleInputs, match="cannot quantise float64 to q4_k"):
        weightops.quantize_blocks(VALUES.astype(np.float64), "q4_k")
    with pytest.raises(IncompatibleInputs, match="q5_0 takes rows of a multiple of 32"):
        weightops.quantize_blocks(VALUES[..., :33], "q5_0")
    with pytest.raises(CorruptInput, match="far too large"):
        weightops.quantize_blocks(VALUES * np.float32(np.nan), "q5_0").read()
