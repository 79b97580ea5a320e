"""Ops on the change between two matrices: how large it is, its singular values, its best factors of low rank.

The change D = tuned - base is never held: every pass makes its rows anew, in blocks whose height depends on the shape
alone. The decomposition is randomised subspace iteration (Halko, Martinsson, Tropp: Finding structure with randomness,
SIAM Review 53, 2011, algorithm 4.4) on the side of the columns, where one pass over the rows multiplies by D^T D:
a basis V of `width` columns, drawn at random, becomes orth(D^T (D V)) `passes` times, and the singular value
decomposition of the thin D V then gives that of D V V^T, the change as far as it lies in V. So D is made `passes` + 1
times. Products are computed in the type of the inputs and added up in float64.

The random matrix comes from a counter-based generator and depends on seed and shape. The last bits of products and
decompositions depend on the BLAS and its threads: results are the same from run to run, not from machine to machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.libtorch import matmul
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OVERSAMPLE = 16
"""Columns of the basis beyond the rank that is wanted: what makes the leading ones accurate."""
PASSES = 3
"""Multiplications by D^T D: with three, residuals of slowly falling spectra are within 1 % of the best."""
_BLOCK_ELEMENTS = 1 << 20
_PIECE_ELEMENTS = 1 << 13
"""What OpenBLAS adds up in the thread that asks, so that other threads that compute do not hold it up."""
_LANES = 1024
"""The grain of casts, in elements."""


class Change(Op, frozen=True):
    """How two tensors of one spec differ, as three float64.

    They are the number of elements that differ (two NaNs do not), ||tuned - base||^2 and ||base||^2; the norms are NaN
    or infinite where values are, and 0 for integers, of which only the first is counted.
    """

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        base, tuned = inputs
        if base != tuned or (base.dtype.is_float and base.dtype not in (DType.F32, DType.F64)):
            raise IncompatibleInputs(f"cannot compare {base} with {tuned}")
        return TensorSpec(DType.F64, (3,))

    def grain(self, tensor: LazyTensor) -> int:
        return tensor.nbytes

    @property
    def scratch_nbytes(self) -> int:
        return 3 * _BLOCK_ELEMENTS * 8

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        base, tuned = tensor.inputs
        itemsize, total = base.spec.dtype.itemsize, np.zeros(3)
        block = min(_BLOCK_ELEMENTS * itemsize, base.nbytes)
        with read.scratch(block) as one, read.scratch(block) as two, np.errstate(all="ignore"):
            for begin in range(0, base.nbytes, max(1, block)):
                size = min(block, base.nbytes - begin)
                read(base, begin, one[:size])
                read(tuned, begin, two[:size])
                old, new = (np.frombuffer(b[:size], dtype=base.spec.dtype.value) for b in (one, two))
                total += _compare(old, new)
        np.frombuffer(out, dtype=np.float64)[:] = total


def _compare(old: NDArray[Any], new: NDArray[Any]) -> tuple[int, float, float]:
    """What `Change` counts, of one block; overwrites `new`."""
    import numpy as np

    differ = int(np.count_nonzero(new != old))
    if old.dtype.kind != "f":
        return differ, 0.0, 0.0
    size = _squares(old)
    if not math.isfinite(size):
        differ -= int(np.count_nonzero(np.isnan(new) & np.isnan(old)))
    np.subtract(new, old, out=new)
    return differ, _squares(new) if differ else 0.0, size


def _squares(values: NDArray[Any]) -> float:
    """The sum of squares, in float64."""
    import numpy as np

    flat, total = values.reshape(-1), 0.0
    for start in range(0, flat.size, _PIECE_ELEMENTS):
        piece = flat[start : start + _PIECE_ELEMENTS].astype(np.float64)
        total += float(np.dot(piece, piece))
    return total


class _Decomposition(Op, frozen=True):
    """The leading singular values and vectors of `tuned - base`, two matrices of `shape` in float32 or float64.

    `width` is the number of columns of the basis, `label` the name that errors and notes give the change.
    """

    shape: tuple[int, int]
    width: int
    passes: int
    seed: int
    label: str

    def check(self, *inputs: TensorSpec) -> None:
        base, tuned = inputs
        if base != tuned or base.shape != self.shape or base.dtype not in (DType.F32, DType.F64):
            raise IncompatibleInputs(f"cannot decompose {tuned} minus {base} as a matrix of {list(self.shape)}")
        if not 0 < self.width <= min(self.shape):
            raise UsageError(f"a matrix of {list(self.shape)} has no {self.width} singular values")

    @property
    def scratch_nbytes(self) -> int:
        rows, columns = self.shape
        blocks = self._height * (2 * columns + self.width) * 8
        return blocks + (rows + columns) * self.width * 8 * 3 + _PIECE_ELEMENTS * 8

    @property
    def _height(self) -> int:
        """Rows of a block: enough that adding up costs less than multiplying, in whole grains of a cast if they fit."""
        rows, columns = self.shape
        height = max(1, self.width, _BLOCK_ELEMENTS // columns)
        step = _LANES // math.gcd(columns, _LANES)
        return min(rows, -(-height // step) * step if step <= height else height)

    def decompose(
        self, tensor: LazyTensor, read: Evaluator
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], float, float]:
        """U [rows, width], s [width] and V^T [width, columns], then ||tuned - base||^2 and ||base||^2."""
        import numpy as np

        rows, columns = self.shape
        key = np.array([self.seed, rows << 32 | columns], dtype=np.uint64)
        unit = np.dtype(tensor.inputs[0].spec.dtype.value)
        basis = np.random.Generator(np.random.Philox(key=key)).standard_normal((columns, self.width)).astype(unit)
        projected = np.empty((self._height, self.width), dtype=unit)
        term = np.empty((columns, self.width), dtype=unit)
        change = size = 0.0
        with np.errstate(all="ignore"):
            for number in range(self.passes):
                product = np.zeros((columns, self.width))
                for _, difference, old in self._blocks(tensor, read):
                    if not number:
                        change, size = change + _squares(difference), size + _squares(old)
                    matmul(projected[: len(difference)], difference, basis)
                    matmul(term, difference.T, projected[: len(difference)])
                    product += term
                if not math.isfinite(change) or not np.isfinite(product).all():
                    raise CorruptInput(f"{escape(self.label)}: the change is not finite: NaN or infinity among weights")
                basis = np.linalg.qr(product)[0].astype(unit)
        thin = np.empty((rows, self.width))
        for top, difference, _ in self._blocks(tensor, read):
            matmul(projected[: len(difference)], difference, basis)
            thin[top : top + len(difference)] = projected[: len(difference)]
        left, values, turn = np.linalg.svd(thin, full_matrices=False)
        return left, values, turn @ basis.T, change, size

    def _blocks(
        self, tensor: LazyTensor, read: Evaluator
    ) -> Iterator[tuple[int, NDArray[np.floating[Any]], NDArray[np.floating[Any]]]]:
        """Blocks of rows, each as its first row, the rows of the change, and those of the base."""
        import numpy as np

        base, tuned = tensor.inputs
        rows, columns = self.shape
        row, unit = base.spec.row_nbytes, np.dtype(base.spec.dtype.value)
        with read.scratch(self._height * row) as one, read.scratch(self._height * row) as two:
            for top in range(0, rows, self._height):
                size = min(self._height, rows - top) * row
                read(base, top * row, one[:size])
                read(tuned, top * row, two[:size])
                old, new = (np.frombuffer(b[:size], dtype=unit).reshape(-1, columns) for b in (one, two))
                np.subtract(new, old, out=new)
                yield top, new, old


class SingularValues(_Decomposition, frozen=True):
    """The `width` leading singular values of `tuned - base`, in float64, largest first."""

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        self.check(*inputs)
        return TensorSpec(DType.F64, (self.width,))

    def grain(self, tensor: LazyTensor) -> int:
        return tensor.nbytes

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        np.frombuffer(out, dtype=np.float64)[:] = self.decompose(tensor, read)[1]


class LowRank(_Decomposition, frozen=True):
    """One of the two factors of the best approximation of `tuned - base` by a matrix of `rank`, in float32.

    With U S V^T for that approximation, `left` is U sqrt(S) [rows, rank] and `right` is sqrt(S) V^T [rank, columns];
    `transpose` gives the factor the other way round. Both factors are computed at once and kept until those of another
    pair are asked for. Then it is noted under `label` what share of ||tuned - base||^2 the approximation holds
    (`energy`), its `rank`, and how large the change is (`change`, ||tuned - base|| / ||base||; not of a base of zeros).
    """

    rank: int
    part: Literal["left", "right"]
    transpose: bool = False

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        self.check(*inputs)
        if not 0 < self.rank <= self.width:
            raise UsageError(f"a rank of {self.rank} needs a basis of as many columns, not {self.width}")
        rows, columns = self.shape
        shape = (rows, self.rank) if self.part == "left" else (self.rank, columns)
        return TensorSpec(DType.F32, shape[::-1] if self.transpose else shape)

    def grain(self, tensor: LazyTensor) -> int:
        return DType.F32.itemsize

    @property
    def scratch_nbytes(self) -> int:
        return super().scratch_nbytes + sum(self.shape) * self.rank * 4

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        key = (msgspec.structs.replace(self, part="left", transpose=False), tensor.inputs)
        known, left, right = read.running.get(LowRank, (None, None, None))
        if known != key:
            read.running.pop(LowRank, None)
            del left, right
            left, right = self._factors(tensor, read)
            read.running[LowRank] = (key, left, right)
        factor = left if self.part == "left" else right
        if self.transpose:
            factor = factor.T
        whole = factor.reshape(-1)
        first = start // DType.F32.itemsize
        out[:] = memoryview(whole[first : first + len(out) // DType.F32.itemsize]).cast("B")

    def _factors(self, tensor: LazyTensor, read: Evaluator) -> tuple[NDArray[Any], NDArray[Any]]:
        import numpy as np

        left, values, right, change, size = self.decompose(tensor, read)
        kept = values[: self.rank]
        energy = min(1.0, float(np.dot(kept, kept)) / change) if change else 1.0
        relative = {"change": math.sqrt(change / size)} if size else {}
        read.notes[tensor] = self.label, {"energy": energy, "rank": float(self.rank), **relative}
        root = np.sqrt(kept)
        return (left[:, : self.rank] * root).astype(np.float32), (root[:, None] * right[: self.rank]).astype(np.float32)
