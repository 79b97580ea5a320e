"""llama.cpp's layout: one GGUF file with tensors, parameters and tokenizer, to be written only.

Names, keys and their order are those of llama.cpp's convert_hf_to_gguf for `LlamaForCausalLM` and
`MistralForCausalLM`. Its rotary order is Meta's, the canonical one here. The quantised types are given to every matrix,
as llama-quantize does with `--pure`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightops.checkpoint import Checkpoint, Copied, Written
from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.io.source import read_source
from weightops.layouts.model import Hyperparameters, Model, RopeScaling
from weightops.layouts.names import EMBEDDING, from_canonical
from weightops.layouts.ranks import merges, to_unicode
from weightops.layouts.tokenizer import Kind, Token, Tokenizer
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.ggml import Quantize
from weightops.ops.loss import counted_cast
from weightops.ops.rows import Given
from weightops.spec import DType

Metadata = dict[str, dict[str, Any]]

_FILE_TYPES = {DType.F32: 0, DType.F16: 1, DType.Q4_0: 2, DType.Q8_0: 7, DType.BF16: 32}
"""Numbers of llama.cpp's `llama_ftype`."""
_FLOATS = (DType.F32, DType.F16, DType.BF16)
_TEMPLATE = "chat_template.jinja"
_PAD_SCORE = -10000.0


def write(model: Model, dtype: DType | None) -> Checkpoint:
    """The model as llama.cpp loads it, its matrices in `dtype` or as they are; vectors are float32 always.

    `dtype` is F32, F16, BF16, Q8_0 or Q4_0. Raises `UsageError` for other types, for matrices whose rows are not whole
    blocks, without a tokenizer or with one that has more tokens than the embedding, and where the context length is
    not known.
    """
    h = model.hyperparameters
    if model.tokenizer is None:
        raise UsageError(f"{escape(model.name)}: has no tokenizer, which GGUF needs", hint="give --tokenizer FILE")
    matrices = from_canonical("gguf", model.tensors, h)
    tensors = {name: _stored(name, tensor, dtype) for name, tensor in matrices.items()}
    if h.rope_scaling is not None:
        tensors = {"rope_freqs.weight": _rope_factors(h, h.rope_scaling), **tensors}
    rows = tensors[EMBEDDING.name("gguf", 0)].spec.shape[0]
    metadata = _parameters(model, tensors, rows) | _vocabulary(model.tokenizer, rows) | _template(model)
    warnings = []
    if h.sliding_window is not None:
        warnings.append(f"the sliding window of {h.sliding_window} tokens is left out: llama.cpp has none for LLaMA")
    return Checkpoint(
        model.name,
        tensors,
        sidecars=model.sidecars,
        warnings=tuple(warnings),
        metadata=metadata,
        container="gguf",
    )


def _stored(name: str, tensor: LazyTensor, dtype: DType | None) -> LazyTensor:
    """A tensor as it goes into the file."""
    spec = tensor.spec
    if len(spec.shape) < 2:
        return cast(tensor, DType.F32)
    target = dtype or spec.dtype
    if target not in _FILE_TYPES:
        types = ", ".join(known.value for known in _FILE_TYPES)
        raise UsageError(f"{name}: llama.cpp computes with no {target.value}", hint=f"choose one of {types}")
    count = target.block[0]
    if target in _FLOATS:
        return counted_cast(tensor, target, name)
    if spec.shape[-1] % count:
        raise UsageError(
            f"{name}: has rows of {spec.shape[-1]}, {target.value} takes multiples of {count}",
            hint="choose float16, bfloat16 or float32",
        )
    return LazyTensor.make(Quantize(target), tensor if spec.dtype in _FLOATS else cast(tensor, DType.F32))


def _rope_factors(h: Hyperparameters, scaling: RopeScaling) -> LazyTensor:
    """What llama.cpp divides each rotary frequency by: float32, one for each pair of a head's elements.

    Computed in float32 as in `generate_extra_tensors` of convert_hf_to_gguf; the same bits for Llama 3.1 to 3.3.
    """
    import numpy as np

    one, context = np.float32(1), scaling.original_context_length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    exponents = np.arange(0, h.head_dim, 2, dtype=np.float32) / np.float32(h.head_dim)
    lengths = np.float32(2 * math.pi) / (one / np.float32(h.rope_theta) ** exponents)
    smooth = (np.float32(context) / lengths - np.float32(low)) / np.float32(high - low)
    between = one / ((one - smooth) / np.float32(scaling.factor) + smooth)
    factors = np.where(lengths > np.float32(context / low), np.float32(scaling.factor), between)
    factors = np.where(lengths < np.float32(context / high), one, factors).astype("<f4")
    return LazyTensor.make(Given(DType.F32, factors.shape, factors.tobytes()))


