"""The families of models that GGUF files are written of and read as: a table, read in both directions.

Source: llama.cpp's convert_hf_to_gguf (conversion/), and llama-model.cpp for what it takes for granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Vocabulary = Literal["llama", "pieces or bytes", "bytes", "gemma", "gemma2", "gemma3", "phi3"]
"""How the converter chooses a tokenizer for a family; see `weightops.layouts.tokenizers.gguf`."""


class Key(NamedTuple):
    """A key of the metadata, after the architecture's name; its type; and the fields of config.json that it is.

    Of several fields the first that is there is taken, and written on the way back. Fields that begin with `@` are
    in no config.json: `parameters` derives them.
    """

    name: str
    kind: Literal["uint32", "float32", "string", "bool"]
    fields: tuple[str, ...]


class Experts(NamedTuple):
    """Experts that transformers stores apart, and GGUF in one tensor.

    `apart` has the layer, the number of an expert and its part; `together` is the name under which gguf's map has the
    whole; `parts` are in the order in which they are written.
    """

    apart: str
    together: str
    parts: tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family has of its own.

    `arch` is llama.cpp's name for it, `model_type` and `architecture` are transformers'. `rotary`: rows of q and k are
    in adjacent pairs in GGUF, in halves in transformers. `norm_shift` is added to norms. `constants` are fields of
    config.json that GGUF has no keys for, as llama.cpp takes them; `biased` those that say which biases there are, by
    the tensor of the first layer that shows it.
    """

    arch: str
    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    vocabulary: Vocabulary = "bytes"
    rotary: bool = False
    norm_shift: float = 0.0
    experts: Experts | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    biased: Mapping[str, str] = field(default_factory=dict)


def _whole(name: str, *fields: str) -> Key:
    return Key(name, "uint32", fields)


def _real(name: str, *fields: str) -> Key:
    return Key(name, "float32", fields)


_CONTEXT = _whole("context_length", "max_position_embeddings")
_BLOCKS = _whole("block_count", "num_hidden_layers")
_WIDTH = _whole("embedding_length", "hidden_size")
_INNER = _whole("feed_forward_length", "intermediate_size")
_HEADS = (
    _whole("attention.head_count", "num_attention_heads"),
    _whole("attention.head_count_kv", "num_key_value_heads"),
)
_RMS = _real("attention.layer_norm_rms_epsilon", "rms_norm_eps")
_HEAD_DIM = (_whole("attention.key_length", "head_dim"), _whole("attention.value_length", "head_dim"))
_FILE_TYPE = _whole("general.file_type", "@file_type")
_ROWS = _whole("vocab_size", "vocab_size")
_WINDOW = _whole("attention.sliding_window", "sliding_window")
_EXPERT_INNER = _whole("expert_feed_forward_length", "moe_intermediate_size")

ROPE = (
    Key("rope.scaling.type", "string", ("@scaling",)),
    _real("rope.scaling.factor", "@factor"),
    _whole("rope.scaling.original_context_length", "@original"),
    _real("rope.scaling.yarn_ext_factor", "@extrapolation_factor"),
    _real("rope.scaling.yarn_attn_factor", "@attention_factor"),
    _real("rope.scaling.yarn_beta_fast", "@beta_fast"),
    _real("rope.scaling.yarn_beta_slow", "@beta_slow"),
    _real("rope.freq_base", "@theta"),
    _real("rope.freq_base_swa", "@theta_local"),
)


def _common(norm: Key = _RMS, experts: str = "", *more: Key) -> tuple[Key, ...]:
    """What most families have, in the converter's order; `experts` is the field that counts them."""
    counted: tuple[Key, ...] = ()
    if experts:
        counting = tuple(dict.fromkeys(("num_local_experts", experts)))
        counted = (_whole("expert_count", *counting), _whole("expert_used_count", "num_experts_per_tok"))
    return (_BLOCKS, _CONTEXT, _WIDTH, _INNER, *_HEADS, *ROPE, norm, *counted, *more, *_HEAD_DIM, _FILE_TYPE)


