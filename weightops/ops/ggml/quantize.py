"""Quantisation to ggml's block types, to the bit as `gguf.quants.quantize` of llama.cpp does it.

A block of 32 elements shares a float16 scale. Q8_0 has a signed byte for each; Q4_0 a nibble from 0 to 15 that stands
for -8 to 7, elements 0 to 15 in the low nibbles of its 16 bytes and 16 to 31 in the high ones. Source: ggml's
`quantize_row_q8_0_ref` and `quantize_row_q4_0_ref`, of which gguf's numpy code gives the same bits.

Arrays are worked on whole, and into memory that is kept: a pass over memory in cache costs less than a loop over rows
of 32, and fresh pages cost more than most passes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TYPE_CHECKING, Any

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io.platform.machine import cores, once_per_process
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import convert
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_BLOCK = 32
_SOURCES = (DType.F32, DType.F16, DType.BF16)
_PART = 1 << 18
"""Elements that a thread quantises at once: few enough for its caches, and enough for threads to wait little for the
interpreter's lock."""
_MAX_THREADS = 16
_SIGN = 0x80000000
_BELOW_HALF = 0x3EFFFFFF
"""The bits of the largest float32 below 0.5."""


class Quantize(Op, frozen=True):
    """Its input, which must be float32, float16 or bfloat16, as `dtype`: Q8_0 or Q4_0. The shape stays.

    Raises `IncompatibleInputs` for rows that are not whole blocks, and `CorruptInput` when it meets a NaN, an infinity
    or a value whose scale is beyond float16 (above 8 million for Q8_0, half a million for Q4_0).
    """

    dtype: DType

    @property
    def scratch_nbytes(self) -> int:
        return 2 * _chunk() * 4 + _threads() * 4 * _PART * 4

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if source.dtype not in _SOURCES or self.dtype not in _QUANTIZERS:
            raise IncompatibleInputs(f"cannot quantise {source.dtype.value} to {self.dtype.value}")
        if not source.shape or source.shape[-1] % _BLOCK:
            raise IncompatibleInputs(
                f"cannot quantise {source}: {self.dtype.value} takes rows of a multiple of {_BLOCK}"
            )
        return TensorSpec(self.dtype, source.shape)

    def grain(self, tensor: LazyTensor) -> int:
        """A block, or as many as the input's grain needs."""
        (source,) = tensor.inputs
        block = _BLOCK * source.spec.dtype.itemsize
        return math.lcm(block, source.grain) // block * self.dtype.block[1]

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        """Reads the next chunk while the pool works on the one before."""
        (source,) = tensor.inputs
        old, new = _BLOCK * source.spec.dtype.itemsize, self.dtype.block[1]
        step = _chunk() // _BLOCK
        pending: list[Future[None]] = []
        size = min(step, len(out) // new) * old
        with read.scratch(size) as one, read.scratch(size) as other:
            try:
                for first in range(0, len(out) // new, step):
                    part = out[first * new : (first + step) * new]
                    one, other = other[: len(part) // new * old], one
                    read(source, (start // new + first) * old, one)
                    _finish(pending)
                    pending = _submit(part, self.dtype, one, source.spec.dtype)
                _finish(pending)
            finally:
                wait(pending)  # they write to memory that others use next


def _submit(out: memoryview, dtype: DType, source: memoryview, old: DType) -> list[Future[None]]:
    """Have `source` quantised into `out`, in parts."""
    width, height = _PART * old.itemsize, _PART // _BLOCK * dtype.block[1]
    return [
        _pool().submit(_work, out[i * height : (i + 1) * height], dtype, source[i * width : (i + 1) * width], old)
        for i in range(-(-len(source) // width))
    ]


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
    return max(4, 2 * _threads()) * _PART


class _Space(threading.local):
    """A thread's memory for what it works out on the way."""

    def __init__(self) -> None:
        import numpy as np

        self.floats, self.one, self.other = (np.empty(_PART, np.float32) for _ in range(3))
        self.bytes = np.empty(_PART, np.int8)


@cache
def _space() -> _Space:
    return _Space()


def _work(out: memoryview, dtype: DType, source: memoryview, old: DType) -> None:
    import numpy as np

    space = _space()
    if old is DType.F32:
        floats = np.frombuffer(source, np.float32)
    else:
        floats = space.floats[: len(source) // old.itemsize]
        convert(floats.data.cast("B"), DType.F32, source, old)
    with np.errstate(all="ignore"):
        _QUANTIZERS[dtype](floats, out, space)


def _fold(values: Floats, largest: Callable[..., Any], space: Floats) -> Floats:
    """The largest (or smallest) of each block, NaN where it has one; a part of `space`."""
    begin = 0
    for _ in range(5):
        end = begin + values.size // 2
        values = largest(values[::2], values[1::2], out=space[begin:end])
        begin = end
    return values


def _scale(target: NDArray[Any], scales: NDArray[Any], dtype: DType) -> Floats:
    """Store the scales of blocks; gives the factors from elements to quants."""
    import numpy as np

    halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise CorruptInput(
            f"cannot quantise to {dtype.value}: a value is not a number, infinite or far too large",
            hint="the weights are damaged, or were never good: look at the run that made them",
        )
    target["scale"] = halves
    return np.where(scales == 0, scales, np.float32(1) / scales)


def _q8_0(x: Floats, out: memoryview, space: _Space) -> None:
    """A block is `scale = max|x| / 127` and `round(x / scale)`, halves away from zero."""
    import numpy as np

    target = np.frombuffer(out, np.dtype([("scale", "<f2"), ("quants", "V32")]))
    scaled, other, quants = space.one[: x.size], space.other[: x.size], space.bytes[: x.size]
    np.abs(x, out=scaled)
    factors = _scale(target, _fold(scaled, np.maximum, other) / np.float32(127), DType.Q8_0)
    factors[np.isinf(factors)] = 0  # of subnormal scales, where gguf casts NaN to a byte, which gives 0
    np.multiply(x.reshape(-1, _BLOCK), factors[:, None], out=scaled.reshape(-1, _BLOCK))
    # Adding 0.5 rounds up what is just below a half. The next smaller number does not, and exact halves still reach
    # the next integer, so that cutting off the fraction rounds them away from zero.
    bump = np.bitwise_and(scaled.view(np.uint32), np.uint32(_SIGN), out=other.view(np.uint32))
    bump |= np.uint32(_BELOW_HALF)
    scaled += other
    np.copyto(quants, scaled, casting="unsafe")
    target["quants"] = quants.view("V32")


def _q4_0(x: Floats, out: memoryview, space: _Space) -> None:
    """A block is `scale = x / -8` for the first x of the largest magnitude, and `min(int(x / scale + 8.5), 15)`."""
    import numpy as np

    target = np.frombuffer(out, np.dtype([("scale", "<f2"), ("quants", "V16")]))
    blocks, quants = x.reshape(-1, _BLOCK), space.bytes[: x.size].view(np.uint8)
    top, bottom = _fold(x, np.maximum, space.one), _fold(x, np.minimum, space.other)
    largest = np.where(top > -bottom, top, bottom)
    tied = np.flatnonzero(top == -bottom)
    if tied.size:
        rows = blocks[tied]
        largest[tied] = rows[np.arange(tied.size), np.abs(rows).argmax(axis=1)]
    # Factors of subnormal scales are infinite, and the cast makes of that what it makes of it in gguf.
    factors = _scale(target, largest / np.float32(-8), DType.Q4_0)
    scaled = space.one[: x.size]
    np.multiply(blocks, factors[:, None], out=scaled.reshape(-1, _BLOCK))
    scaled += np.float32(8.5)
    np.copyto(quants, scaled, casting="unsafe")
    # Eight quants to a word. 16 becomes 15, and is the only one above.
    words, shifted = quants.view(np.uint64), space.other.view(np.uint64)[: x.size // 8]
    np.right_shift(words, np.uint64(4), out=shifted)
    shifted &= np.uint64(0x0101010101010101)
    words -= shifted
    # A block is two low words and two high ones: of the sums of words two apart, every other pair is wanted.
    np.left_shift(words, np.uint64(4), out=shifted)
    words[:-2] |= shifted[2:]
    target["quants"] = words.view("V16")[::2]


_QUANTIZERS: dict[DType, Callable[[Floats, memoryview, _Space], None]] = {DType.Q8_0: _q8_0, DType.Q4_0: _q4_0}
