"""Merge LoRA adapters into a base: the checkpoint that peft's `merge_and_unload` gives, to the bit and streaming.

Every tensor of every adapter goes somewhere, or the merge is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, UsageError
from weightops.formats import ungathered
from weightops.formats.adapter.files import is_gguf_adapter, refuse_adapter
from weightops.formats.adapter.lora import Adapter, read_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.io.escape import escape
from weightops.layouts.embeddings import vocabulary_rows
from weightops.lazy import Evaluate
from weightops.operations.check import tokens_without_rows
from weightops.operations.dequantize import plain_if_quantised
from weightops.operations.merge_lora.dumps import out_of_training
from weightops.operations.merge_lora.files import merged_sidecars, with_settings
from weightops.operations.merge_lora.tensors import Merging
from weightops.operations.merge_lora.undone import about_taking_off
from weightops.operations.merge_lora.values import check_values
from weightops.ops.lora.factors import Precision

_ROWLESS = "the first of the tokens without a row ends a run of the model; was the embedding resized in training?"


def merge_lora(
    base: Checkpoint,
    adapter: Sequence[Checkpoint],
    *,
    weight: Sequence[float] = (),
    precision: Precision = "float32",
    two_roundings: bool = False,
    evaluate: Evaluate,
) -> Checkpoint:
    """`base` with the adapters merged into it, one after the other.

    `weight`: a factor for the scale of each adapter, as peft's `set_scale` takes them. In float32 the result has the
    bits of peft 0.21 on a CPU: `PeftModel.from_pretrained` and `merge_and_unload`, with `two_roundings` those of
    `safe_merge=True`, which rounds each change before it is added. float64 rounds once, and gives the same bits on
    every machine. Embeddings are untied where the adapter holds one of them for itself, and config.json says so.

    A weight below 0 takes an adapter off, as far as roundings allow; how far that is, a warning says. A base may be
    what a training run has saved with the factors in it, and the adapter the same.

    A quantised base (QLoRA) is merged into as the plain model that it stands for, each weight in its native type. An
    adapter may lie in a GGUF file.

    Raises `IncompatibleInputs` for adapters that are not for this base, are not plain LoRA or DoRA, or change nothing,
    `CorruptInput` for damaged ones, `UsageError` for weights that cannot be meant.
    """
    base = out_of_training(base)
    _check_base(base)
    adapter = [_as_peft_saves_it(each, base) if is_gguf_adapter(each) else each for each in adapter]
    base = plain_if_quantised(base, evaluate)
    adapters = _read(adapter, weight)
    merging = Merging(base, adapters, precision, two_roundings)
    notes = check_values(adapters, merging.changes, evaluate)
    notes += about_taking_off(base, merging.tensors, adapters, evaluate)
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
        prefix=None,
    )
    merged = with_settings(merged, merging.vocab_size, merging.is_untied)
    rows = vocabulary_rows(merged)
    rowless = [f"{each.message}: {_ROWLESS}" for each in tokens_without_rows(merged.sidecar, rows)] if rows else []
    return replace(merged, warnings=(*merged.warnings, *rowless))


def _as_peft_saves_it(adapter: Checkpoint, base: Checkpoint) -> Checkpoint:
    """An adapter that lies in a GGUF file, which says nothing of the heads and the layers that its base has."""
    from weightops.layouts import gguf  # imported here because few adapters are in GGUF

    found = gguf.read_adapter(adapter, gguf.Base(base.config(), escape(base.name)))
    return replace(found, warnings=(*adapter.warnings, *found.warnings))


def _check_base(base: Checkpoint) -> None:
    """Refuse what is no model that something can be merged into."""
    refuse_delta(base, "the base")
    refuse_adapter(base, "the base")
    refuse_parts(base)
    where = escape(base.name)
    empty = next((name for name, tensor in base.items() if not tensor.spec.numel), None)
    if empty is not None:
        raise CorruptInput(f"{where}: {escape(empty)} is {base[empty].spec}, without elements", hint=ungathered.HINT)


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
