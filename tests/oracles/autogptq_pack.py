"""What auto-gptq 0.7.1's packer makes of given layers: `autogptq_pack.py IN.npz OUT.npz`, as gptqmodel_pack.py."""

import sys

import numpy as np
import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

given = np.load(sys.argv[1])
made = {}
for name in sorted({key.rpartition(".")[0] for key in given}):
    parts = ("weight", "scales", "zeros", "g_idx")
    weight, scales, zeros, g_idx = (torch.from_numpy(given[f"{name}.{part}"]) for part in parts)
    outputs, inputs = weight.shape
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = weight.float()
    layer = QuantLinear(int(given[f"{name}.bits"]), -(-inputs // len(scales)), inputs, outputs, bias=False)
    layer.pack(linear, scales.float().T, zeros.float().T, g_idx)
    made |= {f"{name}.{part}": getattr(layer, part).numpy() for part in ("qweight", "qzeros", "scales", "g_idx")}
    made[f"{name}.scales"] = made[f"{name}.scales"].astype(np.float16)
np.savez(sys.argv[2], **made)
