"""A checkpoint as plain weights, whatever it holds them in: what is packed or scaled is a weight of numbers here.

For each weight that is made so there is also a tensor of its quantisation steps, by which a distance can be judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.quantized.table import find_weights
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.dequantize import plain, shapes_of
from weightops.ops.ggml.values import BlockValues, has_steps


@dataclass(frozen=True)
class Plain:
    """Plain tensors by name; those of `stored` are in files in another form, which it names."""

    tensors: Mapping[str, LazyTensor]
    steps: Mapping[str, LazyTensor] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    taken: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the files that went into others, such as scales, and into which."""
    notes: tuple[str, ...] = ()


def as_plain(checkpoint: Checkpoint, evaluate: Evaluate) -> Plain:
    """The weights that a checkpoint stands for; raises `CorruptInput` for quantised modules that are damaged.

    What is quantised in a way that is not read here stays as it is, and a note says so.
    """
    try:
        found = find_weights(checkpoint, evaluate, shape_of=shapes_of(checkpoint))
    except IncompatibleInputs as error:
        return Plain(checkpoint.tensors, notes=(f"packed tensors are compared as they are: {error}",))
    except CorruptInput as error:
        raise CorruptInput(str(error), hint="`weightops check` says what is wrong with quantised modules") from error
    tensors = dict(plain(checkpoint, found).tensors)
    steps = {name: weight.steps() for name, weight in found.weights.items()}
    stored = {name: weight.scheme for name, weight in found.weights.items()}
    for name, tensor in checkpoint.items():
        if tensor.spec.dtype.is_block:
            tensors[name], stored[name] = LazyTensor.make(BlockValues(), tensor), tensor.spec.dtype.value
            if has_steps(tensor.spec.dtype):
                steps[name] = LazyTensor.make(BlockValues(steps=True), tensor)
    return Plain(tensors, steps, stored, found.by_part, found.notes)
