"""Casts that count what they lose, and say what becomes of numbers that are too large for the new type.

A few passes over each piece of a block find everything while it is in the core's cache: the bits of the results tell
what is infinite, subnormal or zero, and a cast back what has changed. Only the largest relative error needs divisions,
and only where it could still grow: half a unit in the last place over the significand is the most that a number can
lose within the normal range, so that after the first block few elements are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from weightops.errors import IncompatibleInputs, UsageError
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.elementwise import Cast
from weightops.ops.libtorch import convert
from weightops.ops.measures.loss_table import SHORT, SPACE_NBYTES, WORDS, Table, convert_short
from weightops.ops.numbers.float_formats import FORMATS, Format, largest_number, sign_of, strip_signs
from weightops.ops.numbers.ranges import values_of
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Overflow = Literal["refuse", "saturate", "inf"]
"""What becomes of finite numbers that, rounded, are beyond the new type's largest: an error, that largest number, or
infinity. float8_e4m3fn has no infinity: infinities are too large for it as well, and `inf` gives NaN, as the OCP
8-bit floating point specification has it for conversions that do not saturate."""

_PIECE = 1 << 19
"""Elements that are worked on at once. Fewer would fit into a core's cache, but calls so short that threads wait for
Python between them cost more."""
_SPACE_NBYTES = 26 * _PIECE
_E4M3_TIE = 464.0
"""Half way from 448, the largest float8_e4m3fn, to the next number that there would be. It rounds to 448."""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """What a cast did to the elements of a tensor, counted.

    `changed` are no longer the same number, NaNs apart. `overflowed` were finite and are infinite (NaN in a type
    without infinity); `saturated` were too large for the new type, and are its largest number; `flushed` were not zero
    and are; `subnormal` lie below the new type's normal range; `nan` and `infinite` were so before.
    `max_relative_error` is over those that were not too large, in the precision of float32 (of float64 if the old or
    the new type is that).
    """

    elements: int = 0
    changed: int = 0
    overflowed: int = 0
    saturated: int = 0
    flushed: int = 0
    subnormal: int = 0
    nan: int = 0
    infinite: int = 0
    max_relative_error: float = 0.0

    @property
    def too_large(self) -> int:
        """Numbers that did not fit."""
        return self.overflowed + self.saturated

    def __add__(self, other: Loss) -> Loss:
        counts = {name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__[:-1]}
        return Loss(**counts, max_relative_error=max(self.max_relative_error, other.max_relative_error))


class Counting:
    """An op that counts what it loses under its `label`: `running` has how far it came, and the `Loss` until there."""

    __slots__ = ()
    label: str


class CountedCast(Cast, Counting, frozen=True):
    """A cast whose loss is added up under `label` as it streams by from start to end.

    Without `on_overflow` every bit is torch's. Raises `IncompatibleInputs` for a number that is too large when
    `on_overflow` is "refuse".
    """

    label: str
    on_overflow: Overflow | None = None

    @property
    def scratch_nbytes(self) -> int:
        return max(_SPACE_NBYTES, SPACE_NBYTES)

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        if self.dtype not in FORMATS:
            raise UsageError(f"{escape(self.label)}: cannot count what a cast to {self.dtype.value} loses")
        return super().spec(*inputs)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        (source,) = tensor.inputs
        old, new = source.spec.dtype, self.dtype
        if old in SHORT and new.bits <= old.bits:
            self._fill_from_words(tensor, start, out, read)
            return
        position, loss = read.running.get(tensor, (0, Loss()))
        with read.scratch(len(out) // new.itemsize * old.itemsize) as buffer, read.scratch(_SPACE_NBYTES) as memory:
            read(source, start // new.itemsize * old.itemsize, buffer)
            space = _Space(memory, old, new)
            for before, after in zip(_pieces(buffer, old), _pieces(out, new), strict=True):
                convert(after, new, before, old)
                loss += self._settle(before, after, loss.max_relative_error, space)
        if start == position:
            read.running[tensor] = start + len(out), loss

    def _fill_from_words(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        (source,) = tensor.inputs
        old, new = source.spec.dtype, self.dtype
        position, loss = read.running.get(tensor, (0, Loss()))
        table = _table(old, new, self.on_overflow)
        with read.scratch(len(out) // new.itemsize * 2) as buffer, read.scratch(SPACE_NBYTES) as memory:
            read(source, start // new.itemsize * 2, buffer)
            counts, space = np.frombuffer(memory, np.int64, WORDS), memory[8 * WORDS :]
            counts[:] = 0
            words = np.frombuffer(buffer, np.uint16)
            plain, changed = table.count(words, counts, space, loss.max_relative_error)
            if new in SHORT and not counts[table.masks["nan"]].any():
                convert_short(out, new, buffer, old, space)
            else:
                convert(out, new, buffer, old)
            if self.on_overflow == "refuse" and counts[table.too_large].any():
                lost = table.too_large & (counts != 0)
                raise self._refusal(table.values[lost], int(counts[lost].sum()))
            if counts[table.patched].any():
                results = np.frombuffer(out, f"<u{new.itemsize}")
                np.take(table.results, words, out=results, mode="clip")
            if start == position:
                loss += Loss(elements=plain, changed=changed) + Loss(**table.counted(counts))
                read.running[tensor] = start + len(out), loss

    def _settle(self, before: memoryview, after: memoryview, known: float, space: _Space) -> Loss:
        """Treat what is too large among the results `after`, and count what they have lost.

        `known` is the largest relative error so far; smaller ones need not be found.
        """
        import numpy as np

        old, new = space.old, self.dtype
        form, results = FORMATS[new], np.frombuffer(after, space.unit)
        magnitudes, mask = space.magnitudes[: results.size], space.mask[: results.size]
        strip_signs(results, new, magnitudes)
        first_odd = form.largest + (new is not DType.F8_E4M3)
        odd = _Odd()
        if magnitudes.max(initial=0) >= first_odd:
            odd = self._settle_odd(before, results, np.flatnonzero(magnitudes >= first_odd), space)
        small = int(np.count_nonzero(np.less(magnitudes, space.unit.type(form.normal), out=mask)))
        zeros = results.size - int(np.count_nonzero(magnitudes)) if small else 0
        changed = flushed = 0
        if not (old in FORMATS and old.bits < new.bits):  # for then every number of the old type is one of the new
            x, back = space.widened(before, old, space.x), space.widened(after, new, space.back)
            changed = int(np.count_nonzero(np.not_equal(x, back, out=mask))) - odd.nan
            flushed = zeros - int(np.count_nonzero(np.equal(x, 0, out=mask))) if zeros else 0
            if flushed:
                known = 1.0  # the largest relative error that there is
            elif changed and known < 1:
                if odd.places is not None:
                    back[odd.places] = x[odd.places]
                known = max(known, _largest_error(x, back, form, known, small > 0, space))
        return Loss(
            elements=results.size,
            changed=changed,
            overflowed=odd.overflowed,
            saturated=odd.saturated,
            flushed=flushed,
            subnormal=small - zeros,
            nan=odd.nan,
            infinite=odd.infinite,
            max_relative_error=known,
        )

    def _settle_odd(self, before: memoryview, results: Array, at: Array, space: _Space) -> _Odd:
        """Treat and count the results at `at`, which are infinite, NaN, or the largest of float8_e4m3fn."""
        import numpy as np

        largest, unit = space.unit.type(FORMATS[self.dtype].largest), space.unit.type
        values = space.gathered(before, at)
        nan, infinite = np.isnan(values), np.isinf(values)
        beyond, bits = ~nan & ~infinite, largest if self.on_overflow == "saturate" else None
        lost = beyond
        if self.dtype is DType.F8_E4M3:
            with np.errstate(over="ignore", invalid="ignore"):
                beyond &= np.abs(values.astype(np.float32)) > _E4M3_TIE
            lost = beyond | infinite
            bits = largest + unit(1) if self.on_overflow == "inf" else bits
        if lost.any() and self.on_overflow == "refuse":
            raise self._refusal(values[lost], int(np.count_nonzero(lost)))
        sign = unit(sign_of(self.dtype))
        if bits is not None:
            results[at[lost]] = np.where(np.signbit(values[lost]), sign | bits, bits)
        held = results[at] & ~sign == largest
        return _Odd(
            overflowed=int(np.count_nonzero(beyond & ~held)),
            saturated=int(np.count_nonzero(lost & held)),
            nan=int(np.count_nonzero(nan)),
            infinite=int(np.count_nonzero(infinite)),
            places=at[nan | infinite | beyond],
        )

    def _refusal(self, values: Array, number: int) -> IncompatibleInputs:
        import numpy as np

        name, found, largest = self.dtype.value, np.abs(values).max(), largest_number(self.dtype)
        count = f"at least {number} values are" if number > 1 else "at least one value is"
        return IncompatibleInputs(
            f"{escape(self.label)}: {count} too large for {name}: the largest so far is {found:.9g}, "
            f"that of {name} is {largest:.9g}",
            hint=f"give --on-overflow saturate or inf, --keep {escape(self.label)}, or a type with a wider range "
            "such as bfloat16",
        )


class _Odd(NamedTuple):
    """What was counted of results that are not numbers in range, and where the relative error does not count."""

    overflowed: int = 0
    saturated: int = 0
    nan: int = 0
    infinite: int = 0
    places: Array | None = None


class _Space:
    """Memory for the work on one piece, and the types in it."""

    def __init__(self, memory: memoryview, old: DType, new: DType) -> None:
        import numpy as np

        self.old, self.unit = old, np.dtype(f"<u{new.itemsize}")
        self.wide = DType.F64 if DType.F64 in (old, new) else DType.F32
        wide = np.dtype(self.wide.value)
        types: tuple[np.dtype[Any], ...] = (wide, wide, self.unit, np.dtype(bool), np.dtype(bool))
        places = (0, 8, 16, 24, 25)
        arrays = (np.frombuffer(memory, t, _PIECE, p * _PIECE) for t, p in zip(types, places, strict=True))
        self.x, self.back, self.magnitudes, self.mask, self.other = arrays

    def widened(self, data: memoryview, dtype: DType, target: Array) -> Array:
        """Numbers as float32 or float64, either of which holds them all: in place, or converted into `target`."""
        import numpy as np

        if dtype is self.wide:
            return np.frombuffer(data, dtype.value)
        target = target[: len(data) // dtype.itemsize]
        if dtype.itemsize == 1:
            np.take(_numbers(dtype, self.wide), np.frombuffer(data, np.uint8), out=target, mode="clip")
        elif (dtype, self.wide) == (DType.BF16, DType.F32):
            np.left_shift(np.frombuffer(data, np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
        else:
            convert(target.data.cast("B"), self.wide, data, dtype)
        return target

    def gathered(self, data: memoryview, at: Array) -> Array:
        """The old numbers at some places, as float32 or float64."""
        import numpy as np

        picked = np.frombuffer(data, f"u{self.old.itemsize}")[at]
        return self.widened(picked.data.cast("B"), self.old, np.empty(at.size, self.wide.value))


@cache
def _table(old: DType, new: DType, on_overflow: Overflow | None) -> Table:
    """What a cast from a 16-bit type makes of each word, by the rules for pieces of any type."""
    import numpy as np

    words = np.arange(WORDS, dtype=np.uint16)
    before, after = words.data.cast("B"), memoryview(bytearray(WORDS * new.itemsize))
    convert(after, new, before, old)
    unit, form = np.dtype(f"<u{new.itemsize}"), FORMATS[new]
    results = np.frombuffer(after, unit)
    plain, magnitudes = results.copy(), np.empty(WORDS, unit)
    space = _Space(memoryview(bytearray(_SPACE_NBYTES)), old, new)
    strip_signs(results, new, magnitudes)
    places = np.flatnonzero(magnitudes >= form.largest + (new is not DType.F8_E4M3))
    x, odd = _numbers(old, DType.F32), np.isin(np.arange(WORDS), places)
    nan, infinite = np.isnan(x), np.isinf(x)
    beyond = odd & ~nan & ~infinite
    if new is DType.F8_E4M3:
        beyond &= np.abs(x) > _E4M3_TIE
    too_large = beyond | (odd & infinite) if new is DType.F8_E4M3 else beyond
    if on_overflow != "refuse":
        CountedCast(new, "", on_overflow)._settle_odd(before, results, places, space)
    strip_signs(results, new, magnitudes)
    y = space.widened(after, new, np.empty(WORDS, np.float32))
    changed = (x != y) & ~nan
    held = too_large & (magnitudes == form.largest)
    with np.errstate(all="ignore"):
        errors = np.abs((y - x) / x)
    errors[~changed | beyond | infinite] = 0
    masks = {
        "changed": changed,
        "overflowed": beyond & ~held,
        "saturated": held,
        "flushed": (y == 0) & (x != 0),
        "subnormal": (magnitudes > 0) & (magnitudes < form.normal),
        "nan": nan,
        "infinite": infinite,
    }
    return Table.make(x, results, results != plain, too_large, masks, errors)


def _pieces(data: memoryview, dtype: DType) -> Iterator[memoryview]:
    step = _PIECE * dtype.itemsize
    return (data[start : start + step] for start in range(0, len(data), step))


@cache
def _numbers(dtype: DType, wide: DType) -> Array:
    """What each word of 8 or 16 bits stands for. Looking bytes up is several times as fast as torch's conversion."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        return values_of(dtype).astype(wide.value)


