"""What codes with scales stand for: the one arithmetic of nearly all published number formats.

A weight is `(code - zero) * scale`, or `code * scale + bias`, in float32 and in this order, and rounded once to its
type. That is what transformers' FP8, compressed-tensors, MXFP4, NVFP4, bitsandbytes, autoawq and torchao compute;
MLX and quanto round the product to the type of their scales first. Codes are integers, or stand for small floats by a
table.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import convert
from weightops.ops.lora.product import memory_of
from weightops.ops.numbers.codes import Codes
from weightops.ops.numbers.ranges import small_floats, values_of
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Array = NDArray[Any]

DTYPES = (DType.F16, DType.BF16, DType.F32)
"""The types that a weight can be given."""
Role = Literal["zeros", "biases", "shifts", "g_idx", "map"]
"""What inputs beyond codes and scales are: `zeros` taken from codes before they are scaled, `biases` added to the
product and `shifts` taken from it, each with the shape of the scales; `g_idx` int32 `[columns]`, the group of each
column; `map` float32, the number that each code stands for."""
Table = Literal["", "e2m1", "e2m3", "e4m3"]
_TABLES = {"e2m1": (1, 1, 4), "e2m3": (3, 1, 6)}
"""Bits of the mantissa, bias of the exponent, and bits in all."""
_WORDS = {"scales": "scale", "zeros": "zero point", "biases": "bias", "shifts": "shift", "map": "number"}
"""What one of an input is called."""
_ROUNDED_BEFORE = 1 + 2.0**-4
_PIECE = 1 << 17
"""Weights that are computed at once: in float32 they fit into a core's cache."""


