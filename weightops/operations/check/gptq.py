"""What check says of models quantised by GPTQ: tensors against each other and the config, and zero points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from weightops.checkpoint import Checkpoint
from weightops.engine.examine import TensorReport
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.quantized.gptq import (
    CONFIG_KEY,
    CONFIG_NAME,
    Module,
    QuantizeConfig,
    is_act_order,
    prefixes,
    read_config,
    read_module,
)
from weightops.formats.quantized.gptq_zeros import CARRIES, ZeroEvidence, examine_zeros, mislabelled
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.lazy import Evaluate
from weightops.operations.check.report import Finding, Severity

_CODE = "quantization"
_DAMAGED = "fetch the file again, or quantise the model again"


def gptq_findings(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorReport], evaluate: Evaluate | None
) -> Iterator[Finding]:
    """Everything that is wrong with the quantised modules; values are looked at if they can be evaluated."""
    if not prefixes(checkpoint) or not (_is_stated(checkpoint) or _has_modules(checkpoint)):
        return
    try:
        config = read_config(checkpoint)
    except IncompatibleInputs:
        return  # it is said to be quantised in another way
    except CorruptInput as error:
        yield Finding("error", _CODE, "config.json", str(error), error.hint or "")
        config = None
    yield from _config_findings(checkpoint, config)
    found: list[Module] = []
    wrong: dict[str, list[tuple[str, str]]] = {}
    for prefix in prefixes(checkpoint):
        try:
            found.append(read_module(checkpoint, prefix, config))
        except (CorruptInput, IncompatibleInputs) as error:
            wrong.setdefault(error.hint or "", []).append((f"{prefix}.qweight", str(error)))
    for hint, cases in wrong.items():
        more = f"; so it is with {len(cases) - 1} more modules" if len(cases) > 1 else ""
        yield Finding("error", _CODE, cases[0][0], cases[0][1] + more, hint)
    for module in found:
        yield from _scale_findings(module, tensors.get(f"{module.prefix}.scales"))
    if evaluate is not None:
        yield from _index_findings(found, config, evaluate)
        yield from _zero_findings(checkpoint, config, examine_zeros(found, evaluate))


def biases_of_zeros(checkpoint: Checkpoint, tensors: Mapping[str, TensorReport]) -> list[str]:
    """Biases of quantised modules that add nothing, as far as values were read: AutoGPTQ gave every layer one."""
    found = []
    for name in (f"{prefix}.bias" for prefix in prefixes(checkpoint) if f"{prefix}.bias" in checkpoint):
        statistics = tensors[name].statistics
        if statistics is None or (statistics.is_constant and not statistics.minimum):
            found.append(name)
    return found


def _config_findings(checkpoint: Checkpoint, config: QuantizeConfig | None) -> Iterator[Finding]:
    """Which of the two files say how the model is quantised, and whether readers know what they say."""
    if config is None:
        return
    inside, beside = CONFIG_KEY in _stated(checkpoint), CONFIG_NAME in checkpoint.sidecars
    if not inside:
        text = f"config.json has no {CONFIG_KEY}, only {CONFIG_NAME} says how the model is quantised"
        yield Finding("warning", _CODE, "config.json", text, "transformers and vLLM read config.json")
    elif not beside:
        text = f"there is no {CONFIG_NAME}, only config.json says how the model is quantised"
        yield Finding("note", _CODE, CONFIG_NAME, text, "AutoGPTQ reads no other")
    by_gptqmodel = any(CARRIES in program for program in config.quantizers)
    if not config.sym and config.checkpoint_format == "gptq" and not by_gptqmodel:
        text = "the model is asymmetric, in checkpoint_format gptq"
        yield Finding("note", _CODE, "config.json", text, "GPTQModel and transformers refuse that; gptq_v2 is for it")
    without = [prefix for prefix in prefixes(checkpoint) if f"{prefix}.g_idx" not in checkpoint]
    if without:
        text = f"{len(without)} modules have no g_idx: {listed(without)}"
        lost = config.desc_act and config.group_size != -1
        severity: Severity = "error" if lost else "warning"
        hint = "the config says desc_act: which group a column is in is lost" if lost else "transformers needs it"
        yield Finding(severity, _CODE, f"{without[0]}.g_idx", text, hint)


def _is_stated(checkpoint: Checkpoint) -> bool:
    """Whether something says that the checkpoint is quantised."""
    return CONFIG_KEY in _stated(checkpoint) or CONFIG_NAME in checkpoint.sidecars


def _has_modules(checkpoint: Checkpoint) -> bool:
    """Whether there is more of a module than one stray tensor."""
    return any(f"{prefix}.scales" in checkpoint for prefix in prefixes(checkpoint))


def _stated(checkpoint: Checkpoint) -> Mapping[str, Any]:
    try:
        return checkpoint.config()
    except CorruptInput:
        return {}


def _scale_findings(module: Module, report: TensorReport | None) -> Iterator[Finding]:
    """Scales that make nothing of their integers; those that are no numbers are found in every tensor."""
    if report is None or report.statistics is None:
        return
    found, name = report.statistics, f"{module.prefix}.scales"
    if found.zero:
        text = f"{escape(name)} holds {found.zero} zeros of {found.elements}: what they scale is zero"
        yield Finding("warning", _CODE, name, text, "groups of zero weights, or a scale that float16 rounds to zero")
    if found.subnormal:
        text = f"{escape(name)} holds {found.subnormal} of {found.elements} that are subnormal in float16"
        yield Finding("warning", _CODE, name, text, "they have few bits, and some kernels take them for zero")


def _index_findings(modules: list[Module], config: QuantizeConfig | None, evaluate: Evaluate) -> Iterator[Finding]:
    """g_idx of each module: groups that there are, of the size that the config says; and whether it has act-order."""
    ordered: list[str] = []
    for module in modules:
        if module.g_idx is None:
            continue
        name = f"{module.prefix}.g_idx"
        index = np.frombuffer(evaluate([module.g_idx])[0], np.int32)
        if index.min() < 0 or index.max() >= module.groups:
            odd = int(index.min() if index.min() < 0 else index.max())
            text = f"{escape(name)} names group {odd}, expected 0 to {module.groups - 1}"
            yield Finding("error", _CODE, name, text, _DAMAGED)
            continue
        if is_act_order(index):
            ordered.append(module.prefix)
        counts = np.bincount(index, minlength=module.groups)
        largest = module.group_size or int(counts.max())
        if counts.max() > largest or (module.in_features % module.groups == 0 and counts.min() != counts.max()):
            text = f"{escape(name)}: groups have {counts.min()} to {counts.max()} columns, expected {largest}"
            yield Finding("warning", _CODE, name, text, "kernels that sort columns by group refuse it, or fail")
    if config is not None and ordered and not config.desc_act:
        text = f"the config says no desc_act, and {len(ordered)} modules have columns in another order: "
        yield Finding(
            "error", _CODE, f"{ordered[0]}.g_idx", text + listed(ordered), "kernels that go by the flag ignore g_idx"
        )
    indexed = [module for module in modules if module.g_idx is not None and module.groups > 1]
    if config is not None and config.desc_act and indexed and not ordered:
        text = "the config says desc_act, and g_idx has the columns of all modules in their order"
        yield Finding("note", _CODE, "config.json", text, "without the flag kernels are faster")


def _zero_findings(checkpoint: Checkpoint, config: QuantizeConfig | None, found: ZeroEvidence) -> Iterator[Finding]:
    """What is wrong with the zero points: of the other format than the config says, or such as readers differ in."""
    try:
        shown = mislabelled(found, config)
    except CorruptInput as error:
        yield Finding(
            "error", "zero-convention", "config.json", f"{escape(checkpoint.name)}: {error}", error.hint or ""
        )
        return
    if shown is not None and config is not None:
        example = (found.v1 or found.v2)[0]
        text = (
            f"the config says checkpoint_format {config.checkpoint_format}, the zero points of {escape(example)} are "
            f"those of a symmetric model in {shown}"
        )
        hint = "correct checkpoint_format: read as it is, every weight is off by a step"
        yield Finding("error", "zero-convention", f"{example}.qzeros", text, hint)
    elif config is not None and config.sym and found.mixed:
        text = f"the config says sym, and {len(found.mixed)} modules have other zero points: {listed(found.mixed)}"
        yield Finding(
            "error", "zero-convention", f"{found.mixed[0]}.qzeros", text, "Marlin kernels do not read zero points then"
        )
    is_v2 = config is not None and config.checkpoint_format == "gptq_v2"
    if found.all_ones and not is_v2 and shown is None:
        text = f"{found.all_ones} stored zero points are all ones, {escape(found.first_all_ones)} has the first"
        hint = (
            "a zero point of 0 in checkpoint_format gptq: readers differ in it, and the packer may have damaged others"
        )
        yield Finding("warning", "zero-convention", f"{found.first_all_ones}.qzeros", text, hint)
