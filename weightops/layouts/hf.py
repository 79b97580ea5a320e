"""transformers' layout: one state dict with rows of q and k in halves, and `config.json`.

The configuration is written so that transformers 4.4x, which reads `rope_theta` and `rope_scaling`, and 5.x, which
reads `rope_parameters`, compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightops.checkpoint import Checkpoint, Sidecar, Written, written_json
from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.model import Hyperparameters, Model, RopeScaling
from weightops.layouts.names import EMBEDDING, HEAD, LAYER, from_canonical, to_canonical
from weightops.layouts.rotary import inverse_frequencies
from weightops.layouts.source import Fields, Source
from weightops.layouts.tokenizers.hf import hf_files, inexact, special_ids, stated_ids
from weightops.lazy import LazyTensor
from weightops.ops.arrange import Agreed, halves_to_pairs, pairs_to_halves
from weightops.ops.elementwise import cast

_ROTARY = tuple(role for role in LAYER if role.rotary)
_DEFAULTS: Mapping[str, tuple[int, int | None]] = {"llama": (2048, None), "mistral": (131072, 4096)}
"""What transformers takes for a context length and a sliding window that are not there."""


def read(source: Source) -> Model:
    """The model; raises `UsageError` for other architectures, `CorruptInput` if config and tensors disagree."""
    config, where = source.parameters("config.json"), f"{source.where}/config.json"
    fields = Fields(config, where)
    family = config.get("model_type", "llama")
    if family not in ("llama", "mistral") or config.get("quantization_config") or config.get("num_local_experts"):
        kind = "quantised " * bool(config.get("quantization_config")) + f"model_type {escape(str(family))[:80]}"
        raise UsageError(f"{where}: {kind} is not converted", hint="LLaMA and Mistral models are")
    if config.get("hidden_act", "silu") != "silu":
        raise UsageError(f"{where}: hidden_act {escape(str(config['hidden_act']))[:80]} is not that of LLaMA")
    tensors = dict(source.checkpoint)
    embedding, head = EMBEDDING.name("hf", 0), HEAD.name("hf", 0)
    if embedding not in tensors or len(tensors[embedding].spec.shape) != 2:
        raise CorruptInput(f"{source.where}: {embedding} is missing, or no matrix")
    dim, n_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    theta, scaling = _rope(config, fields)
    vocab_size = tensors[embedding].spec.shape[0]
    stated = fields.count("vocab_size") if config.get("vocab_size") is not None else vocab_size
    if stated != vocab_size:
        raise CorruptInput(
            f"{where}: vocab_size is {stated}, {embedding} has {vocab_size} rows",
            hint="are the configuration and the weights of one model?",
        )
    usual_context, window = _DEFAULTS[family]
    if "sliding_window" in config:
        window = None if family == "llama" or config["sliding_window"] is None else fields.count("sliding_window")
    hyperparameters = Hyperparameters(
        family=family,
        dim=dim,
        n_layers=fields.count("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=fields.count("num_key_value_heads", n_heads),
        head_dim=fields.count("head_dim", max(1, dim // n_heads)),
        ffn_dim=fields.count("intermediate_size"),
        vocab_size=vocab_size,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        context_length=source.setting("context_length", fields.count("max_position_embeddings", usual_context)),
        sliding_window=window,
        tied=fields.flag("tie_word_embeddings"),
    )
    if hyperparameters.tied and head in tensors and tensors[head] != tensors[embedding]:
        problem = f"{where} ties {head} to {embedding}, and they do not agree"
        tensors[embedding] = LazyTensor.make(Agreed(problem), tensors[embedding], tensors[head])
    found, dropped = to_canonical("hf", tensors, hyperparameters, source.where)
    return Model(
        name=source.checkpoint.name,
        hyperparameters=hyperparameters,
        tensors=_reordered(found, hyperparameters, halves_to_pairs),
        dropped=dropped,
    )


def _rope(config: Mapping[str, Any], fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, in the dialect of transformers 4, of 5, or both.

    Raises `UsageError` for other scalings, `CorruptInput` where the two differ: each version takes something else.
    """
    thetas, scalings = set(), set()
    for key in ("", "rope_scaling", "rope_parameters"):
        document = config.get(key) if key else config
        if document is None or document == {}:
            continue
        if not isinstance(document, dict):
            raise CorruptInput(f"{fields.where}: {key} is {escape(repr(document))[:80]}, expected an object")
        numbers = Fields(document, f"{fields.where}: {key}" if key else fields.where)
        if document.get("rope_theta") is not None:
            thetas.add(numbers.number("rope_theta"))
        if numbers.number("partial_rotary_factor", 1.0) != 1.0:
            raise UsageError(f"{numbers.where}: partial_rotary_factor is not converted")
        if key:
            scalings.add(_scaling(document, numbers))
    if len(thetas) > 1 or len(scalings) > 1:
        raise CorruptInput(
            f"{fields.where}: rope_theta, rope_scaling and rope_parameters contradict one another",
            hint="versions of transformers differ in which of them they take",
        )
    return thetas.pop() if thetas else 10000.0, scalings.pop() if scalings else None


