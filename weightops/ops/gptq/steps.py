"""How far apart the weights are that a GPTQ module can hold."""

from __future__ import annotations

from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.numbers.affine import as_float32
from weightops.spec import DType, TensorSpec


class GroupSteps(Op, frozen=True):
    """The quantisation steps `[n, k]` of a GPTQ module, float32, from its scales `[g, n]` and g_idx if there is one."""

    columns: int
    group_size: int

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return TensorSpec(DType.F32, (inputs[0].shape[1], self.columns))

    def grain(self, tensor: LazyTensor) -> int:
        return max(1, tensor.spec.row_nbytes)

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        import numpy as np

        state = read.running.get(tensor)
        if state is None:
            scales, *index = tensor.inputs
            factors = np.abs(as_float32(read.whole(scales), scales.spec.dtype)).reshape(scales.spec.shape)
            groups = (
                np.frombuffer(read.whole(index[0]), np.int32) if index else np.arange(self.columns) // self.group_size
            )
            state = read.running[tensor] = np.ascontiguousarray(factors.T), groups.clip(0, len(factors) - 1)
        factors, groups = state
        row = tensor.spec.row_nbytes
        first, count = start // row, len(out) // row
        np.take(factors[first : first + count], groups, axis=1, out=np.frombuffer(out, np.float32).reshape(count, -1))
        if start + len(out) == tensor.nbytes:
            del read.running[tensor]
