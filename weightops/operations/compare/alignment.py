"""Which tensor of one checkpoint is which of another, before any is read; and what one pair is to each other.

`compare` measures all pairs of an alignment at once, a screen the one that somebody looks at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.values import values as values_of
from weightops.layouts.embeddings import has_rows_of_tokens
from weightops.operations.compare.entries import Entries, read_entries
from weightops.operations.compare.kinds import change_of
from weightops.operations.compare.measure import Measured, measure
from weightops.operations.compare.pairing import Pair, Pairing, pair
from weightops.operations.compare.report import Lone, TensorChange, Where
from weightops.operations.compare.tokenizer import Words, read_words
from weightops.spec import TensorSpec


@dataclass(frozen=True)
class Alignment:
    """The tensors of two checkpoints under common keys, and which of them are pairs."""

    a: Entries
    b: Entries
    pairing: Pairing

    @cached_property
    def words(self) -> tuple[Words, Words]:
        """The tokenizers of the two, read when they are first asked for."""
        return read_words(self.a), read_words(self.b)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of how they were aligned."""
        return (*self.a.notes, *self.b.notes, *self.pairing.notes)

    @property
    def lone(self) -> Iterator[Lone]:
        """What has no partner, and what follows from other tensors."""
        for where, found in (("a", self.pairing.only_a), ("b", self.pairing.only_b)):
            yield from (_lone(where, each.name, each.tensor.spec) for each in found if not each.is_alias)
        for each in self.pairing.mismatched:
            yield _lone("both", each.first.name, each.first.tensor.spec, reason=each.reason)
        for where, side in (("a", self.a), ("b", self.b)):
            parts = {name: f"goes into {into}" for name, into in side.parts.items()}
            for name, reason in {**parts, **side.left}.items():
                tensor = side.checkpoint.get(name)
                if tensor is not None:
                    yield _lone(where, name, tensor.spec, reason=reason, is_derived=True)

    def change(self, measured: Measured) -> TensorChange:
        """What was measured of a pair, as it is reported; rows of an embedding with A's tokens."""

        def word(key: str, row: int) -> str | None:
            return self.words[0].text(row) if has_rows_of_tokens(key) else None

        return change_of(measured, word)

    def measure(self, pair: Pair, control: Control) -> TensorChange:
        """One pair, read by one thread, in blocks; that it holds another tensor of A is not looked for.

        Raises `Interrupted` once the control is stopped, `CorruptInput` for what cannot be read, `Differs` for files on
        servers or in a cache whose digest is wrong.
        """
        (found,) = measure([pair], 1, control)
        return self.change(found)


def align(a: Checkpoint, b: Checkpoint, control: Control) -> Alignment:
    """Pair the tensors of two checkpoints, over layouts, prefixes, shards, ties, stacked experts and quantisation.

    Headers and small files beside them say all, but for two: how zero points of GPTQ are stored is seen by looking at
    them, and that parts of Meta's agree in the small tensors that each of them has.

    Raises `CorruptInput` for damaged quantised modules and for parts that do not fit each other, `UsageError` for
    parts whose parameters are not known.
    """
    evaluate = partial(values_of, control=control)
    one, other = (read_entries(checkpoint, evaluate) for checkpoint in (a, b))
    return Alignment(one, other, pair(one, other))


def _lone(where: str, name: str, spec: TensorSpec, *, reason: str = "", is_derived: bool = False) -> Lone:
    sides: dict[str, Where] = {"a": "a", "b": "b", "both": "both"}
    return Lone(where=sides[where], name=name, dtype=spec.dtype, shape=spec.shape, reason=reason, is_derived=is_derived)
