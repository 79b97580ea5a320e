"""Small models of the families that GGUF has, as transformers saves them, with tokenizers that no library trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from small_tokenizers import BYTES, NORMALIZER, TRAINER, message, piece
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

TINY_LLAMA = Path(__file__).parent / "data/tiny-llama"
PIECES, BYTE_LEVEL = 300, 2050
"""Rows of an embedding for sentencepiece's tokenizer here, which has fewer tokens, and for the byte-level one."""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_WIDE = {"head_dim": 32, "query_pre_attn_scalar": 32}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_LONG: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
_LONG |= {"long_factor": [1.0 + i for i in range(8)], "short_factor": [1.0 + i / 8 for i in range(8)]}
_DEEPSEEK: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 2,
    "topk_group": 1,
}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3": ("llama", {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 8192}, "head_dim": 32}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 64}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": {**_YARN, "rope_theta": 1e6}}),
    "qwen3moe": ("qwen3_moe", {**_MOE, "head_dim": 32, "norm_topk_prob": True}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": ("gemma2", {**_WIDE, "sliding_window": 64}),
    "gemma3": ("gemma3_text", {**_WIDE, "sliding_window": 64, "num_hidden_layers": 7}),
    "phi3": ("phi3", {"sliding_window": 64}),
    "phi3 long": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 64}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {}),
    "command-r": ("cohere", {"logit_scale": 0.0625, "use_qk_norm": True}),
    "deepseek2": ("deepseek_v2", {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy"}),
    "deepseek3": (
        "deepseek_v3",
        {
            **_DEEPSEEK,
            "q_lora_rank": 48,
            "rope_parameters": {**_YARN, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            "scoring_func": "sigmoid",
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "intermediate_size": 64,
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "rope_parameters": {**_YARN, "rope_theta": 150000.0, "truncate": False},
        },
    ),
}
"""By name: transformers' `model_type`, and what of its configuration is not as in `SIZES` or by default."""
_BY_PIECES = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3", "phi3", "phi3 long")


def has_pieces(name: str) -> bool:
    """Whether a family's tokenizer here is a sentencepiece model."""
    return name in _BY_PIECES


def pieces() -> bytes:
    """A tokenizer.model of bytes and a few words, with a token beyond the plain ones."""
    words = ["\u2581", "t", "h", "e", "th", "\u2581th", "\u2581the", "n", "ten", "sor", "\u6d41", "<unused0>"]
    normal = [piece(text, 1, -float(i)) for i, text in enumerate(words)]
    return message(piece("<unk>", 2), piece("<s>", 3), piece("</s>", 3), *BYTES, *normal, TRAINER, NORMALIZER)


def save_family(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    """Write a model of a family, values drawn from a generator that no version of torch changes, with a tokenizer."""
    kind, settings = FAMILIES[name]
    rows = PIECES if has_pieces(name) else BYTE_LEVEL
    first = int(has_pieces(name))
    ids = {"bos_token_id": first, "eos_token_id": first + 1, "pad_token_id": None}
    config = CONFIG_MAPPING[kind](**{**SIZES, "vocab_size": rows, **ids, **settings, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter, value in _values(model):
            parameter.copy_(value)
    for module in model.modules():
        if "e_score_correction_bias" in module._buffers:  # in float32, whatever the model is in
            module._buffers["e_score_correction_bias"] = torch.linspace(-1, 1, 4)
    model.save_pretrained(folder)
    for file, data in _tokenizer(name).items():
        (folder / file).write_bytes(data)
    return model


def save_with_sight(folder: Path) -> None:
    """Gemma 3 as its larger models are published: a language model, and what it sees with."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = {**SIZES, **FAMILIES["gemma3"][1], "vocab_size": PIECES}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=2, bos_token_id=1)
    model = Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter, value in _values(model):
            parameter.copy_(value)
    model.save_pretrained(folder)
    for file, data in _tokenizer("gemma3").items():
        (folder / file).write_bytes(data)


def save_mxfp4(folder: Path) -> None:
    """gpt-oss with experts in MXFP4, as it is published."""
    save_family(folder, "gpt-oss")
    tensors, chance = load_file(folder / "model.safetensors"), np.random.default_rng(8)
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.from_numpy(chance.integers(0, 256, (*shape, 16), np.uint8))
        tensors[f"{name}_scales"] = torch.from_numpy(chance.integers(118, 126, shape, np.uint8))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))


def _values(model: PreTrainedModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    chance = np.random.default_rng(7)
    for _, parameter in sorted(model.named_parameters()):
        # Multiples of 2**-8, whose sum with 1 has a place in every type: Gemma's norms come back as they were.
        drawn = np.rint(chance.normal(size=tuple(parameter.shape)) * 40).clip(-120, 120) / 256
        yield parameter, torch.from_numpy(drawn).to(parameter.dtype)


def _tokenizer(name: str) -> dict[str, bytes]:
    if has_pieces(name):
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config |= {"add_bos_token": True, "chat_template": "{{ messages }}"}
        return {"tokenizer.model": pieces(), "tokenizer_config.json": json.dumps(config).encode()}
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
    document = json.loads((TINY_LLAMA / "tokenizer.json").read_bytes())
    # transformers gives this token to some of the families in any case.
    document["added_tokens"].append({**document["added_tokens"][0], "id": BYTE_LEVEL - 2, "content": "<|endoftext|>"})
    return {"tokenizer.json": json.dumps(document).encode(), "tokenizer_config.json": json.dumps(config).encode()}
