"""What a layer is rearranged into, once, when it is loaded for the Triton kernels.

Rows are sorted by group (stable), so that a kernel meets every group once and never reads `g_idx`; the columns of `x`
are permuted likewise (`rows`), once for all layers that share them. Groups are made of *chunks* of 32 rows. Where every
group is a multiple of 32 rows long, chunks follow from the group size; otherwise each group is padded to whole chunks,
and `x` gets zeros there.

Four-bit words are interleaved for the tensor cores. A block of 128 rows of a column is 16 words, side by side in
memory; nibble `j` of word `i` holds row `32 j + 2 i` and nibble `j + 4` the row after it. `(word >> 4 j) & 0x000f000f`
is then two adjacent rows in the halves of one register, and or-ed with the bits of 1024.0 (128.0 in bfloat16) they are
float numbers. Other words, and groups that are no multiple of 32 long, keep the bit stream of the format.

A scale and its zero point share a word, because kernels copy no less than four bytes ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from weightops_kernels import planes, reference
from weightops_kernels.reference import Packed

CHUNK = 32
BLOCK_K = 128
"""Rows that interleaved words hold together; part of the layout, so not a parameter of a kernel."""


@dataclass(frozen=True)
class Repacked:
    """One layer as the Triton kernels read it."""

    words: Tensor
    """int32 `[padded_k / 128, N, 16]` where interleaved, `[padded_k * bits / 32, N]` elsewhere."""
    steps: Tensor
    """int32 `[G, N]`: the bits of the scale in the low half, the true zero point in the high half."""
    rows: Tensor | None
    """int64 `[K or more]`: the column of `x` for each row, K for zeros; None where `x` is taken as it is."""
    chunk_group: Tensor
    """int32 `[chunks]`: the group of each chunk."""
    bits: int
    group_size: int
    """Rows of a group, a multiple of 32; 0 for one group of all rows, -1 where `chunk_group` alone knows."""
    in_features: int
    scale_dtype: torch.dtype = torch.float16
    """float16 or bfloat16."""

    @property
    def out_features(self) -> int:
        """N."""
        return self.steps.shape[1]

    @property
    def scales(self) -> Tensor:
        """`[G, N]` as stored."""
        return (self.steps & 0xFFFF).to(torch.int16).view(self.scale_dtype)

    @property
    def zeros(self) -> Tensor:
        """uint8 `[G, N]`, true zero points."""
        return (self.steps >> 16).to(torch.uint8)

    @property
    def interleaved(self) -> bool:
        """Whether the words are in the layout of the four-bit kernel."""
        return self.bits == 4 and self.group_size >= 0

    @property
    def kernel_rows(self) -> int:
        """Columns of `x` that a kernel reads: K, or more where groups are padded."""
        return self.in_features if self.rows is None else self.rows.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that a multiplication reads besides `x`."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.steps))

    def arrange(self, x: Tensor) -> Tensor:
        """`x [M, K]` with its columns where the kernels expect them, the last dimension contiguous."""
        if self.rows is None:
            return x if x.stride(-1) == 1 else x.contiguous()
        if self.kernel_rows > self.in_features:
            x = F.pad(x, (0, 1))
        return x.index_select(-1, self.rows)


def interleave(q: Tensor) -> Tensor:
    """Four-bit values uint8 `[K, N]`, K a multiple of 128, as interleaved words int32 `[K / 128, N, 16]`."""
    blocks = q.view(-1, 4, 16, 2, q.shape[1]).to(torch.int32)  # block, j, i, half, column
    words = torch.zeros(len(blocks), 16, q.shape[1], dtype=torch.int32, device=q.device)
    for j in range(4):
        words |= blocks[:, j, :, 0] << (4 * j)
        words |= blocks[:, j, :, 1] << (4 * j + 16)
    return words.transpose(1, 2).contiguous()


def deinterleave(words: Tensor) -> Tensor:
    """The values of `interleave`, uint8 `[K, N]`."""
    blocks = words.transpose(1, 2)
    halves = [torch.stack([blocks >> (4 * j), blocks >> (4 * j + 16)], 2) for j in range(4)]  # block, i, half, column
    return (torch.stack(halves, 1) & 15).to(torch.uint8).view(-1, words.shape[1])


def regular_group_size(counts: list[int]) -> int:
    """The rows of every group but the last if that is a multiple of 32; 0 for one group, -1 if groups differ."""
    if len(counts) == 1:
        return 0
    size = planes.group_size(counts)
    return size if size is not None and size % CHUNK == 0 else -1


def repack(layer: Packed) -> Repacked:
    """A layer of the format rearranged for the kernels; the same weights, row by row.

    Raises ValueError for tensors that are not one layer, or a `g_idx` that names a group that is not there.
    """
    reference.check(layer)
    qweight, _, scales, g_idx, bits, _ = layer
    if scales.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"scales must be float16 or bfloat16; found {str(scales.dtype).removeprefix('torch.')}.")
    groups, rows_k = scales.shape[0], g_idx.shape[0]
    lowest, highest = (int(g_idx.min()), int(g_idx.max())) if rows_k else (0, 0)
    if lowest < 0 or highest >= groups:
        raise ValueError(f"g_idx must lie in 0..{groups - 1}; found {lowest}..{highest}.")
    q = reference.integers(qweight, bits, rows_k)
    zeros = layer.zero_points()
    order = torch.argsort(g_idx, stable=True)
    counts = torch.bincount(g_idx.long(), minlength=groups).tolist()
    size = regular_group_size(counts)
    if size >= 0:
        rows = None if torch.equal(order, torch.arange(rows_k, device=order.device)) else order
        chunks = torch.arange(-(-rows_k // CHUNK), device=order.device)
        chunk_group = torch.zeros_like(chunks) if size == 0 else chunks.div_(size // CHUNK, rounding_mode="floor")
    else:
        padding = [torch.full((-n % CHUNK,), rows_k, device=order.device, dtype=order.dtype) for n in counts]
        parts = zip(torch.split(order, counts), padding, strict=True)
        rows = torch.cat([part for pair in parts for part in pair])
        lengths = torch.tensor([-(-n // CHUNK) for n in counts], device=order.device)
        chunk_group = torch.arange(groups, device=order.device).repeat_interleave(lengths)
    if rows is not None:
        q = F.pad(q, (0, 0, 0, 1))[rows]
    interleaved = bits == 4 and size >= 0
    q = F.pad(q, (0, 0, 0, -q.shape[0] % (BLOCK_K if interleaved else CHUNK)))
    return Repacked(
        words=interleave(q) if interleaved else reference.pack(q, bits),
        steps=scales.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF | zeros.to(torch.int32) << 16,
        rows=rows,
        chunk_group=chunk_group.to(torch.int32),
        bits=bits,
        group_size=size,
        in_features=rows_k,
        scale_dtype=scales.dtype,
    )
