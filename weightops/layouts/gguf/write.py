"""Writes a model that transformers saves as llama.cpp loads it, byte for byte as its own converter does.

Source: llama.cpp's convert_hf_to_gguf, as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts import ggml_mix
from weightops.layouts.architecture import NotKnown, find
from weightops.layouts.gguf.families import BY_TYPE, WITH_SIGHT, Family
from weightops.layouts.gguf.general import general
from weightops.layouts.gguf.links import Links, find_links
from weightops.layouts.gguf.parameters import metadata_of, settings_of
from weightops.layouts.gguf.saved import Saved
from weightops.layouts.gguf.transforms import Mxfp4
from weightops.layouts.tokenizers.gguf import vocabulary
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.ggml.quantize import Quantize
from weightops.ops.measures.loss import counted_cast
from weightops.ops.rows import Given
from weightops.spec import DType, TensorSpec

_TYPES = (DType.F32, DType.F16, DType.Q4_0, DType.Q8_0, DType.BF16)
FILE_TYPES = {ggml_mix.FILE_TYPES[dtype.name].base: ggml_mix.FILE_TYPES[dtype.name].number for dtype in _TYPES}
"""The types that the converter has for most matrices, and q4_0, with llama.cpp's numbers of such files."""
_MXFP4_MOE = 38
EMBEDDING = "token_embd.weight"
SIGHT = re.compile(r"vision_|projector\.")
OF_SIGHT = "of what the model sees with, which llama.cpp has in a file of its own (mmproj)"
_FLOATS = (DType.F32, DType.F16, DType.BF16)
_FULL = ("_norm.weight", ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")
"""Ends of the names of matrices that stay float32; vectors and biases do too."""


def write(saved: Saved, dtype: DType | None, pre: str | None = None) -> Checkpoint:
    """The model as llama.cpp loads it, its matrices in `dtype` or as they are; vectors are float32 always.

    `dtype` is F32, F16, BF16, Q8_0 or Q4_0. `pre` names the pre-tokenizer where the tokenizer does not tell which it
    is. Raises `UsageError` for families that are not known here, for other types, without a tokenizer or with one that
    has more tokens than the embedding; `CorruptInput` where config and tensors do not fit.
    """
    where, saved = escape(saved.name), _language_model(saved)
    family = BY_TYPE.get(str(saved.config.get("model_type")))
    quantised = saved.config.get("quantization_config") or {}
    packed = quantised.get("quant_method") == "mxfp4" and family is not None and family.arch == "gpt-oss"
    if family is None or (quantised and not packed):
        kind = "quantised " * bool(quantised) + f"model_type {escape(str(saved.config.get('model_type')))[:80]}"
        raise UsageError(
            f"{where}/config.json: {kind} is not converted to GGUF", hint=f"these are: {', '.join(BY_TYPE)}"
        )
    settings = settings_of(saved.config, family, where)
    links = find_links(family, settings, saved.tensors, where)
    _check(saved, family, settings, links, where)
    tensors, short = _tensors(saved, links, _extra(family, settings), dtype, where)
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].spec.shape) != 2:
        raise CorruptInput(f"{where}: has no embedding of tokens", hint="is a file of the model missing?")
    rows = tensors[EMBEDDING].spec.shape[0]
    if settings["vocab_size"] != rows:
        raise CorruptInput(
            f"{where}/config.json: vocab_size is {settings['vocab_size']}, the embedding has {rows} rows",
            hint="are the configuration and the weights of one model?",
        )
    tokens = vocabulary(saved.files, rows, family.vocabulary, pre)
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    settings["@file_type"] = FILE_TYPES[dtype or _commonest(specs)]
    if any(spec.dtype is DType.MXFP4 for spec in specs.values()) and not (dtype and dtype.is_packed):
        settings["@file_type"] = _MXFP4_MOE
    about, said = general(saved, specs)
    early = {name: value for name, value in metadata_of(family, settings).items() if name.endswith(".attn_factor")}
    metadata = {
        "general.architecture": {"string": family.arch},
        **early,
        **about,
        **metadata_of(family, settings),
        "general.quantization_version": {"uint32": 2},
        **tokens.metadata,
    }
    warnings = [*saved.warnings, *said, *tokens.warnings, *short, *settings["@warnings"]]
    return Checkpoint(
        saved.name,
        tensors,
        sidecars=saved.sidecars,
        warnings=tuple(warnings),
        metadata=metadata,
        container="gguf",
        dropped={**saved.dropped, **links.dropped},
    )


