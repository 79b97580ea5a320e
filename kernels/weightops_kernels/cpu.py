"""Multiplication on the CPU: dequantise a layer and multiply, or torch's four-bit operator for bfloat16.

torch's operator keeps the weight at four bits and is faster than dequantising first up to some 64 rows, and not much
slower beyond; it takes bfloat16 seriously only (its other types are scalar code), groups of 32, 64, 128 or 256 and no
`g_idx`, so rows are sorted by group first. `planes` is the way to dequantise that prepared layers take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from weightops_kernels import reference
from weightops_kernels.planes import turned
from weightops_kernels.reference import Packed

INT4_GROUPS = (32, 64, 128, 256)
INT4_MAX_ROWS = 256
"""Rows of `x` up to which the four-bit operator is the faster form, or not much slower."""
_INT4_BLOCK = 512
"""Outputs that are rearranged at a time, a multiple of those that the operator keeps together."""


@dataclass(frozen=True)
class Int4:
    """A layer as torch's four-bit operator reads it."""

    packed: Tensor
    """uint8 `[N, K / 2]`, torch's own layout."""
    scales_and_zeros: Tensor
    """bfloat16 `[G, N, 2]`; the second is `(8 - zero) * scale`."""
    rows: Tensor | None
    """int64 `[K]`: the column of `x` for each row."""
    group_size: int


def why_not_int4(layer: Packed) -> str | None:
    """None if torch's four-bit operator can hold the layer, else the reason."""
    _, _, scales, g_idx, bits, _ = layer
    groups, n = scales.shape
    k = g_idx.shape[0]
    counts = torch.bincount(g_idx.long(), minlength=groups)
    if bits != 4:
        return f"it has {bits} bits"
    if n % 16:
        return f"{n} outputs are no multiple of 16"
    if int(counts.min()) != int(counts.max()) or k // groups not in INT4_GROUPS:
        return f"groups must all have one of {INT4_GROUPS} rows; found {int(counts.min())} to {int(counts.max())}"
    return None


def prepare_int4(layer: Packed) -> Int4:
    """A layer in torch's four-bit layout. Raises ValueError where the operator cannot hold it."""
    reference.check(layer)
    qweight, _, scales, g_idx, bits, _ = layer
    if reason := why_not_int4(layer):
        raise ValueError(f"torch's four-bit operator cannot hold this layer: {reason}.")
    k, (groups, n) = g_idx.shape[0], scales.shape
    order = torch.argsort(g_idx, stable=True)
    is_plain = torch.equal(order, torch.arange(k))
    zeros = layer.zero_points()
    scale = scales.float()
    pairs = torch.stack([scale, (8.0 - zeros.float()) * scale], -1).to(torch.bfloat16)
    packed = torch.empty(n, k // 2, dtype=torch.uint8)
    for start in range(0, n, _INT4_BLOCK):
        q = turned(qweight[:, start : start + _INT4_BLOCK], bits, k)
        q = (q if is_plain else q[:, order]).to(torch.int32)
        some = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.contiguous(), 2)
        packed[start : start + _INT4_BLOCK] = some
    return Int4(packed, pairs, None if is_plain else order, k // groups)


def has_fast_int4() -> bool:
    """Whether torch's four-bit operator is more than scalar code on this machine, as far as we have measured."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def matmul_int4(x: Tensor, weight: Int4) -> Tensor:
    """`x [M, K]` bfloat16 times the weight, `[M, N]`; relative error about 2.4e-3, that of bfloat16."""
    if weight.rows is not None:
        x = x.index_select(-1, weight.rows)
    result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), weight.packed, weight.group_size, weight.scales_and_zeros
    )
    return result


def matmul(x: Tensor, layer: Packed) -> Tensor:
    """`x [..., K]` times the weight, dequantised for this call: `[..., N]` in the type of `x`.

    bfloat16 multiplies in bfloat16 (the weight rounded to it), every other type as the reference.
    """
    if x.dtype != torch.bfloat16:
        return reference.matmul(x, layer)
    return F.linear(x, reference.dequantize(layer, torch.bfloat16))
