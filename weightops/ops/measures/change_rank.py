"""The rank of a change D, told from one look at each of its rows where that settles it.

A random matrix W of a few columns gives Y = D W and Z = D^T Y, both sums over rows. With the columns of Q = Y T an
orthonormal basis of those of Y, Q^T D is T^T Z^T, whose singular values follow without D (the Nystroem approximation of
D^T D: Tropp, Yurtsever, Udell, Cevher: Fixed-rank approximation of a positive-semidefinite matrix from streaming data,
2017). What Q^T D holds of the change is held by as many directions of D or fewer. What it does not hold is ||D||^2 less
that, and no number of directions holds more than as many of Q^T D do and all of the rest: between the two bounds the
rank is certain, or it is not told.

The random matrix comes from a counter-based generator and depends on the shape alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weightops.ops.libtorch import matmul

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Floats = NDArray[np.float64]

ENERGY = 0.99
"""The share of ||D||^2 that as many directions hold as its rank is said to be."""
_SLACK = 1e-4
"""What rounding in float32 may add to a share."""
_LOST = 1e-8
"""Directions of Y with less than this of the square of its largest are below what float32 tells apart."""
_NBYTES = 16 << 20
"""What one sketch may take in float64."""


class Sketch:
    """Sums over the rows of a change, float32, which are given in any order; unchanged rows may be left out."""

    def __init__(self, columns: int, width: int) -> None:
        import numpy as np

        random = np.random.Generator(np.random.Philox(key=np.array([columns, width], np.uint64)))
        self._basis: Array = random.standard_normal((columns, width), np.float32)
        self._projected: Array = np.empty((0, width), np.float32)
        self._term: Array = np.empty((width, columns), np.float32)
        self._product: Floats = np.zeros((width, columns))
        self._gram: Floats = np.zeros((width, width))

    @staticmethod
    def fits(columns: int, width: int) -> bool:
        """Whether a sketch of this width is small enough to be made beside other things."""
        return columns * width * 8 <= _NBYTES

    def add(self, rows: Array) -> None:
        """Take in rows `[n, columns]`."""
        import numpy as np

        if len(self._projected) < len(rows):
            self._projected = np.empty((len(rows), self._basis.shape[1]), np.float32)
        projected = self._projected[: len(rows)]
        matmul(projected, rows, self._basis)
        matmul(self._term, projected.T, rows)
        self._product += self._term
        wide = projected.astype(np.float64)
        square = np.empty_like(self._gram)
        matmul(square, wide.T, wide)
        self._gram += square

    def squares(self) -> Floats:
        """The squared singular values of Q^T D, largest first; none of a change that is zero, or not finite."""
        import numpy as np

        none: Floats = np.zeros(0)
        square = np.empty_like(self._gram)
        with np.errstate(all="ignore"):
            matmul(square, self._product, self._product.T)
        if not (np.isfinite(self._gram).all() and np.isfinite(square).all()):
            return none
        sizes, turn = np.linalg.eigh(self._gram)
        is_kept = sizes > max(0.0, _LOST * float(sizes[-1]))
        if not is_kept.any():
            return none
        turn = turn[:, is_kept] / np.sqrt(sizes[is_kept])
        found: Floats = np.linalg.eigvalsh(turn.T @ square @ turn)[::-1].clip(0.0)
        return found


def energy_rank(squares: Floats, total: float | None = None) -> int:
    """The least number of squared singular values, largest first, that hold 99 % of `total`, by default their sum.

    One more than there are where all of them do not.
    """
    import numpy as np

    wanted = ENERGY * (float(squares.sum()) if total is None else total)
    reached = np.flatnonzero(np.cumsum(squares) >= wanted * (1 - 1e-12))
    return int(reached[0]) + 1 if reached.size else len(squares) + 1


def certain_rank(squares: Floats, total: float) -> int | None:
    """The `energy_rank` of a change whose square is `total`, from a sketch's; None where it may be less."""
    if not len(squares) or not 0 < total < math.inf:
        return None
    rank = energy_rank(squares, total)
    rest = max(0.0, total - float(squares.sum()))
    before = float(squares[: rank - 1].sum()) + rest
    return rank if rank <= len(squares) and before < (ENERGY - _SLACK) * total else None


def rank_of_rows(rows: Array) -> int:
    """How many singular values hold 99 % of rows `[n, columns]` in float32, which are overwritten; n if not finite."""
    import numpy as np

    largest = float(np.abs(rows).max()) if rows.size else 0.0
    if not largest or not np.isfinite(largest):
        return len(rows) if largest else 0
    rows /= largest
    gram = np.empty((len(rows), len(rows)), np.float32)
    matmul(gram, rows, rows.T)
    return energy_rank(np.linalg.eigvalsh(gram.astype(np.float64))[::-1].clip(0.0))