def _language_model(saved: Saved) -> Saved:
    """What of a model that sees as well is its language model, the rest being left out by name."""
    config = language_config(saved.config)
    if config is saved.config:
        return saved
    seen = {name for name in saved.tensors if SIGHT.search(name)}
    tensors = {name.replace("language_model.", ""): t for name, t in saved.tensors.items() if name not in seen}
    dropped = {**saved.dropped, **dict.fromkeys(seen, OF_SIGHT)}
    return replace(saved, config=config, tensors=tensors, dropped=dropped)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json as that of the language model alone, of models that see as well; any other as it is."""
    text, kind = config.get("text_config"), WITH_SIGHT.get(str(config.get("model_type")))
    if kind is None or not isinstance(text, dict):
        return config
    own = {**config, **text, "model_type": kind, "architectures": [BY_TYPE[kind].architecture]}
    return {name: value for name, value in own.items() if name not in ("text_config", "vision_config")}


def _tensors(
    saved: Saved, links: Links, extra: Mapping[str, LazyTensor], dtype: DType | None, where: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Tensors of the file in their order, `extra` first; and what there is to say of types."""
    tensors = dict(extra)
    short = []
    for link in links.links:
        missing = next((name for name in link.saved if name not in saved.tensors), None)
        if missing is not None:
            raise CorruptInput(f"{where}: {escape(missing)} is missing", hint="is a file of the model missing?")
        parts = [saved.tensors[name] for name in link.saved]
        odd = next((name for name, t in zip(link.saved, parts, strict=True) if not t.spec.dtype.is_float), None)
        if odd is not None and not isinstance(link.transform, Mxfp4):
            raise UsageError(
                f"{where}: {escape(odd)} is {saved.tensors[odd].spec}, weights are floating-point numbers",
                hint="quantised models are not converted to GGUF",
            )
        for name, tensor in zip(link.packed, link.out(parts, where), strict=True):
            if name in tensors:
                raise CorruptInput(f"{where}: {escape(link.saved[0])} is in the files under another name as well")
            chosen = type_of(name, tensor.spec, dtype)
            tensors[name] = stored(name, tensor, chosen)
            if dtype is not None and dtype.is_packed and chosen is DType.F16:
                short.append(name)
    said = []
    if short and dtype is not None:
        said.append(
            f"{escape(short[0])}{f' and {len(short) - 1} more are' if len(short) > 1 else ' is'} in float16, as rows "
            f"are no multiple of {dtype.block[0]}"
        )
    return tensors, said


def _check(saved: Saved, family: Family, settings: Mapping[str, Any], links: Links, where: str) -> None:
    """Raise `CorruptInput` for tensors that the files lack, or have otherwise than transformers' class for the config.

    What is there is told by the names that GGUF has: those of transformers change with its versions.
    """
    plain = {key: value for key, value in saved.config.items() if key != "auto_map"}
    present = {name for link in links.links for name in link.packed}
    try:
        architecture = find(plain, Checkpoint(saved.name, saved.tensors), None)
    except NotKnown as error:
        raise CorruptInput(f"{where}: {error}") from None
    for link in find_links(family, settings, architecture.stored, where).links:
        if not present.issuperset(link.packed):
            raise CorruptInput(f"{where}: {link.saved[0]} is missing", hint="is a file of the model missing?")
    for name, shape in architecture.stored.items():
        if name in saved.tensors and saved.tensors[name].spec.shape != shape:
            raise CorruptInput(
                f"{where}: {escape(name)} is {list(saved.tensors[name].spec.shape)}, config.json says {list(shape)}",
                hint="are the configuration and the weights of one model?",
            )


def type_of(name: str, spec: TensorSpec, wanted: DType | None) -> DType:
    """The type in which the converter stores a tensor, of the name that it has in the file.

    `wanted` is that of most matrices; mixes of types are made of what comes of this (`quantised`).
    """
    if len(spec.shape) < 2 or not name.endswith(".weight") or name.endswith(_FULL):
        return DType.F32
    target = wanted or spec.dtype
    if spec.dtype is DType.MXFP4:
        return spec.dtype
    if target not in FILE_TYPES:
        types = ", ".join(known.value for known in FILE_TYPES)
        raise UsageError(f"{name}: llama.cpp computes with no {target.value}", hint=f"choose one of {types}")
    return fitting(target, spec)


def fitting(target: DType, spec: TensorSpec) -> DType:
    """`target`, or float16 where rows are no whole blocks of it."""
    return DType.F16 if target.is_packed and spec.shape[-1] % target.block[0] else target


def stored(name: str, tensor: LazyTensor, dtype: DType) -> LazyTensor:
    """A tensor as it goes into the file."""
    if len(tensor.spec.shape) < 2 or tensor.spec.dtype is dtype:
        return cast(tensor, dtype)
    if dtype in _FLOATS:
        return counted_cast(tensor, dtype, name)
    return LazyTensor.make(Quantize(dtype), tensor if tensor.spec.dtype in _FLOATS else cast(tensor, DType.F32))


def _commonest(specs: Mapping[str, TensorSpec]) -> DType:
    """The type of most elements of matrices."""
    matrices = Counter[DType]()
    for spec in specs.values():
        if len(spec.shape) > 1 and spec.dtype in FILE_TYPES:
            matrices[spec.dtype] += spec.numel
    return matrices.most_common(1)[0][0]


def _extra(family: Family, settings: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Tensors that llama.cpp has, and transformers computes from the configuration."""
    rope = settings["@rope"]
    if rope.get("rope_type") == "llama3":
        head_dim = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
        return {"rope_freqs.weight": _vector(llama3_factors(rope, head_dim))}
    if family.arch == "phi3" and rope.get("long_factor"):
        return {f"rope_factors_{name}.weight": _vector(rope[f"{name}_factor"]) for name in ("long", "short")}
    return {}


def _vector(values: Any) -> LazyTensor:
    import numpy as np

    data = np.asarray(values, "<f4")
    return LazyTensor.make(Given(DType.F32, data.shape, data.tobytes()))


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Any:
    """What llama.cpp divides each rotary frequency by: float32, one for each pair of a head's elements.

    Computed in float32 as in `generate_extra_tensors` of convert_hf_to_gguf; the same bits for Llama 3.1 to 3.3.
    """
    import numpy as np

    one, context = np.float32(1), rope["original_max_position_embeddings"]
    low, high, factor = (rope[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    lengths = np.float32(2 * math.pi) / (one / np.float32(rope["rope_theta"]) ** exponents)
    smooth = (np.float32(context) / lengths - np.float32(low)) / np.float32(high - low)
    between = one / ((one - smooth) / np.float32(factor) + smooth)
    factors = np.where(lengths > np.float32(context / low), np.float32(factor), between)
    return np.where(lengths < np.float32(context / high), one, factors)
