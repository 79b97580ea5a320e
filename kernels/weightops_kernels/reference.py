"""The GPTQ format defined by torch arithmetic, on any device.

A linear layer of K inputs and N outputs, quantised to `bits` in G groups, is `qweight` int32 `[K * bits / 32, N]`
(packed along K), `qzeros` int32 `[G, N * bits / 32]` (packed along N), `scales` `[G, N]` and `g_idx` int32 `[K]`.
Values are packed as one stream of bits, lowest first, through the words of a column (a row for `qzeros`); three-bit
values may lie across two words. Version 1 (`gptq`) stores `zero - 1` modulo `2 ** bits` in `qzeros`, version 2
(`gptq_v2`) stores `zero`. The weight is `w[n, k] = scales[g_idx[k], n] * (q[k, n] - zeros[g_idx[k], n])`.

Formats: AutoGPTQ 0.7.1 (`gptq`), GPTQModel (`gptq_v2`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
PERIOD = 32
"""Values after which the bit stream stands at the start of a word again: 32 values fill `bits` words."""
CACHED_ROWS = 512
"""Rows that are dequantised at a time on a CPU, a multiple of 32: few enough for its caches."""


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` values, uint8 `[count, N]`, of bit streams down the columns of `words`, int32 `[R, N]`."""
    need = -(-count * bits // 32)
    if words.shape[0] != need:
        raise ValueError(f"{count} values of {bits} bits fill {need} words; found {words.shape[0]}.")
    full = F.pad(words, (0, 0, 0, -need % bits)).view(-1, bits, words.shape[1])
    return _expand(full, bits).to(torch.uint8).view(-1, words.shape[1])[:count]


def _expand(words: Tensor, bits: int) -> Tensor:
    """int32 `[R, bits, N]`, whole periods of the streams, as int32 values, 32 rows of N for each period."""
    mask = (1 << bits) - 1
    if PERIOD % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        return (words.reshape(-1, 1, words.shape[2]) >> shifts[:, None]).bitwise_and_(mask)
    values = words.new_empty(len(words), PERIOD, words.shape[2])
    for i in range(PERIOD):
        word, shift = divmod(i * bits, 32)
        value = words[:, word] >> shift
        if (held := 32 - shift) < bits:  # the shift is arithmetic: copies of the sign bit are masked before joining
            value = (value & ((1 << held) - 1)) | (words[:, word + 1] << held)
        values[:, i] = value & mask
    return values


def pack(values: Tensor, bits: int) -> Tensor:
    """int32 words `[ceil(count * bits / 32), N]` that `unpack` turns into `values`, uint8 `[count, N]`."""
    count, columns = values.shape
    full = F.pad(values, (0, 0, 0, -count % PERIOD)).view(-1, PERIOD, columns)
    words = torch.zeros(len(full), bits, columns, dtype=torch.int32, device=values.device)
    for i in range(PERIOD):
        word, shift = divmod(i * bits, 32)
        value = full[:, i].to(torch.int32)
        words[:, word] |= value << shift
        if (held := 32 - shift) < bits:
            words[:, word + 1] |= value >> held
    return words.view(-1, columns)[: -(-count * bits // 32)].contiguous()


class Packed(NamedTuple):
    """The tensors of a layer as files have them, see above; `checkpoint_format` says how zero points are stored."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int = 4
    checkpoint_format: str = "gptq"

    @property
    def in_features(self) -> int:
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        moved = (tensor.to(device) for tensor in self[:4])
        return Packed(*moved, self.bits, self.checkpoint_format)

    def zero_points(self) -> Tensor:
        """True zero points, uint8 `[G, N]`."""
        return zero_points(self.qzeros, self.bits, self.out_features, self.checkpoint_format)


def check(layer: Packed) -> None:
    """Raise ValueError unless the tensors are one layer of the format."""
    qweight, qzeros, scales, g_idx, bits, checkpoint_format = layer
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}; found {bits}.")
    if checkpoint_format not in FORMATS:
        raise ValueError(f"checkpoint_format must be one of {FORMATS}; found {checkpoint_format!r}.")
    if scales.ndim != 2 or g_idx.ndim != 1:
        raise ValueError(f"scales must be [G, N] and g_idx [K]; found {list(scales.shape)} and {list(g_idx.shape)}.")
    (groups, columns), rows = scales.shape, g_idx.shape[0]
    expected = {
        "qweight": (qweight, [-(-rows * bits // 32), columns]),
        "qzeros": (qzeros, [groups, -(-columns * bits // 32)]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name} must be int32 {shape} for {rows} inputs, {columns} outputs, {groups} groups and {bits} bits; "
                f"found {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}."
            )


def integers(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """`q`, uint8 `[K, N]`."""
    return unpack(qweight, bits, in_features)


def zero_points(qzeros: Tensor, bits: int, out_features: int, checkpoint_format: str = "gptq") -> Tensor:
    """True zero points, uint8 `[G, N]`."""
    stored = unpack(qzeros.t().contiguous(), bits, out_features).t().contiguous()
    return stored if checkpoint_format == "gptq_v2" else (stored + 1) & ((1 << bits) - 1)


def dequantize(layer: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight, `[N, K]`: exact in float32 and float64, rounded once in other types.

    Raises ValueError for tensors that are not one layer of the format. A value of g_idx outside the groups is an
    IndexError on CPU.
    """
    check(layer)
    qweight, _, scales, g_idx, bits, _ = layer
    rows, columns = layer.in_features, layer.out_features
    zeros = layer.zero_points().to(torch.float32)
    scale, index = scales.float(), g_idx.long()
    weight = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    step = CACHED_ROWS if qweight.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        words = qweight[start * bits // 32 : -(-part.stop * bits // 32)]
        q = unpack(words, bits, part.stop - start).to(torch.float32)
        # A 16-bit scale times an integer of 9 bits is exact in float32.
        weight[part] = q.sub_(zeros[index[part]]).mul_(scale[index[part]])
    return weight.t()


def matmul(x: Tensor, layer: Packed) -> Tensor:
    """`x [..., K]` times the weight, `[..., N]` in the type of `x`, computed in float32 (in float64 where `x` is)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize(layer, wide)
    return F.linear(x.to(wide), weight).to(x.dtype)


def trivial_g_idx(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """The groups of columns in order, int32 `[K]`; a `group_size` of -1 is one group."""
    size = in_features if group_size == -1 else group_size
    return torch.arange(in_features, device=device).div_(size, rounding_mode="floor").to(torch.int32)
