"""What the values of a tensor are like: extremes, moments, and how many there are of each kind and magnitude.

Words of up to 16 bits are counted, all of them in one pass, and everything follows from the counts. Of wider ones the
top 16 bits are counted, which hold sign and exponent; their extremes and moments are computed from the numbers.

Counts and extremes are exact. Mean and standard deviation are computed in float64: pieces of 64 Ki elements, cut at
multiples of that, are merged in order (Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for
computing sample variances"). They lie within 1e-12 of the greatest magnitude of the exact ones, and for 16 bits and
fewer do not depend on where blocks begin.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from weightops.errors import UsageError
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.measures.counting import PIECE as COUNTED_PIECE
from weightops.ops.measures.counting import count_all, count_words
from weightops.ops.numbers.ranges import SMALLEST_NORMAL, values_of
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PIECE = 1 << 16
_MANY = 1 << 22
_CANCELS = 1e-3
_MAX_ROW_NBYTES = 1 << 20
_COMPLEX = (DType.C32, DType.C64, DType.C128)

_MANTISSA_BITS_ON_TOP = {DType.F32: 7, DType.F64: 4}
"""Those among the top 16 bits."""


class TensorStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What the values of a tensor are like.

    `nan`, `infinite`, `zero` (of either sign) and `subnormal` are numbers of elements. `histogram[e]` is that of the
    others with `2**e <= abs(x) < 2**(e + 1)`, so that all these add up to `elements`. `minimum`, `maximum`, `mean` and
    `std` (of the population) are over finite elements, and None where there are none or float64 overflows.
    `zero_rows`: rows that are zero throughout, where they were asked for.
    """

    elements: int
    nan: int = 0
    infinite: int = 0
    zero: int = 0
    subnormal: int = 0
    minimum: int | float | None = None
    maximum: int | float | None = None
    mean: float | None = None
    std: float | None = None
    zero_rows: int | None = None
    histogram: dict[int, int] = {}

    def __add__(self, other: TensorStatistics) -> TensorStatistics:
        """Those of the elements of both, as if they were one tensor; `zero_rows` only where both know them."""
        ours, theirs = (each.elements - each.nan - each.infinite for each in (self, other))
        lows = [each.minimum for each in (self, other) if each.minimum is not None]
        highs = [each.maximum for each in (self, other) if each.maximum is not None]
        moments = [(n, each.mean, each.std) for n, each in ((ours, self), (theirs, other)) if n]
        mean, std = _joined(moments)
        has_rows = self.zero_rows is not None and other.zero_rows is not None
        return TensorStatistics(
            elements=self.elements + other.elements,
            nan=self.nan + other.nan,
            infinite=self.infinite + other.infinite,
            zero=self.zero + other.zero,
            subnormal=self.subnormal + other.subnormal,
            minimum=min(lows, default=None),
            maximum=max(highs, default=None),
            mean=mean,
            std=std,
            zero_rows=(self.zero_rows or 0) + (other.zero_rows or 0) if has_rows else None,
            histogram=dict(Counter(self.histogram) + Counter(other.histogram)),
        )

    @property
    def absmax(self) -> int | float | None:
        """The greatest finite magnitude."""
        return None if self.minimum is None or self.maximum is None else max(abs(self.minimum), abs(self.maximum))

    @property
    def is_constant(self) -> bool:
        """Whether all elements are one finite number; so is zero of both signs."""
        return self.minimum is not None and self.minimum == self.maximum and not self.nan and not self.infinite

    def to_note(self) -> dict[str, float]:
        """The same as numbers by name, as an evaluator notes them."""
        document = {name: getattr(self, name) for name in self.__struct_fields__ if name != "histogram"}
        return {k: v for k, v in document.items() if v is not None} | {
            f"2^{exponent}": count for exponent, count in self.histogram.items()
        }

    @classmethod
    def from_note(cls, note: Mapping[str, float]) -> TensorStatistics:
        """The inverse of `to_note`."""
        histogram = {int(name[2:]): count for name, count in note.items() if name.startswith("2^")}
        fields = {name: number for name, number in note.items() if not name.startswith("2^")}
        return msgspec.convert({**fields, "histogram": histogram}, cls)


