"""What is computed of the tensor under the cursor: in one thread, in blocks, until somebody says stop."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from weightops.cli.browse.subject import Pair
from weightops.engine.control import Control
from weightops.engine.examine import TensorReport, examine_one
from weightops.lazy import Evaluator, LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.lora.lowrank import Change
from weightops.ops.measures.statistics import has_statistics
from weightops.spec import DType

Figures = Callable[[LazyTensor, LazyTensor, Control], list[tuple[str, str]]]
"""What there is to say of how two tensors differ: lines of a label and a text. It reads what it needs, and is to call
`control.check()` between blocks."""


@dataclass(frozen=True)
class Reading:
    """Digest and statistics of a tensor of each side, how the two differ, and what could not be proven right."""

    reports: tuple[TensorReport | None, TensorReport | None]
    figures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


class Counted:
    """Progress that is asked for, not told: how many bytes have been read."""

    def __init__(self) -> None:
        self.nbytes = 0

    def advance(self, nbytes: int, name: str = "") -> None:
        self.nbytes += nbytes

    def start(self, what: str, total_nbytes: int) -> None: ...

    def start_file(self, name: str, nbytes: int, done_nbytes: int) -> None: ...

    def finish_file(self, name: str, nbytes: int, resumed: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


def read(name: str, pair: Pair, figures: Figures, control: Control) -> Reading:
    """Everything that is shown of a tensor. Memory is a few blocks, whatever its size; raises `Interrupted` when the
    control is stopped, and what reading raises."""
    found = [examine_one(tensor, name, control) if tensor is not None else None for tensor in pair]
    one, two = (each[0] if each is not None else None for each in found)
    notes = tuple(dict.fromkeys(note for each in found if each is not None for note in each[1]))
    differences: list[tuple[str, str]] = []
    first, second = pair
    if one is not None and two is not None and first is not None and second is not None:
        if (one.spec, one.xxh3_128) == (two.spec, two.xxh3_128):
            differences = [("difference", "none: the same bytes")]
        else:
            differences = figures(first, second, control)
    return Reading((one, two), tuple(differences), notes)


class _Stoppable(Evaluator):
    """Evaluates until its control is stopped."""

    def __init__(self, control: Control) -> None:
        super().__init__(control.stores, control.once)
        self._check = control.check

    def __call__(self, tensor: LazyTensor, start: int, out: memoryview) -> None:
        self._check()
        super().__call__(tensor, start, out)


def relative_norm(one: LazyTensor, two: LazyTensor, control: Control) -> list[tuple[str, str]]:
    """How many elements differ, and ||second - first|| / ||first||, in float64; of other shapes nothing."""
    kinds = {one.spec.dtype, two.spec.dtype}
    if one.spec.shape != two.spec.shape or not all(map(has_statistics, kinds)):
        return [("difference", "other shapes, which have none" if one.spec.shape != two.spec.shape else "not computed")]
    if all(dtype.is_float for dtype in kinds):
        wide = DType.F64 if DType.F64 in kinds else DType.F32
        pair = [cast(tensor, wide) for tensor in (one, two)]
    elif len(kinds) == 1:
        pair = [one, two]
    else:
        return [("difference", "other kinds of numbers")]
    with _Stoppable(control) as evaluate:
        differ, change, size = struct.unpack("<3d", evaluate.whole(LazyTensor.make(Change(), *pair)))
    total = one.spec.numel
    lines = [("differ", f"{differ:,.0f} of {total:,} ({100 * differ / max(1, total):.3g} %)")]
    if one.spec.dtype.is_float:
        ratio = math.sqrt(change / size) if size and math.isfinite(change) and math.isfinite(size) else None
        lines.append(("||B - A|| / ||A||", "not finite" if ratio is None else f"{ratio:.4g}"))
    return lines
