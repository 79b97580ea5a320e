"""The sums from which follows how two tensors differ, block by block: see `weightops.ops.measures.difference`.

Arithmetic is done in pieces that fit into a core's cache; blocks and pieces that are the same bytes cost one look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from weightops.ops.libtorch import convert
from weightops.ops.lora.lowrank import OVERSAMPLE
from weightops.ops.lora.product import memory_of
from weightops.ops.measures.change_rank import Sketch, certain_rank, rank_of_rows
from weightops.spec import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Floats = NDArray[np.float64]

Axis = Literal["rows", "columns"]
_PIECE = 1 << 19
"""Elements that are worked on at once in float32; half as many in float64. Fewer cost more in calls than in memory."""
_LEAST, _MOST = 1e-30, 1e30
"""Sums of squares between these have no terms that float32 cannot hold, and that matter."""
_FIRST_LOOK_NBYTES, _LOOK_NBYTES = 1 << 12, 1 << 19
"""Bytes that are compared at once: few at first, because what differs mostly does so at once."""
_SAMPLE_NBYTES = 8 << 20
_FIRST_ROWS = 128
"""Rows that say how wide a sketch of the change has to be, if one is worth making."""
_HALF = 0.5 * (1 + 1e-3)
"""Half a step, and what rounding of the scale itself to 16 bits leaves."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor as rows and columns, both 0 where it has none, with heads along one of the two; rows to be sampled."""

    elements: int
    rows: int
    columns: int
    heads: int = 0
    axis: Axis = "rows"
    sample: int = 0


