"""The importance of a weight's columns, from what `llama-imatrix` has summed up."""

from __future__ import annotations

from weightops.errors import IncompatibleInputs
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.spec import DType, TensorSpec


class Importance(Op, frozen=True):
    """Sums of squares `[experts, columns]`, each by its expert's count, `[experts, 1]`; both float32.

    Experts that were never asked have ones. Sums may lack the dimension where there is one expert; counts may have any
    shape. The older form has all of it multiplied by `calls`. Source: `load_imatrix` of llama-quantize, and llama.cpp's
    `save_imatrix_legacy`.
    """

    calls: int = 1

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        sums, counts = inputs
        if {sums.dtype, counts.dtype} != {DType.F32} or not counts.numel or sums.numel % counts.numel:
            raise IncompatibleInputs(f"cannot divide {sums} by {counts}")
        shape = sums.shape[-1:] if counts.numel == 1 else sums.shape
        return TensorSpec(DType.F32, shape)

    def grain(self, tensor: LazyTensor) -> int:
        return 4

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        sums, counts = tensor.inputs
        read(sums, start, out)
        values, columns = np.frombuffer(out, np.float32), sums.spec.numel // counts.spec.numel
        first, last = start // 4 // columns, (start // 4 + len(values) - 1) // columns
        by = np.empty(last - first + 1, np.float32)
        read(counts, first * 4, by.data.cast("B"))
        at = 0
        for expert, count in zip(range(first, last + 1), by, strict=True):
            stop = min((expert + 1) * columns - start // 4, len(values))
            if count > 0:
                values[at:stop] /= count
            else:
                values[at:stop] = 1
            at = stop
        values *= np.float32(self.calls)
