"""Adapters in GGUF against those that llama.cpp's own converter writes of the same folders, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from environments import environment, run_script
from gguf_adapters import save_lora
from gguf_models import FAMILIES, save_family

from weightops import api

LLAMACPP = environment("llamacpp")
TYPES = {"f32": None, "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
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
    theirs(wanted)
    differ = []
    for adapter, base, kind, expected in wanted:
        made = tmp_path / "made.gguf"
        api.convert(adapter, made, to="gguf", base=base, dtype=TYPES[kind], overwrite=True)
        if made.read_bytes() != expected.read_bytes():
            differ.append(expected.name)
    assert differ == []
