"""What gptqmodel 7.7's packer makes of given layers: `gptqmodel_pack.py IN.npz OUT.npz`.

For each layer NAME the input holds NAME.weight [N, K], NAME.scales [G, N], NAME.zeros [G, N], NAME.g_idx and NAME.bits.
"""

import sys

import numpy as np
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear

given = np.load(sys.argv[1])
made = {}
for name in sorted({key.rpartition(".")[0] for key in given}):
    weight, scales, zeros, g_idx = (
        torch.from_numpy(given[f"{name}.{part}"]) for part in ("weight", "scales", "zeros", "g_idx")
    )
    bits, (outputs, inputs) = int(given[f"{name}.bits"]), weight.shape
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = weight.float()
    layer = TorchLinear(
        bits=bits,
        group_size=-(-inputs // len(scales)),
        sym=False,
        desc_act=True,
        in_features=inputs,
        out_features=outputs,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    layer.pack_original(linear, scales.float().T, zeros.float().T, g_idx)
    made |= {f"{name}.{part}": getattr(layer, part).numpy() for part in ("qweight", "qzeros", "scales", "g_idx")}
np.savez(sys.argv[2], **made)
