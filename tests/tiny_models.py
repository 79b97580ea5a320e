"""Tiny models of random weights as transformers saves them, each with a tokenizer that was trained here."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from small_tokenizers import training_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from weightops.formats.quantized.gptq import write_module

VOCAB = 320
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen2": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "gpt_neox": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "mixtral": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "num_local_experts": 4,
    },
}
"""Of qwen2 the second layer attends to a window of 8 tokens, so that its layers are given different masks."""

GEMMA_3N: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": [96] * 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0] * 2,
}
GEMMA_4: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "max_position_embeddings": 128,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
"""Of Gemma 3n and 4, which are not run block by block."""


@functools.cache
def trained() -> Tokenizer:
    """Byte-level BPE that begins texts with a bos token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training_text()[:600], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def tiny(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of random weights, in float32; its predictions are far from uniform."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, **CONFIGS.get(kind, {}), **changes}
    settings.setdefault("pad_token_id", None)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 2 else 0.1
            parameter.copy_(
                torch.randn_like(parameter) * scale + ("norm" in name or "ln_" in name) * (parameter.ndim == 1)
            )
    return model.eval()


def save_tiny(folder: Path, kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write such a model, with its tokenizer; returns it."""
    model = tiny(kind, seed, **changes)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path, **changes: Any) -> None:
    """The tokenizer's files."""
    PreTrainedTokenizerFast(tokenizer_object=trained(), bos_token="<s>", eos_token="</s>", **changes).save_pretrained(
        folder
    )


def text(lines: int = 60) -> str:
    """English, code, Chinese and emoji."""
    return "\n".join(training_text()[:lines])


def quantize_tiny(source: Path, out: Path, bits: int = 4, group_size: int = 32) -> dict[str, torch.Tensor]:
    """Round the linear layers of a saved LLaMA's blocks to nearest; returns what their weights then are, by name."""
    state = load_file(source / "model.safetensors")
    weights, stored = {}, {}
    for name, weight in state.items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        outputs, columns = weight.shape
        grouped = weight.reshape(outputs, columns // group_size, group_size)
        middle = 1 << bits - 1
        scales = (grouped.abs().amax(-1) / (middle - 1)).half()  # [N, G]
        q = ((grouped / scales[..., None].float()).round() + middle).clamp(0, 2 * middle - 1)
        weights[name] = ((q - middle) * scales[..., None].float()).reshape(outputs, columns)
        integers = q.reshape(outputs, columns).T.contiguous().to(torch.uint8).numpy()
        zeros = np.full((columns // group_size, outputs), middle, np.uint8)
        g_idx = np.arange(columns) // group_size
        tensors = write_module(
            name.removesuffix(".weight"), integers, zeros, scales.T.contiguous().numpy(), g_idx, None, bits
        )
        stored |= {n: torch.from_numpy(t) for n, t in tensors.items()}
    shutil.copytree(source, out)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    method = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": True}
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    return weights