def _joined(parts: Sequence[tuple[int, float | None, float | None]]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of all elements, from number, mean and deviation of each part; None if not known."""
    known = [(n, mean, std) for n, mean, std in parts if mean is not None and std is not None]
    if not known or len(known) < len(parts):
        return None, None
    total = sum(n for n, _, _ in known)
    mean = sum(n / total * each for n, each, _ in known)
    # `hypot` does not overflow where squares do.
    return mean, math.hypot(*(math.sqrt(n / total) * x for n, each, std in known for x in (std, each - mean)))


def has_statistics(dtype: DType) -> bool:
    """Whether the elements of this type are numbers that lie in bytes of their own."""
    return not dtype.is_packed and dtype not in _COMPLEX


class Statistics(Op, frozen=True):
    """Its input, whose `TensorStatistics` are noted under `label` once it has streamed by from start to end.

    `rows`: count the rows that are zero as well, for matrices of floating-point numbers with rows of up to 1 MiB.
    """

    label: str
    rows: bool = False

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        (source,) = inputs
        if not has_statistics(source.dtype):
            raise UsageError(f"{source.dtype.value} has no statistics: its elements are no numbers of whole bytes")
        return source

    def _counts_rows(self, spec: TensorSpec) -> bool:
        wanted = self.rows and len(spec.shape) == 2 and spec.dtype in SMALLEST_NORMAL
        return wanted and 0 < spec.row_nbytes <= _MAX_ROW_NBYTES

    def grain(self, tensor: LazyTensor) -> int:
        grain = super().grain(tensor)
        return math.lcm(grain, tensor.spec.row_nbytes) if self._counts_rows(tensor.spec) else grain

    @property
    def scratch_nbytes(self) -> int:
        return 2 * COUNTED_PIECE * 8 + (1 << 16) * 8

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        read(tensor.inputs[0], start, out)
        spec = tensor.spec
        state: _Narrow | _Wide = read.running.get(tensor) or _new(spec)
        if start != state.position * spec.dtype.itemsize:
            return
        read.running[tensor] = state
        if self._counts_rows(spec):
            state.zero_rows = (state.zero_rows or 0) + _zero_rows(out, spec)
        state.add(out, read)
        if start + len(out) == tensor.nbytes:
            read.notes[tensor] = self.label, state.result().to_note()
            del read.running[tensor]

    def skip(self, tensor: LazyTensor, read: Evaluator) -> None:
        read.notes[tensor] = self.label, TensorStatistics(elements=0).to_note()


def statistics(tensor: LazyTensor, label: str, *, rows: bool = False) -> LazyTensor:
    """`tensor`, with its statistics noted under `label`."""
    return LazyTensor.make(Statistics(label, rows), tensor)


def _new(spec: TensorSpec) -> _Narrow | _Wide:
    return _Narrow(spec) if spec.dtype.itemsize <= 2 else _Wide(spec)


def _zero_rows(block: memoryview, spec: TensorSpec) -> int:
    """The rows of a block of whole rows that hold nothing but zeros of either sign."""
    import numpy as np

    itemsize = spec.dtype.itemsize
    words = np.frombuffer(block, dtype=f"u{itemsize}").reshape(-1, spec.shape[1])
    magnitude = words.dtype.type((1 << 8 * itemsize - 1) - 1)
    likely = np.flatnonzero((words[:, 0] & magnitude) == 0)
    return sum(1 for row in likely if not np.any(words[row] & magnitude))


def _cut(position: int, count: int, size: int) -> Iterator[slice]:
    """Slices of `count` elements, the first of which is number `position`, that end at multiples of `size`."""
    start = 0
    while start < count:
        stop = min(count, start + size - (position + start) % size)
        yield slice(start, stop)
        start = stop


class _Narrow:
    """Counts of all words of 8 or 16 bits."""

    def __init__(self, spec: TensorSpec) -> None:
        import numpy as np

        self.position = 0
        self.zero_rows: int | None = None
        self._spec = spec
        self._counts = np.zeros(1 << 8 * spec.dtype.itemsize, dtype=np.int64)

    def add(self, block: memoryview, read: Evaluator) -> None:
        """Count the next elements."""
        import numpy as np

        words = np.frombuffer(block, dtype=f"u{self._spec.dtype.itemsize}")
        with read.scratch(min(words.size, COUNTED_PIECE) * 4) as memory:
            count_all(words, self._counts, np.frombuffer(memory, np.int32), many=self._spec.numel >= _MANY)
        self.position += words.size

    def result(self) -> TensorStatistics:
        """The statistics of all elements so far."""
        import numpy as np

        dtype = self._spec.dtype
        present = np.flatnonzero(self._counts)
        counts, values = self._counts[present], values_of(dtype)[present]
        finite, nan = np.isfinite(values), np.isnan(values)
        found = TensorStatistics(
            elements=self.position,
            nan=int(counts[nan].sum()),
            infinite=int(counts[~finite & ~nan].sum()),
            zero_rows=self.zero_rows,
        )
        values, counts = values[finite], counts[finite]
        if not values.size:
            return found
        number = float if dtype.is_float else int
        mean = float((values * counts).sum() / counts.sum())
        magnitudes = np.abs(values)
        smallest = math.ldexp(1.0, SMALLEST_NORMAL.get(dtype, -200))
        normal = magnitudes >= smallest
        return msgspec.structs.replace(
            found,
            zero=int(counts[values == 0].sum()),
            subnormal=int(counts[(values != 0) & ~normal].sum()),
            minimum=number(values.min()) + 0,
            maximum=number(values.max()) + 0,
            mean=mean,
            std=math.sqrt(float(((values - mean) ** 2 * counts).sum() / counts.sum())),
            histogram=_histogram(np.frexp(magnitudes[normal])[1] - 1, counts[normal]),
        )


def _histogram(exponents: NDArray[Any], counts: NDArray[np.int64]) -> dict[int, int]:
    """Counts added up by exponent."""
    import numpy as np

    present, index = np.unique(exponents, return_inverse=True)
    total = np.zeros(present.size, dtype=np.int64)
    np.add.at(total, index, counts)
    return {int(exponent): int(count) for exponent, count in zip(present, total, strict=True) if count}


class _Wide:
    """Moments and extremes of numbers of 32 or 64 bits, and counts of their magnitudes."""

    def __init__(self, spec: TensorSpec) -> None:
        import numpy as np

        self.position = 0
        self.zero_rows: int | None = None
        self._spec = spec
        self._nan = self._infinite = self._zero = 0
        self._finite, self._mean, self._squares = 0, 0.0, 0.0
        self._minimum: float | None = None
        self._maximum: float | None = None
        self._counts = np.zeros(1 << 16 if spec.dtype.is_float else 65, dtype=np.int64)
        """By the top 16 bits; of integers by the number of bits of the magnitude."""

    def add(self, block: memoryview, read: Evaluator) -> None:
        """Take in the next elements."""
        import numpy as np

        dtype = self._spec.dtype
        values = np.frombuffer(block, dtype=dtype.value)
        for piece in _cut(self.position, values.size, COUNTED_PIECE if dtype.is_float else _PIECE):
            (self._count_floats if dtype.is_float else self._count_integers)(values[piece], read)
        with read.scratch(min(values.size, _PIECE) * 8) as memory, np.errstate(all="ignore"):
            for piece in _cut(self.position, values.size, _PIECE):
                self._measure(values[piece], np.frombuffer(memory, dtype=np.float64))
        self.position += values.size

    def _count_floats(self, values: NDArray[Any], read: Evaluator) -> None:
        import numpy as np

        size = self._spec.dtype.itemsize
        words, magnitude = values.view(f"u{size}"), (1 << 8 * size - 1) - 1
        zeros = self._counts[0] + self._counts[0x8000]
        with read.scratch(words.nbytes) as memory:
            top = np.frombuffer(memory, dtype=words.dtype)
            np.right_shift(words, 8 * size - 16, out=top)
            numbers = top.view(np.int32) if size == 4 else top.astype(np.int32)
            count_words(numbers, self._counts, many=self._spec.numel >= _MANY)
            if self._counts[0] + self._counts[0x8000] != zeros:
                np.bitwise_and(words, words.dtype.type(magnitude), out=top)
                self._zero += words.size - int(np.count_nonzero(top))

    def _count_integers(self, values: NDArray[Any], read: Evaluator) -> None:
        import numpy as np

        if values.dtype.kind == "i":
            values = np.abs(values.astype(np.int64))
        magnitudes = values.astype(np.uint64)
        high, low = ((part).astype(np.float64) for part in (magnitudes >> 32, magnitudes & 0xFFFFFFFF))
        bits = np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1])
        self._counts += np.bincount(bits, minlength=65)
        self._zero += int(np.count_nonzero(bits == 0))

    def _measure(self, values: NDArray[Any], memory: NDArray[np.float64]) -> None:
        """Merge the extremes and moments of a piece."""
        import numpy as np

        number = float if self._spec.dtype.is_float else int
        low, high = number(values.min()), number(values.max())
        if not math.isfinite(low) or not math.isfinite(high):
            finite, nan = np.isfinite(values), int(np.count_nonzero(np.isnan(values)))
            values = values[finite]
            self._nan += nan
            self._infinite += finite.size - values.size - nan
            if not values.size:
                return
            low, high = number(values.min()), number(values.max())
        self._minimum = low if self._minimum is None else min(low, self._minimum)
        self._maximum = high if self._maximum is None else max(high, self._maximum)
        exact = memory[: values.size]
        np.copyto(exact, values)
        count, mean = values.size, float(exact.sum()) / values.size
        squares = float(np.einsum("i,i->", exact, exact))
        spread = squares - count * mean * mean
        if not spread > _CANCELS * squares:
            np.subtract(exact, mean, out=exact)
            spread = float(np.einsum("i,i->", exact, exact))
        total, distance = self._finite + count, mean - self._mean
        self._mean += distance * (count / total)
        self._squares += spread + distance * distance * (self._finite * count / total)
        self._finite = total

    def result(self) -> TensorStatistics:
        """The statistics of all elements so far."""
        import numpy as np

        dtype, present = self._spec.dtype, np.flatnonzero(self._counts)
        counts, subnormal = self._counts[present], 0
        exponents = present - 1
        if dtype.is_float:
            mantissa, largest = _MANTISSA_BITS_ON_TOP[dtype], {DType.F32: 0xFF, DType.F64: 0x7FF}[dtype]
            field = present >> mantissa & largest
            subnormal = int(counts[field == 0].sum()) - self._zero
            exponents = field - largest // 2
            present = np.where((field == 0) | (field == largest), 0, 1)
        known = self._finite > 0 and math.isfinite(self._mean) and math.isfinite(self._squares)
        return TensorStatistics(
            elements=self.position,
            nan=self._nan,
            infinite=self._infinite,
            zero=self._zero,
            subnormal=subnormal,
            minimum=None if self._minimum is None else self._minimum + 0,
            maximum=None if self._maximum is None else self._maximum + 0,
            mean=self._mean if known else None,
            std=math.sqrt(self._squares / self._finite) if known else None,
            zero_rows=self.zero_rows,
            histogram=_histogram(exponents[present > 0], counts[present > 0]),
        )
