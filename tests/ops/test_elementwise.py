"""Numbers that are multiplied by one, as torch multiplies them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapters import evaluate

from weightops.errors import UsageError
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import Scale
from weightops.ops.rows import Given
from weightops.spec import DType


@pytest.mark.parametrize("factor", [2.0, 1 / 3, -0.1])
def test_a_scale_is_one_rounding_in_float32(factor: float) -> None:
    drawn = np.random.default_rng(3).normal(size=(40, 5)).astype(np.float32)
    tensor = LazyTensor.make(Scale(factor), LazyTensor.make(Given(DType.F32, drawn.shape, drawn.tobytes())))
    (found,) = evaluate([tensor])
    assert found == (torch.from_numpy(drawn) * torch.tensor(factor, dtype=torch.float32)).numpy().tobytes()
    with pytest.raises(UsageError, match="not bfloat16"):
        LazyTensor.make(Scale(factor), LazyTensor.make(Given(DType.BF16, (2,), b"")))
