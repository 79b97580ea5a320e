"""GGUF files whose matrices are quantised as llama-quantize does it: types by its mixes, order and keys as it has them.

Source: llama.cpp's llama-quant.cpp and tools/quantize, as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.formats.gguf.imatrix import ImportanceMatrix
from weightops.formats.gguf.metadata import kind_of, number, plain, text
from weightops.io.escape import escape
from weightops.layouts.ggml_mix import FILE_TYPES, MixModel, mix
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.ggml.quantize import Quantize
from weightops.ops.ggml.values import BlockValues
from weightops.ops.measures.loss import counted_cast
from weightops.spec import DType, TensorSpec

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_REPLACED = ("general.quantization_version", "general.file_type", "split.no", "split.count", "split.tensors.count")
_LONGEST = 127
"""Bytes of a text that llama-quantize has room for."""
_FLOATS = (DType.F32, DType.F16, DType.BF16)
_LARGE = (DType.F32, DType.F16, DType.BF16, DType.Q8_0)
"""Types for which importance makes no difference."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How to quantise: a file type of `FILE_TYPES` and what else `weightops.layouts.ggml_mix.mix` takes.

    `importance` says how much errors in each column weigh. `requantise`: take blocks too, whose errors add up.
    """

    name: str
    pure: bool = False
    overrides: Sequence[tuple[str, DType]] = ()
    output: DType | None = None
    embedding: DType | None = None
    importance: ImportanceMatrix | None = None
    requantise: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether nothing is said but the file type, and that all tensors are to have it."""
        return not (self.overrides or self.output or self.embedding or self.importance)


def quantised(checkpoint: Checkpoint, how: Mix) -> Checkpoint:
    """A GGUF model with its matrices in other types: the file that llama-quantize makes of it.

    Raises `UsageError` for files that hold no model, blocks that may not be quantised again, and as `mix` does;
    `IncompatibleInputs` for importance of another model; `CorruptInput` for metadata without what a mix hangs on.
    """
    where, metadata = escape(checkpoint.name), checkpoint.metadata
    if kind_of(metadata) != "model":
        raise UsageError(f"{where}: holds no model, but is of general.type {escape(kind_of(metadata))[:80]}")
    specs = {name: tensor.spec for name, tensor in checkpoint.items()}
    types = mix(
        how.name,
        specs,
        _facts(metadata, where),
        has_importance=how.importance is not None,
        pure=how.pure,
        overrides=how.overrides,
        output=how.output,
        embedding=how.embedding,
    )
    if not how.requantise:  # gpt-oss was trained in MXFP4, of which nothing better can be made
        types |= {name: DType.MXFP4 for name, spec in specs.items() if spec.dtype is DType.MXFP4}
    changed = {name: dtype for name, dtype in types.items() if dtype is not specs[name].dtype}
    blocks = [name for name in changed if specs[name].dtype not in _FLOATS]
    if blocks and not how.requantise:
        raise UsageError(
            f"{where}: {escape(blocks[0])} is {specs[blocks[0]].dtype.value} already, and loses more when it is "
            f"quantised to {changed[blocks[0]].value}",
            hint="take the file in float16 or bfloat16, or give --allow-requantize",
        )
    weights = _importance(how.importance, specs, changed, where)
    _refuse_unweighed(how, changed, weights)
    tensors = {
        name: _made(name, checkpoint[name], types[name], weights.get(name)) if name in changed else checkpoint[name]
        for name in types
    }
    keys = {key: value for key, value in metadata.items() if key not in _REPLACED}
    keys |= {"general.quantization_version": {"uint32": 2}}
    keys |= {"general.file_type": {"uint32": FILE_TYPES[how.name].number}, **_provenance(how.importance)}
    said = [*_on_rows(how.name, specs, changed), *_on_importance(how.importance, weights, changed)]
    return replace(
        checkpoint,
        tensors=tensors,
        metadata=keys,
        container="gguf",
        warnings=(*checkpoint.warnings, *said),
        shards={},
        total_size=None,
        content_id=None,
        digests={},
    )


