"""Grids of integers for groups of weights: how a quantisation is set up, and a group's scales and zero points.

A grid has 2^bits points: `scale * (q - zero)` for q from 0 to maxq. It is laid through the least and the greatest
weight of a group, and through 0, as GPTQ's reference implementation does (Frantar et al., arXiv 2210.17323). The
search shrinks it in 80 steps of 1 % and keeps the one with the least sum of |error|^2.4, for every output.

Scales are what the file will hold, float16 or bfloat16, before any weight is rounded with them: never subnormal in
float16, zero or infinite.
Matrices are transposed, [columns, outputs], so that what belongs to one input column is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightops.errors import UsageError

BITS = (2, 3, 4, 8)
FLOOR = 2.0**-14
"""The least normal float16: kernels flush what is smaller."""
CEILING = 65504.0
"""The greatest float16."""
_CEILING_BF16 = 65280.0
"""The greatest bfloat16 that is not beyond it."""
SHRINK_STEPS = 80
NORM = 2.4
_SEARCH_ELEMENTS = 1 << 18
_BOUND_STEPS = 4


@dataclass(frozen=True)
class Settings:
    """How a linear layer is quantised. `group_size` input columns share a scale and a zero point; -1: all of them.

    `desc_act` takes columns by falling diagonal of the Hessian and groups them as they are taken, so that `g_idx` is
    not trivial. Without it `group_aware` reorders as far as `g_idx` stays trivial: columns inside groups, and groups
    (Gafni et al., arXiv 2505.14638). `static_groups` finds the grids before the first column is rounded; then columns
    can be taken in any order, and `g_idx` is trivial too. `mse` searches for the best clipping. `v1` keeps asymmetric
    zero points from being 0, which the v1 format cannot store unambiguously. `scale_dtype` is the type of scales in
    the file; those of bfloat16 are kept within float16, which then holds them too. `reference_order` takes float32
    scales, and every operation in the order of gptqmodel's `GPTQ` class, for proofs: the same integers, slower.

    Raises UsageError for values outside of what the format or the algorithm knows.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    group_aware: bool = True
    damp_percent: float = 0.01
    mse: bool = True
    v1: bool = True
    block_size: int = 128
    scale_dtype: Literal["float16", "bfloat16"] = "float16"
    reference_order: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"weights cannot have {self.bits} bits", hint="choose 2, 3, 4 or 8")
        if self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"a group cannot have {self.group_size} columns", hint="choose 128, or -1 for one group")
        if not 0 < self.damp_percent < 1:
            raise UsageError(
                f"damping is a share of the mean diagonal between 0 and 1, not {self.damp_percent}",
                hint="0.01 is usual, 0.1 is much",
            )
        if self.block_size < 1:
            raise UsageError(f"a block cannot have {self.block_size} columns", hint="128 is usual")

    @property
    def maxq(self) -> int:
        """The greatest integer."""
        return (1 << self.bits) - 1

    def width(self, columns: int) -> int:
        """How many of a layer's `columns` a group has; raises UsageError if they do not divide into groups."""
        width = columns if self.group_size == -1 else self.group_size
        if columns < 1 or columns % width:
            raise UsageError(
                f"{columns} columns do not divide into groups of {width}",
                hint="choose a group size that divides the number of input features, or -1",
            )
        return width


def find(values: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The scale and the zero point [outputs], as float32, of one group of weights [columns, outputs] in float32."""
    low, high = torch.aminmax(values, dim=0)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    if settings.sym:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = low.masked_fill_(empty, -1), high.masked_fill_(empty, 1)
    if settings.mse:
        return _search(values, low, high, settings)
    return _lay(low, high, settings)


def levels(values: Tensor, scale: Tensor, zero: Tensor, maxq: int, out: Tensor | None = None) -> Tensor:
    """The integers q, 0 to maxq, in float32, whose weights `scale * (q - zero)` are nearest."""
    return torch.div(values, scale, out=out).round_().add_(zero).clamp_(0, maxq)


def stored(scale: Tensor) -> Tensor:
    """Scales as float16 holds them, kept between the least and the greatest normal number."""
    return scale.clamp(FLOOR, CEILING).to(torch.float16)


def spans(start: int, stop: int, unit: int, size: int) -> Iterator[tuple[int, int]]:
    """Pieces of `start` to `stop` of at most `size`: whole units as far as they fit, else parts of one unit."""
    while start < stop:
        rest = unit - start % unit
        step = rest + (size - rest) // unit * unit if size >= rest else size
        yield start, min(stop, start + step)
        start += step


def _lay(low: Tensor, high: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Scales and zero points of grids from `low` (at most 0) to `high` (at least 0); any shape."""
    maxq = settings.maxq
    scale = _as_stored((high - low) / maxq, settings)
    if settings.sym:
        return scale, torch.full_like(scale, (maxq + 1) // 2)
    zero = torch.round(-low / scale)
    if settings.v1:
        none = zero < 1
        scale = torch.where(none, _as_stored(high / (maxq - 1), settings), scale)
        zero.masked_fill_(none, 1)
    return scale, zero.clamp_(0, maxq)


def _as_stored(scale: Tensor, settings: Settings) -> Tensor:
    if settings.reference_order:
        return scale
    if settings.scale_dtype == "bfloat16":
        scale = scale.clamp(FLOOR, _CEILING_BF16).to(torch.bfloat16)
    return stored(scale).float()


def _search(values: Tensor, low: Tensor, high: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    shrink = (1 - torch.arange(SHRINK_STEPS, device=values.device, dtype=torch.float32) / 100)[:, None]
    scales, zeros = _lay(low * shrink, high * shrink, settings)
    best = torch.empty(values.shape[1], dtype=torch.int64, device=values.device)
    width = max(1, _SEARCH_ELEMENTS // len(values))
    for start in range(0, values.shape[1], width):
        piece = slice(start, start + width)
        best[piece] = _best_step(values[:, piece], scales[:, piece], zeros[:, piece], settings.maxq)
    return scales.gather(0, best[None])[0], zeros.gather(0, best[None])[0]


def _best_step(values: Tensor, scales: Tensor, zeros: Tensor, maxq: int) -> Tensor:
    """Which of the grids [steps, outputs] has the least sum of |error|^2.4 over a group [columns, outputs].

    What the outermost weight alone loses to clipping bounds the sum from below. Once it exceeds the least sum so far
    for every output, no narrower grid is tried: at 4 bits 45 of 80 are spared.
    """
    low, high = torch.aminmax(values, dim=0)
    lost = torch.maximum(high - scales * (maxq - zeros), -scales * zeros - low).clamp_(min=0).pow_(NORM)
    bounds = lost.flip(0).cummin(0).values.flip(0)
    exact, rounded = torch.empty_like(values), torch.empty_like(values)
    sums = torch.full_like(scales, torch.inf)
    for step, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        if step % _BOUND_STEPS == 0 and step and bool((bounds[step] > sums[:step].amin(0)).all()):
            break
        # In units of the scale an error is |clamp(round(w / scale), -zero, maxq - zero) - w / scale|.
        torch.mul(values, scale.reciprocal(), out=exact)
        torch.round(exact, out=rounded)
        torch.clamp(rounded, -zero, maxq - zero, out=rounded)
        # e^(2.4 log |x|) takes a fifth of the time of a power.
        rounded.sub_(exact).abs_().log_().mul_(NORM).exp_()
        torch.sum(rounded, 0, out=sums[step]).mul_(scale.pow(NORM))
    return sums.argmin(0)