class Sums:
    """Sums over the elements of two tensors so far, which are given in order and in whole rows."""

    def __init__(self, layout: Layout, a: DType, b: DType, has_steps: bool) -> None:
        import numpy as np

        self.layout, self.position = layout, 0
        self.is_same_bytes = a is b
        is_both = a is not b and a.is_float and b.is_float
        self.is_cast: bool | None = True if is_both else None
        self.is_cast_of_b: bool | None = True if is_both else None
        self.counts = dict.fromkeys(("changed", "flips", "nan_a", "nan_b", "infinite_a", "infinite_b", "odd"), 0)
        self.counts |= {"stepped": 0, "within_half": 0}
        self.squared_steps = 0.0
        self.first_odd: int | None = None
        self.largest: tuple[float, int | None, float | None, float | None] = (0.0, None, None, None)
        self.products: tuple[Floats, Floats, Floats] = tuple(np.zeros(max(1, layout.rows)) for _ in range(3))  # type: ignore[assignment]
        """||a||^2, a (b - a) and ||b - a||^2 of each row, or of all."""
        by_columns = layout.heads and layout.axis == "columns"
        self._columns: list[Floats] = [np.zeros(layout.columns) for _ in range(3 if by_columns else 0)]
        is_narrow = all(dtype.is_float and dtype.bits <= 16 for dtype in (a, b)) and not has_steps
        piece = _PIECE if is_narrow else _PIECE // 2
        height = max(1, piece // layout.columns) if layout.columns else 1
        self._step = min(height * layout.columns if layout.columns else piece, max(1, layout.elements))
        self._types, self._has_steps = (a, b), has_steps
        self._unit = np.dtype(np.float32 if is_narrow else np.float64)
        self._wide: dict[Any, list[Array]] = {}
        self._narrow = np.empty(self._step, np.float32)
        self._cast = bytearray(self._step * 8)
        count = min(layout.sample, _SAMPLE_NBYTES // (8 * layout.columns)) if layout.columns else 0
        self._sampled = np.linspace(0, layout.rows - 1, count).astype(np.int64) if count else np.zeros(0, np.int64)
        self._sample = np.zeros((count, layout.columns), np.float32)
        self._sketch: Sketch | None = None
        self._wants_sketch = count > 0 and not has_steps
        """Until the first piece that changed says otherwise."""

    def add(self, a: memoryview, b: memoryview, steps: memoryview) -> None:
        """Take in the next elements."""
        sizes = [dtype.itemsize for dtype in self._types]
        for start in range(0, len(a) // sizes[0], self._step):
            stop = min(start + self._step, len(a) // sizes[0])
            parts = [data[start * size : stop * size] for data, size in zip((a, b), sizes, strict=True)]
            self._following = a[start * sizes[0] :], b[start * sizes[1] :]
            self._add(parts[0], parts[1], steps[start * 4 : stop * 4] if self._has_steps else None)
            self.position += stop - start

    def _add(self, a: memoryview, b: memoryview, steps: memoryview | None) -> None:
        """A piece: in the unit that its types allow, and in float64 where that is not enough."""
        if not self._sum_up(a, b, steps, self._unit):
            self._sum_up(a, b, steps, _float64())

    def _sum_up(self, a: memoryview, b: memoryview, steps: memoryview | None, unit: np.dtype[Any]) -> bool:
        """Take in a piece with arithmetic in `unit`; whether that was enough, else nothing has been taken in."""
        import numpy as np

        count, columns = len(a) // self._types[0].itemsize, self.layout.columns
        rows = slice(self.position // columns, (self.position + count) // columns) if columns else slice(0, 1)
        old, new, change = (each[:count] for each in self._memory(unit))
        is_exact = unit == np.float64
        with np.errstate(all="ignore"):
            self._widen(a, self._types[0], old)
            squares = self._by_rows(old, old)
            if self._types[0] is self._types[1] and is_same(a, b):
                if not np.isfinite(squares).all():
                    if not is_exact:
                        return False
                    self._set_aside(old, old)
                    squares = self._by_rows(old, old)
                self.products[0][rows] += squares
                return True
            self._widen(b, self._types[1], new)
            np.subtract(new, old, out=change)
            changes = self._by_rows(change, change)
            if not is_exact and not _is_well(squares, changes):
                return False
            self.is_same_bytes = False
            self._hold_casts(a, b, old, new)
            if not np.isfinite(squares).all() or not np.isfinite(changes).all():
                self._set_aside(old, new)
                np.subtract(new, old, out=change)
                squares, changes = self._by_rows(old, old), self._by_rows(change, change)
            sums = (squares, self._by_rows(old, change), changes)
            for total, found in zip(self.products, sums, strict=True):
                total[rows] += found
            for total, (x, y) in zip(self._columns, ((old, old), (old, change), (change, change)), strict=False):
                total += np.einsum("ij,ij->j", x.reshape(-1, columns), y.reshape(-1, columns))
            self._take_sample(rows, change)
            self._take_sketch(change)
            self._count(a, b, old, new, change)
            if steps is not None:
                self._measure_steps(np.frombuffer(steps, np.float32), change, new)
        return True

    def _memory(self, unit: np.dtype[Any]) -> list[Array]:
        """Room for three pieces of numbers."""
        import numpy as np

        if unit not in self._wide:
            self._wide[unit] = [np.empty(self._step, unit) for _ in range(3)]
        return self._wide[unit]

    def _by_rows(self, x: Array, y: Array) -> Floats:
        import numpy as np

        shape = (-1, self.layout.columns) if self.layout.rows else (1, -1)
        found: Floats = np.vecdot(x.reshape(shape), y.reshape(shape))
        return found

    def _widen(self, data: memoryview, dtype: DType, out: Array) -> None:
        import numpy as np

        if not dtype.is_float or dtype in (DType.F32, DType.F64):
            np.copyto(out, np.frombuffer(data, dtype.value))
        elif out.dtype == np.float32:
            convert(memory_of(out), DType.F32, data, dtype)
        else:
            narrow = self._narrow[: out.size] if out.size <= self._step else np.empty(out.size, np.float32)
            convert(memory_of(narrow), DType.F32, data, dtype)
            np.copyto(out, narrow)

    def _hold_casts(self, a: memoryview, b: memoryview, old: Array, new: Array) -> None:
        """See whether each of the two still is the other, cast to its type."""
        one, other = self._types
        if self.is_cast:
            self.is_cast = self._becomes(a, one, other, b, old, new)
        if self.is_cast_of_b:
            self.is_cast_of_b = self._becomes(b, other, one, a, new, old)

    def _becomes(
        self, data: memoryview, old: DType, new: DType, expected: memoryview, values: Array, wanted: Array
    ) -> bool:
        """Whether `data`, whose numbers are `values`, cast to `new` is `expected`, whose numbers are `wanted`."""
        import numpy as np

        made = memoryview(self._cast)[: len(expected)]
        if values.dtype == np.float32:  # which is faster than from 16 bits, and rounds the same
            data, old = memory_of(values), DType.F32
        convert(made, new, data, old)
        if is_same(made, expected):
            return True
        found = np.empty(wanted.size, wanted.dtype)
        self._widen(made, new, found)
        return bool(((found == wanted) | (np.isnan(found) & np.isnan(wanted))).all())

    def _set_aside(self, old: Array, new: Array) -> None:
        """Count what is not finite in either, and put zeros in its place: equal where the two are equal."""
        import numpy as np

        nan_a, nan_b, infinite_a, infinite_b = np.isnan(old), np.isnan(new), np.isinf(old), np.isinf(new)
        kinds = {"nan_a": nan_a, "nan_b": nan_b, "infinite_a": infinite_a, "infinite_b": infinite_b}
        for name, where in kinds.items():
            self.counts[name] += int(np.count_nonzero(where))
        fresh = np.flatnonzero((nan_b | infinite_b) & ~(nan_a | infinite_a))
        if self.first_odd is None and fresh.size:
            self.first_odd = self.position + int(fresh[0])
        aside = nan_a | nan_b | infinite_a | infinite_b
        unequal = int(np.count_nonzero(aside & ~((old == new) | (nan_a & nan_b))))
        self.counts["odd"] += unequal
        self.counts["changed"] += unequal
        old[aside] = 0.0
        new[aside] = 0.0

    def _count(self, a: memoryview, b: memoryview, old: Array, new: Array, change: Array) -> None:
        """Elements that changed, those that changed their sign, and the largest change."""
        import numpy as np

        one, other = self._types
        if one is other and one.bits == 64 and not one.is_float:
            words = (np.frombuffer(data, np.uint64) for data in (a, b))
            self.counts["changed"] += int(np.count_nonzero(np.not_equal(*words)))
        else:
            self.counts["changed"] += int(np.count_nonzero(np.not_equal(change, 0)))
        low, high = float(change.min()), float(change.max())
        if max(-low, high) > self.largest[0]:
            index = int(change.argmax() if high >= -low else change.argmin())
            values = float(old[index]), float(new[index])
            self.largest = (max(-low, high), self.position + index, *values)
        if all(dtype.is_float and dtype.bits == 16 for dtype in (one, other)):  # the sign is the first bit of a word
            words = (np.frombuffer(data, np.int16) for data in (a, b))
            turned = np.flatnonzero(np.bitwise_xor(*words) < 0)
        else:
            turned = np.flatnonzero(np.not_equal(np.signbit(old), np.signbit(new)))
        self.counts["flips"] += int(np.count_nonzero((old[turned] != 0) & (new[turned] != 0)))

    def _take_sample(self, rows: slice, change: Array) -> None:
        import numpy as np

        low, high = np.searchsorted(self._sampled, (rows.start, rows.stop))
        for i in range(int(low), int(high)):
            begin = (int(self._sampled[i]) - rows.start) * self.layout.columns
            self._sample[i] = change[begin : begin + self.layout.columns]

    def _take_sketch(self, change: Array) -> None:
        """Take a piece into the sketch, which begins with the first that changed: the ones before add nothing to it."""
        import numpy as np

        if self._wants_sketch:
            self._sketch, self._wants_sketch = self._begin_sketch(), False
        if self._sketch is not None:
            self._sketch.add(change.reshape(-1, self.layout.columns).astype(np.float32, copy=False))

    def _begin_sketch(self) -> Sketch | None:
        """One of a few columns more than the rank of the change in the next rows; None where that is not low."""
        import numpy as np

        columns = self.layout.columns
        found = []
        for data, dtype in zip(self._following, self._types, strict=True):
            rows = np.frombuffer(data, np.uint8).reshape(-1, columns * dtype.itemsize)
            chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _FIRST_ROWS)).astype(np.int64)]
            wide = np.empty(len(chosen) * columns, self._unit)
            self._widen(memory_of(chosen), dtype, wide)
            found.append(wide)
        change = (found[1] - found[0]).astype(np.float32).reshape(-1, columns)
        rank = rank_of_rows(change)
        width = min(rank + OVERSAMPLE, self.layout.rows, columns)
        return Sketch(columns, width) if rank <= len(change) // 2 and Sketch.fits(columns, width) else None

    def _measure_steps(self, steps: NDArray[np.float32], change: Array, spare: Array) -> None:
        """How far the two are apart in quantisation steps; where a step is 0 there is none."""
        import numpy as np

        np.copyto(spare, steps)
        has_step = spare > 0
        np.divide(change, spare, out=spare, where=has_step)
        spare[~has_step] = 0.0
        np.abs(spare, out=spare)
        self.counts["stepped"] += int(np.count_nonzero(has_step))
        self.counts["within_half"] += int(np.count_nonzero((spare <= _HALF) & has_step))
        self.squared_steps += float(np.dot(spare, spare))

    def of_heads(self) -> tuple[Floats, Floats, Floats]:
        """As `products`, of each head."""
        import numpy as np

        if not self.layout.heads:
            return (np.zeros(0),) * 3
        sums = self._columns or self.products
        aa, ad, dd = (each.reshape(self.layout.heads, -1).sum(axis=1) for each in sums)
        return aa, ad, dd

    def leading(self, total: float) -> tuple[int, float] | None:
        """The rank of a change whose square is `total`, and its largest squared singular value, where that is certain.

        The rank is the least number of singular values that hold 99 % of the square.
        """
        if self._sketch is None:
            return None
        squares = self._sketch.squares()
        rank = certain_rank(squares, total)
        return None if rank is None else (rank, float(squares[0]))

    def sample_rank(self) -> tuple[int, int]:
        """How many singular values hold 99 % of the change in the sampled rows, and how many rows that were."""
        return rank_of_rows(self._sample), len(self._sample)


def _float64() -> np.dtype[Any]:
    """The unit in which everything can be summed up."""
    import numpy as np

    return np.dtype(np.float64)


def _is_well(squares: Floats, changes: Floats) -> bool:
    """Whether sums of squares by rows are neither so small nor so large that float32 may have lost something."""
    low, high = float(changes.sum()), max(float(squares.max()), float(changes.max()))
    return low > _LEAST and high < _MOST


def is_same(a: memoryview, b: memoryview) -> bool:
    """Whether two buffers of one length hold the same bytes."""
    import numpy as np

    whole, stop = len(a) // 8 * 8, 0
    while stop < whole:
        start, stop = stop, min(stop + (_LOOK_NBYTES if stop else _FIRST_LOOK_NBYTES), whole)
        one, other = (np.frombuffer(data[start:stop], np.uint64) for data in (a, b))
        if not np.array_equal(one, other):
            return False
    return bytes(a[whole:]) == bytes(b[whole:])
