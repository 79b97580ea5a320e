"""Small integers into the words that hold them: the inverse of `ops.numbers.codes`.

Sources: compressed-tensors 0.20 (`pack_to_int32`), autoawq 0.2.9 (`WQLinear_GEMM.from_linear`), GPTQModel 7.7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.numbers.codes import Codes, Held, RowCodes
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_PIECE = 1 << 17
"""Codes that are packed at once: few enough to stay in a core's cache."""


class Words(Op, frozen=True):
    """Codes `[..., columns]` of one byte as rows of words int32 `[..., ceil(columns * bits / 32)]`.

    A row is one stream of bits, the lowest first; what is left of its last word is 0. Codes have no more than `bits`
    bits.
    """

    bits: int

    @property
    def scratch_nbytes(self) -> int:
        return 4 * _PIECE

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (codes,) = inputs
        if not codes.shape or codes.dtype is not DType.U8 or not 0 < self.bits <= 8:
            raise IncompatibleInputs(f"{codes} are no rows of codes of {self.bits} bits")
        return TensorSpec(DType.I32, (*codes.shape[:-1], -(-codes.shape[-1] * self.bits // 32)))

    def _row_nbytes(self, tensor: LazyTensor) -> int:
        return 4 * tensor.spec.shape[-1]

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, self._row_nbytes(tensor))

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        width, columns = self._row_nbytes(tensor), source.spec.shape[-1]
        target = np.frombuffer(out, np.uint8).reshape(-1, width)
        step = max(1, _PIECE // columns)
        with read.scratch(min(step, len(target)) * columns) as buffer:
            for top in range(0, len(target), step):
                rows = target[top : top + step]
                part = buffer[: len(rows) * columns]
                read(source, (start // width + top) * columns, part)
                _pack(np.frombuffer(part, np.uint8).reshape(-1, columns), self.bits, rows)


def _pack(codes: Array, bits: int, out: Array) -> None:
    """The streams of rows of codes uint8 `[n, columns]` in `out`, uint8 `[n, nbytes]`."""
    import numpy as np

    count, columns = codes.shape
    if bits == 8:
        out[:, :columns] = codes
        out[:, columns:] = 0
        return
    # Eight codes make one number of 64 bits, whose `bits` lower bytes are theirs.
    padded = np.pad(codes, ((0, 0), (0, -columns % 8))) if columns % 8 else codes
    if bits == 4:
        stream = padded[:, 1::2] << np.uint8(4)
        stream |= padded[:, 0::2]
    else:
        numbers = np.zeros((count, padded.shape[1] // 8), np.uint64)
        for i in range(8):
            numbers |= padded[:, i::8].astype(np.uint64) << np.uint64(i * bits)
        stream = numbers.astype("<u8").view(np.uint8).reshape(count, -1, 8)[:, :, :bits].reshape(count, -1)
    n = min(stream.shape[1], out.shape[1])
    out[:, :n] = stream[:, :n]
    out[:, n:] = 0


class RowWords(Op, frozen=True):
    """Codes `[r * len(shifts), columns]` as words int32 `[r, columns]`, which hold one of each of those rows.

    The code of row `i * len(shifts) + k` is at the bits `shifts[k]` of word i. Codes have no more than `bits` bits.
    """

    bits: int
    shifts: tuple[int, ...]

    @property
    def scratch_nbytes(self) -> int:
        return 8 * _PIECE

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (codes,) = inputs
        if len(codes.shape) != 2 or codes.dtype is not DType.U8 or codes.shape[0] % len(self.shifts):
            raise IncompatibleInputs(f"{codes} are no codes in {len(self.shifts)} rows to a word")
        return TensorSpec(DType.I32, (codes.shape[0] // len(self.shifts), codes.shape[1]))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        columns, count = source.spec.shape[1], len(self.shifts)
        target = np.frombuffer(out, np.uint32).reshape(-1, columns)
        step = max(1, _PIECE // (columns * count))
        with read.scratch(min(step, len(target)) * count * columns) as buffer:
            for top in range(0, len(target), step):
                words = target[top : top + step]
                part = buffer[: len(words) * count * columns]
                read(source, (start // (4 * columns) + top) * count * columns, part)
                codes = np.frombuffer(part, np.uint8).reshape(-1, count, columns)
                words[:] = 0
                for k, shift in enumerate(self.shifts):
                    words |= codes[:, k].astype(np.uint32) << np.uint32(shift)


def words_of(codes: LazyTensor, bits: int) -> LazyTensor:
    """Rows of codes as `Words`; the words that they were taken from where those are the same."""
    op = codes.op
    if isinstance(op, Codes) and (op.bits, op.order) == (bits, "low"):
        source = codes.inputs[0]
        if source.spec.dtype is DType.I32 and source.spec.shape[-1] * 32 == op.columns * bits:
            return _kept(source)
    return LazyTensor.make(Words(bits), codes)


def row_words_of(codes: LazyTensor, bits: int, shifts: tuple[int, ...]) -> LazyTensor:
    """Codes as `RowWords`; the words that they were taken from where those are the same."""
    if codes.op == RowCodes(bits, shifts) and codes.inputs[0].spec.dtype is DType.I32:
        return _kept(codes.inputs[0])
    return LazyTensor.make(RowWords(bits, shifts), codes)


def _kept(tensor: LazyTensor) -> LazyTensor:
    """What is computed once for rows that need it again and again, where it is needed once."""
    return tensor.inputs[0] if isinstance(tensor.op, Held) else tensor
