"""The tensors of a GPTQ module made lazily: weights from packed integers, and packed integers from plain ones.

A module has K input columns in G groups and N outputs. `qweight` int32 `[K * bits / 32, N]` holds the integers q,
packed along K; `qzeros` int32 `[G, N * bits / 32]` the zero points z, packed along N; `scales` `[G, N]`; `g_idx` int32
`[K]` the group of each column. The weight `[N, K]` is `scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])`.
Source: GPTQ-for-LLaMa, AutoGPTQ 0.7 and GPTQModel 7.7, which differ in what they do with zero points (`Zeros`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.lora.product import memory_of, to_narrower, to_wider
from weightops.ops.numbers.bitpack import pack, pack_columns, period, unpack_columns
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

Zeros = Literal["as-stored", "plus-one", "wrap", "carry"]
"""What a stored zero point stands for: itself (v2), or one more (v1).

They differ in what one more than the largest is: `plus-one` gives `2**bits`, as GPTQ-for-LLaMa's kernels compute it,
and AutoGPTQ's with act-order; `wrap` 0, as AutoGPTQ's without it; `carry` adds one to every value of a word of 32 bits
at once, as GPTQModel does, which undoes its own subtraction and reaches into the next value. Of 3 bits GPTQModel 7.7
shifts each value by itself, which is `wrap`.
"""
SCALES = (DType.F16, DType.BF16, DType.F32)
INTEGERS = (DType.U8, DType.I8, DType.I32, DType.I64)
_PIECE = 1 << 18
"""Weights that are computed at once: in float32 they fit into a core's cache."""
_READ_NBYTES = 4 << 20
_MODULES = 2
"""Modules that are held at once: several where outputs of other types are made of one in turn."""
_LARGEST = {DType.F16: 65504.0}
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""One in each value of a word."""


def true_zeros(words: Array, bits: int, zeros: Zeros) -> NDArray[np.int16]:
    """The zero points `[G, N]` that the words of qzeros `[G, N * bits / 32]` stand for, from 0 to `2**bits`."""
    import numpy as np

    if zeros == "carry" and bits in _ONES:
        ones = np.uint32(_ONES[bits])
        return unpack_columns(np.ascontiguousarray(words).view(np.uint32) + ones, bits).astype(np.int16)
    found = unpack_columns(words, bits).astype(np.int16)
    if zeros != "as-stored":
        found += 1
    if zeros in ("wrap", "carry"):
        found &= (1 << bits) - 1
    return found


class TrueZeros(Op, frozen=True):
    """The zero points uint8 `[G, N]` that the words of qzeros stand for, see `true_zeros`."""

    bits: int
    zeros: Zeros

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (qzeros,) = inputs
        if len(qzeros.shape) != 2 or qzeros.dtype is not DType.I32 or qzeros.shape[1] * 32 % self.bits:
            raise IncompatibleInputs(f"{qzeros} are no packed zero points of {self.bits} bits")
        return TensorSpec(DType.U8, (qzeros.shape[0], qzeros.shape[1] * 32 // self.bits))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        row, first = source.spec.row_nbytes, start // self.grain(tensor)
        with read.scratch(len(out) // self.grain(tensor) * row) as buffer:
            read(source, first * row, buffer)
            words = np.frombuffer(buffer, np.int32).reshape(-1, source.spec.shape[1])
            np.frombuffer(out, np.uint8)[:] = true_zeros(words, self.bits, self.zeros).reshape(-1)


class Dequantize(Op, frozen=True):
    """The weight `[N, K]` of a module, from qweight, qzeros, scales and, if there is one, g_idx.

    Without g_idx column k is in group `k // group_size`. Scales of 16 bits times an integer are exact in float32, those
    of float32 in float64: each weight is rounded once, to `dtype`. The packed words of a module are held while it is
    in work (`held_nbytes`), for its outputs lie across all of them. `label` names the module in errors.
    Raises `CorruptInput` for scales that are no numbers and for groups that do not exist, `IncompatibleInputs` for
    weights beyond `dtype`.
    """

    label: str
    bits: int
    zeros: Zeros
    dtype: DType
    group_size: int
    held_nbytes: int = 0

    @property
    def scratch_nbytes(self) -> int:
        return self.held_nbytes

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        qweight, qzeros, scales, *g_idx = inputs
        (groups, outputs), columns = scales.shape, qweight.shape[0] * 32 // self.bits
        fits = (
            qweight == TensorSpec(DType.I32, (columns * self.bits // 32, outputs))
            and qzeros == TensorSpec(DType.I32, (groups, outputs * self.bits // 32))
            and scales.dtype in SCALES
            and all(index == TensorSpec(DType.I32, (columns,)) for index in g_idx)
            and (bool(g_idx) or groups * self.group_size >= columns)
        )
        if not fits:
            raise IncompatibleInputs(f"{escape(self.label)}: {qweight}, {qzeros} and {scales} are no module")
        return TensorSpec(self.dtype, (outputs, columns))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        held: dict[LazyTensor, _Module] = read.running.setdefault("gptq modules", {})
        if tensor not in held:
            while len(held) >= _MODULES:
                del held[next(iter(held))]
            held[tensor] = _Module(self, tensor, read)
        held[tensor].fill(start // self.grain(tensor), out)
        if start + len(out) == tensor.nbytes:
            del held[tensor]


class _Module:
    """A module in work: packed words as they lie in the file, groups by output."""

    def __init__(self, op: Dequantize, tensor: LazyTensor, read: Evaluator) -> None:
        import numpy as np

        self.op = op
        qweight, qzeros, scales, *g_idx = tensor.inputs
        self._outputs, self._columns = tensor.spec.shape
        self._words = _whole(qweight, read, np.int32)
        self._wide = DType.F64 if scales.spec.dtype is DType.F32 else DType.F32
        values = np.empty(scales.spec.shape, self._wide.value)
        with read.scratch(scales.nbytes) as buffer:
            read(scales, 0, buffer)
            to_wider(memory_of(values), self._wide, buffer, scales.spec.dtype)
        if not np.isfinite(values).all():
            raise CorruptInput(
                f"{escape(op.label)}.scales holds NaN or infinity, expected finite numbers",
                hint="the weights cannot be computed from it; quantise the model again",
            )
        zeros = true_zeros(_whole(qzeros, read, np.int32), op.bits, op.zeros)
        self._scales = np.ascontiguousarray(values.T)  # [N, G]
        self._zeros = np.ascontiguousarray(zeros.T).astype(self._wide.value)
        self._groups = self._group_index(_whole(g_idx[0], read, np.int32) if g_idx else None)
        self._largest = self._bound()

    def fill(self, first: int, out: memoryview) -> None:
        """The weights of the outputs from `first` on."""
        import numpy as np

        width = self._columns * self.op.dtype.itemsize
        step = max(1, _PIECE // self._columns)
        for top in range(0, len(out) // width, step):
            part = out[top * width : (top + step) * width]
            rows = slice(first + top, first + top + len(part) // width)
            codes = unpack_columns(np.ascontiguousarray(self._words[:, rows].T), self.op.bits)  # [rows, K]
            to_narrower(part, self.op.dtype, memory_of(self._weights(codes, rows)), self._wide)

    def _weights(self, codes: Array, rows: slice) -> Array:
        import numpy as np

        scales, zeros = self._scales[rows], self._zeros[rows]
        weights = np.empty(codes.shape, self._wide.value)
        if self._groups is None:
            shape = (len(codes), scales.shape[1], -1)
            grouped = weights.reshape(shape)
            np.subtract(codes.reshape(shape), zeros[:, :, None], out=grouped)
            grouped *= scales[:, :, None]
        else:
            np.subtract(codes, np.take(zeros, self._groups, axis=1), out=weights)
            weights *= np.take(scales, self._groups, axis=1)
        limit = _LARGEST.get(self.op.dtype)
        if limit is not None and self._largest > limit and np.abs(weights).max() > limit:
            raise IncompatibleInputs(
                f"{escape(self.op.label)}: a weight is {np.abs(weights).max():.9g}, {self.op.dtype.value} ends at "
                f"{limit:g}",
                hint="dequantise to bfloat16 or float32",
            )
        return weights

    def _group_index(self, g_idx: Array | None) -> Array | None:
        """The group of each column; None where all groups are of the same size and in their order."""
        import numpy as np

        groups, columns, size = self._scales.shape[1], self._columns, self.op.group_size
        if g_idx is None:
            return None if groups * size == columns else np.arange(columns) // size
        if g_idx.size and (g_idx.min() < 0 or g_idx.max() >= groups):
            odd = int(g_idx.min() if g_idx.min() < 0 else g_idx.max())
            raise CorruptInput(
                f"{escape(self.op.label)}.g_idx names group {odd}, expected 0 to {groups - 1}",
                hint="g_idx and scales are not of one module, or the file is damaged",
            )
        is_plain = columns % groups == 0 and np.array_equal(g_idx, np.arange(columns) // (columns // groups))
        return None if is_plain else g_idx.astype(np.intp)

    def _bound(self) -> float:
        """A magnitude that no weight exceeds."""
        import numpy as np

        if not self._scales.size:
            return 0.0
        reach = np.maximum(self._zeros, (1 << self.op.bits) - 1 - self._zeros)
        return float((np.abs(self._scales) * reach).max())


def _whole(tensor: LazyTensor, read: Evaluator, dtype: type[np.generic]) -> Array:
    """A tensor in memory, read in blocks and in order, as what watches it wants."""
    import numpy as np

    values = np.empty(tensor.spec.shape, dtype)
    memory = memory_of(values)
    step = max(1, _READ_NBYTES // tensor.grain) * tensor.grain
    for start in range(0, tensor.nbytes, step):
        read(tensor, start, memory[start : start + step])
    return values


class Pack(Op, frozen=True):
    """Integers `[K, N]` of an integer type as the words of qweight, int32 `[K * bits / 32, N]`.

    Raises `IncompatibleInputs` for integers below 0 or of more than `bits` bits.
    """

    label: str
    bits: int

    @property
    def scratch_nbytes(self) -> int:
        return _READ_NBYTES

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        count, words = period(self.bits)
        if len(source.shape) != 2 or source.dtype not in INTEGERS or source.shape[0] % count:
            raise IncompatibleInputs(
                f"{escape(self.label)} is {source}: expected integers [K, N], K a multiple of {count}"
            )
        return TensorSpec(DType.I32, (source.shape[0] // count * words, source.shape[1]))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, period(self.bits)[1] * tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        unit, (count, words) = self.grain(tensor), period(self.bits)
        height = count * source.spec.row_nbytes
        step = max(1, _READ_NBYTES // height)
        target = np.frombuffer(out, np.int32).reshape(-1, words, tensor.spec.shape[1])
        with read.scratch(min(step, len(target)) * height) as buffer:
            for top in range(0, len(target), step):
                part = target[top : top + step]
                memory = buffer[: len(part) * height]
                read(source, (start // unit + top) * height, memory)
                values = np.frombuffer(memory, source.spec.dtype.value).reshape(-1, source.spec.shape[1])
                part[:] = pack(as_codes(values, self.bits, self.label), self.bits).reshape(part.shape)


class PackZeros(Op, frozen=True):
    """Zero points `[G, N]` of an integer type as the words of qzeros, int32 `[G, N * bits / 32]`; v1 stores one less.

    Raises `IncompatibleInputs` for zero points that cannot be stored.
    """

    label: str
    bits: int
    is_v1: bool

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        count, words = period(self.bits)
        if len(source.shape) != 2 or source.dtype not in INTEGERS or source.shape[1] % count:
            raise IncompatibleInputs(
                f"{escape(self.label)} is {source}: expected integers [G, N], N a multiple of {count}"
            )
        return TensorSpec(DType.I32, (source.shape[0], source.shape[1] // count * words))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        row, first = source.spec.row_nbytes, start // self.grain(tensor)
        with read.scratch(len(out) // self.grain(tensor) * row) as buffer:
            read(source, first * row, buffer)
            values = np.frombuffer(buffer, source.spec.dtype.value).reshape(-1, source.spec.shape[1])
            words = pack_zeros(values, self.bits, self.is_v1, self.label)
        np.frombuffer(out, np.int32)[:] = words.reshape(-1)


class GroupIndex(Op, frozen=True):
    """g_idx `[columns]` of groups in their order: `k // group_size`."""

    columns: int
    group_size: int

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(DType.I32, (self.columns,))

    def grain(self, tensor: LazyTensor) -> int:
        return DType.I32.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        first = start // 4
        np.frombuffer(out, np.int32)[:] = np.arange(first, first + len(out) // 4) // self.group_size


def as_codes(values: Array, bits: int, label: str) -> NDArray[np.uint8]:
    """Integers of any type as uint8; raises `IncompatibleInputs` for those below 0 or of more than `bits` bits."""
    import numpy as np

    largest = (1 << bits) - 1
    least = values.min() if values.size and values.dtype.kind != "u" else 0
    if values.size and (values.max() > largest or least < 0):
        odd = int(least if least < 0 else values.max())
        raise IncompatibleInputs(
            f"{escape(label)} holds {odd}, expected 0 to {largest} for {bits} bits",
            hint="signed integers are stored with 2**(bits-1) added to them and to their zero points",
        )
    return values.astype(np.uint8, copy=False)


def pack_zeros(values: Array, bits: int, is_v1: bool, label: str) -> NDArray[np.int32]:
    """The words of qzeros `[G, N * bits / 32]` for true zero points `[G, N]`.

    Raises `IncompatibleInputs` for values of more bits, and in v1, which stores one less, for 0: readers of v1 make of
    the -1 that would be stored, or of what wraps, different numbers.
    """
    codes = as_codes(values, bits, label)
    if is_v1 and codes.size:
        if not codes.all():
            raise IncompatibleInputs(
                f"{escape(label)} holds a zero point of 0, which checkpoint_format gptq cannot store: expected 1 to "
                f"{(1 << bits) - 1}",
                hint="write checkpoint_format gptq_v2, or keep zero points above 0 when quantising",
            )
        codes = codes - 1
    return pack_columns(codes, bits)


def dequantized(
    label: str,
    parts: tuple[LazyTensor, LazyTensor, LazyTensor, LazyTensor | None],
    bits: int,
    zeros: Zeros,
    group_size: int,
    dtype: DType,
) -> LazyTensor:
    """The weight of a module from its qweight, qzeros, scales and g_idx, see `Dequantize`."""
    inputs = [part for part in parts if part is not None]
    groups = math.prod(parts[2].spec.shape)
    # Words, scales and zero points in wide form twice (as read and transposed), and a piece in work.
    held = sum(part.nbytes for part in inputs) + groups * 8 * 4 + _PIECE * 24
    return LazyTensor.make(Dequantize(label, bits, zeros, dtype, group_size, held), *inputs)
