"""Outputs of solved layers that are kept between the runs of a block: the same numbers, fewer products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from weightops.api.models import quantize
from weightops.quantization import block
from weightops.quantization.kept import Kept

pytestmark = pytest.mark.usefixtures("one_thread")
NBYTES = 3 * 4 * 4
"""Of an output of 3 tokens."""


class Counted(nn.Linear):
    """A layer that counts how often it computes."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.n_computed = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.n_computed += 1
        return super().forward(inputs)


def inputs(seed: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(layer: nn.Linear, kept: Kept, runs: int, batches: int = 2, **last: bool) -> None:
    """Runs over batches, in each of which the layer is called twice; results must be its own."""
    for _ in range(runs):
        for batch in range(batches):
            kept.begin(batch, **last)
            for call in range(2):
                given = inputs(2 * batch + call)
                assert torch.equal(layer(given), nn.functional.linear(given, layer.weight, layer.bias))


@pytest.mark.parametrize(("room", "computed"), [(4 * NBYTES, 4), (3 * NBYTES, 6), (NBYTES - 1, 12), (0, 12)])
def test_what_there_is_room_for_is_computed_once(room: int, computed: int) -> None:
    layer = Counted()
    with Kept(room) as kept:
        kept.add("layer", layer)
        run(layer, kept, runs=3)
        assert layer.n_computed == computed
    run(layer, kept, runs=1)
    assert layer.n_computed == computed + 4


def test_the_last_run_gives_memory_back_and_keeps_nothing_new() -> None:
    layer, other = Counted(), Counted()
    with Kept(4 * NBYTES) as kept:
        kept.add("layer", layer)
        run(layer, kept, runs=1)
        kept.add("other", other)
        run(layer, kept, runs=1, is_last=True)
        run(other, kept, runs=1, is_last=True)
        run(other, kept, runs=1)
        assert (layer.n_computed, other.n_computed) == (4, 8)


@torch.no_grad()
def test_an_output_that_the_block_has_changed_in_place_is_computed_again() -> None:
    layer = Counted()
    with Kept(NBYTES) as kept:
        kept.add("layer", layer)
        for _ in range(3):
            kept.begin(0)
            found = layer(inputs(0))
            assert torch.equal(found, nn.functional.linear(inputs(0), layer.weight, layer.bias))
            found.view(-1)[0] += 1
    assert layer.n_computed == 3


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_the_bytes_do_not_depend_on_the_memory(
    model: Callable[[str], Path], text: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: (computed.append(1), linear(*args))[1])
    given: dict[str, Any] = {"group_size": 32, "samples": 40, "seq_len": 64, "calibration": [text]}
    found = []
    for max_memory in (0, "1100MB", None):
        out = tmp_path / str(max_memory)
        computed.clear()
        quantize(model(kind), out, max_memory=max_memory, **given)
        found.append(((out / "model.safetensors").read_bytes(), len(computed)))
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][1] > 1.4 * found[2][1]


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(0, 30))
def test_hessians_that_fit_are_filled_in_one_run(sizes: Sequence[int], room: int) -> None:
    groups = [[str(size)] for size in sizes]
    chosen = list(block._filled(groups, lambda group: int(group[0]), room))
    assert [group for part in chosen for group in part] == groups
    for part, following in zip(chosen, [*chosen[1:], None], strict=True):
        total = sum(int(group[0]) for group in part)
        assert total <= room or len(part) == 1
        assert following is None or total + int(following[0][0]) > room
