"""Logits of GPTQ folders as transformers computes them with optimum and gptqmodel: `... FOLDER OUT.npy ...`.

The plain torch kernel is asked for: the fused one that is chosen otherwise gives wrong numbers with act-order, and
has no groups of other than 32, 64, 128 and 256 columns.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

torch.set_num_threads(1)
tokens = torch.arange(40).reshape(2, 20)
arguments = sys.argv[1:]
for folder, out in zip(arguments[::2], arguments[1::2], strict=True):
    bits = json.loads((Path(folder) / "quantize_config.json").read_text())["bits"]
    kernel = transformers.GPTQConfig(bits=bits, backend="gptq_torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32, quantization_config=kernel
    )
    with torch.no_grad():
        np.save(out, model(input_ids=tokens).logits.float().numpy())
