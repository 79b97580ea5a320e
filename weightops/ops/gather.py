"""Rows of matrices put together: each row is one of some matrix, zeros, or the mean of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import as_torch
from weightops.ops.wide import narrowed, widened
from weightops.spec import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

ZEROS = -1
"""Stands for the matrix of a row that is zeros."""
_SUMS = -2


class Gather(Op, frozen=True):
    """A matrix whose rows are rows of its inputs: `places` are pairs of an input and a row, as int32, little-endian.

    Inputs are matrices `[rows, columns]` of one type and width. An input of `ZEROS` is a row of zeros.
    """

    places: bytes

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(inputs[0].dtype, (len(self.places) // 8, *_columns(inputs)))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        row = tensor.spec.row_nbytes
        first, count = start // row, len(out) // row
        for begin, stop in _runs(self._pairs[first : first + count]):
            source, place = (int(n) for n in self._pairs[first + begin])
            part = out[begin * row : stop * row]
            if source == ZEROS:
                part[:] = bytes(len(part))
            else:
                read(tensor.inputs[source], place * row, part)

    @property
    def _pairs(self) -> NDArray[Any]:
        import numpy as np

        return np.frombuffer(self.places, "<i4").reshape(-1, 2)


class MeanOfRows(Op, frozen=True):
    """Rows that are means of rows of its inputs, added up in their order, in their type; then divided by their number.

    `places` has pairs as in `Gather`, `counts` says how many of them each row is made of, as int32.
    """

    places: bytes
    counts: bytes

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(inputs[0].dtype, (len(self.counts) // 4, *_columns(inputs)))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        row, dtype = tensor.spec.row_nbytes, tensor.spec.dtype
        pairs, counts = np.frombuffer(self.places, "<i4").reshape(-1, 2), np.frombuffer(self.counts, "<i4")
        ends = counts.cumsum()
        for number in range(start // row, (start + len(out)) // row):
            part = out[number * row - start : (number + 1) * row - start]
            part[:] = bytes(row)
            total = as_torch(part, dtype)
            with read.scratch(row) as buffer:
                for source, place in pairs[ends[number] - counts[number] : ends[number]]:
                    read(tensor.inputs[int(source)], int(place) * row, buffer)
                    total.add_(as_torch(buffer, dtype))
            total.div_(int(counts[number]))


class Combine(Op, frozen=True):
    """A matrix whose rows are weighted sums of rows of its inputs, added up in float64 and rounded once.

    Row `i` is made of the next `counts[i]` of the `places`, pairs of an input and a row as int32, each with its weight
    as float64, all little-endian. What is made of one row is that row, to the bit; what is made of none is zeros.
    Inputs are matrices `[rows, columns]` of one type and width, of float64, float32, bfloat16 or float16.
    """

    places: bytes
    counts: bytes
    weights: bytes

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(inputs[0].dtype, (len(self.counts) // 4, *_columns(inputs)))

    def grain(self, tensor: LazyTensor) -> int:
        row = max(1, tensor.spec.row_nbytes)
        return row * math.lcm(*(max(1, each.grain // row) for each in tensor.inputs))

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        row = tensor.spec.row_nbytes
        first, count = start // row, len(out) // row
        counts = np.frombuffer(self.counts, "<i4")
        begins = counts.cumsum() - counts
        counts, begins = counts[first : first + count], begins[first : first + count]
        places = np.frombuffer(self.places, "<i4").reshape(-1, 2)
        pairs = np.empty((count, 2), "<i4")
        pairs[:, 0], pairs[:, 1] = np.where(counts == 0, ZEROS, _SUMS), np.arange(count)
        single = counts == 1
        pairs[single] = places[begins[single]]
        for begin, stop in _runs(pairs):
            source, place = (int(n) for n in pairs[begin])
            part = out[begin * row : stop * row]
            if source == ZEROS:
                part[:] = bytes(len(part))
            elif source != _SUMS:
                read(tensor.inputs[source], place * row, part)
            for i in range(begin, stop) if source == _SUMS else ():
                terms = slice(begins[i], begins[i] + counts[i])
                self._sum(tensor, places[terms], terms, out[i * row : (i + 1) * row], read)

    def _sum(self, tensor: LazyTensor, places: NDArray[Any], terms: slice, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        weights, dtype = np.frombuffer(self.weights, "<f8")[terms], tensor.spec.dtype
        total = np.zeros(tensor.spec.numel // tensor.spec.shape[0])
        with read.scratch(len(out)) as buffer:
            for (source, place), weight in zip(places, weights, strict=True):
                read(tensor.inputs[int(source)], int(place) * len(out), buffer)
                total += weight * widened(buffer, dtype)
        narrowed(out, dtype, total)


def combined(
    inputs: Sequence[LazyTensor], places: NDArray[Any], counts: NDArray[Any], weights: NDArray[Any]
) -> LazyTensor:
    """The rows that `Combine` makes, of arrays."""
    data = places.astype("<i4").tobytes(), counts.astype("<i4").tobytes(), weights.astype("<f8").tobytes()
    return LazyTensor.make(Combine(*data), *inputs)


def _columns(inputs: tuple[TensorSpec, ...]) -> tuple[int, ...]:
    first = inputs[0]
    odd = next((spec for spec in inputs if (spec.dtype, spec.shape[1:]) != (first.dtype, first.shape[1:])), None)
    if odd is not None or not math.prod(first.shape[1:]):
        raise IncompatibleInputs(f"cannot put rows of {first} and {odd or 'no columns'} into one matrix")
    return first.shape[1:]


def _runs(pairs: NDArray[Any]) -> list[tuple[int, int]]:
    """From where to where rows lie one after another in one input."""
    import numpy as np

    steps = np.diff(pairs, axis=0)
    follows = (steps[:, 0] == 0) & ((steps[:, 1] == 1) | (pairs[1:, 0] == ZEROS))
    begins = [0, *(np.flatnonzero(~follows) + 1).tolist()] if len(pairs) else []
    return list(zip(begins, [*begins[1:], len(pairs)], strict=True))
