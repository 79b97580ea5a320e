"""Adapters in GGUF against those that llama.cpp's own converter writes of the same folders, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import quietly, save_adapter
from environments import environment, run_script
from gguf_adapters import save_lora
from gguf_models import FAMILIES, save_family, save_with_sight
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from weightops import api

LLAMACPP = environment("llamacpp")
TYPES = {"f32": None, "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
PROMPTS = ["the ten", "tensor the ten sor", "then"]
_TIE = 0.02
"""llama.cpp keeps keys and values in float16: tokens that are so near to each other may change places."""
CARD = b"---\nbase_model: someone/Tiny-Base-7B\nlicense: apache-2.0\ntags: [lora, peft]\n---\n# An adapter\n"


def theirs(wanted: list[tuple[Path, Path, str, Path]]) -> None:
    """Have the converter write each of these: an adapter for a base as a type to a file."""
    listed = [[str(part) for part in each] for each in wanted]
    run_script(LLAMACPP, "llamacpp_lora.py", LLAMACPP / "llama.cpp", json.dumps(listed))


@pytest.mark.slow
def test_adapters_of_every_family_in_every_type_are_the_converters(tmp_path: Path) -> None:
    wanted = []
    for name in FAMILIES:
        base = tmp_path / name.replace(" ", "")
        save_family(base, name)
        sizes = {"rank": 4, "dtype": torch.bfloat16} if len(wanted) % 8 else {"rank": 32}
        adapter = save_lora(tmp_path / f"{base.name}-lora", base, **sizes)  # type: ignore[arg-type]
        (adapter / "README.md").write_bytes(CARD)
        wanted += [(adapter, base, kind, tmp_path / f"{base.name}-{kind}.gguf") for kind in TYPES]
    for name, settings in {"gemma": {"norms": True}, "qwen2": {"embedding": True, "norms": True}}.items():
        adapter = save_lora(tmp_path / f"{name}-more", tmp_path / name, **settings)  # type: ignore[arg-type]
        wanted += [(adapter, tmp_path / name, kind, tmp_path / f"{name}-more-{kind}.gguf") for kind in TYPES]
    adapter = Path(shutil.copytree(tmp_path / "llama-lora", tmp_path / "in-torch"))
    state = load_file(adapter / "adapter_model.safetensors")
    torch.save(dict(reversed(state.items())), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    wanted += [(adapter, tmp_path / "llama", kind, tmp_path / f"torch-{kind}.gguf") for kind in TYPES]
    save_with_sight(tmp_path / "sight")
    adapter = save_adapter(tmp_path / "sight-lora", tmp_path / "sight", target_modules=["q_proj", "down_proj", "fc1"])
    wanted += [(adapter, tmp_path / "sight", kind, tmp_path / f"sight-{kind}.gguf") for kind in TYPES]
    theirs(wanted)
    differ = []
    for adapter, base, kind, expected in wanted:
        made = tmp_path / "made.gguf"
        api.convert(adapter, made, to="gguf", base=base, dtype=TYPES[kind], overwrite=True)
        if made.read_bytes() != expected.read_bytes():
            differ.append(expected.name)
    assert differ == []


def answers(model: Path, lora: Path | None, asked: Path) -> list[dict[str, list[int]]]:
    """What llama.cpp answers: the tokens of each prompt, and those that follow it."""
    asked.write_text(json.dumps({"texts": [], "prompts": PROMPTS, "lora": str(lora) if lora else None}))
    found: list[dict[str, list[int]]] = json.loads(run_script(LLAMACPP, "llamacpp_greedy.py", model, asked))["answers"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 9}}),
        ("llama", {"use_rslora": True}),
        ("qwen2", {"embedding": True}),
        ("gemma2", {}),
        ("phi3", {}),
        ("mixtral", {"only": r"self_attn"}),
        ("mixtral", {}),
        ("qwen3moe", {}),
    ],
)
def test_greedy_tokens_with_an_adapter_are_those_of_peft(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    base = tmp_path / "base"
    windowless = {"sliding_window": 256} if name == "phi3" else {}  # where llama.cpp counts a window otherwise
    save_family(base, name, torch.float32, **windowless)
    adapter = save_lora(tmp_path / "lora", base, **settings)
    api.convert(base, tmp_path / "base.gguf", to="gguf", dtype="float32")
    api.convert(adapter, tmp_path / "lora.gguf", to="gguf")
    alone = answers(tmp_path / "base.gguf", None, tmp_path / "asked.json")
    found = answers(tmp_path / "base.gguf", tmp_path / "lora.gguf", tmp_path / "asked.json")
    with quietly(), torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        for each in found:
            tokens = torch.tensor([each["prompt"] + each["answer"]])
            logits = model(input_ids=tokens).logits[0, len(each["prompt"]) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(each["answer"])[:, None])[:, 0]
            assert (logits.max(1).values - chosen).max() < _TIE * logits.std()
    assert all(with_it["answer"] != without["answer"] for with_it, without in zip(found, alone, strict=True))
