"""Low-rank changes against torch's own arithmetic on the whole, and float64 against exact fractions."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import evaluate, from_bytes, given_tensor, to_bytes

from weightops.errors import IncompatibleInputs
from weightops.lazy import LazyTensor
from weightops.ops.lora import product
from weightops.ops.lora.dora import merge, sum_in_order
from weightops.ops.lora.factors import Lora, LoraBias, ReplaceRows
from weightops.ops.lora.product import Part, split, to_narrower
from weightops.spec import DType

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = 27 / 16
SHAPES = [(64, 64, 4), (200, 72, 5), (1100, 1000, 16), (2049, 1111, 8), (1536, 896, 16), (385, 4096, 520)]
"""Out, in, rank: whole products, blocks with rests short and long, and a rank that asks for higher blocks."""


def normal(*shape: int, seed: int, sigma: float = 0.1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * sigma


def merged(weight: torch.Tensor, *changes: tuple[torch.Tensor, ...], parts: list[Part], precision: str = "float32"):
    return merge(given_tensor(weight), parts, [given_tensor(t) for change in changes for t in change], precision)


def read(tensor: LazyTensor, block: int | None = None) -> torch.Tensor:
    return from_bytes(evaluate(tensor, block), getattr(torch, tensor.spec.dtype.value), tensor.spec.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_have_the_bits_of_the_whole_product(shape: tuple[int, int, int]) -> None:
    for dtype in DTYPES:
        check_blocks(shape, dtype, (None, 4 << 20, 99_991))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(4096, 4096, 16), (11008, 4096, 64), (4096, 11008, 8), (128256, 512, 16), (50257, 768, 32)]
)
def test_blocks_of_real_layers_have_the_bits_of_the_whole_product(shape: tuple[int, int, int]) -> None:
    check_blocks(shape, torch.bfloat16, (4 << 20,))


def check_blocks(shape: tuple[int, int, int], dtype: torch.dtype, blocks: tuple[int | None, ...]) -> None:
    """Hold every way of merging factors of this shape, read in blocks, against the product of the whole."""
    out, width, rank = shape
    a, b = normal(rank, width, seed=1), normal(out, rank, seed=2)
    delta = (b @ a) * SCALE
    for is_transposed in (False, True):
        change = delta.T if is_transposed else delta
        weight = normal(*change.shape, seed=3, sigma=0.02).to(dtype)
        once = (weight.float() + change).to(dtype)
        twice = weight + change.to(dtype)
        for rounds, expected in ((False, once), (True, twice)):
            lazy = merged(weight, (a, b), parts=[Part(SCALE, is_transposed, rounds)])
            for block in blocks:
                assert torch.equal(read(lazy, block), expected), (dtype, is_transposed, rounds, block)


@pytest.mark.parametrize("exponent", [-11, -1, 1, 9, 100])
@pytest.mark.parametrize("smallest", [2.0**-40, 2.0**-140])
def test_powers_of_two_scale_like_other_numbers(exponent: int, smallest: float) -> None:
    a, b, scale = normal(8, 900, seed=1) * smallest, normal(1300, 8, seed=2), 2.0**exponent
    weight = normal(1300, 900, seed=3) * smallest
    expected = weight + (b @ a) * scale
    assert torch.equal(read(merged(weight, (a, b), parts=[Part(scale)])), expected)


def test_a_chain_rounds_the_weight_each_time() -> None:
    weight = normal(300, 72, seed=0).bfloat16()
    changes = [(normal(r, 72, seed=r), normal(300, r, seed=r + 1)) for r in (4, 8, 2)]
    parts = [Part(0.5), Part(2.0, rounds_change=True), Part(1.0)]
    expected = weight.clone()
    for part, (a, b) in zip(parts, changes, strict=True):
        delta = (b @ a) * part.scale
        expected += delta.bfloat16() if part.rounds_change else delta
    assert torch.equal(read(merged(weight, *changes, parts=parts), 5000), expected)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_stacked_experts_are_those_of_peft(is_transposed: bool) -> None:
    experts, rank, out, width = 3, 4, 400, 2600
    a, b = normal(experts * rank, width, seed=1), normal(out, experts * rank, seed=2)
    equation = "o r e, e r i -> e i o" if is_transposed else "o r e, e r i -> e o i"
    delta = torch.einsum(equation, b.reshape(out, rank, experts), a.reshape(experts, rank, width)) * SCALE
    weight = normal(*delta.shape, seed=3).bfloat16()
    expected = weight + delta.bfloat16()
    part = Part(SCALE, is_transposed, rounds_change=True, experts=experts)
    assert torch.equal(read(merged(weight, (a, b), parts=[part]), 70_001), expected)
    if is_transposed:
        return
    for expert in range(experts):
        for first, stop in ((0, 192), (192, out)):
            alone = Part(SCALE, rounds_change=True, experts=experts, expert=expert, first_row=first)
            lazy = merged(weight[expert, first:stop], (a, b), parts=[alone])
            assert torch.equal(read(lazy, 70_001), expected[expert, first:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dora_scales_rows_to_their_magnitudes(dtype: torch.dtype) -> None:
    weight = normal(1200, 1000, seed=0).to(dtype)
    a, b, magnitude = normal(8, 1000, seed=1), normal(1200, 8, seed=2), normal(1200, seed=3).abs() + 1
    total = weight + (b @ a) * SCALE
    expected = ((magnitude / torch.linalg.norm(total, dim=1)).view(-1, 1) * total).to(dtype)
    lazy = merged(weight, (a, b, magnitude), parts=[Part(SCALE, has_magnitude=True)])
    for block in (None, 2000 * weight.itemsize, 99_991):
        assert torch.equal(read(lazy, block), expected)


# --- float64 ------------------------------------------------------------------------------------------------------


def exact(weight: float, row: torch.Tensor, column: torch.Tensor, scale: float) -> Fraction:
    product = sum((Fraction(x) * Fraction(y) for x, y in zip(row.tolist(), column.tolist(), strict=True)), Fraction(0))
    return Fraction(weight) + product * Fraction(scale)


def test_float64_is_the_exact_result_rounded_once() -> None:
    scale = 0.75
    a, b = normal(5, 9, seed=1), normal(11, 5, seed=2)
    for dtype in DTYPES:
        weight = normal(11, 9, seed=3, sigma=0.02).to(dtype)
        found = read(merged(weight, (a, b), parts=[Part(scale)], precision="float64"))
        for i in range(11):
            for j in range(9):
                value = exact(weight[i, j].item(), b[i], a[:, j], scale)
                error = abs(Fraction(found[i, j].item()) - value)
                neighbours = [
                    torch.nextafter(found[i, j], torch.tensor(s * float("inf"), dtype=dtype)) for s in (1, -1)
                ]
                assert all(error <= abs(Fraction(n.item()) - value) for n in neighbours)


@pytest.mark.parametrize("has_magnitude", [False, True])
def test_float64_does_not_depend_on_threads_or_blocks(has_magnitude: bool) -> None:
    out, width, rank = 1300, 1111, 16
    # spread over many powers of two, so that the order of a plain sum would show
    a, b = (
        normal(*s, seed=i) * torch.exp2(normal(*s, seed=9, sigma=6.0))
        for i, s in ((1, (rank, width)), (2, (out, rank)))
    )
    weight, magnitude = normal(out, width, seed=3).bfloat16(), normal(out, seed=4).abs() + 1
    vector = (magnitude,) if has_magnitude else ()
    lazy = merged(weight, (a, b, *vector), parts=[Part(SCALE, has_magnitude=has_magnitude)], precision="float64")
    digests = set()
    for threads in (1, 8):
        torch.set_num_threads(threads)
        digests |= {hashlib.sha256(evaluate(lazy, block)).hexdigest() for block in (None, 1 << 20, 123_457)}
    assert len(digests) == 1


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12), st.integers(10, 26)
)
def test_slices_add_up_and_their_products_are_exact(values: list[float], bits: int) -> None:
    array = np.array([values], dtype=np.float64)
    slices = split(array, 1, bits)
    rest = array.copy()
    for part in slices:
        unit = 2.0 ** (np.frexp(np.abs(rest).max())[1] - bits) if rest.any() else 1.0
        assert all((x / unit).is_integer() and abs(x / unit) <= 2**bits for x in part[0])
        rest = rest - part
    assert len(slices) == 3 or not rest.any()


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e39, max_value=1e39))
def test_float64_is_rounded_to_half_once(value: float) -> None:
    source = memoryview(bytearray(np.float64(value).tobytes()))
    out = memoryview(bytearray(2))
    to_narrower(out, DType.F16, source, DType.F64)
    with np.errstate(over="ignore"):
        assert bytes(out) == np.float64(value).astype(np.float16).tobytes()  # which numpy rounds once


@given(st.integers(1, 40), st.integers(0, 1))
def test_sums_in_order_are_sums(size: int, axis: int) -> None:
    values = np.arange(3 * size, dtype=np.float64).reshape((3, size) if axis else (size, 3))
    assert np.array_equal(sum_in_order(values.copy(), axis), values.sum(axis=axis))


# --- other ops, and what is refused -------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_rows_are_replaced(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    rows = data.draw(st.lists(st.integers(0, height - 1), unique=True))
    matrix, new = normal(height, width, seed=0), normal(len(rows), width, seed=1)
    lazy = LazyTensor.make(ReplaceRows(tuple(rows)), given_tensor(matrix), given_tensor(new))
    expected = matrix.index_copy(0, torch.tensor(rows, dtype=torch.long), new)
    assert evaluate(lazy, data.draw(st.integers(1, 30))) == to_bytes(expected)


@pytest.mark.parametrize(
    ("rows", "new", "said"),
    [
        ((0, 1), (3, 5), "cannot put .* into 2 rows"),
        ((0, 1), (2, 4), "cannot put .* into 2 rows"),
        ((1, 1), (2, 5), "not different rows"),
        ((0, 4), (2, 5), "not different rows"),
        ((-1, 0), (2, 5), "not different rows"),
    ],
)
def test_rows_that_are_not_there_are_not_replaced(rows: tuple[int, ...], new: tuple[int, int], said: str) -> None:
    with pytest.raises(IncompatibleInputs, match=said):
        LazyTensor.make(ReplaceRows(rows), given_tensor(normal(4, 5, seed=0)), given_tensor(normal(*new, seed=1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_are_added_and_taken_off_in_turn(dtype: torch.dtype) -> None:
    bias, first, second = normal(50, seed=0).to(dtype), normal(50, seed=1), normal(50, seed=2)
    expected = bias.clone()
    for change in (first * 1.7, -(first * 1.7), first * 1.7, second * 0.3):
        expected += change
    lazy = LazyTensor.make(LoraBias((1.7, 0.3), (0, ~0, 0, 1)), *map(given_tensor, (bias, first, second)))
    assert torch.equal(read(lazy, 7), expected)


@pytest.mark.parametrize(
    ("weight", "a", "b", "part"),
    [
        ((6, 4), (2, 4), (5, 2), Part(1.0)),
        ((6, 4), (2, 3), (6, 2), Part(1.0)),
        ((6, 4), (3, 4), (6, 2), Part(1.0)),
        ((6, 4), (0, 4), (6, 0), Part(1.0)),
        ((6, 4), (2, 4), (6, 2), Part(1.0, is_transposed=True)),
        ((6,), (2, 4), (6, 2), Part(1.0)),
        ((3, 6, 4), (2, 4), (6, 2), Part(1.0)),
        ((3, 6, 4), (4, 4), (6, 4), Part(1.0, experts=2)),
        ((6, 4), (4, 4), (6, 4), Part(1.0, experts=2, expert=2)),
        ((6, 4), (4, 4), (6, 4), Part(1.0, experts=2, expert=0, first_row=1)),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], part: Part
) -> None:
    with pytest.raises(IncompatibleInputs, match="do not fit"):
        merged(torch.zeros(weight), (torch.zeros(a), torch.zeros(b)), parts=[part])


def test_ops_go_to_json_and_back() -> None:
    weight, magnitude = normal(6, 4, seed=0), normal(6, seed=1)
    factors = (normal(2, 4, seed=2), normal(6, 2, seed=3))
    for lazy in (
        merged(weight, factors, parts=[Part(0.5)]),
        merged(weight, factors, (*factors, magnitude), parts=[Part(0.5), Part(2.0, has_magnitude=True)]),
    ):
        document = json.loads(json.dumps(lazy.to_json(), default=lambda data: data.hex()))
        assert document["op"] in ("lora", "dora")
        assert LazyTensor.from_json(lazy.to_json()) == lazy


SCRIPT = """
import sys
import numpy as np
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops import libtorch
from weightops.ops.lora.dora import merge
from weightops.ops.lora.product import Part
from weightops.ops.rows import Given
from weightops.spec import DType

