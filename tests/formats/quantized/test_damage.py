"""Checkpoints of every format, damaged by rule: each ends in one sentence, or in the right numbers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from number_formats import NAMES, given, golden, looked_up, shapes
from support import evaluate, evaluate_all

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import WeightopsError
from weightops.formats.quantized.table import find_weights
from weightops.lazy import LazyTensor
from weightops.operations.dequantize import dequantize
from weightops.spec import DType

WEIGHT = "model.layers.0.mlp.down_proj"
MAGNITUDES = ("scale", "absmax", "nested_absmax", "global_scale", "scale_2", "scales")
"""Parts that are above zero where a format has no signed scales."""
SIGNED = ("awq", "mlx", "hqq", "quanto")
METHODS = (
    *("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "awq", "gptq", "bitsandbytes", "mxfp4", "hqq", "torchao"),
    *("quanto", "auto-round", "mlx", "eetq", "higgs", "unheard-of"),
)
WRONG_TYPES = (None, "x", -1, 3, 7.5, True, [0, 0], {"": []})
Damage = tuple[str, Checkpoint]


@cache
def right(name: str) -> Mapping[str, LazyTensor]:
    return plain(golden(name))


def plain(source: Checkpoint) -> Mapping[str, LazyTensor]:
    """Every tensor of the plain checkpoint; weights in float32."""
    with looked_up():
        return dequantize(source, dtype=DType.F32, evaluate=evaluate_all).tensors


def same(left: Mapping[str, LazyTensor], right: Mapping[str, LazyTensor]) -> bool:
    """Whether tensors have the same names, types, shapes and numbers, which those that are computed alike have."""
    return left.keys() == right.keys() and all(
        t == right[n] or (t.spec == right[n].spec and evaluate(t) == evaluate(right[n])) for n, t in left.items()
    )


@cache
def parts(name: str) -> Mapping[str, str]:
    """The tensors of one weight by role."""
    found = find_weights(golden(name), evaluate_all, shape_of=shapes(name))
    return next(w for n, w in found.weights.items() if n.startswith(WEIGHT) or "experts" in n).parts


def follows(label: str, expected: Mapping[str, LazyTensor], found: Mapping[str, LazyTensor]) -> bool:
    """Whether numbers are those of a weight to which the same was done: its codes show no other shape.

    Of codes that share words, or of several to a byte, a column less may be several of the weight.
    """
    name = next(n for n in expected if n.startswith(WEIGHT) or n.endswith("experts.down_proj"))
    before, after = expected[name].numpy(), found[name].numpy()
    columns = after.shape[-1]
    made = {
        "a row more": lambda: np.concatenate([before, before[-1:]]),
        "a row less": lambda: before[:-1],
        "doubled": lambda: np.concatenate([before, before]),
        "transposed": lambda: before.T,
        "with a dimension more": lambda: before[None],
        "a column less": lambda: before[:, : max(columns, before.shape[1] - 2)],
    }
    same_damage = next((make() for how, make in made.items() if label.endswith(how)), None)
    others = all(t == found[n] for n, t in expected.items() if n != name)
    return same_damage is not None and others and np.array_equal(same_damage, after)


def check(name: str, damages: Iterator[Damage]) -> None:
    """Each ends in the numbers of the undamaged checkpoint, or in a sentence that says what is wrong."""
    silent, unclear = [], []
    for label, source in damages:
        try:
            found = plain(source)
            is_right = same(found, right(name)) or follows(label, right(name), found)
        except WeightopsError as error:
            told = str(error)
            if not error.hint or "\n" in told or not ("layers.0.mlp" in told or "json" in told):
                unclear.append((label, told, error.hint))
            continue
        if not is_right:
            silent.append(label)
    assert (silent, unclear) == ([], [])


def with_tensors(source: Checkpoint, **changes: LazyTensor | None) -> Checkpoint:
    tensors = {n: changes.get(n, t) for n, t in source.items()}
    return replace(source, tensors={n: t for n, t in tensors.items() if t is not None})


def reshapes(tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """The tensor in shapes that are not its own."""
    dtype, shape, data = tensor.spec.dtype, tensor.spec.shape, bytes(evaluate(tensor))
    if shape:
        row = len(data) // shape[0]
        yield "a row more", given(dtype, (shape[0] + 1, *shape[1:]), data + data[-row:])
        yield "a row less", given(dtype, (shape[0] - 1, *shape[1:]), data[:-row])
        yield "doubled", given(dtype, (2 * shape[0], *shape[1:]), data + data)
    yield "empty", given(dtype, (0, *shape[1:]), b"")
    yield "without columns", given(dtype, (*shape[:-1], 0), b"")
    words = np.frombuffer(data, f"V{dtype.itemsize}").reshape(shape)
    if len(shape) > 1 and shape[-1] > 1:
        yield "a column less", given(dtype, (*shape[:-1], shape[-1] - 1), words[..., :-1].tobytes())
    if len(shape) > 1 and shape != shape[::-1]:
        yield "transposed", given(dtype, shape[::-1], words.T.tobytes())
    yield "in one row", given(dtype, (math.prod(shape),), data)
    yield "with a dimension more", given(dtype, (1, *shape), data)


def retypes(tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """The same numbers in another type, and the same bytes as one that no number of theirs has."""
    dtype, shape, data = tensor.spec.dtype, tensor.spec.shape, bytes(evaluate(tensor))
    if dtype in (DType.BF16, DType.F16, DType.F32):
        values = tensor.numpy().astype(np.float32)
        yield "in float32", given(DType.F32, shape, values.tobytes())
        yield "in float64", given(DType.F64, shape, values.astype(np.float64).tobytes())
        yield "in int32", given(DType.I32, shape, values.astype(np.int32).tobytes())
        yield "in bool", given(DType.BOOL, shape, (values != 0).tobytes())
    elif not dtype.is_float:
        values = tensor.numpy()
        for to in (DType.I64, DType.I32, DType.I16, DType.F32, DType.F16, DType.F64):
            if to is not dtype:
                with np.errstate(over="ignore"):
                    yield f"in {to.value}", given(to, shape, values.astype(to.value).tobytes())
    for other in (DType.I32, DType.U32, DType.I16, DType.U8, DType.I8, DType.BOOL, DType.F32):
        if other is not dtype and other.itemsize == dtype.itemsize:
            yield f"seen as {other.value}", given(other, shape, data)


def values(tensor: LazyTensor, role: str, is_signed: bool) -> Iterator[tuple[str, LazyTensor]]:
    """The tensor with a number that no weight can be had of."""
    dtype = tensor.spec.dtype
    nan = {DType.F32: 0x7FC00000, DType.BF16: 0x7FC0, DType.F16: 0x7E00, DType.F8_E4M3: 0x7F}.get(dtype)
    if nan is None or role in ("weight", "compressed"):
        return
    for label, word in (("NaN", nan), ("negative", 1 << dtype.bits - 1 | 1 << dtype.bits - 3)):
        if label == "NaN" or (role in MAGNITUDES and not is_signed):
            words = np.frombuffer(bytearray(evaluate(tensor)), f"u{dtype.itemsize}")
            words[-1] = word
            yield f"with {label} last", given(dtype, tensor.spec.shape, words.tobytes())


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_are_not_there_or_not_what_they_were(name: str) -> None:
    source = golden(name)

    def damages() -> Iterator[Damage]:
        for role, part in parts(name).items():
            tensor = source[part]
            yield f"no {part}", with_tensors(source, **{part: None})
            made = [*reshapes(tensor), *retypes(tensor), *values(tensor, role, name.startswith(SIGNED))]
            for label, changed in made:
                yield f"{part} {label}", with_tensors(source, **{part: changed})

    check(name, damages())


@pytest.mark.parametrize("name", NAMES)
def test_plain_weights_among_what_is_left_of_quantised_ones(name: str) -> None:
    source = golden(name)
    found = find_weights(source, evaluate_all, shape_of=shapes(name))
    weight = next(w for w in found.weights.values() if w.parts == parts(name))
    plain = weight.in_dtype(DType.F32)
    dense = {weight.name: given(DType.F32, plain.spec.shape, evaluate(plain))}

    def damages() -> Iterator[Damage]:
        if weight.name not in weight.parts.values():
            yield "there twice", replace(source, tensors={**source, **dense})
        for role, part in weight.parts.items():
            left = {n: t for n, t in source.items() if n not in weight.parts.values() or n == part}
            if part != weight.name:
                yield f"plain beside its {role}", replace(source, tensors={**left, **dense})
        for size in range(2, len(weight.parts)):
            kept = list(weight.parts.values())[-size:]
            left = {n: t for n, t in source.items() if n not in weight.parts.values() or n in kept}
            yield f"plain beside {kept}", replace(source, tensors={**left, **dense})
        everything = {w.name: w.in_dtype(DType.F32) for w in found.weights.values()}
        yield "all plain", replace(source, tensors={"model.norm.weight": source["model.norm.weight"], **everything})

    check(name, damages())


def config_of(source: Checkpoint) -> tuple[str, dict[str, Any], list[str]]:
    """The file that says how a checkpoint is quantised, its document, and where in it that is."""
    if "quanto_qmap.json" in source.sidecars:
        return "quanto_qmap.json", json.loads(source.sidecar("quanto_qmap.json") or b""), []
    return "config.json", source.config(), [k for k in ("quantization", "quantization_config") if k in source.config()]


def paths(document: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(document, dict):
        for key, value in document.items():
            yield (*at, key)
            yield from paths(value, (*at, key))


def edited(source: Checkpoint, edit: Callable[[dict[str, Any]], object]) -> Checkpoint:
    file, document, keys = config_of(source)
    made = copy.deepcopy(document)
    for settings in [made[key] for key in keys] or [made]:
        edit(settings)
    return replace(source, sidecars={**source.sidecars, file: written_json(made)})


def put(path: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], object]:
    """Puts a value, or nothing for ..., in its place."""

    def edit(settings: dict[str, Any]) -> None:
        for key in path[:-1]:
            settings = settings[key]
        settings.pop(path[-1], None)
        if value is not ...:
            settings[path[-1]] = value

    return edit


@pytest.mark.parametrize("name", NAMES)
def test_configurations_that_are_wrong_or_say_less(name: str) -> None:
    source = golden(name)
    _, document, keys = config_of(source)
    settings = document[keys[0]] if keys else {}

    def damages() -> Iterator[Damage]:
        for method in METHODS:
            if settings and method != settings.get("quant_method"):
                yield f"quant_method {method}", edited(source, put(("quant_method",), method))
        for path in paths(settings):
            for value in (..., *WRONG_TYPES):
                yield f"{'.'.join(path)} = {value}", edited(source, put(path, value))

    check(name, damages())
