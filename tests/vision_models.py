"""Tiny models that see: text and vision towers of random weights, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 32,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WHOLES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_TEXT, "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "image_token_index": 90,
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": 90,
        "vision_feature_layer": -1,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 90,
        "tie_word_embeddings": True,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_VISION, "model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": 90,
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {**_QWEN, "fullatt_block_indexes": [0]},
        **_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": {**_TEXT, **_EXPERTS, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
        "vision_config": {**_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 4},
        **_TOKENS,
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        **_TOKENS,
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _VISION,
        "image_token_id": 90,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
        "vision_config": {**_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 4},
        **_TOKENS,
    },
}


def save_whole(kind: str, folder: Path, seed: int = 0, *, in_memorys_names: bool = False) -> PreTrainedModel:
    """Write such a model; returns it. `in_memorys_names`: those that it has in memory, which trainers write too."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**WHOLES[kind]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.2 * noise)
    model.save_pretrained(folder, save_original_format=not in_memorys_names)
    return model.eval()
