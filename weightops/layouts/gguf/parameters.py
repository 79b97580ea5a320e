"""The parameters of a model: fields of config.json as keys of GGUF's metadata, and back.

What is neither field nor key by itself is derived here, under names that begin with `@`.
Source: llama.cpp's convert_hf_to_gguf (TextModel.set_gguf_parameters and its subclasses), llama-model.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.gguf.families import BY_TYPE, Family

Metadata = dict[str, dict[str, Any]]
Settings = dict[str, Any]

_GATING = {"softmax": 1, "sigmoid": 2}
"""gguf's ExpertGatingFuncType."""
_LOG_MULTIPLIER = 0.1
"""By what llama.cpp multiplies `mscale_all_dim`."""
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the models whose attention llama.cpp scales by the width of a head as the embedding has it."""
_DECISIVE = ("query_pre_attn_scalar", "norm_topk_prob", "use_sliding_window", "sliding_window")
"""Fields without a key, on which hangs what a model computes."""
_WINDOW_EVERY = 6
"""Of so many layers of Gemma 3, all but the last attend to a window."""


def settings_of(config: Mapping[str, Any], family: Family, where: str) -> Settings:
    """All fields of a config.json, with transformers' defaults, and what is derived of them.

    Raises `UsageError` for rotary scalings that llama.cpp's converter does not write for the family, `CorruptInput`
    where a field is missing or senseless.
    """
    from weightops.layouts.skeleton import parse_config

    plain = {key: value for key, value in config.items() if key != "auto_map"}
    settings = parse_config(plain, where).to_dict()
    try:
        _derive_rope(settings, family, where)
        _derive(settings, family)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError, OverflowError) as error:
        raise CorruptInput(
            f"{where}/config.json: a parameter is missing, or no number ({escape(repr(error))[:200]})"
        ) from error
    return settings


def _derive_rope(c: Settings, family: Family, where: str) -> None:
    rope: dict[str, Any] = c.get("rope_parameters") or {}
    full: dict[str, Any] = rope.get("full_attention", rope)
    kind = full.get("rope_type") or "default"
    c |= {"@rope": full, "@theta": full.get("rope_theta")}
    c["@theta_local"] = rope.get("sliding_attention", {}).get("rope_theta")
    if kind in ("linear", "yarn") and family.arch not in ("gemma", "gemma2", "phi3", "command-r"):
        c["@scaling"], c["@factor"] = kind, full["factor"]
        if kind == "yarn":
            c["@original"] = full["original_max_position_embeddings"]
            attention = full.get("attention_factor", full.get("attn_factor"))
            c |= {"@extrapolation_factor": full.get("extrapolation_factor"), "@attention_factor": attention}
            c |= {"@beta_fast": full.get("beta_fast"), "@beta_slow": full.get("beta_slow")}
    elif not (
        kind == "default" or (kind == "llama3" and family.rotary) or (kind == "longrope" and family.arch == "phi3")
    ):
        raise UsageError(
            f"{where}/config.json: rotary scaling of type {escape(str(kind))[:80]} is not written to GGUF for "
            f"{family.model_type} models",
            hint="llama.cpp's converter does not write it either",
        )


def _derive(c: Settings, family: Family) -> None:
    heads, width = c["num_attention_heads"], c["hidden_size"]
    match family.arch:
        case "llama":
            c["@rotary_dim"] = c.get("head_dim") or width // heads
        case "granite":
            c.pop("head_dim", None)
            c["@rotary_dim"] = width // heads
        case "command-r":
            c["@no_scaling"] = "none"
        case "phi3":
            rope, context = c["@rope"], c["max_position_embeddings"]
            original = rope.get("original_max_position_embeddings") or c.get("original_max_position_embeddings")
            c["@original"] = original or context
            c["@rotary_dim"] = int(rope.get("partial_rotary_factor", 1.0) * width) // heads
            c["@window"] = c.get("sliding_window") or 0
            if rope.get("long_factor"):
                scale = context / c["@original"]
                c["@attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(c["@original"])) if scale > 1 else 1.0
        case "deepseek2":
            rank, rotary = c["kv_lora_rank"], c["qk_rope_head_dim"]
            c |= {"@key_length": rank + rotary, "@key_length_mla": c["qk_nope_head_dim"] + rotary}
            c |= {"@heads_kv": c["num_key_value_heads"], "num_key_value_heads": 1}
            c["@norm_topk_prob"] = c.get("norm_topk_prob") or None
            scale = c["@rope"].get("mscale_all_dim")
            c["@log_multiplier"] = _LOG_MULTIPLIER * scale if scale is not None else None
            scoring = c.get("scoring_func")
            c["@gating"] = _GATING[scoring] if scoring is not None else None
    expected = dict(family.constants)
    if family.arch in _GEMMA_27B:
        expected["query_pre_attn_scalar"] = _query_scalar(family, c)
    c["@warnings"] = [
        f"{name} {c.get(name)} is left out: llama.cpp has no key for it, and computes with {expected[name] or 'none'}"
        for name in _DECISIVE
        if name in expected and c.get(name) != expected[name]
    ]


def _query_scalar(family: Family, c: Mapping[str, Any]) -> Any:
    """What llama.cpp scales the queries of Gemma by."""
    if c["num_hidden_layers"] == _GEMMA_27B[family.arch]:
        return c["hidden_size"] // c["num_attention_heads"]
    return c["head_dim"]


def metadata_of(family: Family, settings: Settings) -> Metadata:
    """The keys of a model, in the converter's order; raises `CorruptInput` for values that they cannot hold."""
    result: Metadata = {}
    for key in family.keys:
        name = next((name for name in key.fields if settings.get(name) is not None), None)
        if name is None:
            continue
        value = settings[name]
        is_right = {
            "string": isinstance(value, str),
            "bool": isinstance(value, bool),
            "float32": isinstance(value, int | float) and not isinstance(value, bool),
            "uint32": isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32,
        }[key.kind]
        if not is_right:
            raise CorruptInput(f"config.json: {name} is {escape(repr(value))[:80]}, GGUF has {key.kind} for it")
        result[full_name(family.arch, key.name)] = {key.kind: value}
    return result


