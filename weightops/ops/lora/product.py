"""Products of low-rank factors, block by block: in float32 with the bits of torch's whole product, or exact.

float64 gives the same bits on every machine, by error-free splitting (Ozaki, Ogita, Oishi, Rump: Error-free
transformations of matrix multiplication by using fast routines, Numerical Algorithms 59, 2012): the factors are cut
into slices of so few bits that sums of products are exact in any order, and the products of slices are added in a fixed
order. What is left out lies below the rounding errors that float64 makes anyway with terms of that size.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.libtorch import convert, matmul
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Shape = tuple[int, ...]
_WHOLE_NBYTES = 4 << 20
_KEPT = 4
MAX_THREADS = 4
"""Blocks that are computed at once at most."""
_SLICES = 3
_MAX_LENT_NBYTES = 64 << 20


class Part(msgspec.Struct, frozen=True):
    """One pair of factors: A `[r, in]` and B `[out, r]`.

    `is_transposed`: the weight is `[in, out]`, not `[out, in]`. `rounds_change`: the change is rounded to the weight's
    dtype before it is added. `has_magnitude`: a vector `[out]` follows the factors, the norms of the rows (DoRA).
    `experts`: the factors are those of so many experts, A `[experts * r, in]` with one after the other and B
    `[out, r * experts]` with theirs in turn; the weight is `[experts, ...]`, or that of one, `expert`, whose rows are
    those of B from `first_row` on.
    """

    scale: float
    is_transposed: bool = False
    rounds_change: bool = False
    has_magnitude: bool = False
    experts: int = 1
    expert: int | None = None
    first_row: int = 0

    @property
    def n_inputs(self) -> int:
        """The tensors that it needs."""
        return 3 if self.has_magnitude else 2

    def check(self, weight: TensorSpec, a: TensorSpec, b: TensorSpec, *magnitude: TensorSpec) -> None:
        """Raise `IncompatibleInputs` unless the factors fit the weight and each other."""
        if not self._fits(weight.shape, a.shape, b.shape, [vector.shape for vector in magnitude]):
            raise IncompatibleInputs(f"the factors {a} and {b} do not fit {weight}")

    def _fits(self, weight: _Shape, a: _Shape, b: _Shape, magnitude: Sequence[_Shape]) -> bool:
        if (len(a), len(b)) != (2, 2) or len(weight) not in (2, 3):
            return False
        *groups, out, width = weight
        if self.is_transposed:
            out, width = width, out
        if not (a[0] == b[1] > 0 == a[0] % self.experts and a[1] == width and all(m == (out,) for m in magnitude)):
            return False
        if self.expert is None:
            return b[0] == out and groups == ([self.experts] if self.experts > 1 or groups else [])
        is_one = not groups and not self.is_transposed and 0 <= self.expert < self.experts
        return is_one and 0 <= self.first_row <= b[0] - out

    def held_nbytes(self, weight: TensorSpec, a: TensorSpec, b: TensorSpec, wide: DType, is_whole: bool) -> int:
        """Memory for the factors and the blocks of their product that are in work at once."""
        *_, rows, columns = weight.shape
        height = rows if is_whole else block_height(rows, columns, a.shape[0] // self.experts, self.is_transposed)
        products = min(rows, height + height // 2) * columns * (1 if is_whole else MAX_THREADS + 1)
        copies = 2 * _SLICES if wide is DType.F64 else 2
        return ((a.numel + b.numel) * copies + products * (2 if wide is DType.F64 else 1)) * wide.itemsize


class Memory:
    """Arrays that are lent, to several threads, and used again: fresh pages cost more than most passes over them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[NDArray[Any]] = []

    def take(self, count: int, dtype: DType) -> NDArray[Any]:
        """An array of so many elements, whatever their values."""
        import numpy as np

        nbytes = count * dtype.itemsize
        with self._lock:
            found = next((i for i, array in enumerate(self._free) if array.nbytes >= nbytes), None)
            array = np.empty(nbytes, dtype=np.uint8) if found is None else self._free.pop(found)
        return array[:nbytes].view(dtype.value)

    def give(self, *arrays: NDArray[Any]) -> None:
        """Take arrays back."""
        with self._lock:
            owners = [array.base for array in arrays if array.base is not None]
            self._free += [owner for owner in owners if owner.nbytes <= _MAX_LENT_NBYTES]
            self._free.sort(key=len)


