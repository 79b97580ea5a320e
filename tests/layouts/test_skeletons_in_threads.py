"""What transformers changes of torch while it makes a model is the process's, and is put back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import LlamaConfig

from weightops.layouts.skeleton import build_for_names


def state() -> tuple[object, ...]:
    creating = tuple(getattr(torch, name) for name in ("empty", "linspace", "arange", "tensor", "zeros"))
    filling = tuple(getattr(torch.nn.init, name) for name in ("normal_", "uniform_", "zeros_", "kaiming_uniform_"))
    return (*creating, *filling, torch.get_default_dtype(), torch.nn.Module.__init__, torch.Tensor.normal_)


def test_threads_that_make_models_at_once_leave_torch_as_it_was() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, vocab_size=9)
    before = state()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: dict(build_for_names(config, None, 40).named_parameters()), range(24)))
    assert state() == before
    assert all(each.keys() == found[0].keys() for each in found)
    assert {p.dtype for each in found for p in each.values()} == {torch.bfloat16}
