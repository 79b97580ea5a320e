"""What is to become of a vocabulary, as a value: where each row comes from, and the files that go with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from weightops.layouts.tokenizers.vocabulary import Files, FolderVocabulary, read_vocabulary
from weightops.operations.vocab.body import Body

Rule = Literal["mean", "zero", "normal", "donor"]
"""How a row is made that no old row gives: their mean, zeros, normal numbers, or after a row of a donor."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A row that is a weighted sum of old ones."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]


Row = int | Mix | Rule
"""What a row of the result is: an old one, a mixture of some, or what a rule makes."""


@dataclass(frozen=True)
class After:
    """Rows that are approximated after those of a donor, as `weightops.ops.pursuit` does.

    `rows` has a number for each row of the result that the donor's tokens have: an old row, `NOTHING`, or
    `NOTHING - 1 - row` of the donor. `common` has pairs of rows, of the donor and of the model.
    """

    donor: Body
    rows: tuple[int, ...]
    common: tuple[tuple[int, int], ...]
    k: int


@dataclass(frozen=True)
class Change:
    """A vocabulary to be: a row of input embeddings and one of heads for each token, and the files that name tokens.

    `left` are files that are left out, `done` says what is done, `notes` what there is to be careful of. Rows that are
    made after a donor's are in `after`, which has all rows that the donor's tokens have.
    """

    inputs: Sequence[Row]
    outputs: Sequence[Row]
    files: Files
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    known: FolderVocabulary | None = field(default=None, repr=False)
    after: After | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        return len(self.inputs)

    def vocabulary(self, where: str) -> FolderVocabulary:
        """Its tokens, read from its files unless they are `known`; `where` is the folder, in errors."""
        return self.known if self.known is not None else read_vocabulary(self.files, where)


def mixed(rows: Sequence[Row], numbers: Sequence[int], weights: Sequence[float]) -> Row | None:
    """The weighted sum of some of the rows, as one of old rows; None where one of them is made by a rule."""
    parts: dict[int, float] = {}
    for number, weight in zip(numbers, weights, strict=True):
        row = rows[number]
        if isinstance(row, str):
            return None
        own = Mix((row,), (1.0,)) if isinstance(row, int) else row
        for old, share in zip(own.rows, own.weights, strict=True):
            parts[old] = parts.get(old, 0.0) + weight * share
    if len(parts) == 1 and len(numbers) == 1:
        return rows[numbers[0]]
    return Mix(tuple(parts), tuple(parts.values())) if parts else None


def described(rows: Sequence[Row]) -> str:
    """How many rows come from where, in words."""
    counts = Counter(row if isinstance(row, str) else type(row).__name__ for row in rows)
    says = {
        "int": "as they were",
        "Mix": "made of several",
        "mean": "the mean of the old",
        "zero": "zeros",
        "normal": "normal numbers",
        "donor": "approximated after the donor's",
    }
    return ", ".join(f"{counts[kind]} {text}" for kind, text in says.items() if counts[kind])
