"""Methods that are combinations of the models, with coefficients from the angles between them.

All that they ask of whole tensors are sums of products. They are added up in float32 over 1024 elements at a time and
in float64 over those, always the same ones, so that results do not depend on how a tensor is cut. mergekit 0.1.5 adds
up in other orders, so that the last bits may differ from its. What it rounds to the tensors' dtype on the way is
rounded here too: with 16 bits that decides more than the order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from weightops.ops.merging.bits import add
from weightops.ops.merging.inputs import Inputs
from weightops.ops.merging.method import Blockwise

if TYPE_CHECKING:
    import torch

    Blocks = Sequence[torch.Tensor]

_RUN = 1024
CHUNK = 1 << 20
"""Elements that mergekit adds up at once, and tensors of up to as many are merged in its steps."""
_NEARLY_OPPOSITE = -0.9
"""The cosine below which slerp multiplies errors of adding up, so that the result depends on their order."""
_STRAIGHT = 0.9995
"""The cosine from which on slerp goes straight."""


def sums(inputs: Inputs, terms: Callable[[Blocks], Sequence[torch.Tensor]]) -> torch.Tensor:
    """The sum over the whole tensor of each of the terms that `terms` makes of a block, in one pass; float64."""
    import torch

    parts = inputs.over_blocks(lambda blocks, first: torch.stack([total(term, inputs.wide) for term in terms(blocks)]))
    return sum(parts, start=torch.zeros((), dtype=torch.float64))


def total(term: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The sum of a block, float64."""
    import torch

    flat = term.reshape(-1).to(wide)
    whole = flat.numel() // _RUN * _RUN
    return flat[:whole].view(-1, _RUN).sum(dim=1).to(torch.float64).sum() + flat[whole:].sum().to(torch.float64)


