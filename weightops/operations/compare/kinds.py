"""What kind of change a pair of tensors shows: exact tests first, then where the change is, then what it is like."""

from __future__ import annotations

import math
from collections.abc import Callable

from weightops.operations.compare.entries import Entry
from weightops.operations.compare.measure import Measured
from weightops.operations.compare.report import Extreme, Head, Kind, Row, Side, TensorChange
from weightops.ops.measures.difference import Part, TensorDifference

_MAX_STEPS = 1.0
"""In the root mean square: rounding to nearest gives 0.29, GPTQ a little more, other weights several."""
_FEW_ROWS = 0.05
_LEAST_ROWS = 16
_EXPLAINED = 0.8
"""The share of a change that has to be gone when A is scaled; less than all, because the result was rounded."""
_LEAST_SCALED = 16
_SHOWN_ROWS = 32

Words = Callable[[str, int], str | None]
"""The token that a row of a tensor, by its key, stands for."""


def change_of(measured: Measured, words: Words) -> TensorChange:
    """A pair as it is reported."""
    pair, found = measured.pair, measured.found
    is_tied = measured.is_repeated or (pair.first.is_alias and pair.second.is_alias)
    if found is None:
        kind: Kind = "identical" if measured.is_same_bytes else "not-numbers"
        return TensorChange(
            kind=kind,
            a=_side(pair.first, 0, 0),
            b=_side(pair.second, 0, 0),
            elements=pair.a.spec.numel,
            relative=0.0 if measured.is_same_bytes else None,
            angle=0.0 if measured.is_same_bytes else None,
            is_tied=is_tied,
        )
    kind = _kind(measured, found)
    is_by_row = kind == "rows" or (pair.added_a or pair.added_b) or found.changed_rows <= _few(found)
    shown = found.listed_rows[:_SHOWN_ROWS] if is_by_row else ()
    return TensorChange(
        kind=kind,
        a=_side(pair.first, found.nan_a, found.infinite_a),
        b=_side(pair.second, found.nan_b, found.infinite_b),
        elements=found.elements,
        changed=found.changed,
        flips=found.flips,
        relative=_finite(found.relative),
        angle=found.angle,
        largest=_largest(found, pair.a.spec.shape),
        first_odd=None if found.first_odd is None else place(found.first_odd, pair.a.spec.shape),
        scale=found.scale if kind == "scaled" else None,
        rank=measured.rank if kind == "low-rank" else None,
        stable_rank=measured.stable_rank if kind == "low-rank" else None,
        steps=found.steps if found.stepped and not _is_equal(found) else None,
        within_half_step=found.within_half / found.stepped if found.stepped and not _is_equal(found) else None,
        changed_rows=found.changed_rows,
        n_rows=found.rows,
        rows=tuple(Row(row=p.number, change=p.change, token=words(pair.key, p.number)) for p in shown),
        n_heads=len(found.heads),
        heads=tuple(map(_head, _changed(found))) if kind == "heads" else (),
        moved_from=measured.moved_from,
        added_a=pair.added_a,
        added_b=pair.added_b,
        is_tied=is_tied,
    )


def place(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The indices of an element by its number."""
    found = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        found.append(rest)
    return tuple(reversed(found))


def _side(entry: Entry, nan: int, infinite: int) -> Side:
    spec = entry.tensor.spec
    return Side(
        name=entry.name, dtype=spec.dtype, shape=spec.shape, form=entry.form or None, nan=nan, infinite=infinite
    )


def _is_equal(found: TensorDifference) -> bool:
    return not found.changed


def _kind(measured: Measured, found: TensorDifference) -> Kind:
    exact = _exact(found)
    if exact is not None:
        return exact
    if measured.moved_from is not None:
        return "moved"
    if found.changed == found.odd:
        return "not-finite"
    heads = _changed(found)
    if heads and 2 * len(heads) <= len(found.heads) and _fills_heads(measured, found, len(heads)):
        return "heads"
    if found.rows >= _LEAST_ROWS and 0 < found.changed_rows <= _few(found):
        return "rows"
    if found.elements >= _LEAST_SCALED and found.explained >= _EXPLAINED:
        return "scaled"
    return "low-rank" if measured.rank is not None else "broad"


def _exact(found: TensorDifference) -> Kind | None:
    """What can be told for certain."""
    if found.is_same_bytes:
        return "identical"
    if _is_equal(found):
        return "equal"
    if found.is_cast or found.is_cast_of_b:
        return "cast" if found.is_cast else "cast-of-b"
    return "quantised" if found.stepped and found.steps <= _MAX_STEPS else None


def _changed(found: TensorDifference) -> list[Part]:
    return [head for head in found.heads if head.change]


def _fills_heads(measured: Measured, found: TensorDifference, count: int) -> bool:
    """Whether at least half of the rows of the changed heads changed; of columns nothing is known."""
    if measured.pair.axis == "columns":
        return found.changed_rows > _few(found)
    return 2 * found.changed_rows >= count * (found.rows // len(found.heads))


def _few(found: TensorDifference) -> int:
    return max(1, int(_FEW_ROWS * found.rows))


def _head(part: Part) -> Head:
    return Head(head=part.number, change=part.change, scale=part.scale if part.explained >= _EXPLAINED else None)


def _largest(found: TensorDifference, shape: tuple[int, ...]) -> Extreme | None:
    if found.max_index is None or found.max_a is None or found.max_b is None:
        return None
    return Extreme(abs=found.max_abs, at=place(found.max_index, shape), a=found.max_a, b=found.max_b)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
