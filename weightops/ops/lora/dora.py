"""DoRA: rows scaled to learned norms, `m / ||W + D|| * (W + D)`, as peft merges them and to the bit.

Source: `variants.DoraLinearVariant` and `DoraEmbeddingVariant` of peft 0.21. The norm is that of the unmerged weight
with the change of this adapter alone. Where others were merged before, peft takes them off for it and merges them
again, and what that rounds is part of the result. In float64 nothing is taken off: the norm is that of the weight as it
was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from weightops.lazy import LazyTensor
from weightops.ops.libtorch import as_torch
from weightops.ops.lora.factors import Lora, Precision
from weightops.ops.lora.product import Part, Work, memory_of, split_inputs, to_narrower, to_wider
from weightops.spec import DType

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Step = tuple[Literal["merge", "unmerge", "note"], int]


class Dora(Lora, frozen=True):
    """`Lora`, with parts that have magnitudes; all of them transposed, or none.

    Norms of the rows of a transposed weight are norms of columns, so such a tensor is computed in one piece.
    """

    @property
    def is_whole(self) -> bool:
        return any(part.is_transposed for part in self.parts)

    def merge_rows(self, work: Work, row: int, products: Sequence[NDArray[Any]], out: memoryview) -> None:
        import numpy as np

        own = slice(None) if self.is_whole else slice(row, row + len(products[0]))
        vectors = iter(work.vectors)
        magnitudes = {i: next(vectors)[own] for i, part in enumerate(self.parts) if part.has_magnitude}
        changes = [work.change(i, p, np.empty(p.shape, p.dtype)) for i, p in enumerate(products)]
        dtype = work.tensor.spec.dtype
        if self.wide is DType.F64:
            self._merge_exactly(changes, magnitudes, out, dtype)
        else:
            weight = as_torch(out, dtype).reshape(changes[0].shape)
            _Merging(self.parts, weight, changes, magnitudes).run()

    def _merge_exactly(
        self, changes: Sequence[NDArray[Any]], magnitudes: Mapping[int, NDArray[Any]], out: memoryview, dtype: DType
    ) -> None:
        """In float64, with sums in an order of our own."""
        import numpy as np

        base = np.empty(changes[0].shape)
        to_wider(memory_of(base), DType.F64, out, dtype)
        total = base.copy()
        for i, part in enumerate(self.parts):
            total += changes[i]
            if i in magnitudes:
                axis = 0 if part.is_transposed else 1
                norms = np.sqrt(sum_in_order((base + changes[i]) ** 2, axis))
                total *= np.expand_dims(magnitudes[i] / norms, axis)
        to_narrower(out, dtype, memory_of(total), DType.F64)


def steps(parts: Sequence[Part]) -> list[Step]:
    """What peft does to merge these parts into one weight; at `note` the weight is unmerged, for the norms to come."""
    found: list[Step] = []
    for i, part in enumerate(parts):
        if part.has_magnitude:
            found += [("unmerge", j) for j in reversed(range(i))]
            found.append(("note", i))
            found += [("merge", j) for j in range(i)]
        found.append(("merge", i))
    return found


class _Merging:
    """peft's own arithmetic on a weight, or on some of its rows."""

    def __init__(
        self,
        parts: Sequence[Part],
        weight: torch.Tensor,
        changes: Sequence[NDArray[Any]],
        magnitudes: Mapping[int, NDArray[Any]],
    ) -> None:
        import torch

        self._parts, self._weight, self._base = parts, weight, weight
        self._changes = [torch.from_numpy(change) for change in changes]
        self._magnitudes = {i: torch.from_numpy(vector) for i, vector in magnitudes.items()}
        self._factors: dict[int, torch.Tensor] = {}

    def run(self) -> None:
        """Merge all parts, in place."""
        for name, i in steps(self._parts):
            if name == "note":
                self._base = self._weight.clone()
            elif name == "merge":
                self._merge(i)
            else:
                self._unmerge(i)

    def _merge(self, i: int) -> None:
        part, weight, change = self._parts[i], self._weight, self._changes[i]
        if not part.has_magnitude:
            weight += change.to(weight.dtype) if part.rounds_change else change
            return
        import torch

        base = self._base.T + change.T if part.is_transposed else self._base + change
        factor = self._magnitudes[i] / torch.linalg.norm(base, dim=1)
        self._factors[i] = factor.view(1, -1) if part.is_transposed else factor.view(-1, 1)
        weight.copy_(self._factors[i] * (weight + change))

    def _unmerge(self, i: int) -> None:
        weight, change = self._weight, self._changes[i]
        if self._parts[i].has_magnitude:
            weight.copy_(weight / self._factors[i] - change)
        else:
            weight -= change.to(weight.dtype)


def sum_in_order(values: NDArray[Any], axis: int) -> NDArray[Any]:
    """Sums along `axis`, the second half added to the first until one is left: an order that no library changes."""
    import numpy as np

    values = np.moveaxis(values, axis, 0)
    while len(values) > 1:
        half = (len(values) + 1) // 2
        values[: len(values) - half] += values[half:]
        values = values[:half]
    total: NDArray[Any] = values[0]
    return total


def merge(weight: LazyTensor, parts: Sequence[Part], inputs: Sequence[LazyTensor], precision: Precision) -> LazyTensor:
    """`weight` with the parts merged into it, each of which has its factors, and magnitude, among `inputs`.

    Raises `IncompatibleInputs` where shapes do not fit or dtypes cannot be computed with.
    """
    kind = Dora if any(part.has_magnitude for part in parts) else Lora
    op = kind(tuple(parts), precision)
    LazyTensor.make(op, weight, *inputs)  # which checks that they fit
    pairs = zip(parts, split_inputs(parts, inputs), strict=True)
    held = sum(p.held_nbytes(weight.spec, a.spec, b.spec, op.wide, op.is_whole) for p, (a, b, *_) in pairs)
    if kind is Dora:
        held += op.is_whole * 6 * op.wide.itemsize * weight.spec.numel
    return LazyTensor.make(kind(tuple(parts), precision, held), weight, *inputs)
