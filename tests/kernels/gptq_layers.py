"""Random layers in the GPTQ format, with the integers they were made of, and their product in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from weightops_kernels import reference
from weightops_kernels.reference import Packed


@dataclass(frozen=True)
class Layer:
    q: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int
    checkpoint_format: str

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stored = self.zeros
        if self.checkpoint_format == "gptq":
            stored = (stored.int() - 1 & (1 << self.bits) - 1).to(torch.uint8)
        qzeros = reference.pack(stored.t().contiguous(), self.bits).t().contiguous()
        return reference.pack(self.q, self.bits), qzeros, self.scales, self.g_idx

    @property
    def packed(self) -> Packed:
        return Packed(*self.tensors, self.bits, self.checkpoint_format)

    def weight(self) -> Tensor:
        """float64 `[K, N]`, from the integers and no code under test."""
        index = self.g_idx.long()
        return self.scales.double()[index] * (self.q.double() - self.zeros.double()[index])


def random_layer(
    k: int,
    n: int,
    group_size: int = 128,
    bits: int = 4,
    act_order: bool = False,
    checkpoint_format: str = "gptq",
    seed: int = 0,
) -> Layer:
    """Integers and zero points over their whole range, 0 and the largest included; `g_idx` shuffled with act_order."""
    made = torch.Generator().manual_seed(seed)
    g_idx = reference.trivial_g_idx(k, group_size)
    groups = int(g_idx.max()) + 1
    top = (1 << bits) - 1
    zeros = torch.randint(0, top + 1, (groups, n), generator=made, dtype=torch.uint8)
    zeros[:, 0], zeros[:, -1] = 0, top
    return Layer(
        q=torch.randint(0, top + 1, (k, n), generator=made, dtype=torch.uint8),
        zeros=zeros,
        scales=(torch.rand(groups, n, generator=made) * 0.02 + 0.001).half(),
        g_idx=g_idx[torch.randperm(k, generator=made)] if act_order else g_idx,
        bits=bits,
        checkpoint_format=checkpoint_format,
    )


def random_x(m: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).half()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest error over the largest value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())
