"""The Hessian and its factor, across the tiles in which they are computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.errors import UsageError
from weightops.ops.gptq import hessian as gptq_hessian
from weightops.ops.gptq.grid import Settings
from weightops.ops.gptq.hessian import Factor, Hessian, factorise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def _small_tiles() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq_hessian, "_TILE", 8)
        yield


@settings(max_examples=50, deadline=None)
@given(columns=st.integers(1, 40), batches=st.lists(st.integers(0, 9), max_size=5), seed=st.integers(0, 2**31))
def test_batches_add_up_to_the_hessian_of_all(columns: int, batches: list[int], seed: int) -> None:
    inputs = torch.randn(sum(batches), columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    hessian = Hessian(columns)
    for batch in inputs.split(batches):
        hessian.add(batch[None])
    assert hessian.tokens == len(inputs)
    found = hessian.matrix()
    expected = 2 / max(1, len(inputs)) * inputs.double().T @ inputs.double()
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 5),
    width=st.integers(1, 12),
    outputs=st.integers(1, 6),
    order=st.sampled_from([{}, {"desc_act": True}, {"group_aware": False}, {"reference_order": True}]),
    seed=st.integers(0, 2**31),
)
def test_the_factor_is_that_of_the_damped_hessian_which_is_kept(
    groups: int, width: int, outputs: int, order: dict[str, bool], seed: int
) -> None:
    random, columns = torch.Generator().manual_seed(seed), groups * width
    inputs = torch.randn(columns + 5, columns, generator=random)
    hessian = 2 / len(inputs) * inputs.T @ inputs
    factor = factorise(hessian.clone(), Settings(group_size=width, **order))
    assert isinstance(factor, Factor)
    assert sorted(factor.order.tolist()) == list(range(columns))
    ordered = hessian[factor.order][:, factor.order].double()
    damped = ordered + torch.eye(columns) * 0.01 * ordered.diagonal().mean()
    upper = factor.rows(0, columns).double().triu()
    if factor.is_inverse:
        assert torch.allclose(upper.T @ upper @ damped, torch.eye(columns, dtype=torch.float64), atol=1e-3)
    else:
        squares = factor.matrix.diagonal().flip(0).double().square()
        assert torch.allclose(upper * squares @ upper.T, damped, rtol=1e-4, atol=1e-4)
        assert torch.equal(factor.rows(1, columns, columns - 1), factor.rows(1, columns)[:, :-1])
    change = torch.randn(columns, outputs, generator=random)
    expected = (change.double() * (ordered @ change.double())).sum() / 2
    assert float(factor.error(change)) == pytest.approx(float(expected), rel=1e-4)


def test_reordering_inside_groups_keeps_every_group_together() -> None:
    diagonal = torch.tensor([1.0, 3, 2, 9, 7, 8, 5, 4, 6])
    order = gptq_hessian.column_order(diagonal, Settings(group_size=3))
    assert order.tolist() == [3, 5, 4, 8, 6, 7, 1, 2, 0]


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(UsageError, match="inputs have 3 columns, and the layer has 4"):
        Hessian(4).add(torch.zeros(2, 3))
