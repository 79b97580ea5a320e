"""Ranks of changes are those of the whole change in float64, whether one pass was enough to tell or not."""

from __future__ import annotations

import pytest
import torch
from support import given_tensor

from weightops.checkpoint import Checkpoint
from weightops.operations.compare import TensorChange, compare
from weightops.ops.lora.lowrank import SingularValues


def found(a: torch.Tensor, b: torch.Tensor) -> TensorChange:
    one, other = (Checkpoint(name, {"w": given_tensor(t)}) for name, t in (("a", a), ("b", b)))
    (change,) = compare(one, other, workers=1).tensors
    return change


def spectrum(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """r99 and the stable rank."""
    squares = torch.linalg.svdvals(b.double() - a.double()) ** 2
    rank = int((squares.cumsum(0) < 0.99 * squares.sum()).sum()) + 1
    return rank, float(squares.sum() / squares[0])


def merged(
    shape: tuple[int, int], rank: int, dtype: torch.dtype = torch.float16, size: float = 0.05, decay: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and one that a LoRA was merged into: so large beside it.

    Each direction is `decay` times as large as the next.
    """
    torch.manual_seed(rank + shape[0])
    base = (0.02 * torch.randn(shape)).to(dtype)
    left, right = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
    change = (left * decay ** -torch.arange(rank)) @ right
    return base, (base.float() + change * (size * base.float().norm() / change.norm())).to(dtype)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[SingularValues]:
    """The decompositions that were made after the first pass."""
    made: list[SingularValues] = []
    fill = SingularValues.fill

    def counted(self: SingularValues, *arguments: object) -> None:
        made.append(self)
        fill(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SingularValues, "fill", counted)
    return made


@pytest.mark.parametrize(
    ("shape", "rank", "dtype"),
    [
        ((1024, 512), 1, torch.float16),
        ((512, 1024), 16, torch.float16),
        ((640, 640), 16, torch.bfloat16),
        ((640, 512), 64, torch.float16),
        ((2048, 512), 16, torch.float32),
        ((3000, 700), 32, torch.float64),
        ((512, 1200), 8, torch.bfloat16),
        ((16, 4000), 2, torch.float16),
        ((4000, 16), 2, torch.float16),
        ((16, 16), 1, torch.float16),
    ],
)
def test_a_merged_lora_has_its_rank_after_one_pass(
    passes: list[SingularValues], shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    a, b = merged(shape, rank, dtype)
    change, (right, stable) = found(a, b), spectrum(a, b)
    assert (change.kind, change.rank) == ("low-rank", right)
    assert change.stable_rank == pytest.approx(stable, rel=0.01)
    assert right <= rank
    assert not passes


@pytest.mark.parametrize("decay", [1.0, 1.1, 1.3])
@pytest.mark.parametrize("size", [0.02, 0.025, 0.03])
def test_a_rank_that_rounding_blurs_is_what_further_passes_find(size: float, decay: float) -> None:
    """In bfloat16 rounding holds from a third of a per cent to one of such changes."""
    a, b = merged((1024, 768), 16, torch.bfloat16, size, decay)
    change, (right, stable) = found(a, b), spectrum(a, b)
    if right > 768 // 8:
        assert change.kind == "broad"
    else:
        assert change.rank in (right, right + 1)  # a basis holds a little less than the best
        assert change.stable_rank == pytest.approx(stable, rel=0.01)


@pytest.mark.parametrize(("shape", "rank"), [((512, 1024), 72), ((128, 128), 20), ((1024, 1024), 200)])
def test_a_rank_above_the_bound_is_broad(shape: tuple[int, int], rank: int) -> None:
    change = found(*merged(shape, rank))
    assert (change.kind, change.rank) == ("broad", None)


def test_a_lora_on_some_rows_is_found_wherever_they_lie(passes: list[SingularValues]) -> None:
    a, b = merged((6000, 512), 8)
    for rows in (slice(0, 1000), slice(2500, 3500), slice(5000, 6000)):
        part = a.clone()
        part[rows] = b[rows]
        change = found(a, part)
        assert (change.kind, change.rank, change.changed_rows) == ("low-rank", spectrum(a, part)[0], 1000)
    assert not passes


def test_parts_with_a_lora_each_have_the_rank_of_all(passes: list[SingularValues]) -> None:
    """As q, k and v in one matrix: the first rows show a third of the rank."""
    a, b = (torch.cat(parts) for parts in zip(*(merged((2048 + i, 1024), 20) for i in range(3)), strict=True))
    change = found(a, b)
    assert (change.kind, change.rank) == ("low-rank", spectrum(a, b)[0])
    assert (change.rank or 0) > 50
    assert passes


def test_rows_that_are_changed_in_another_way_are_not_hidden_by_the_first() -> None:
    a, b = merged((8192, 512), 4)
    b[6000:] = a[6000:] + 0.001 * torch.randn(2192, 512).half()
    assert found(a, b).kind == "broad"
