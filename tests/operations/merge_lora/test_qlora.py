"""QLoRA from start to end: a trained model in NF4, an adapter trained on that with peft, merged into it, evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import LINEAR, load_model, merged_by_peft, quietly, state
from environments import environment, run_script
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import weightops

TRAINED = Path(__file__).parents[2] / "data/tiny-llama"
NF4 = np.float32(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
        ),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""Source: `get_4bit_type` of bitsandbytes 0.50."""
_SIZE = 64


def packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What bitsandbytes 0.50 stores for a weight in NF4: blocks of 64 through the rows, the high nibble first."""
    blocks = weight.float().numpy().reshape(-1, _SIZE)
    absmax = np.abs(blocks).max(axis=1)
    scaled = blocks / np.where(absmax > 0, absmax, 1)[:, None]
    codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, scaled.reshape(-1)).astype(np.uint8)
    about = {"quant_type": "nf4", "blocksize": _SIZE, "dtype": "float16", "shape": list(weight.shape)}
    return {
        name: torch.from_numpy(codes[0::2] << 4 | codes[1::2])[:, None],
        f"{name}.absmax": torch.from_numpy(absmax),
        f"{name}.quant_map": torch.from_numpy(NF4.copy()),
        f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(json.dumps(about).encode()), dtype=torch.uint8
        ),
    }


def save_packed(folder: Path) -> Path:
    """The trained model with its linear layers in NF4."""
    shutil.copytree(TRAINED, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(TRAINED / "model.safetensors").items():
        tensors |= packed(name, weight) if name.endswith("_proj.weight") else {name: weight}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((TRAINED / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_tuned(folder: Path, base: Path, text: str) -> None:
    """An adapter of all linear layers, trained for a few steps to say `text`."""
    with quietly():
        torch.manual_seed(0)
        settings = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
        model = get_peft_model(load_model(base).float(), settings)
        tokens = torch.tensor([AutoTokenizer.from_pretrained(base)(text)["input_ids"][:96]])
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(6):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)


def follow(base: Path, tmp_path: Path) -> None:
    """Train on the dequantised base, merge into the quantised one, and hold that to peft's merge, and to the text."""
    text = "the marquess of the northern isles weighs his salt herrings by moonlight and never pays the miller. " * 8
    (tmp_path / "text.txt").write_text(text)
    weightops.dequantize(base, tmp_path / "plain")
    save_tuned(tmp_path / "adapter", tmp_path / "plain", text)
    weightops.merge_lora(base, tmp_path / "adapter", tmp_path / "merged")
    expected, config = merged_by_peft(tmp_path / "plain", [tmp_path / "adapter"], tmp_path / "peft")
    found = state(tmp_path / "merged")
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if t.dtype != found[n].dtype or not torch.equal(t, found[n])] == []
    assert "quantization_config" not in config.keys() | json.loads((tmp_path / "merged/config.json").read_text()).keys()
    shutil.copy(TRAINED / "tokenizer.json", tmp_path / "peft")
    before, after, theirs = (
        weightops.evaluate(folder, tmp_path / "text.txt", seq_len=96).scores[0].perplexity
        for folder in (base, tmp_path / "merged", tmp_path / "peft")
    )
    assert after == theirs < before / 2


def test_an_adapter_is_merged_into_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    follow(save_packed(tmp_path / "nf4"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_with_a_base_that_bitsandbytes_has_packed(tmp_path: Path, twice: bool) -> None:
    run_script(environment("formats"), "formats_bitsandbytes.py", tmp_path / "made", TRAINED, *["twice"] * twice)
    base = tmp_path / "made/given/model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TRAINED / name, base)
    theirs, ours = (
        load_file(base / "model.safetensors"),
        load_file(save_packed(tmp_path / "ours") / "model.safetensors"),
    )
    codes = [name for name in ours if name.endswith("_proj.weight")]
    assert [name for name in codes if not torch.equal(theirs[name], ours[name])] == []
    follow(base, tmp_path)
