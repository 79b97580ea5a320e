"""GGUF files against those that llama.cpp's own converter writes of the same folders, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environments import environment, run_script
from gguf_models import FAMILIES, save_family, save_mxfp4, save_with_sight
from tokenizer_folders import KINDS
from transformers import LlamaConfig, LlamaForCausalLM

from weightops import api
from weightops.spec import DType

LLAMACPP = environment("llamacpp")
TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}


def theirs(wanted: list[tuple[Path, str, Path, str]]) -> None:
    """Have the converter write each of these: a folder as a type to a file, its tokenizer having a name."""
    listed = [[str(part) for part in each] for each in wanted]
    run_script(LLAMACPP, "llamacpp_convert.py", LLAMACPP / "llama.cpp", json.dumps(listed))


@pytest.mark.slow
def test_every_family_in_every_type_is_the_converters(tmp_path: Path) -> None:
    wanted = []
    for name in FAMILIES:
        save_family(tmp_path / name.replace(" ", ""), name)
        folder = tmp_path / name.replace(" ", "")
        wanted += [(folder, kind, tmp_path / f"{folder.name}-{kind}.gguf", "gpt-2") for kind in TYPES]
    for name, save in {"mxfp4": save_mxfp4, "sight": save_with_sight}.items():
        save(tmp_path / name)
        wanted += [(tmp_path / name, kind, tmp_path / f"{name}-{kind}.gguf", "gpt-2") for kind in TYPES]
    theirs(wanted)
    differ = []
    for folder, kind, expected, _ in wanted:
        made = tmp_path / "made.gguf"
        api.convert(folder, made, to="gguf", dtype=TYPES[kind], overwrite=True)
        if made.read_bytes() != expected.read_bytes():
            differ.append(expected.name)
    assert differ == []


@pytest.mark.slow
def test_every_kind_of_tokenizer_is_the_converters(tmp_path: Path) -> None:
    wanted = []
    for i, (make, pre, rows) in enumerate(KINDS.values()):
        folder = tmp_path / f"kind{i}"
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes)).save_pretrained(folder)
        for name, data in make().items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if name == "config.json":
                ids = {key: value for key, value in json.loads(data).items() if key.endswith("_id")}
                data = json.dumps({**json.loads(path.read_bytes()), **ids}).encode()
            path.write_bytes(data)
        wanted.append((folder, "f16", tmp_path / f"{i}.gguf", pre))
    theirs(wanted)
    differ = []
    for kind, (folder, _, expected, _) in zip(KINDS, wanted, strict=True):
        made = tmp_path / "made.gguf"
        api.convert(folder, made, to="gguf", dtype=DType.F16.value, overwrite=True)
        if made.read_bytes() != expected.read_bytes():
            differ.append(kind)
    # llama.cpp's converter gives all pieces of a tokenizer.json one score, with which llama.cpp merges otherwise.
    assert differ == ["sentencepiece as tokenizer.json"]
