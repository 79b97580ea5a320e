"""GGUF checkpoints as plain ones: every tensor as numbers, under the names that it has there."""

from __future__ import annotations

from dataclasses import replace

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.gguf.metadata import is_typed, kind_of, number
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.ggml.values import BlockValues
from weightops.spec import DType

_FILE_TYPE = "general.file_type"
_NATIVE = {0: DType.F32, 1: DType.F16}
"""By `general.file_type`; all others are made of bfloat16, or of more."""
_NO_MODELS = {
    "adapter": "is an adapter, a part of a model that is nowhere quantised",
    "imatrix": "is an importance matrix, which says how to quantise a model, and holds none",
}


def is_gguf(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was read from GGUF files."""
    return any(map(is_typed, checkpoint.metadata.values())) or any(
        tensor.spec.dtype.is_block for tensor in checkpoint.values()
    )


def native_dtype(checkpoint: Checkpoint) -> DType:
    """The dtype of a GGUF checkpoint's values as a plain model: float16 or float32 where its file type says so."""
    said = number(checkpoint.metadata, _FILE_TYPE)
    return DType.BF16 if said is None else _NATIVE.get(said, DType.BF16)


def plain_gguf(checkpoint: Checkpoint, dtype: DType | None = None) -> Checkpoint:
    """A GGUF checkpoint with every tensor of numbers in `dtype`, by default its native one, each rounded once.

    Names, metadata and the files that tensors are in stay. In float32 values are what ggml computes, to the bit.
    Raises `IncompatibleInputs` for files that hold no model.
    """
    kind = kind_of(checkpoint.metadata)
    if kind in _NO_MODELS:
        raise IncompatibleInputs(f"{escape(checkpoint.name)}: {_NO_MODELS[kind]}", hint="name the model itself")
    to = dtype or native_dtype(checkpoint)
    tensors = {name: plain_tensor(tensor, to) for name, tensor in checkpoint.items()}
    result = replace(
        checkpoint,
        tensors=tensors,
        total_size=None,
        content_id=None,
        digests={name: d for name, d in checkpoint.digests.items() if tensors[name] is checkpoint[name]},
        prefix=None,
    )
    return result.with_dtype(to)


def plain_tensor(tensor: LazyTensor, dtype: DType) -> LazyTensor:
    """A tensor of a GGUF file as numbers; integers stay as they are."""
    if tensor.spec.dtype.is_block:
        return LazyTensor.make(BlockValues(dtype=dtype), tensor)
    return cast(tensor, dtype) if tensor.spec.dtype.is_float else tensor
