"""The tree of modules: what is folded, what is told apart, and that no names make it slow or deep."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightops.operations.inspect import Node, make_tree
from weightops.operations.inspect.tree import ranges
from weightops.spec import DType, TensorSpec

F16, F32 = DType.F16, DType.F32


def spec(*shape: int, dtype: DType = F16) -> TensorSpec:
    return TensorSpec(dtype, shape)


def tree(specs: Mapping[str, TensorSpec]) -> tuple[Node, ...]:
    return make_tree(specs, {name: each.numel for name, each in specs.items()})


def shown(specs: Mapping[str, TensorSpec]) -> list[str]:
    lines = []
    for level, node in (row for top in tree(specs) for row in top.walk()):
        only = f" in {' of '.join(node.only)}" if node.only else ""
        lines.append(f"{'  ' * level}{node.label}{only}{f' {node.spec}' if node.spec else ''} {node.parameters}")
    return lines


def layers(count: int, **tensors: TensorSpec) -> dict[str, TensorSpec]:
    return {
        f"model.layers.{i}.{name.replace('_', '.')}.weight": each
        for i in range(count)
        for name, each in tensors.items()
    }


def test_layers_that_are_equal_are_there_once() -> None:
    specs = {"model.embed.weight": spec(9, 2), **layers(12, attn_q=spec(2, 2), attn_k=spec(2, 2), norm=spec(2))}
    assert shown(specs) == [
        "model 138",
        "  embed.weight float16 [9, 2] 18",
        "  layers.[0-11] 120",
        "    attn 96",
        "      q.weight float16 [2, 2] 48",
        "      k.weight float16 [2, 2] 48",
        "    norm.weight float16 [2] 24",
    ]


def test_what_differs_between_layers_is_told_apart() -> None:
    specs = layers(6, a=spec(2, 2), b=spec(2, 2), c=spec(2))
    specs["model.layers.4.b.weight"] = spec(2, 2, dtype=F32)
    specs["model.layers.1.a.bias"] = spec(2)
    del specs["model.layers.0.c.weight"]
    assert shown(specs) == [
        "model.layers.[0-5] 60",
        "  a 26",
        "    weight float16 [2, 2] 24",
        "    bias in 1 float16 [2] 2",
        "  b 24",
        "    weight in 0-3, 5 float16 [2, 2] 20",
        "    weight in 4 float32 [2, 2] 4",
        "  c.weight in 1-5 float16 [2] 10",
    ]


def test_layers_that_are_mostly_different_are_kinds_of_their_own() -> None:
    specs = layers(4, norm=spec(2))
    for i in range(4):
        kind = {"w1": spec(2, 8), "w2": spec(8, 2)} if i % 2 else {"gate": spec(4, 2), "up": spec(3, 2)}
        specs |= {f"model.layers.{i}.{name}.weight": each for name, each in kind.items()}
    assert [line for line in shown(specs) if "[" in line.split()[0]] == ["  [0, 2] 32", "  [1, 3] 68"]


def test_runs_inside_of_runs() -> None:
    specs = {f"h.{i}.{name}": spec(1) for i in range(3) for name in "qk"}
    specs |= {f"h.{i}.experts.{e}.w.weight": spec(2, 3) for i in range(3) for e in range(4)}
    del specs["h.2.experts.3.w.weight"]
    assert shown(specs) == [
        "h.[0-2] 72",
        "  q float16 [1] 3",
        "  k float16 [1] 3",
        "  experts 66",
        "    [0-3].w.weight in 0-1 float16 [2, 3] 48",
        "    [0-2].w.weight in 2 float16 [2, 3] 18",
    ]


def test_numbered_modules_of_other_shapes_are_not_folded() -> None:
    specs = {"mlp.0.weight": spec(8, 2), "mlp.0.bias": spec(8), "mlp.2.weight": spec(2, 8), "mlp.2.bias": spec(2)}
    assert [line.split()[0] for line in shown(specs)] == ["mlp", "0", "weight", "bias", "2", "weight", "bias"]


def test_a_name_may_be_a_tensor_and_a_module() -> None:
    assert shown({"a": spec(1), "a.b": spec(2)}) == ["a float16 [1] 1", "a.b float16 [2] 2"]


def test_parts_of_meta_are_runs_of_files() -> None:
    specs = {f"consolidated.0{i}/layers.{n}.w": spec(3) for i in range(2) for n in range(2)}
    assert shown(specs) == ["consolidated.[00-01]/layers.[0-1].w float16 [3] 12"]


def test_a_number_in_two_spellings_folds_nothing() -> None:
    assert shown({"m.1.w": spec(1), "m.01.w": spec(1)}) == ["m 2", "  1.w float16 [1] 1", "  01.w float16 [1] 1"]


def test_depth_counts_levels() -> None:
    (top,) = tree({"model.a.w": spec(1), "model.a.b": spec(1), "model.c": spec(2)})
    assert [node.label for _, node in top.walk(1)] == ["model"]
    assert [node.label for _, node in top.walk(2)] == ["model", "c", "a"]


@given(st.dictionaries(st.text("ab01./", max_size=14), st.sampled_from([spec(1), spec(2, 2), spec(1, dtype=F32)])))
def test_every_tensor_is_in_the_tree_once(specs: dict[str, TensorSpec]) -> None:
    nodes = [node for top in tree(specs) for _, node in top.walk()]
    leaves = [node for node in nodes if node.spec is not None]
    assert sorted(name for node in leaves for name in node.members) == sorted(specs)
    assert all(specs[name] == node.spec for node in leaves for name in node.members)
    assert sum(top.nbytes for top in tree(specs)) == sum(each.nbytes for each in specs.values())
    for node in nodes:
        assert node.spec or node.parameters == sum(child.parameters for child in node.children)
        assert node.spec or sorted(node.members) == sorted(n for child in node.children for n in child.members)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ("7", "7"),
        ("0 1 2 3", "0-3"),
        ("0 1 2 5 7 8", "0-2, 5, 7-8"),
        ("1 3 5", "1, 3, 5"),
        ("1 3 5 7", "1, 3, … 7"),
        ("0 4 8 12 13", "0, 4, … 12, 13"),
        ("00 01 02", "00-02"),
    ],
)
def test_numbers_are_shortened(numbers: str, said: str) -> None:
    assert ranges(reversed(numbers.split())) == said


def test_hostile_names_take_no_time_and_no_depth() -> None:
    draw = random.Random(0)
    deep = {f"{'a.' * 50_000}{i}": spec(1) for i in range(2)}
    odd = {f"m.{i}.{draw.random()}": spec(1) for i in range(5_000)}
    nested = {".".join(str(draw.randrange(3)) for _ in range(40)) + f".{i}": spec(1) for i in range(2_000)}
    begun = time.process_time()
    for specs in (deep, odd, nested):
        assert sum(top.parameters for top in tree(specs)) == len(specs)
    assert time.process_time() - begun < 20  # a bound on what grows too fast, far above what it takes