class Work:
    """What is kept of one tensor while it is in work: its factors, and the products of a block that was begun."""

    def __init__(self, parts: Sequence[Part], wide: DType, is_whole: bool, tensor: LazyTensor, read: Evaluator) -> None:
        self.parts, self.wide, self.tensor = parts, wide, tensor
        self.memory: Memory = read.running.setdefault("lora memory", Memory())
        *_, self.rows, self.columns = tensor.spec.shape
        inputs = split_inputs(parts, tensor.inputs[1:])
        self.vectors = [wide_values(vector, wide, read) for _, _, *more in inputs for vector in more]
        self._factors = [find_factors(a, b, p, wide, read) for p, (a, b, *_) in zip(parts, inputs, strict=True)]
        heights = [block_height(self.rows, self.columns, f.rank, p.is_transposed) for p, f in self._pairs]
        self._height = self.rows if is_whole else max(heights)
        self._begun: dict[int, list[NDArray[Any]]] = {}

    @property
    def _pairs(self) -> list[tuple[Part, Factors]]:
        return list(zip(self.parts, self._factors, strict=True))

    def block(self, row: int) -> tuple[int, int]:
        """From where to where the block goes that holds `row`; the last takes in a short rest."""
        height, begin = self._height, row - row % self.rows
        count = max(1, (self.rows + height // 2) // height)
        number = min((row - begin) // height, count - 1)
        return begin + number * height, begin + (self.rows if number == count - 1 else (number + 1) * height)

    def pieces(self, row: int, last: int) -> list[tuple[int, int]]:
        """The rows from `row` to `last`, in parts that lie in one block each."""
        found = []
        while row < last:
            stop = min(last, self.block(row)[1])
            found.append((row, stop))
            row = stop
        return found

    def products(self, row: int) -> list[NDArray[Any]]:
        """`B @ A` of each part in the block that holds `row`, which are then lent to the caller."""
        first, stop = self.block(row)
        known = self._begun.pop(first, None)
        return known or [self._product(part, factors, first, stop) for part, factors in self._pairs]

    def put_back(self, row: int, products: Sequence[NDArray[Any]], is_done: bool) -> None:
        """Give products back, for the rest of their block if that is still to come."""
        if is_done:
            self.memory.give(*products)
        else:
            self._begun[self.block(row)[0]] = list(products)

    def forget(self, but: int) -> None:
        """Give back all products except those of the block that holds the row `but`."""
        kept = self.block(but)[0]
        for first in [first for first in self._begun if first != kept]:
            self.memory.give(*self._begun.pop(first))

    def change(self, i: int, product: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
        """The change that part `i` makes: its product times its scale, in `out` if that is not the product."""
        import numpy as np

        scale = self._factors[i].scale
        return product if scale == 1 else np.multiply(product, product.dtype.type(scale), out=out)

    def _product(self, part: Part, factors: Factors, first: int, stop: int) -> NDArray[Any]:
        """`B @ A` in the rows from `first` to `stop`."""
        group, first = divmod(first, self.rows)
        stop, skipped = stop - group * self.rows, part.first_row
        if factors.height * self.columns * 4 <= _WHOLE_NBYTES and not part.is_transposed:
            first, stop = 0, factors.height  # small enough to be computed whole, whatever part of it is wanted
        else:
            first, stop, skipped = first + skipped, stop + skipped, 0
        rows, columns = slice(first, stop), slice(None)
        if part.is_transposed:
            rows, columns = columns, rows
        shape = (self.columns, stop - first) if part.is_transposed else (stop - first, self.columns)
        product = self.memory.take(shape[0] * shape[1], self.wide).reshape(shape)
        factors.multiply(product, group if part.expert is None else part.expert, rows, columns, self.memory)
        return product.T if part.is_transposed else product[skipped:]


class Factors:
    """A and B of each expert: slices `[experts, r, in]` and `[experts, out, r]`, one of each in float32.

    `scale` is what their products are still to be multiplied by. A power of two is put into B where that changes only
    exponents: where no product, and no last bit of one, comes near to the ends of float32.
    """

    def __init__(self, a: NDArray[Any], b: NDArray[Any], scale: float) -> None:
        self._a, self._b, self.scale = [a], [b], scale
        _, self.height, self.rank = b.shape
        mantissa, exponent = math.frexp(scale)
        if a.dtype == "float32" and abs(mantissa) == 0.5 and abs(exponent) < 12 and _is_tame(a) and _is_tame(b):
            self._b, self.scale = [b * b.dtype.type(scale)], 1.0
        if a.dtype == "float64":
            bits = (53 - (a.shape[1] - 1).bit_length()) // 2
            self._a, self._b = split(a, 1, bits), split(b, 2, bits)

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        """Which slices are multiplied, the smallest products first."""
        pairs = [(i, j) for i in range(len(self._b)) for j in range(len(self._a)) if i + j < _SLICES]
        return sorted(pairs, key=lambda pair: (-sum(pair), pair))

    def multiply(self, out: NDArray[Any], expert: int, rows: slice, columns: slice, memory: Memory) -> None:
        """`out = B[expert, rows] @ A[expert, :, columns]`."""
        (i, j), *others = self._pairs
        matmul(out, self._b[i][expert, rows], self._a[j][expert, :, columns])
        if others:
            term = memory.take(out.size, DType(str(out.dtype))).reshape(out.shape)
            for i, j in others:
                matmul(term, self._b[i][expert, rows], self._a[j][expert, :, columns])
                out += term
            memory.give(term)


def split(values: NDArray[Any], axis: int, bits: int) -> list[NDArray[Any]]:
    """Float64 values as a sum of slices, each of `bits` bits from the largest number along `axis` downward."""
    import numpy as np

    slices: list[NDArray[Any]] = []
    rest = values
    while not slices or (len(slices) < _SLICES and rest.any()):
        exponents = np.frexp(np.abs(rest).max(axis=axis, keepdims=True, initial=0.0))[1]
        anchor = np.ldexp(0.75, exponents + (53 - bits))
        top = (rest + anchor) - anchor
        slices.append(np.ascontiguousarray(top))
        rest = rest - top
    return slices


def block_height(rows: int, columns: int, rank: int, is_transposed: bool) -> int:
    """How many rows of a product are computed at once.

    Blocks of 192 or 384 rows from the first on, the last with a rest of less than half of that, have the bits of the
    whole product, or of its columns where the weight is transposed: MKL works on 24 or 48 of them at a time, and
    otherwise on a few that are left. A small product is computed whole.
    """
    height = 192 if rank <= 512 and not is_transposed else 384
    return max(rows, 1) if rows * columns * 4 <= _WHOLE_NBYTES or rows < height else height


def split_inputs(parts: Sequence[Part], inputs: Sequence[LazyTensor]) -> list[tuple[LazyTensor, ...]]:
    """The inputs of each part."""
    found, taken = [], 0
    for part in parts:
        found.append(tuple(inputs[taken : taken + part.n_inputs]))
        taken += part.n_inputs
    return found


def find_factors(a: LazyTensor, b: LazyTensor, part: Part, wide: DType, read: Evaluator) -> Factors:
    """The factors in `wide`, kept for the next tensors: those of experts serve many."""
    known: OrderedDict[object, Factors] = read.running.setdefault("lora factors", OrderedDict())
    key = (a, b, part.scale, wide)
    if key not in known:
        left, right = (wide_values(t, wide, read).reshape(t.spec.shape) for t in (a, b))
        left = left.reshape(part.experts, -1, left.shape[1])
        right = right.reshape(len(right), -1, part.experts).transpose(2, 0, 1)
        known[key] = Factors(left, right.copy(), part.scale)
        while len(known) > _KEPT:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _is_tame(values: NDArray[Any]) -> bool:
    """Whether all are 0 or such that the last bits of products of two are above 2^-136, and sums of them below 2^80."""
    import numpy as np

    sizes = np.abs(values)
    return bool(((sizes == 0) | ((sizes >= 2.0**-44) & (sizes <= 2.0**28))).all())


def wide_values(tensor: LazyTensor, wide: DType, read: Evaluator) -> NDArray[Any]:
    """All values of a small tensor, flat; of float64 ones those of float32, in which peft keeps factors."""
    import numpy as np

    values = np.empty(tensor.spec.numel, dtype=np.float32)
    with read.scratch(tensor.nbytes) as buffer:
        read(tensor, 0, buffer)
        to_wider(memory_of(values), DType.F32, buffer, tensor.spec.dtype)
    return values.astype(wide.value, copy=False)


def memory_of(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return memoryview(array.reshape(-1).view("uint8"))  # type: ignore[arg-type]  # numpy's arrays are buffers


def to_wider(out: memoryview, wide: DType, source: memoryview, dtype: DType) -> None:
    """`out = source` in a wider type, or the same; nothing if both are one memory."""
    if wide is not dtype:
        convert(out, wide, source, dtype)
    elif out is not source:
        out[:] = source


def to_narrower(out: memoryview, dtype: DType, source: memoryview, wide: DType) -> None:
    """`out = source` in a narrower type or the same, rounded once to the nearest; torch rounds float64 twice."""
    import numpy as np

    if wide is not DType.F64 or dtype is DType.F32:
        to_wider(out, dtype, source, wide)
        return
    values = np.frombuffer(source, dtype=np.float64)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    # Rounding to odd first: as there are bits to spare, the second rounding then is as if it were the only one.
    bits, is_odd = rounded.view(np.uint32), rounded != values
    bits -= np.abs(rounded) > np.abs(values)
    bits |= is_odd
    convert(out, dtype, memory_of(rounded), DType.F32)


def round_to(array: NDArray[Any], dtype: DType) -> None:
    """Round the values of a contiguous array to those of a narrower type."""
    import numpy as np

    wide, memory = DType(str(array.dtype)), memory_of(array)
    small = memory_of(np.empty(array.size * dtype.itemsize, dtype=np.uint8))
    to_narrower(small, dtype, memory, wide)
    convert(memory, wide, small, dtype)
