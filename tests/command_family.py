"""Small models of all kinds, and a command line for every verb that writes weights or says what they are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from meta_model import make_meta
from safetensors.torch import save_file
from support import write_checkpoint

import weightops

RECIPE = """\
sources: {raw: ./raw, delta: ./delta, adapter: ./adapter}
tensors:
  tuned: {recover: {raw: raw, diff: delta}}
  chat: {merge-lora: {base: tuned, adapter: adapter}}
outputs:
  out: {from: chat, max_shard_size: 9KB}
"""
STEPS = """\
edit:
  source: raw
  steps:
    - {select: '(?P<x>[ab])\\.weight', concat: {by: x, order: [b, a]}, name: ab.weight}
    - {select: 'c\\.weight', combine: {weight: 0.5, with: [{from: tuned, weight: 0.5}]}}
"""
COMMANDS = [
    "recover --raw raw --diff delta",
    "diff --raw raw --tuned tuned",
    "diff --raw raw --tuned tuned --compress",
    "recover --raw raw --diff small",
    "convert meta --to hf --set context_length=8 --dtype float16",
    "merge-lora --base raw --adapter adapter",
    "merge tuned tuned-2 --base raw --method ties --weight 1 --density 0.5",
    "extract-lora --base raw --tuned tuned --rank 2",
    "adapter combine adapter adapter --method svd",
    "cast raw --dtype bfloat16",
    "shard raw",
    "pack integers --bits 4 --group-size 32",
    "dequantize packed",
    "dequantize blocks",
    "repack packed --to gptq_v2",
    "convert lora --to gguf --base llama",
    "convert lora.gguf --to hf --base llama",
    "edit steps.yml --no-architecture",
    "run recipe.yaml",
    "check raw --no-architecture",
    "compare raw tuned --workers 1",
    "inspect raw",
    "inspect adapter --base raw --stats",
]
TELLING = ("check", "compare", "inspect")


def make_family(folder: Path) -> None:
    """Write the models that `COMMANDS` name into a folder."""
    torch.manual_seed(0)
    raw = {f"{name}.weight": torch.randn(40, 50).half() for name in "abc"}
    write_checkpoint(folder / "raw", raw, shards=2)
    write_checkpoint(folder / "tuned", {n: t + 0.5 for n, t in raw.items()}, shards=2)
    write_checkpoint(folder / "tuned-2", {n: t + torch.randn(40, 50).half() / 4 for n, t in raw.items()}, shards=2)
    weightops.diff(folder / "raw", folder / "tuned", folder / "delta")
    weightops.diff(folder / "raw", folder / "tuned", folder / "small", compress=True)
    factors = {"lora_A": (2, 50), "lora_B": (40, 2)}
    adapter = {f"base_model.model.{m}.{f}.weight": torch.randn(size) for m in "ac" for f, size in factors.items()}
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a", "c"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    write_checkpoint(folder / "llama", {}, {"model_type": "llama", "vocab_size": 48, **sizes})
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    write_checkpoint(folder / "lora", {f"{module}.{f}.weight": torch.randn(32, 32) for f in factors})
    (folder / "lora/model.safetensors").rename(folder / "lora/adapter_model.safetensors")
    (folder / "lora/adapter_config.json").write_text(json.dumps({**config, "r": 32}))
    weightops.convert(folder / "lora", folder / "lora.gguf", to="gguf", base=folder / "llama")
    codes = {f"{name}.weight": torch.randn(40, 50).to(torch.float8_e4m3fn) for name in "abc"}
    scales = {f"{name}.weight_scale_inv": torch.rand(3, 2) for name in "abc"}
    about = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}
    write_checkpoint(folder / "blocks", {**scales, **codes}, about, shards=2)
    integers = {
        "layer.q": torch.randint(0, 16, (64, 32), dtype=torch.int32),
        "layer.scales": torch.rand(2, 32).half() + 0.5,
        "layer.zeros": torch.randint(1, 16, (2, 32), dtype=torch.int32),
    }
    write_checkpoint(folder / "integers", integers)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "vocab": 48}
    make_meta(folder / "meta", **sizes, parts=2, dtype=torch.float32)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "steps.yml").write_text(STEPS)
