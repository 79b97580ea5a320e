"""Run gptqmodel's GPTQ class on one linear layer: `python gptqmodel_single.py IN OUT`, in gptqmodel's own environment.

IN is a torch file of `weight` [outputs, columns], `inputs` [batch, tokens, columns] and `cases`, a list of dicts of
`bits`, `group_size`, `sym`, `desc_act`, `act_group_aware`, `static_groups`, `damp_percent`. OUT gets a list of dicts,
one per case: `hessian`, and what the class finds, `weight` (dequantised), `scales` [outputs, groups], `zeros`, `g_idx`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from gptqmodel.quantization import GPTQ, QuantizeConfig


def quantise(weight: torch.Tensor, inputs: torch.Tensor, case: dict[str, Any]) -> dict[str, Any]:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    gptq = GPTQ(linear, QuantizeConfig(offload_to_disk=False, **case))
    gptq.quantizer.configure(perchannel=True)
    for batch in inputs:
        gptq.add_batch(batch[None], None)
    gptq.finalize_hessian()
    hessian = gptq.H.clone()
    found, scales, zeros, g_idx, *_ = gptq.quantize()
    return {
        "hessian": hessian,
        "weight": found.cpu(),
        "scales": scales.cpu(),
        "zeros": zeros.cpu(),
        "g_idx": g_idx.cpu(),
    }


def main() -> None:
    source, target = sys.argv[1:]
    torch.set_num_threads(1)  # how many there are decides in which order sums are taken
    given = torch.load(source, weights_only=True)
    torch.save([quantise(given["weight"], given["inputs"], case) for case in given["cases"]], target)


if __name__ == "__main__":
    main()
