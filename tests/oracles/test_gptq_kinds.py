"""What others make of quantised experts and Conv1D layers, each in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mixtures import save_mixture
from safetensors.torch import load_file, save_file
from test_gptq_readers import AUTOGPTQ, GPTQMODEL, TOKENS, error, run_script

from weightops import shard
from weightops.api.models import quantize
from weightops.formats.folder import open_checkpoint
from weightops.inference.model import BlockModel

THEIR_NAMES = {
    r"\.block_sparse_moe\.": ".mlp.",
    r"(\.experts\.\d+)\.w1\.": r"\1.gate_proj.",
    r"(\.experts\.\d+)\.w2\.": r"\1.down_proj.",
    r"(\.experts\.\d+)\.w3\.": r"\1.up_proj.",
}
"""gptqmodel 7.7 looks for Mixtral's experts under the names that transformers 5 has for those of others."""


def save_quantised(folder: Path, kind: str) -> Path:
    save_mixture(folder / "model", kind)
    quantize(folder / "model", folder / "out", method="rtn", group_size=32)
    return folder / "out"


@torch.no_grad()
def our_logits(folder: Path) -> np.ndarray:
    model = BlockModel(open_checkpoint(folder))
    with model.loaded("", *model.blocks):
        found: np.ndarray = model.module(TOKENS, use_cache=False).logits.numpy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt2"])
def test_gptqmodel_computes_our_logits(tmp_path: Path, kind: str) -> None:
    out = save_quantised(tmp_path, kind)
    if kind == "mixtral":
        shard(out, tmp_path / "renamed", rename=THEIR_NAMES)
        out = tmp_path / "renamed"
    run_script(GPTQMODEL, "gptqmodel_logits.py", out, tmp_path / "theirs.npy")
    found = error(np.load(tmp_path / "theirs.npy"), our_logits(out))
    print("gptqmodel", kind, found)
    assert found <= 1e-2


def test_autogptq_computes_our_logits_of_gpt2(tmp_path: Path) -> None:
    out = save_quantised(tmp_path, "gpt2")
    state = load_file(out / "model.safetensors")  # it leaves a tied head that is not stored as it finds it in memory
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    run_script(AUTOGPTQ, "autogptq_logits.py", out, tmp_path / "theirs.npy")
    assert error(np.load(tmp_path / "theirs.npy"), our_logits(out)) <= 1e-6
