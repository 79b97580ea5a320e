"""Tiny configurations of fifty families, for the sweep: what differs from a common LLaMA-like one."""

from __future__ import annotations

from typing import Any

VOCAB = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
_LATENT |= {"num_key_value_heads": 4, "head_dim": 32}
_DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
_DEEPSEEK |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "biogpt": {},
    "bloom": {"n_layer": 4, "n_head": 4},
    "codegen": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "cohere": {},
    "cohere2": {"sliding_window": 8, "layer_types": _SLIDING},
    "deepseek_v2": {**_LATENT, **_DEEPSEEK},
    "deepseek_v3": {**_LATENT, **_DEEPSEEK},
    "diffllama": {},
    "dots1": {**_DEEPSEEK},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "exaone4": {"sliding_window": 8, "layer_types": _SLIDING},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "layer_types": _SLIDING},
    "gemma3_text": {"sliding_window": 8, "layer_types": _SLIDING},
    "gemma3n_text": {
        "intermediate_size": [96] * 4,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 0,
        "layer_types": _SLIDING,
        "sliding_window": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 0,
        "layer_types": _SLIDING,
        "sliding_window": 8,
    },
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {**_DEEPSEEK},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": _SLIDING,
        "max_position_embeddings": 131072,  # to which its own rotary settings stretch
    },
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
    "llama": {},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "attention_chunk_size": 64,
    },
    "mamba": {"state_size": 8, "time_step_rank": 8},
    "minimax": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 128, "expansion_ratio": 2},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "layer_types": _SLIDING},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": {**_EXPERTS, "mlp_only_layers": [0]},
    "qwen3_next": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 4, "attention_heads": 4},
}

ODD_LAYERS = {
    "bamba": ("*.mamba.in_proj",),
    "gemma3n_text": ("*.altup.*",),
    "jamba": ("*.mamba.x_proj", "*.mamba.dt_proj"),
    "mamba": ("*.x_proj", "*.dt_proj"),
    "qwen3_next": ("*.in_proj_ba",),
}
"""Layers of these models that GPTQ's form has no room for, and that `quantize --skip` leaves."""
ADAPTED = {"mamba": ("in_proj", "x_proj")}
"""What adapters are of where peft refuses some of all linear layers."""


def settings(kind: str) -> dict[str, Any]:
    """What a family's configuration is made of."""
    common = {key: value for key, value in COMMON.items() if (kind, key) != ("falcon", "head_dim")}
    return {**common, **FAMILIES[kind]}


VERBS = {
    "check": "clean, held against transformers' class",
    "shard": "in files of 100 kB; loads, the same logits",
    "cast": "to float16 and bfloat16; the files that transformers saves after loading in that type",
    "fp8": "`cast --scheme fp8`; loads with nothing missing or unexpected, every weight within 4 %",
    "diff": "exact, and recovered to the bit",
    "merge": "with another model, one part to three; loads, every weight the mean of those that transformers loads",
    "merge-lora": "an adapter of all linear layers and experts; the files that peft's merge saves",
    "extract-lora": "of that merge; peft loads it, and gets every difference within 1 %",
    "quantize": "8 bits, rounded; dequantised it loads, every weight within 1 %, the packed one has its greedy tokens",
    "eval": "the mean log-likelihood of a plain loop in transformers",
    "generate": "greedy tokens of transformers",
    "prune": "`shard --layers 0,3`; loads, the logits of the model with its other layers taken out",
}
"""What is done -> and what has to come of it."""
_TRANSPOSED = "there is no linear layer to quantise"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("gpt2", "fp8"): _TRANSPOSED,
    ("bamba", "eval"): "BambaForCausalLM is not run block by block",
    ("gemma3n_text", "eval"): "ForCausalLM gives its blocks per_layer_input, so it is not run block by block",
    ("gemma4_text", "eval"): "ForCausalLM gives its blocks per_layer_input, so it is not run block by block",
    ("diffllama", "prune"): "layers of a diffllama compute with their own numbers",
    ("minimax", "prune"): "layers of a minimax compute with their own numbers",
}
"""What is refused, and a part of the sentence that it is refused with."""
FAULTS: dict[tuple[str, str], str] = {
    ("granitemoe", "quantize"): "what `dequantize` makes of it has experts apart, which transformers does not load",
}
"""What does not work yet."""


def page() -> str:
    """docs/families.md."""
    parts = ["# Families", "", "Which families of models every verb was tried with, and what came of it.", ""]
    parts += ["Written by `python tests/sweep/families.py`. A slow test (`make test-all`) makes a"]
    parts += [
        f"tiny model of each of {len(FAMILIES)} families with transformers, takes it through these verbs, and holds"
    ]
    parts += ["what comes of it against transformers and peft:", ""]
    parts += ["| verb | proven |", "|---|---|", *(f"| `{verb}` | {text} |" for verb, text in VERBS.items()), ""]
    parts += ["✓ is proven; a number is a refusal, with a sentence that the test holds it to:", ""]
    excepted = {**EXCEPTIONS, **{place: f"a fault: {text}" for place, text in FAULTS.items()}}
    reasons = list(dict.fromkeys(excepted.values()))
    parts += [f"| | {' | '.join(f'`{verb}`' for verb in VERBS)} |", "|---" * (len(VERBS) + 1) + "|"]
    for kind in FAMILIES:
        cells = (excepted.get((kind, verb)) for verb in VERBS)
        marks = ("✓" if reason is None else str(reasons.index(reason) + 1) for reason in cells)
        parts.append(f"| {kind} | {' | '.join(marks)} |")
    parts += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