def sums_of_rows(term: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The sum of each row of a block, which keeps its dimension; in `wide`.

    A row's sum does not depend on how many rows there are, as torch's norms do.
    """
    return term.to(wide).sum(dim=-1, keepdim=True)


def squares(vectors: Blocks, wide: torch.dtype) -> list[torch.Tensor]:
    """The elements' squares, in a wider type."""
    return [vector.to(wide).square() for vector in vectors]


def _lengths_of_rows(inputs: Inputs, vectors: Blocks) -> list[torch.Tensor]:
    return [sums_of_rows(square, inputs.wide).sqrt().to(inputs.dtype) for square in squares(vectors, inputs.wide)]


def slerp(inputs: Inputs, *, t: float) -> Blockwise:
    """Along the arc from the base (t = 0) to the other model (t = 1); straight where they nearly point one way.

    Shoemake, Animating rotation with quaternion curves, 1985.
    """
    import torch

    assert inputs.base is not None
    base, other, wide = inputs.base, 1 - inputs.base, inputs.wide

    share = torch.tensor(t, dtype=torch.float32).to(wide)
    cosine = _cosine(inputs, base, other)
    if abs(cosine.item()) > _STRAIGHT:
        a, b = 1 - share, share
    else:
        angle = torch.acos(cosine)
        a, b = torch.sin((1 - share) * angle) / torch.sin(angle), torch.sin(share * angle) / torch.sin(angle)
    return lambda blocks, first: a * blocks[base].to(wide) + b * blocks[other].to(wide)


def _cosine(inputs: Inputs, base: int, other: int) -> torch.Tensor:
    """The cosine of the angle between two models, in the wide type.

    In one pass; but of tensors of one piece as mergekit adds it up, and also where its errors decide on the result.
    """
    import torch

    wide = inputs.wide
    if inputs.numel <= CHUNK:
        return _cosine_as_added_up(inputs, base, other)

    def terms(blocks: Blocks) -> list[torch.Tensor]:
        x, y = blocks[base].to(wide), blocks[other].to(wide)
        return [x * x, y * y, x * y]

    xx, yy, xy = sums(inputs, terms).tolist()
    norms = [math.sqrt(square) if square > 1e-16 else 1.0 for square in (xx, yy)]
    cosine = torch.tensor(xy / norms[0] / norms[1], dtype=wide).clamp(-1, 1)
    if -_STRAIGHT <= cosine.item() < _NEARLY_OPPOSITE:
        return _cosine_as_added_up(inputs, base, other)
    return cosine


def _cosine_as_added_up(inputs: Inputs, base: int, other: int) -> torch.Tensor:
    """The same with mergekit's own errors of adding up: norms first, then products of what was divided by them."""
    import torch

    wide = inputs.wide

    def pair(blocks: Blocks) -> list[torch.Tensor]:
        return [blocks[i].to(wide).reshape(1, -1) for i in (base, other)]

    def lengths(blocks: Blocks, first: int) -> torch.Tensor:
        return torch.stack([torch.linalg.vector_norm(vector, dim=1, keepdim=True) for vector in pair(blocks)])

    parts = torch.stack(list(inputs.run(lengths, 0, inputs.numel, step=CHUNK)))
    norms = torch.linalg.vector_norm(parts, dim=0)
    norms = torch.where(norms > 1e-8, norms, 1)

    def dot(blocks: Blocks, first: int) -> torch.Tensor:
        x, y = pair(blocks)
        return ((x / norms[0]) * (y / norms[1])).sum(dim=1, keepdim=True)

    return torch.stack(list(inputs.run(dot, 0, inputs.numel, step=CHUNK))).sum(dim=0).clamp(-1, 1).reshape(())


def nuslerp(
    inputs: Inputs, *, weight: Sequence[float], nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Blockwise:
    """Slerp of two models, or of what they changed of a base, with the share that their weights say.

    Over the whole tensor; with `nuslerp_flatten=False` over each row, and with `nuslerp_row_wise` besides over each
    column (the names are mergekit's). Computed in the tensors' dtype, so that 16-bit cosines near 1 are 1.
    """
    import torch

    weights = inputs.of_others(weight)
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    dtype, base = inputs.dtype, inputs.base
    axis = "rows" if not nuslerp_row_wise else "columns"
    cosine_of = _CosineOf(inputs, "all" if nuslerp_flatten or len(inputs.spec.shape) < 2 else axis)

    def compute(blocks: Blocks, first: int) -> torch.Tensor:
        x, y = pair = inputs.changes(blocks)
        cosine = cosine_of(pair, first).to(dtype).clamp(-1, 1)
        straight = (1 - cosine.square()) <= 1e-16
        angle = torch.acos(torch.where(straight, 0, cosine))
        result = (1 - t) * x + t * y
        if not straight.all():
            a, b = torch.sin((1 - t) * angle), torch.sin(t * angle)
            result = torch.where(straight, result, (a * x + b * y) / torch.sin(angle))
        return result if base is None else blocks[base] + result

    return compute


class _CosineOf:
    """The cosine between two changes, of whole tensors, of each row, or of each column (along the first dimension)."""

    def __init__(self, inputs: Inputs, axis: str) -> None:
        import torch

        self._inputs, self._axis = inputs, axis
        if axis != "rows":
            self._norms = self._whole(lambda pair, first: squares(pair, inputs.wide)).sqrt().to(inputs.dtype)
            self._cosines = self._whole(lambda pair, first: [torch.mul(*self._units(pair, first))])[0]

    def __call__(self, pair: Blocks, first: int) -> torch.Tensor:
        if self._axis == "all":
            return self._cosines
        if self._axis == "columns":
            return self._cosines[self._places(first, len(pair[0]))]
        x, y = self._units(pair, first)
        return sums_of_rows(x * y, self._inputs.wide)

    def _units(self, pair: Blocks, first: int) -> list[torch.Tensor]:
        if self._axis == "rows":
            norms = _lengths_of_rows(self._inputs, pair)
        elif self._axis == "columns":
            norms = list(self._norms[:, self._places(first, len(pair[0]))])
        else:
            norms = list(self._norms)
        return [vector / norm.clamp(min=1e-7) for vector, norm in zip(pair, norms, strict=True)]

    def _whole(self, terms: Callable[[Blocks, int], Sequence[torch.Tensor]]) -> torch.Tensor:
        """Sums of terms over the whole tensor, `[terms]`, or over the first dimension, `[terms, rows, columns]`."""
        import torch

        changes = self._inputs.changes
        if self._axis == "all":
            return sums(self._inputs, lambda blocks: terms(changes(blocks), 0))

        def add(blocks: Blocks, first: int) -> torch.Tensor:
            found = [term.to(self._inputs.wide) for term in terms(changes(blocks), first)]
            part = torch.zeros(len(found), self._height, self._inputs.columns, dtype=torch.float64)
            return part.index_add_(1, self._places(first, len(blocks[0])), torch.stack(found).to(torch.float64))

        return sum(self._inputs.over_blocks(add), start=torch.zeros((), dtype=torch.float64))

    @property
    def _height(self) -> int:
        """The rows that are one after the other before the first dimension goes on."""
        return self._inputs.numel // self._inputs.spec.shape[0] // self._inputs.columns

    def _places(self, first: int, count: int) -> torch.Tensor:
        import torch

        return (first // self._inputs.columns + torch.arange(count)) % self._height


def model_stock(inputs: Inputs, *, filter_wise: bool = False) -> Blockwise:
    """Between the base and the mean of the models, by the angles between what they changed (arXiv 2403.19522).

    Over the whole tensor, or with `filter_wise` over each row.
    """
    import torch

    assert inputs.base is not None
    base, dtype, n = inputs.base, inputs.dtype, len(inputs.others)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]

    def share(norms: Sequence[torch.Tensor], dots: Sequence[torch.Tensor]) -> torch.Tensor:
        sizes = [(norms[i] * norms[j]).clamp(min=1e-6) for i, j in pairs]
        cosines = [(dot / size).clamp(-1, 1) for dot, size in zip(dots, sizes, strict=True)]
        cosine = (add([cosine.to(inputs.wide) for cosine in cosines]) / len(cosines)).to(dtype)
        divisor = 1 + (n - 1) * cosine
        is_flat = divisor.abs() < 1e-6
        return torch.where(is_flat, 0, n * cosine / torch.where(is_flat, 1, divisor))

    def terms(blocks: Blocks) -> list[torch.Tensor]:
        changes = inputs.changes(blocks)
        return [*squares(changes, inputs.wide), *(changes[i] * changes[j] for i, j in pairs)]

    def of_rows(changes: Blocks) -> torch.Tensor:
        dots = [sums_of_rows(changes[i] * changes[j], inputs.wide).to(dtype) for i, j in pairs]
        return share(_lengths_of_rows(inputs, changes), dots)

    whole = None
    if not filter_wise:
        found = sums(inputs, terms)
        whole = share(list(found[:n].sqrt().to(dtype)), list(found[n:].to(dtype)))

    def compute(blocks: Blocks, first: int) -> torch.Tensor:
        t = of_rows(inputs.changes(blocks)) if whole is None else whole
        others = sum(inputs.of_others(blocks), start=torch.zeros((), dtype=dtype))
        return t * (others / n) + (1 - t) * blocks[base]

    return compute
