"""Logits of GPTQ folders as gptqmodel 7.7 has them in float16 on a CPU: `gptqmodel_logits.py FOLDER OUT.npy ...`."""

import sys

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel

torch.set_num_threads(1)
tokens = torch.arange(40).reshape(2, 20)
arguments = sys.argv[1:]
for folder, out in zip(arguments[::2], arguments[1::2], strict=True):
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    with torch.no_grad():
        np.save(out, model.model(input_ids=tokens).logits.float().numpy())
