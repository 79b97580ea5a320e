"""What a comparison of two checkpoints found, as values that are JSON too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

import msgspec

from weightops.io.brief import brief
from weightops.io.notebook import card
from weightops.spec import DType

Kind = Literal[
    "identical",
    "equal",
    "cast",
    "cast-of-b",
    "quantised",
    "moved",
    "not-finite",
    "heads",
    "rows",
    "scaled",
    "low-rank",
    "broad",
    "not-numbers",
]
KINDS: Mapping[Kind, str] = {
    "identical": "the same bytes",
    "equal": "the same numbers, stored in another form",
    "cast": "B is A, rounded to B's number type",
    "cast-of-b": "A is B, rounded to A's number type",
    "quantised": "one is the other, to within a quantisation step",
    "moved": "B holds here what A holds under another name",
    "not-finite": "equal but for NaN or infinities that only one of the two has",
    "heads": "a few attention heads changed, the others are equal",
    "rows": "a few rows changed, the others are equal",
    "scaled": "B is A times a number",
    "low-rank": "a few directions hold 99 % of the change, as a merged LoRA makes it",
    "broad": "changed everywhere",
    "not-numbers": "other bytes, of a type that is not compared as numbers",
}
"""What can be said of a pair of tensors; the first that holds is said."""
EQUAL: tuple[Kind, ...] = ("identical", "equal")
ROUNDED: tuple[Kind, ...] = ("cast", "cast-of-b", "quantised")


class CompareOptions(TypedDict, total=False):
    """What there is to choose for a comparison of weights; see `weightops.operations.compare`."""

    tolerance: float | None
    strict: bool
    workers: int | None


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as it lies in its files: its name there, number type and shape, and `form` where it is quantised."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    form: str | None = None
    nan: int = 0
    infinite: int = 0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A row that changed, by `change` = ||b - a|| / ||a|| (null where a is zero); of an embedding with its token."""

    row: int
    change: float
    token: str | None = None


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """An attention head that changed, by `change`; `scale` where it is little else than that multiple of A's."""

    head: int
    change: float
    scale: float | None = None


class Extreme(msgspec.Struct, frozen=True, kw_only=True):
    """The largest |b - a| of a tensor, where it is and what the two are there."""

    abs: float
    at: tuple[int, ...]
    a: float
    b: float


class TensorChange(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of A and its partner in B.

    `relative` is ||B - A|| / ||A|| and `angle` 1 - cosine, over elements that are finite in both; either is null where
    it means nothing. `changed` of `elements` are other numbers, `flips` are above zero in one and below in the other.
    `first_odd` is where the first element lies that is NaN or infinite in B alone.
    `rank` is r99, the least number of singular values whose squares hold 99 % of ||B - A||^2, `stable_rank` is
    ||B - A||^2 over the largest of these squares; there where the change is of low rank. `scale` is there where B is A
    times it, `steps` (root mean square) and `within_half_step` (share) where one of the two is quantised.
    `changed_rows` counts rows along the last dimension, the first of which `rows` lists by their change; `heads` are
    those that changed. `added_a` and `added_b` are rows that one of them has more, which are not compared.
    `moved_from` is the tensor of A that B holds here. `is_tied`: another name of a tensor that is listed already.
    """

    kind: Kind
    a: Side
    b: Side
    elements: int
    changed: int = 0
    flips: int = 0
    relative: float | None = 0.0
    angle: float | None = 0.0
    largest: Extreme | None = None
    first_odd: tuple[int, ...] | None = None
    scale: float | None = None
    rank: int | None = None
    stable_rank: float | None = None
    steps: float | None = None
    within_half_step: float | None = None
    changed_rows: int = 0
    n_rows: int = 0
    rows: tuple[Row, ...] = ()
    n_heads: int = 0
    heads: tuple[Head, ...] = ()
    added_a: int = 0
    added_b: int = 0
    moved_from: str | None = None
    is_tied: bool = False

    @property
    def name(self) -> str:
        """What it is called in A."""
        return self.a.name

    def exceeds(self, tolerance: float) -> bool:
        """Whether it differs beyond a tolerance, or in rows that one has more, or in what is not finite."""
        if self.is_equal:
            return bool(self.added_a or self.added_b)
        is_odd = self.kind in ("not-finite", "not-numbers") or self.a.nan != self.b.nan
        return is_odd or self.relative is None or self.relative > tolerance or bool(self.added_a or self.added_b)

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same numbers, as far as both have them."""
        return self.kind in EQUAL


Where = Literal["a", "b", "both"]


class Lone(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that is in one of the two alone, or whose partner has another shape, with the reason where known."""

    where: Where
    name: str
    dtype: DType
    shape: tuple[int, ...]
    reason: str = ""
    is_derived: bool = False


class ConfigChange(msgspec.Struct, frozen=True, kw_only=True):
    """A key of a configuration file, by its JSON pointer, with its values as JSON; null where it is absent.

    `changes_results`: unless it is known to change nothing of what the model computes.
    """

    file: str
    pointer: str
    a: str | None
    b: str | None
    changes_results: bool


class TokenizerChange(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the tokenizer that differs, in a sentence; `diff` has the lines of a text such as a chat template."""

    part: str
    text: str
    diff: tuple[str, ...] = ()


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a person should see first: of what kind, and a sentence whose names are safe for a terminal."""

    code: str
    text: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """How the checkpoint `b` differs from the checkpoint `a`.

    `relation` says it in a sentence. `relative` and `angle` are those of all tensors taken as one vector. `differs` is
    whether it differs beyond the tolerance that was given, null where none was: then it exits 0.
    """

    a: str
    b: str
    relation: str
    findings: tuple[Finding, ...]
    relative: float | None
    angle: float | None
    kinds: dict[Kind, int]
    tensors: tuple[TensorChange, ...]
    lone: tuple[Lone, ...]
    config: tuple[ConfigChange, ...]
    tokenizer: tuple[TokenizerChange, ...]
    notes: tuple[str, ...]
    differs: bool | None = None

    __repr__ = brief

    @property
    def unpaired(self) -> list[Lone]:
        """Tensors without a partner, but for those that follow from others."""
        return [lone for lone in self.lone if not lone.is_derived]

    @property
    def changed(self) -> list[TensorChange]:
        """Tensors that hold other numbers, the most changed first."""
        found = [tensor for tensor in self.tensors if not tensor.is_equal]
        return sorted(found, key=lambda t: -(math.inf if t.relative is None else t.relative))

    def held(self, tolerance: float | None, *, strict: bool) -> Comparison:
        """The same with whether it differs beyond a tolerance; see `weightops.operations.compare`."""
        if tolerance is None:
            return self
        differs = bool(self.unpaired) or any(tensor.exceeds(tolerance) for tensor in self.tensors)
        if strict:
            differs |= bool(self.tokenizer) or any(change.changes_results for change in self.config)
        return msgspec.structs.replace(self, differs=differs)

    def _repr_html_(self) -> str:
        rows = [(t.name, t.kind, "" if t.relative is None else t.relative, t.changed) for t in self.changed]
        facts = {"relation": self.relation, **{str(kind): count for kind, count in self.kinds.items()}}
        heads = ("tensor", "kind", "||B-A||/||A||", "elements changed")
        return card(f"{self.b} against {self.a}", facts, heads, rows, what="tensors that changed")


def count_kinds(tensors: Sequence[TensorChange]) -> dict[Kind, int]:
    """How many tensors there are of each kind, in the order of `KINDS`."""
    counted = Counter(tensor.kind for tensor in tensors)
    return {kind: counted[kind] for kind in KINDS if counted[kind]}
