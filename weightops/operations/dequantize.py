"""Dequantise: a checkpoint in any published number format as a plain one, each weight computed as it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from weightops.checkpoint import Checkpoint, Copied, Sidecar, written_json
from weightops.errors import IncompatibleInputs, SourceMissing, UsageError, WeightopsError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.formats.quantized.gguf import is_gguf, plain_gguf
from weightops.formats.quantized.gptq import CheckpointFormat
from weightops.formats.quantized.gptq_weights import GptqOptions
from weightops.formats.quantized.gptq_zeros import ZeroOverflow
from weightops.formats.quantized.table import Quantized, find_weights
from weightops.formats.quantized.weights import CONFIG_KEY, without_quantization
from weightops.formats.sidecars import QUANTISED
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.io.notebook import in_units
from weightops.layouts import architecture
from weightops.layouts.embeddings import embeddings_and_heads
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.numbers.affine import DTYPES
from weightops.spec import DType
from weightops.stores.local import read_source

_CONFIG = "config.json"
_TIE = "tie_word_embeddings"


def dequantize(
    source: Checkpoint,
    *,
    dtype: DType | None = None,
    checkpoint_format: CheckpointFormat | None = None,
    zero_overflow: ZeroOverflow | None = None,
    config: str | None = None,
    evaluate: Evaluate,
) -> Checkpoint:
    """`source` with a plain weight for every quantised one; other tensors stay as they are.

    What is quantised, and in which format, the tensors show; `formats.quantized.table` lists the formats. A weight has
    its native type, which is what the format's own library gives, or `dtype`: float32 holds the exact numbers, and any
    other type those rounded once. Of transformers' `Conv1D` (GPT-2) it is `[K, N]`, as its checkpoints have it.
    Of GGUF files every tensor of numbers has one type, and the name that it has there.

    The configuration loses what it says of quantisation and names the type; scales of activations are dropped.
    `checkpoint_format` is what to go by instead of a GPTQ checkpoint's config, `zero_overflow` what stored zero points
    of all ones are in its v1, `config` the path of a config.json where none lies beside the files.

    Raises `IncompatibleInputs` for what is not quantised, or in a format that is not read, or contradicts its config,
    `CorruptInput` for tensors that do not fit together and scales that are no numbers, `UsageError` for options that
    cannot be meant.
    """
    refuse_delta(source, "the source")
    refuse_adapter(source, "the source")
    refuse_parts(source)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(
            f"weights are not dequantised to {dtype.value}",
            hint=f"choose one of {', '.join(known.value for known in DTYPES)}; `weightops cast` makes others of them",
        )
    if is_gguf(source) and not (checkpoint_format or zero_overflow):
        return plain_gguf(source, dtype)
    if zero_overflow is not None and checkpoint_format == "gptq_v2":
        raise UsageError("zero points of gptq_v2 do not overflow", hint="leave out --zero-overflow")
    source = _with_config(source, config)
    found = find_weights(source, evaluate, GptqOptions(checkpoint_format, zero_overflow), shapes_of(source))
    if not found:
        raise IncompatibleInputs(
            f"{escape(source.name)}: holds no quantised weight",
            hint="it is plain already, or in a format that is not read; `weightops inspect` lists its tensors",
        )
    if (checkpoint_format or zero_overflow) and not any(w.format == "gptq" for w in found.weights.values()):
        raise UsageError(
            "--checkpoint-format and --zero-overflow are about GPTQ, and nothing is quantised by it",
            hint="leave them out",
        )
    notes = [] if source.sidecar(_CONFIG) is not None else [_no_config(source)]
    return plain(source, found, dtype, notes)


def plain(source: Checkpoint, found: Quantized, dtype: DType | None = None, notes: Sequence[str] = ()) -> Checkpoint:
    """`source` with the weights that were `found` in `dtype`, or each in its native type; itself where none was."""
    if not found:
        return source
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in source.items():
        if name in found.unused:
            continue
        weight = found.weights.get(found.by_part.get(name, ""))
        new = name if weight is None else weight.name
        if new not in tensors:
            tensors[new] = tensor if weight is None else weight.in_dtype(dtype)
            if name in source.shards:
                shards[new] = source.shards[name]
    metadata = {k: v for k, v in source.metadata.items() if k not in tensors and k != "tensor_names"}
    result = replace(
        source,
        tensors=tensors,
        shards=shards,
        sidecars={name: file for name, file in source.sidecars.items() if name not in QUANTISED},
        warnings=(*source.warnings, *found.notes, *notes),
        metadata={**metadata, "format": "pt"} if "format" in metadata else metadata,
        total_size=None,
        content_id=None,
        digests={name: digest for name, digest in source.digests.items() if tensors.get(name) is source.get(name)},
        prefix=None,
    )
    return _apart(result.with_config(without_quantization), found).with_dtype(dtype or _usual(found))


def plain_if_quantised(source: Checkpoint, evaluate: Evaluate) -> Checkpoint:
    """`source` with its quantised weights in their native types, or as it is; raises as `dequantize`."""
    packed = {tensor.spec.dtype.value for tensor in source.values() if tensor.spec.dtype.is_block}
    if packed:
        made = plain_gguf(source)
        return replace(made, warnings=(*made.warnings, _note(source, packed, made.values())))
    found = find_weights(source, evaluate, shape_of=shapes_of(source))
    if not found:
        return source
    made = plain(source, found)
    note = _note(source, found.schemes, [made[name] for name in found.weights])
    return replace(made, warnings=(*made.warnings, note))


def _note(source: Checkpoint, schemes: Iterable[str], weights: Collection[LazyTensor]) -> str:
    """What is said of a source that is not what a verb works on."""
    dtype = Counter(tensor.spec.dtype.value for tensor in weights).most_common(1)[0][0]
    return (
        f"{escape(source.name)} is quantised ({listed(schemes, 3)}), and read as {dtype}: "
        f"{in_units(sum(tensor.nbytes for tensor in weights))} of weights, computed as they are needed"
    )


def shapes_of(source: Checkpoint) -> Callable[[str], tuple[int, ...] | None]:
    """The shape of a weight as transformers' class for the config has it, which is asked when the first is wanted."""

    @cache
    def shapes() -> Mapping[str, tuple[int, ...]]:
        config = without_quantization(source.config())
        try:
            found = architecture.find(config, source, None)
        except (architecture.NotKnown, WeightopsError):
            return {}
        return {**found.loaded, **found.stored}

    return lambda name: shapes().get(name)


