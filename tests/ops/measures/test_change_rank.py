"""What one look at each row tells of a rank, and when it tells nothing."""

from __future__ import annotations

import numpy as np
import pytest

from weightops.ops.measures.change_rank import Sketch, certain_rank


def random(shape: tuple[int, int], rank: int) -> np.ndarray:
    generator = np.random.default_rng(rank)
    left, right = generator.standard_normal((shape[0], rank)), generator.standard_normal((rank, shape[1]))
    return (left @ right).astype(np.float32)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_sketch_wider_than_the_rank_has_all_singular_values(size: float) -> None:
    change = size * random((300, 200), 10)
    sketch = Sketch(200, 26)
    for rows in np.split(change, [5, 100, 250]):
        sketch.add(rows)
    values = np.sqrt(sketch.squares()[:10])
    np.testing.assert_allclose(values, np.linalg.svd(change.astype(np.float64), compute_uv=False)[:10], rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_change_that_is_zero_or_not_finite_has_none(value: float) -> None:
    sketch = Sketch(20, 4)
    sketch.add(np.full((10, 20), value, np.float32))
    assert len(sketch.squares()) == 0


def test_a_rank_is_certain_where_the_rest_makes_no_difference() -> None:
    squares = np.array([50.0, 30.0, 15.0])
    assert certain_rank(squares, 95.5) == 3
    assert certain_rank(squares, 95.0) == 3
    assert certain_rank(np.array([98.0, 1.0]), 99.6) is None  # one and all of the rest may hold 99 %
    assert certain_rank(squares, 97.0) is None  # three do not
    assert certain_rank(np.array([]), 1.0) is None
    assert certain_rank(squares, float("inf")) is None
