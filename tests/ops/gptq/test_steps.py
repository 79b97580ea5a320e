"""How far apart the weights of a GPTQ module can be."""

from __future__ import annotations

import torch
from support import given_tensor

from weightops.lazy import LazyTensor
from weightops.ops.gptq.steps import GroupSteps


def test_group_steps_follow_the_index() -> None:
    scales = torch.tensor([[0.5, 1.0, 2.0], [4.0, 8.0, 16.0]]).half()
    plain = LazyTensor.make(GroupSteps(4, 2), given_tensor(scales)).numpy()
    assert plain.tolist() == [[0.5, 0.5, 4, 4], [1, 1, 8, 8], [2, 2, 16, 16]]
    index = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    ordered = LazyTensor.make(GroupSteps(4, 2), given_tensor(scales), given_tensor(index)).numpy()
    assert ordered.tolist() == [[4, 0.5, 4, 0.5], [8, 1, 8, 1], [16, 2, 16, 2]]