class Affine(Op, frozen=True):
    """Codes `[..., rows, columns]` of one byte with `scales`, one for each `block` of rows and columns, as numbers.

    Scales, and what has their shape, are `[..., ceil(rows / block rows), ceil(columns / block columns)]` of any float
    type. A number is `factor * ((code - offset - zero) * scale) + bias`, each step rounded to float32, and to `rounded`
    where that is given. `table` says what codes are that are neither integers nor of a float type.

    With `steps` it is the distance from each number to the next that its code could be, as `compare` needs it.
    `label` names the weight in errors. Raises `CorruptInput` for scales that are no numbers, or below zero unless
    `is_signed`, and for groups that do not exist.
    """

    label: str
    dtype: DType
    block: tuple[int, int]
    roles: tuple[Role, ...] = ()
    table: Table = ""
    offset: int = 0
    factor: float = 1.0
    bias: float = 0.0
    rounded: DType | None = None
    is_signed: bool = False
    steps: bool = False

    @property
    def scratch_nbytes(self) -> int:
        return 12 * _PIECE

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        codes, scales, *others = inputs
        if (
            len(codes.shape) < 2
            or 0 in codes.shape
            or min(self.block) < 1
            or codes.dtype.itemsize != 1
            or codes.dtype.is_packed
            or self.dtype not in DTYPES
        ):
            raise IncompatibleInputs(f"{escape(self.label)}: cannot make {self.dtype.value} of codes {codes}")
        *batch, rows, columns = codes.shape
        width = scales.shape[-1] if "g_idx" in self.roles and scales.shape else -(-columns // self.block[1])
        grid = (*batch, -(-rows // self.block[0]), width)
        for role, other in zip(("scales", *self.roles), (scales, *others), strict=True):
            shape = {"g_idx": (columns,), "map": other.shape}.get(role, grid)
            if other.shape != shape or not _is_kind(role, other.dtype):
                kind = {"g_idx": "int32", "scales": "floating-point numbers"}.get(role, "numbers")
                raise IncompatibleInputs(
                    f"{escape(self.label)}: the {role} are {other} for codes {codes}, expected {kind} {list(shape)}"
                )
        return TensorSpec(self.dtype, codes.shape)

    def _is_flat(self, tensor: LazyTensor) -> bool:
        """Whether every run of `block` columns has one scale, in the order of scales, whatever row it is in."""
        *batch, rows, columns = tensor.spec.shape
        is_one_row = rows * math.prod(batch) == 1
        return self.block[0] == 1 and "g_idx" not in self.roles and (columns % self.block[1] == 0 or is_one_row)

    def grain(self, tensor: LazyTensor) -> int:
        unit = self.block[1] if self._is_flat(tensor) else tensor.spec.shape[-1]
        return math.lcm(max(1, unit), tensor.inputs[0].grain) * self.dtype.itemsize

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        codes, itemsize, unit = tensor.inputs[0], self.dtype.itemsize, self.grain(tensor) // self.dtype.itemsize
        step = max(1, _PIECE // unit) * unit
        numbers = self._numbers(tensor, read)
        pairs = _pairs(codes, numbers)
        with read.scratch(4 * step + 4) as wide, read.scratch(step) as narrow, np.errstate(all="ignore"):
            for first in range(0, len(out) // itemsize, step):
                part = out[first * itemsize : (first + step) * itemsize]
                begin, count = start // itemsize + first, len(part) // itemsize
                values = np.frombuffer(wide[: 4 * count], np.float32)
                if pairs is not None:
                    held = -(-count // 2)
                    read(codes.inputs[0], begin // 2, narrow[:held])
                    both = np.frombuffer(wide[: 8 * held], np.uint64)
                    np.take(pairs, np.frombuffer(narrow[:held], np.uint8), out=both, mode="clip")
                else:
                    read(codes, begin, narrow[:count])
                    _widen(np.frombuffer(narrow[:count], np.uint8), codes.spec.dtype, numbers, values)
                if self.offset and not self.steps:
                    values -= np.float32(self.offset)
                compute = self._by_groups if self._is_flat(tensor) else self._by_rows
                compute(tensor, begin, values, read)
                if self.dtype is DType.F32:
                    part[:] = wide[: 4 * count]
                else:
                    convert(part, self.dtype, wide[: 4 * count], DType.F32)

    def _numbers(self, tensor: LazyTensor, read: Evaluator) -> Floats | None:
        """What each code stands for, 256 numbers, or with `steps` how far the next is; None for plain integers."""
        import numpy as np

        if "map" not in self.roles:
            return _numbers_of(self.table, tensor.inputs[0].spec.dtype, self.steps)
        given = tensor.inputs[2 + self.roles.index("map")]
        values = as_float32(read.whole(given), given.spec.dtype)
        self._check(values, "map", 0, is_magnitude=False)
        numbers = np.zeros(256, np.float32)
        numbers[: len(values)] = _gaps(values) if self.steps else values
        return numbers

    def _by_groups(self, tensor: LazyTensor, begin: int, values: Floats, read: Evaluator) -> None:
        """Compute runs of columns, each with one scale; the last run of the tensor may be shorter."""
        size = self.block[1]
        first, whole = begin // size, len(values) // size
        tail = len(values) - whole * size
        factors = {
            role: self._grid(role, given, first, whole + (tail > 0), read)
            for role, given in zip(("scales", *self.roles), tensor.inputs[1:], strict=True)
            if role != "map"
        }
        self._apply(values[: whole * size].reshape(whole, size), {n: f[:whole, None] for n, f in factors.items()})
        if tail:
            self._apply(values[whole * size :].reshape(1, tail), {n: f[whole:, None] for n, f in factors.items()})

    def _by_rows(self, tensor: LazyTensor, begin: int, values: Floats, read: Evaluator) -> None:
        """Compute whole rows: those that share scales together."""
        import numpy as np

        *_, rows, columns = tensor.spec.shape
        height, width = self.block
        grid_rows, grid_columns = tensor.inputs[1].spec.shape[-2:]
        inputs = dict(zip(("scales", *self.roles), tensor.inputs[1:], strict=True))
        groups = self._groups(inputs.get("g_idx"), grid_columns, read)
        matrix, row = values.reshape(-1, columns), begin // columns
        while len(matrix):
            batch, inner = divmod(row, rows)
            # Rows up to the end of a block, or, where each has its own scales, to the end of the matrix.
            count = min(len(matrix), (rows if height == 1 else min(rows, (inner // height + 1) * height)) - inner)
            top = batch * grid_rows + inner // height
            held = count if height == 1 else 1
            factors = {}
            for role, given in inputs.items():
                if role in ("g_idx", "map"):
                    continue
                grid = self._grid(role, given, top * grid_columns, held * grid_columns, read).reshape(held, -1)
                factors[role] = (
                    np.take(grid, groups, axis=1) if groups is not None else np.repeat(grid, width, axis=1)[:, :columns]
                )
            self._apply(matrix[:count], factors)
            matrix, row = matrix[count:], row + count

    def _groups(self, g_idx: LazyTensor | None, count: int, read: Evaluator) -> Array | None:
        import numpy as np

        if g_idx is None:
            return None
        groups = np.frombuffer(read.whole(g_idx), np.int32)
        if groups.size and not 0 <= int(groups.min()) <= int(groups.max()) < count:
            odd = int(groups.min() if groups.min() < 0 else groups.max())
            raise CorruptInput(
                f"{escape(self.label)}: g_idx names group {odd}, expected 0 to {count - 1}",
                hint="g_idx and scales are not of one module, or the file is damaged",
            )
        return groups

    def _grid(self, role: str, given: LazyTensor, first: int, count: int, read: Evaluator) -> Floats:
        """`count` of the scales, or what has their shape, from `first` on, in float32."""

        itemsize = given.spec.dtype.itemsize
        with read.scratch(count * itemsize) as buffer:
            read(given, first * itemsize, buffer)
            found = as_float32(buffer, given.spec.dtype)
        is_magnitude = role == "scales" and not self.is_signed
        self._check(found, role, first, is_magnitude)
        return found

    def _check(self, found: Floats, role: str, first: int, is_magnitude: bool) -> None:
        """Refuse what no weight can be computed from."""
        import numpy as np

        bad = ~(np.isfinite(found) & (found >= 0)) if is_magnitude else ~np.isfinite(found)
        if bad.any():
            at = int(bad.argmax())
            raise CorruptInput(
                f"{escape(self.label)}: {_WORDS[role]} {first + at} is {found[at]:g}, expected a finite number"
                + (" that is not negative" if is_magnitude else ""),
                hint="the weights cannot be computed from it: the file is damaged, or the model was never good",
            )

    def _apply(self, values: Floats, factors: dict[str, Floats]) -> None:
        """Numbers of codes to numbers of weights, in place."""
        import numpy as np

        if "zeros" in factors and not self.steps:
            values -= factors["zeros"]
            if self.rounded is not None and values.size:
                _round(values, self.rounded)
        values *= np.abs(factors["scales"]) if self.steps else factors["scales"]
        if self.factor != 1.0:
            values *= np.float32(self.factor)
        if self.steps:
            return
        if self.rounded is not None and values.size:
            _round(values, self.rounded)
        if "biases" in factors:
            values += factors["biases"]
        if "shifts" in factors:
            values -= factors["shifts"]
        if self.bias:
            values += np.float32(self.bias)


def _pairs(codes: LazyTensor, numbers: Floats | None) -> Array | None:
    """The two numbers in each byte of a stream of codes of 4 bits, as one word: half as much to look up."""
    import numpy as np

    op = codes.op
    if numbers is None or not isinstance(op, Codes) or op.bits != 4 or not op.is_stream(codes):
        return None
    codes_of = np.arange(256)
    both = [numbers[codes_of & 15], numbers[codes_of >> 4]]
    return np.stack(both if op.order == "low" else both[::-1], axis=1).reshape(-1).view(np.uint64)


def _widen(words: Array, dtype: DType, numbers: Floats | None, out: Floats) -> None:
    """What each code stands for, in `out`."""
    import numpy as np

    if numbers is None:
        np.copyto(out, words.view(np.int8) if dtype is DType.I8 else words)
    elif dtype is not DType.F8_E4M3 or numbers is not _numbers_of("", dtype, False):
        np.take(numbers, words, out=out, mode="clip")
    else:
        # As the exponent and mantissa of a float16, which is 2^-8 of it; looking up takes twice as long.
        halves = words.view(np.int8).astype(np.int16)
        halves <<= 7
        halves &= np.int16(0xBFFF - 0x10000)
        convert(memory_of(out), DType.F32, memory_of(halves), DType.F16)
        out *= np.float32(256)
        nan = (words & 0x7F) == 0x7F
        if nan.any():
            out[nan] = np.nan


def _is_kind(role: str, dtype: DType) -> bool:
    """Whether an input can have this type: small integers stand for numbers too, but no scale is one."""
    if role == "g_idx":
        return dtype is DType.I32
    is_float = dtype.is_float and not dtype.is_packed and dtype.itemsize <= 4
    return is_float or (role != "scales" and dtype in (DType.I8, DType.U8))


@cache
def _numbers_of(table: Table, dtype: DType, steps: bool) -> Floats | None:
    import numpy as np

    if table in _TABLES:
        mantissa, bias, width = _TABLES[table]
        numbers = small_floats(mantissa, bias, width).astype(np.float32)
    elif table or dtype.is_float:
        with np.errstate(invalid="ignore"):  # some NaNs are signalling ones
            numbers = values_of(DType.F8_E4M3 if table else dtype).astype(np.float32)
    else:
        return np.ones(256, np.float32) if steps else None
    return _gaps(numbers) if steps else numbers


def _gaps(numbers: Floats) -> Floats:
    """From each number to the farther of its neighbours, and a little more: weights over their scales are rounded to
    16 bits before they become codes, which may push one across the middle of two."""
    import numpy as np

    known = np.unique(numbers[np.isfinite(numbers)])
    distances = np.diff(known)
    farther = np.maximum(np.append(distances, 0), np.insert(distances, 0, 0)) * np.float32(_ROUNDED_BEFORE)
    places = np.searchsorted(known, numbers).clip(0, len(known) - 1)
    gaps: Floats = farther[places].astype(np.float32)
    return gaps


def as_float32(data: memoryview | bytes, dtype: DType) -> Floats:
    """Numbers of any type of 8 to 32 bits in float32, in memory of their own."""
    import numpy as np

    if dtype.itemsize == 1 and dtype.is_float:
        numbers: Floats = values_of(dtype).astype(np.float32)[np.frombuffer(data, np.uint8)]
        return numbers
    if not dtype.is_float:
        return np.frombuffer(data, dtype.value).astype(np.float32)
    found = np.empty(len(data) // dtype.itemsize, np.float32)
    if found.size:
        convert(
            memory_of(found), DType.F32, data if isinstance(data, memoryview) else memoryview(bytearray(data)), dtype
        )
    return found


def _round(values: Floats, dtype: DType) -> None:
    """Round numbers to a type of 16 bits, in place."""
    import numpy as np

    narrow = np.empty(values.size, np.uint16)
    flat = np.ascontiguousarray(values).reshape(-1)
    convert(memory_of(narrow), dtype, memory_of(flat), DType.F32)
    convert(memory_of(flat), DType.F32, memory_of(narrow), dtype)
    if not np.shares_memory(flat, values):
        values[:] = flat.reshape(values.shape)


class ScalesOverOne(Op, frozen=True):
    """Scales of any float type over, or (`is_factor`) times, one number of float32, in float32: those of NVFP4.

    compressed-tensors stores a divisor, modelopt a factor; either result is rounded to float32.
    """

    label: str
    is_factor: bool = False

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        scales, one = inputs
        if one.numel != 1 or not one.dtype.is_float or not scales.dtype.is_float:
            raise IncompatibleInputs(f"{escape(self.label)}: {one} is no scale of the scales {scales}")
        return TensorSpec(DType.F32, scales.shape)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        scales, one = tensor.inputs
        itemsize = scales.spec.dtype.itemsize
        number = as_float32(read.whole(one), one.spec.dtype)[0]
        if not np.isfinite(number) or number <= 0:
            raise CorruptInput(
                f"{escape(self.label)}: its scale of scales is {number:g}, expected a finite number above zero",
                hint="it was not calibrated, or the file is damaged",
            )
        with read.scratch(len(out) // 4 * itemsize) as buffer:
            read(scales, start // 4 * itemsize, buffer)
            values = as_float32(buffer, scales.spec.dtype)
        operation = np.multiply if self.is_factor else np.divide
        operation(values, number, out=np.frombuffer(out, np.float32))
