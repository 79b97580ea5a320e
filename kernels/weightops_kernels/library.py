"""The engines as torch operators `weightops_kernels::*`, so that torch.compile sees one node and knows its shape.

They are for inference: none has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightops_kernels import cpu, launch, planes, reference
from weightops_kernels.layout import Repacked
from weightops_kernels.planes import Planes
from weightops_kernels.reference import Packed


@torch.library.custom_op("weightops_kernels::dequantize_matmul", mutates_args=())
def dequantize_matmul(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, checkpoint_format: str
) -> Tensor:
    """`cpu.matmul` for `x [M, K]`: the tensors of the format, dequantised for this call. Any device."""
    return cpu.matmul(x, Packed(qweight, qzeros, scales, g_idx, bits, checkpoint_format))


dequantize_matmul.register_fake(lambda x, qweight, qzeros, scales, *_: x.new_empty(x.shape[0], scales.shape[1]))


@torch.library.custom_op("weightops_kernels::reference_matmul", mutates_args=())
def reference_matmul(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, checkpoint_format: str
) -> Tensor:
    """`reference.matmul` for `x [M, K]`."""
    return reference.matmul(x, Packed(qweight, qzeros, scales, g_idx, bits, checkpoint_format))


reference_matmul.register_fake(lambda x, qweight, qzeros, scales, *_: x.new_empty(x.shape[0], scales.shape[1]))


@torch.library.custom_op("weightops_kernels::planes_matmul", mutates_args=())
def planes_matmul(
    x: Tensor,
    folded: Tensor,
    zeros: Tensor,
    scales: Tensor,
    rows: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """`planes.matmul` for `x [M, K]`; the tensors are those of `planes.Planes`."""
    return planes.matmul(x, Planes(folded, zeros, scales, rows, bits, group_size, in_features))


planes_matmul.register_fake(lambda x, folded, *_: x.new_empty(x.shape[0], folded.shape[0]))


@torch.library.custom_op("weightops_kernels::int4_matmul", mutates_args=())
def int4_matmul(x: Tensor, packed: Tensor, scales_and_zeros: Tensor, rows: Tensor | None, group_size: int) -> Tensor:
    """`cpu.matmul_int4` for `x [M, K]` bfloat16."""
    return cpu.matmul_int4(x, cpu.Int4(packed, scales_and_zeros, rows, group_size))


int4_matmul.register_fake(lambda x, packed, scales_and_zeros, *_: x.new_empty(x.shape[0], scales_and_zeros.shape[1]))


@torch.library.custom_op("weightops_kernels::triton_matmul", mutates_args=())
def triton_matmul(
    x: Tensor,
    words: Tensor,
    steps: Tensor,
    rows: Tensor | None,
    chunk_group: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    scale_dtype: torch.dtype,
    deterministic: bool,
) -> Tensor:
    """`launch.matmul` for `x [M, K]`; the tensors are those of `layout.Repacked`."""
    weight = Repacked(words, steps, rows, chunk_group, bits, group_size, in_features, scale_dtype)
    return launch.matmul(x, weight, deterministic=deterministic)


triton_matmul.register_fake(lambda x, words, steps, *_: x.new_empty(x.shape[0], steps.shape[1]))
