"""A small family of checkpoints, and a recipe of two outputs that a job makes of them in several groups."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from support import digests, write_checkpoint

import weightops

RECIPE = """\
sources: {raw: ./raw, delta: ./delta, adapter: ./adapter}
tensors:
  tuned: {recover: {raw: raw, diff: delta}}
  chat: {merge-lora: {base: tuned, adapter: adapter}}
  named: {shard: {source: chat, add_prefix: model.}}
outputs:
  ./one: {from: chat, max_shard_size: 5KB, dtype: bfloat16}
  ./two: {from: named, max_shard_size: 9KB}
"""
NAMES = ("one", "two")


def make_family(folder: Path) -> Path:
    """The folder, with `raw`, `tuned`, `delta`, `adapter`, and `recipe.yaml` that makes `one` and `two` of them."""
    torch.manual_seed(0)
    raw = {f"{name}.weight": torch.randn(40, 50).half() for name in "abcdefgh"}
    small = {"num_hidden_layers": 1}
    write_checkpoint(folder / "raw", raw, small, shards=2)
    write_checkpoint(folder / "tuned", {n: t + 0.5 for n, t in raw.items()} | {"x": torch.ones(3)}, small, shards=2)
    weightops.diff(folder / "raw", folder / "tuned", folder / "delta")
    factors = {"lora_A": (2, 50), "lora_B": (40, 2)}
    adapter = {f"base_model.model.{m}.{f}.weight": torch.randn(size) for m in "ac" for f, size in factors.items()}
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a", "c"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def copy_inputs(made: Path, folder: Path) -> Path:
    """`folder` with what the recipe needs, without outputs that were made beside it."""
    shutil.copytree(made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NAMES))
    return folder


def make_with_outputs(folder: Path) -> Path:
    """As `make_family`, and what one run of the recipe makes."""
    make_family(folder)
    weightops.run(folder / "recipe.yaml")
    return folder


def outputs(folder: Path) -> dict[str, str]:
    """Digests of every file of the recipe's outputs."""
    return {f"{name}/{file}": digest for name in NAMES for file, digest in digests(folder / name).items()}


def write(folder: Path, *, overwrite: bool = False, name: str = "job") -> tuple[Path, int]:
    """Write the job of the recipe; its place and how many groups it has."""
    made = weightops.run(folder / "recipe.yaml", job=folder / name, overwrite=overwrite)
    groups = {result.groups for result in made.values()}
    (count,) = groups
    assert count is not None
    return folder / name, count
