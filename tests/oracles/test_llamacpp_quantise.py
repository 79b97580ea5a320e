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
from mixed_models import SMALL, MixedModel, random_models, write_header

from weightops import quantize_blocks
from weightops.layouts.ggml_mix import FILE_TYPES, mix
from weightops.ops.ggml.quantize import QUANTIZERS
from weightops.spec import DType

LLAMACPP = environment("llamacpp")
NUMBERS = {dtype: int(gguf.GGMLQuantizationType[dtype.name]) for dtype in QUANTIZERS}
NAMES = {"f16": DType.F16, "f32": DType.F32, "bf16": DType.BF16} | {dtype.value: dtype for dtype in QUANTIZERS}


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="compilers for this processor fuse multiply and add in ggml"
)
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
    asked = []
    for number, (model, name, options) in enumerate(cases):
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
                "importance": options["has_importance"],
                "pure": options.get("pure", False),
                "output": numbers.get("output"),
                "embedding": numbers.get("embedding"),
                "overrides": overrides,
            }
        )
        assert number < 5000
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    answers = json.loads(run_script(LLAMACPP, "llamacpp_types.py", tmp_path / "asked.json"))
    for (model, name, options), answer in zip(cases, answers, strict=True):
        wanted = {tensor: NAMES[dtype.lower()] for tensor, dtype in answer}
        found = mix(name, model.tensors, model.facts, **options)
        assert list(found) == list(wanted), (model.facts, name)
        assert found == wanted, (model.facts, name, options)
