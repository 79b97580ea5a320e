"""Small integers out of the words that hold them: a byte for each, so that arithmetic knows no packing.

Sources: compressed-tensors 0.20 (`pack_to_int32`) and 0.17, autoawq 0.2.9 (`packing_utils`), bitsandbytes 0.50, hqq
0.2.8 (`BitPack`), optimum-quanto 0.2.7 (`packed.py`), mlx 0.32 (`mx.quantize`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.numbers.bitpack import unpack_columns
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Order = Literal["low", "high", "padded"]
"""low: a row is one stream of bits, the lowest first, and codes cross words. high: nibbles, the upper one first.
padded: each word of 32 bits holds as many whole codes as fit, the lowest first."""
AWQ = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where in a word of autoawq's gemm layout its eight columns begin, in their order."""
_PIECE = 1 << 17
"""Codes that are taken out at once: few enough to stay in a core's cache."""
_HELD = 8
"""Tensors that are held at once: those of two modules."""


class Codes(Op, frozen=True):
    """The codes `[..., columns]` in rows of packed words `[..., words]` of any integer type; uint8.

    Raises `IncompatibleInputs` for rows that are too short.
    """

    bits: int
    columns: int
    order: Order = "low"

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        row_bits = 8 * source.dtype.nbytes(source.shape[-1] if source.shape else 0)
        per_word = 32 // self.bits
        needed = 32 * -(-self.columns // per_word) if self.order == "padded" else self.columns * self.bits
        if source.dtype.is_float or not 0 < self.bits <= 8 or not 0 < needed <= row_bits:
            raise IncompatibleInputs(f"{source} holds no rows of {self.columns} codes of {self.bits} bits")
        return TensorSpec(DType.U8, (*source.shape[:-1], self.columns))

    def _row_nbytes(self, tensor: LazyTensor) -> int:
        source = tensor.inputs[0].spec
        return source.dtype.nbytes(source.shape[-1])

    def is_stream(self, tensor: LazyTensor) -> bool:
        """Whether codes follow each other through all rows, so that any whole bytes can be looked at alone."""
        is_whole = 8 * self._row_nbytes(tensor) == self.columns * self.bits or tensor.spec.numel == self.columns
        return is_whole and self.bits in (2, 4, 8) and self.order != "padded"

    def grain(self, tensor: LazyTensor) -> int:
        # Of a stream the codes of two bytes, because nibbles are taken out of words of 16 bits.
        return 16 // self.bits if self.is_stream(tensor) else self.columns

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        if self.is_stream(tensor):
            for first in range(0, len(out), _PIECE):
                part = out[first : first + _PIECE]
                begin = (start + first) * self.bits // 8
                with read.scratch(-(-len(part) * self.bits // 8)) as buffer:
                    read(source, begin, buffer)
                    codes = _unpack(np.frombuffer(buffer, np.uint8).reshape(1, -1), self.bits, self.order)
                    np.frombuffer(part, np.uint8)[:] = codes[0, : len(part)]
            return
        width, step = self._row_nbytes(tensor), max(1, _PIECE // self.columns)
        target = np.frombuffer(out, np.uint8).reshape(-1, self.columns)
        with read.scratch(min(step, len(target)) * width) as buffer:
            for top in range(0, len(target), step):
                part_rows = target[top : top + step]
                rows = buffer[: len(part_rows) * width]
                read(source, (start // self.columns + top) * width, rows)
                words = np.frombuffer(rows, np.uint8).reshape(-1, width)
                part_rows[:] = _unpack(words, self.bits, self.order)[:, : self.columns]


def _unpack(rows: Array, bits: int, order: Order) -> Array:
    """The codes in rows of bytes uint8 `[n, nbytes]`, all that are there: uint8 `[n, columns]`."""
    import numpy as np

    count, nbytes = rows.shape
    mask = (1 << bits) - 1
    if order == "padded":
        words = np.ascontiguousarray(rows).view("<u4")
        codes = np.empty((count, words.shape[1], 32 // bits), np.uint8)
        for i in range(codes.shape[2]):
            codes[:, :, i] = words >> np.uint32(i * bits) & np.uint32(mask)
        return codes.reshape(count, -1)
    if bits == 8:
        return rows
    if bits == 4:
        pairs = rows.astype(np.uint16)
        other = pairs << np.uint16(4 if order == "low" else 8)
        if order == "high":
            pairs >>= np.uint16(4)
        pairs |= other
        pairs &= np.uint16(0x0F0F)
        return pairs.view(np.uint8).reshape(count, 2 * nbytes)
    if bits == 2:
        padded = np.pad(rows, ((0, 0), (0, -nbytes % 4)))
        return unpack_columns(padded.view(np.int32), bits)[:, : nbytes * 4]
    # Eight codes are `bits` bytes, which make one number of 64 bits.
    padded = np.pad(rows, ((0, 0), (0, -nbytes % bits))).reshape(count, -1, bits)
    wide = np.zeros((*padded.shape[:2], 8), np.uint8)
    wide[..., :bits] = padded
    numbers = wide.view("<u8")[..., 0]
    codes = np.empty((*numbers.shape, 8), np.uint8)
    for i in range(8):
        codes[..., i] = numbers >> np.uint64(i * bits) & np.uint64(mask)
    return codes.reshape(count, -1)


class RowCodes(Op, frozen=True):
    """The codes in words `[r, columns]`, each of which holds those of several rows at the bits `shifts`; uint8.

    Row i of the words becomes the rows `i * len(shifts) + k`, as autoawq and GPTQ pack, or (`planes`) the rows
    `k * r + i`, as hqq and quanto do.
    """

    bits: int
    shifts: tuple[int, ...]
    planes: bool = False

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if len(source.shape) != 2 or source.dtype.is_float or max(self.shifts) + self.bits > source.dtype.bits:
            raise IncompatibleInputs(f"{source} holds no codes of {self.bits} bits at {list(self.shifts)}")
        return TensorSpec(DType.U8, (source.shape[0] * len(self.shifts), source.shape[1]))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes * (1 if self.planes else len(self.shifts)))

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        (height, columns), width = source.spec.shape, source.spec.row_nbytes
        unit, mask = np.dtype(f"<u{source.spec.dtype.itemsize}"), (1 << self.bits) - 1
        target = np.frombuffer(out, np.uint8).reshape(-1, columns)
        row, count = start // columns, len(self.shifts)
        step = max(1, _PIECE // columns)
        with read.scratch(min(step, height) * width) as buffer:
            while len(target):
                plane, first = divmod(row, height) if self.planes else (0, row // count)
                rows = min(step, height - first, len(target) if self.planes else len(target) // count)
                part = buffer[: rows * width]
                read(source, first * width, part)
                words = np.frombuffer(part, unit).reshape(rows, columns)
                if self.planes:
                    target[:rows] = words >> unit.type(self.shifts[plane]) & unit.type(mask)
                    done = rows
                else:
                    for k, shift in enumerate(self.shifts):
                        target[k : rows * count : count] = words >> unit.type(shift) & unit.type(mask)
                    done = rows * count
                row, target = row + done, target[done:]


class Held(Op, frozen=True):
    """Its input, computed once as a whole and kept while it is in work: for what every row of a weight needs again."""

    held_nbytes: int

    @property
    def scratch_nbytes(self) -> int:
        return self.held_nbytes

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return inputs[0]

    def grain(self, tensor: LazyTensor) -> int:
        return tensor.spec.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        kept: dict[LazyTensor, memoryview] = read.running.setdefault("held", {})
        if tensor not in kept:
            while len(kept) >= _HELD:
                del kept[next(iter(kept))]
            kept[tensor] = memoryview(read.whole(tensor.inputs[0]))
        out[:] = kept[tensor][start : start + len(out)]
        if start + len(out) == tensor.nbytes:
            del kept[tensor]  # rows are asked for in their order: whatever comes next is of another weight


def held(tensor: LazyTensor) -> LazyTensor:
    """`tensor`, computed once."""
    return LazyTensor.make(Held(tensor.nbytes), tensor)


class FastCodes(Op, frozen=True):
    """The codes `[n, k]` in the words int16 `[n / 4, k]` of autoawq's gemv_fast layout; uint8.

    Four rows and 64 columns are 64 words, row by row; of each 32 columns the place `8 a + 4 d + e` holds column
    `8 e + 2 a + d`. Source: `pack_intweight` of autoawq 0.2.9.
    """

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if len(source.shape) != 2 or source.dtype is not DType.I16 or source.shape[1] % 64:
            raise IncompatibleInputs(f"{source} is not packed for gemv_fast")
        return TensorSpec(DType.U8, (4 * source.shape[0], source.shape[1]))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, 4 * tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        columns = tensor.spec.shape[1]
        with read.scratch(len(out) // 2) as buffer:
            read(tensor.inputs[0], start // 2, buffer)
            codes = _unpack(np.frombuffer(buffer, np.uint8).reshape(1, -1), 4, "low")
        ordered = codes.reshape(-1, columns // 64, 4, 2, 4, 2, 4).transpose(0, 2, 1, 3, 6, 4, 5)
        np.frombuffer(out, np.uint8).reshape(ordered.shape)[:] = ordered
