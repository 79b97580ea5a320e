"""A whole release, merged, cast and sharded in one run: what transformers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import LINEAR, llama, load_model, quietly, save_adapter, save_model
from peft import PeftModel

import weightops

RECIPE = """\
sources: {base: ./base, adapter: ./adapter}
tensors:
  chat: {merge-lora: {base: base, adapter: adapter}}
outputs:
  wide: {from: chat, max_shard_size: 100KB}
  half: {from: chat, dtype: float16, max_shard_size: 50KB}
"""


def generated(model: Any, prompts: torch.Tensor) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy continuations, and the logits of the prompts."""
    with torch.no_grad():
        logits = model(prompts).logits
    tokens = model.generate(prompts, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    return tokens.tolist(), logits


@pytest.mark.usefixtures("one_thread")
def test_a_merged_cast_and_sharded_checkpoint_says_what_the_unmerged_model_says(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=LINEAR)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    weightops.run(tmp_path / "recipe.yaml")
    prompts = torch.arange(40).reshape(5, 8) * 7 % 101
    with quietly():
        tokens, logits = generated(PeftModel.from_pretrained(load_model(base), adapter), prompts)
        for name, tolerance in (("wide", 1e-5), ("half", 1e-2)):
            assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
            found, their_logits = generated(load_model(tmp_path / name).float(), prompts)
            assert found == tokens
            assert ((their_logits - logits).abs().max() / logits.abs().max()).item() < tolerance