random, tensors = np.random.default_rng(0), {}
def tensor(*shape):
    return LazyTensor.make(Given(DType.F32, shape, random.standard_normal(shape, dtype=np.float32).tobytes()))
weight, a, b = tensor(1300, 1100), tensor(16, 1100), tensor(1300, 16)
found = {}
for precision in ("float32", "float64"):
    with Evaluator() as read:
        found[precision] = read.whole(merge(weight, [Part(1.7)], [a, b], precision))
assert libtorch._library() is not None and "torch" not in sys.modules

import torch
torch.set_num_threads(1)
w, x, y = (torch.frombuffer(bytearray(t.op.data), dtype=torch.float32).reshape(t.spec.shape) for t in (weight, a, b))
assert (w + (y @ x) * 1.7).numpy().tobytes() == found["float32"]
assert (w + (y.double() @ x.double()) * 1.7).float().numpy().tobytes() == found["float64"]
print("equal")
"""


def test_the_c_interface_gives_the_bits_of_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize(
    ("size", "is_tame"),
    [
        (0.0, True),
        (2.0**-44, True),
        (2.0**-45, False),
        (1.0, True),
        (2.0**28, True),
        (2.0**29, False),
        (math.nan, False),
    ],
)
def test_sizes_whose_products_a_wider_type_holds_exactly(size: float, is_tame: bool) -> None:
    for sign in (1, -1):
        assert product._is_tame(np.array([0.5, sign * size])) is is_tame


def test_nothing_is_merged_into_other_types() -> None:
    factors = [given_tensor(torch.ones(2, 4)), given_tensor(torch.ones(4, 2))]
    for dtype in (torch.int32, torch.float64, torch.float8_e4m3fn):
        weight = given_tensor(torch.ones(4, 4).to(dtype))
        with pytest.raises(IncompatibleInputs, match="expected float32, float16 or bfloat16"):
            LazyTensor.make(Lora((Part(1.0),)), weight, *factors)
