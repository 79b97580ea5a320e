"""Watching sources while an output is made of them: what they were is recorded, and a damaged one is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightops.checkpoint import Checkpoint
from weightops.formats.proofs import manifest
from weightops.lazy import LazyTensor
from weightops.ops.measures.witness import Witness
from weightops.plan import Origin, OriginTensor


def observe(checkpoint: Checkpoint, sources: Mapping[str, Checkpoint]) -> tuple[Checkpoint, tuple[Origin, ...]]:
    """The checkpoint with a digest taken of every source tensor that streams into it, and where those are recorded.

    A source that has a manifest beside it is held against that on the way. Tensors that go out as they came in are
    digested there, and not twice.
    """
    kept: dict[LazyTensor, str] = {}
    for name, tensor in checkpoint.items():
        kept.setdefault(tensor, name)
    labels: dict[LazyTensor, str] = {}
    wrapped: dict[LazyTensor, LazyTensor] = {}
    for role, source in sources.items():
        for name, tensor in source.items():
            if tensor not in labels:
                labels[tensor] = f"{role}: {name}"
                wrapped[tensor] = LazyTensor.make(_witness(source, name, labels[tensor]), tensor)
    done: dict[LazyTensor, LazyTensor] = {}

    def rebuild(tensor: LazyTensor) -> LazyTensor:
        if tensor not in done:
            done[tensor] = wrapped.get(tensor) or _with_inputs(tensor, tuple(map(rebuild, tensor.inputs)))
            if isinstance(tensor.op, Witness) and tensor.inputs[0] in wrapped:
                labels[tensor.inputs[0]] = tensor.op.label
                done[tensor] = tensor
        return done[tensor]

    tensors = {n: t if t in wrapped else rebuild(t) for n, t in checkpoint.items()}
    watch = tuple(map(rebuild, checkpoint.watch))
    origins = []
    for role, source in sources.items():
        entries = {
            name: OriginTensor(t.spec.dtype, t.spec.shape, labels[t], kept.get(t), source.digests.get(name))
            for name, t in source.items()
        }
        origins.append(Origin(role, source.origin or source.name, entries, source.content_id))
    return replace(checkpoint, tensors=tensors, watch=watch), tuple(origins)


def _witness(source: Checkpoint, name: str, label: str) -> Witness:
    expect = source.digests.get(name)
    problem = f"{source.name}: {name} is not what {manifest.NAME} beside it says" if expect else ""
    return Witness(label, expect, problem, "corrupt", is_needed=False)


def _with_inputs(tensor: LazyTensor, inputs: tuple[LazyTensor, ...]) -> LazyTensor:
    return tensor if inputs == tensor.inputs else LazyTensor(tensor.op, inputs, tensor.spec)
