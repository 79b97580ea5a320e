"""Casts from 16-bit types: what becomes of a tensor follows from how often each of the 65536 words occurs in it.

Counting words is one pass, where comparing numbers before and after is several; and it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.ops.counting import PIECE
from weightops.ops.libtorch import convert
from weightops.spec import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

WORDS = 1 << 16
SHORT = (DType.F16, DType.BF16)
SPACE_NBYTES = 4 * PIECE + 8 * WORDS
"""Memory for the words of a piece as indexes, and for the counts of a block."""


@dataclass(frozen=True)
class Table:
    """For every word of the old type: the result's bits, and whether it is counted as this or that.

    `values` are the words as numbers; `too_large` those that do not fit, `patched` those of which torch makes
    something else; `errors` the relative errors of the others.
    """

    values: Array
    results: Array
    patched: Array
    too_large: Array
    masks: dict[str, Array]
    errors: Array

    def counted(self, counts: Array) -> dict[str, Any]:
        """The fields of a `Loss` of words that occur so often."""
        fields: dict[str, Any] = {name: int(counts[mask].sum()) for name, mask in self.masks.items()}
        present = self.errors[counts != 0]
        return {"elements": int(counts.sum()), **fields, "max_relative_error": float(present.max(initial=0))}


def convert_short(out: memoryview, new: DType, source: memoryview, old: DType, space: memoryview) -> None:
    """As `convert` between 16-bit types, for data without NaN: by way of float32, for which torch has vector code."""
    step = len(space) // 4
    for start in range(0, len(source), 2 * step):
        part = source[start : start + 2 * step]
        wide = space[: 2 * len(part)]
        convert(wide, DType.F32, part, old)
        convert(out[start : start + len(part)], new, wide, DType.F32)