_LLAMA = (_ROWS, _whole("rope.dimension_count", "@rotary_dim"))
_GEMMA = (_CONTEXT, _WIDTH, _BLOCKS, _INNER, *_HEADS, _RMS, *_HEAD_DIM, _FILE_TYPE)
_GROUPS = (
    _whole("expert_group_count", "n_group"),
    _whole("expert_group_used_count", "topk_group"),
    _whole("expert_gating_func", "@gating"),
)
_DEEPSEEK = (
    *_common(_RMS, "n_routed_experts", *_GROUPS)[:-3],
    _whole("attention.key_length", "@key_length"),
    _whole("attention.value_length", "kv_lora_rank"),
    _FILE_TYPE,
    _whole("leading_dense_block_count", "first_k_dense_replace"),
    _ROWS,
    _whole("attention.q_lora_rank", "q_lora_rank"),
    _whole("attention.kv_lora_rank", "kv_lora_rank"),
    _whole("attention.key_length_mla", "@key_length_mla"),
    _whole("attention.value_length_mla", "v_head_dim"),
    _EXPERT_INNER,
    _whole("expert_shared_count", "n_shared_experts"),
    _real("expert_weights_scale", "routed_scaling_factor"),
    Key("expert_weights_norm", "bool", ("@norm_topk_prob",)),
    _whole("rope.dimension_count", "qk_rope_head_dim"),
    _real("rope.scaling.yarn_log_multiplier", "@log_multiplier"),
)
_PHI3 = (
    _real("rope.scaling.attn_factor", "@attn_factor"),
    _CONTEXT,
    _whole("rope.scaling.original_context_length", "@original"),
    *(_WIDTH, _INNER, _BLOCKS, *_HEADS, _RMS),
    _whole("rope.dimension_count", "@rotary_dim"),
    _real("rope.freq_base", "@theta"),
    _FILE_TYPE,
    _whole("attention.sliding_window", "@window"),
)
_MULTIPLIERS = (
    _real("attention.scale", "attention_multiplier"),
    _real("embedding_scale", "embedding_multiplier"),
    _real("residual_scale", "residual_multiplier"),
    _real("logit_scale", "logits_scaling"),
)
_CAPS = (
    _real("attn_logit_softcapping", "attn_logit_softcapping"),
    _real("final_logit_softcapping", "final_logit_softcapping"),
)
_COHERE = (_CONTEXT._replace(fields=("model_max_length", "max_position_embeddings")),)

_EXPERTS = Experts(
    r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(down_proj|gate_proj|up_proj)\.weight",
    "model.layers.{layer}.mlp.experts.{part}.weight",
    ("down_proj", "gate_proj", "up_proj"),
)
_MIXTRAL = Experts(
    r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight",
    "layers.{layer}.feed_forward.experts.{part}.weight",
    ("w1", "w2", "w3"),
)
_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_act": "gelu_pytorch_tanh"}
_GELU_2 = {"hidden_activation": "gelu_pytorch_tanh"}
_ATTENTION = {"attention_bias": "attn_q.bias"}
_BIASES = {**_ATTENTION, "mlp_bias": "ffn_up.bias"}
_DEEPSEEK_MOE: Mapping[str, Any] = {"moe_layer_freq": 1, "attention_bias": False, **_SILU}