def _facts(metadata: Mapping[str, Any], where: str) -> MixModel:
    architecture = text(metadata, "general.architecture") or ""

    def first(key: str, default: int | None = None) -> int:
        """A number, or that of the first layer."""
        found = metadata.get(f"{architecture}.{key}")
        value = plain(found) if isinstance(found, Mapping) else default
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is not int or value < 0:
            raise CorruptInput(f"{where}: {escape(architecture)}.{key} is missing, or no number")
        return value

    heads = first("attention.head_count")
    return MixModel(
        architecture=architecture,
        layers=first("block_count"),
        heads=heads,
        kv_heads=first("attention.head_count_kv", heads),
        experts=number(metadata, f"{architecture}.expert_count") or 0,
    )


def _importance(
    given: ImportanceMatrix | None, specs: Mapping[str, TensorSpec], changed: Mapping[str, DType], where: str
) -> dict[str, LazyTensor]:
    """By name what errors weigh; raises `IncompatibleInputs` unless it is of this model."""
    found = dict[str, LazyTensor]()
    if given is None:
        return found
    if not given.weights.keys() & specs.keys():
        odd = next(iter(given.weights))
        raise IncompatibleInputs(
            f"{escape(given.name)}: knows none of the tensors of {where}, but {escape(odd)}",
            hint="an importance matrix is of one model, and names tensors as its GGUF file does",
        )
    for name in changed:
        if name not in given.weights:
            continue
        shape, count = specs[name].shape, given.weights[name].spec.numel
        expected = shape[-1] * (shape[0] if len(shape) == 3 else 1)
        if count == expected:
            found[name] = given.weights[name]
        elif name != EMBEDDING:
            raise IncompatibleInputs(
                f"{escape(given.name)}: {escape(name)} has {count} numbers, expected {expected} for {specs[name]}",
                hint="is it of another model?",
            )
    return found


def _refuse_unweighed(how: Mix, changed: Mapping[str, DType], weights: Mapping[str, LazyTensor]) -> None:
    """Q2_K_S is of no use without importance, be it of a single tensor."""
    if how.importance is None or how.name != "Q2_K_S":
        return
    lacking = [n for n, d in changed.items() if d is DType.Q2_K and n not in (*weights, EMBEDDING, OUTPUT)]
    if lacking:
        raise UsageError(
            f"{escape(how.importance.name)} says nothing of {escape(lacking[0])}, and Q2_K_S needs importance",
            hint="measure it on more text, or choose Q2_K",
        )


def _made(name: str, tensor: LazyTensor, dtype: DType, importance: LazyTensor | None) -> LazyTensor:
    plain = LazyTensor.make(BlockValues(dtype=DType.F32), tensor) if tensor.spec.dtype.is_block else tensor
    if not dtype.is_block:
        return counted_cast(plain, dtype, name)
    plain = plain if plain.spec.dtype in _FLOATS else cast(plain, DType.F32)
    weighs = [] if importance is None or dtype in _LARGE else [importance]
    return LazyTensor.make(Quantize(dtype), plain, *weighs)


def _provenance(given: ImportanceMatrix | None) -> dict[str, dict[str, Any]]:
    """What the file says of the importance that it was made with; of its path the last part."""
    if given is None:
        return {}
    keys: dict[str, dict[str, Any]] = {"file": {"string": _cut(given.name)}}
    if given.datasets:
        keys["dataset"] = {"string": _cut(given.datasets[0])}
    keys["entries_count"] = {"uint32": len(given.weights)}
    if given.chunks > 0:
        keys["chunks_count"] = {"uint32": given.chunks}
    return {f"quantize.imatrix.{key}": value for key, value in keys.items()}


def _cut(value: str) -> str:
    return value.encode()[:_LONGEST].decode(errors="ignore")


def _on_rows(name: str, specs: Mapping[str, TensorSpec], changed: Mapping[str, DType]) -> Iterator[str]:
    base = FILE_TYPES[name].base
    odd = [tensor for tensor in changed if base.is_packed and specs[tensor].shape[-1] % base.block[0]]
    if odd:
        yield (
            f"{escape(odd[0])}{f' and {len(odd) - 1} more are' if len(odd) > 1 else ' is'} in another type, such as "
            f"{changed[odd[0]].value}, as rows are no multiple of {base.block[0]}"
        )


def _on_importance(
    given: ImportanceMatrix | None, weights: Mapping[str, LazyTensor], changed: Mapping[str, DType]
) -> Iterator[str]:
    if given is None:
        return
    lacking = [n for n, d in changed.items() if d not in _LARGE and n not in (*weights, EMBEDDING, OUTPUT)]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        yield f"{escape(given.name)} says nothing of {escape(lacking[0])}{more}: quantised without"
