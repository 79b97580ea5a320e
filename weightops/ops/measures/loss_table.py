"""Casts from 16-bit types: what becomes of a tensor follows from how often each of the 65536 words occurs in it.

Most words of a checkpoint are numbers in the new type's normal range, of which the bits that are dropped say whether
they change. Those are counted as such, with a few vector instructions; only the others, and enough of the first to see
the largest relative error, are counted word by word. It is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.ops.libtorch import convert
from weightops.ops.measures.counting import PIECE, count_all
from weightops.spec import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

WORDS = 1 << 16
SHORT = (DType.F16, DType.BF16)
_SIGN = 1 << 15
_FEW = 32
"""Of so many words, one at most leads to counting eight: otherwise all are counted."""
SPACE_NBYTES = 4 * PIECE + 8 * WORDS
"""Memory for the words of a piece as indexes, and for the counts of a block."""


@dataclass(frozen=True)
class Table:
    """For every word of the old type: the result's bits, and whether it is counted as this or that.

    `values` are the words as numbers; `too_large` those that do not fit, `patched` those of which torch makes
    something else; `errors` the relative errors of the others. Of words whose magnitude is in `plain` it is enough to
    know that they change where they have one of the bits `dropped`, and that no error is above `plain_error`.
    """

    values: Array
    results: Array
    patched: Array
    too_large: Array
    masks: dict[str, Array]
    errors: Array
    dropped: int
    plain: range
    plain_error: float

    @classmethod
    def make(
        cls, values: Array, results: Array, patched: Array, too_large: Array, masks: dict[str, Array], errors: Array
    ) -> Table:
        """The table, with what is plain found out from the rest."""
        import numpy as np

        words = np.arange(WORDS)
        one = int(np.flatnonzero(values == 1)[0])
        changed = masks["changed"]
        lone = [bit for bit in range(16) if not changed[one + (1 << bit)]]
        dropped = (1 << min(lone, default=0)) - 1
        odd = patched | too_large | (changed != ((words & dropped) != 0))
        for name, mask in masks.items():
            odd |= mask & (name != "changed")
        places = np.flatnonzero(odd[:_SIGN] | odd[_SIGN:])
        split = int(np.searchsorted(places, one))
        first = int(places[split - 1]) + 1 if split else 0
        plain = range(first, int(places[split]))
        largest = float(errors[plain.start : plain.stop].max(initial=0))
        return cls(values, results, patched, too_large, masks, errors, dropped, plain, largest)

    def counted(self, counts: Array) -> dict[str, Any]:
        """The fields of a `Loss` of words that occur so often."""
        fields: dict[str, Any] = {name: int(counts[mask].sum()) for name, mask in self.masks.items()}
        present = self.errors[counts != 0]
        return {"elements": int(counts.sum()), **fields, "max_relative_error": float(present.max(initial=0))}

    def count(self, words: Array, counts: Array, space: memoryview, known: float) -> tuple[int, int]:
        """Add to `counts` how often words occur; gives the number of plain ones left out, and how many of them change.

        None are left out while the largest error, `known` so far, could be one of theirs.
        """
        import numpy as np

        left_out = changed = 0
        indexes, many = np.frombuffer(space, np.int32), words.size > PIECE
        for start in range(0, words.size, PIECE):
            piece = words[start : start + PIECE]
            if known >= self.plain_error and piece.size % 8 == 0:
                offsets = np.frombuffer(space, np.uint16, piece.size)
                odd = np.frombuffer(space, np.bool_, piece.size, offset=2 * PIECE)
                np.bitwise_and(piece, np.uint16(_SIGN - 1), out=offsets)
                np.subtract(offsets, np.uint16(self.plain.start), out=offsets)
                np.greater_equal(offsets, np.uint16(len(self.plain)), out=odd)
                eights = np.flatnonzero(odd.view(np.uint64))  # finding each of many takes longer than counting eight
                if eights.size <= piece.size // _FEW:
                    picked = piece.reshape(-1, 8)[eights].ravel()
                    left_out += piece.size - picked.size
                    if self.dropped:
                        np.bitwise_and(piece, np.uint16(self.dropped), out=offsets)
                        changed += int(np.count_nonzero(offsets) - np.count_nonzero(picked & np.uint16(self.dropped)))
                    piece = picked
            count_all(piece, counts, indexes, many=many)
        return left_out, changed


def convert_short(out: memoryview, new: DType, source: memoryview, old: DType, space: memoryview) -> None:
    """As `convert` between 16-bit types, for data without NaN: by way of float32, for which torch has vector code."""
    step = len(space) // 4
    for start in range(0, len(source), 2 * step):
        part = source[start : start + 2 * step]
        wide = space[: 2 * len(part)]
        convert(wide, DType.F32, part, old)
        convert(out[start : start + len(part)], new, wide, DType.F32)