FAMILIES = (
    Family(
        arch="llama",
        model_type="llama",
        architecture="LlamaForCausalLM",
        keys=(*_common(), *_LLAMA),
        vocabulary="llama",
        rotary=True,
        constants=_SILU,
        biased=_BIASES,
    ),
    Family(
        arch="llama",
        model_type="mistral",
        architecture="MistralForCausalLM",
        keys=(*_common(), *_LLAMA),
        vocabulary="llama",
        rotary=True,
        constants={**_SILU, "sliding_window": None},
    ),
    Family(
        arch="llama",
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        keys=(*_common(_RMS, "num_local_experts"), *_LLAMA),
        vocabulary="llama",
        rotary=True,
        experts=_MIXTRAL,
        constants={**_SILU, "sliding_window": None},
    ),
    Family(
        arch="qwen2",
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        keys=_common(),
        vocabulary="pieces or bytes",
        constants={**_SILU, "use_sliding_window": False},
    ),
    Family(
        arch="qwen2moe",
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        keys=(
            *_common(_RMS, "num_experts"),
            _EXPERT_INNER,
            _whole("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ),
        experts=_EXPERTS,
        constants={**_SILU, "use_sliding_window": False, "norm_topk_prob": False, "decoder_sparse_step": 1},
    ),
    Family(
        arch="qwen3",
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        keys=_common(),
        vocabulary="pieces or bytes",
        constants={**_SILU, "use_sliding_window": False},
        biased=_ATTENTION,
    ),
    Family(
        arch="qwen3moe",
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        keys=(*_common(_RMS, "num_experts"), _EXPERT_INNER),
        experts=_EXPERTS,
        constants={**_SILU, "use_sliding_window": False, "norm_topk_prob": True, "decoder_sparse_step": 1},
        biased=_ATTENTION,
    ),
    Family(
        arch="gemma",
        model_type="gemma",
        architecture="GemmaForCausalLM",
        keys=_GEMMA,
        vocabulary="gemma",
        norm_shift=1.0,
        constants={**_GELU, **_GELU_2},
    ),
    Family(
        arch="gemma2",
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        keys=(*_GEMMA, *_CAPS, _WINDOW),
        vocabulary="gemma2",
        norm_shift=1.0,
        constants=_GELU_2,
    ),
    Family(
        arch="gemma3",
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        keys=(*_common(), _CAPS[1], _WINDOW),
        vocabulary="gemma3",
        norm_shift=1.0,
        constants=_GELU_2,
    ),
    Family(
        arch="phi3",
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        keys=_PHI3,
        vocabulary="phi3",
        constants=_SILU,
    ),
    Family(
        arch="granite",
        model_type="granite",
        architecture="GraniteForCausalLM",
        keys=(*_common(), *_LLAMA, *_MULTIPLIERS),
        vocabulary="llama",
        rotary=True,
        constants=_SILU,
        biased=_BIASES,
    ),
    Family(
        arch="olmo2",
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        keys=_common(),
        constants=_SILU,
    ),
    Family(
        arch="starcoder2",
        model_type="starcoder2",
        architecture="Starcoder2ForCausalLM",
        keys=_common(_real("attention.layer_norm_epsilon", "norm_epsilon")),
        constants={**_GELU, "use_bias": True, "sliding_window": None},
    ),
    Family(
        arch="command-r",
        model_type="cohere",
        architecture="CohereForCausalLM",
        keys=(
            _BLOCKS,
            *_COHERE,
            *_common(_real("attention.layer_norm_epsilon", "layer_norm_eps"))[2:],
            _real("logit_scale", "logit_scale"),
            Key("rope.scaling.type", "string", ("@no_scaling",)),
        ),
        constants=_SILU,
        biased={**_ATTENTION, "use_qk_norm": "attn_q_norm.weight"},
    ),
    Family(
        arch="deepseek2",
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        keys=_DEEPSEEK,
        experts=_EXPERTS,
        constants=_DEEPSEEK_MOE,
    ),
    Family(
        arch="deepseek2",
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        keys=_DEEPSEEK,
        experts=_EXPERTS,
        constants={**_DEEPSEEK_MOE, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
    ),
    Family(
        arch="gpt-oss",
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        keys=(
            *_common(_RMS, "num_local_experts"),
            _WINDOW,
            _whole("expert_feed_forward_length", "intermediate_size"),
        ),
        constants={**_SILU, "attention_bias": True},
    ),
)
BY_TYPE: Mapping[str, Family] = {family.model_type: family for family in FAMILIES}
"""Families by transformers' `model_type`."""
WITH_SIGHT: Mapping[str, str] = {"gemma3": "gemma3_text"}
"""By `model_type`, that of the language model in models that see as well; its fields are those of `text_config`."""
