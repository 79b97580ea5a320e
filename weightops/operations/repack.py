"""Repack: the same integers, scales and zero points in another container, without loss or not at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.formats.modules import NUMBERED
from weightops.formats.quantized.containers import (
    Container,
    awq_config,
    compressed_config,
    compressed_weights,
    refuse_module,
    write_integers,
)
from weightops.formats.quantized.gptq import CheckpointFormat, QuantizeConfig, is_act_order, read_config, with_config
from weightops.formats.quantized.gptq_weights import GptqOptions
from weightops.formats.quantized.gptq_zeros import ZeroOverflow
from weightops.formats.quantized.groups import group_of
from weightops.formats.quantized.table import Quantized, find_weights
from weightops.formats.quantized.weights import CONFIG_KEY, Integers, named_dtype, stated, without_quantization
from weightops.formats.sidecars import QUANTISED
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.embeddings import is_vocabulary
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.gptq.tensors import as_codes
from weightops.spec import DType
from weightops.version import __version__


def repack(
    source: Checkpoint,
    *,
    to: Container,
    checkpoint_format: CheckpointFormat | None = None,
    zero_overflow: ZeroOverflow | None = None,
    evaluate: Evaluate,
) -> Checkpoint:
    """`source`, of which each quantised layer is integers with scales, in the container `to`; other tensors stay.

    Read are GPTQ, AWQ (gemm and gemv) and the packed integers of compressed-tensors. Integers, zero points, scales and
    groups are the same afterwards, and so is every weight: what the other container has no place for is refused by
    name. Scales become float16 in gptq and awq, which must have each of them. config.json says what the new one is.

    `checkpoint_format` and `zero_overflow` say of a GPTQ source what they do in `dequantize`.
    Raises `IncompatibleInputs` for sources in other formats, and for bits, shapes, act-order, scales and zero points
    that `to` cannot hold; `UsageError` for a source without config.json, where two of the three say what they are.
    """
    refuse_delta(source, "the source")
    refuse_adapter(source, "the source")
    refuse_parts(source)
    found = find_weights(source, evaluate, GptqOptions(checkpoint_format, zero_overflow))
    if not found:
        raise IncompatibleInputs(
            f"{escape(source.name)}: holds no quantised weight",
            hint="`weightops quantize` makes integers; `weightops inspect` lists its tensors",
        )
    return repacked(source, found, to, evaluate)


@dataclass(frozen=True)
class _Module:
    """A module to be written. `group_size` is None where it has one group."""

    prefix: str
    integers: Integers
    is_symmetric: bool
    in_order: bool

    @property
    def columns(self) -> int:
        return self.integers.codes.spec.shape[1]

    @property
    def group_size(self) -> int | None:
        return self.integers.group_size if self.integers.group_size < self.columns else None


def repacked(
    source: Checkpoint, found: Quantized, to: Container, evaluate: Evaluate, scales: DType | None = None
) -> Checkpoint:
    """`source` with the weights that were `found` in the container `to`, see `repack`; `scales` is their new type."""
    if not source.config() and to in ("awq", "compressed-tensors"):
        raise UsageError(
            f"{escape(source.name)}: has no config.json, where {to} is said", hint="add that of the model to the folder"
        )
    _refuse_activations(source, found, to)
    kind = scales or (None if to == "compressed-tensors" else DType.F16)
    modules = {name: _module(source, name, found, to, kind, evaluate) for name in found.weights}
    config = _configured(source, to, list(modules.values()))
    symmetric = all(module.is_symmetric for module in modules.values())
    made = {
        name: write_integers(m.prefix, m.integers, to, symmetric=symmetric, scales=kind) for name, m in modules.items()
    }
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in source.items():
        parts = made.pop(found.by_part[name], {}) if name in found.by_part else {name: tensor}
        tensors |= parts
        if name in source.shards:
            shards |= dict.fromkeys(parts, source.shards[name])
    result = replace(
        source,
        tensors=tensors,
        shards=shards,
        sidecars={name: file for name, file in source.sidecars.items() if name not in QUANTISED},
        warnings=(*source.warnings, *found.notes, *_notes(source, to, modules, kind)),
        total_size=None,
        content_id=None,
        digests={name: digest for name, digest in source.digests.items() if tensors.get(name) is source.get(name)},
        prefix=None,
    )
    plain = result.with_config(without_quantization)
    if isinstance(config, QuantizeConfig):
        return with_config(plain, config)
    return plain.with_config(lambda known: {**known, CONFIG_KEY: config})


def _refuse_activations(source: Checkpoint, found: Quantized, to: Container) -> None:
    """Refuse what the source says of activations: another container of weights has no place for it."""
    where, (settings, stated_in) = escape(source.name), stated(source)
    if found.unused:
        raise IncompatibleInputs(
            f"{where}: holds scales of activations ({listed(found.unused, 3)}), which {to} has no place for",
            hint="drop them with `weightops shard --drop` if the weights are all that is wanted",
        )
    for name in found.weights:
        module = name.removesuffix(".weight")
        group = group_of(settings, module)
        if group.get("input_activations") or group.get("output_activations"):
            raise IncompatibleInputs(
                f"{where}: {stated_in} says that activations of {escape(module)} are quantised as well, and {to} is of "
                "weights alone",
                hint="`weightops dequantize` makes a plain model of it",
            )


def _module(
    source: Checkpoint, name: str, found: Quantized, to: Container, kind: DType | None, evaluate: Evaluate
) -> _Module:
    """A module, of which everything but its integers is looked at before anything is written."""
    import numpy as np

    weight = found.weights[name]
    where = f"{escape(source.name)}: {escape(name)}"
    integers = weight.integers
    if integers is None or not name.endswith(".weight"):
        raise IncompatibleInputs(
            f"{where} is {weight.scheme}, expected integers with a scale for each row of each group",
            hint="`weightops dequantize` makes a plain model of it, which `weightops quantize` quantises anew",
        )
    rows, columns = integers.codes.spec.shape
    in_order = True
    if integers.g_idx is not None:
        index = np.frombuffer(evaluate([integers.g_idx])[0], np.int32)
        in_order = not is_act_order(index) and np.array_equal(index, np.arange(columns) // integers.group_size)
    refuse_module(where, to, integers.bits, columns, rows, integers.group_size, in_order=in_order)
    if in_order:
        integers = replace(integers, g_idx=None)
    is_symmetric = True
    if integers.zeros is not None:
        label, middle = f"{source.name}: {name}: zero points", 1 << integers.bits - 1
        points = as_codes(np.frombuffer(evaluate([integers.zeros])[0], np.uint8), integers.bits, label)
        is_symmetric = bool((points == middle).all())
        if to == "gptq" and not points.all():
            raise IncompatibleInputs(
                f"{where} has a zero point of 0, which gptq cannot store", hint="gptq_v2 stores zero points as they are"
            )
    _check_scales(where, integers.scales, to, kind, evaluate)
    return _Module(name.removesuffix(".weight"), integers, is_symmetric, in_order)


def _check_scales(where: str, scales: LazyTensor, to: Container, kind: DType | None, evaluate: Evaluate) -> None:
    """Refuse scales that are no numbers, that their new type does not have, or that readers refuse below zero."""
    import numpy as np

    from weightops.ops.elementwise import cast

    new = kind or scales.spec.dtype
    old, kept = evaluate([cast(scales, DType.F32), cast(cast(scales, new), DType.F32)])
    values, stored = np.frombuffer(old, np.float32), np.frombuffer(kept, np.float32)
    if not np.isfinite(values).all():
        raise IncompatibleInputs(f"{where} has scales that are NaN or infinite", hint="quantise the model again")
    if to == "compressed-tensors" and values.min(initial=0) < 0:
        raise IncompatibleInputs(f"{where} has scales below zero, which {to} does not read", hint="choose gptq or awq")
    if not np.array_equal(values, stored):
        odd = values[values != stored][0]
        raise IncompatibleInputs(
            f"{where} has the scale {odd:.9g} in {scales.spec.dtype.value}, which is no number of {new.value}, as {to} "
            "stores them",
            hint="compressed-tensors keeps scales in their own type"
            if to != "compressed-tensors"
            else "quantise the model again",
        )


def _configured(source: Checkpoint, to: Container, modules: Sequence[_Module]) -> QuantizeConfig | dict[str, Any]:
    """What the files say of the new container; raises `IncompatibleInputs` for layers that it cannot have together."""
    symmetric = all(module.is_symmetric for module in modules)
    left = _left(source, modules)
    if to == "compressed-tensors":
        return _compressed(modules, left, symmetric)
    bits = _one(source, to, "bits", {m.integers.bits: m.prefix for m in modules})
    grouped = {m.group_size: m.prefix for m in modules if m.group_size is not None}
    size = _one(source, to, "inputs in a group", grouped) if grouped else -1
    for module in modules:
        # A layer with one group has as many inputs, or in GPTQ, whose last group may be shorter, fewer.
        fits = module.group_size or size < 0 or module.columns == size or (to != "awq" and module.columns < size)
        if not fits:
            _one(source, to, "inputs in a group", {size: next(iter(grouped.values())), module.columns: module.prefix})
    if to == "awq":
        return awq_config(size, left)
    known = _gptq_config(source)
    inside = [module for module in left if NUMBERED.fullmatch(module)]
    return QuantizeConfig(
        bits=bits,
        group_size=size,
        desc_act=any(not module.in_order for module in modules),
        sym=symmetric,
        checkpoint_format=to,
        lm_head=any(module.prefix == "lm_head" for module in modules),
        damp_percent=known.damp_percent if known else None,
        static_groups=known.static_groups if known else False,
        meta={"quantizer": [f"weightops:{__version__}"]},
        dynamic={f"-:^{re.escape(module)}$": {} for module in inside} or None,
    )


def _gptq_config(source: Checkpoint) -> QuantizeConfig | None:
    """What a GPTQ source says of how it was made."""
    return read_config(source) if stated(source)[0].get("quant_method") == "gptq" else None


def _one(source: Checkpoint, to: Container, what: str, found: Mapping[int, str]) -> int:
    """The one number that there is, of those found with a layer that has each."""
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise IncompatibleInputs(
            f"{escape(source.name)}: {escape(one)} has {first} {what}, {escape(other)} {second}: {to} has one number "
            "for all layers",
            hint="compressed-tensors has groups of layers with settings of their own",
        )
    return next(iter(found))


def _compressed(modules: Sequence[_Module], left: Sequence[str], symmetric: bool) -> dict[str, Any]:
    """The config of compressed-tensors: what most layers are like by their class, others by name."""
    sizes = {m.group_size for m in modules} - {None}
    kinds: dict[tuple[int, int | None], list[str]] = {}
    for m in modules:
        size = m.columns if m.columns in sizes else m.group_size
        kinds.setdefault((m.integers.bits, size), []).append(m.prefix)
    most = max(kinds, key=lambda kind: len(kinds[kind]))
    return compressed_config(
        [
            (compressed_weights(bits, size, symmetric=symmetric), ["Linear"] if (bits, size) == most else named)
            for (bits, size), named in sorted(kinds.items(), key=lambda item: item[0] != most)
        ],
        left,
    )


def _left(source: Checkpoint, modules: Sequence[_Module]) -> list[str]:
    """The modules with matrices that are not quantised, embeddings apart: loaders take any other for quantised."""
    quantised = {module.prefix for module in modules}
    matrices = (
        name.removesuffix(".weight")
        for name, tensor in source.items()
        if name.endswith(".weight") and len(tensor.spec.shape) == 2 and not is_vocabulary(name)
    )
    heads = [] if "lm_head" in quantised else ["lm_head"]
    return list(dict.fromkeys([*heads, *(module for module in matrices if module not in quantised)]))


def _notes(source: Checkpoint, to: Container, modules: Mapping[str, _Module], kind: DType | None) -> list[str]:
    """What loaders make of the result that is not to be seen."""
    notes = []
    found = list(modules.values())
    bits = Counter(module.integers.bits for module in found)
    if to == "compressed-tensors" and bits.keys() - {4, 8}:
        notes.append("compressed-tensors with 2 or 3 bits: transformers reads that, and of vLLM its newest versions")
    if not all(module.is_symmetric for module in found):
        asymmetric: dict[Container, str] = {
            "gptq": "asymmetric in gptq: GPTQModel and transformers want gptq_v2 for that",
            "compressed-tensors": "asymmetric in compressed-tensors: vLLM reads that, transformers 5.23 with "
            "CompressedTensorsConfig(dequantize=True) alone",
        }
        notes += [asymmetric[to]] if to in asymmetric else []
    ragged = [m.prefix for m in found if m.group_size is not None and m.columns % m.group_size]
    if ragged:
        notes.append(f"inputs are no multiple of the group size, which vLLM refuses: {listed(ragged, 3)}")
    named = named_dtype(source.config())
    types = {kind or module.integers.scales.spec.dtype for module in found}
    if to == "compressed-tensors" and types != {named or DType.F16}:
        notes.append(
            f"scales are not {named.value if named else 'float16'}, the type of the model: loaders round them to it"
        )
    return notes
