"""The primitives, one by one and composed, against numpy on whole tensors, for any range of bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy
from numpy.typing import NDArray

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.lazy import Evaluator, LazyTensor, read_each
from weightops.operations.edit import edit
from weightops.ops.permute import Permute
from weightops.ops.rows import Given
from weightops.spec import DType

Array = NDArray[Any]
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "hidden_size": 8}


def stored(array: Array) -> LazyTensor:
    return LazyTensor.make(Given(DType(str(array.dtype)), array.shape, array.tobytes()))


def checkpoint(arrays: dict[str, Array], name: str = "model") -> Checkpoint:
    tensors = {n: stored(array) for n, array in arrays.items()}
    return Checkpoint(name, tensors, {"config.json": written_json(CONFIG)})


def edited(arrays: dict[str, Array], *steps: dict[str, Any], **others: dict[str, Array]) -> dict[str, Array]:
    sources = [checkpoint(each, name) for name, each in others.items()]
    made = edit(
        checkpoint(arrays), sources, steps=steps, architecture=False, names=("model", *others), evaluate=read_each
    )
    return {name: tensor.numpy() for name, tensor in made.items()}


def same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def numbers(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class TestOneByOne:
    A, B = numbers(8, 6), numbers(8, 6, seed=1)

    def test_a_rename_and_a_copy(self) -> None:
        arrays = {"a.weight": self.A, "b.weight": self.B}
        same(edited(arrays, {"select": r"(.)\.weight", "name": "x.{1}"}), {"x.a": self.A, "x.b": self.B})
        copied = edited(arrays, {"select": "a.weight", "name": "c", "keep": True})
        same(copied, {"a.weight": self.A, "c": self.A, "b.weight": self.B})

    def test_a_tensor_of_another_source_is_added_or_put_in_the_place_of_one(self) -> None:
        step = {"select": "a", "from": "other", "name": "a", "replace": True}
        same(edited({"a": self.A, "b": self.A}, step, other={"a": self.B}), {"a": self.B, "b": self.A})
        step = {"select": "(.*)", "from": "other", "name": "mtp.{1}"}
        same(edited({"a": self.A}, step, other={"b": self.B}), {"a": self.A, "mtp.b": self.B})

    def test_some_places(self) -> None:
        for taking, expected in (
            ({"list": [5, 0, 0]}, self.A[[5, 0, 0]]),
            ({"axis": 1, "range": [1, 6, 2]}, self.A[:, 1:6:2]),
            ({"axis": -1, "list": [1, 0], "unit": 3}, self.A[:, [3, 4, 5, 0, 1, 2]]),
            ({"list": [1], "unit": "head_dim"}, self.A[2:4]),
        ):
            same(edited({"a": self.A}, {"select": "a", "take": taking}), {"a": expected})

    def test_lists_by_layer(self) -> None:
        arrays = {"l.0": self.A, "l.1": self.B}
        taking = {"by": "n", "list": {"0": [1], "1": [2, 3]}}
        same(edited(arrays, {"select": r"l\.(?P<n>\d)", "take": taking}), {"l.0": self.A[[1]], "l.1": self.B[[2, 3]]})

    def test_pieces_and_the_way_back(self) -> None:
        qkv = numbers(16, 8)
        cutting = {"select": "(?P<p>l)", "split": {"heads": ["q", "k", "v"]}, "name": ["{p}.q", "{p}.k", "{p}.v"]}
        pieces = {"l.q": qkv[:8], "l.k": qkv[8:12], "l.v": qkv[12:]}
        same(edited({"l": qkv}, cutting), pieces)
        back = {"select": r"l\.(?P<x>.)", "concat": {"by": "x", "order": ["q", "k", "v"]}, "name": "l"}
        same(edited(pieces, back), {"l": qkv})
        same(
            edited({"l": qkv}, {"select": "l", "split": {"axis": 1, "parts": 4}, "name": "l.{n}"}),
            {f"l.{n}": qkv[:, 2 * n : 2 * n + 2] for n in range(4)},
        )

    def test_stacks_and_the_way_back(self) -> None:
        arrays = {f"e.{n}": numbers(3, 2, seed=n) for n in (2, 0, 10, 1)} | {
            f"e.{n}": numbers(3, 2) for n in range(3, 10)
        }
        stack = np.stack([arrays[f"e.{n}"] for n in range(11)])
        same(edited(arrays, {"select": r"e\.(?P<n>\d+)", "stack": {"by": "n"}, "name": "e"}), {"e": stack})
        apart = edited({"e": stack}, {"select": "e", "unstack": True, "name": "e.{n}"})
        same(apart, {f"e.{n}": arrays[f"e.{n}"] for n in range(11)})

    def test_dimensions(self) -> None:
        cube = numbers(2, 3, 4)
        same(edited({"a": cube}, {"select": "a", "transpose": True}), {"a": cube.swapaxes(1, 2)})
        same(edited({"a": cube}, {"select": "a", "transpose": [2, 0, 1]}), {"a": cube.transpose(2, 0, 1)})
        same(edited({"a": cube}, {"select": "a", "view": [-1, "head_dim"]}), {"a": cube.reshape(12, 2)})

    def test_constants_and_more_rows(self) -> None:
        same(edited({"a": self.A}, {"select": "a", "fill": {"value": 1}}), {"a": np.ones_like(self.A)})
        bias = {"select": "a", "fill": {"shape": ["hidden"]}, "name": "a.bias", "keep": True}
        same(edited({"a": self.A}, bias), {"a": self.A, "a.bias": np.zeros(8, "float32")})
        for filling, row in (
            ({"rows": 10, "with": "copy:3"}, self.A[3]),
            ({"rows": 10}, np.zeros(6, "float32")),
            ({"rows": 10, "value": 0.5}, np.full(6, 0.5, "float32")),
        ):
            found = edited({"a": self.A}, {"select": "a", "fill": filling})["a"]
            np.testing.assert_array_equal(found, np.vstack([self.A, row, row]))
        np.testing.assert_array_equal(edited({"a": self.A}, {"select": "a", "fill": {"rows": 3}})["a"], self.A[:3])
        grown = edited({"a": self.A}, {"select": "a", "fill": {"rows": 9, "with": "mean"}})["a"]
        np.testing.assert_allclose(grown[8], self.A.mean(0), rtol=1e-6, atol=1e-7)

    def test_arithmetic_is_that_of_float32(self) -> None:
        half = self.A.astype("float16")
        found = edited({"a": half}, {"select": "a", "scale": {"by": 0.3}})["a"]
        np.testing.assert_array_equal(found, (half.astype("float32") * np.float32(0.3)).astype("float16"))
        norm = numbers(6, seed=2, dtype="float16")
        found = edited({"a": half, "n": norm}, {"select": "a", "scale": {"by": "n", "axis": 1, "shift": 1}})["a"]
        wanted = (half.astype("float32") * (norm.astype("float32") + np.float32(1))).astype("float16")
        np.testing.assert_array_equal(found, wanted)
        adding = {"weight": 0.5, "with": [{"from": "other", "weight": 0.25}, {"tensor": "b", "weight": -1}]}
        found = edited({"a": half, "b": half}, {"select": "a", "combine": adding}, other={"a": self.B})["a"]
        wide = half.astype("float32")
        total = wide * np.float32(0.5)
        total += self.B * np.float32(0.25)
        total += wide * np.float32(-1)
        np.testing.assert_array_equal(found, total.astype("float16"))

    def test_a_product_of_factors_is_added_as_merge_lora_adds_it(self) -> None:
        a, b = numbers(2, 6, seed=3), numbers(8, 2, seed=4)
        step = {"select": "(?P<m>w)", "lowrank": {"a": "{m}.A", "b": "{m}.B", "scale": 2.0, "from": "lora"}}
        found = edited({"w": self.A}, step, lora={"w.A": a, "w.B": b})["w"]
        np.testing.assert_allclose(found, self.A + 2 * (b @ a), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("side", ["output", "input"])
    def test_what_is_left_has_no_part_along_a_direction(self, side: str, dtype: str) -> None:
        matrix = numbers(8, 6, dtype=dtype) if side == "output" else numbers(6, 8, dtype=dtype)
        direction = numbers(8, seed=5)
        step = {"select": "w", "project": {"onto": "d", "weight": 1.0}}
        found = edited({"w": matrix}, step, d={"direction": direction})["w"]
        unit = direction.astype("float64") / np.linalg.norm(direction.astype("float64"))
        wide = matrix.astype("float64")
        wanted = wide - np.outer(unit, unit @ wide) if side == "output" else wide - np.outer(wide @ unit, unit)
        np.testing.assert_allclose(found, wanted, atol=2e-3 if dtype == "float16" else 1e-6)

    def test_a_direction_for_each_layer(self) -> None:
        directions = numbers(2, 8, seed=6)
        arrays = {"layers.0.o": numbers(8, 3), "layers.1.o": numbers(8, 3, seed=1)}
        found = edited(arrays, {"select": r"layers\.(?P<i>\d)\.o", "project": {"onto": "d"}}, d={"all": directions})
        for i in range(2):
            assert np.abs(directions[i] @ found[f"layers.{i}.o"]).max() < 1e-5


Steps = tuple[list[dict[str, Any]], Callable[[Array], Array]]
"""Steps that make a tensor `x` of a tensor `x`, and the same by numpy."""


def steps_for(shape: tuple[int, ...], factors: dict[str, Array]) -> SearchStrategy[Steps]:
    """What a tensor of this shape can be put through; `factors` gets what the steps take from another source."""
    axis = st.integers(0, len(shape) - 1)
    count = int(np.prod(shape))

    def taking(at: int) -> SearchStrategy[Steps]:
        places = st.lists(st.integers(0, shape[at] - 1), min_size=1, max_size=5)
        return places.map(lambda chosen: ([{"take": {"axis": at, "list": chosen}}], lambda x: np.take(x, chosen, at)))

    def permuting(axes: list[int]) -> Steps:
        return [{"transpose": axes}], lambda x: np.ascontiguousarray(x.transpose(axes))

    def viewing(size: int) -> Steps:
        return [{"view": [size, -1]}], lambda x: x.reshape(size, -1)

    def scaling(by: float) -> Steps:
        return [{"scale": {"by": by}}], lambda x: x * np.float32(by)

    def growing(rows: int) -> Steps:
        def by_numpy(x: Array) -> Array:
            more = np.full((max(0, rows - len(x)), *x.shape[1:]), 0.5, x.dtype)
            return np.concatenate([x, more])[:rows]

        return [{"fill": {"rows": rows, "value": 0.5}}], by_numpy

    def renaming(name: str) -> Steps:
        there = {"name": f"{{0}}.{name}"}
        return [there, {"select": rf"x\.{name}", "name": "x"}], lambda x: x

    def rejoining(at: int) -> SearchStrategy[Steps]:
        def joined(order: list[int]) -> Steps:
            apart = {"split": {"axis": at, "parts": shape[at]}, "name": "x.{n}"}
            together = {"select": r"x\.(?P<n>\d)", "concat": {"axis": at, "by": "n", "order": [*map(str, order)]}}
            return [apart, {**together, "name": "x"}], lambda x: np.take(x, order, at)

        return st.permutations(range(shape[at])).map(list).map(joined)

    def restacking(order: list[int]) -> Steps:
        together = {"select": r"x\.(?P<n>\d)", "stack": {"by": "n", "order": [*map(str, order)]}, "name": "x"}
        return [{"unstack": True, "name": "x.{n}"}, together], lambda x: x[order]

    def combining(weight: float) -> Steps:
        def by_numpy(x: Array) -> Array:
            total = x * np.float32(weight)
            total += x * np.float32(2)
            return total

        return [{"combine": {"weight": weight, "with": [{"tensor": "{0}", "weight": 2}]}}], by_numpy

    def adding(rank: int) -> Steps:
        name = f"f{len(factors)}"
        # of small integers, so that the product is exact in any order
        a, b = (
            (np.arange(n * m) % 5 - 2).astype("float32").reshape(n, m) for n, m in ((rank, shape[1]), (shape[0], rank))
        )
        factors.update({f"{name}.A": a, f"{name}.B": b})
        step = {"lowrank": {"a": f"{name}.A", "b": f"{name}.B", "scale": 2.0, "from": "factors"}}
        return [step], lambda x: x + np.float32(2) * (b @ a)

    choices = [
        axis.flatmap(taking),
        st.sampled_from([d for d in range(1, count + 1) if count % d == 0]).map(viewing),
        st.sampled_from([0.5, -3.0, 0.1]).map(scaling),
        st.integers(1, min(9, shape[0] + 2)).map(growing),
        st.sampled_from(["a", "b"]).map(renaming),
        st.sampled_from([0.5, -1.5]).map(combining),
    ]
    narrow = [at for at, size in enumerate(shape) if size < 10]
    if narrow:
        choices.append(st.sampled_from(narrow).flatmap(rejoining))
    if 0 in narrow and len(shape) > 1:
        choices.append(st.permutations(range(shape[0])).map(list).map(restacking))
    if len(shape) > 1:
        choices.append(st.permutations(range(len(shape))).map(list).map(permuting))
    if len(shape) == 2:
        choices.append(st.integers(1, 3).map(adding))
    return st.one_of(choices)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_steps_in_any_order_are_those_of_numpy_on_whole_tensors(data: DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    array = data.draw(st.sampled_from([numbers(*shape), numbers(*shape, seed=9)]))
    wanted, steps = array, []
    factors = {"unused": numbers(1)}
    for _ in range(data.draw(st.integers(1, 6))):
        chosen, by_numpy = data.draw(steps_for(wanted.shape, factors))
        steps += [{"select": "x", **step} for step in chosen]
        wanted = by_numpy(wanted)
    others = [checkpoint(factors, "factors")]
    names = ("model", "factors")
    source = checkpoint({"x": array})
    made = edit(source, others, steps=steps, architecture=False, names=names, evaluate=read_each)
    assert list(made) == ["x"]
    assert made["x"].spec.shape == wanted.shape
    whole = wanted.astype("float32").tobytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    buffer = bytearray(stop - start)
    with Evaluator() as evaluate:
        evaluate(made["x"], start, memoryview(buffer))
    assert bytes(buffer) == whole[start:stop]
    assert bytes(made["x"].read()) == whole


def test_dimensions_are_exchanged_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.ops.permute._PIECE_NBYTES", 64)
    array = numbers(7, 5, 6)
    for axes in ((2, 1, 0), (1, 0, 2), (2, 0, 1)):
        tensor = LazyTensor.make(Permute(axes), stored(array))
        assert bytes(tensor.read()) == np.ascontiguousarray(array.transpose(axes)).tobytes()


class TestRefused:
    ARRAYS: ClassVar[Any] = {"a": numbers(8, 6), "b": numbers(6)}

    @pytest.mark.parametrize(
        ("step", "message"),
        [
            ({"select": "c", "name": "d"}, "no tensor's whole name matches c"),
            ({"select": "(a|b)", "name": "x"}, "two results would be named x"),
            ({"select": "a", "name": "b"}, "there is a tensor b already"),
            ({"select": "a", "name": "{nope}"}, "{nope} is no group of select"),
            ({"select": "a"}, "lacks name"),
            ({"select": "a", "scale": {"by": 2}, "drop": True}, "does two things"),
            ({"select": "a", "scal": {"by": 2}}, "unknown field"),
            ({"select": "a", "scale": {"by": [2]}}, "expected"),
            ({"select": "a", "scale": {"by": "zzz"}}, "there is no tensor zzz"),
            ({"select": "a", "scale": {"by": "b"}}, "no number for each place"),
            ({"select": "a", "take": {"list": [8]}}, "there is no place 8"),
            ({"select": "a", "take": {"list": []}}, "nothing would be left"),
            ({"select": "a", "take": {"axis": 2, "list": [0]}}, "has no dimension 2"),
            ({"select": "a", "take": {"list": [0], "unit": 3}}, "no multiple of 3"),
            ({"select": "a", "split": {"parts": 3}, "name": "a.{n}"}, "not 3 equal parts"),
            ({"select": "a", "split": {"sizes": [3, 4]}, "name": "a.{n}"}, "are not the 8"),
            ({"select": "a", "split": {"sizes": [4, 4]}, "name": ["x", "y", "z"]}, "2 pieces have 3 names"),
            ({"select": "a", "view": [5, -1]}, "no shape"),
            ({"select": "a", "view": ["experts"]}, "experts is no size that config.json gives"),
            ({"select": "b", "transpose": True}, "has no rows and columns"),
            ({"select": "(?P<x>a|b)", "stack": {"by": "x", "order": ["a", "b"]}, "name": "s"}, "cannot stack"),
            ({"select": "(?P<x>a|b)", "stack": {"by": "x"}, "name": "s"}, "holds no numbers"),
            ({"select": "a", "fill": {"rows": 9, "with": "copy:8"}}, "new rows cannot be"),
            ({"select": "(", "name": "x"}, "no regular expression"),
            ({"name": "x"}, "lacks select"),
            ({"select": "a", "from": "zzz", "name": "x"}, "there is no source zzz"),
        ],
    )
    def test_a_step_that_cannot_be_done_is_named(self, step: dict[str, Any], message: str) -> None:
        with pytest.raises((UsageError, IncompatibleInputs), match=r"edit: steps\.0.*" + re.escape(message)):
            edited(self.ARRAYS, step)

    @pytest.mark.parametrize("value", [[0.0] * 8, [float("nan")] + [0.0] * 7, [1.0] * 5])
    def test_what_is_no_direction(self, value: list[float]) -> None:
        with pytest.raises(UsageError, match=r"is no direction|the direction has 5 numbers"):
            edited(self.ARRAYS, {"select": "a", "project": {"onto": "d"}}, d={"r": np.array(value, "float32")})

    def test_a_square_matrix_needs_a_side(self) -> None:
        with pytest.raises(UsageError, match="square"):
            edited({"a": numbers(6, 6)}, {"select": "a", "project": {"onto": "d"}}, d={"r": numbers(6)})


def test_what_no_step_selects_keeps_its_digest(tmp_path: Path) -> None:
    source = checkpoint({"a": numbers(3), "b": numbers(2)}).with_digests({"a": "1", "b": "2"})
    made = edit(
        source, steps=[{"select": "a", "scale": {"by": 2}}], architecture=False, names=("m",), evaluate=read_each
    )
    assert made.digests == {"b": "2"}
    moved = edit(source, steps=[{"select": "a", "name": "c"}], architecture=False, names=("m",), evaluate=read_each)
    assert moved.digests == {"c": "1", "b": "2"}


def test_sizes_are_those_of_the_model_that_a_step_selects_in() -> None:
    qkv = numbers(6, 8)
    small = Checkpoint(
        "small", {"l": stored(qkv)}, {"config.json": written_json({**CONFIG, "head_dim": 1, "num_attention_heads": 2})}
    )
    step = {"select": "l", "from": "small", "split": {"heads": ["q", "k", "v"]}, "name": ["q", "k", "v"]}
    source = checkpoint({"a": numbers(2)})
    made = edit(source, [small], steps=[step], architecture=False, names=("model", "small"), evaluate=read_each)
    assert {name: made[name].spec.shape[0] for name in "qkv"} == {"q": 2, "k": 2, "v": 2}
