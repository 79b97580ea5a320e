"""Linear arithmetic on tensors in float32 (float64 for float64): sums with weights, scaling, projection.

Results are wide, so that whoever uses them rounds once.
"""

from __future__ import annotations

import math

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.elementwise import cast
from weightops.spec import DType, TensorSpec

_READ_NBYTES = 4 << 20


def wide(tensor: LazyTensor) -> LazyTensor:
    """A tensor of 16 bits or more in float32, of float64 itself; raises `IncompatibleInputs` for any other."""
    dtype = tensor.spec.dtype
    if not dtype.is_float or dtype.bits < 16:
        raise IncompatibleInputs(f"{tensor.spec}: expected numbers of 16 bits or more, for arithmetic")
    return tensor if dtype is DType.F64 else cast(tensor, DType.F32)


def _same(inputs: tuple[TensorSpec, ...], what: str) -> TensorSpec:
    odd = next((spec for spec in inputs if spec != inputs[0]), None)
    if odd is not None:
        raise IncompatibleInputs(f"cannot {what} {inputs[0]} and {odd}")
    return inputs[0]


class Weighted(Op, frozen=True):
    """The sum of its inputs, each times its weight, added up in their order; all are wide and of one shape."""

    weights: tuple[float, ...]

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        if len(inputs) != len(self.weights):
            raise IncompatibleInputs(f"{len(inputs)} tensors have {len(self.weights)} weights")
        return _same(inputs, "add up")

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        kind = tensor.spec.dtype.value
        read(tensor.inputs[0], start, out)
        total = np.frombuffer(out, kind)
        with np.errstate(over="ignore", invalid="ignore"), read.scratch(len(out)) as buffer:
            total *= total.dtype.type(self.weights[0])
            for weight, source in zip(self.weights[1:], tensor.inputs[1:], strict=True):
                read(source, start, buffer)
                values = np.frombuffer(buffer, kind)
                values *= values.dtype.type(weight)
                total += values


class Along(Op, frozen=True):
    """Its first input times a vector along `axis`, to which `shift` is added first; both are wide."""

    axis: int
    shift: float = 0.0

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        source, vector = inputs
        fits = self.axis < len(source.shape) and vector == TensorSpec(source.dtype, (source.shape[self.axis],))
        if not fits:
            raise IncompatibleInputs(f"{vector} has no number for each place of {source} along dimension {self.axis}")
        return source

    def grain(self, tensor: LazyTensor) -> int:
        step = math.prod(tensor.spec.shape[self.axis + 1 :])
        unit = step if self.axis == 0 else math.prod(tensor.spec.shape[self.axis :])
        return max(1, unit) * tensor.spec.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        source, vector = tensor.inputs
        kind, size = tensor.spec.dtype.value, tensor.spec.dtype.itemsize
        factors = np.frombuffer(read.whole(vector), kind) + np.dtype(kind).type(self.shift)
        read(source, start, out)
        step = math.prod(tensor.spec.shape[self.axis + 1 :])
        values = np.frombuffer(out, kind)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.axis:
                values.reshape(-1, len(factors), step)[...] *= factors[:, None]
            else:
                first = start // size // step
                rows = values.reshape(-1, step)
                rows *= factors[first : first + len(rows), None]


class UnitRows(Op, frozen=True):
    """The rows of a matrix divided by their lengths, or by 1e-12 where those are less (torch's `normalize`)."""

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if len(source.shape) != 2:
            raise IncompatibleInputs(f"{source} has no rows to be made unit vectors")
        return source

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        read(tensor.inputs[0], start, out)
        rows = np.frombuffer(out, tensor.spec.dtype.value).reshape(-1, tensor.spec.shape[1])
        for line in rows:
            line /= max(float(np.linalg.norm(line)), 1e-12)


class Projected(Op, frozen=True):
    """A matrix `[rows, columns]` less `weight` times its part along a unit vector, which is its second input.

    With `is_output` the vector has a number for each row: W - weight * r (rᵀ W), whose sums over the rows take a pass
    first; else for each column: W - weight * (W r) rᵀ. Both inputs are wide. Source: Arditi and others, Refusal in
    language models is mediated by a single direction (2406.11717).
    """

    weight: float
    is_output: bool

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        source, vector = inputs
        side = 0 if self.is_output else 1
        if len(source.shape) != 2 or vector != TensorSpec(source.dtype, (source.shape[side],)):
            raise IncompatibleInputs(
                f"{vector} has no number for each {'row' if self.is_output else 'column'} of {source}"
            )
        return source

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    @property
    def scratch_nbytes(self) -> int:
        return _READ_NBYTES

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        source, vector = tensor.inputs
        kind, row = tensor.spec.dtype.value, tensor.spec.row_nbytes
        along = np.frombuffer(read.whole(vector), kind)
        sums = read.running.get(tensor)
        if self.is_output and sums is None:
            sums = read.running[tensor] = self._sums(tensor, along, read)
        read(source, start, out)
        values = np.frombuffer(out, kind).reshape(-1, tensor.spec.shape[1])
        factor = values.dtype.type(self.weight)
        first = start // row
        with np.errstate(over="ignore", invalid="ignore"):
            for i, line in enumerate(values):
                # one row at a time: what a row becomes must not depend on the block that it lies in
                line -= factor * along[first + i] * sums if self.is_output else factor * np.dot(line, along) * along
        if start + len(out) == tensor.nbytes:
            read.running.pop(tensor, None)

    def _sums(self, tensor: LazyTensor, along: object, read: Evaluator) -> object:
        """rᵀ W in float64, rounded once: rows in their order."""
        import numpy as np

        source, row = tensor.inputs[0], tensor.spec.row_nbytes
        kind = tensor.spec.dtype.value
        height = max(1, _READ_NBYTES // row)
        total = np.zeros(tensor.spec.shape[1])
        with read.scratch(height * row) as buffer:
            for top in range(0, tensor.spec.shape[0], height):
                part = buffer[: min(height, tensor.spec.shape[0] - top) * row]
                read(source, top * row, part)
                rows = np.frombuffer(part, kind).reshape(-1, tensor.spec.shape[1])
                for i, line in enumerate(rows):
                    total += np.asarray(along)[top + i] * line.astype(np.float64)
        return total.astype(kind)
