"""A LoRA adapter given to a verb that wants a model: each says what it is, and which verb makes a model of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightops
from weightops.errors import IncompatibleInputs


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 8), f"{module}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return folder


VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "merge-lora": lambda adapter, out: weightops.merge_lora(adapter, adapter, out),
    "extract-lora": lambda adapter, out: weightops.extract_lora(adapter, adapter, out, rank=2),
    "cast": lambda adapter, out: weightops.cast(adapter, out, scheme="fp8"),
    "convert": lambda adapter, out: weightops.convert(adapter, out, to="meta"),
    "dequantize": lambda adapter, out: weightops.dequantize(adapter, out),
    "pack": lambda adapter, out: weightops.pack(adapter, out, bits=4, group_size=32),
    "quantize": lambda adapter, out: weightops.quantize(adapter, out, method="rtn"),
    "generate": lambda adapter, out: weightops.generate(adapter, "once"),
    "eval": lambda adapter, out: weightops.evaluate(adapter, adapter / "adapter_config.json"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_that_want_a_model(adapter: Path, tmp_path: Path, verb: str) -> None:
    with pytest.raises(IncompatibleInputs, match="lora is a LoRA adapter, not a model") as caught:
        VERBS[verb](adapter, tmp_path / "out")
    assert caught.value.hint == "`weightops merge-lora` makes a model of it and the base that it was trained on"
