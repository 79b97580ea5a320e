"""Rows of one model approximated by rows of another: orthogonal matching pursuit over the rows that both have.

A row of the donor that the model lacks is approximated by `k` of the donor's common rows, chosen one by one: that with
the largest inner product with what is still missing, and then least squares over all that are chosen. The same
combination of the model's common rows is the new row (Pati and others, 1993; mergekit-tokensurgeon 0.1.5).

Common rows are not held: each of the `k` choices is one pass over the donor's matrix, for a group of rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.wide import narrowed, widened
from weightops.spec import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GROUP = 256
"""Rows that are computed together, always the same ones: which row is chosen must not depend on where blocks begin."""
_HELD_NBYTES = 32 << 20
_BLOCK_NBYTES = 4 << 20
_DONE = 1e-6
"""What may be missing of a row, relative to its length, when no further row is looked for: float32 sees no more."""
NOTHING = -1
"""Stands for a row of zeros in `Pursuit.rows`; what is below it stands for rows of the donor, `-2 - row`."""


class Pursuit(Op, frozen=True):
    """Its second input's rows put in order, with those that it lacks approximated after the first input's.

    Inputs are the donor's matrix `[any, any]` and the model's `[any, columns]`. `rows` has a number for each row of the
    result, as int32: a row of the model, or see `NOTHING`. `common` has pairs of rows that mean the same, of the donor
    and of the model, in the donor's order.
    """

    rows: bytes
    common: bytes
    k: int

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        donor, own = inputs
        if len(donor.shape) != 2 or len(own.shape) != 2 or not 0 < self.k <= len(self.common) // 8:
            raise IncompatibleInputs(f"cannot approximate rows of {own} after {donor} by {self.k} of them")
        return TensorSpec(own.dtype, (len(self.rows) // 4, own.shape[1]))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, min(tensor.nbytes, _GROUP * tensor.spec.row_nbytes))

    @property
    def scratch_nbytes(self) -> int:
        return _HELD_NBYTES + 6 * _BLOCK_NBYTES

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        donor, own = tensor.inputs
        row = tensor.spec.row_nbytes
        first, count = start // row, len(out) // row
        numbers = np.frombuffer(self.rows, "<i4")[first : first + count]
        for i in np.flatnonzero(numbers >= NOTHING).tolist():
            part = out[i * row : (i + 1) * row]
            if numbers[i] == NOTHING:
                part[:] = bytes(row)
            else:
                read(own, int(numbers[i]) * row, part)
        common = np.frombuffer(self.common, "<i4").reshape(-1, 2)
        points = _Points(donor, common[:, 0], read)
        each = max(1, _HELD_NBYTES // (4 * self.k * donor.spec.shape[1]))
        for top in range(0, count, _GROUP):
            new = top + np.flatnonzero(numbers[top : top + _GROUP] < NOTHING)
            for begin in range(0, len(new), each):
                places = new[begin : begin + each]
                found = points.approximate((NOTHING - 1 - numbers[places]).tolist(), self.k)
                for i, terms in zip(places.tolist(), found, strict=True):
                    total = np.zeros(tensor.spec.shape[1])
                    for point, weight in terms:
                        total += weight * _row(own, int(common[point, 1]), read)
                    narrowed(out[i * row : (i + 1) * row], tensor.spec.dtype, total)


class _Points:
    """The donor's rows among which is chosen, by their number in `places`."""

    def __init__(self, donor: LazyTensor, places: NDArray[Any], read: Evaluator) -> None:
        self._donor, self._places, self._read = donor, places, read

    def approximate(self, rows: Sequence[int], k: int) -> list[list[tuple[int, float]]]:
        """For each of some rows of the donor the points, at most `k`, and the weights that come nearest to it."""
        import numpy as np

        wanted = np.stack([_row(self._donor, row, self._read) for row in rows])
        lengths = np.linalg.norm(wanted, axis=1)
        missing = wanted.copy()
        held = np.empty((len(rows), k, wanted.shape[1]), np.float32)
        chosen = np.full((len(rows), k), -1)
        grams, goals = np.zeros((len(rows), k, k)), np.zeros((len(rows), k))
        weights: list[NDArray[Any]] = [np.empty(0)] * len(rows)
        for step in range(k):
            active = np.flatnonzero(np.linalg.norm(missing, axis=1) > _DONE * lengths)
            if not len(active):
                break
            best = self._best(missing[active].astype(np.float32), chosen[active, :step])
            for i, point in zip(active.tolist(), best.tolist(), strict=True):
                atom = _row(self._donor, int(self._places[point]), self._read)
                chosen[i, step], held[i, step] = point, atom
                atoms = held[i, : step + 1].astype(np.float64)
                grams[i, step, : step + 1] = grams[i, : step + 1, step] = atoms @ atom
                goals[i, step] = wanted[i] @ atom
                weights[i] = _solved(grams[i, : step + 1, : step + 1], goals[i, : step + 1])
                missing[i] = wanted[i] - weights[i] @ atoms
        return [
            list(zip(chosen[i, : len(found)].tolist(), found.tolist(), strict=True)) for i, found in enumerate(weights)
        ]

    def _best(self, missing: NDArray[Any], chosen: NDArray[Any]) -> NDArray[Any]:
        """For each row the point with the largest inner product, the first of equal ones, that is not yet chosen."""
        import numpy as np

        highest, found = np.full(len(missing), -1.0, np.float32), np.zeros(len(missing), np.int64)
        everyone = np.arange(len(missing))
        for first, points in self._blocks():
            scores = np.abs(missing @ points.T)
            which, taken = np.nonzero((chosen >= first) & (chosen < first + len(points)))
            scores[which, chosen[which, taken] - first] = -1
            own = scores.argmax(axis=1)
            values = scores[everyone, own]
            better = values > highest
            highest[better], found[better] = values[better], first + own[better]
        return found

    def _blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """All points in order as float32, some at a time, each time with the number of the first."""
        import numpy as np

        (rows, columns), row = self._donor.spec.shape, self._donor.spec.row_nbytes
        height = max(1, _BLOCK_NBYTES // (4 * columns))
        with self._read.scratch(min(height, rows) * row) as buffer:
            for top in range(0, rows, height):
                first, last = np.searchsorted(self._places, (top, top + height))
                if first == last:
                    continue
                memory = buffer[: (rows - top) * row]
                self._read(self._donor, top * row, memory)
                part = widened(memory, self._donor.spec.dtype).reshape(-1, columns)
                yield int(first), part[self._places[first:last] - top].astype(np.float32, copy=False)


def _solved(gram: NDArray[Any], goal: NDArray[Any]) -> NDArray[Any]:
    """The weights of least squares; those of least length, where two points are the same."""
    import numpy as np

    try:
        return np.asarray(np.linalg.solve(gram, goal))
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(gram, goal)[0])


def _row(tensor: LazyTensor, number: int, read: Evaluator) -> NDArray[Any]:
    """A row as float64."""
    import numpy as np

    row = tensor.spec.row_nbytes
    with read.scratch(row) as buffer:
        read(tensor, number * row, buffer)
        return widened(buffer, tensor.spec.dtype).astype(np.float64)
