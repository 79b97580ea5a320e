"""The table of number formats, and the weights that a checkpoint holds in any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, WeightopsError
from weightops.formats.quantized.awq import AWQ_FORMAT
from weightops.formats.quantized.bitsandbytes import BITSANDBYTES
from weightops.formats.quantized.compressed_tensors import COMPRESSED
from weightops.formats.quantized.gptq_weights import GptqOptions, gptq_format
from weightops.formats.quantized.hqq import HQQ
from weightops.formats.quantized.mlx import MLX
from weightops.formats.quantized.modelopt import MODELOPT
from weightops.formats.quantized.mxfp4 import MXFP4
from weightops.formats.quantized.quanto import QUANTO
from weightops.formats.quantized.scaled import FP8, SCALED
from weightops.formats.quantized.torchao import TORCHAO
from weightops.formats.quantized.weights import (
    DAMAGED,
    NumberFormat,
    QuantizedWeight,
    View,
    refuse_method,
    stated,
)
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.lazy import Evaluate

FORMATS = (BITSANDBYTES, MXFP4, COMPRESSED, MODELOPT, HQQ, TORCHAO, QUANTO, AWQ_FORMAT, MLX, SCALED)
"""In the order in which they are looked for: those that name their tensors most clearly first, and GPTQ after AWQ."""
_UNREAD = {
    "eetq": "its own kernels",
    "higgs": "codebooks",
    "vptq": "codebooks",
    "aqlm": "codebooks",
    "spqr": "its own kernels",
    "exl2": "its own kernels",
    "exl3": "its own kernels",
    "bitnet": "ternary weights, packed in several ways",
    "fp_quant": "rotated weights",
}
"""Methods that are not read, and why."""
_UNUSED = (
    ".input_scale",
    ".output_scale",
    ".activation_scale",
    ".input_global_scale",
    ".input_scale_ub",
    ".input_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    ".output_zero_point",
    ".qscale_act",
    ".weight_format",
    ".weight_quantizer._amax",
    ".input_quantizer._amax",
    ".k_proj.output_scale",
    ".v_proj.output_scale",
)
"""What calibration leaves of activations, by the ends of names."""
_SCALES = (".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point", ".weight_packed", ".SCB")
"""Tensors that mean nothing without a quantised weight."""


@dataclass(frozen=True)
class Quantized:
    """The quantised weights of a checkpoint by name, and the tensors that belong to none and stand for nothing in a
    plain model, such as scales of activations. `method` is what its files say, and `stated_in` which of them."""

    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    method: str | None = None
    stated_in: str = ""
    notes: tuple[str, ...] = ()
    by_part: Mapping[str, str] = field(default_factory=dict)
    """For each tensor that is part of a weight, that weight's name."""

    def __bool__(self) -> bool:
        return bool(self.weights)

    @property
    def schemes(self) -> Mapping[str, int]:
        """How many weights are stored in which way."""
        counts: dict[str, int] = {}
        for weight in self.weights.values():
            counts[weight.scheme] = counts.get(weight.scheme, 0) + 1
        return counts


def find_weights(
    checkpoint: Checkpoint,
    evaluate: Evaluate,
    gptq: GptqOptions | None = None,
    shape_of: Callable[[str], tuple[int, ...] | None] = lambda name: None,
    *,
    shapes_only: bool = False,
) -> Quantized:
    """The quantised weights of a checkpoint, as its tensors show them, held against what its files say.

    `shape_of` gives the shape of a weight by the model's architecture, which one format does not store. With
    `shapes_only` the weights say what they are, and their numbers are not asked for.
    Raises `CorruptInput` for tensors that do not fit each other, `IncompatibleInputs` where they are of another format
    than the files say, or of one that is not read.
    """
    settings, stated_in = stated(checkpoint)
    view = View(checkpoint, evaluate, settings, stated_in, shape_of, shapes_only)
    _refuse_unread(view)
    weights: dict[str, QuantizedWeight] = {}
    formats = (*FORMATS, gptq_format(gptq or GptqOptions()))
    for number_format in formats:
        for weight in _found(view, number_format):
            if weight.name in weights or (weight.name in checkpoint and weight.name not in weight.parts.values()):
                raise IncompatibleInputs(
                    f"{view.where}: {escape(weight.name)} is there in two forms",
                    hint="it was saved plain and quantised; drop one of them with `weightops shard --drop`",
                )
            weights[weight.name] = weight
    unused = tuple(name for name in view if weights and name.endswith(_UNUSED))
    _refuse_orphans(view, weights, formats)
    ignored = _ignored_but_quantised(view, weights)
    if ignored:
        view.notes.append(f"{view.where}: {stated_in} lists {listed(ignored, 3)} as not quantised, and the tensors are")
    return Quantized(weights, unused, view.method, stated_in, tuple(view.notes), dict(view.taken))


