"""float8_e4m3fn with scales: for each row or for the whole as compressed-tensors has it, for blocks as DeepSeek has it.

Source: `calculate_qparams` and `quantize` of compressed-tensors 0.20 on the smallest and largest weights. A scale is
the largest magnitude over 448 in the weights' own type, or the type's epsilon where that is zero. A weight over its
scale is rounded to its own type first, then to eight bits. -0 becomes 0, because the zero point is added: 0.

Of blocks a scale is the largest magnitude over 448 in float32, and a weight over it is computed in float32 as well: the
arithmetic of DeepSeek-V3's `inference/kernel.py`. A block of zeros has the scale 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import convert
from weightops.ops.measures.loss import counted_cast
from weightops.ops.numbers.float_formats import FORMATS
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Strategy = Literal["channel", "tensor"]
"""A scale for each row (output channel), `[rows, 1]`, or one for all, `[1]`."""
SCALED = (DType.F16, DType.BF16, DType.F32, DType.F64)
"""The types that weights may have, and scales with them."""
_LARGEST = 448.0
_BLOCK = 1 << 21
"""Elements that are read at once for their scales."""
_PIECE = 1 << 17
"""Elements that are divided at once."""


class _Scales(Op, frozen=True):
    """Scales that are computed once, when the first of them is asked for."""

    @property
    def scratch_nbytes(self) -> int:
        return _BLOCK * 8

    def grain(self, tensor: LazyTensor) -> int:
        return tensor.spec.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        scales = read.running.get(tensor)
        if scales is None:
            scales = read.running[tensor] = self._scales(tensor.inputs[0], read)
        out[:] = memoryview(scales)[start : start + len(out)]

    @abstractmethod
    def _scales(self, source: LazyTensor, read: Evaluator) -> bytes | bytearray:
        """The bytes of all scales of the matrix `source`."""


class Scale(_Scales, frozen=True):
    """The scales of a matrix, which is read once for all of them. `label` names it in errors.

    Raises `IncompatibleInputs` for a NaN or an infinity, which no scale brings into eight bits.
    """

    strategy: Strategy
    label: str

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if len(source.shape) != 2 or source.dtype not in SCALED:
            types = ", ".join(dtype.value for dtype in SCALED)
            raise IncompatibleInputs(f"{escape(self.label)} is {source}: only matrices of {types} are given scales")
        return TensorSpec(source.dtype, (source.shape[0], 1) if self.strategy == "channel" else (1,))

    def _scales(self, source: LazyTensor, read: Evaluator) -> bytearray:
        import numpy as np

        dtype, (rows, columns) = source.spec.dtype, source.spec.shape
        by_row, unit = self.strategy == "channel", np.dtype(f"<u{dtype.itemsize}")
        largest = np.zeros(rows if by_row else 1, unit)
        limit = max(_BLOCK, source.grain // dtype.itemsize)  # what is computed whole is not computed for each area
        for row, height, column, width in _areas(0, rows * columns, columns, limit):
            with read.scratch(height * width * dtype.itemsize) as buffer:
                read(source, (row * columns + column) * dtype.itemsize, buffer)
                magnitudes = np.frombuffer(buffer, unit).reshape(height, width)
                magnitudes &= unit.type((1 << (dtype.bits - 1)) - 1)
                part = largest[row : row + height] if by_row else largest
                np.maximum(part, magnitudes.max(axis=1 if by_row else None), out=part)
        _refuse_odd(largest, dtype, self.label)
        scales = _floats(largest.data.cast("B"), dtype)
        scales /= scales.dtype.type(_LARGEST)
        result = bytearray(largest.nbytes)
        stored = np.frombuffer(result, unit)
        if largest.size:
            convert(memoryview(result), dtype, scales.data.cast("B"), _wide(dtype))
            scales[stored == 0] = 2.0 ** (1 - FORMATS[dtype].precision)  # the type's epsilon
            convert(memoryview(result), dtype, scales.data.cast("B"), _wide(dtype))
        return result


class Unscale(Op, frozen=True):
    """A matrix over its scales, rounded to its own type, plus zero."""

    @property
    def scratch_nbytes(self) -> int:
        return _PIECE * 4

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        source, scale = inputs
        if scale.dtype is not source.dtype or scale.shape not in ((source.shape[0], 1), (1,)):
            raise IncompatibleInputs(f"{scale} cannot be the scales of {source}")
        return source

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        source, scale = tensor.inputs
        dtype, columns = tensor.spec.dtype, tensor.spec.shape[1]
        first, stop = start // dtype.itemsize, (start + len(out)) // dtype.itemsize
        top, bottom = (first // columns, -(-stop // columns)) if len(scale.spec.shape) == 2 else (0, 1)
        read(source, start, out)
        with read.scratch((bottom - top) * dtype.itemsize) as buffer:
            read(scale, top * dtype.itemsize, buffer)
            scales = _floats(buffer, dtype)
        unit, position = np.dtype(f"<u{dtype.itemsize}"), 0
        minus_zero = unit.type(1 << (dtype.bits - 1))
        with read.scratch(_PIECE * 4) as space:
            for row, height, _, width in _areas(first, stop, columns, _PIECE):
                part = out[position : position + height * width * dtype.itemsize]
                wide = part if dtype in (DType.F32, DType.F64) else space[: height * width * 4]
                _convert(wide, _wide(dtype), part, dtype)
                values = np.frombuffer(wide, _wide(dtype).value).reshape(height, width)
                values /= scales[row - top : row - top + height, np.newaxis] if bottom - top > 1 else scales[0]
                _convert(part, dtype, wide, _wide(dtype))
                bits = np.frombuffer(part, unit)
                bits[bits == minus_zero] = 0
                position += len(part)


class BlockScale(_Scales, frozen=True):
    """The scales float32 `[rows / block, columns / block]` of a matrix of whole blocks, which is read once for them.

    Raises `IncompatibleInputs` for a NaN or an infinity, which no scale brings into eight bits.
    """

    label: str
    block: int

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if len(source.shape) != 2 or source.dtype not in SCALED or any(n % self.block for n in source.shape):
            raise IncompatibleInputs(f"{escape(self.label)} is {source}: no matrix of blocks of {self.block}")
        return TensorSpec(DType.F32, (source.shape[0] // self.block, source.shape[1] // self.block))

    def _scales(self, source: LazyTensor, read: Evaluator) -> bytes:
        import numpy as np

        dtype, (rows, columns) = source.spec.dtype, source.spec.shape
        unit = np.dtype(f"<u{dtype.itemsize}")
        largest = np.zeros((rows // self.block, columns // self.block), unit)
        step = max(1, max(_BLOCK, source.grain // dtype.itemsize) // max(1, columns))
        for top in range(0, rows, step):
            height = min(step, rows - top)
            with read.scratch(height * columns * dtype.itemsize) as buffer:
                read(source, top * columns * dtype.itemsize, buffer)
                magnitudes = np.frombuffer(buffer, unit).reshape(height, -1, self.block)
                magnitudes &= unit.type((1 << (dtype.bits - 1)) - 1)
                np.maximum.at(largest, np.arange(top, top + height) // self.block, magnitudes.max(axis=2))
        _refuse_odd(largest, dtype, self.label)
        scales = _floats(largest.data.cast("B"), dtype).astype(np.float32).reshape(largest.shape)
        is_empty = scales == 0
        scales /= np.float32(_LARGEST)
        np.maximum(scales, np.finfo(np.float32).smallest_normal, out=scales)
        scales[is_empty] = 1
        return scales.tobytes()


class BlockUnscale(Op, frozen=True):
    """A matrix over the scales of its blocks, in float32."""

    block: int

    @property
    def scratch_nbytes(self) -> int:
        return _PIECE * 8

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        source, scale = inputs
        if scale != TensorSpec(DType.F32, tuple(n // self.block for n in source.shape)):
            raise IncompatibleInputs(f"{scale} cannot be the scales of {source}")
        return TensorSpec(DType.F32, source.shape)

    def grain(self, tensor: LazyTensor) -> int:
        source = tensor.inputs[0]
        return max(1, source.grain // source.spec.dtype.itemsize) * DType.F32.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        source, scale = tensor.inputs
        dtype, columns = source.spec.dtype, tensor.spec.shape[1]
        first, stop, width_nbytes = start // 4, (start + len(out)) // 4, 4 * scale.spec.shape[1]
        top, bottom = first // columns // self.block, -(-stop // (columns * self.block))
        with read.scratch((bottom - top) * width_nbytes) as held:
            read(scale, top * width_nbytes, held)
            scales = np.frombuffer(held, np.float32).reshape(bottom - top, -1).copy()
        with read.scratch((stop - first) * dtype.itemsize) as buffer:
            read(source, first * dtype.itemsize, buffer)
            if dtype is DType.F32:
                out[:] = buffer
            else:
                convert(out, DType.F32, buffer, dtype)
        position = 0
        for row, height, column, width in _areas(first, stop, columns, _PIECE):
            values = np.frombuffer(out[position : position + 4 * height * width], np.float32).reshape(height, width)
            of_rows = scales[np.arange(row, row + height) // self.block - top]
            values /= np.repeat(of_rows, self.block, axis=1)[:, column : column + width]
            position += 4 * height * width


def _refuse_odd(largest: Array, dtype: DType, label: str) -> None:
    """Refuse NaNs and infinities among magnitudes, as bits."""
    if (largest > FORMATS[dtype].largest).any():
        raise IncompatibleInputs(
            f"{escape(label)} holds a NaN or an infinity: no scale brings that into float8_e4m3fn",
            hint=f"--keep {escape(label)} leaves it as it is",
        )


def _areas(start: int, stop: int, columns: int, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Elements `[start, stop)` of a matrix in areas of at most `limit`: row, height, column and width.

    An area is some whole rows, or a part of one, so that its elements lie next to each other.
    """
    while start < stop:
        row, column = divmod(start, columns)
        whole = min(stop - start, limit) // columns if not column else 0
        height, width = (whole, columns) if whole else (1, min(columns - column, stop - start, limit))
        yield row, height, column, width
        start += height * width


