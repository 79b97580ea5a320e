"""What diff and recover share: holding the tensors of two checkpoints against each other."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.adapter_files import is_adapter
from weightops.formats.delta import NAME as DELTA_NAME
from weightops.io.escape import escape
from weightops.layouts.rotary import inverse_frequencies
from weightops.lazy import LazyTensor
from weightops.spec import DType, TensorSpec

ROTARY_SUFFIX = ".rotary_emb.inv_freq"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_VOCABULARY = (
    "embed_tokens.weight",
    "lm_head.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
    "embed_out.weight",
)
_BITS = {8: DType.U8, 16: DType.U16, 32: DType.U32, 64: DType.U64}


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token: an input or output embedding."""
    return name.endswith(_VOCABULARY)


def bits_spec(spec: TensorSpec) -> TensorSpec:
    """The unsigned integers that hold a tensor's bits: same shape, or a flat one where elements share bytes."""
    unsigned = None if spec.dtype.is_packed else _BITS.get(spec.dtype.bits)
    return TensorSpec(unsigned, spec.shape) if unsigned else TensorSpec(DType.U8, (spec.nbytes,))


def refuse_delta(checkpoint: Checkpoint, role: str) -> None:
    """A delta is not a model, whatever its files look like."""
    if DELTA_NAME in checkpoint.sidecars:
        raise IncompatibleInputs(f"{role} {escape(checkpoint.name)} is a delta, not a model", hint="recover it first")


def refuse_adapter(checkpoint: Checkpoint, role: str) -> None:
    """An adapter is a part of a model; raises `IncompatibleInputs`."""
    if is_adapter(checkpoint):
        raise IncompatibleInputs(
            f"{role} {escape(checkpoint.name)} is a LoRA adapter, not a model",
            hint="`weightops merge-lora` makes a model of it and the base that it was trained on",
        )


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that match one of the glob patterns."""
    patterns = tuple(patterns)
    return {n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)}


def as_loaded(base: Checkpoint, like: Iterable[str]) -> dict[str, LazyTensor]:
    """The tensors of `base`, with those of `like` that its file leaves out and loading the model brings back.

    A tied output embedding is the input embedding. Until 2023 transformers saved `rotary_emb.inv_freq` as a buffer,
    and computed it for files without: `theta ** -(2i / head_dim)` in float32, as is done here from config.json.
    """
    tensors = dict(base.tensors)
    lacking = [name for name in like if name not in tensors]
    if _HEAD in lacking and _EMBEDDING in tensors and base.config().get("tie_word_embeddings") is True:
        tensors[_HEAD] = tensors[_EMBEDDING]
    rotary = [name for name in lacking if name.endswith(ROTARY_SUFFIX)]
    if rotary:
        tensors |= dict.fromkeys(rotary, rotary_frequencies(base.config(), base.name))
    return tensors


def rotary_frequencies(config: Mapping[str, Any], name: str) -> LazyTensor:
    """`inv_freq` of the model with this config; raises `IncompatibleInputs` if that does not say enough."""
    parameters = config.get("rope_parameters")
    theta = config.get("rope_theta") or (parameters.get("rope_theta") if isinstance(parameters, dict) else None)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    width = config.get("head_dim") or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) else None)
    theta = 10000.0 if theta is None else theta
    if not isinstance(width, int) or not 0 < width <= 1 << 16 or not isinstance(theta, (int, float)):
        raise IncompatibleInputs(
            f"{escape(name)}: has no rotary_emb.inv_freq, and its config.json has no head size to compute it from",
            hint="add config.json to the folder",
        )
    return inverse_frequencies(theta, width)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Some names for an error message, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(escape, names[:limit])) + more
