"""The singular values of a product of thin factors, without the product.

With B = Q R and A^T = P S, whose Q and P have orthonormal columns, the singular values of B A are those of R S^T, a
matrix of the rank alone. R and S come of blocks of rows, one after the other: that of what was there with the next
block below it (Golub, Van Loan: Matrix Computations, section 5.2.2; TSQR of Demmel and others, 2012). In float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.lora.product import wide_values
from weightops.spec import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 512
"""Rows of a factor that are decomposed at once: LAPACK takes three times as long for thousands."""


class Spectrum(Op, frozen=True):
    """The singular values of B A as float64, largest first, of factors A `[r, ...]` and B `[out, r, ...]`.

    Those of convolutions count as matrices: A `[r, in, height, width]` and B `[out, r, 1, 1]`. With `experts` the
    factors are those of so many (see `weightops.ops.lora.product.Part`), and the singular values those of all, which
    are those of the changes as blocks on a diagonal. Where a factor holds NaN or infinities, all are NaN.
    """

    experts: int = 1

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        a, b = inputs
        is_matrix = min(len(a.shape), len(b.shape)) > 1 and math.prod(b.shape[2:]) == 1
        if not is_matrix or not a.shape[0] == b.shape[1] > 0 == a.shape[0] % self.experts:
            raise IncompatibleInputs(f"the factors {a} and {b} have no product")
        rank, width, height = a.shape[0] // self.experts, math.prod(a.shape[1:]), b.shape[0]
        return TensorSpec(DType.F64, (self.experts * min(rank, width, height),))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        a, b = (wide_values(each, DType.F32, read).reshape(each.spec.shape) for each in tensor.inputs)
        a = a.reshape(self.experts, len(a) // self.experts, -1)
        b = b.reshape(len(b), -1, self.experts)
        found = np.frombuffer(out, dtype=np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            found[:] = np.nan
            return
        each = len(found) // self.experts
        for i in range(self.experts):
            core = triangle(b[:, :, i]) @ triangle(a[i].T).T
            found[i * each : (i + 1) * each] = np.linalg.svd(core, compute_uv=False)[:each]
        found[::-1].sort()


def triangle(matrix: NDArray[Any]) -> NDArray[Any]:
    """R of a matrix that is Q R, with as many rows as the matrix or as columns, whichever are fewer."""
    import numpy as np

    found = np.empty((0, matrix.shape[1]))
    for top in range(0, len(matrix), _ROWS):
        block = matrix[top : top + _ROWS].astype(np.float64)
        found = np.asarray(np.linalg.qr(np.concatenate([found, block]), mode="r"))
    return found
