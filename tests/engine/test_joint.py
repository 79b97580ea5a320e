"""Files that are made of the same tensors are written side by side: same bytes, from one read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import digests, given_tensor, write_checkpoint

import weightops
from weightops.engine.joint import common_block, common_nodes, first_read, group, interleave
from weightops.formats.folder import open_checkpoint
from weightops.lazy import LazyTensor
from weightops.operations.recover import recover
from weightops.ops.elementwise import Add, cast
from weightops.recipes.planning import Files
from weightops.spec import DType
from weightops.stores.reader import FileReader


@given(st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=4))
def test_every_sequence_advances_once_per_key_and_equal_heads_meet(sequences: list[list[int]]) -> None:
    steps = interleave(sequences)
    heads = [0] * len(sequences)
    for step in steps:
        assert len({sequences[i][heads[i]] for i in step}) == 1
        for i in step:
            heads[i] += 1
    assert heads == [len(s) for s in sequences]


@given(st.permutations(range(9)), st.lists(st.sets(st.integers(0, 8)), min_size=1, max_size=4))
def test_parts_of_one_order_meet_wherever_they_can(order: list[int], parts: list[set[int]]) -> None:
    sequences = [[key for key in order if key in part] for part in parts]
    assert len(interleave(sequences)) == len(set().union(*parts))


def test_where_orders_cross_one_goes_on_alone() -> None:
    assert interleave([[1, 2, 3], [2, 1, 3]]) == [[0], [0, 1], [1], [0, 1]]


def test_shards_go_along_with_the_one_that_they_share_most_with() -> None:
    a, b, c, d = (given_tensor(torch.full((4,), float(i))) for i in range(4))
    halves = [cast(t, DType.F16) for t in (a, b, c, d)]
    outputs = [[[a], [b], [c, d]], [[halves[0], halves[1]], [halves[2], halves[3]]], [[given_tensor(torch.ones(1))]]]
    # What no file lies behind is told apart as itself, so these share nothing.
    assert group([[[a]], [[halves[0]]]]) == [[(0, 0)], [(1, 0)]]
    assert sorted(p for members in group(outputs) for p in members) == [
        (i, j) for i, shards in enumerate(outputs) for j in range(len(shards))
    ]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    generator = torch.Generator().manual_seed(3)
    shapes = [(700, 333), (64, 1024), (1,), (5000,), (0, 3), (333, 700)]
    names = [f"layers.{i}.{name}" for i in range(12) for name in "qkv"]
    for role in ("raw", "diff"):
        tensors = {n: torch.randn(shapes[i % 6], generator=generator).half() for i, n in enumerate(names)}
        write_checkpoint(folder / role, tensors, shards=2)
    return folder


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    total = 0
    original = FileReader.read_into

    def read_into(self: FileReader, file: object, offset: int, out: memoryview, more: int = 0) -> None:
        nonlocal total
        total += len(out)
        original(self, file, offset, out, more)

    monkeypatch.setattr(FileReader, "read_into", read_into)
    return lambda: total


@pytest.mark.parametrize("sizes", [("2MB", "2MB", "2MB"), ("2MB", "8MB", "100MB"), ("100MB", "100MB", "100MB")])
def test_several_outputs_are_what_they_are_alone_and_are_read_once(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, str, str]
) -> None:
    raw, diff = open_checkpoint(family / "raw"), open_checkpoint(family / "diff")
    base = recover(raw, diff)
    wide = {n: cast(t, DType.F32) for n, t in base.items()}
    short = {n: cast(t, DType.BF16) for n, t in base.items()}
    outputs = {}
    for name, tensors, size in zip("abc", (base.tensors, wide, short), sizes, strict=True):
        checkpoint = type(base)(name, tensors)
        outputs[tmp_path / name] = (checkpoint, Files(max_shard_size=size))
        weightops.save(checkpoint, tmp_path / "alone" / name, max_shard_size=size)
    read = count_reads(monkeypatch)
    weightops.save_all(outputs)
    for out in outputs:
        assert digests(out) == digests(tmp_path / "alone" / out.name)
    # At the ends of shards that do not fall together a few tensors are read twice.
    assert read() <= 1.6 * (raw.nbytes + diff.nbytes)


def test_orders_that_differ_give_the_same_bytes(family: Path, tmp_path: Path) -> None:
    base = recover(open_checkpoint(family / "raw"), open_checkpoint(family / "diff"))
    formats = ("torch", "safetensors", "torch-1.12")
    weightops.save_all({tmp_path / f: (base, Files(format=f, max_shard_size="3MB")) for f in formats})
    for name in formats:
        weightops.save(base, tmp_path / "alone" / name, format=name, max_shard_size="3MB")
        assert digests(tmp_path / name) == digests(tmp_path / "alone" / name)


def test_the_outermost_parts_that_tensors_share_are_kept() -> None:
    a, b = given_tensor(torch.ones(8)), given_tensor(torch.zeros(8))
    total = LazyTensor.make(Add(), a, b)
    half = cast(total, DType.F16)
    assert common_nodes([total, half]) == {total}
    assert common_nodes([half, cast(half, DType.F32)]) == {half}
    assert common_nodes([a, b]) == set()
    assert first_read(half) == half
    assert common_block([total, half]) % 1024 == 0
    assert common_block([total, given_tensor(torch.ones(9))]) == 0
    assert common_block([total]) == 0
