"""Singular values of products, against numpy's of the products themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import evaluate, given_tensor

from weightops.errors import IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops.lora.spectrum import Spectrum


def spectrum(a: torch.Tensor, b: torch.Tensor, experts: int = 1) -> list[float]:
    tensor = LazyTensor.make(Spectrum(experts), given_tensor(a), given_tensor(b))
    return list(np.frombuffer(evaluate(tensor)))


@pytest.mark.parametrize(("rank", "width", "height"), [(1, 5, 7), (4, 9000, 30), (4, 30, 9000), (6, 3, 20), (5, 20, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_product(rank: int, width: int, height: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(rank, width).to(dtype), torch.randn(height, rank).to(dtype)
    expected = np.linalg.svd((b.double() @ a.double()).numpy(), compute_uv=False)[: min(rank, width, height)]
    assert spectrum(a, b) == pytest.approx(expected.tolist(), rel=1e-10)


def test_small_values_are_right_too() -> None:
    torch.manual_seed(0)
    a, b = torch.linalg.qr(torch.randn(50, 3))[0].T.contiguous(), torch.linalg.qr(torch.randn(40, 3))[0]
    found = spectrum(a, b * torch.tensor([1.0, 1e-5, 1e-10]))
    assert found == pytest.approx([1.0, 1e-5, 1e-10], rel=1e-3)  # through the Gram matrix the last would be noise


def test_factors_of_convolutions_are_matrices() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    expected = np.linalg.svd((b.reshape(5, 2) @ a.reshape(2, -1)).double().numpy(), compute_uv=False)[:2]
    assert spectrum(a, b) == pytest.approx(expected.tolist(), rel=1e-5)


def test_what_is_not_finite_makes_every_value_nan() -> None:
    assert np.isnan(spectrum(torch.tensor([[1.0, torch.inf]]), torch.ones(2, 1))).all()


@pytest.mark.parametrize(("a", "b", "experts"), [((4, 3), (5, 3), 1), ((4, 3), (5, 4), 3), ((4,), (4, 4), 1)])
def test_factors_that_have_no_product_are_refused(a: tuple[int, ...], b: tuple[int, ...], experts: int) -> None:
    with pytest.raises(IncompatibleInputs, match="have no product"):
        spectrum(torch.ones(a), torch.ones(b), experts)
