"""Reads GGUF files as what transformers saves: the table of families, backwards.

Which tensors there are, and of which shapes, is what transformers' own class says for the config.json that comes of the
file's keys. Source: llama.cpp's convert_hf_to_gguf, which this undoes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import CorruptInput, UsageError
from weightops.formats.gguf.metadata import kind_of
from weightops.formats.quantized.gguf import native_dtype, plain_tensor
from weightops.io.escape import escape
from weightops.layouts.architecture import NotKnown, find
from weightops.layouts.gguf.families import BY_TYPE
from weightops.layouts.gguf.general import sampling_of
from weightops.layouts.gguf.links import find_links
from weightops.layouts.gguf.parameters import config_of, family_of, shortest, value_of
from weightops.layouts.gguf.saved import Saved
from weightops.layouts.gguf.write import llama3_factors
from weightops.layouts.source import Source
from weightops.layouts.tokenizers.files import GENERATION, TokenizerFiles
from weightops.layouts.tokenizers.hf import stated_ids
from weightops.layouts.tokenizers.of_gguf import find_tokenizer
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.measures.loss import counted_cast
from weightops.spec import DType

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_LONG, _ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_FOLLOWS = (_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT)
_KEPT = (".e_score_correction_bias",)
"""Ends of the names of tensors that models have in float32, whatever the others are."""
_LIMITS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)
"""What Llama 3.1 rescales, for which every published model keeps, and lengths that one may have been trained for."""
_MAX_FACTORS = 1 << 16


def read(source: Source, dtype: DType | None = None) -> Saved:
    """The model of a GGUF file, its tensors in `dtype`, or in what they were before it was made.

    Blocks become the numbers that they stand for. Raises `UsageError` for files that hold no model, for families and
    tokenizers that are not known here; `CorruptInput` where keys and tensors do not fit.
    """
    metadata, tensors, where = source.checkpoint.metadata, dict(source.checkpoint), source.where
    config = config_in(source.checkpoint)
    family = BY_TYPE[config["model_type"]]
    _put_factors(config, tensors, source)
    files, ids, ends = _tokenizer(source, metadata, config)
    native = dtype or native_dtype(source.checkpoint)
    config |= {**dict.fromkeys(_IDS), **ids, "torch_dtype": native.value}  # null is not what a class has by default
    found, used = dict[str, LazyTensor](), set[str]()
    try:
        architecture = find(config, source.checkpoint, None)
    except NotKnown as error:
        raise CorruptInput(f"{where}: {error}") from None
    place = {name: i for i, name in enumerate(tensors)}
    links = find_links(family, config, architecture.stored, where).links
    for link in sorted(links, key=lambda link: place.get(link.packed[0], 0)):
        missing = next((name for name in link.packed if name not in tensors), None)
        if missing is not None:
            raise CorruptInput(f"{where}: {escape(missing)} is missing", hint="is a file of the model missing?")
        used.update(link.packed)
        stored = [tensors[name] for name in link.packed]
        parts = link.back([plain_tensor(t, native) if t.spec.dtype.is_block else t for t in stored], where)
        for name, tensor in zip(link.saved, parts, strict=True):
            expected = architecture.stored[name]
            if tensor.spec.shape != expected:
                raise CorruptInput(
                    f"{where}: {escape(link.packed[0])} makes {name} {list(tensor.spec.shape)}, "
                    f"the keys of the file say {list(expected)}"
                )
            found[name] = counted_cast(tensor, DType.F32 if name.endswith(_KEPT) else native, name)
    left = sorted(tensors.keys() - used - {*_FOLLOWS})
    if left:
        raise UsageError(
            f"{where}: {escape(left[0])} has no place in transformers' {family.architecture}"
            + (f", nor have {len(left) - 1} more" if len(left) > 1 else "")
        )
    reason = "follows from the parameters, and is computed by whoever loads the model"
    generation = {**ids, **({"eos_token_id": list(ends)} if len(ends) > 1 else {}), **_asked(metadata)}
    return Saved(
        name=source.checkpoint.name.removesuffix(".gguf"),
        config=config,
        tensors=found,
        files=files,
        sidecars={GENERATION: written_json({"_from_model_config": not _asked(metadata), **generation})},
        dropped={name: reason for name in _FOLLOWS if name in tensors},
    )


def config_in(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of config.json that a GGUF file says, but for the tokenizer's ids; raises as `read` does."""
    metadata, tensors, where = checkpoint.metadata, checkpoint.tensors, escape(checkpoint.name)
    kind = kind_of(metadata)
    if kind != "model":
        raise UsageError(f"{where}: holds no model, but is of general.type {escape(kind)[:80]}")
    has_experts = any("_exps." in name for name in tensors)
    family = family_of(metadata, has_experts, any(".exp_probs_b." in name for name in tensors), where)
    return config_of(family, metadata, tensors, where)


