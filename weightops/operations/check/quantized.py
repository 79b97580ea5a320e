"""What check says of quantised models, whatever the format: whether their tensors make up weights, and their scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from weightops.checkpoint import Checkpoint
from weightops.engine.examine import TensorReport
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.quantized.table import Quantized, find_weights
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.check.report import Finding
from weightops.operations.dequantize import plain, shapes_of
from weightops.ops.rows import Repeat
from weightops.spec import DType

_CODE = "quantization"
_UNSIGNED = ("scaled", "compressed-tensors", "modelopt", "bitsandbytes")
"""Formats whose scales are magnitudes."""
_SCALES = ("scale", "absmax", "global_scale", "scale_2", "nested_absmax")


@dataclass(frozen=True)
class Understood:
    """A checkpoint with a weight of the right shape for each quantised one, or as it is where it is not understood.

    The weights are of any type; that of the tensors that are not quantised is what config.json names.
    """

    checkpoint: Checkpoint
    found: Quantized
    problem: Finding | None = None


def understand(checkpoint: Checkpoint, evaluate: Evaluate) -> Understood:
    """What a checkpoint is as a plain model, by names and shapes."""
    try:
        found = find_weights(checkpoint, evaluate, shape_of=shapes_of(checkpoint), shapes_only=True)
    except CorruptInput as error:
        return Understood(checkpoint, Quantized(), Finding("error", _CODE, "config.json", str(error), error.hint or ""))
    except IncompatibleInputs as error:
        text = f"{error}: its tensors are held against nothing"
        return Understood(checkpoint, Quantized(), Finding("warning", _CODE, "config.json", text, error.hint or ""))
    kinds = Counter({DType.F16: 0})
    for name, tensor in checkpoint.items():
        if name not in found.by_part and tensor.spec.dtype.is_float:
            kinds[tensor.spec.dtype] += tensor.nbytes
    dtype = max(kinds, key=kinds.__getitem__)
    made = plain(checkpoint, found)
    shapes = {
        name: LazyTensor.make(Repeat(dtype, made[name].spec.shape, bytes(dtype.itemsize))) for name in found.weights
    }
    return Understood(replace(checkpoint, tensors={**made.tensors, **shapes}) if found else checkpoint, found)


def quantised_findings(
    understood: Understood, tensors: Mapping[str, TensorReport], *, is_told: bool
) -> Iterator[Finding]:
    """What is wrong with quantised weights beyond what `gptq_findings` says, if it has told something."""
    if understood.problem is not None and not is_told:
        yield understood.problem
    for note in understood.found.notes:
        yield Finding("warning", _CODE, understood.found.stated_in, note, "some loaders go by the configuration")
    negative = []
    for weight in understood.found.weights.values():
        for role in _SCALES if weight.format in _UNSIGNED else ():
            report = tensors.get(weight.parts.get(role, ""))
            statistics = report.statistics if report is not None else None
            if statistics is not None and statistics.minimum is not None and statistics.minimum < 0:
                negative.append(weight.parts[role])
    if negative:
        text = f"{len(negative)} scales hold numbers below zero: {listed(negative)}"
        yield Finding("error", _CODE, negative[0], text, "the files are damaged: fetch them again")
    if understood.found and understood.found.method is None:
        shown = listed(understood.found.schemes, 3)
        text = f"{len(understood.found.weights)} weights are quantised ({escape(shown)}), and no file says so"
        yield Finding("error", _CODE, "config.json", text, "loaders need quantization_config in config.json")
