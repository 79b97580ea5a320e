"""Whole GGUF files of llama.cpp's own programs: those of llama-quantize, llama-gguf-split and llama-imatrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import TINY_LLAMA, save_family
from llama_tools import run_tool
from quantised_models import MODELS, save_wide, write_importance

from weightops import api
from weightops.formats.folder import open_checkpoint
from weightops.formats.gguf.imatrix import read_imatrix
from weightops.inference.tokens import encode
from weightops.io.source_file import SourceFile
from weightops.lazy import Evaluator, LazyTensor
from weightops.quantization import calibration

TYPES = ("q4_k_m", "q5_k_m", "q3_k_s", "iq4_xs", "q4_0", "q8_0", "q2_k", "q5_0")
OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "pure": (["--pure"], {"pure": True}),
    "types": (
        ["--tensor-type", "ffn_(up|gate)=q5_0", "--tensor-type", "UP=q3_k", "--output-tensor-type", "q5_k"],
        {"tensor_type": ("ffn_(up|gate)=q5_0", "UP=q3_k"), "output_tensor_type": "q5_K"},
    ),
    "embedding": (["--token-embedding-type", "iq4_xs"], {"token_embedding_type": "iq4_xs"}),
}


def differing(tmp_path: Path, name: str, theirs: list[str], kind: str, ours: dict[str, Any]) -> list[str]:
    """What of a model's quantised file, made of its folder and of its GGUF file, is not llama-quantize's."""
    run_tool("llama-quantize", *theirs, "base.gguf", "theirs.gguf", kind, 1, cwd=tmp_path)
    found = []
    for source in ("model", "base.gguf"):
        made = tmp_path / "ours.gguf"
        api.convert(tmp_path / source, made, to="gguf", dtype=kind, overwrite=True, **ours)
        if made.read_bytes() != (tmp_path / "theirs.gguf").read_bytes():
            found.append(f"{name} {kind} {theirs} of {source}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_quantised_files_are_those_of_llama_quantize(tmp_path: Path, name: str) -> None:
    save_wide(tmp_path / "model", name)
    api.convert(tmp_path / "model", tmp_path / "base.gguf", to="gguf")
    found = []
    for kind in TYPES:
        found += differing(tmp_path, name, [], kind, {})
        for form in ("gguf", "dat"):
            file = tmp_path / f"importance.{form}"
            if not file.exists():
                write_importance(file, tmp_path / "base.gguf")
            found += differing(tmp_path, name, ["--imatrix", file.name], kind, {"imatrix": file})
    for theirs, ours in OPTIONS.values():
        found += differing(tmp_path, name, theirs, "q4_k_m", ours)
    found += differing(tmp_path, name, ["--output-tensor-type", "q8_0"], "f16", {"output_tensor_type": "q8_0"})
    assert found == []


@pytest.mark.slow
def test_parts_are_those_of_llama_gguf_split(tmp_path: Path) -> None:
    save_wide(tmp_path / "model", "llama")
    api.convert(tmp_path / "model", tmp_path / "base.gguf", to="gguf")
    (tmp_path / "theirs").mkdir()
    run_tool("llama-gguf-split", "--split-max-size", "2M", "base.gguf", "theirs/model", cwd=tmp_path)
    api.convert(tmp_path / "model", tmp_path / "ours", to="gguf", max_shard_size="2MB")
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert len(theirs) > 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").glob("*.gguf")} == theirs
    assert open_checkpoint(tmp_path / "ours").metadata == open_checkpoint(tmp_path / "base.gguf").metadata


@pytest.mark.slow
def test_a_trained_model_is_as_good_as_llama_quantizes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    api.convert(TINY_LLAMA, run / "base.gguf", to="gguf", dtype="f16")
    run_tool("llama-quantize", "base.gguf", "theirs.gguf", "q4_k_m", 1, cwd=run)
    api.convert(TINY_LLAMA, run / "ours.gguf", to="gguf", dtype="q4_k_m")
    perplexities = []
    for name in ("theirs", "ours"):
        api.convert(run / f"{name}.gguf", tmp_path / name, to="hf", dtype="float32")
        perplexities.append(api.evaluate(tmp_path / name, TINY_LLAMA / "heldout.txt", seq_len=512).scores[0].perplexity)
    assert perplexities[0] == perplexities[1]
    print(perplexities)


def means(path: Path) -> dict[str, np.ndarray]:
    """By name the importance in a file."""
    with Evaluator() as evaluate:
        return {
            name: np.frombuffer(evaluate.whole(tensor), np.float32)
            for name, tensor in read_imatrix(SourceFile.at(path)).weights.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained", "qwen3moe"])
def test_importance_is_that_of_llama_imatrix(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same windows: those that follow one another from the beginning of the text."""
    model, text = TINY_LLAMA, tmp_path / "text.txt"
    text.write_text((TINY_LLAMA / "calibration.txt").read_text()[:20_000])
    if name != "trained":
        model = tmp_path / "model"
        save_family(model, name, torch.float32)
    api.convert(model, tmp_path / "base.gguf", to="gguf", dtype="f32")
    how = ["-c", 128, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", 2, "--no-ppl"]
    for form in ("gguf", "dat"):
        out = ["-o", f"theirs.{form}", "--output-format", form]
        run_tool("llama-imatrix", "-m", "base.gguf", "-f", "text.txt", *out, *how, cwd=tmp_path)

    def in_turn(tokenizer: Any, documents: Any, samples: int, seq_len: int, seed: int) -> calibration.Calibration:
        found = encode(tokenizer, documents[0])
        return calibration.Calibration(found[: len(found) // seq_len * seq_len].reshape(-1, seq_len))

    monkeypatch.setattr(calibration, "calibrate", in_turn)
    for form in ("gguf", "dat"):
        api.imatrix(model, tmp_path / f"ours.{form}", calibration=text, seq_len=128)
        ours, theirs = (means(tmp_path / f"{whose}.{form}") for whose in ("ours", "theirs"))
        assert list(ours) == [weight for weight in theirs if "gate_inp" not in weight]
        for weight, values in ours.items():
            np.testing.assert_allclose(values, theirs[weight], rtol=1e-3, atol=1e-6, err_msg=weight)
    ours, theirs = (read_imatrix(SourceFile.at(tmp_path / f"{whose}.gguf")) for whose in ("ours", "theirs"))
    assert ours.metadata == theirs.metadata
    counts = [open_checkpoint(tmp_path / f"{whose}.gguf") for whose in ("ours", "theirs")]
    differing = [n for n, t in counts[0].items() if n.endswith(".counts") and read(t) != read(counts[1][n])]
    assert differing == []


def read(tensor: LazyTensor) -> bytes:
    with Evaluator() as evaluate:
        return bytes(evaluate.whole(tensor))
