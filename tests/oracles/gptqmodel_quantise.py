"""A model quantised by gptqmodel 7.7: `gptqmodel_quantise.py MODEL OUT BITS GROUP_SIZE SYM DESC_ACT FORMAT`."""

import sys

import torch
from gptqmodel import GPTQModel, QuantizeConfig

torch.set_num_threads(1)
source, out, bits, group_size, sym, desc_act, form = sys.argv[1:]
config = QuantizeConfig(
    bits=int(bits),
    group_size=int(group_size),
    sym=sym == "True",
    desc_act=desc_act == "True",
    act_group_aware=False,
    format=form,
    device="cpu",
    offload_to_disk=False,
)
model = GPTQModel.load(source, config)
generator = torch.Generator().manual_seed(0)
examples = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for ids in (torch.randint(1, 96, (1, 200), generator=generator) for _ in range(64))
]
model.quantize(examples, batch_size=1)
model.save(out)
