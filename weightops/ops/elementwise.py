"""Ops that map elements to elements: arithmetic, casts, bits."""

from __future__ import annotations

import math
from typing import ClassVar

from weightops.errors import IncompatibleInputs, UsageError
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import accumulate, convert
from weightops.spec import DType, TensorSpec

_NO_ARITHMETIC = {DType.BOOL, DType.U16, DType.U32, DType.U64, DType.C32}
"""Types on which torch has no addition on CPU; 8-bit floats and packed types have none either."""


_LANES = 1024
"""Elements that torch is given together, always the same ones whatever the block. It computes in vectors of up to
64 and the last few of a run singly, and the two give NaNs other payloads."""


def has_arithmetic(dtype: DType) -> bool:
    """Whether two tensors of this type can be added."""
    return dtype not in _NO_ARITHMETIC and not (dtype.is_float and dtype.bits <= 8)


class _Arithmetic(Op, frozen=True):
    sign: ClassVar[int] = 1

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        a, b = inputs
        if a != b:
            raise IncompatibleInputs(f"cannot combine {a} with {b}")
        if not has_arithmetic(a.dtype):
            raise UsageError(f"{a.dtype.value} has no addition", hint="name another type with --dtype")
        return a

    def grain(self, tensor: LazyTensor) -> int:
        return math.lcm(super().grain(tensor), _LANES * tensor.spec.dtype.itemsize)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        dtype = tensor.spec.dtype
        left, right = tensor.inputs
        read(left, start, out)
        with read.scratch(len(out)) as buffer:
            read(right, start, buffer)
            accumulate(out, buffer, dtype, self.sign)


class Add(_Arithmetic, frozen=True):
    """`a + b` in their dtype, one rounding."""


class Subtract(_Arithmetic, frozen=True):
    """`a - b` in their dtype, one rounding."""

    sign: ClassVar[int] = -1


class Shift(Op, frozen=True):
    """Its input, float32 or float16, with `by` added to each element in its own dtype, one rounding."""

    by: float

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if source.dtype not in (DType.F32, DType.F16):
            raise UsageError(f"a number is added to float32 and float16 here, not to {source.dtype.value}")
        return source

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        read(tensor.inputs[0], start, out)
        values = np.frombuffer(out, tensor.spec.dtype.value)
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(values, values.dtype.type(self.by), out=values)


class Scale(Op, frozen=True):
    """Its input, float32, with each element multiplied by `by` in float32, one rounding."""

    by: float

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if source.dtype is not DType.F32:
            raise UsageError(f"float32 is multiplied by a number here, not {source.dtype.value}")
        return source

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        read(tensor.inputs[0], start, out)
        values = np.frombuffer(out, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(values, np.float32(self.by), out=values)


class Cast(Op, frozen=True):
    """Its input in another dtype: round to nearest even, overflow to infinity where the type has one."""

    dtype: DType

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if source.dtype.is_packed or self.dtype.is_packed:
            raise UsageError(f"cannot cast {source.dtype.value} to {self.dtype.value}")
        return TensorSpec(self.dtype, source.shape)

    def grain(self, tensor: LazyTensor) -> int:
        return math.lcm(super().grain(tensor), _LANES * tensor.spec.dtype.itemsize)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        (source,) = tensor.inputs
        old, new = source.spec.dtype, self.dtype
        with read.scratch(len(out) // new.itemsize * old.itemsize) as buffer:
            read(source, start // new.itemsize * old.itemsize, buffer)
            convert(out, new, buffer, old)


class Xor(Op, frozen=True):
    """Exclusive or of the stored bits of two tensors of one spec: its own inverse, for every dtype and every NaN."""

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        a, b = inputs
        if a != b:
            raise IncompatibleInputs(f"cannot combine the bits of {a} with {b}")
        return a

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        left, right = tensor.inputs
        read(left, start, out)
        with read.scratch(len(out)) as buffer:
            read(right, start, buffer)
            words = len(out) // 8 * 8
            for part, unit in ((slice(0, words), np.uint64), (slice(words, None), np.uint8)):
                target = np.frombuffer(out[part], dtype=unit)
                np.bitwise_xor(target, np.frombuffer(buffer[part], dtype=unit), out=target)


class Reinterpret(Op, frozen=True):
    """The same bytes under another dtype and shape."""

    dtype: DType
    shape: tuple[int, ...]

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        result = TensorSpec(self.dtype, self.shape)
        if result.nbytes != inputs[0].nbytes:
            raise IncompatibleInputs(f"{inputs[0]} has {inputs[0].nbytes} bytes, {result} has {result.nbytes}")
        return result

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        read(tensor.inputs[0], start, out)


def cast(tensor: LazyTensor, dtype: DType) -> LazyTensor:
    """`tensor` in `dtype`; itself when it is so already."""
    return tensor if tensor.spec.dtype is dtype else LazyTensor.make(Cast(dtype), tensor)


def reshaped(tensor: LazyTensor, shape: tuple[int, ...], dtype: DType | None = None) -> LazyTensor:
    """The same bytes in another shape, or as another type; itself where nothing changes."""
    made = (dtype or tensor.spec.dtype, shape)
    same = made == (tensor.spec.dtype, tensor.spec.shape)
    return tensor if same else LazyTensor.make(Reinterpret(*made), tensor)
