"""Ops against torch on the whole tensor: the same bits however the blocks fall."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from support import evaluate, given_tensor, random_tensor, to_bytes, torch_dtype

from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.io.source_file import SourceFile
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops import rows
from weightops.ops.elementwise import Add, Reinterpret, Subtract, Xor, cast, has_arithmetic
from weightops.ops.measures.witness import Witness, witness
from weightops.ops.rows import Fit, Given, Repeat, extend_by_mean, fit
from weightops.ops.stored import Checked, Stored, view
from weightops.spec import DType, TensorSpec

FLOATS = [DType.F16, DType.BF16, DType.F32, DType.F64]
ARITHMETIC = [d for d in DType if has_arithmetic(d) and not d.is_packed]
CASTABLE = [*FLOATS, DType.F8_E4M3, DType.F8_E5M2]


def source(path: Path) -> SourceFile:
    status = path.stat()
    return SourceFile(str(path), status.st_size, status.st_mtime_ns)


@given(st.sampled_from(ARITHMETIC), st.integers(0, 2**32), st.integers(100, 9000))
def test_add_and_subtract_are_those_of_torch(dtype: DType, seed: int, block: int) -> None:
    a, b = random_tensor(dtype, (50, 70), seed), random_tensor(dtype, (50, 70), seed + 1)
    x, y = given_tensor(a, dtype), given_tensor(b, dtype)
    assert evaluate(LazyTensor.make(Add(), x, y), block) == to_bytes(a.clone().add_(b))
    assert evaluate(LazyTensor.make(Subtract(), x, y), block) == to_bytes(a.clone().sub_(b))


@given(st.sampled_from(CASTABLE), st.sampled_from(CASTABLE), st.integers(0, 2**32), st.integers(100, 9000))
def test_cast_is_that_of_torch(old: DType, new: DType, seed: int, block: int) -> None:
    tensor = random_tensor(old, (50, 70), seed)
    expected = to_bytes(tensor.to(torch_dtype(new)))
    assert evaluate(cast(given_tensor(tensor, old), new), block) == expected


@given(st.integers(0, 2**32), st.integers(1, 50))
def test_xor_twice_gives_back_the_bits(seed: int, block: int) -> None:
    a, b = random_tensor(DType.F16, (9, 5), seed), random_tensor(DType.F16, (9, 5), seed + 1)
    x, y = given_tensor(a, DType.F16), given_tensor(b, DType.F16)
    mixed = LazyTensor.make(Xor(), x, y)
    assert evaluate(LazyTensor.make(Xor(), mixed, y), block) == to_bytes(a)


@pytest.mark.parametrize("shape", [(9, 4), (3, 4), (6, 2), (6, 7), (9, 7), (2, 2), (0, 4)])
@pytest.mark.parametrize("block", [1, 8, 24, 1000])
def test_fit_takes_the_top_left_block(shape: tuple[int, int], block: int) -> None:
    tensor = random_tensor(DType.F16, (6, 4), 1)
    expected = torch.full(shape, 1.5, dtype=torch.float16)
    kept = (slice(min(6, shape[0])), slice(min(4, shape[1])))
    expected[kept] = tensor[kept]
    assert evaluate(fit(given_tensor(tensor, DType.F16), shape, struct.pack("<e", 1.5)), block) == to_bytes(expected)


@pytest.mark.parametrize("dtype", [DType.F16, DType.F32, DType.BF16])
def test_mean_row_has_the_bits_of_torch_on_the_whole(dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = (torch.randn(3000, 320, generator=torch.Generator().manual_seed(3)) * 0.02).to(torch_dtype(dtype))
    expected = torch.cat([tensor, tensor.mean(dim=0, keepdim=True).expand(2, -1)])
    monkeypatch.setattr(rows, "_SLAB_NBYTES", 3000 * dtype.itemsize * 70)
    monkeypatch.setattr(rows, "_BLOCK_NBYTES", 320 * dtype.itemsize * 7)
    assert evaluate(extend_by_mean(given_tensor(tensor, dtype), 3002), 100_000) == to_bytes(expected)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    st.integers(0, 5),
    st.integers(1, 64),
)
def test_strided_views_read_as_torch_sees_them(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], random: object, offset: int, block: int
) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)
    storage = torch.arange(math.prod(shape) * 2 + offset, dtype=torch.int16)
    seen = storage[offset : offset + math.prod(shape)].reshape([shape[i] for i in order])
    seen = seen.permute([order.index(i) for i in range(len(shape))])
    path = tmp_path_factory.mktemp("views") / "storage"
    path.write_bytes(to_bytes(storage))
    lazy = view(source(path), offset * 2, DType.I16, tuple(seen.shape), seen.stride())
    assert evaluate(lazy, block) == to_bytes(seen.contiguous())


def test_large_transposed_view_is_gathered_in_pieces(tmp_path: Path) -> None:
    storage = torch.arange(1500 * 700, dtype=torch.int32).reshape(1500, 700)
    path = tmp_path / "storage"
    path.write_bytes(to_bytes(storage))
    lazy = view(source(path), 0, DType.I32, (700, 1500), (1, 700))
    assert evaluate(lazy, 1 << 20) == to_bytes(storage.T.contiguous())


def test_a_transposed_view_behind_dimensions_of_one_is_cut_too(tmp_path: Path) -> None:
    storage = torch.arange(6 * 50, dtype=torch.int16).reshape(6, 50)
    path = tmp_path / "storage"
    path.write_bytes(to_bytes(storage))
    lazy = view(source(path), 0, DType.I16, (1, 1, 50, 6), (0, 0, 1, 50))
    assert lazy.grain == 12
    assert evaluate(lazy, 24) == to_bytes(storage.T.contiguous())


def test_a_member_is_checked_once_for_all_its_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "member"
    path.write_bytes(bytes(range(100)))
    file = source(path)
    check = Checked(zlib.crc32(bytes(range(100))), file, 0, 100)
    views = [LazyTensor.make(check, LazyTensor.make(Stored(file, i, DType.U8, (10,)))) for i in range(5)]
    reads = []
    original = Checked._crc_of_member
    monkeypatch.setattr(Checked, "_crc_of_member", lambda *a: reads.append(1) or original(*a))
    with Evaluator() as read:
        for tensor in views:
            read(tensor, 0, memoryview(bytearray(10)))
    assert len(reads) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_checked_notices_a_wrong_crc(tmp_path: Path, whole: bool) -> None:
    path = tmp_path / "member"
    path.write_bytes(bytes(range(100)))
    file = source(path)
    tensor = LazyTensor.make(Stored(file, 0 if whole else 10, DType.U8, (100 if whole else 20,)))
    checked = LazyTensor.make(Checked(1234, file, 0, 100), tensor)
    with pytest.raises(CorruptInput, match="CRC-32"):
        evaluate(checked, 7)


def test_witness_refuses_other_bytes_and_empty_ones_count() -> None:
    tensor = LazyTensor.make(Given(DType.U8, (3,), b"abc"))
    wrong = LazyTensor.make(Witness("label", "00", "x differs"), tensor)
    with pytest.raises(IncompatibleInputs, match="x differs: expected xxh3_128 00"):
        evaluate(wrong, 2)


def test_ops_refuse_what_they_cannot_do() -> None:
    f8 = LazyTensor.make(Repeat(DType.F8_E4M3, (4,), b"\0"))
    f16 = LazyTensor.make(Repeat(DType.F16, (4,), b"\0\0"))
    with pytest.raises(UsageError, match="float8_e4m3fn has no addition"):
        LazyTensor.make(Add(), f8, f8)
    with pytest.raises(IncompatibleInputs, match="cannot combine"):
        LazyTensor.make(Xor(), f8, f16)
    with pytest.raises(IncompatibleInputs, match="bytes"):
        LazyTensor.make(Reinterpret(DType.U8, (4,)), f16)
    with pytest.raises(IncompatibleInputs, match="cannot fit"):
        LazyTensor.make(Fit((4, 4)), f16, f16)


def test_trees_survive_json() -> None:
    tensor = LazyTensor.make(Repeat(DType.BF16, (4, 2), b"\x80\x3f"))
    grown = cast(extend_by_mean(tensor, 6), DType.F32)
    assert LazyTensor.from_json(grown.to_json()) == grown
    assert grown.spec == TensorSpec(DType.F32, (6, 2))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1), (0, 0, 1, 2), (0, 1)])
def test_a_witness_believes_only_what_passed_in_order(order: tuple[int, ...]) -> None:
    tensor = given_tensor(torch.arange(30, dtype=torch.float32))
    witnessed = witness(tensor, "seen")
    buffer = bytearray(40)
    with Evaluator() as read:
        for i in order:
            read(witnessed, 40 * i, memoryview(buffer))
        digest = xxhash.xxh3_128(evaluate(tensor)).hexdigest()
        in_order = [i for i in range(3) if i in order and all(order.index(j) < order.index(i) for j in range(i))]
        assert read.witnesses == ({"seen": digest} if in_order == [0, 1, 2] else {})