def _usual(found: Quantized) -> DType:
    """The native type of most weights."""
    return Counter(weight.native for weight in found.weights.values()).most_common(1)[0][0]


def _apart(result: Checkpoint, found: Quantized) -> Checkpoint:
    """The checkpoint with embeddings said not to be tied where one of them was quantised alone, so that they differ."""
    config = result.config()
    for embedding, heads in embeddings_and_heads(result):
        differ = any(head in result and result[head] != result[embedding] for head in heads)
        quantised = any(name in found.weights for name in (embedding, *heads))
        if differ and quantised and config.get(_TIE) is True:
            return result.with_config(lambda known: {**known, _TIE: False})
    return result


def _no_config(source: Checkpoint) -> str:
    return f"{escape(source.name)}: has no config.json; name one with --config, for models do not load without"


def _with_config(source: Checkpoint, path: str | None) -> Checkpoint:
    """The source with the config.json at `path`, or else with those files beside a single file that say what it is."""
    if path is not None:
        file = Path(path) / _CONFIG if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise SourceMissing(f"{escape(str(file))}: no such file", hint="name the base model's config.json")
        document: dict[str, Any] = strict_json.load_object(read_source(file)[1], escape(str(file)))
        own = source.config().get(CONFIG_KEY)
        said: Mapping[str, Any] = {CONFIG_KEY: own} if own is not None else {}
        return replace(source, sidecars={**source.sidecars, _CONFIG: written_json({**document, **said})})
    folder = source.folder
    beside: dict[str, Sidecar] = {}
    if folder is not None and not source.sidecars:
        beside = {name: Copied(folder.identity(name)) for name in (_CONFIG, *QUANTISED) if folder.has(name)}
    return replace(source, sidecars=beside) if beside else source
