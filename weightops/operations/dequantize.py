"""Dequantise: a GPTQ checkpoint as a plain one, each weight computed from its integers as it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightops.checkpoint import Checkpoint, Copied, Sidecar, written_json
from weightops.errors import IncompatibleInputs, SourceMissing, UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.formats.quantized.gguf import is_gguf, plain_gguf
from weightops.formats.quantized.gptq import (
    CONFIG_KEY,
    CONFIG_NAME,
    PARTS,
    CheckpointFormat,
    QuantizeConfig,
    modules,
    prefixes,
    read_config,
)
from weightops.formats.quantized.gptq_zeros import ZeroOverflow, find_zeros
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.modules import is_conv1d
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.gptq.tensors import dequantized
from weightops.ops.transpose import transposed
from weightops.spec import DType
from weightops.stores.local import read_source

DTYPES = (DType.F16, DType.BF16, DType.F32)
_CONFIG = "config.json"


def dequantize(
    source: Checkpoint,
    *,
    dtype: DType | None = None,
    checkpoint_format: CheckpointFormat | None = None,
    zero_overflow: ZeroOverflow | None = None,
    config: str | None = None,
    evaluate: Evaluate,
) -> Checkpoint:
    """`source` with a weight `[N, K]` in `dtype` for every quantised module; other tensors stay as they are.

    Of transformers' `Conv1D` (GPT-2) it is `[K, N]`, as its checkpoints have it.

    Without `dtype` it is float16, and of GGUF files that of `weightops.formats.quantized.gguf.native_dtype`.

    Each weight is `scale * (q - zero)`, exact and then rounded once. config.json loses its quantization_config and
    names `dtype`. `checkpoint_format` is what to go by instead of the config, `zero_overflow` what stored zero points
    of all ones are in v1, `config` the path of a config.json where none lies beside the files.

    Raises `IncompatibleInputs` for what is not quantised by GPTQ or contradicts its config, `CorruptInput` for modules
    that do not fit together and scales that are no numbers, `UsageError` for options that cannot be meant.
    """
    refuse_delta(source, "the source")
    refuse_adapter(source, "the source")
    refuse_parts(source)
    where = escape(source.name)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(
            f"weights are not dequantised to {dtype.value}",
            hint=f"choose one of {', '.join(known.value for known in DTYPES)}; `weightops cast` makes others of them",
        )
    if is_gguf(source):
        return plain_gguf(source, dtype)
    dtype = dtype or DType.F16
    source = _with_config(source, config)
    settings = read_config(source)
    found = modules(source, settings)
    if not found:
        raise IncompatibleInputs(
            f"{where}: holds no quantised module, expected tensors named NAME.qweight",
            hint="it is not quantised by GPTQ, or not at all",
        )
    if zero_overflow is not None and checkpoint_format == "gptq_v2":
        raise UsageError("zero points of gptq_v2 do not overflow", hint="leave out --zero-overflow")
    zeros, notes = find_zeros(where, found.values(), settings, checkpoint_format, zero_overflow, evaluate)
    model_type = source.config().get("model_type")
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in source.items():
        prefix, _, part = name.rpartition(".")
        module = found.get(prefix) if part in PARTS else None
        if module is None:
            tensors[name] = tensor
        elif part == "qweight":
            parts = (module.qweight, module.qzeros, module.scales, module.g_idx)
            size = module.group_size or module.in_features
            if f"{prefix}.weight" in source:
                raise IncompatibleInputs(
                    f"{where}: {escape(prefix)} has a weight and a qweight",
                    hint="it was saved in two forms; drop one of them with `weightops shard --drop`",
                )
            weight = dequantized(prefix, parts, module.bits, zeros, size, dtype)
            tensors[f"{prefix}.weight"] = transposed(weight) if is_conv1d(prefix, model_type) else weight
            shards[f"{prefix}.weight"] = source.shards.get(name, "")
        if module is None and name in source.shards:
            shards[name] = source.shards[name]
    notes += _flag_notes(where, source, settings)
    result = replace(
        source,
        tensors=tensors,
        shards=shards if source.shards else {},
        sidecars={name: file for name, file in source.sidecars.items() if name != CONFIG_NAME},
        warnings=(*source.warnings, *notes),
        total_size=None,
        content_id=None,
        digests={name: digest for name, digest in source.digests.items() if name in tensors},
        prefix=None,
    )
    return result.with_config(_without_quantization).with_dtype(dtype)


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != CONFIG_KEY}


def _with_config(source: Checkpoint, path: str | None) -> Checkpoint:
    """The source with the config.json at `path`, or else with those files beside a single file that say what it is."""
    if path is not None:
        file = Path(path) / _CONFIG if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise SourceMissing(f"{escape(str(file))}: no such file", hint="name the base model's config.json")
        document = strict_json.load_object(read_source(file)[1], escape(str(file)))
        stated = source.config().get(CONFIG_KEY)
        quantised: Mapping[str, Any] = {CONFIG_KEY: stated} if stated is not None else {}
        return replace(source, sidecars={**source.sidecars, _CONFIG: written_json({**document, **quantised})})
    folder = source.folder
    beside: dict[str, Sidecar] = {}
    if folder is not None and not source.sidecars:
        beside = {name: Copied(folder.identity(name)) for name in (_CONFIG, CONFIG_NAME) if folder.has(name)}
    return replace(source, sidecars=beside) if beside else source


def _flag_notes(where: str, source: Checkpoint, settings: QuantizeConfig | None) -> list[str]:
    """What the reader of the result ought to know of the source."""
    notes = []
    if source.sidecar(_CONFIG) is None:
        notes.append(f"{where}: has no config.json; name one with --config, for models do not load without")
    without = [prefix for prefix in prefixes(source) if f"{prefix}.g_idx" not in source]
    if without and settings is not None and settings.desc_act and settings.group_size != -1:
        notes.append(
            f"{where}: the config says desc_act, and there is no g_idx: groups are taken in the order of columns, in "
            f"{listed(without, 3)}"
        )
    return notes
