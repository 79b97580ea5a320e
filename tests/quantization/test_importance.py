"""Importance matrices: sums over what transformers' own layers are given, in either form, continued and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import save_family
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import weightops
from weightops.errors import OutputExists, SourceMissing, UsageError
from weightops.formats.folder import open_checkpoint
from weightops.formats.gguf.imatrix import read_imatrix
from weightops.inference.tokens import load_tokenizer
from weightops.io.source_file import SourceFile
from weightops.lazy import Evaluator, LazyTensor
from weightops.quantization import calibration, importance

OPTIONS: dict[str, Any] = {"samples": 3, "seq_len": 32, "device": "cpu"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Model = Callable[[str], Path]


def values(tensor: LazyTensor) -> np.ndarray:
    with Evaluator() as evaluate:
        return np.frombuffer(evaluate.whole(tensor), np.float32).reshape(tensor.spec.shape)


def tokens_of(model: Path, text: Path) -> torch.Tensor:
    tokenizer = load_tokenizer(open_checkpoint(model))
    data = calibration.calibrate(tokenizer, calibration.read_documents([text]), 3, 32, 0)
    return calibration.begun(data, tokenizer).tokens


def test_sums_are_those_of_what_transformers_gives_its_layers(tmp_path: Path, model: Model, text: Path) -> None:
    folder, seen = model("llama"), dict[str, torch.Tensor]()
    tokens = tokens_of(folder, text)
    assert set(tokens[:, 0].tolist()) == {load_tokenizer(open_checkpoint(folder)).bos_token_id}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i, layer in enumerate(whole.model.layers):
        for name, packed in NAMES.items():

            def see(module: Any, args: Any, weight: str = f"blk.{i}.{packed}.weight") -> None:
                seen[weight] = args[0].flatten(0, 1).double().square().sum(0)

            layer.get_submodule(name).register_forward_pre_hook(see)
    with torch.no_grad():
        whole(tokens)
    result = weightops.imatrix(folder, tmp_path / "m.gguf", calibration=text, **OPTIONS)
    found = open_checkpoint(tmp_path / "m.gguf")
    order = [f"{weight}.{part}" for weight in sorted(seen) for part in ("in_sum2", "counts")]
    assert list(found) == order
    for weight, sums in seen.items():
        np.testing.assert_allclose(values(found[f"{weight}.in_sum2"])[0], sums.numpy(), rtol=1e-5)
        assert values(found[f"{weight}.counts"]).tolist() == [[96]]
    assert {key: next(iter(value.values())) for key, value in found.metadata.items()} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["string", ["text.txt"]],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 32,
    }
    assert result.manifest is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "m.gguf.weightops-manifest.json"]
    step = json.loads((tmp_path / "m.gguf.weightops-manifest.json").read_text())["recipe"]["tensors"]["importance"]
    assert (step["imatrix"]["samples"], step["imatrix"]["calibration"][0]["name"]) == (3, "text.txt")
    with pytest.raises(OutputExists, match=r"m\.gguf exists"):
        weightops.imatrix(folder, tmp_path / "m.gguf", calibration=text, **OPTIONS)
    assert weightops.imatrix(folder, tmp_path / "m.gguf", calibration=text, if_exists="skip", **OPTIONS).skipped
    with pytest.raises(OutputExists, match="another plan"):
        weightops.imatrix(folder, tmp_path / "m.gguf", calibration=text, if_exists="skip", **{**OPTIONS, "samples": 2})


def test_experts_are_counted_apart_and_both_forms_say_the_same(tmp_path: Path, model: Model, text: Path) -> None:
    folder = model("mixtral")
    said = [
        weightops.imatrix(folder, tmp_path / f"m.{form}", calibration=text, **{**OPTIONS, "samples": 1, "seq_len": 8})
        for form in ("gguf", "dat")
    ]
    new, old = (read_imatrix(SourceFile.at(tmp_path / f"m.{form}")) for form in ("gguf", "dat"))
    assert list(new.weights) == list(old.weights)
    for weight in new.weights:
        np.testing.assert_allclose(values(old.weights[weight]), values(new.weights[weight]).ravel(), rtol=1e-6)
    counts = {n: values(t).ravel() for n, t in open_checkpoint(tmp_path / "m.gguf").items() if "_exps.weight.c" in n}
    assert {(len(found), found.sum()) for found in counts.values()} == {(4, 16)}
    idle = any((found == 0).any() for found in counts.values())
    assert all(any("no token came to" in sentence for sentence in each.warnings) == idle for each in said)
    assert (old.datasets, old.chunks) == (("text.txt",), 1)


def test_a_run_goes_on_at_its_block(tmp_path: Path, model: Model, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weightops.imatrix(model("llama"), tmp_path / "whole.gguf", calibration=text, **OPTIONS)
    run, blocks = importance._run, list[int]()

    def stopped(layers: Any, i: int, *rest: Any) -> Any:
        blocks.append(i)
        if blocks == [0, 1]:
            raise KeyboardInterrupt
        return run(layers, i, *rest)

    monkeypatch.setattr(importance, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        weightops.imatrix(model("llama"), tmp_path / "m.gguf", calibration=text, **OPTIONS)
    assert not (tmp_path / "m.gguf").exists()
    weightops.imatrix(model("llama"), tmp_path / "m.gguf", calibration=text, **OPTIONS)
    assert blocks == [0, 1, 1, 2]
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob("*.blocks"))


def test_what_cannot_be_is_refused_and_a_dry_run_says_sizes(tmp_path: Path, model: Model, text: Path) -> None:
    planned = weightops.imatrix(model("llama"), tmp_path / "m.gguf", calibration=text, dry_run=True, **OPTIONS)
    weightops.imatrix(model("llama"), tmp_path / "m.gguf", calibration=text, **OPTIONS)
    assert planned.plan.total_nbytes == (tmp_path / "m.gguf").stat().st_size
    with pytest.raises(UsageError, match="an importance matrix is a file"):
        weightops.imatrix(model("llama"), tmp_path / "folder", calibration=text)
    with pytest.raises(UsageError, match="no text to calibrate with"):
        weightops.imatrix(model("llama"), tmp_path / "n.gguf")
    with pytest.raises(UsageError, match="model_type gpt_neox is not converted to GGUF"):
        weightops.imatrix(model("gpt_neox"), tmp_path / "n.gguf", calibration=text, **OPTIONS)
    with pytest.raises(UsageError, match="lie inside one another"):
        weightops.imatrix(model("llama"), model("llama") / "n.gguf", calibration=text, **OPTIONS)
    save_tiny(tmp_path / "bare", "llama")
    (tmp_path / "bare/tokenizer.json").unlink()
    with pytest.raises(SourceMissing, match="has no tokenizer"):
        weightops.imatrix(tmp_path / "bare", tmp_path / "n.gguf", calibration=text, **OPTIONS)
    assert not (tmp_path / "n.gguf").exists()


def test_what_is_measured_serves_to_quantise(tmp_path: Path, text: Path) -> None:
    save_family(tmp_path / "model", "qwen3moe")
    weightops.imatrix(tmp_path / "model", tmp_path / "m.dat", calibration=text, **OPTIONS)
    said = weightops.convert(
        tmp_path / "model", tmp_path / "out.gguf", to="gguf", dtype="iq4_nl", imatrix=tmp_path / "m.dat"
    ).warnings
    assert not any("says nothing of" in sentence for sentence in said)
    found = open_checkpoint(tmp_path / "out.gguf").metadata
    assert found["quantize.imatrix.file"] == {"string": "m.dat"}
    assert found["quantize.imatrix.dataset"] == {"string": "text.txt"}
    assert found["quantize.imatrix.chunks_count"] == {"uint32": 3}
