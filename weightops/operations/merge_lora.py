"""Merge LoRA adapters into a base: the checkpoint that peft's `merge_and_unload` gives, to the bit and streaming.

Every tensor of every adapter goes somewhere, or the merge is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.adapter import Adapter, read_adapter
from weightops.formats.adapter_files import is_adapter
from weightops.formats.folder import refuse_parts
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.merge_lora_files import merged_sidecars, with_settings
from weightops.operations.merge_lora_tensors import Merging
from weightops.operations.pairing import refuse_delta
from weightops.ops.elementwise import cast
from weightops.ops.lora import Precision
from weightops.spec import DType

_BATCH_NBYTES = 64 << 20


def merge_lora(
    base: Checkpoint,
    adapter: Sequence[Checkpoint],
    *,
    weights: Sequence[float] = (),
    precision: Precision = "float32",
    two_roundings: bool = False,
    evaluate: Evaluate,
) -> Checkpoint:
    """`base` with the adapters merged into it, one after the other.

    `weights` are factors for the scale of each adapter, as peft's `set_scale` takes them. In float32 the result has the
    bits of peft 0.21 on a CPU: `PeftModel.from_pretrained` and `merge_and_unload`, with `two_roundings` those of
    `safe_merge=True`, which rounds each change before it is added. float64 rounds once, and gives the same bits on
    every machine. Embeddings are untied where the adapter holds one of them for itself, and config.json says so.

    Raises `IncompatibleInputs` for adapters that are not for this base, are not plain LoRA or DoRA, or change nothing,
    `CorruptInput` for damaged ones, `UsageError` for weights that cannot be meant.
    """
    _check_base(base)
    adapters = _read(adapter, weights)
    merging = Merging(base, adapters, precision, two_roundings)
    notes = _check_values(adapters, evaluate)
    sidecars, files = merged_sidecars(base, adapter)
    tensors = merging.tensors
    merged = replace(
        base,
        tensors=tensors,
        sidecars=sidecars,
        shards=dict.fromkeys(tensors, next(reversed(list(base.shards.values())), "")) | dict(base.shards),
        total_size=None,
        content_id=None,
        digests={name: digest for name, digest in base.digests.items() if tensors.get(name) == base.get(name)},
        warnings=(*base.warnings, *(w for a in adapter for w in a.warnings), *notes, *merging.notes, *files),
        metadata={"format": "pt"},
        prefix=None,
    )
    return with_settings(merged, merging.vocab_size, merging.is_untied)


def _check_base(base: Checkpoint) -> None:
    """Refuse what is no model that something can be merged into."""
    refuse_delta(base, "the base")
    refuse_parts(base)
    where = escape(base.name)
    if is_adapter(base.sidecars, base.shards):
        raise IncompatibleInputs(f"{where}: is an adapter, expected a model", hint="give the base first")
    quantised = base.config().get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise IncompatibleInputs(
            f"{where}: config.json has a quantization_config{f' ({escape(str(method))})' if method else ''}",
            hint="merge into the model that it was quantised from, and quantise the result",
        )


def _read(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> list[Adapter]:
    """The adapters, with their weights in their scales."""
    if not checkpoints:
        raise UsageError("there is no adapter to merge", hint="name at least one")
    if weights and len(weights) != len(checkpoints):
        raise UsageError(
            f"there are {len(weights)} weights for {len(checkpoints)} adapters",
            hint="give one for each, in their order",
        )
    if not all(map(math.isfinite, weights)):
        raise UsageError("a weight must be a finite number", hint="1 is what the adapter was trained with")
    found = []
    for checkpoint, weight in zip(checkpoints, weights or (1.0,) * len(checkpoints), strict=True):
        adapter = read_adapter(checkpoint, weight)
        unscaled = [*adapter.whole, *adapter.rows, *(path for path in adapter.base if path.endswith(".bias"))]
        unscaled += [path for (path, _), factors in adapter.factors.items() if factors.magnitude is not None]
        if weight != 1 and unscaled:
            raise UsageError(
                f"{escape(checkpoint.name)}: holds {escape(unscaled[0])} whole or as a magnitude, which has no scale "
                f"that {weight:g} could be a factor of",
                hint="leave its weight out, or give 1",
            )
        found.append(adapter)
    return found


def _check_values(adapters: Sequence[Adapter], evaluate: Evaluate) -> list[str]:
    """Refuse adapters that hold values that are no numbers, or nothing but zeros; says of which factors that is so."""
    notes = [note for adapter in adapters for note in adapter.notes]
    for adapter in adapters:
        vectors = [t for f in adapter.factors.values() for t in (f.bias, f.magnitude) if t is not None]
        matters = _scan(adapter, [*vectors, *adapter.rows.values()], evaluate)
        changes = [any(f.magnitude is not None for f in adapter.factors.values()), bool(adapter.rows)]
        changes += [any(matters), bool(adapter.base), bool(adapter.whole)]
        factors = list(adapter.factors.values())
        is_nonzero = _scan(adapter, [t for f in factors for t in (f.a, f.b)], evaluate)
        is_scaled = adapter.weight != 0 and (adapter.config.lora_alpha != 0 or bool(adapter.config.alpha_pattern))
        works = [is_scaled and all(is_nonzero[i : i + 2]) for i in range(0, len(is_nonzero), 2)]
        if not any(works) and not any(changes):
            raise IncompatibleInputs(
                f"{escape(adapter.name)}: changes nothing: lora_B is zero everywhere",
                hint="was it saved before it was trained, or without its factors?",
            )
        if factors and not any(works):
            notes.append(f"{escape(adapter.name)}: the factors change nothing, lora_B is zero everywhere")
    return notes


def _scan(adapter: Adapter, tensors: Sequence[LazyTensor], evaluate: Evaluate) -> list[bool]:
    """For each tensor, whether it holds anything but zeros; raises `CorruptInput` for NaN and infinity."""
    found: list[bool] = []
    while len(found) < len(tensors):
        batch: list[LazyTensor] = []
        nbytes = 0
        for tensor in tensors[len(found) :]:
            if batch and nbytes + tensor.spec.numel * 4 > _BATCH_NBYTES:
                break
            batch.append(tensor)
            nbytes += tensor.spec.numel * 4
        for tensor, data in zip(batch, evaluate([cast(t, DType.F32) for t in batch]), strict=True):
            values = np.frombuffer(data, dtype=np.float32)
            if not np.isfinite(values).all():
                name = next(name for name, other in adapter.tensors.items() if other is tensor)
                raise CorruptInput(
                    f"{escape(adapter.name)}: {escape(name)} holds values that are no numbers",
                    hint="the training run failed, or the file was damaged after it",
                )
            found.append(bool(values.any()))
    return found