def _wide(dtype: DType) -> DType:
    """The type to compute in."""
    return DType.F64 if dtype is DType.F64 else DType.F32


def _convert(out: memoryview, new: DType, source: memoryview, old: DType) -> None:
    """`out = source`, which is the same memory where the types are the same."""
    if new is not old:
        convert(out, new, source, old)


def _floats(data: memoryview, dtype: DType) -> Array:
    """Numbers in the type to compute in, in memory of their own."""
    import numpy as np

    values = np.empty(len(data) // dtype.itemsize, _wide(dtype).value)
    convert(values.data.cast("B"), _wide(dtype), data, dtype)
    return values


def scaled_fp8(tensor: LazyTensor, strategy: Strategy, label: str) -> tuple[LazyTensor, LazyTensor]:
    """A matrix in float8_e4m3fn, with what that loses of `x / scale` counted under `label`; and its scales."""
    scale = LazyTensor.make(Scale(strategy, label), tensor)
    unscaled = LazyTensor.make(Unscale(), tensor, scale)
    return counted_cast(unscaled, DType.F8_E4M3, label, "saturate"), scale


def block_fp8(tensor: LazyTensor, block: int, label: str) -> tuple[LazyTensor, LazyTensor]:
    """A matrix of whole blocks in float8_e4m3fn, its loss counted as by `scaled_fp8`; and its scales in float32."""
    scale = LazyTensor.make(BlockScale(label, block), tensor)
    unscaled = LazyTensor.make(BlockUnscale(block), tensor, scale)
    return counted_cast(unscaled, DType.F8_E4M3, label, "saturate"), scale
