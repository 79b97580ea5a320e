"""Settings of small models that keep experts, or other matrices, in forms of their own; for `tiny_models.save_tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import save_tiny
from transformers import PreTrainedModel

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention"] * 2,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**_COMMON, "num_local_experts": 4},
    "qwen2_moe": {
        **_COMMON,
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "granitemoe": {**_COMMON, "num_local_experts": 4},
    "gpt_oss": {**_COMMON, "num_local_experts": 4},
}
"""Of granitemoe files hold the experts stacked, of the others apart; gpt_oss has biases and columns in turn."""


def save_mixture(folder: Path, kind: str) -> PreTrainedModel:
    """Write a small model of such a kind, with its tokenizer; other kinds are those of `tiny_models`."""
    return save_tiny(folder, kind, **MIXTURES.get(kind, {}))
