"""What tensors in the block types of ggml stand for, as numbers.

Arithmetic is that of ggml in C and of gguf in numpy, to the bit: float32 in a fixed order, no two roundings in one (as
fused multiplications do), and rounded once more where another dtype is asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.ggml import blocks, grids
from weightops.ops.libtorch import convert
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

_UNPACK = blocks.UNPACK | grids.UNPACK
_PIECE = 1 << 17
"""Elements that are worked on at once: few enough for a core's own cache, and many enough for its calls."""
_VECTORS = 1024
"""Elements that torch must convert together: see the design's grain of arithmetic."""
_ROUNDED_BEFORE = 1 + 2.0**-4
"""Scales are rounded to 16 bits, which for the largest value of a block may be as much."""


class BlockValues(Op, frozen=True):
    """The values of a tensor in any of ggml's block types, as `dtype`, a floating-point type. The shape stays.

    With `steps` it is how far each value is from the next that its group can have, which is about twice what rounding
    has lost. Types whose values are not evenly spaced have none.

    Raises `IncompatibleInputs` for other types.
    """

    steps: bool = False
    dtype: DType = DType.F32

    @property
    def scratch_nbytes(self) -> int:
        return 16 * _PIECE

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if source.dtype not in _UNPACK:
            raise IncompatibleInputs(f"{source} has no blocks that are read here")
        if not self.dtype.is_float or self.dtype.is_packed:
            raise IncompatibleInputs(f"values of {source.dtype.value} are no {self.dtype.value}")
        if self.steps and not has_steps(source.dtype):
            raise IncompatibleInputs(f"values of {source.dtype.value} are not evenly spaced")
        return TensorSpec(self.dtype, source.shape)

    def grain(self, tensor: LazyTensor) -> int:
        """A block, or as many as the input's grain and torch's vectors need."""
        (source,) = tensor.inputs
        count, nbytes = source.spec.dtype.block
        elements = math.lcm(nbytes, source.grain) // nbytes * count
        if self.dtype is not DType.F32:
            elements = math.lcm(elements, _VECTORS)
        return elements * self.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        dtype, itemsize = source.spec.dtype, self.dtype.itemsize
        count, nbytes = dtype.block
        first, total = start // itemsize // count, len(out) // itemsize // count
        piece = min(_PIECE // count, total)
        in_place = self.dtype is DType.F32
        with (
            read.scratch(total * nbytes) as stored,
            read.scratch(piece * count) as codes,
            read.scratch(0 if in_place else piece * count * 4) as numbers,
            np.errstate(all="ignore"),
        ):
            read(source, first * nbytes, stored)
            packed = np.frombuffer(stored, np.uint8).reshape(-1, nbytes)
            unpacked = np.frombuffer(codes, np.uint8).reshape(-1, count)
            for at in range(0, total, piece):
                part = packed[at : at + piece]
                target = out[at * count * itemsize : (at + len(part)) * count * itemsize]
                memory = target if in_place else numbers[: len(part) * count * 4]
                values = np.frombuffer(memory, np.float32).reshape(-1, count)
                scales = _UNPACK[dtype](part, unpacked[: len(part)])
                if self.steps:
                    _fill_steps(values, scales.factors)
                else:
                    _fill_values(values, unpacked[: len(part)], scales, dtype)
                if not in_place:
                    convert(target, self.dtype, memory, DType.F32)


def has_steps(dtype: DType) -> bool:
    """Whether the values of each group of a block type are evenly spaced."""
    return dtype in blocks.EVEN


def _fill_values(values: Floats, codes: Bytes, scales: blocks.Scales, dtype: DType) -> None:
    import numpy as np

    np.copyto(values, codes.view(np.int8))  # codes without a sign are below 128
    factors, minima, offsets = scales
    if dtype is DType.Q1_0:  # +d or -d, and of NaN its sign is changed like that of numbers
        bits = values.view(np.uint32)
        bits &= np.uint32(0x80000000)
        bits ^= factors.view(np.uint32)
        return
    groups = values.reshape(len(values), factors.shape[1], -1)
    np.multiply(groups, factors[..., None], out=groups)
    if minima is not None:
        np.subtract(groups, minima[..., None], out=groups)
    if offsets is not None:
        np.add(groups, offsets[..., None], out=groups)


def _fill_steps(values: Floats, factors: Floats) -> None:
    import numpy as np

    groups = values.reshape(len(values), factors.shape[1], -1)
    groups[:] = (np.abs(factors) * np.float32(_ROUNDED_BEFORE))[..., None]
