"""What is computed of the tensor under the cursor: in one thread, in blocks, until somebody says stop."""

from __future__ import annotations

from dataclasses import dataclass

from weightops.cli.browse.rows import Row
from weightops.engine.control import Control
from weightops.engine.examine import TensorReport, examine_one
from weightops.operations.compare import Alignment, TensorChange


@dataclass(frozen=True)
class Reading:
    """Digest and statistics of a tensor of each side, how the two differ, and what could not be proven right."""

    reports: tuple[TensorReport | None, TensorReport | None]
    change: TensorChange | None = None
    notes: tuple[str, ...] = ()


class Counted:
    """Progress that is asked for, not told: what goes on, and how many bytes of how many are done."""

    def __init__(self, total: int = 0) -> None:
        self.start("reading", total)

    def start(self, what: str, total_nbytes: int) -> None:
        self.what, self.total, self.nbytes = what, total_nbytes, 0

    def advance(self, nbytes: int, name: str = "") -> None:
        self.nbytes += nbytes

    @property
    def percent(self) -> int:
        """Of what goes on now, whole."""
        return 100 * min(self.nbytes, self.total) // max(1, self.total)

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None: ...

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


def read(name: str, row: Row, alignment: Alignment | None, control: Control) -> Reading:
    """Everything that is shown of a tensor. Memory is a few blocks, whatever its size; raises `Interrupted` when the
    control is stopped, and what reading raises."""
    found = [examine_one(each.tensor, name, control) if each is not None else None for each in row.members]
    one, two = (each[0] if each is not None else None for each in found)
    notes = tuple(dict.fromkeys(note for each in found if each is not None for note in each[1]))
    change = alignment.measure(row.pair, control) if alignment is not None and row.pair is not None else None
    return Reading((one, two), change, notes)
