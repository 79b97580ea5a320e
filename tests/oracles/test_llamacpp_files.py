"""Whole GGUF files of llama.cpp's own programs: those of llama-quantize, llama-gguf-split and llama-imatrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_tools import run_tool
from quantised_models import MODELS, save_wide, write_importance

from weightops import api

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