def _largest_error(x: Array, y: Array, form: Format, known: float, small: bool, space: _Space) -> float:
    """The largest relative error of `y`, the rounded `x`, if it is above `known`. Overwrites `y` and the magnitudes.

    Within the normal range a significand from 1 to 2 loses at most `half = 2**-precision`. One that rounds to
    `1 + 4 * half` or more is at least `1 + 3 * half`, so that once `half / (1 + 3 * half)` is known, only those matter
    that round to 1 or the next above. Subnormal results (`small`: there are some, or zeros) can lose more.
    """
    import numpy as np

    half = 2.0**-form.precision
    rounded_twice = space.wide is DType.F64 and form.precision < FORMATS[DType.F32].precision
    most = half * (1 + 2.0**-12) if rounded_twice else half  # torch takes float64 by way of float32
    if known >= most / (1 + 3 * half) and x.size % 8 == 0:
        magnitudes, unit = space.magnitudes[: x.size], space.unit.type
        mask, other = space.mask[: x.size], space.other[: x.size]
        np.less_equal(magnitudes, unit(form.normal), out=mask)
        if known < x.dtype.type(most / (1 + half)):
            np.bitwise_and(magnitudes, unit(form.normal - 1), out=magnitudes)
            np.less_equal(magnitudes, unit(1), out=other)
            mask = np.bitwise_or(mask, other, out=mask) if small else other
        at = np.flatnonzero(mask.view(np.uint64))  # eight at once: finding each of many costs more than dividing
        x, y = x.reshape(-1, 8)[at].ravel(), y.reshape(-1, 8)[at].ravel()
    with np.errstate(all="ignore"):
        y -= x
        y /= x
    return max(float(np.fmax.reduce(y, initial=0)), -float(np.fmin.reduce(y, initial=0)))


def counted_cast(tensor: LazyTensor, dtype: DType, label: str, on_overflow: Overflow | None = None) -> LazyTensor:
    """`tensor` in `dtype`, with what that loses counted under `label`; itself when it is so already."""
    return tensor if tensor.spec.dtype is dtype else LazyTensor.make(CountedCast(dtype, label, on_overflow), tensor)


def losses_of(tensors: Iterable[LazyTensor], read: Evaluator) -> dict[str, Loss]:
    """What the last op that counts of each of these tensors has lost, by label; one that several share counts once."""
    losses: dict[str, Loss] = {}
    for node in dict.fromkeys(node for tensor in tensors for node in _last_casts(tensor)):
        if isinstance(node.op, Counting) and node in read.running:
            losses[node.op.label] = losses.get(node.op.label, Loss()) + read.running[node][1]
    return losses


def _last_casts(tensor: LazyTensor) -> Iterator[LazyTensor]:
    if isinstance(tensor.op, Counting):
        yield tensor
    else:
        for source in tensor.inputs:
            yield from _last_casts(source)