def full_name(arch: str, name: str) -> str:
    """A key as it stands in the file."""
    return name if name.startswith("general.") else f"{arch}.{name}"


def family_of(metadata: Mapping[str, Any], has_experts: bool, has_bias: bool, where: str) -> Family:
    """The family of a file; raises `UsageError` for those that are not known here.

    One architecture of llama.cpp may be several of transformers: `has_experts` tells Mixtral from LLaMA, and
    `has_bias`, of the choice of experts, DeepSeek V3 from V2.
    """
    arch = value_of(metadata, "general.architecture")
    kind = {"llama": "mixtral" if has_experts else "llama", "deepseek2": f"deepseek_v{3 if has_bias else 2}"}
    found = [family for family in BY_TYPE.values() if family.arch == arch]
    if not found:
        known = ", ".join(sorted({family.arch for family in BY_TYPE.values()}))
        raise UsageError(
            f"{where}: the architecture {escape(str(arch))[:80]} is not converted from GGUF", hint=f"these are: {known}"
        )
    return BY_TYPE[kind[arch]] if isinstance(arch, str) and arch in kind else found[0]


def value_of(metadata: Mapping[str, Any], key: str) -> Any:
    """The value of a key without its type, None where there is none; of an array its elements."""
    found = metadata.get(key)
    if not isinstance(found, dict):
        return None
    ((kind, value),) = found.items()
    if kind == "array":
        return value[1]
    return shortest(value) if kind == "float32" else value


def shortest(value: float) -> float:
    """The number with the fewest digits that is this one in float32."""
    import numpy as np

    return float(str(np.float32(value)))


