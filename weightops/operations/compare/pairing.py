"""Which tensor of one checkpoint is which of the other, by key, and what has no partner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from weightops.formats.modules import is_conv1d
from weightops.lazy import LazyTensor
from weightops.operations.compare.entries import Entries, Entry, Heads, tied_head, to_halves
from weightops.ops.arrange import cut
from weightops.ops.measures.difference_sums import Axis
from weightops.ops.transpose import transposed
from weightops.spec import DType

_MAX_PREFIX_PARTS = 3
_MAX_STARTS = 32
_HEADS: Mapping[str, Axis] = {"q_proj": "rows", "k_proj": "rows", "v_proj": "rows", "o_proj": "columns"}


@dataclass(frozen=True)
class Pair:
    """A tensor `a` of the first checkpoint and its partner `b`, both of one shape.

    `key` is what both are called in transformers' layout where that is known. `added_a` and `added_b` count the rows
    that one of them has more, which are not in `a` and `b`. `heads` lie along `axis`.
    """

    key: str
    first: Entry
    second: Entry
    a: LazyTensor
    b: LazyTensor
    steps: LazyTensor | None = None
    added_a: int = 0
    added_b: int = 0
    heads: int = 0
    axis: Axis = "rows"
    is_transposed: bool = False


@dataclass(frozen=True)
class Mismatch:
    """Two tensors of one name whose shapes cannot be compared."""

    first: Entry
    second: Entry

    @property
    def reason(self) -> str:
        """Why not."""
        return f"{self.first.tensor.spec} in A, {self.second.tensor.spec} in B"


@dataclass
class Pairing:
    """All pairs in the order of the first checkpoint, and what has no partner."""

    pairs: list[Pair] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    only_a: list[Entry] = field(default_factory=list)
    only_b: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pair(a: Entries, b: Entries) -> Pairing:
    """Pair the tensors of two checkpoints; brings `a` and `b` into one order of rows, and under the same keys."""
    result = Pairing()
    heads = a.heads or b.heads
    _one_order(a, b, heads, result.notes)
    _rename(a, b, result.notes)
    for entries, other in ((a, b), (b, a)):
        for key in [key for key in other.by_key if _is_head(key) and key not in entries.by_key]:
            head = tied_head(entries, _is_head)
            if head is not None:
                entries.by_key[key] = head
    turned = _turned(a, b)
    for key, first in a.by_key.items():
        second = b.by_key.get(key)
        if second is None:
            result.only_a.append(first)
        elif (found := _paired(key, first, second, heads, turned)) is not None:
            result.pairs.append(found)
        else:
            result.mismatched.append(Mismatch(first, second))
    result.only_b = [entry for key, entry in b.by_key.items() if key not in a.by_key]
    return result


def _one_order(a: Entries, b: Entries, heads: Heads | None, notes: list[str]) -> None:
    """Bring the rows of q and k into transformers' order, where the two differ in it."""
    if a.is_in_pairs == b.is_in_pairs:
        return
    if a.layout == b.layout == "gguf" and not (a.metadata and b.metadata):
        return  # tensors of a GGUF file in another container, which does not say in which order their rows are
    if heads is None:
        notes.append("no file says how many heads there are: the rows of q and k are in two orders, and seem to differ")
        return
    to_halves(a if a.is_in_pairs else b, heads)


def _is_head(key: str) -> bool:
    return key.endswith(("lm_head.weight", "embed_out.weight"))


def _rename(a: Entries, b: Entries, notes: list[str]) -> None:
    """Give tensors of `b` that differ from those of `a` in the first parts of their names alone the names in `a`."""
    for _ in range(_MAX_PREFIX_PARTS):
        free_a = [key for key in a.by_key if key not in b.by_key]
        free_b = {key: entry for key, entry in b.by_key.items() if key not in a.by_key}
        if not free_a or not free_b:
            return
        way = _way(free_a, free_b.keys())
        if way is None:
            return
        old, new = way  # of b, of a
        moved = {key: new + key.removeprefix(old) for key in free_b if key.startswith(old)}
        wanted = set(free_a)
        renamed = {key: name for key, name in moved.items() if name in wanted}
        b.by_key = {renamed.get(key, key): entry for key, entry in b.by_key.items()}
        spelt = [f"{part!r}" for part in (new, old)]
        notes.append(f"{len(renamed)} names begin with {spelt[0]} in A where they begin with {spelt[1]} in B")


