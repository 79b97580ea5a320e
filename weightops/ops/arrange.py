"""Ops that rearrange: joining parts, cutting parts out, reordering rows; and the check that copies agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.elementwise import reshaped
from weightops.spec import TensorSpec

_BLOCK_NBYTES = 4 << 20


class Concat(Op, frozen=True):
    """Its inputs one after another along `axis`, as torch.cat gives them."""

    axis: int

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        first, axis = inputs[0], self.axis
        for other in inputs:
            rest = (other.dtype, len(other.shape), *_without(other.shape, axis))
            if rest != (first.dtype, len(first.shape), *_without(first.shape, axis)) or axis >= len(first.shape):
                raise IncompatibleInputs(f"cannot join {first} and {other} along dimension {axis}")
        size = sum(other.shape[axis] for other in inputs)
        return TensorSpec(first.dtype, (*first.shape[:axis], size, *first.shape[axis + 1 :]))

    def grain(self, tensor: LazyTensor) -> int:
        rows = tensor.nbytes // max(1, math.prod(tensor.spec.shape[: self.axis]))
        return rows if self.axis else tensor.spec.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        if self.axis:
            self._interleave(tensor, start, out, read)
            return
        begin, stop = 0, start + len(out)
        for part in tensor.inputs:
            end = begin + part.nbytes
            low, high = max(begin, start), min(end, stop)
            if low < high:
                read(part, low - begin, out[low - start : high - start])
            begin = end

    def _interleave(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        row = self.grain(tensor)
        first, count = start // row, len(out) // row
        target, left = np.frombuffer(out, dtype=np.uint8).reshape(count, row), 0
        for part in tensor.inputs:
            width = part.nbytes * row // tensor.nbytes
            with read.scratch(count * width) as buffer:
                read(part, first * width, buffer)
                target[:, left : left + width] = np.frombuffer(buffer, dtype=np.uint8).reshape(count, width)
            left += width


class Slice(Op, frozen=True):
    """Elements `[start, stop)` of its input along `axis`."""

    axis: int
    start: int
    stop: int

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if self.axis >= len(source.shape) or not 0 <= self.start <= self.stop <= source.shape[self.axis]:
            raise IncompatibleInputs(f"{source} has no {self.start} to {self.stop} in dimension {self.axis}")
        shape = (*source.shape[: self.axis], self.stop - self.start, *source.shape[self.axis + 1 :])
        return TensorSpec(source.dtype, shape)

    def grain(self, tensor: LazyTensor) -> int:
        rows = tensor.nbytes // max(1, math.prod(tensor.spec.shape[: self.axis]))
        return max(1, rows) if self.axis else tensor.spec.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        step = math.prod(source.spec.shape[self.axis + 1 :]) * source.spec.dtype.itemsize
        skipped = self.start * step
        if not self.axis:
            read(source, skipped + start, out)
            return
        row, width = source.spec.shape[self.axis] * step, self.grain(tensor)
        first, target = start // width, np.frombuffer(out, dtype=np.uint8).reshape(-1, width)
        height = max(1, _BLOCK_NBYTES // row)
        with read.scratch(min(height, len(target)) * row) as buffer:
            for top in range(0, len(target), height):
                part = target[top : top + height]
                rows = buffer[: len(part) * row]
                read(source, (first + top) * row, rows)
                part[:] = np.frombuffer(rows, dtype=np.uint8).reshape(-1, row)[:, skipped : skipped + width]


class SwapRows(Op, frozen=True):
    """Rows seen as `[groups, outer, inner]`, in the order `[groups, inner, outer]`.

    With a group for each head, `outer` half its size and `inner` 2, rows in adjacent pairs (Meta's rotary order)
    become two halves (that of transformers); with the two exchanged, halves become pairs.
    """

    groups: int
    outer: int
    inner: int

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if not source.shape or source.shape[0] != self.groups * self.outer * self.inner:
            expected = f"{self.groups} x {self.outer} x {self.inner}"
            raise IncompatibleInputs(f"the rows of {source} are not {expected}")
        return source

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.nbytes // max(1, self.groups))

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        row = tensor.nbytes // tensor.spec.shape[0]
        unit = np.dtype(f"V{row}")
        with read.scratch(len(out)) as buffer:
            read(tensor.inputs[0], start, buffer)
            groups = np.frombuffer(buffer, dtype=unit).reshape(-1, self.outer, self.inner)
            target = np.frombuffer(out, dtype=unit).reshape(-1, self.inner, self.outer)
            for i in range(self.inner) if self.inner < self.outer else ():
                target[:, i, :] = groups[:, :, i]
            for i in range(self.outer) if self.inner >= self.outer else ():
                target[:, :, i] = groups[:, i, :]


class Agreed(Op, frozen=True):
    """Its first input, once the others have been found to be the same bytes.

    If not, `problem` begins the sentence, `fault` says whose it is and `hint` what to do.
    """

    problem: str
    fault: Literal["incompatible", "corrupt"] = "corrupt"
    hint: str = "fetch all parts again"

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        first, *others = inputs
        odd = next((other for other in others if other != first), None)
        if odd is not None:
            raise CorruptInput(f"{escape(self.problem)}: {first} and {odd}")
        return first

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        first, *others = tensor.inputs
        read(first, start, out)
        for other in others:
            with read.scratch(len(out)) as buffer:
                read(other, start, buffer)
                if buffer != out:
                    error = IncompatibleInputs if self.fault == "incompatible" else CorruptInput
                    raise error(f"{escape(self.problem)}: the values differ", hint=self.hint)


def concat(parts: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """`parts` joined along `axis`; the only one itself."""
    return parts[0] if len(parts) == 1 else LazyTensor.make(Concat(axis), *parts)


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """`[n, ...]` of `n` tensors of one shape; raises `IncompatibleInputs` if they are not."""
    shape = parts[0].spec.shape
    odd = next((part for part in parts if part.spec != parts[0].spec), None)
    if odd is not None:
        raise IncompatibleInputs(f"cannot stack {parts[0].spec} and {odd.spec}")
    return concat([reshaped(part, (1, *shape)) for part in parts], 0)


def taken(tensor: LazyTensor, axis: int, numbers: Sequence[int]) -> LazyTensor:
    """What lies at these places along an axis, in their order; places may be there more than once."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return concat([cut(tensor, axis, start, stop) for start, stop in runs], axis)


def one_of(stack: LazyTensor, number: int) -> LazyTensor:
    """One of the tensors that are stacked along the first dimension."""
    return reshaped(cut(stack, 0, number, number + 1), stack.spec.shape[1:])


def cut(tensor: LazyTensor, axis: int, start: int, stop: int) -> LazyTensor:
    """Elements `[start, stop)` along `axis`, of what lies below where that is known to be the same."""
    op = tensor.op
    if (start, stop) == (0, tensor.spec.shape[axis]):
        return tensor
    if isinstance(op, Concat) and op.axis == axis:
        pieces, begin = [], 0
        for part in tensor.inputs:
            end = begin + part.spec.shape[axis]
            low, high = max(begin, start), min(end, stop)
            if low < high:
                pieces.append(cut(part, axis, low - begin, high - begin))
            begin = end
        if pieces:
            return concat(pieces, axis)
    if isinstance(op, Slice) and op.axis == axis:
        return cut(tensor.inputs[0], axis, op.start + start, op.start + stop)
    if isinstance(op, SwapRows) and axis == 0:
        size = op.outer * op.inner
        if start % size == stop % size == 0 and stop > start:
            whole = cut(tensor.inputs[0], 0, start, stop)
            return LazyTensor.make(SwapRows((stop - start) // size, op.outer, op.inner), whole)
    return LazyTensor.make(Slice(axis, start, stop), tensor)


def pairs_to_halves(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Rows of q or k, or of their bias, from Meta's rotary order to that of transformers.

    Source: `permute` of transformers 4.47's convert_llama_weights_to_hf.
    """
    return _swap(tensor, heads, tensor.spec.shape[0] // heads // 2, 2)


def halves_to_pairs(tensor: LazyTensor, heads: int) -> LazyTensor:
    """The inverse of `pairs_to_halves`, which is not its own."""
    return _swap(tensor, heads, 2, tensor.spec.shape[0] // heads // 2)


def _swap(tensor: LazyTensor, groups: int, outer: int, inner: int) -> LazyTensor:
    if tensor.op == SwapRows(groups, inner, outer):
        return tensor.inputs[0]
    return tensor if outer == 1 or inner == 1 else LazyTensor.make(SwapRows(groups, outer, inner), tensor)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])
