"""A checkpoint as plain weights, whatever it holds them in: what is packed or scaled is a weight of numbers here.

For each weight that is made so there is also a tensor of its quantisation steps, by which a distance can be judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.modules import is_conv1d
from weightops.formats.quantized.gptq import modules, prefixes, read_config
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.dequantize import dequantize
from weightops.ops.ggml.values import BlockValues, has_steps
from weightops.ops.numbers.stored_scales import GroupSteps, Scaled
from weightops.ops.transpose import transposed
from weightops.spec import DType

_SCALES = ("weight_scale", "weight_scale_inv")
"""What fp8 checkpoints call the scales beside a weight: compressed-tensors, and DeepSeek."""


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
    found = _gptq(checkpoint, evaluate) if prefixes(checkpoint) else Plain(checkpoint.tensors)
    tensors, steps = dict(found.tensors), dict(found.steps)
    stored, taken, notes = dict(found.stored), dict(found.taken), list(found.notes)
    for name, tensor in found.tensors.items():
        if tensor.spec.dtype.is_block:
            tensors[name], stored[name] = LazyTensor.make(BlockValues(), tensor), tensor.spec.dtype.value
            if has_steps(tensor.spec.dtype):
                steps[name] = LazyTensor.make(BlockValues(steps=True), tensor)
        module, _, last = name.rpartition(".")
        beside = next((s for s in _SCALES if last == "weight" and f"{module}.{s}" in found.tensors), None)
        if beside is None or tensor.spec.dtype.bits != 8 or tensor.spec.dtype.is_packed:
            continue
        scales = found.tensors[f"{module}.{beside}"]
        try:
            made = [LazyTensor.make(Scaled(is_step), tensor, scales) for is_step in (False, True)]
        except IncompatibleInputs as error:
            notes.append(f"{escape(checkpoint.name)}: {escape(name)} is compared without its scales: {error}")
            continue
        tensors[name], steps[name] = made
        stored[name] = f"{tensor.spec.dtype.value} with scales"
        del tensors[f"{module}.{beside}"]
        taken[f"{module}.{beside}"] = name
    return Plain(tensors, steps, stored, taken, tuple(notes))


def _gptq(checkpoint: Checkpoint, evaluate: Evaluate) -> Plain:
    try:
        made = dequantize(checkpoint, dtype=DType.F32, evaluate=evaluate)
        found = modules(checkpoint, read_config(checkpoint))
    except IncompatibleInputs as error:
        return Plain(checkpoint.tensors, notes=(f"packed tensors are compared as they are: {error}",))
    except CorruptInput as error:
        raise CorruptInput(str(error), hint="`weightops check` says what is wrong with quantised modules") from error
    steps, stored, taken = dict[str, LazyTensor](), dict[str, str](), dict[str, str]()
    model_type = checkpoint.config().get("model_type")
    for prefix, module in found.items():
        name = f"{prefix}.weight"
        inputs = (module.scales,) if module.g_idx is None else (module.scales, module.g_idx)
        size = module.group_size or module.in_features
        widths = LazyTensor.make(GroupSteps(module.in_features, size), *inputs)
        steps[name] = transposed(widths) if is_conv1d(prefix, model_type) else widths
        stored[name] = f"GPTQ, {module.bits} bits"
        taken |= {f"{prefix}.{part}": name for part in ("qweight", "qzeros", "scales", "g_idx")}
    return Plain(made.tensors, steps, stored, {n: into for n, into in taken.items() if n in checkpoint})
