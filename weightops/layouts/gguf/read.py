"""Reads GGUF files as what transformers saves: the table of families, backwards.

Which tensors there are, and of which shapes, is what transformers' own class says for the config.json that comes of the
file's keys. Source: llama.cpp's convert_hf_to_gguf, which this undoes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightops.checkpoint import written_json
from weightops.errors import CorruptInput, UsageError
from weightops.formats.gguf.metadata import kind_of
from weightops.formats.quantized.gguf import native_dtype, plain_tensor
from weightops.io.escape import escape
from weightops.layouts.architecture import NotKnown, find
from weightops.layouts.gguf.general import sampling_of
from weightops.layouts.gguf.links import find_links
from weightops.layouts.gguf.parameters import config_of, family_of, value_of
from weightops.layouts.gguf.saved import Saved
from weightops.layouts.gguf.write import llama3_factors
from weightops.layouts.source import Source
from weightops.layouts.tokenizers.files import GENERATION, TokenizerFiles
from weightops.layouts.tokenizers.hf import stated_ids
from weightops.layouts.tokenizers.of_gguf import find_tokenizer
from weightops.lazy import LazyTensor
from weightops.ops.measures.loss import counted_cast
from weightops.spec import DType

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FOLLOWS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_ROPE_FREQS = "rope_freqs.weight"
_KEPT = (".e_score_correction_bias",)
"""Ends of the names of tensors that models have in float32, whatever the others are."""
_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)
_DIGITS = (1.0, 4.0)
"""Llama 3.1's limits of what it rescales, for which every published model keeps."""


def read(source: Source, dtype: DType | None = None) -> Saved:
    """The model of a GGUF file, its tensors in `dtype`, or in what they were before it was made.

    Blocks become the numbers that they stand for. Raises `UsageError` for files that hold no model, for families and
    tokenizers that are not known here; `CorruptInput` where keys and tensors do not fit.
    """
    metadata, tensors, where = source.checkpoint.metadata, dict(source.checkpoint), source.where
    kind = kind_of(metadata)
    if kind != "model":
        raise UsageError(f"{where}: holds no model, but is of general.type {escape(kind)[:80]}")
    has_experts = any("_exps." in name for name in tensors)
    family = family_of(metadata, has_experts, any(".exp_probs_b." in name for name in tensors), where)
    config = config_of(family, metadata, tensors, where)
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
    """The rotary scaling that tensors of factors stand for, which no key says."""
    import numpy as np

    def values(name: str) -> Any:
        return np.frombuffer(source.evaluate(tensors[name]), "<f4")

    rope = config["rope_parameters"]
    if _ROPE_FREQS in tensors and config["model_type"] in ("llama", "mistral", "mixtral", "granite"):
        stored = values(_ROPE_FREQS)
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        scaling = {"rope_type": "llama3", "factor": float(max(stored, default=0.0))}
        scaling |= dict(zip(("low_freq_factor", "high_freq_factor"), _DIGITS, strict=True))
        for context in _CONTEXTS:
            scaling["original_max_position_embeddings"] = context
            if len(stored) * 2 == head_dim and np.allclose(
                stored, llama3_factors({**rope, **scaling}, head_dim), rtol=1e-5
            ):
                break
        else:
            raise UsageError(
                f"{source.where}: {_ROPE_FREQS} holds other factors than a rotary scaling of Llama 3.1's kind gives"
            )
        config["rope_scaling"] = scaling
        config["rope_parameters"] = {"rope_theta": rope["rope_theta"], **scaling}
    if "rope_factors_long.weight" in tensors:
        from weightops.layouts.gguf.parameters import shortest

        factors = {
            f"{name}_factor": [shortest(v) for v in values(f"rope_factors_{name}.weight")] for name in ("long", "short")
        }
        original = config["original_max_position_embeddings"]
        config["rope_scaling"] = {"type": "longrope", **factors}
        config["rope_parameters"] = {
            **rope,
            **{"rope_type": "longrope", "original_max_position_embeddings": original, **factors},
        }
