"""Layers that predict further tokens, and heads: left out with their counts, and put back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, FAMILIES
from mtp_models import FURTHER, save_with_mtp
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import weightops
from weightops.errors import IncompatibleInputs, UsageError


def deepseek(folder: Path) -> Path:
    """With one layer that predicts the token after the next, where transformers passes over it."""
    tiny("deepseek_v3", **{**COMMON, **FAMILIES["deepseek_v3"], "num_hidden_layers": 2}).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    further = {n.replace("layers.1.", "layers.2."): t + 1 for n, t in tensors.items() if "layers.1." in n}
    further["model.layers.2.eh_proj.weight"] = torch.ones(64, 128)
    save_file({**tensors, **further}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return folder


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def test_dropped_with_their_count(tmp_path: Path) -> None:
    source = deepseek(tmp_path / "model")
    weightops.part(source, tmp_path / "out", drop="mtp")
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert kept.keys() == {name for name in load_file(source / "model.safetensors") if "layers.2." not in name}


def test_those_of_qwen_are_told_by_their_name(tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "model", tmp_path / "without")
    tensors = load_file(tmp_path / "without" / "model.safetensors")
    weightops.part(tmp_path / "model", tmp_path / "out", drop="mtp")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    weightops.part(tmp_path / "out", tmp_path / "again", mtp=tmp_path / "model")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in {**tensors, **FURTHER}.items())


def test_one_that_transformers_would_take_for_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    source = deepseek(tmp_path / "model")
    weightops.part(source, tmp_path / "tuned", drop="mtp")
    with pytest.raises(IncompatibleInputs, match=r"would not load: .* no part of DeepseekV3ForCausalLM") as raised:
        weightops.part(tmp_path / "tuned", tmp_path / "out", mtp=source)
    assert "num_nextn_predict_layers" in str(raised.value.hint)


def test_a_model_without(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    with pytest.raises(UsageError, match="no layers that predict further tokens"):
        weightops.part(tmp_path / "model", tmp_path / "out", drop="mtp")


@pytest.mark.parametrize("init", ["zero", "normal"])
def test_a_classifier_loads_with_its_labels(init: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    weightops.part(tmp_path / "model", tmp_path / "out", head="classifier", labels=3, init=init, seed=5)
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_labels == 3
    deviation = float(model.score.weight.detach().std())
    assert deviation == 0 if init == "zero" else 0.01 < deviation < 0.03


def test_a_classifier_of_tokens(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "qwen2")
    weightops.part(tmp_path / "model", tmp_path / "out", head="token-classifier", labels=5)
    _, report = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_no_head_is_the_base_model(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    weightops.part(tmp_path / "model", tmp_path / "out", head="none")
    assert config_of(tmp_path / "out")["architectures"] == ["LlamaModel"]
    assert "embed_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is to be done"),
        ({"head": "classifier"}, "labels are what a classifier chooses from"),
        ({"labels": 3, "drop": "mtp"}, "labels, init and seed are those of a new head"),
    ],
)
def test_what_cannot_be_meant(options: dict[str, object], message: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    with pytest.raises(UsageError, match=message):
        weightops.part(tmp_path / "model", tmp_path / "out", **options)  # type: ignore[arg-type]


def test_layers_that_only_config_does_not_count_are_not_dropped(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 2}))
    with pytest.raises(UsageError, match="nothing says that it predicts further tokens") as raised:
        weightops.part(tmp_path / "model", tmp_path / "out", drop="mtp")
    assert "num_hidden_layers" in str(raised.value.hint)
    assert not (tmp_path / "out").exists()


def test_quantised_layers_do_not_go_into_a_plain_model(tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "original", tmp_path / "tuned")
    path = tmp_path / "original" / "model.safetensors"
    tensors = load_file(path)
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].to(torch.float8_e4m3fn)
    save_file({**tensors, "mtp.fc.weight_scale_inv": torch.ones(1, 1)}, path, {"format": "pt"})
    config = tmp_path / "original" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(IncompatibleInputs, match=r"mtp\.fc\.weight is float8_e4m3fn .* tuned is not quantised so"):
        weightops.part(tmp_path / "tuned", tmp_path / "out", mtp=tmp_path / "original")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["abc", [1], -1.0, True])
def test_a_deviation_that_is_none(value: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "initializer_range": value}))
    with pytest.raises(UsageError, match=r"initializer_range is .*, expected a number above zero"):
        weightops.part(tmp_path / "model", tmp_path / "out", head="classifier", labels=2, init="normal")
    assert not (tmp_path / "out").exists()
