"""Processor seconds per GB of output of formats' own libraries: `number_formats_libraries.py RUNS`, JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

ROWS, COLUMNS = 2048, 4096
torch.set_num_threads(1)
torch.manual_seed(0)
found: dict[str, float] = {}


def measure(name: str, function: Callable[[], Any]) -> None:
    best, nbytes = float("inf"), 0
    for _ in range(int(sys.argv[1])):
        start = time.process_time()
        out = function()
        best, nbytes = min(best, time.process_time() - start), out.nbytes
    found[name] = best / nbytes * 1e9


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


with contextlib.suppress(ImportError, AttributeError):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    scales = torch.rand(ROWS // 128, COLUMNS // 128)
    step = object.__new__(Fp8Dequantize)
    measure("fp8, 128 x 128", lambda: step._dequantize_one(weight, scales))

with contextlib.suppress(ImportError, AttributeError):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed = random_bytes(1, ROWS, COLUMNS // 32, 16)
    exponents = torch.full((1, ROWS, COLUMNS // 32), 120, dtype=torch.uint8)
    measure("mxfp4", lambda: convert_moe_packed_tensors(packed, exponents))

with contextlib.suppress(ImportError, AttributeError):
    from compressed_tensors.compressors import NVFP4PackedCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def scheme(**arguments: Any) -> Any:
        return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))

    words = random_bytes(ROWS, COLUMNS // 2).view(torch.int32)
    state = {
        "weight_packed": words,
        "weight_scale": torch.rand(ROWS, COLUMNS // 128).bfloat16(),
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    grouped = scheme(num_bits=4, group_size=128, strategy="group", symmetric=True, type="int")
    measure(
        "int4, groups of 128",
        lambda: PackedQuantizationCompressor.decompress(dict(state), grouped)["weight"],
    )
    small = {
        "weight_packed": random_bytes(ROWS, COLUMNS // 2),
        "weight_scale": torch.rand(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    }
    nv = scheme(num_bits=4, group_size=16, strategy="tensor_group", symmetric=True, type="float")
    measure("nvfp4", lambda: NVFP4PackedCompressor.decompress(dict(small), nv)["weight"])

with contextlib.suppress(ImportError, AttributeError):
    import bitsandbytes as bnb

    quantised, about = bnb.functional.quantize_4bit(torch.randn(ROWS, COLUMNS).bfloat16(), quant_type="nf4")
    measure("nf4", lambda: bnb.functional.dequantize_4bit(quantised, about))

with contextlib.suppress(ImportError, AttributeError):
    from gguf import GGMLQuantizationType as Types
    from gguf.quants import dequantize

    for name, kind, size in (("Q4_K", Types.Q4_K, 144), ("Q6_K", Types.Q6_K, 210)):
        data = np.random.default_rng(0).integers(0, 64, (ROWS, COLUMNS // 256 * size), dtype=np.uint8)
        measure(f"GGUF {name}, float32", partial(dequantize, data, kind))

print(json.dumps(found))
