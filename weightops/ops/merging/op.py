"""The op that merges tensors: one method, its parameters for this tensor, blocks in threads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.ops.elementwise import has_arithmetic
from weightops.ops.libtorch import as_torch
from weightops.ops.merging.doubt import Sampler
from weightops.ops.merging.inputs import PIECE, Inputs
from weightops.ops.merging.method import Blockwise, Tallied, Value
from weightops.ops.merging.methods import find_method
from weightops.spec import TensorSpec

if TYPE_CHECKING:
    import torch

_LANES = 1024
"""Elements that torch is given together: it sums the last few of a run in another order than the others."""
_Named = tuple[tuple[str, Value], ...]


class Merged(Op, frozen=True):
    """Tensors of one spec, merged by `method`.

    `name` is that of the result, `models` are names for the inputs in messages. `shared` and `of_each` are the method's
    parameters. Random masks depend on `seed`, the name and the place of a model. Numbers that are not finite are
    refused unless `allow_nonfinite`. `version` is that of what the method computes: another gives other bits.
    `plugin` is the SHA-256 of the file that brought the method, if one did.
    """

    method: str
    name: str
    models: tuple[str, ...]
    shared: _Named
    of_each: tuple[_Named, ...]
    base: int | None = None
    seed: int = 0
    allow_nonfinite: bool = False
    version: int = 1
    plugin: str | None = None

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        first = inputs[0]
        odd = next((spec for spec in inputs if spec != first), None)
        if odd is not None:
            raise IncompatibleInputs(f"{escape(self.name)}: cannot merge {first} with {odd}")
        if not has_arithmetic(first.dtype) or not first.dtype.is_float:
            raise IncompatibleInputs(f"{escape(self.name)}: {first.dtype.value} cannot be merged")
        return TensorSpec(find_method(self.method).dtype(first.dtype), first.shape)

    def grain(self, tensor: LazyTensor) -> int:
        unit = tensor.spec.shape[-1] if self._by_rows and tensor.spec.shape else _LANES
        return max(1, unit) * tensor.spec.dtype.itemsize

    @property
    def _by_rows(self) -> bool:
        return find_method(self.method).by_rows

    @property
    def scratch_nbytes(self) -> int:
        return 8 * (len(self.models) + 4) * PIECE * 4

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        work: _Work | None = read.running.pop(tensor, None)
        if work is None:
            work = _Work(self, tensor, read)
        work.fill(start, out)
        if start + len(out) < tensor.nbytes:
            read.running[tensor] = work
        elif work.note:
            read.notes[tensor] = self.name, work.note


class _Work:
    """What is known of a tensor while it is in work."""

    def __init__(self, op: Merged, tensor: LazyTensor, read: Evaluator) -> None:
        method = find_method(op.method)
        self._op, self._tensor, self._dtype = op, tensor, tensor.spec.dtype
        self._inputs = Inputs(tensor.inputs, op.base, f"{op.seed}\0{op.name}", read, by_rows=method.by_rows)
        self._merge = method.start(self._inputs, dict(op.shared), [dict(values) for values in op.of_each])
        self._tallied: tuple[int, Any] = (0, None)
        self._sampler = Sampler(self._inputs, op.models) if op.base is not None and len(tensor.spec.shape) > 1 else None

    @property
    def note(self) -> dict[str, float]:
        """What there is to say of the base, if all has been seen."""
        return self._sampler.note(self._inputs.numel) if self._sampler is not None else {}

    def fill(self, start: int, out: memoryview) -> None:
        itemsize = self._dtype.itemsize
        first, stop = start // itemsize, (start + len(out)) // itemsize
        target = as_torch(out, self._dtype)
        merge = self._before(self._merge, first, stop) if isinstance(self._merge, Tallied) else self._merge

        def compute(blocks: list[torch.Tensor], position: int) -> Any:
            result = merge(blocks, position).reshape(-1)
            written = target[position - first : position - first + result.numel()]
            written.copy_(result)  # which rounds what is wider
            self._check(written, blocks)
            return self._sampler.squares(blocks) if self._sampler is not None else None

        found = list(self._inputs.run(compute, first, stop))
        if self._sampler is not None:
            self._sampler.add(found, first, stop)

    def _before(self, merge: Tallied, first: int, stop: int) -> Blockwise:
        """The function of a block, which knows what the blocks before it have added up to."""
        position, count = self._tallied
        if position != first:  # not what comes next: blocks are asked for in another order than theirs
            _, count = self._inputs.before(merge.tally, 0, first)
        counts, count = self._inputs.before(merge.tally, first, stop, count)
        self._tallied = stop, count
        return lambda blocks, position: merge.compute(blocks, position, counts[position])

    def _check(self, result: torch.Tensor, blocks: Sequence[torch.Tensor]) -> None:
        """Refuse numbers that are not finite. Their sum is not finite then, nor where it alone is too large."""
        if self._op.allow_nonfinite or math.isfinite(result.sum().item()) or bool(result.isfinite().all()):
            return
        name = escape(self._op.name)
        for model, block in zip(self._op.models, blocks, strict=True):
            count = int((~block.isfinite()).sum())
            if count:
                raise IncompatibleInputs(
                    f"{name}: {count} of {block.numel()} elements of a block of {escape(model)} are NaN or infinite",
                    hint="--allow-nonfinite merges them as they are; weightops check tells where they are",
                )
        raise IncompatibleInputs(
            f"{name}: merging by {self._op.method} gives numbers that {self._dtype.value} cannot hold, from numbers "
            "that are finite",
            hint="a weight is too large, or weights cancel; --allow-nonfinite writes NaN and infinities",
        )


def merged(
    name: str,
    method: str,
    models: Sequence[str],
    inputs: Sequence[LazyTensor],
    *,
    base: int | None,
    shared: Mapping[str, Value],
    of_each: Sequence[Mapping[str, Value]],
    seed: int = 0,
    allow_nonfinite: bool = False,
) -> LazyTensor:
    """The tensor `name`, merged by `method` from `inputs` of one spec, those of `models`, in this order.

    `shared` and `of_each` are parameters by their names in merge files, `of_each` with an entry for every input.
    Raises `IncompatibleInputs` for tensors that cannot be merged.
    """
    found = find_method(method)
    op = Merged(
        method=method,
        name=name,
        models=tuple(models),
        shared=tuple(shared.items()),
        of_each=tuple(tuple(values.items()) for values in of_each),
        base=base,
        seed=seed if found.is_random else 0,
        allow_nonfinite=allow_nonfinite,
        plugin=found.plugin,
    )
    return LazyTensor.make(op, *inputs)
