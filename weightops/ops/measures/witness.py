"""Digests of tensors that pass by on their way into another."""

from __future__ import annotations

from typing import Any, Literal

import xxhash

from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluator, LazyTensor, Op
from weightops.spec import TensorSpec


class Witness(Op, frozen=True):
    """Its input, whose xxh3_128 is recorded under `label` once it has streamed by from start to end.

    With `expect`, another digest is an error: `problem` begins its sentence, `fault` says whose it is. Unless it
    `is_needed`, nothing is read for its sake: there is no digest of a tensor of which only parts are used.
    """

    label: str
    expect: str | None = None
    problem: str = ""
    fault: Literal["incompatible", "corrupt"] = "incompatible"
    is_needed: bool = True

    def spec(self, *inputs: TensorSpec) -> TensorSpec:
        return inputs[0]

    def fill(self, tensor: LazyTensor, start: int, out: memoryview, read: Evaluator) -> None:
        read(tensor.inputs[0], start, out)
        position, state = read.running.get(tensor, (0, None))
        if start != position:
            return
        state = state or xxhash.xxh3_128()
        state.update(out)
        position += len(out)
        read.running[tensor] = (position, state)
        if position == tensor.nbytes:
            self.conclude(state, read)

    def skip(self, tensor: LazyTensor, read: Evaluator) -> None:
        self.conclude(xxhash.xxh3_128(), read)

    def conclude(self, state: Any, read: Evaluator) -> None:
        """Record the digest of the whole, or refuse it."""
        found = state.hexdigest()
        if self.expect is not None and found != self.expect:
            error = IncompatibleInputs if self.fault == "incompatible" else CorruptInput
            hint = None if self.is_needed else "`weightops verify` says more"
            raise error(f"{escape(self.problem)}: expected xxh3_128 {self.expect}, found {found}", hint=hint)
        read.witnesses[self.label] = found


def witness(tensor: LazyTensor, label: str) -> LazyTensor:
    """`tensor`, with its digest recorded under `label`."""
    return LazyTensor.make(Witness(label), tensor)
