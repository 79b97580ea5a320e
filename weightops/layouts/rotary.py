"""Rotary frequencies, which transformers stored with the weights until 2023."""

from __future__ import annotations

import struct

from weightops.lazy import LazyTensor
from weightops.ops.rows import Given
from weightops.spec import DType


def inverse_frequencies(theta: float, head_dim: int, number: int = 0) -> LazyTensor:
    """`inv_freq` of LLaMA, float32 `[head_dim / 2]`, to the bit as torch computes it; `number` is that of `Given`."""
    import torch

    values = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    data = struct.pack(f"<{len(values)}f", *values.tolist())
    return LazyTensor.make(Given(DType.F32, (len(values),), data, number))
