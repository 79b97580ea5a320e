"""The lines that are walked through: each a tensor of a checkpoint, or of two what is the same tensor in both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from weightops.checkpoint import Checkpoint
from weightops.lazy import LazyTensor
from weightops.operations.compare import Alignment, Entries, Entry, Pair
from weightops.operations.inspect import Inspection


@dataclass(frozen=True)
class Member:
    """A tensor of one checkpoint: its name in the files, and its values as far as they are numbers there.

    `files` are the tensors of the files that it is made of: itself, or what is packed; none where it is a piece of one,
    or several pieces joined. `form` says how it is quantised.
    """

    name: str
    tensor: LazyTensor
    files: tuple[str, ...] = ()
    form: str = ""
    is_alias: bool = False
    """Whether it stands for another tensor, as a head that is the embedding."""

    @property
    def is_as_stored(self) -> bool:
        """Whether its bytes are those of the files."""
        return not self.form and self.name in self.files

    @property
    def label(self) -> str:
        """What it is, for a line of the tree."""
        return f"{self.form or self.tensor.spec.dtype.name} {list(self.tensor.spec.shape)}"

    def nbytes(self, checkpoint: Checkpoint) -> int:
        """Its bytes in the files."""
        found = sum(checkpoint[name].nbytes for name in self.files) if self.files else self.tensor.nbytes
        return 0 if self.is_alias else found

    def parameters(self, inspection: Inspection) -> int:
        """The weights that it stands for."""
        found = sum(inspection.weights[name] for name in self.files) if self.files else self.tensor.spec.numel
        return 0 if self.is_alias else found


@dataclass(frozen=True)
class Row:
    """A tensor of the first checkpoint and its partner in the second, either of which may be None.

    `pair` is what can be compared of the two; where there is none, `reason` may say why.
    """

    members: tuple[Member | None, Member | None]
    pair: Pair | None = None
    reason: str = ""
    is_derived: bool = False
    """Whether it follows from others, so that nothing lacks where it is not."""

    @cached_property
    def mark(self) -> str:
        """How the two sides differ by their headers: `-` only the first has it, `+` only the second, `≠`."""
        one, two = self.members
        if self.is_derived:
            return ""
        if one is None or two is None:
            return "+" if one is None else "-"
        if self.pair is None:
            return "" if one.tensor.spec == two.tensor.spec else "≠"
        entries = self.pair.first, self.pair.second
        return "" if len({(each.form, each.tensor.spec) for each in entries}) == 1 else "≠"

    @property
    def names(self) -> Iterator[str]:
        """What it is called on either side, and in the files."""
        for each in self.members:
            if each is not None:
                yield from (each.name, *each.files)


def rows_by_name(one: Mapping[str, LazyTensor], two: Mapping[str, LazyTensor], reason: str = "") -> dict[str, Row]:
    """All tensors of one checkpoint, or of two those of one name as one row, which are not compared for a reason."""

    def member(tensors: Mapping[str, LazyTensor], name: str) -> Member | None:
        return Member(name, tensors[name], (name,)) if name in tensors else None

    names = [*one, *(name for name in two if name not in one)]
    return {name: Row((member(one, name), member(two, name)), reason=reason) for name in names}


def aligned_rows(aligned: Alignment) -> dict[str, Row]:
    """All tensors of two checkpoints: the first's in its order and by its names, then those of the second alone."""
    a, b, found = _members(aligned.a), _members(aligned.b), aligned.pairing
    rows: dict[str, Row] = {}

    def add(name: str, row: Row) -> None:
        while name in rows:
            name += " (B)"
        rows[name] = row

    by_first = {
        **{id(pair.first): Row((a(pair.first), b(pair.second)), pair) for pair in found.pairs},
        **{id(each.first): Row((a(each.first), b(each.second)), reason=each.reason) for each in found.mismatched},
        **{id(entry): Row((a(entry), None)) for entry in found.only_a if not entry.is_alias},
    }
    for entry in aligned.a.by_key.values():
        if (row := by_first.get(id(entry))) is not None:
            second = row.members[1]
            add(second.name if entry.is_alias and second is not None else entry.name, row)
    for entry in found.only_b:
        if not entry.is_alias:
            add(entry.name, Row((None, b(entry))))
    for name in dict.fromkeys((*aligned.a.left, *aligned.b.left)):
        one, two = (_left(side, name) for side in (aligned.a, aligned.b))
        if one is not None or two is not None:
            reason = aligned.a.left.get(name) or aligned.b.left[name]
            add(name, Row((one, two), reason=reason, is_derived=True))
    return rows


def _members(entries: Entries) -> Callable[[Entry], Member]:
    """What makes the members of one side."""
    checkpoint, parts = entries.checkpoint, defaultdict[str, list[str]](list)
    for part, into in entries.parts.items():
        parts[into].append(part)

    def member(entry: Entry) -> Member:
        own = (entry.name,) if entry.name in checkpoint else ()
        tensor = checkpoint[entry.name] if own and not entry.form else entry.tensor
        return Member(entry.name, tensor, (*own, *parts.get(entry.name, ())), entry.form, entry.is_alias)

    return member


def _left(entries: Entries, name: str) -> Member | None:
    tensor = entries.checkpoint.get(name) if name in entries.left else None
    return Member(name, tensor, (name,)) if tensor is not None else None
