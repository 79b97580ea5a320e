"""A layer arranged for a CPU: few vector operations make weights of it, some megabytes at a time.

The rows of q are sorted by group (stable) and turned, so that the weights of an output lie side by side; the columns of
`x` are permuted likewise (`rows`). Values are folded: a byte of four-bit values holds column `k` and column `k + K / 2`
of an output, one of two-bit values four columns a quarter apart. One shift and one mask of whole planes of bytes
unfold them; three bits are a plane of two and a plane of one. The weight is `scale * (q - zero)`, exact in float32 for
scales of 16 bits, as in `reference`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from weightops_kernels import reference
from weightops_kernels.reference import Packed

_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""The planes that values of so many bits are kept in, lowest bits first."""
_AT_ONCE = 1 << 20
"""Weights that are made at a time, 4 MB of float32. Fewer make torch's threads meet more often than caches are worth,
more are written to pages that the system has to find and clear."""


@dataclass(frozen=True)
class Planes:
    """One layer as the CPU reads it."""

    planes: Tensor
    """uint8 `[N, bytes]`: the folded values, zeros where a byte holds more columns than there are."""
    zeros: Tensor
    """True zero points, `[N, G]`: int8, or int16 for eight bits."""
    scales: Tensor
    """`[N, G]`, as stored."""
    rows: Tensor | None
    """int64 `[K]`: the column of `x` for each column of the weight; None where they are the same."""
    bits: int
    group_size: int
    in_features: int

    @property
    def out_features(self) -> int:
        """N."""
        return self.planes.shape[0]

    def weights(self, parts: Iterable[slice], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weights `[n, K]` of runs of outputs, in the layout's order of columns, each rounded once.

        The first run is the longest. Weights are written over by those that come next.
        """
        groups, size = self.zeros.shape[1], self.group_size
        codes = wide = torch.empty(0)
        for part in parts:
            count = part.stop - part.start
            if not len(codes):
                codes = self.planes.new_empty(count, padded(self.bits, groups * size))
                wide = self.planes.new_empty(count, groups * size, dtype=torch.float32)
            q = unfold(self.planes[part], self.bits, groups * size, codes[:count]).unflatten(1, (groups, size))
            weight = wide[:count].view(count, groups, size)
            if self.bits < 8:
                weight.copy_(q.view(torch.int8).sub_(self.zeros[part, :, None]))
            else:
                weight.copy_(q).sub_(self.zeros[part, :, None])
            # A 16-bit scale times an integer of 9 bits is exact in float32.
            weight.mul_(self.scales[part, :, None].float())
            yield part, weight.flatten(1)[:, : self.in_features].to(dtype)


def _cut(bits: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """For each plane of `bits` the lowest bit that it holds, its width, and its bytes for so many columns."""
    low = 0
    for width in _WIDTHS[bits]:
        yield low, width, -(-columns * width // 8)
        low += width


def padded(bits: int, columns: int) -> int:
    """The columns that the planes of so many have room for: as many as whole bytes hold, or a few more."""
    return max(nbytes * (8 // width) for _, width, nbytes in _cut(bits, columns))


def fold(q: Tensor, bits: int) -> Tensor:
    """Values uint8 `[N, K]` as planes, uint8 `[N, bytes]`; `unfold` is the inverse."""
    planes = []
    for low, width, nbytes in _cut(bits, q.shape[1]):
        count = 8 // width
        values = F.pad((q >> low) & ((1 << width) - 1), (0, count * nbytes - q.shape[1]))
        plane = values[:, :nbytes].clone()
        for i in range(1, count):
            plane |= values[:, i * nbytes : (i + 1) * nbytes] << (i * width)
        planes.append(plane)
    return torch.cat(planes, 1)


def unfold(planes: Tensor, bits: int, columns: int, out: Tensor | None = None) -> Tensor:
    """Values uint8 `[N, columns]` from planes, in the first columns of `out`, which has room for `padded(...)`."""
    if out is None:
        out = planes.new_empty(len(planes), padded(bits, columns))
    start = 0
    for low, width, nbytes in _cut(bits, columns):
        plane, count = planes[:, start : start + nbytes], 8 // width
        start += nbytes
        values = out[:, : count * nbytes] if low == 0 else torch.empty_like(out[:, : count * nbytes])
        for i in range(count):
            piece = values[:, i * nbytes : (i + 1) * nbytes]
            torch.bitwise_right_shift(plane, i * width, out=piece)
            if i < count - 1:
                piece &= (1 << width) - 1
        if low:
            out[:, : count * nbytes] |= values << low
    return out[:, :columns]


def turned(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """The integers of a layer, or of some outputs of it, by output: uint8 `[N, K]`."""
    if bits == 3:
        return reference.integers(qweight, bits, in_features).t()
    # Turned as words, there are fewer to turn; their bytes are in the order of values, lowest bits first.
    data = qweight.t().contiguous().view(torch.uint8)
    values = data.new_empty(*data.shape, 8 // bits)
    for i in range(8 // bits):
        torch.bitwise_and(data >> (i * bits), (1 << bits) - 1, out=values[:, :, i])
    return values.flatten(1)[:, :in_features]


def group_size(counts: list[int]) -> int | None:
    """The columns of every group but the last, which may be shorter; None where groups differ in other ways."""
    size = counts[0]
    return size if all(n == size for n in counts[:-1]) and 0 < counts[-1] <= size else None


def arrange(layer: Packed) -> Planes | None:
    """A layer of the format, the same weights; None where its groups are of unequal lengths.

    Raises ValueError for tensors that are not one layer.
    """
    reference.check(layer)
    qweight, _, scales, g_idx, bits, _ = layer
    k, (groups, n) = g_idx.shape[0], scales.shape
    order = torch.argsort(g_idx, stable=True)
    size = group_size(torch.bincount(g_idx.long(), minlength=groups).tolist())
    if size is None or not k:
        return None
    is_plain = torch.equal(order, torch.arange(k, device=order.device))
    columns = groups * size
    nbytes = sum(nbytes for _, _, nbytes in _cut(bits, columns))
    planes = torch.empty(n, nbytes, dtype=torch.uint8, device=qweight.device)
    for part in runs(n, columns):
        q = turned(qweight[:, part], bits, k)
        planes[part] = fold(F.pad(q if is_plain else q[:, order], (0, columns - k)), bits)
    zeros = layer.zero_points().t()
    return Planes(
        planes=planes,
        zeros=zeros.to(torch.int8 if bits < 8 else torch.int16).contiguous(),
        scales=scales.t().contiguous(),
        rows=None if is_plain else order,
        bits=bits,
        group_size=size,
        in_features=k,
    )


def matmul(x: Tensor, weight: Planes) -> Tensor:
    """`x [M, K]` times the weight, `[M, N]` in the type of `x`.

    bfloat16 multiplies in bfloat16 (the weight rounded to it), float64 in float64, every other type in float32. Beside
    the result it takes some 10 MB, whatever the size of the layer.
    """
    dtype = x.dtype if x.dtype == torch.bfloat16 else torch.promote_types(x.dtype, torch.float32)
    wide = (x if weight.rows is None else x.index_select(-1, weight.rows)).to(dtype)
    y = torch.empty(len(x), weight.out_features, dtype=dtype, device=x.device)
    for part, some in weight.weights(runs(weight.out_features, weight.in_features), dtype):
        y[:, part] = F.linear(wide, some)
    return y.to(x.dtype)


def runs(out_features: int, in_features: int) -> list[slice]:
    """The outputs in runs whose weights are made at once."""
    step = max(1, _AT_ONCE // in_features)
    return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]
