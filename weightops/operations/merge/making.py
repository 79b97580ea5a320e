"""From an arrangement to lazy tensors: brought to one type, merged, and cast to what is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.layouts.layers import copied
from weightops.lazy import LazyTensor
from weightops.operations.merge.arrangement import Input, Job
from weightops.ops.arrange import Agreed
from weightops.ops.elementwise import cast
from weightops.ops.merging.op import merged
from weightops.spec import DType, promoted


@dataclass(frozen=True)
class Made:
    """Tensors by name, and what must be right before they are written."""

    tensors: dict[str, LazyTensor]
    watch: tuple[LazyTensor, ...]


def make(jobs: Iterable[Job], out_dtype: DType | None, *, seed: int, allow_nonfinite: bool) -> Made:
    """The tensors of the result. What is made of the same tensors once more is another tensor of the same bytes.

    Raises `IncompatibleInputs` for types that cannot be merged with each other.
    """
    tensors: dict[str, LazyTensor] = {}
    watch: list[LazyTensor] = []
    taken: Counter[tuple[tuple[str, str], ...]] = Counter()
    for job in jobs:
        key = tuple((found.model, found.name) for found in job.inputs)
        if all(found.tensor.spec.dtype.is_float for found in job.inputs):
            tensor = _merged(job, seed, allow_nonfinite)
            tensor = tensor if out_dtype is None else cast(tensor, out_dtype)
        else:
            tensor = job.inputs[0].tensor
            watch += [_agreed(job.name, job.inputs[0], other) for other in _others(job)]
        tensors[job.name] = copied(tensor, taken[key])
        taken[key] += 1
    return Made(tensors, tuple(watch))


def is_copied(job: Job) -> bool:
    """Whether a tensor goes out as it came in, but for its type."""
    is_float = all(found.tensor.spec.dtype.is_float for found in job.inputs)
    return not is_float or (job.method.name == "passthrough" and job.of_each[0].get("scale") in (None, 1))


def _merged(job: Job, seed: int, allow_nonfinite: bool) -> LazyTensor:
    if is_copied(job):
        return job.inputs[0].tensor
    dtype = _promoted(job.name, job.inputs)
    return merged(
        job.name,
        job.method.name,
        [found.model for found in job.inputs],
        [cast(found.tensor, dtype) for found in job.inputs],
        base=job.base,
        shared=job.shared,
        of_each=job.of_each,
        seed=seed,
        allow_nonfinite=allow_nonfinite,
    )


def _promoted(name: str, inputs: Iterable[Input]) -> DType:
    """The type that holds the values of all; raises `IncompatibleInputs` where there is none."""
    found = {each.tensor.spec.dtype: each.model for each in inputs}
    dtype = promoted(found)
    if dtype is None:
        shown = ", ".join(f"{dtype.value} in {escape(model)}" for dtype, model in found.items())
        raise IncompatibleInputs(
            f"{escape(name)} is {shown}", hint="dtype: bfloat16 in the merge file brings all to one type first"
        )
    return dtype


def _others(job: Job) -> list[Input]:
    """The inputs that are to be the same integers as the first, and are not known to be."""
    first = job.inputs[0]
    for other in job.inputs[1:]:
        if other.tensor.spec != first.tensor.spec:
            raise IncompatibleInputs(
                f"{escape(job.name)} is {first.tensor.spec} in {escape(first.model)}, and {other.tensor.spec} in "
                f"{escape(other.model)}",
                hint="integers are not merged, so they have to be the same in all models",
            )
    return [other for other in job.inputs[1:] if other.tensor != first.tensor]


def _agreed(name: str, first: Input, other: Input) -> LazyTensor:
    problem = f"{name} is to be the same in {first.model} and {other.model}, as integers are not merged"
    hint = "take it from one model: a module of its own with merge_method: passthrough"
    return LazyTensor.make(Agreed(problem, "incompatible", hint), first.tensor, other.tensor)