def config_of(family: Family, metadata: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> Settings:
    """The fields of config.json that keys and tensors of a file say, but for the tokenizer's ids.

    Raises `CorruptInput` where a key is missing that every model of the family has.
    """
    config: Settings = {"architectures": [family.architecture], "model_type": family.model_type}
    found: Settings = {}
    for key in family.keys:
        value = value_of(metadata, full_name(family.arch, key.name))
        if value is not None:
            found[key.fields[-1]] = value
    config |= {name: value for name, value in found.items() if not name.startswith("@")}
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.spec.shape) != 2:
        raise CorruptInput(f"{where}: token_embd.weight is missing, or no matrix")
    config["vocab_size"] = embedding.spec.shape[0]
    wanted = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    missing = next((name for name in wanted if type(config.get(name)) is not int or config[name] < 1), None)
    if missing is not None:
        name = next(key.name for key in family.keys if missing in key.fields)
        raise CorruptInput(f"{where}: {full_name(family.arch, name)} is missing, or no number above zero")
    config["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config |= family.constants
    config |= {name: f"blk.0.{tensor}" in tensors for name, tensor in family.biased.items()}
    rope = _rope(found, config)
    try:
        _restore(config, found, rope, family, tensors)
    except KeyError as error:
        raise CorruptInput(f"{where}: the file does not say {escape(str(error))}") from None
    _put_rope(config, rope, found)
    return config


def _rope(found: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' `rope_parameters`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": found.get("@theta", 10000.0)}
    kind = found.get("@scaling")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": found.get("@factor", 1.0)}
    if kind == "yarn":
        original = found.get("@original", config["max_position_embeddings"])
        named = {"original_max_position_embeddings": original}
        named |= {name: found.get(f"@{name}") for name in ("extrapolation_factor", "attention_factor")}
        named |= {name: found.get(f"@{name}") for name in ("beta_fast", "beta_slow")}
        rope |= {name: value for name, value in named.items() if value is not None}
    return rope


def _restore(
    config: Settings, found: Mapping[str, Any], rope: dict[str, Any], family: Family, tensors: Mapping[str, Any]
) -> None:
    """What a family says in another way."""
    match family.arch:
        case "phi3":
            width = config["hidden_size"] // config["num_attention_heads"]
            config["sliding_window"] = found.get("@window") or None
            config["original_max_position_embeddings"] = found.get("@original", config["max_position_embeddings"])
            if found.get("@rotary_dim", width) != width:
                # Any that gives this number again; published models have halves, quarters and the like.
                config["partial_rotary_factor"] = rope["partial_rotary_factor"] = found["@rotary_dim"] / width
        case "deepseek2":
            rotary = config["qk_rope_head_dim"]
            config["num_key_value_heads"] = config["num_attention_heads"]
            config["qk_nope_head_dim"] = found["@key_length_mla"] - rotary
            config["norm_topk_prob"] = bool(found.get("@norm_topk_prob"))
            config["q_lora_rank"] = config.get("q_lora_rank")
            config["head_dim"] = rotary
            if "@log_multiplier" in found:
                scale = shortest(found["@log_multiplier"] / _LOG_MULTIPLIER)
                rope |= {"mscale": scale, "mscale_all_dim": scale}
            if family.model_type == "deepseek_v2":
                several = (config.get("n_group") or 1) > 1
                config["topk_method"] = "group_limited_greedy" if several else "greedy"
        case "gpt-oss":
            rope["truncate"] = False
    if family.arch in _GEMMA_27B:
        config["query_pre_attn_scalar"] = _query_scalar(family, config)
    if family.arch == "gemma3":
        layers = range(1, config["num_hidden_layers"] + 1)
        kinds = {True: "full_attention", False: "sliding_attention"}
        config["layer_types"] = [kinds[n % _WINDOW_EVERY == 0] for n in layers]
        config["sliding_window_pattern"] = _WINDOW_EVERY


def _put_rope(config: Settings, rope: dict[str, Any], found: Mapping[str, Any]) -> None:
    """The rotary embedding in the dialects of transformers 4 and 5."""
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    config["rope_parameters"] = rope
    if "@theta_local" in found:
        local = {"rope_type": "default", "rope_theta": found["@theta_local"]}
        config["rope_local_base_freq"] = found["@theta_local"]
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