def _asked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are to be chosen; to be heeded at all, they have to be chosen by chance."""
    sampling = sampling_of(metadata)
    return {"do_sample": True, **sampling} if sampling else {}


def _tokenizer(
    source: Source, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[TokenizerFiles, Mapping[str, Any], tuple[int, ...]]:
    """The files of the tokenizer, and what it says for config.json: that of the file, unless another was named."""
    if not source.has_own_tokenizer:
        files = source.tokenizer_files(layout="gguf")
        return files, stated_ids(files, config["vocab_size"]), ()
    values = {key: value_of(metadata, key) for key in metadata if key.startswith("tokenizer.")}
    found = find_tokenizer(values, config["vocab_size"], source.where)
    if found is None:
        return TokenizerFiles(where=source.where), {}, ()
    return TokenizerFiles(found.files, source.where), found.ids, found.ends


def _put_factors(config: dict[str, Any], tensors: Mapping[str, LazyTensor], source: Source) -> None:
    """The rotary scaling that tensors of factors stand for, and no key says."""
    rope = config["rope_parameters"]
    if _ROPE_FREQS in tensors and BY_TYPE[config["model_type"]].rotary:
        scaling = _llama3(_factors(_ROPE_FREQS, tensors, source), config, source.where)
        config |= {"rope_scaling": scaling, "rope_parameters": {"rope_theta": rope["rope_theta"], **scaling}}
    if _ROPE_LONG in tensors and config["model_type"] == "phi3":
        names = {"long_factor": _ROPE_LONG, "short_factor": _ROPE_SHORT}
        factors = {key: [shortest(v) for v in _factors(name, tensors, source)] for key, name in names.items()}
        config["rope_scaling"] = {"type": "longrope", **factors}
        original = {"original_max_position_embeddings": config["original_max_position_embeddings"]}
        config["rope_parameters"] = {**rope, "rope_type": "longrope", **original, **factors}


def _factors(name: str, tensors: Mapping[str, LazyTensor], source: Source) -> Any:
    """The values of a small vector, in float32."""
    import numpy as np

    spec = tensors[name].spec if name in tensors else None
    if spec is None or not spec.dtype.is_float or not 0 < spec.numel <= _MAX_FACTORS:
        raise CorruptInput(f"{source.where}: {name} is {spec or 'missing'}, expected a factor for each frequency")
    return np.frombuffer(source.evaluate(cast(tensors[name], DType.F32)), "<f4")


def _llama3(stored: Any, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parameters that give these factors: those of Llama 3.1 to 3.3, for some length of context."""
    import numpy as np

    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    scaling = {"rope_type": "llama3", "factor": shortest(max(stored)), **_LIMITS}
    for context in _CONTEXTS:
        scaling["original_max_position_embeddings"] = context
        with np.errstate(all="ignore"):
            expected = llama3_factors({**config["rope_parameters"], **scaling}, head_dim)
        if expected.shape == stored.shape and np.allclose(stored, expected, rtol=1e-5):
            return scaling
    raise UsageError(f"{where}: {_ROPE_FREQS} holds other factors than a rotary scaling of Llama 3.1's kind gives")
