"""Checkpoints that bitsandbytes 0.50.2 quantises through transformers: `formats_bitsandbytes.py OUT`.

With a model and perhaps `twice` after it: that model alone, in NF4, as the case `given`.

What is expected is the library's own formula for any device. Its kernel for CPUs with AVX-512 gives other values where
a row has a multiple of 16 columns but no whole blocks, and there are several rows: it takes the scale of the block that
a row begins in from the wrong place. Elsewhere it is held to the formula here.
"""

import sys
import tempfile
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from formats_common import case, llama, mixtral
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

OUT = Path(sys.argv[1])


def formula(weight, dtype):
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed, size, shape = weight.data.view(torch.uint8).reshape(-1), state.blocksize, tuple(state.shape)
    return _dequantize_4bit_compute(packed, absmax, state.code, size, shape, dtype)


def make(name, plain, limit="5GB", **how):
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        make_of(name, folder, next(plain.parameters()).dtype, limit, **how)


def make_of(name, folder, dtype, limit="5GB", **how):
    settings = BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype, device_map="cpu")
    model.save_pretrained(OUT / name / "model", max_shard_size=limit)
    model = AutoModelForCausalLM.from_pretrained(OUT / name / "model", dtype=dtype, device_map="cpu")
    native, wide = {}, {}
    for module_name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight, state = module.weight, module.weight.quant_state
            made = {d: formula(weight, d) for d in (state.dtype, torch.float32)}
            rows, columns = state.shape
            if rows == 1 or columns % state.blocksize == 0 or columns % 16:
                assert torch.equal(bnb.functional.dequantize_4bit(weight.data, state), made[state.dtype]), module_name
            native[f"{module_name}.weight"], wide[f"{module_name}.weight"] = made[state.dtype], made[torch.float32]
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            made = bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
            native[f"{module_name}.weight"], wide[f"{module_name}.weight"] = made.to(dtype), made
    assert native
    case(OUT, name, native, wide)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
four = {"load_in_4bit": True}
if sys.argv[2:]:
    twice = "twice" in sys.argv
    make_of("given", sys.argv[2], F16, **four, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=twice)
    sys.exit()
for kind in ("nf4", "fp4"):
    for twice in (False, True):
        how = {**four, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": twice}
        for dtype, inner in ((BF16, 160), (F16, 150), (F32, 128)):
            name = f"{kind}{'-twice' * twice}-{str(dtype).removeprefix('torch.')}-{inner}"
            make(name, llama(inner=inner, dtype=dtype), "20KB", **how)
make("nf4-stored-wide", llama(), **four, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=BF16)
make("nf4-mixture", mixtral(), **four, bnb_4bit_quant_type="nf4")
make("int8-f16", llama(inner=150, dtype=F16), "20KB", load_in_8bit=True)
make("int8-bf16", llama(inner=151), load_in_8bit=True)
