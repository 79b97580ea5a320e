"""Models that compute what Llama computes under other names, or in other words, as Llama: a row of steps for each.

Sources: transformers' models, the modelling code that InternLM2, Baichuan, Qwen and MiniCPM are published with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.tokenizers.files import TOKENIZER_CONFIG
from weightops.lazy import Evaluate
from weightops.operations.edit.operation import edit

Config = dict[str, Any]
Step = Mapping[str, Any]
_ATTENTION, _MLP = r"(?P<p>model\.layers\.\d+\.self_attn)", r"(?P<p>model\.layers\.\d+\.mlp)"
_QKV = [f"{{p}}.{x}_proj.weight" for x in "qkv"]


@dataclass(frozen=True)
class Plan:
    """What makes a model a Llama: steps, and settings of config.json to set and to take out. `notes` say what is lost.

    `is_rounded`: numbers change, by one rounding each.
    """

    steps: Sequence[Step]
    settings: Config
    unset: Sequence[str] = ()
    notes: Sequence[str] = ()


def _phi3(config: Config, source: Checkpoint) -> Plan:
    _need(config.get("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor: Llama turns whole heads")
    steps: list[Step] = [
        {"select": rf"{_ATTENTION}\.qkv_proj\.weight", "split": {"heads": ["q", "k", "v"]}, "name": _QKV},
        {
            "select": rf"{_MLP}\.gate_up_proj\.weight",
            "split": {"parts": 2},
            "name": ["{p}.gate_proj.weight", "{p}.up_proj.weight"],
        },
    ]
    return Plan(steps, {"attention_bias": False, "mlp_bias": False}, _WINDOW)


def _mistral(config: Config, source: Checkpoint) -> Plan:
    return Plan((), {"attention_bias": False, "mlp_bias": False}, _WINDOW)


def _qwen2(config: Config, source: Checkpoint) -> Plan:
    return Plan(_ZERO_BIAS, {"attention_bias": True, "mlp_bias": False}, (*_WINDOW, "use_sliding_window"))


_WINDOW = ("sliding_window", "max_window_layers", "layer_types")
_ZERO_BIAS: Sequence[Step] = (
    {
        "select": rf"{_ATTENTION}\.q_proj\.bias",
        "fill": {"shape": ["hidden"]},
        "name": "{p}.o_proj.bias",
        "keep": True,
    },
)
"""Llama has a bias either on all of attention or on none of it."""


def _granite(config: Config, source: Checkpoint) -> Plan:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return _scaled(
        config,
        source,
        embedding=config.get("embedding_multiplier", 1.0),
        residual=config.get("residual_multiplier", 1.0),
        query=config.get("attention_multiplier", 1.0) * math.sqrt(width),
        head=1 / config.get("logits_scaling", 1.0),
        unset=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    )


def _minicpm(config: Config, source: Checkpoint) -> Plan:
    _need("num_experts" not in config, "it is a mixture of experts")
    base = config.get("dim_model_base") or config["hidden_size"]
    return _scaled(
        config,
        source,
        embedding=config.get("scale_emb", 1.0),
        residual=config.get("scale_depth", math.sqrt(config["num_hidden_layers"]))
        / math.sqrt(config["num_hidden_layers"]),
        query=1.0,
        head=base / config["hidden_size"],
        unset=("scale_emb", "scale_depth", "dim_model_base"),
    )


def _scaled(
    config: Config,
    source: Checkpoint,
    *,
    embedding: float,
    residual: float,
    query: float,
    head: float,
    unset: Sequence[str],
) -> Plan:
    """Multipliers of a config as factors of the weights, embeddings being untied first."""
    steps: list[Step] = []
    tied = config.get("tie_word_embeddings", "lm_head.weight" not in source)
    if tied and "lm_head.weight" not in source:
        steps.append({"select": r"model\.embed_tokens\.weight", "name": "lm_head.weight", "keep": True})
    factors = {
        r"model\.embed_tokens\.weight": embedding,
        r"model\.layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)": residual,
        r"model\.layers\.\d+\.self_attn\.q_proj\.(weight|bias)": query,
        r"lm_head\.weight": head,
    }
    odd = next((factor for factor in factors.values() if not (math.isfinite(factor) and factor > 0)), None)
    _need(odd is None, f"a factor of its weights is {odd}, expected a number above zero")
    steps += [{"select": name, "scale": {"by": factor}} for name, factor in factors.items() if factor != 1.0]
    exact = all(math.frexp(factor)[0] == 0.5 for factor in factors.values())
    shown = ", ".join(f"{factor:g}" for factor in factors.values())
    lost = "exactly, being powers of two" if exact else "each weight rounded once more"
    note = f"factors of embedding, residual, query and head ({shown}) are in the weights now, {lost}"
    return Plan(steps, {"tie_word_embeddings": False}, unset, (note,))


def _internlm2(config: Config, source: Checkpoint) -> Plan:
    groups = config["num_attention_heads"] // config.get("num_key_value_heads", config["num_attention_heads"])
    _need(not config.get("bias", False), "its attention has biases", "bias")
    old = r"(?P<l>model\.layers\.\d+)"
    attention = rf"{old}\.attention"
    names = [f"{{l}}.self_attn.{x}_proj.weight" for x in "qkv"]
    moves = {
        r"model\.tok_embeddings\.weight": "model.embed_tokens.weight",
        rf"{attention}\.wo\.weight": "{l}.self_attn.o_proj.weight",
        rf"{old}\.feed_forward\.w1\.weight": "{l}.mlp.gate_proj.weight",
        rf"{old}\.feed_forward\.w3\.weight": "{l}.mlp.up_proj.weight",
        rf"{old}\.feed_forward\.w2\.weight": "{l}.mlp.down_proj.weight",
        rf"{old}\.attention_norm\.weight": "{l}.input_layernorm.weight",
        rf"{old}\.ffn_norm\.weight": "{l}.post_attention_layernorm.weight",
        r"output\.weight": "lm_head.weight",
    }
    steps: list[Step] = [
        {"select": rf"{attention}\.wqkv\.weight", "view": ["kv_heads", groups + 2, "head_dim", "hidden"]},
        {"select": rf"{attention}\.wqkv\.weight", "split": {"axis": 1, "sizes": [groups, 1, 1]}, "name": names},
        {"select": rf"{_ATTENTION}\.[qkv]_proj\.weight", "view": [-1, "hidden"]},
        *({"select": pattern, "name": name} for pattern, name in moves.items()),
    ]
    rope = config.get("rope_scaling") or {}
    notes = ("dynamic rope scaling is kept: answers are alike below the trained length",) if rope else ()
    return Plan(steps, {"attention_bias": False, "mlp_bias": False}, ("bias", "attn_implementation"), notes)


def _baichuan(config: Config, source: Checkpoint) -> Plan:
    _need("max_position_embeddings" in config, "it has no rotary embedding (13B: ALiBi)", "max_position_embeddings")
    steps: list[Step] = [
        {"select": rf"{_ATTENTION}\.W_pack\.weight", "split": {"parts": 3}, "name": _QKV},
        {"select": r".*\.rotary_emb\.inv_freq", "drop": True} if _has(source, ".rotary_emb.inv_freq") else {},
    ]
    notes: list[str] = []
    if "z_loss_weight" in config or config.get("vocab_size") == 125696:
        steps.append({"select": r"lm_head\.weight", "unit_rows": True})
        notes.append("Baichuan 2 makes each row of its head a unit vector when it runs: the rows are unit vectors now")
    return Plan([s for s in steps if s], {"attention_bias": False}, ("z_loss_weight", "model_max_length"), notes)


def _qwen(config: Config, source: Checkpoint) -> Plan:
    old = r"(?P<h>transformer\.h\.(?P<n>\d+))"
    new = "model.layers.{n}"
    moves = {
        r"transformer\.wte\.weight": "model.embed_tokens.weight",
        r"transformer\.ln_f\.weight": "model.norm.weight",
        rf"{old}\.ln_1\.weight": f"{new}.input_layernorm.weight",
        rf"{old}\.ln_2\.weight": f"{new}.post_attention_layernorm.weight",
        rf"{old}\.attn\.c_proj\.weight": f"{new}.self_attn.o_proj.weight",
        rf"{old}\.mlp\.w1\.weight": f"{new}.mlp.up_proj.weight",
        rf"{old}\.mlp\.w2\.weight": f"{new}.mlp.gate_proj.weight",
        rf"{old}\.mlp\.c_proj\.weight": f"{new}.mlp.down_proj.weight",
    }
    parts = [f"{new}.self_attn.{x}_proj.{{leaf}}" for x in "qkv"]
    steps: list[Step] = [
        {"select": rf"{old}\.attn\.c_attn\.(?P<leaf>weight|bias)", "split": {"parts": 3}, "name": parts},
        *({"select": pattern, "name": name} for pattern, name in moves.items()),
        *_ZERO_BIAS,
    ]
    length = config.get("seq_length", 2048)
    settings = {
        "attention_bias": True,
        "mlp_bias": False,
        "intermediate_size": config["intermediate_size"] // 2,
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_theta": config.get("rotary_emb_base", 10000),
        "max_position_embeddings": length,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    unset = ("layer_norm_epsilon", "rotary_emb_base", "rotary_pct", "seq_length", "use_dynamic_ntk", "use_logn_attn")
    notes = [f"Qwen's dynamic NTK and logn attention have no place: answers are alike up to {length} tokens"]
    return Plan(steps, settings, (*unset, "no_bias", "kv_channels", "use_flash_attn", "emb_dropout_prob"), notes)


FAMILIES: Mapping[str, Callable[[Config, Checkpoint], Plan]] = {
    "mistral": _mistral,
    "qwen2": _qwen2,
    "phi3": _phi3,
    "granite": _granite,
    "minicpm": _minicpm,
    "internlm2": _internlm2,
    "baichuan": _baichuan,
    "qwen": _qwen,
}
"""By model_type. A family more is a function of config.json."""
_NOT_LLAMA = {
    "qwen3": "q and k have norms",
    "gemma": "embeddings are scaled and norms are stored less 1",
    "olmo2": "norms follow the blocks",
    "stablelm": "its norms subtract the mean",
    "cohere": "blocks are parallel and norms subtract the mean",
    "glm4": "its rotary embedding turns half of a head, in pairs",
    "smollm3": "some layers have no rotary embedding",
    "falcon": "blocks are parallel",
    "gpt_neox": "blocks are parallel and norms subtract the mean",
}


def _need(condition: bool, why: str, key: str = "") -> None:
    if not condition:
        raise UsageError(f"config.json{f': {key}' if key else ''}: {why}", hint="it cannot be written as a Llama")


def _has(source: Checkpoint, ending: str) -> bool:
    return any(name.endswith(ending) for name in source)


def as_llama(source: Checkpoint, context_length: int | None, evaluate: Evaluate) -> Checkpoint:
    """The model as a Llama, which every program runs: the same answers, under Llama's names.

    `context_length` is the length up to which it is to be used, where attention slides in a shorter window than the
    model was trained for. Raises `UsageError` for families that are not Llama in other words, and for settings that
    Llama has not; `IncompatibleInputs` where the result would not load.
    """
    from weightops.layouts.skeleton import taken_for_granted

    where, config = escape(source.name), source.config()
    kind = str(config.get("model_type"))
    if kind == "llama":
        raise UsageError(f"{where}: is a Llama already")
    if kind not in FAMILIES:
        why = next((reason for name, reason in _NOT_LLAMA.items() if kind.startswith(name)), None)
        raise UsageError(
            f"{where}: model_type {escape(kind)[:80]} is not written as a Llama" + (f": {why}" if why else ""),
            hint=f"these are: {', '.join(FAMILIES)}",
        )
    try:
        config = {**config, **taken_for_granted(config, where)}
        length = _length(config, context_length)
        plan = FAMILIES[kind](config, source)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise IncompatibleInputs(f"{where}: config.json does not say enough of a {kind} model ({error})") from None
    except UsageError as error:
        raise UsageError(f"{where}: {error}", hint=error.hint) from None
    granted = {key: config[key] for key in config if key not in source.config()}
    settings = {**granted, "model_type": "llama", "architectures": ["LlamaForCausalLM"], **plan.settings, **length}
    unset = [key for key in plan.unset if key in config]
    bare = _without_code(source)
    result = edit(bare, steps=plan.steps, set=settings, unset=unset, names=("source",), evaluate=evaluate)
    return result.warned(*(f"{where}: {note}" for note in plan.notes), *_on_tokenizer(source))


def _length(config: Config, wanted: int | None) -> Config:
    """The context that the result says; raises `UsageError` for one beyond the window in which attention slides."""
    window, length = config.get("sliding_window"), config.get("max_position_embeddings")
    slides = isinstance(window, int) and config.get("use_sliding_window", True) is not False
    if not isinstance(window, int) or not slides or not isinstance(length, int) or window >= length:
        return {} if wanted is None else {"max_position_embeddings": wanted}
    if wanted is None or wanted > window:
        raise UsageError(
            f"config.json: attention slides in a window of {window} tokens, and the context is {length}",
            hint=f"Llama's does not: --set context_length={window} makes a model for texts up to there",
        )
    return {"max_position_embeddings": wanted}


def _without_code(source: Checkpoint) -> Checkpoint:
    """Without the code that a model is published with, which says what it no longer is."""
    if "auto_map" not in source.config():
        return source
    sidecars = {name: file for name, file in source.sidecars.items() if not fnmatchcase(name, "*.py")}
    config = dict(source.config())
    del config["auto_map"]
    data = source.sidecar(TOKENIZER_CONFIG)
    if data is not None and "tokenizer.model" in sidecars:
        from weightops.io import strict_json

        tokens = strict_json.load_object(data, TOKENIZER_CONFIG)
        tokens.pop("auto_map", None)
        sidecars[TOKENIZER_CONFIG] = written_json({**tokens, "tokenizer_class": "LlamaTokenizer"})
    gone = sorted(source.sidecars.keys() - sidecars.keys())
    result = source.with_sidecars({**sidecars, "config.json": written_json(config)})
    return (
        result.warned(f"{escape(source.name)}: code of the former model left out: {listed(gone)}") if gone else result
    )


def _on_tokenizer(source: Checkpoint) -> tuple[str, ...]:
    """What there is to say of a tokenizer that only code can read."""
    if any(name.endswith(".tiktoken") for name in source.sidecars) and "tokenizer.json" not in source.sidecars:
        return (f"{escape(source.name)}: its tokenizer needs code of its own; that of Qwen1.5 has the same tokens",)
    return ()
