"""Models of several architectures, merged without a table of any; transformers loads what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import quantize_tiny, save_tiny
from transformers import AutoModelForCausalLM

import weightops

KINDS = ("bloom", "gpt2", "gpt_neox", "mixtral", "qwen2")
EMBEDDINGS = ("word_embeddings.weight", "wte.weight", "embed_in.weight", "embed_tokens.weight")
NORMS = ("ln_f.weight", "final_layer_norm.weight", "model.norm.weight")


def merged(folder: Path, text: str) -> Path:
    (folder / "m.yml").write_text(text.replace("./", f"{folder}/"))
    return weightops.merge(folder / "m.yml", folder / "out").out


def loads(folder: Path) -> AutoModelForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_all_tensors_are_merged_whatever_they_are_called(kind: str, tmp_path: Path) -> None:
    a, b = (save_tiny(tmp_path / name, kind, seed).state_dict() for seed, name in enumerate("ab"))
    text = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: ./a}, {model: ./b}]\n"
    found = loads(merged(tmp_path, text)).state_dict()
    assert found.keys() == a.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "gpt_neox", "mixtral"])
def test_layers_are_found_whatever_they_are_called(kind: str, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save_tiny(tmp_path / name, kind, seed)
    text = "merge_method: passthrough\nslices:\n"
    text += "  - sources: [{model: ./a, layer_range: [0, 2]}]\n  - sources: [{model: ./b, layer_range: [0, 2]}]\n"
    model = loads(merged(tmp_path, text))
    assert model.config.num_hidden_layers == 4
    found = {name: load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "out")}
    (embedding,) = (name for name in found["a"] if name.endswith(EMBEDDINGS))
    (norm,) = (name for name in found["a"] if name.endswith(NORMS))
    assert torch.equal(found["out"][embedding], found["a"][embedding])
    assert torch.equal(found["out"][norm], found["b"][norm])


def test_quantised_models_are_merged_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    save_tiny(tmp_path / "a", "llama", 0, hidden_size=64)
    quantize_tiny(tmp_path / "a", tmp_path / "q")
    weightops.dequantize(tmp_path / "q", tmp_path / "plain")
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ./q}, {model: ./a}]\ndtype: float32\n"
    found = load_file(merged(tmp_path, text) / "model.safetensors")
    plain, a = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "a"))
    assert found.keys() == a.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (plain[name].float() + a[name].float()) / 2)
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
