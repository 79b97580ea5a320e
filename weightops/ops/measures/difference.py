"""How two tensors of one shape differ, from one pass over both: by how much, where, and in what way.

Numbers are compared after both were widened, to float32 if they have up to 16 bits and else to float64: -0 equals 0,
and a NaN equals a NaN in the same place. Products are added up by row in that type, and rows in float64; that norms are
right to six digits suffices. Norms and angles are over the elements that are finite in both. Pieces that are the same
bytes are seen to be so before they are compared as numbers.

`1 - cosine` is computed as (||d||^2 - (||b|| - ||a||)^2) / (2 ||a|| ||b||) with d = b - a, where nothing cancels that
matters: small angles come out right, where a cosine would round to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.measures.difference_sums import Axis, Layout, Sums
from weightops.ops.measures.statistics import has_statistics
from weightops.spec import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_MAX_ROW_NBYTES = 1 << 20
_MAX_ROWS = 1 << 22
_ALONG = 0.95
"""The square of the cosine from which on b is a multiple of a, and something small beside."""
_LISTED_ROWS = 32
"""Rows that changed most, of which the numbers are kept."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A row or a head: its number, ||b - a|| / ||a|| (infinite where a is zero), and the c of the c a nearest to b.

    `explained` is the share of ||b - a||^2 that is gone when a is scaled by that; 0 where b is mostly something else.
    """

    number: int
    change: float
    scale: float
    explained: float


class TensorDifference(msgspec.Struct, frozen=True, kw_only=True):
    """How a tensor b differs from a tensor a.

    `is_same_bytes`: same type and same bytes. `changed` counts elements that are other numbers, `flips` those that are
    above zero in one and below in the other, `nan_a` to `infinite_b` those that are no numbers; `odd` counts what
    changed and is not finite in one of the two, which norms leave out. `norm_a` is ||a||, `norm_d` ||b - a||, `dot`
    the product of a and b - a. `max_abs` is the largest |b - a|, found at element `max_index`, where the two are
    `max_a` and `max_b`. `first_odd` is the first element that is not finite in b and was in a.
    `is_cast`: b is a, cast to b's type; `is_cast_of_b`: a is b, cast to a's type; None where types are the same or no
    floats. Of `stepped` elements that have a quantisation step, `within_half` lie within half of one of a, and `steps`
    is the root of the mean squared distance in steps.
    `changed_rows` of `rows` hold a change (a row is along the last dimension); `listed_rows` are those that changed
    most, by number. `heads` are all heads, where there are such. `sample_rank` is the least number of singular values
    that hold 99 % of the change in `sample_rows` of the rows, spread evenly. `rank` is that number for all rows, and
    `largest_square` the largest squared singular value, where one pass was enough to tell.
    """

    elements: int
    is_same_bytes: bool = False
    changed: int = 0
    flips: int = 0
    nan_a: int = 0
    nan_b: int = 0
    infinite_a: int = 0
    infinite_b: int = 0
    odd: int = 0
    first_odd: int | None = None
    norm_a: float = 0.0
    norm_d: float = 0.0
    dot: float = 0.0
    max_abs: float = 0.0
    max_index: int | None = None
    max_a: float | None = None
    max_b: float | None = None
    is_cast: bool | None = None
    is_cast_of_b: bool | None = None
    stepped: int = 0
    within_half: int = 0
    steps: float = 0.0
    rows: int = 0
    changed_rows: int = 0
    listed_rows: tuple[Part, ...] = ()
    heads: tuple[Part, ...] = ()
    sample_rank: int = 0
    sample_rows: int = 0
    rank: int | None = None
    largest_square: float = 0.0

    @property
    def relative(self) -> float:
        """||b - a|| / ||a||; infinite where a alone is zero, or float64 does not hold the norms."""
        if not math.isfinite(self.norm_a) or not math.isfinite(self.norm_d):
            return math.inf
        return self.norm_d / self.norm_a if self.norm_a else math.inf if self.norm_d else 0.0

    @property
    def norm_b(self) -> float:
        """||b||."""
        return norm_of_sum(self.norm_a, self.dot, self.norm_d)

    @property
    def angle(self) -> float | None:
        """1 - cosine; None where one of the two is zero, or float64 does not hold the norms."""
        return angle(self.norm_a, self.dot, self.norm_d)

    @property
    def scale(self) -> float:
        """The c of the c a nearest to b."""
        return 1 + self.dot / (self.norm_a * self.norm_a) if self.norm_a else 1.0

    @property
    def explained(self) -> float:
        """The share of ||b - a||^2 that is gone when a is scaled by `scale`; 0 where b is mostly something else."""
        return _explained(self.norm_a * self.norm_a, self.dot, self.norm_d * self.norm_d)

    def to_note(self) -> dict[str, float]:
        """The same as numbers by name, as an evaluator notes them."""
        parts = {"listed_rows", "heads"}
        found = {name: getattr(self, name) for name in self.__struct_fields__ if name not in parts}
        note = {name: float(value) for name, value in found.items() if value is not None}
        for name in parts:
            for part in getattr(self, name):
                note |= {f"{name}.{part.number}.{n}": getattr(part, n) for n in ("change", "scale", "explained")}
        return note

    @classmethod
    def from_note(cls, note: Mapping[str, float]) -> TensorDifference:
        """The inverse of `to_note`."""
        fields: dict[str, Any] = {}
        parts: dict[str, dict[int, dict[str, float]]] = {"listed_rows": {}, "heads": {}}
        for name, value in note.items():
            first, _, rest = name.partition(".")
            if rest:
                number, _, what = rest.partition(".")
                parts[first].setdefault(int(number), {})[what] = value
            else:
                fields[name] = bool(value) if name.startswith("is_") else value
        for name, found in parts.items():
            fields[name] = [{"number": number, **values} for number, values in found.items()]
        return msgspec.convert(fields, cls, strict=False)


def norm_of_sum(a: float, dot: float, d: float) -> float:
    """||b||, from ||a||, a (b - a) and ||b - a||."""
    return math.sqrt(max(0.0, a * a + 2 * dot + d * d))


def angle(a: float, dot: float, d: float) -> float | None:
    """1 - cosine of a and b, from ||a||, a (b - a) and ||b - a||; None where that means nothing."""
    b = norm_of_sum(a, dot, d)
    if not a or not b or not math.isfinite(a * b * d):
        return None
    longer = (2 * dot + d * d) / (a + b)  # ||b|| - ||a||
    return max(0.0, (d - longer) * (d + longer) / (2 * a * b))


class Difference(Op, frozen=True):
    """Its first input, whose `TensorDifference` to the second is noted under `label` when both have streamed by.

    The inputs have one shape, and any types that are numbers of whole bytes. A third input of the same shape, float32,
    has the quantisation steps of the second. `heads` is the number of heads that lie one after the other along the
    rows or the columns (`axis`). `sample`: rows to be looked at for the rank of the change.
    """

    label: str
    heads: int = 0
    axis: Axis = "rows"
    sample: int = 0

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        first, *others = inputs
        if any(other.shape != first.shape or not has_statistics(other.dtype) for other in inputs):
            raise IncompatibleInputs(f"cannot compare {first} with {', '.join(map(str, others))}")
        return first

    def grain(self, tensor: LazyTensor) -> int:
        itemsize = tensor.spec.dtype.itemsize
        return math.lcm(super().grain(tensor), max(1, self._layout(tensor).columns) * itemsize)

    @property
    def scratch_nbytes(self) -> int:
        return 24 << 20

    def _layout(self, tensor: LazyTensor) -> Layout:
        """Rows are along the last dimension; there are none in vectors, and in what is too wide or too high."""
        spec = tensor.spec
        columns = spec.shape[-1] if len(spec.shape) > 1 else 0
        rows = spec.numel // columns if columns else 0
        if not rows or rows > _MAX_ROWS or columns * spec.dtype.itemsize > _MAX_ROW_NBYTES:
            return Layout(spec.numel, 0, 0)
        size = rows if self.axis == "rows" else columns
        heads = self.heads if self.heads > 1 and size % self.heads == 0 else 0
        return Layout(spec.numel, rows, columns, heads, self.axis, min(self.sample, rows))

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        a, b, *steps = tensor.inputs
        read(a, start, out)
        sums: Sums | None = read.running.get(tensor)
        if sums is None:
            sums = read.running[tensor] = Sums(self._layout(tensor), a.spec.dtype, b.spec.dtype, bool(steps))
        first, count = start // a.spec.dtype.itemsize, len(out) // a.spec.dtype.itemsize
        if first != sums.position:
            return
        size = b.spec.dtype.itemsize
        with read.scratch(count * size) as other, read.scratch(count * 4 if steps else 0) as widths:
            read(b, first * size, other)
            if steps:
                read(steps[0], first * 4, widths)
            sums.add(out, other, widths)
        if start + len(out) == tensor.nbytes:
            read.notes[tensor] = self.label, _result(sums).to_note()
            del read.running[tensor]

    def skip(self, tensor: LazyTensor, read: Evaluator) -> None:
        same = tensor.inputs[0].spec == tensor.inputs[1].spec
        read.notes[tensor] = self.label, TensorDifference(elements=0, is_same_bytes=same).to_note()


def _result(sums: Sums) -> TensorDifference:
    import numpy as np

    counts = {name: int(value) for name, value in sums.counts.items()}
    with np.errstate(all="ignore"):
        aa, ad, dd = (float(total.sum()) for total in sums.products)
    sample_rank, sample_rows = sums.sample_rank()
    rank, largest_square = sums.leading(dd) or (None, 0.0)
    changed_rows, listed = _changed_rows(*sums.products) if sums.layout.rows else (0, [])
    return TensorDifference(
        elements=sums.position,
        is_same_bytes=sums.is_same_bytes,
        **counts,
        first_odd=sums.first_odd,
        norm_a=math.sqrt(aa),
        norm_d=math.sqrt(dd),
        dot=ad,
        max_abs=sums.largest[0],
        max_index=sums.largest[1],
        max_a=sums.largest[2],
        max_b=sums.largest[3],
        is_cast=sums.is_cast,
        is_cast_of_b=sums.is_cast_of_b,
        steps=math.sqrt(sums.squared_steps / counts["stepped"]) if counts["stepped"] else 0.0,
        rows=sums.layout.rows,
        changed_rows=changed_rows,
        listed_rows=tuple(listed),
        heads=tuple(_parts(*sums.of_heads())),
        sample_rank=sample_rank,
        sample_rows=sample_rows,
        rank=rank,
        largest_square=largest_square,
    )


def _changed_rows(aa: Array, ad: Array, dd: Array) -> tuple[int, list[Part]]:
    """How many rows changed, and those that did most."""
    import numpy as np

    with np.errstate(all="ignore"):
        change = np.where(dd > 0, dd / aa, 0.0)
        change[np.isnan(change)] = np.inf
    changed = int(np.count_nonzero(change))
    most = np.argsort(-change, kind="stable")[: min(changed, _LISTED_ROWS)]
    parts = _parts(aa[most], ad[most], dd[most])
    return changed, [msgspec.structs.replace(p, number=int(n)) for p, n in zip(parts, most, strict=True)]


def _parts(aa: Array, ad: Array, dd: Array) -> list[Part]:
    """Parts, from sums of squares and products."""
    found = []
    for number, (a, dot, d) in enumerate(zip(aa.tolist(), ad.tolist(), dd.tolist(), strict=True)):
        change = math.sqrt(d / a) if 0 < a < math.inf else math.inf if d else 0.0
        scale, explained = 1 + dot / a if a else 1.0, _explained(a, dot, d)
        found.append(Part(number=number, change=change, scale=scale, explained=explained))
    return found


def _explained(aa: float, ad: float, dd: float) -> float:
    bb = aa + 2 * ad + dd
    if not aa or not dd or not 0 < bb < math.inf or (aa + ad) * (aa + ad) < _ALONG * aa * bb:
        return 0.0
    return min(1.0, ad * ad / (aa * dd)) if math.isfinite(aa * dd) and aa * dd else 0.0