def _way(free_a: Collection[str], free_b: Collection[str]) -> tuple[str, str] | None:
    """The beginning of names of `b` and what it is in `a`, for which most tensors find a partner.

    One of the two must have all parts of the other, so that no encoder is taken for a decoder.
    """
    wanted = set(free_a)
    ways: Counter[tuple[str, str]] = Counter()
    starts_a, starts_b = _starts(free_a), _starts(free_b)
    for old in starts_b:
        parts = Counter(old.split("."))
        for new in starts_a:
            others = Counter(new.split("."))
            if old == new or not (parts <= others or others <= parts):
                continue
            ways[old, new] = sum(1 for k in free_b if k.startswith(old) and new + k.removeprefix(old) in wanted)
    best = max(ways, key=lambda way: (ways[way], -len(way[0]) - len(way[1])), default=None)
    return best if best is not None and ways[best] else None


def _starts(keys: Iterable[str]) -> list[str]:
    """The first parts of names up to the first number, at most three, and none at all; the most frequent ones."""
    found = Counter({"": 0})
    for key in keys:
        start = ""
        for part in key.split(".")[:-1][:_MAX_PREFIX_PARTS]:
            if part.isdigit():
                break
            start += f"{part}."
            found[start] += 1
    return ["", *(start for start, _ in found.most_common(_MAX_STARTS) if start)]


def _turned(a: Entries, b: Entries) -> bool:
    """Whether weights of Conv1D are `[in, out]` in one of the two alone, as one that is not square tells."""
    for key, first in a.by_key.items():
        shape = first.tensor.spec.shape
        if key in b.by_key and len(shape) == 2 and shape[0] != shape[1] and is_conv1d(key.rpartition(".")[0], "gpt2"):
            return b.by_key[key].tensor.spec.shape == shape[::-1]
    return False


def _paired(key: str, first: Entry, second: Entry, heads: Heads | None, turned: bool) -> Pair | None:
    """The two as tensors of one shape; None if they are not the same kind of thing."""
    is_turned = turned and len(second.tensor.spec.shape) == 2 and is_conv1d(key.rpartition(".")[0], "gpt2")
    if is_turned:
        second = second.of(transposed)
    shape, other = first.tensor.spec.shape, second.tensor.spec.shape
    if len(shape) != len(other) or shape[1:] != other[1:] or (not shape and shape != other):
        return None
    a, b, steps = first.tensor, second.tensor, second.steps or first.steps
    rows = min(shape[0], other[0]) if shape else 0
    if shape != other:
        if _cannot_be_cut(a) or _cannot_be_cut(b) or not rows:
            return None
        a, b = cut(a, 0, 0, rows), cut(b, 0, 0, rows)
        steps = None if steps is None else cut(steps, 0, 0, rows)
    count, axis = _heads_of(key, heads)
    added = (shape[0] - rows, other[0] - rows) if shape else (0, 0)
    return Pair(key, first, second, a, b, steps, *added, count if shape == other else 0, axis, is_turned)


def _cannot_be_cut(tensor: LazyTensor) -> bool:
    return tensor.spec.dtype.is_packed or tensor.spec.dtype in (DType.C32, DType.C64, DType.C128)


def _heads_of(key: str, heads: Heads | None) -> tuple[int, Axis]:
    """How many heads lie along an axis of a tensor, by its key."""
    module = key.split(".")[-2] if "." in key else ""
    axis = _HEADS.get(module)
    if heads is None or axis is None or (axis == "columns" and not key.endswith(".weight")):
        return 0, "rows"
    return (heads.kv if module in ("k_proj", "v_proj") else heads.q), axis
