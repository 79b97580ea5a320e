"""Weights of every format in parts: any bytes of one, asked for alone, are those of the whole, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from number_formats import NAMES, given, golden, shapes
from support import evaluate_all

from weightops.checkpoint import Checkpoint, written_json
from weightops.formats.quantized.table import find_weights
from weightops.formats.quantized.weights import QuantizedWeight
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.numbers.affine import DTYPES
from weightops.ops.rows import Repeat
from weightops.spec import DType

Parts = Mapping[str, tuple[DType, tuple[int, ...]] | np.ndarray]
Draw = Callable[[st.SearchStrategy[int]], int]
SCALES = {DType.F16: 0x2800, DType.BF16: 0x3C00, DType.F32: 0x3C000000}
"""By type, the bits of a scale to which random ones are added."""


def filled(dtype: DType, shape: tuple[int, ...], seed: int) -> LazyTensor:
    """A tensor of random bits, or of numbers near a hundredth where it is of scales."""
    random = np.random.default_rng(seed)
    spec = given(dtype, shape, b"").spec
    if dtype in SCALES:
        small = random.integers(0, 1 << 8, shape).astype(f"u{dtype.itemsize}")
        return given(dtype, shape, (small + SCALES[dtype]).tobytes())
    if dtype is DType.F8_E4M3:  # no NaN, nothing negative
        return given(dtype, shape, random.integers(1, 0x70, spec.nbytes).astype(np.uint8).tobytes())
    return given(dtype, shape, random.bytes(spec.nbytes))


def weight(parts: Parts, config: Mapping[str, object], shape: tuple[int, ...], seed: int) -> QuantizedWeight:
    """The one weight that is made of `parts`."""
    names = {DType.I32: np.int32, DType.I64: np.int64, DType.U8: np.uint8}
    tensors = {}
    for i, (name, part) in enumerate(parts.items()):
        if isinstance(part, np.ndarray):
            dtype = next(d for d, kind in names.items() if part.dtype == kind)
            tensors[f"m.{name}"] = given(dtype, part.shape, part.tobytes())
        else:
            tensors[f"m.{name}"] = filled(*part, seed + i)
    source = Checkpoint("made", tensors, {"config.json": written_json(config)})
    (found,) = find_weights(source, evaluate_all, shape_of=lambda name: shape).weights.values()
    return found


def packed(draw: Draw, seed: int) -> QuantizedWeight:
    """compressed-tensors: any bits and packing, groups with a tail, zero points, g_idx."""
    bits, rows, columns = draw(st.integers(2, 8)), draw(st.integers(1, 40)), draw(st.integers(1, 150))
    size = draw(st.sampled_from([0, 8, 32]))
    groups = -(-columns // size) if size else 1
    is_padded, has_zeros, has_index = (bool(draw(st.integers(0, 1))) for _ in range(3))
    count = (lambda n: -(-n // (32 // bits))) if is_padded else (lambda n: -(-n * bits // 32))
    dtype = draw(st.sampled_from([DType.F16, DType.BF16, DType.F32]))  # type: ignore[arg-type]
    parts: dict[str, tuple[DType, tuple[int, ...]] | np.ndarray] = {
        "weight_packed": (DType.I32, (rows, count(columns))),
        "weight_scale": (dtype, (rows, groups)),  # type: ignore[dict-item]
        "weight_shape": np.array([rows, columns], np.int64),
    }
    if has_zeros:
        parts["weight_zero_point"] = (DType.I32, (count(rows), groups))
    if has_index:
        parts["weight_g_idx"] = np.random.default_rng(seed).integers(0, groups, columns, dtype=np.int32)
    weights = {"num_bits": bits, "group_size": size or None, "symmetric": not has_zeros}
    about = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}, "quant_method": "compressed-tensors"}
    version = "0.12.2" if is_padded else "0.20.0"
    return weight(parts, {"quantization_config": {**about, "version": version}}, (rows, columns), seed)


def blocks(draw: Draw, seed: int) -> QuantizedWeight:
    """FP8 in blocks whose last rows and columns are fewer, of one matrix or of experts."""
    rows, columns = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    height, width = draw(st.sampled_from([1, 64, 128])), draw(st.sampled_from([32, 128]))
    batch = (3,) if draw(st.integers(0, 1)) else ()
    grid = (*batch, -(-rows // height), -(-columns // width))
    about = {"quant_method": "fp8", "weight_block_size": [height, width]}
    parts: Parts = {"weight": (DType.F8_E4M3, (*batch, rows, columns)), "weight_scale_inv": (DType.F32, grid)}
    return weight(parts, {"quantization_config": about}, (), seed)


def through_rows(draw: Draw, seed: int) -> QuantizedWeight:
    """bitsandbytes: blocks that go on from row to row, whose scales may be quantised too."""
    rows, columns, size = draw(st.integers(1, 40)), draw(st.integers(1, 90)), draw(st.sampled_from([64, 128]))
    count = rows * columns
    groups = -(-count // size)
    state = {"blocksize": size, "shape": [rows, columns], "dtype": "bfloat16", "quant_type": "nf4"}
    nested: Parts = {}
    if draw(st.integers(0, 1)):
        state |= {"nested_blocksize": 256, "nested_offset": -0.5}
        nested = {
            "weight.nested_absmax": (DType.F32, (-(-groups // 256),)),
            "weight.nested_quant_map": (DType.F32, (256,)),
        }
    parts: Parts = {
        "weight": (DType.U8, (-(-count // 2), 1)),
        "weight.absmax": (DType.U8 if nested else DType.F32, (groups,)),
        "weight.quant_map": (DType.F32, (16,)),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
        **nested,
    }
    return weight(parts, {"quantization_config": {"quant_method": "bitsandbytes"}}, (), seed)


def planes(draw: Draw, seed: int) -> QuantizedWeight:
    """HQQ: groups along either axis, in planes."""
    bits, size = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([8, 24]))
    rows, columns, axis = 8 * draw(st.integers(1, 6)), size * draw(st.integers(1, 6)), draw(st.integers(0, 1))
    if axis == 0:
        rows, columns = columns, rows
    groups = rows * columns // size
    height, width = (groups, size) if axis else (size, groups)
    per_word = {3: 10, 8: 1}.get(bits, 8 // bits)
    word = DType.I32 if bits == 3 else DType.U8
    parts: Parts = {
        "W_q": (word, (-(-height // per_word), width)),
        "scale": (DType.BF16, (height, 1) if axis else (1, width)),
        "zero": (DType.BF16, (height, 1) if axis else (1, width)),
        "shape": np.array([rows, columns], np.int64),
        "nbits": np.array(bits, np.int32),
        "axis": np.array(axis, np.int32),
    }
    return weight(parts, {"quantization_config": {"quant_method": "hqq"}}, (), seed)


def stream(draw: Draw, seed: int) -> QuantizedWeight:
    """MLX: rows of codes of any bits, with two roundings."""
    bits, size = draw(st.sampled_from([2, 3, 4, 5, 6, 8])), draw(st.sampled_from([32, 64]))
    rows, groups = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([DType.F16, DType.BF16, DType.F32]))  # type: ignore[arg-type]
    parts: Parts = {
        "weight": (DType.U32, (rows, groups * size * bits // 32)),
        "scales": (dtype, (rows, groups)),  # type: ignore[dict-item]
        "biases": (dtype, (rows, groups)),  # type: ignore[dict-item]
    }
    return weight(parts, {"quantization": {"bits": bits, "group_size": size}}, (), seed)


def awq(draw: Draw, seed: int) -> QuantizedWeight:
    """AWQ in each of its layouts."""
    size, groups, outputs = draw(st.sampled_from([32, 64, 128])), draw(st.integers(1, 3)), 8 * draw(st.integers(1, 9))
    layout = draw(st.integers(0, 2))
    columns = size * groups * (2 if layout == 2 and size == 32 else 1)
    groups = columns // size
    step = 8 * {64: 2, 32: 4}.get(size, 1)
    room = step * -(-groups // step)
    made: Parts
    match layout:
        case 0:
            made = {
                "qweight": (DType.I32, (columns, outputs // 8)),
                "qzeros": (DType.I32, (groups, outputs // 8)),
                "scales": (DType.F16, (groups, outputs)),
            }
        case 1:
            made = {
                "qweight": (DType.I32, (outputs, columns // 8)),
                "qzeros": (DType.I32, (outputs, room // 8)),
                "scales": (DType.F16, (outputs, room)),
            }
        case _:
            made = {
                "qweight": (DType.I16, (outputs // 4, columns)),
                "qzeros": (DType.F16, (room, outputs)),
                "scales": (DType.F16, (room, outputs)),
            }
    about = {"quant_method": "awq", "bits": 4, "group_size": size}
    return weight(made, {"quantization_config": about}, (), seed)


def small_floats(draw: Draw, seed: int) -> QuantizedWeight:
    """NVFP4 with a tail, and the experts of gpt-oss, which are transposed."""
    rows, groups = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    if draw(st.integers(0, 1)):
        exponents = np.random.default_rng(seed).integers(100, 130, (2, rows, groups)).astype(np.uint8)
        parts: Parts = {"down_blocks": (DType.U8, (2, rows, groups, 16)), "down_scales": exponents}
        return weight(parts, {"quantization_config": {"quant_method": "mxfp4"}}, (), seed)
    width = 8 * groups - draw(st.integers(0, 7))
    parts = {
        "weight": (DType.U8, (rows, width)),
        "weight_scale": (DType.F8_E4M3, (rows, groups)),
        "weight_scale_2": (DType.F32, ()),
    }
    return weight(parts, {"quantization_config": {"quant_method": "modelopt"}}, (), seed)


def check_parts(tensor: LazyTensor, seed: int) -> None:
    """Some ranges of bytes, evaluated alone and one after another, against all at once."""
    whole, random = bytes(tensor.read()), np.random.default_rng(seed)
    row = tensor.spec.row_nbytes
    ends = np.sort(random.integers(0, len(whole) + 1, (6, 2)), axis=1).tolist()
    ends += [[0, 1], [len(whole) - 1, len(whole)], [row - 1, min(row + 1, len(whole))]]
    with Evaluator() as read:
        for start, stop in ends:
            out = bytearray(stop - start)
            read(tensor, start, memoryview(out))
            assert out == whole[start:stop], (start, stop)


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_of_the_goldens(name: str) -> None:
    for seed, found in enumerate(find_weights(golden(name), evaluate_all, shape_of=shapes(name)).weights.values()):
        for dtype in DTYPES:
            check_parts(found.in_dtype(dtype), seed)
        check_parts(found.steps(), seed)


KINDS = [packed, blocks, through_rows, planes, stream, awq, small_floats]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None)
@drawn(st.data(), st.integers(0, 1 << 20))
def test_any_bytes_of_any_shape(kind: Callable[[Draw, int], QuantizedWeight], data: st.DataObject, seed: int) -> None:
    found = kind(data.draw, seed)
    check_parts(found.in_dtype(data.draw(st.sampled_from(DTYPES))), seed)


LARGE = 2048, 8192


def repeated(dtype: DType, shape: tuple[int, ...], *, scales: bool = False) -> LazyTensor:
    """A large tensor that takes no memory."""
    one = {DType.F16: b"\x00\x3c", DType.BF16: b"\x80\x3f", DType.F32: b"\x00\x00\x80\x3f", DType.U8: b"\x7f"}[dtype]
    return LazyTensor.make(Repeat(dtype, shape, one if scales else bytes(dtype.itemsize)))


def test_large_weights_take_little_memory() -> None:
    """64 MiB of weights in blocks of one: what is held beside them does not grow with the rows."""
    rows, columns = LARGE
    text = json.dumps({"blocksize": 64, "shape": [rows, columns], "dtype": "float16"}).encode()
    sources = {
        "mlx": {
            "weight": LazyTensor.make(Repeat(DType.U32, (rows, columns // 32 * 5), bytes(4))),
            "scales": repeated(DType.F16, (rows, columns // 64), scales=True),
            "biases": repeated(DType.F16, (rows, columns // 64)),
        },
        "bitsandbytes": {
            "weight": LazyTensor.make(Repeat(DType.U8, (rows * columns // 2, 1), bytes(1))),
            "weight.absmax": repeated(DType.F32, (rows * columns // 64,), scales=True),
            "weight.quant_map": given(DType.F32, (16,), np.arange(16, dtype=np.float32).tobytes()),
            "weight.quant_state.bitsandbytes__nf4": given(DType.U8, (len(text),), text),
        },
        "fp8": {
            "weight": LazyTensor.make(Repeat(DType.F8_E4M3, (rows, columns), b"\x38")),
            "weight_scale_inv": repeated(DType.F32, (rows // 128, columns // 128), scales=True),
        },
        "mxfp4": {
            "w_blocks": LazyTensor.make(Repeat(DType.U8, (4, rows // 4, columns // 32, 16), bytes(1))),
            "w_scales": repeated(DType.U8, (4, rows // 4, columns // 32), scales=True),
        },
    }
    for method, parts in sources.items():
        about = {"quantization_config": {"quant_method": method, "bits": 5, "group_size": 64}}
        tensors = {f"m.{name}": tensor for name, tensor in parts.items()}
        (found,) = find_weights(
            Checkpoint("large", tensors, {"config.json": written_json(about)}), evaluate_all
        ).weights.values()
        tensor = found.in_dtype(DType.F16)
        assert tensor.spec.numel == rows * columns
        tracemalloc.start()
        with Evaluator() as read:
            for _ in read.drain(tensor, 1 << 20):
                pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20, (method, peak)
