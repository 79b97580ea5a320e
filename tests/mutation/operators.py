"""What cosmic-ray's operators leave out: statements and arguments dropped, nothing returned, `in` turned round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import parso
from cosmic_ray.operators.number_replacer import NumberReplacer
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

Span = tuple[tuple[int, int], tuple[int, int]]


class _One(Operator):
    """An operator with one way to change a node."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        if self.suits(node):
            yield node.start_pos, node.end_pos

    def suits(self, node: Any) -> bool:
        raise NotImplementedError

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


def _instead(node: Any, code: str) -> Any:
    return parso.parse(node.get_first_leaf().prefix + code)


class DropRaise(_One):
    def suits(self, node: Any) -> bool:
        return node.type == "raise_stmt"

    def mutate(self, node: Any, index: int) -> Any:
        return _instead(node, "pass")


class DropCall(_One):
    """`f(x)` where nothing is done with the result."""

    def suits(self, node: Any) -> bool:
        return node.type == "atom_expr" and node.parent.type == "simple_stmt" and node.get_code().endswith(")")

    def mutate(self, node: Any, index: int) -> Any:
        return _instead(node, "pass")


class ReturnNone(_One):
    def suits(self, node: Any) -> bool:
        return node.type == "return_stmt" and node.children[1].get_code().strip() != "None"

    def mutate(self, node: Any, index: int) -> Any:
        return _instead(node, "return None")


class DropKeyword(_One):
    """`f(x, key=y)` without the key; an error's hint is left, which is words alone."""

    def suits(self, node: Any) -> bool:
        if node.type != "argument" or node.parent.type != "arglist":
            return False
        return node.children[1].get_code().strip() == "=" and node.children[0].value != "hint"

    def mutate(self, node: Any, index: int) -> Any:
        return _instead(node, "**{}")


class NumberPlusOne(NumberReplacer):
    """cosmic-ray's own, but each number once."""

    def mutation_positions(self, node: Any) -> Iterator[Span]:
        yield from list(super().mutation_positions(node))[:1]


class InNotIn(_One):
    def suits(self, node: Any) -> bool:
        return node.type == "comparison" and node.children[1].get_code().strip() in ("in", "not in")

    def mutate(self, node: Any, index: int) -> Any:
        is_in = node.children[1].get_code().strip() == "in"
        node.children[1] = parso.parse(" not in" if is_in else " in")
        return node


_CORE = (
    *("AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_FloorDiv", "FloorDiv_Mul", "Div_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Mod_FloorDiv", "BitOr_BitAnd", "BitAnd_BitOr", "Pow_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("LShift_RShift", "RShift_LShift")),
    *("ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub"),
)
"""One change for each operator in the code: of twelve that cosmic-ray has for `==`, most fail at once."""

OPERATORS: dict[str, Operator] = {name: get_operator(f"core/{name}")() for name in _CORE}
OPERATORS |= {each.__name__: each() for each in (NumberPlusOne, DropRaise, DropCall, ReturnNone, DropKeyword, InNotIn)}
