"""Logits of GPTQ folders as auto-gptq 0.7.1 computes them in float32: `autogptq_logits.py FOLDER OUT.npy ...`."""

import sys

import numpy as np
import torch
from auto_gptq import AutoGPTQForCausalLM

torch.set_num_threads(1)
tokens = torch.arange(40).reshape(2, 20)
arguments = sys.argv[1:]
for folder, out in zip(arguments[::2], arguments[1::2], strict=True):
    model = AutoGPTQForCausalLM.from_quantized(
        folder,
        device="cpu",
        use_safetensors=True,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        torch_dtype=torch.float32,
    )
    with torch.no_grad():
        np.save(out, model(input_ids=tokens).logits.float().numpy())
