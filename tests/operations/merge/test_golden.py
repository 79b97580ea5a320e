"""Merges by mergekit 0.1.5 (torch 2.13, AVX2), to the bit: tensors of tiny models, and digests of what it wrote.

Of equal sizes mergekit's sort leaves any; the digests are those of its own arithmetic with them spread evenly.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import evaluated
from safetensors.torch import load_file
from support import evaluate, given_tensor

from weightops.checkpoint import Checkpoint, written_json
from weightops.operations.merge import merge
from weightops.operations.merge.operation import read_stage

FOLDER = Path(__file__).parents[2] / "golden" / "mergekit"
CASES: dict[str, Any] = json.loads((FOLDER / "cases.json").read_text())
MODELS = load_file(FOLDER / "models.safetensors")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ODD = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0**-130, -(2.0**-130), 3.0e38, -3.0e38])
ODD_ONES = ("model.layers.0.self_attn.k_proj.weight", "model.norm.weight")


def model(name: str) -> Checkpoint:
    """A model by the name that the cases have for it, such as `b-odd-f32`."""
    who, *kind, dtype = name.split("-")
    tensors = {n.removeprefix(f"{who}/"): t.clone() for n, t in MODELS.items() if n.startswith(f"{who}/")}
    for odd in ODD_ONES if kind else ():
        tensors[odd].reshape(-1)[: len(ODD)] = ODD
    lazy = {n: given_tensor(t.to(DTYPES[dtype])) for n, t in tensors.items()}
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 72}
    return Checkpoint(name, lazy, {"config.json": written_json(config)}, dict.fromkeys(lazy, "model.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_what_mergekit_wrote_is_what_comes_out(case: str) -> None:
    if case.startswith(("linear", "slices")) and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("mergekit's linear rounds a product and a sum at once where the processor can")
    document, expected = CASES[case]["merge"], CASES[case]["tensors"]
    names = [found.model for found in read_stage(document).references]
    result = merge(
        [model(name) for name in names],
        config=document,
        allow_nonfinite=case.endswith("odd"),
        names=names,
        evaluate=evaluated,
    )
    found = {
        name: [CODES[tensor.spec.dtype.value], hashlib.sha256(evaluate(tensor)).hexdigest()]
        for name, tensor in result.tensors.items()
    }
    assert found == expected
