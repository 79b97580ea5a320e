"""What check says of values: of one tensor from its statistics, of several from their digests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from weightops.checkpoint import Checkpoint
from weightops.engine.examine import TensorReport
from weightops.formats import ungathered
from weightops.formats.containers import find_aliases
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.names import is_derived
from weightops.layouts.restored import ROTARY_SUFFIX
from weightops.operations.check.report import Finding
from weightops.ops.measures.statistics import TensorStatistics, has_statistics
from weightops.spec import DType, TensorSpec

_LARGEST_FP16 = 65504.0
_WIDER_THAN_FP16 = (DType.BF16, DType.F32, DType.F64)
_MUCH = 0.05
"""The share of subnormal numbers from which on it is worth a word: trained weights in float16 have below a percent."""
_PER_ELEMENT = ("scale", "scales", "zeros", "g_idx", "zero_point", "_scale_inv")


def value_findings(name: str, spec: TensorSpec, found: TensorStatistics, max_abs: float | None) -> Iterator[Finding]:
    """What is wrong with the values of one tensor."""
    shown = escape(name)
    if not found.elements:
        return
    if found.nan:
        where = f"{shown} holds {_share(found.nan, found.elements)} NaN, expected none"
        yield Finding(
            "error", "nan", name, where, "it came so from training or a cast; fetch the file again to be sure"
        )
    if found.infinite:
        where = f"{shown} holds {_share(found.infinite, found.elements)} infinities, expected none"
        yield Finding("error", "infinite", name, where, "a cast to float16 makes them of magnitudes above 65504")
    absmax = found.absmax
    if absmax is not None and max_abs is not None and absmax > max_abs:
        text = f"{shown} has a magnitude of {absmax:.9g}, expected at most {max_abs:.9g}"
        yield Finding("warning", "range", name, text)
    if absmax is not None and absmax > _LARGEST_FP16 and spec.dtype in _WIDER_THAN_FP16:
        text = f"{shown} has a magnitude of {absmax:.9g}, float16 ends at 65504"
        yield Finding("note", "fp16-range", name, text, "cast to float16 it would hold infinities")
    if found.subnormal > _MUCH * found.elements:
        text = f"{shown}: {_share(found.subnormal, found.elements)} subnormal in {spec.dtype.value}"
        yield Finding(
            "note", "subnormal", name, text, "they have fewer significant bits; bfloat16 or float32 hold them"
        )
    if found.zero_rows and found.zero_rows < spec.shape[0]:
        text = f"{shown}: {found.zero_rows} of {spec.shape[0]} rows are zero throughout"
        yield Finding("note", "zero-rows", name, text, "padding, or tokens that were never trained")
    yield from _constant(name, spec, found)


def _constant(name: str, spec: TensorSpec, found: TensorStatistics) -> Iterator[Finding]:
    """A tensor of one value, where that is not usual: norms of ones, and biases of zeros, are as they were made."""
    if not found.is_constant or found.elements < 2 or not spec.dtype.is_float or name.endswith(_PER_ELEMENT):
        return
    if not found.minimum:
        is_bias = name.endswith("bias")
        text = f"all {found.elements} elements of {escape(name)} are zero"
        hint = "" if is_bias else "it was never trained, or not stored"
        yield Finding("note" if is_bias else "warning", "zero", name, text, hint)
    elif found.minimum != 1 or len(spec.shape) > 1:
        text = f"all {found.elements} elements of {escape(name)} are {found.minimum:.9g}"
        yield Finding("warning", "constant", name, text, "it was never trained, or not stored")


def _share(count: int, elements: int) -> str:
    return f"{count} of {elements} elements ({100 * count / elements:.3g} %)"


def empty_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tensors without elements."""
    names = [name for name, tensor in checkpoint.items() if not tensor.spec.numel]
    if names:
        text = f"{_tensors(len(names))} without elements: {listed(names)}"
        yield Finding("error", "empty", names[0], text, ungathered.HINT)


def unexamined_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tensors whose elements are no numbers here."""
    by_dtype: dict[DType, list[str]] = {}
    for name, tensor in checkpoint.items():
        if not has_statistics(tensor.spec.dtype) and not tensor.spec.dtype.is_block:
            by_dtype.setdefault(tensor.spec.dtype, []).append(name)
    for dtype, names in by_dtype.items():
        text = f"the values of {_tensors(len(names))} of {dtype.value} are digested, and not looked at: {listed(names)}"
        yield Finding("note", "not-examined", names[0], text)


def manifest_findings(checkpoint: Checkpoint, tensors: Mapping[str, TensorReport]) -> Iterator[Finding]:
    """Tensors whose digest is not that of the manifest that lies beside them."""
    for name, expected in checkpoint.digests.items():
        found = tensors[name].xxh3_128 if name in tensors else None
        if found is not None and found != expected:
            text = f"{escape(name)} has xxh3_128 {found}, the manifest in its folder says {expected}"
            yield Finding("error", "manifest", name, text, "`weightops verify` says which files changed")


def shared_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Names that stand for the same bytes of a file."""
    aliases = find_aliases(checkpoint.tensors)
    for alias, name in aliases.items():
        text = f"{escape(alias)} and {escape(name)} are the same bytes of a file"
        yield Finding("note", "shared", alias, text)


def duplicate_findings(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorReport], expected: Sequence[frozenset[str]]
) -> Iterator[Finding]:
    """Tensors that are stored apart and hold the same, but for those of one value, which are equal by their nature.

    Also not of interest are `expected` pairs, the copies that Meta's parts hold, and what any model computes anew.
    """
    aliases = find_aliases(checkpoint.tensors)
    groups: dict[tuple[TensorSpec, str], list[str]] = {}
    for name, report in tensors.items():
        found = report.statistics
        usual = (
            is_derived(name.rpartition("/")[2])
            or name.endswith((ROTARY_SUFFIX, *_PER_ELEMENT, ".weight_shape"))
            or report.spec.numel < 2
        )
        if report.xxh3_128 is None or name in aliases or usual or (found is not None and found.is_constant):
            continue
        groups.setdefault((report.spec, report.xxh3_128), []).append(name)
    for (spec, _), names in groups.items():
        if len({name.rpartition("/")[2] for name in names}) < 2 or frozenset(names) in expected:
            continue
        text = f"{_tensors(len(names))} of {spec} hold the same: {listed(names)}"
        yield Finding("warning", "duplicate", names[0], text, "was one of them stored under another's name?")


def _tensors(count: int) -> str:
    return f"{count} tensor" + "s" * (count != 1)
