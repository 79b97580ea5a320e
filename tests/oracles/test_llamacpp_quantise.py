"""Blocks and mixes of llama.cpp itself: its library quantises the same rows, its llama-quantize chooses the types."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from environments import environment, run_script
from hard_rows import hard_importance, hard_rows
from mixed_models import SMALL, MixedModel, mixed_model, random_models, write_header

from weightops import quantize_blocks
from weightops.layouts.ggml_mix import FILE_TYPES, MixModel, mix
from weightops.ops.ggml.quantize import QUANTIZERS
from weightops.spec import DType

LLAMACPP = environment("llamacpp")
NUMBERS = {dtype: int(gguf.GGMLQuantizationType[dtype.name]) for dtype in QUANTIZERS}
NAMES = {"f16": DType.F16, "f32": DType.F32, "bf16": DType.BF16} | {dtype.value: dtype for dtype in QUANTIZERS}


def ask(folder: Path, asked: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    """The types that llama-quantize chooses; what a case leaves out is nothing."""
    nothing = {"out": None, "importance": None, "pure": False, "output": None, "embedding": None, "overrides": []}
    (folder / "asked.json").write_text(json.dumps([{**nothing, **case} for case in asked]))
    answers: list[list[tuple[str, str]]] = json.loads(run_script(LLAMACPP, "llamacpp_types.py", folder / "asked.json"))
    return answers


WITHOUT_FMA = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="compilers for this processor fuse multiply and add in ggml"
)


@pytest.mark.slow
@WITHOUT_FMA
def test_blocks_are_those_of_ggml(tmp_path: Path) -> None:
    random, cases = np.random.default_rng(7), {}
    for kind, rows in enumerate(hard_rows(random, 16, 512)):
        for weight, importance in enumerate(hard_importance(random, 512)):
            cases[f"{kind}.{weight}"] = (rows, importance)
    given = {f"rows.{name}": rows for name, (rows, _) in cases.items()}
    given |= {f"importance.{name}": weights for name, (_, weights) in cases.items() if weights is not None}
    np.savez(tmp_path / "given.npz", **given)  # type: ignore[arg-type]
    types = json.dumps({dtype.value: number for dtype, number in NUMBERS.items()})
    run_script(LLAMACPP, "llamacpp_blocks.py", tmp_path / "given.npz", types, tmp_path / "found.npz")
    found = np.load(tmp_path / "found.npz")
    differing = [
        (dtype.value, name)
        for name, (rows, importance) in cases.items()
        for dtype in QUANTIZERS
        if quantize_blocks(rows, dtype, importance=importance).read() != found[f"{dtype.value}.{name}"].tobytes()
    ]
    assert differing == []


@pytest.mark.slow
def test_types_are_those_of_llama_quantize(tmp_path: Path) -> None:
    cases: list[tuple[MixedModel, str, dict[str, Any]]] = []
    for model in random_models(np.random.default_rng(8)):
        for name in FILE_TYPES:
            importance = name == "Q2_K_S" or len(cases) % 3 == 0
            cases.append((model, name, {"has_importance": importance}))
    for name in FILE_TYPES:
        weighs = {"has_importance": True}
        cases += [
            (SMALL, name, {**weighs, "pure": True}),
            (SMALL, name, {**weighs, "output": DType.Q8_0, "embedding": DType.Q5_K}),
            (SMALL, name, {**weighs, "overrides": [("ffn_(up|gate)", DType.Q5_0), ("_up", DType.Q3_K)]}),
            (SMALL, name, {**weighs, "overrides": [(r"blk\.[0-2]\.attn_v", DType.IQ4_XS), ("embd", DType.F16)]}),
        ]
    some, asked = tmp_path / "importance.npz", []
    np.savez(some, none=np.ones(1, np.float32))
    for model, name, options in cases:
        path = tmp_path / f"{id(model)}.gguf"
        if not path.exists():
            write_header(path, model)
        numbers = {
            key: gguf.GGMLQuantizationType[options[key].name] for key in ("output", "embedding") if key in options
        }
        overrides = [(text, gguf.GGMLQuantizationType[dtype.name]) for text, dtype in options.get("overrides", ())]
        asked.append(
            {
                "path": str(path),
                "file_type": FILE_TYPES[name].number,
                "importance": str(some) if options["has_importance"] else None,
                "pure": options.get("pure", False),
                **numbers,
                "overrides": overrides,
            }
        )
    answers = ask(tmp_path, asked)
    for (model, name, options), answer in zip(cases, answers, strict=True):
        wanted = {tensor: NAMES[dtype.lower()] for tensor, dtype in answer}
        found = mix(name, model.tensors, model.facts, **options)
        assert list(found) == list(wanted), (model.facts, name)
        assert found == wanted, (model.facts, name, options)


@pytest.mark.slow
@WITHOUT_FMA
def test_tensors_of_files_are_those_of_llama_quantize(tmp_path: Path) -> None:
    """Whole files, with importance that some tensors lack, experts have apart, and two mixes of every size."""
    random, facts = np.random.default_rng(9), MixModel(architecture="llama", layers=3, heads=8, kv_heads=2, experts=4)
    model = mixed_model(facts)
    values = {name: random.standard_normal(spec.shape).astype(spec.dtype.value) for name, spec in model.tensors.items()}
    write_header(tmp_path / "source.gguf", model)
    for tensor in gguf.GGUFReader(tmp_path / "source.gguf", "r+").tensors:
        tensor.data[:] = values[tensor.name]
    vectors = {
        name: random.random((spec.shape[0] if len(spec.shape) == 3 else 1, spec.shape[-1]), np.float32)
        for name, spec in model.tensors.items()
        if "attn_k" not in name
    }
    np.savez(tmp_path / "importance.npz", **vectors)  # type: ignore[arg-type]
    cases = [
        (name, weighs) for name in ("Q2_K", "Q3_K_L", "Q4_K_M", "Q5_0", "Q5_K_S", "IQ4_XS") for weighs in (False, True)
    ]
    asked = [
        {
            "path": str(tmp_path / "source.gguf"),
            "out": str(tmp_path / f"{name}.{weighs}.gguf"),
            "file_type": FILE_TYPES[name].number,
            "importance": str(tmp_path / "importance.npz") if weighs else None,
        }
        for name, weighs in cases
    ]
    ask(tmp_path, asked)
    for (name, weighs), case in zip(cases, asked, strict=True):
        types = mix(name, model.tensors, facts, has_importance=weighs)
        tensors = gguf.GGUFReader(case["out"]).tensors
        assert [tensor.name for tensor in tensors] == list(types)
        for tensor in tensors:
            source, dtype, importance = values[tensor.name], types[tensor.name], None
            if dtype in QUANTIZERS and weighs and tensor.name in vectors:
                importance = vectors[tensor.name] if source.ndim == 3 else vectors[tensor.name][0]
            wanted = quantize_blocks(source, dtype, importance=importance).read() if dtype in QUANTIZERS else source
            assert bytes(wanted) == tensor.data.tobytes(), (name, weighs, tensor.name)
