"""llama.cpp's layout: one GGUF file with tensors, parameters and tokenizer, to be written only.

Names, keys and their order are those of llama.cpp's convert_hf_to_gguf for `LlamaForCausalLM` and
`MistralForCausalLM`. Its rotary order is Meta's, the canonical one here. The quantised types are given to every matrix,
as llama-quantize does with `--pure`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.io import strict_json
from weightops.layouts.model import Hyperparameters, Model, RopeScaling
from weightops.layouts.names import EMBEDDING, from_canonical
from weightops.layouts.tokenizers.files import CONFIG, GENERATION, TOKENIZER_CONFIG, TokenizerFiles
from weightops.layouts.tokenizers.gguf import vocabulary
from weightops.layouts.tokenizers.hf import hf_files, special_ids
from weightops.layouts.tokenizers.tokens import Kind
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.ggml.quantize import Quantize
from weightops.ops.measures.loss import counted_cast
from weightops.ops.rows import Given
from weightops.spec import DType

Metadata = dict[str, dict[str, Any]]

_FILE_TYPES = {DType.F32: 0, DType.F16: 1, DType.Q4_0: 2, DType.Q8_0: 7, DType.BF16: 32}
"""Numbers of llama.cpp's `llama_ftype`."""
_SAMPLING: Mapping[str, tuple[str, type]] = {
    "sequence": ("sequence", str),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "xtc_probability": ("xtc_probability", float),
    "xtc_threshold": ("xtc_threshold", float),
    "temperature": ("temp", float),
    "penalty_last_n": ("penalty_last_n", int),
    "penalty_repeat": ("penalty_repeat", float),
    "mirostat": ("mirostat", int),
    "mirostat_tau": ("mirostat_tau", float),
    "mirostat_eta": ("mirostat_eta", float),
}
"""What gguf takes of generation_config.json: the keys there, those under `general.sampling.`, and their types."""
_FLOATS = (DType.F32, DType.F16, DType.BF16)


def write(model: Model, dtype: DType | None) -> Checkpoint:
    """The model as llama.cpp loads it, its matrices in `dtype` or as they are; vectors are float32 always.

    `dtype` is F32, F16, BF16, Q8_0 or Q4_0. Raises `UsageError` for other types, for matrices whose rows are not whole
    blocks, without a tokenizer or with one that has more tokens than the embedding, and where the context length is
    not known.
    """
    h = model.hyperparameters
    files = _tokenizer_files(model)
    matrices = from_canonical("gguf", model.tensors, h)
    tensors = {name: _stored(name, tensor, dtype) for name, tensor in matrices.items()}
    if h.rope_scaling is not None:
        tensors = {"rope_freqs.weight": _rope_factors(h, h.rope_scaling), **tensors}
    rows = tensors[EMBEDDING.name("gguf", 0)].spec.shape[0]
    tokens = vocabulary(files, rows)
    metadata = _parameters(model, tensors, rows) | tokens.metadata
    warnings = list(tokens.warnings)
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
        **_sampling(model.files),
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


def _sampling(files: TokenizerFiles) -> Metadata:
    """How the model wants its tokens to be chosen, as far as the format has keys for it."""
    stated, result = files.document(GENERATION), Metadata()
    for name, (key, kind) in _SAMPLING.items():
        value = stated.get(name)
        if type(value) is kind or (kind is float and type(value) is int):
            result[f"general.sampling.{key}"] = {{str: "string", int: "int32", float: "float32"}[kind]: value}
    return result


def _size_label(count: int) -> str:
    """The number of parameters in at least two digits, as `size_label` of gguf gives it: 7B, 1.2B, 124M."""
    units = (("T", 1e-12), ("B", 1e-9), ("M", 1e-6))
    unit, factor = next(((unit, factor) for unit, factor in units if count * factor > 1), ("K", 1e-3))
    digits = len(str(round(count * factor)).lstrip("0"))
    return f"{count * factor:.{max(2 - digits, 0)}f}{unit}"


def _tokenizer_files(model: Model) -> TokenizerFiles:
    """The files that llama.cpp's converter would read: those of the source, or what a tokenizer of its kind makes."""
    tokenizer = model.tokenizer
    if tokenizer is None or model.files.is_hugging_face:
        return model.files
    made = hf_files(tokenizer, None)
    config = strict_json.load_object(made[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
    if tokenizer.kind == "sentencepiece" and not tokenizer.add_dummy_prefix:
        config["add_prefix_space"] = False
    defined = {
        str(i): {"content": token.data.decode(), "special": False}
        for i, token in enumerate(tokenizer.tokens)
        if token.kind is Kind.USER_DEFINED
    }
    if defined:
        config["added_tokens_decoder"] = defined
    made |= {TOKENIZER_CONFIG: strict_json.dumps(config), CONFIG: strict_json.dumps(special_ids(tokenizer))}
    return TokenizerFiles({**made, **model.files.files}, model.files.where)
