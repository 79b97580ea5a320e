"""Low-rank changes of matrices: `W + scale * B @ A`, as peft merges them and to the bit.

peft multiplies the factors in float32, scales the product, adds it to the weight in float32 and rounds once to the
weight's dtype (`lora.Linear.merge` of peft 0.21), except where it rounds the change first (`Part.rounds_change`). One
pair of factors is merged after the other, and the weight is rounded each time. In float64 it is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from weightops.errors import IncompatibleInputs
from weightops.io.platform.machine import cores, once_per_process
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import computes_here, convert
from weightops.ops.lora.product import (
    MAX_THREADS,
    Part,
    Work,
    memory_of,
    round_to,
    to_narrower,
    to_wider,
    wide_values,
)
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

Precision = Literal["float32", "float64"]
DTYPES = (DType.F32, DType.F16, DType.BF16)
"""The types of weights that something can be merged into."""
_WORKS = 4
_CHUNK = 1 << 19
"""Elements that are worked on at once: what fits into a cache of a core."""


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
        pieces = work.pieces(start // width, (start + len(out)) // width)
        work.forget(but=pieces[0][0])
        jobs = [partial(self._merge, work, a, out[a * width - start : b * width - start]) for a, b in pieces]
        if min(len(jobs), read.threads) <= 1 or not computes_here():
            for job in jobs:
                job()
        else:
            pending = [_pool().submit(job) for job in jobs]
            wait(pending)  # also after a failure: they write to memory that others use next
            for future in pending:
                future.result()
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

    def _merge(self, work: Work, row: int, out: memoryview) -> None:
        """Merge into the rows of the weight in `out`: they begin at `row`, and lie in one block."""
        products = work.products(row)
        first, stop = work.block(row)
        width = work.columns * work.tensor.spec.dtype.itemsize
        step = len(out) // width if self.is_whole else max(1, _CHUNK // work.columns)
        for top in range(0, len(out) // width, step):
            part = out[top * width : (top + step) * width]
            low = row + top - first
            self.merge_rows(work, row + top, [p[low : low + len(part) // width] for p in products], part)
        work.put_back(row, products, row + len(out) // width == stop)

    def merge_rows(self, work: Work, row: int, products: Sequence[NDArray[Any]], out: memoryview) -> None:
        """Merge into rows of the weight, given those of the products."""
        import numpy as np

        dtype, wide = work.tensor.spec.dtype, self.wide
        count = len(out) // dtype.itemsize
        lent = [work.memory.take(count, wide) for _ in range(2)]
        values = out if wide is dtype else memory_of(lent[0])
        matrix = np.frombuffer(values, dtype=wide.value).reshape(-1, work.columns)
        change = lent[1].reshape(matrix.shape)
        to_wider(values, wide, out, dtype)
        for i, part in enumerate(self.parts):
            scaled = work.change(i, products[i], change)
            if part.rounds_change and dtype is not wide:
                change[:] = scaled
                round_to(change, dtype)
                scaled = change
            matrix += scaled
            if i + 1 < len(self.parts) and wide is DType.F32:
                to_narrower(out, dtype, values, wide)
                to_wider(values, wide, out, dtype)
        to_narrower(out, dtype, values, wide)
        work.memory.give(*lent)


@once_per_process
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(cores(), MAX_THREADS), "merge")


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
        to_narrower(out, dtype, memory_of(total), wide)


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