def _parameters(model: Model, tensors: Mapping[str, LazyTensor], rows: int) -> Metadata:
    h = model.hyperparameters
    matrices = Counter[DType]()
    for tensor in tensors.values():
        if len(tensor.spec.shape) > 1:
            matrices[tensor.spec.dtype] += tensor.spec.numel
    return {
        "general.architecture": {"string": "llama"},
        "general.type": {"string": "model"},
        "general.name": {"string": model.name},
        "general.size_label": {"string": _size_label(sum(t.spec.numel for t in tensors.values()))},
        "llama.block_count": {"uint32": h.n_layers},
        "llama.context_length": {"uint32": h.known_context_length()},
        "llama.embedding_length": {"uint32": h.dim},
        "llama.feed_forward_length": {"uint32": h.ffn_dim},
        "llama.attention.head_count": {"uint32": h.n_heads},
        "llama.attention.head_count_kv": {"uint32": h.n_kv_heads},
        "llama.rope.freq_base": {"float32": h.rope_theta},
        "llama.attention.layer_norm_rms_epsilon": {"float32": h.norm_eps},
        "llama.attention.key_length": {"uint32": h.head_dim},
        "llama.attention.value_length": {"uint32": h.head_dim},
        "general.file_type": {"uint32": _FILE_TYPES[matrices.most_common(1)[0][0]]},
        "llama.vocab_size": {"uint32": rows},
        "llama.rope.dimension_count": {"uint32": h.head_dim},
        "general.quantization_version": {"uint32": 2},
    }


def _size_label(count: int) -> str:
    """The number of parameters in at least two digits, as `size_label` of gguf gives it: 7B, 1.2B, 124M."""
    units = (("T", 1e-12), ("B", 1e-9), ("M", 1e-6))
    unit, factor = next(((unit, factor) for unit, factor in units if count * factor > 1), ("K", 1e-3))
    digits = len(str(round(count * factor)).lstrip("0"))
    return f"{count * factor:.{max(2 - digits, 0)}f}{unit}"


def _vocabulary(tokenizer: Tokenizer, rows: int) -> Metadata:
    """The tokenizer, with unused tokens for rows of the embedding beyond it."""
    tokens, padding = tokenizer.tokens, rows - len(tokenizer.tokens)
    if padding < 0:
        raise UsageError(
            f"the tokenizer has {len(tokens)} tokens, the embedding only {rows} rows",
            hint="is it the tokenizer of this model?",
        )
    pieces = tokenizer.kind == "sentencepiece"
    texts = [_piece(token) if pieces else _byte_level(token) for token in tokens]
    texts += [f"[PAD{i}]" for i in range(len(tokens), rows)]
    kinds = [int(token.kind) for token in tokens] + [int(Kind.UNUSED)] * padding
    result: Metadata = {} if tokenizer.add_dummy_prefix or not pieces else {_key("add_space_prefix"): {"bool": False}}
    result |= {
        _key("model"): {"string": "llama" if pieces else "gpt2"},
        _key("pre"): {"string": "default" if pieces else "llama-bpe"},
        _key("tokens"): {"array": ["string", texts]},
    }
    if pieces:
        scores = [token.score for token in tokens] + [_PAD_SCORE] * padding
        result[_key("scores")] = {"array": ["float32", scores]}
    result[_key("token_type")] = {"array": ["int32", kinds]}
    if not pieces:
        pairs = merges([token.data for token in tokens if token.kind is Kind.NORMAL])
        texts = [f"{to_unicode(left)} {to_unicode(right)}" for left, right in pairs]
        result[_key("merges")] = {"array": ["string", texts]}
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_ids[-1] if tokenizer.eos_ids else None,
        "unknown": tokenizer.unk_id,
        "padding": tokenizer.pad_id,
    }
    result |= {_key(f"{name}_token_id"): {"uint32": number} for name, number in ids.items() if number is not None}
    return result | {
        _key("add_bos_token"): {"bool": tokenizer.bos_id is not None},
        _key("add_eos_token"): {"bool": False},
    }


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def _piece(token: Token) -> str:
    """The text of a sentencepiece token. llama.cpp looks for those of users in text whose spaces are still spaces."""
    text = _text(token.data, "a token")
    return text.replace("\u2581", " ") if token.kind is Kind.USER_DEFINED else text


def _byte_level(token: Token) -> str:
    return to_unicode(token.data) if token.kind is Kind.NORMAL else _text(token.data, "a token")


def _template(model: Model) -> Metadata:
    """The chat template, if it lies here."""
    match model.sidecars.get(_TEMPLATE):
        case Written(data):
            pass
        case Copied(file) if not file.is_remote:
            data = read_source(Path(file.path))[1]
        case _:
            return {}
    return {"tokenizer.chat_template": {"string": _text(data, _TEMPLATE)}}


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise CorruptInput(f"{what} is not UTF-8: {data[:80]!r}") from None
