"""Quantisation to ggml's block types, to the bit as ggml's own library does it without fused multiply-add.

How the elements of a block are coded is in `small_blocks`, `superblocks` and `nonlinear`; which types are written, and
by which of them, in `QUANTIZERS`. An importance matrix weighs the errors of columns. The types for which ggml searches
grids of up to 2048 points are not written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TYPE_CHECKING

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io.platform.machine import cores, once_per_process
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.ggml import nonlinear, small_blocks, superblocks
from weightops.ops.ggml.packing import LARGEST, refusal
from weightops.ops.ggml.space import NBYTES, PART, space
from weightops.ops.libtorch import convert
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from weightops.ops.ggml.space import Bytes, Floats, Space

    Quantizer = Callable[[Floats, Floats | None, int, Bytes, Space], None]
    """Elements, their importance, columns, where the blocks go, memory."""

QUANTIZERS: dict[DType, Quantizer] = {
    DType.Q8_0: small_blocks.q8_0,
    DType.Q4_0: small_blocks.q4_0,
    DType.Q4_1: small_blocks.q4_1,
    DType.Q5_0: small_blocks.q5_0,
    DType.Q5_1: small_blocks.q5_1,
    DType.Q2_K: superblocks.q2_k,
    DType.Q3_K: superblocks.q3_k,
    DType.Q4_K: superblocks.q4_k,
    DType.Q5_K: superblocks.q5_k,
    DType.Q6_K: superblocks.q6_k,
    DType.IQ4_NL: nonlinear.iq4_nl,
    DType.IQ4_XS: nonlinear.iq4_xs,
}
"""The types that are written."""
NEAREST = {
    DType.Q8_1: DType.Q8_0,
    DType.Q8_K: DType.Q8_0,
    DType.IQ1_S: DType.Q2_K,
    DType.IQ1_M: DType.Q2_K,
    DType.IQ2_XXS: DType.Q2_K,
    DType.IQ2_XS: DType.Q2_K,
    DType.IQ2_S: DType.Q2_K,
    DType.IQ3_XXS: DType.Q3_K,
    DType.IQ3_S: DType.Q3_K,
    DType.TQ1_0: DType.Q2_K,
    DType.TQ2_0: DType.Q2_K,
    DType.MXFP4: DType.IQ4_NL,
    DType.NVFP4: DType.IQ4_NL,
    DType.Q1_0: DType.Q2_K,
    DType.Q2_0: DType.Q2_K,
}
"""Of the types that are not, the one nearest in size that is."""
_WHOLE_ROWS = {DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1}
"""Types whose weights hang on a mean over a whole row, if importance is given."""
_TOLD_BY_SCALES = {DType.Q8_0, *_WHOLE_ROWS}
"""Types whose scales, without importance, are not finite where a value is not, or is too large."""
_SOURCES = (DType.F32, DType.F16, DType.BF16)
_MAX_THREADS = 16


class Quantize(Op, frozen=True):
    """Its input, which must be float32, float16 or bfloat16, as `dtype`, one of `QUANTIZERS`. The shape stays.

    A second input is importance, float32: how much errors in each column weigh, `[columns]`, or `[experts, columns]`
    where the first has three dimensions, also in one row. Q8_0 takes no notice of it.

    Raises `IncompatibleInputs` for rows that are not whole blocks, types that are not written and importance of another
    shape, and `CorruptInput` when it meets a NaN, an infinity or a value whose scale is beyond float16 (such as above 8
    million for Q8_0, half a million for Q4_0), or importance that is negative or not finite.
    """

    dtype: DType

    @property
    def scratch_nbytes(self) -> int:
        return 2 * _chunk() * 4 + _threads() * NBYTES

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        source, *rest = inputs
        if self.dtype in NEAREST:
            raise IncompatibleInputs(
                f"cannot quantise {source} to {self.dtype.value}: that type is read, not written",
                hint=f"{NEAREST[self.dtype].value} is the nearest that is",
            )
        if source.dtype not in _SOURCES or self.dtype not in QUANTIZERS:
            raise IncompatibleInputs(f"cannot quantise {source.dtype.value} to {self.dtype.value}")
        count = self.dtype.block[0]
        if not source.shape or source.shape[-1] % count:
            raise IncompatibleInputs(
                f"cannot quantise {source}: {self.dtype.value} takes rows of a multiple of {count}"
            )
        for importance in rest:
            shapes = [source.shape[-1:]]
            if len(source.shape) == 3:
                experts, _, columns = source.shape
                shapes += [(experts, columns), (experts * columns,)]
            if importance.dtype is not DType.F32 or importance.shape not in shapes:
                wanted = " or ".join(str(TensorSpec(DType.F32, shape)) for shape in shapes)
                raise IncompatibleInputs(f"cannot quantise {source} by importance {importance}: it must be {wanted}")
        return TensorSpec(self.dtype, source.shape)

    def grain(self, tensor: LazyTensor) -> int:
        """A block, a row where importance needs it, or as many as the input's grain needs."""
        source = tensor.inputs[0]
        unit = self._unit(tensor) * source.spec.dtype.itemsize
        return self.dtype.nbytes(math.lcm(unit, source.grain) // source.spec.dtype.itemsize)

    def _unit(self, tensor: LazyTensor) -> int:
        """The elements that are quantised together."""
        by_rows = self.dtype in _WHOLE_ROWS and len(tensor.inputs) > 1
        return max(self.dtype.block[0], tensor.spec.shape[-1]) if by_rows else self.dtype.block[0]

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        """Reads the next chunk while the pool works on the one before."""
        source, *rest = tensor.inputs
        importance = _Importance(rest[0], tensor.spec.shape, read) if rest else None
        count, new = self.dtype.block
        old, unit = source.spec.dtype.itemsize, self._unit(tensor)
        part = max(1, PART // unit) * unit
        step = max(1, _chunk() // part) * part
        first, numel = start // new * count, len(out) // new * count
        pending: list[Future[None]] = []
        size = min(step, numel) * old
        with read.scratch(size) as one, read.scratch(size) as other:
            try:
                for begin in range(0, numel, step):
                    one, other = other[: min(step, numel - begin) * old], one
                    read(source, (first + begin) * old, one)
                    weights = importance.of(first + begin, len(one) // old) if importance else None
                    _finish(pending)
                    pending = [
                        _pool().submit(
                            _work,
                            out[self.dtype.nbytes(begin + at) : self.dtype.nbytes(min(begin + at + part, numel))],
                            self.dtype,
                            one[at * old : (at + part) * old],
                            source.spec.dtype,
                            weights.part(at) if weights else None,
                            tensor.spec.shape[-1],
                        )
                        for at in range(0, len(one) // old, part)
                    ]
                _finish(pending)
            finally:
                wait(pending)  # they write to memory that others use next


class _Importance:
    """A tensor's importance, read for as many experts as a chunk has elements of."""

    def __init__(self, tensor: LazyTensor, shape: tuple[int, ...], read: Evaluator) -> None:
        self.tensor, self.read, self.columns = tensor, read, shape[-1]
        self.per_expert = math.prod(shape) if tensor.spec.numel == self.columns else math.prod(shape[1:])

    def of(self, first: int, count: int) -> _Rows:
        import numpy as np

        expert, stop = first // self.per_expert, -(-(first + count) // self.per_expert)
        rows = np.empty((stop - expert, self.columns), np.float32)
        self.read(self.tensor, expert * self.columns * 4, rows.data.cast("B"))
        if not (rows >= 0).all() or not np.isfinite(rows).all():
            raise CorruptInput(
                f"cannot quantise by importance {self.tensor.spec}: a value is negative, not a number or infinite",
                hint="the importance matrix is damaged, or was made by a model that is",
            )
        return _Rows(rows, self.per_expert, first - expert * self.per_expert)


class _Rows:
    """The importance of experts one after the other, and an element to begin with."""

    def __init__(self, rows: Floats, per_expert: int, first: int) -> None:
        self.rows, self.per_expert, self.first = rows, per_expert, first

    def part(self, at: int) -> _Rows:
        return _Rows(self.rows, self.per_expert, self.first + at)

    def spread(self, out: Floats) -> Floats:
        """The importance of each element, in `out`."""
        columns, done = self.rows.shape[1], 0
        while done < out.size:
            expert, inside = divmod(self.first + done, self.per_expert)
            row, column = self.rows[expert], inside % columns
            count = min(out.size - done, self.per_expert - inside)
            part = out[done : done + count]
            head = min(-column % columns, count)
            part[:head] = row[column : column + head]
            whole = (count - head) // columns * columns
            part[head : head + whole].reshape(-1, columns)[:] = row
            part[head + whole :] = row[: count - head - whole]
            done += count
        return out


def _finish(pending: Iterable[Future[None]]) -> None:
    for future in pending:
        future.result()


@once_per_process
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), "quantize")


@cache
def _threads() -> int:
    return min(cores(), _MAX_THREADS)


def _chunk() -> int:
    """Elements that are read at once."""
    return max(4, 2 * _threads()) * PART


def _work(
    out: memoryview, dtype: DType, source: memoryview, old: DType, importance: _Rows | None, columns: int
) -> None:
    """Quantise `source` into `out`."""
    import numpy as np

    memory = space()
    if old is DType.F32:
        floats = np.frombuffer(source, np.float32)
    else:
        floats = memory.floats("source", len(source) // old.itemsize)
        convert(floats.data.cast("B"), DType.F32, source, old)
    is_told_by_scales = importance is None and dtype in _TOLD_BY_SCALES
    if not is_told_by_scales and not -LARGEST < floats.min() <= floats.max() < LARGEST:
        raise refusal(dtype)
    weights = None if importance is None else importance.spread(memory.floats("importance", floats.size))
    target = np.frombuffer(out, np.uint8).reshape(-1, dtype.block[1])
    with np.errstate(all="ignore"):
        QUANTIZERS[dtype](floats, weights, columns, target, memory)
