"""Architectures that are known here, without asking transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.io.escape import escape
from weightops.layouts.names import EMBEDDING, find_layout

PLAIN = ("llama", "mistral")
"""Those that have the tensors of LLaMA and no others."""
_FAMILIES = (*PLAIN, "qwen2", "qwen3", "gemma", "gemma2", "granite", "olmo2", "smollm3")
"""Architectures whose tensors have LLaMA's names and shapes as far as they have them, and maybe more."""


def is_told_by_a_table(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether what is written down here says all that transformers' class for a config.json would say."""
    architectures = config.get("architectures")
    is_causal = architectures is None or (
        isinstance(architectures, list) and architectures[:1] in (["LlamaForCausalLM"], ["MistralForCausalLM"])
    )
    has_more = any(config.get(key) for key in ("attention_bias", "mlp_bias", "auto_map", "text_config"))
    return is_causal and not has_more and config.get("model_type") in PLAIN and not why_unknown(checkpoint, config)


def why_unknown(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    """Why nothing is known of what the tensors should be; empty if it is known."""
    layout = find_layout(checkpoint)
    if layout not in (None, "hf"):
        return f"the layout is {layout}'s"
    if not config:
        return "there is no config.json"
    if config.get("quantization_config"):
        return "the model is quantised"
    family = config.get("model_type")
    if family not in _FAMILIES:
        return f"model_type {escape(str(family))[:80]} is not known"
    return "" if layout else f"has no {EMBEDDING.name('hf', 0)}, as {family} models have"
