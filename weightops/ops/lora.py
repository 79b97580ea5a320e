"""Low-rank changes of matrices: `W + scale * B @ A`, as peft merges them and to the bit.

peft multiplies the factors in float32, scales the product, adds it to the weight in float32 and rounds once to the
weight's dtype (`lora.Linear.merge` of peft 0.21), except where it rounds the change first (`Part.rounds_change`). One
pair of factors is merged after the other, and the weight is rounded each time. In float64 it is rounded once.
"""

from __future__ import annotations

from typing import Literal

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import convert
from weightops.ops.lora_product import (
    Part,
    Work,
    memory_of,
    round_to,
    to_narrower,
    to_wider,
    wide_values,
)
from weightops.spec import DType, TensorSpec

Precision = Literal["float32", "float64"]
DTYPES = (DType.F32, DType.F16, DType.BF16)
"""The types of weights that something can be merged into."""
_WORKS = 4


class Lora(Op, frozen=True):
    """Its first input, with the changes that the parts make of the inputs after it, one after the other."""

    parts: tuple[Part, ...]
    precision: Precision = "float32"
    held_nbytes: int = 0
    """Memory for factors and products while the tensor is in work."""

    @property
    def scratch_nbytes(self) -> int:
        return self.held_nbytes

    @property
    def wide(self) -> DType:
        """The type that is computed in."""
        return DType(self.precision)

    @property
    def is_whole(self) -> bool:
        """Whether the tensor has to be computed in one piece."""
        return False

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        weight, taken = inputs[0], 1
        if weight.dtype not in DTYPES:
            raise IncompatibleInputs(f"cannot merge into {weight}: expected float32, float16 or bfloat16")
        for part in self.parts:
            part.check(weight, *inputs[taken : taken + part.n_inputs])
            taken += part.n_inputs
        return weight

    def grain(self, tensor: LazyTensor) -> int:
        return tensor.nbytes if self.is_whole else tensor.spec.shape[-1] * tensor.spec.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        read(tensor.inputs[0], start, out)
        work = self._work(tensor, read)
        width = tensor.spec.shape[-1] * tensor.spec.dtype.itemsize
        row, last = start // width, (start + len(out)) // width
        while row < last:
            stop = last if self.is_whole else min(last, work.end_of_chunk(row))
            self.merge_rows(work, row, out[row * width - start : stop * width - start], read)
            row = stop
        if start + len(out) == tensor.nbytes:
            read.running["lora works"].remove(work)

    def _work(self, tensor: LazyTensor, read: Evaluator) -> Work:
        """What is kept of `tensor`; of tensors that were begun and left, that of the last few."""
        works: list[Work] = read.running.setdefault("lora works", [])
        work = next((w for w in works if w.tensor is tensor), None)
        if work is None:
            work = Work(self.parts, self.wide, self.is_whole, tensor, read)
            works.append(work)
            del works[:-_WORKS]
        return work

    def merge_rows(self, work: Work, row: int, out: memoryview, read: Evaluator) -> None:
        """Merge into the rows of the weight in `out`: they begin at `row`, and lie in one block of each part."""
        import numpy as np

        dtype, wide = work.tensor.spec.dtype, self.wide
        nbytes = len(out) // dtype.itemsize * wide.itemsize
        with read.scratch(nbytes) as first, read.scratch(nbytes) as second:
            values = out if wide is dtype else first
            matrix, change = (np.frombuffer(m, dtype=wide.value).reshape(-1, work.columns) for m in (values, second))
            to_wider(values, wide, out, dtype)
            for i, part in enumerate(self.parts):
                scaled = work.change(i, row, len(matrix), change)
                if part.rounds_change and dtype is not wide:
                    change[:] = scaled
                    round_to(change, dtype, read)
                    scaled = change
                matrix += scaled
                if i + 1 < len(self.parts) and wide is DType.F32:
                    to_narrower(out, dtype, values, wide, read)
                    to_wider(values, wide, out, dtype)
            to_narrower(out, dtype, values, wide, read)


class LoraBias(Op, frozen=True):
    """A bias, with each of the inputs after it times its scale added, and rounded, in turn.

    `order` are indexes into the scales, in the order in which they are added; with `~i`, number `i` is taken off again,
    which is what peft does on the way to the norms of an unmerged weight.
    """

    scales: tuple[float, ...]
    order: tuple[int, ...]
    precision: Precision = "float32"

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        bias = inputs[0]
        odd = next((other for other in inputs[1:] if other.shape != bias.shape), None)
        if bias.dtype not in DTYPES or odd is not None:
            raise IncompatibleInputs(f"cannot add {odd} to the bias {bias}")
        return bias

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        bias, *changes = tensor.inputs
        dtype, wide = tensor.spec.dtype, DType(self.precision)
        total = wide_values(bias, wide, read)
        scaled = [wide_values(t, wide, read) * total.dtype.type(s) for t, s in zip(changes, self.scales, strict=True)]
        for i in self.order if wide is DType.F32 else range(len(scaled)):
            total += scaled[i] if i >= 0 else -scaled[~i]
            if wide is DType.F32 is not dtype:
                convert(out, dtype, memory_of(total), wide)
                convert(memory_of(total), wide, out, dtype)
        to_narrower(out, dtype, memory_of(total), wide, read)


class ReplaceRows(Op, frozen=True):
    """Its first input, a matrix, with its rows of these numbers replaced by those of its second."""

    rows: tuple[int, ...]

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        matrix, new = inputs
        if len(matrix.shape) != 2 or new != TensorSpec(matrix.dtype, (len(self.rows), matrix.shape[1])):
            raise IncompatibleInputs(f"cannot put {new} into {len(self.rows)} rows of {matrix}")
        if len(set(self.rows)) != len(self.rows) or not all(0 <= row < matrix.shape[0] for row in self.rows):
            raise IncompatibleInputs(f"the rows to replace are not different rows of {matrix}")
        return matrix

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        matrix, new = tensor.inputs
        width = self.grain(tensor)
        read(matrix, start, out)
        first, stop = start // width, (start + len(out)) // width
        for i, row in enumerate(self.rows):
            if first <= row < stop:
                read(new, i * width, out[(row - first) * width : (row - first + 1) * width])