def _scaling(document: Mapping[str, Any], numbers: Fields) -> RopeScaling | None:
    kind = document.get("rope_type", document.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UsageError(
            f"{numbers.where}: rotary scaling of type {escape(str(kind))[:80]} is not converted",
            hint="that of Llama 3.1 is; other layouts have no place for more",
        )
    return RopeScaling(
        factor=numbers.number("factor"),
        low_freq_factor=numbers.number("low_freq_factor"),
        high_freq_factor=numbers.number("high_freq_factor"),
        original_context_length=numbers.count("original_max_position_embeddings"),
    )


def _reordered(
    tensors: Mapping[str, LazyTensor], h: Hyperparameters, reorder: Callable[[LazyTensor, int], LazyTensor]
) -> dict[str, LazyTensor]:
    """Tensors under canonical names, those of q and k with their rows in the other rotary order."""
    heads = {
        role.name("meta", n, kind): h.n_heads if role.rotary == "q" else h.n_kv_heads
        for role in _ROTARY
        for n in range(h.n_layers)
        for kind in ("weight", "bias")
    }
    return {name: reorder(tensor, heads[name]) if name in heads else tensor for name, tensor in tensors.items()}


def write(model: Model, *, as_in_2023: bool = False) -> Checkpoint:
    """The model for transformers; raises `UsageError` where the context length is not known.

    `as_in_2023`: with the state dict of transformers 4.28, on which published differences and checksums rest.
    """
    h = model.hyperparameters
    tensors = from_canonical("hf", _reordered(model.tensors, h, pairs_to_halves), h)
    if as_in_2023:
        tensors = _as_in_2023(tensors, h)
    ids = special_ids(model.tokenizer) if model.tokenizer else stated_ids(model.files, h.vocab_size)
    dtype = tensors[EMBEDDING.name("hf", 0)].spec.dtype.value
    biases = biased(tensors)
    _check_biases(tensors, h, biases)
    files: dict[str, Sidecar] = {
        "config.json": written_json(config_of(h, ids, dtype, biases)),
        "generation_config.json": written_json({"_from_model_config": True, **ids}),
    }
    if model.tokenizer is not None:
        made = hf_files(model.tokenizer, h.known_context_length())
        files |= {name: Written(data) for name, data in made.items()}
    warnings = inexact(model.tokenizer) if model.tokenizer else ()
    return Checkpoint(model.name, tensors, sidecars={**files, **model.sidecars}, warnings=warnings)


def _as_in_2023(tensors: Mapping[str, LazyTensor], h: Hyperparameters) -> dict[str, LazyTensor]:
    """The order of transformers 4.28, with its buffer of rotary frequencies in every layer, in the model's dtype."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".mlp.up_proj.weight"):
            continue
        result[name] = tensor
        if name.endswith(".mlp.down_proj.weight"):
            up = name.replace("down_proj", "up_proj")
            result[up] = tensors[up]
        if name.endswith(".self_attn.o_proj.weight"):
            layer = int(name.split(".")[2])
            frequencies = inverse_frequencies(h.rope_theta, h.head_dim, layer)
            result[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = cast(frequencies, tensor.spec.dtype)
    return result


def biased(tensors: Mapping[str, LazyTensor]) -> tuple[bool, bool]:
    """Whether the projections of attention, and of the feed-forward layers, have biases."""
    names = [name for name in tensors if name.endswith("_proj.bias")]
    return any(".self_attn." in name for name in names), any(".mlp." in name for name in names)


def _check_biases(tensors: Mapping[str, LazyTensor], h: Hyperparameters, biases: tuple[bool, bool]) -> None:
    """Refuse biases that transformers would not take: its models of a kind have all of them or none."""
    if any(biases) and h.family == "mistral":
        raise UsageError("transformers has no place for the biases of a Mistral model")
    wanted = (*LAYER[:4] * biases[0], *LAYER[4:7] * biases[1])
    names = (role.name("hf", n, "bias") for n in range(h.n_layers) for role in wanted)
    missing = next((name for name in names if name not in tensors), None)
    if missing is not None:
        raise UsageError(f"there is no {missing}, and transformers has all biases of a kind, or none")


def config_of(h: Hyperparameters, ids: Mapping[str, Any], dtype: str, biases: tuple[bool, bool]) -> dict[str, Any]:
    """config.json for both generations of transformers."""
    is_llama = h.family == "llama"
    scaling: dict[str, Any] = {}
    if h.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": h.rope_scaling.factor,
            "low_freq_factor": h.rope_scaling.low_freq_factor,
            "high_freq_factor": h.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": h.rope_scaling.original_context_length,
        }
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if is_llama else "MistralForCausalLM"],
        "model_type": h.family,
        "vocab_size": h.vocab_size,
        "hidden_size": h.dim,
        "intermediate_size": h.ffn_dim,
        "num_hidden_layers": h.n_layers,
        "num_attention_heads": h.n_heads,
        "num_key_value_heads": h.n_kv_heads,
        "head_dim": h.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": h.known_context_length(),
        "initializer_range": 0.02,
        "rms_norm_eps": h.norm_eps,
        "attention_dropout": 0.0,
        "rope_theta": h.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": h.rope_theta, **scaling},
        "tie_word_embeddings": h.tied,
        "use_cache": True,
        "torch_dtype": dtype,
        **ids,
    }
    if is_llama:
        config |= {"attention_bias": biases[0], "mlp_bias": biases[1], "pretraining_tp": 1}
    else:
        config |= {"sliding_window": h.sliding_window}
    return config
