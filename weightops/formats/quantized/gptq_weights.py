"""GPTQ as one of the table's formats: modules of `qweight`, `qzeros`, `scales` and `g_idx`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from weightops.formats.modules import is_conv1d
from weightops.formats.quantized.gptq import (
    PARTS,
    CheckpointFormat,
    Module,
    QuantizeConfig,
    parse_config,
    read_config,
    read_module,
)
from weightops.formats.quantized.gptq_zeros import ZeroOverflow, find_zeros
from weightops.formats.quantized.weights import (
    AUTO_ROUND,
    Integers,
    NumberFormat,
    QuantizedWeight,
    View,
    refuse_method,
)
from weightops.io.names import listed
from weightops.lazy import LazyTensor
from weightops.ops.gptq.steps import GroupSteps
from weightops.ops.gptq.tensors import TrueZeros, Zeros, dequantized
from weightops.ops.numbers.codes import Codes, held
from weightops.ops.transpose import transposed
from weightops.spec import DType

METHODS = frozenset({"gptq"}) | AUTO_ROUND


@dataclass(frozen=True)
class GptqOptions:
    """What to go by instead of the configuration, and what stored zero points of all ones are in v1."""

    checkpoint_format: CheckpointFormat | None = None
    zero_overflow: ZeroOverflow | None = None


def gptq_format(options: GptqOptions) -> NumberFormat:
    """The format, read by `options`."""
    return NumberFormat("gptq", METHODS, partial(find, options), (".qzeros", ".scales", ".g_idx"))


def find(options: GptqOptions, view: View) -> Iterator[QuantizedWeight]:
    """The modules that are packed as GPTQ packs them; raises as `gptq.read_module` and `gptq_zeros.find_zeros` do."""
    prefixes = view.ending(".qweight")
    if not prefixes:
        return
    refuse_method(view, METHODS, prefixes[0], "those of gptq")
    settings = _auto_round(view) if view.method in AUTO_ROUND else read_config(view.checkpoint)
    modules = [read_module(view.checkpoint, prefix, settings) for prefix in prefixes]
    zeros: Zeros = "as-stored"
    if not view.shapes_only:
        zeros, notes = find_zeros(
            view.where, modules, settings, options.checkpoint_format, options.zero_overflow, view.evaluate
        )
        view.notes += notes
    without = [prefix for prefix in prefixes if f"{prefix}.g_idx" not in view.checkpoint]
    if without and settings is not None and settings.desc_act and settings.group_size != -1:
        view.notes.append(
            f"{view.where}: the config says desc_act, and there is no g_idx: groups are taken in the order of columns, "
            f"in {listed(without, 3)}"
        )
    model_type = view.checkpoint.config().get("model_type")
    for module in modules:
        yield _weight(module, zeros, is_conv1d(module.prefix, model_type))


def _auto_round(view: View) -> QuantizeConfig:
    """What auto-round says, as GPTQ says it: zero points are stored minus one where the packing is auto_gptq's."""
    packing = str(view.settings.get("packing_format") or view.settings.get("backend") or "")
    known = ("bits", "group_size", "sym")
    return parse_config(
        {
            **{name: view.settings[name] for name in known if view.settings.get(name) is not None},
            "checkpoint_format": "gptq" if packing in ("", "auto_round:gptq", "auto_round:auto_gptq") else "gptq_v2",
            # What it says of single layers is told by their tensors.
            "dynamic": view.settings.get("extra_config") or None,
        },
        f"{view.where}: {view.stated_in}",
    )


def _weight(module: Module, zeros: Zeros, is_transposed: bool) -> QuantizedWeight:
    """The weight `[n, k]` of a module, or `[k, n]` of transformers' Conv1D (GPT-2)."""
    size = module.group_size or module.in_features
    parts = (module.qweight, module.qzeros, module.scales, module.g_idx)

    def value(dtype: DType, steps: bool) -> LazyTensor:
        if steps:
            inputs = (module.scales,) if module.g_idx is None else (module.scales, module.g_idx)
            made = LazyTensor.make(GroupSteps(module.in_features, size), *inputs)
        else:
            made = dequantized(module.prefix, parts, module.bits, zeros, size, dtype)
        return transposed(made) if is_transposed else made

    names = {part: f"{module.prefix}.{part}" for part in PARTS if part != "g_idx" or module.g_idx is not None}
    scheme = f"gptq, {module.bits} bits, groups of {size}"
    integers = None if is_transposed else _integers(module, zeros, size)
    return QuantizedWeight(f"{module.prefix}.weight", "gptq", scheme, names, module.scales.spec.dtype, value, integers)


def _integers(module: Module, zeros: Zeros, size: int) -> Integers:
    codes = LazyTensor.make(Codes(module.bits, module.in_features), held(transposed(module.qweight)))
    points = LazyTensor.make(TrueZeros(module.bits, zeros), module.qzeros)
    return Integers(codes, held(transposed(module.scales)), held(transposed(points)), module.bits, size, module.g_idx)