def _found(view: View, number_format: NumberFormat) -> Iterator[QuantizedWeight]:
    """The weights of one format, whose tensors no other is asked for."""
    for weight in _hinted(number_format.find(view)):
        refuse_method(view, number_format.methods, weight.name, f"{number_format.name}: {weight.scheme}")
        try:
            weight.in_dtype()  # holds the shapes of its parts against each other
        except IncompatibleInputs as error:
            raise view.misfit(weight.name, f"cannot be made of its parts: {error}") from error
        view.taken |= dict.fromkeys(weight.parts.values(), weight.name)
        yield weight


def _hinted(weights: Iterator[QuantizedWeight]) -> Iterator[QuantizedWeight]:
    """The same, with a hint for what raises without one: states that are no JSON, shapes that no op can read."""
    try:
        yield from weights
    except WeightopsError as error:
        error.hint = error.hint or DAMAGED
        raise


def _refuse_unread(view: View) -> None:
    reason = _UNREAD.get(view.method or "")
    if reason is not None:
        raise IncompatibleInputs(
            f"{view.where}: {view.stated_in} says quant_method {view.method} ({reason}), which is not read",
            hint="take the checkpoint that it was made of, or dequantise it with its own library",
        )


def _refuse_orphans(view: View, weights: Mapping[str, QuantizedWeight], formats: Sequence[NumberFormat]) -> None:
    """Refuse parts whose weight is plain or not there, and plain weights that are said to be quantised."""
    used = {weight.format for weight in weights.values()}
    endings = (*_SCALES, *(e for f in formats if f.name in used or view.method in f.methods for e in f.endings))
    for name in view:
        if name.endswith(endings) and not name.endswith(_UNUSED):
            raise IncompatibleInputs(
                f"{view.where}: {escape(name)} is a part of a quantised weight, and {_of(view, name)}",
                hint="a file is missing, or the weights were dequantised and their scales kept",
            )
    if not weights and view.method is None:
        return
    for name in view:
        spec = view.checkpoint[name].spec
        is_code = spec.dtype in FP8 or (not spec.dtype.is_float and name.endswith(".weight"))
        if is_code and len(spec.shape) >= 2:
            raise view.misfit(
                name,
                f"is {spec} and has no scales, expected them or plain numbers",
                "is a file of the model missing? its scales may lie in another shard",
            )
    if not weights:
        raise IncompatibleInputs(
            f"{view.where}: {view.stated_in} says quant_method {escape(str(view.method))}, and every weight is plain",
            hint="it was dequantised and the configuration kept: remove what it says of quantisation",
        )


def _of(view: View, name: str) -> str:
    """What there is of the weight that a part belongs to."""
    module = name.rpartition(".")[0]
    weight = next((n for n in (f"{module}.weight", module) if n in view.checkpoint), None)
    return f"{escape(weight)} is plain" if weight is not None else "the others of its parts are not there"


def _ignored_but_quantised(view: View, weights: Mapping[str, QuantizedWeight]) -> list[str]:
    """The weights that are quantised although the configuration names their modules as ones that are not."""
    named = [
        view.settings.get(key) for key in ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
    ]
    modules = {str(module) for found in named if isinstance(found, list) for module in found}
    return [name for name in weights if name.removesuffix(".weight") in modules]
