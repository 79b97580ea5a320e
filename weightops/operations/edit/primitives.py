"""What the steps of an edit do to tensors: one function for each primitive."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import CorruptInput, UsageError
from weightops.io.escape import escape
from weightops.layouts.experts import stated
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.edit.document import (
    Combine,
    Concat,
    Fill,
    LowRank,
    Project,
    Scale,
    Split,
    Stack,
    Take,
    fill_in,
)
from weightops.ops.arrange import concat, cut, one_of, stacked, taken
from weightops.ops.elementwise import cast, reshaped
from weightops.ops.linear import Along, Projected, UnitRows, Weighted, wide
from weightops.ops.lora.factors import Lora
from weightops.ops.lora.product import Part
from weightops.ops.measures.loss import counted_cast
from weightops.ops.permute import permuted
from weightops.ops.rows import Given, MeanRow, Repeat, extend_by_mean
from weightops.spec import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIZES = {
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "hidden": ("hidden_size", "n_embd"),
    "head_dim": ("head_dim",),
}
"""Sizes by the fields of config.json, of which the first that is there counts."""
_UNIT = 1e-3
"""How far a direction's length may be from 1 before it is normalised with a note."""


@dataclass(frozen=True)
class Tensors:
    """What a step may look at beside what it selects: tensors by source and name, and sizes by what config.json says.

    `find` takes the name of a source, or None for what is edited, and that of a tensor. `notes` are added to.
    """

    find: Callable[[str | None, str], LazyTensor]
    names: Callable[[str], Sequence[str]]
    config: Mapping[str, Any]
    evaluate: Evaluate
    notes: list[str]

    def sizes(self) -> dict[str, int]:
        """Sizes that may be named: heads, kv_heads, head_dim and hidden, as far as config.json gives them."""
        known = stated(self.config, {key for keys in _SIZES.values() for key in keys})
        found = {name: [known[key] for key in keys if key in known] for name, keys in _SIZES.items()}
        sizes = {name: values[0] for name, values in found.items() if values}
        if "head_dim" not in sizes and {"hidden", "heads"} <= sizes.keys():
            sizes["head_dim"] = sizes["hidden"] // sizes["heads"]
        return sizes

    def size(self, given: int | str) -> int:
        """A size, which may be named; raises `UsageError` for what config.json does not say."""
        if isinstance(given, int):
            return given
        sizes = self.sizes()
        if given not in sizes:
            shown = ", ".join(f"{name} ({size})" for name, size in sizes.items()) or "none"
            raise UsageError(f"{escape(given)} is no size that config.json gives", hint=f"there are {shown}")
        return sizes[given]


@dataclass(frozen=True)
class Selected:
    """A tensor that a step selects, by its name."""

    name: str
    match: re.Match[str]
    tensor: LazyTensor


def _axis(tensor: LazyTensor, axis: int) -> int:
    count = len(tensor.spec.shape)
    if not -count <= axis < count:
        raise UsageError(f"{tensor.spec} has no dimension {axis}")
    return axis % count


def take(one: Selected, given: Take, around: Tensors) -> LazyTensor:
    """Some places along a dimension; raises `UsageError` for places that are not there."""
    axis, unit = _axis(one.tensor, given.axis), around.size(given.unit)
    size = one.tensor.spec.shape[axis]
    if unit < 1 or size % unit:
        raise UsageError(f"{escape(one.name)}: {size} along dimension {axis} is no multiple of {unit}")
    if (given.numbers is None) == (given.range_ is None):
        raise UsageError("expected list or range", hint="take: {axis: 0, list: [0, 2, 3]}")
    numbers: Sequence[int]
    if given.range_ is not None:
        if len(given.range_) not in (2, 3):
            raise UsageError("a range is [start, stop] or [start, stop, step]")
        if given.range_[2:] == [0]:
            raise UsageError("a range of step 0 has no end", hint="[start, stop] takes every place")
        numbers = range(*given.range_)
    elif isinstance(given.numbers, Mapping):
        if given.by is None:
            raise UsageError("lists by name lack by, the group of select whose value chooses one")
        key = fill_in(f"{{{given.by}}}", one.match)
        if key not in given.numbers:
            raise UsageError(f"{escape(one.name)}: there is no list for {escape(key)}")
        numbers = given.numbers[key]
    else:
        numbers = given.numbers or ()
    count = size // unit
    beyond = next((number for number in numbers if not 0 <= number < count), None)
    if beyond is not None or not len(numbers):
        what = "nothing would be left" if beyond is None else f"there is no place {beyond}"
        raise UsageError(f"{escape(one.name)}: {what} along dimension {axis}, which has {count}")
    return taken(one.tensor, axis, [number * unit + i for number in numbers for i in range(unit)])


def split(one: Selected, given: Split, around: Tensors) -> list[LazyTensor]:
    """Pieces along a dimension; raises `UsageError` unless they are the whole."""
    axis = _axis(one.tensor, given.axis)
    size = one.tensor.spec.shape[axis]
    if sum(each is not None for each in (given.sizes, given.parts, given.heads)) != 1:
        raise UsageError("expected one of sizes, parts and heads")
    if given.parts is not None:
        if given.parts < 1 or size % given.parts:
            raise UsageError(f"{escape(one.name)}: {size} along dimension {axis} is not {given.parts} equal parts")
        sizes = [size // given.parts] * given.parts
    elif given.heads is not None:
        width = around.size("head_dim")
        sizes = [width * around.size("heads" if part == "q" else "kv_heads") for part in given.heads]
    else:
        sizes = [around.size(each) for each in given.sizes or ()]
    if sum(sizes) != size or min(sizes) < 0:
        raise UsageError(f"{escape(one.name)}: pieces of {sizes} are not the {size} along dimension {axis}")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [cut(one.tensor, axis, end - length, end) for end, length in zip(ends, sizes, strict=True)]


def ordered(several: Sequence[Selected], given: Concat | Stack) -> list[LazyTensor]:
    """Tensors of one name in the order of a group: as it is given, else as numbers from 0 without a gap."""
    keys = {fill_in(f"{{{given.by}}}", one.match): one for one in several}
    if len(keys) != len(several):
        raise UsageError(f"two of {', '.join(escape(one.name) for one in several[:3])} are alike in {escape(given.by)}")
    if given.order is None and not all(key.isdecimal() for key in keys):
        raise UsageError(
            f"the group {escape(given.by)} holds no numbers, and there is no order", hint="order: [gate, up]"
        )
    order = given.order if given.order is not None else [str(i) for i in range(len(keys))]
    if len(set(order)) != len(order):
        raise UsageError(f"the order names {escape(next(key for key in order if order.count(key) > 1))} twice")
    if sorted(order) != sorted(keys):
        lacking = sorted(set(order) - keys.keys()) or sorted(keys.keys() - set(order))
        raise UsageError(
            f"{escape(several[0].name)} and its like: {escape(lacking[0])} of {escape(given.by)} is not there, "
            "or not in the order"
        )
    return [keys[key].tensor for key in order]


def join(several: Sequence[Selected], given: Concat | Stack, around: Tensors) -> LazyTensor:
    """Tensors of one name as one; raises `IncompatibleInputs` for shapes that do not go together."""
    parts = ordered(several, given)
    return stacked(parts) if isinstance(given, Stack) else concat(parts, _axis(parts[0], given.axis))


def unstack(one: Selected, given: Any, around: Tensors) -> list[LazyTensor]:
    """What lies at each place of the first dimension."""
    if not one.tensor.spec.shape:
        raise UsageError(f"{escape(one.name)} is a single number")
    return [one_of(one.tensor, number) for number in range(one.tensor.spec.shape[0])]


def transpose(one: Selected, given: bool | list[int], around: Tensors) -> LazyTensor:
    """The last two dimensions exchanged, or all in this order."""
    count = len(one.tensor.spec.shape)
    if count < 2:
        raise UsageError(f"{escape(one.name)} is {one.tensor.spec}, and has no rows and columns")
    axes = given if isinstance(given, list) else [*range(count - 2), count - 1, count - 2]
    return permuted(one.tensor, tuple(_axis(one.tensor, axis) for axis in axes))


def view(one: Selected, given: list[int | str], around: Tensors) -> LazyTensor:
    """The same numbers in another shape; -1 is what is left."""
    sizes = [around.size(each) for each in given]
    count, known = one.tensor.spec.numel, math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < -1 for size in sizes) or (-1 in sizes and (not known or count % known)):
        raise UsageError(f"{escape(one.name)} is {one.tensor.spec}, and no shape {sizes} of it")
    shape = tuple(count // known if size == -1 else size for size in sizes)
    if math.prod(shape) != count:
        raise UsageError(f"{escape(one.name)} is {one.tensor.spec}, which is not {list(shape)}")
    return reshaped(one.tensor, shape)


def fill(one: Selected, given: Fill, around: Tensors) -> LazyTensor:
    """A constant tensor, or one with more rows or fewer."""
    spec = one.tensor.spec
    if given.with_ is not None and given.rows is None:
        raise UsageError("with says what new rows are, and there are none", hint="fill: {rows: 32000, with: mean}")
    if given.rows is not None and given.shape is not None:
        raise UsageError("shape is that of a constant, rows are those of what is there", hint="say one of them")
    element = _element(one, given.value)
    if given.rows is None:
        shape = spec.shape if given.shape is None else tuple(around.size(each) for each in given.shape)
        if any(size < 1 for size in shape):
            raise UsageError(f"{escape(one.name)} cannot be {list(shape)}", hint="sizes are above zero")
        return LazyTensor.make(Repeat(spec.dtype, shape, element))
    rows, before = given.rows, spec.shape[0] if spec.shape else 0
    if not before or rows < 1:
        raise UsageError(f"{escape(one.name)} is {spec}, of which {rows} rows cannot be made")
    matched = re.fullmatch(r"copy:(\d{1,9})", given.with_ or "")
    if given.with_ not in (None, "mean") and (matched is None or int(matched[1]) >= before):
        raise UsageError(f"new rows cannot be {escape(str(given.with_))}", hint=f"mean, or copy:N of {before} rows")
    if rows <= before:
        return cut(one.tensor, 0, 0, rows)
    if given.with_ == "mean":
        _check_mean(one, around)
        return extend_by_mean(one.tensor, rows)
    if matched is None:
        return concat([one.tensor, LazyTensor.make(Repeat(spec.dtype, (rows - before, *spec.shape[1:]), element))], 0)
    return taken(one.tensor, 0, [*range(before), *[int(matched[1])] * (rows - before)])


def _check_mean(one: Selected, around: Tensors) -> None:
    """Raise `CorruptInput` for rows without a mean: one that is not a number makes it none. Reads all rows."""
    import numpy as np

    (data,) = around.evaluate([cast(LazyTensor.make(MeanRow(), one.tensor), DType.F32)])
    if not np.isfinite(np.frombuffer(data, np.float32)).all():
        raise CorruptInput(
            f"{escape(one.name)}: the mean of its rows is not finite, as some of them are not",
            hint="fill: {rows: N, with: copy:2} takes a row that is",
        )


def _element(one: Selected, value: int | float) -> bytes:
    """A number as the tensor holds it; raises `UsageError` for one that its type cannot."""
    import torch

    dtype = getattr(torch, one.tensor.spec.dtype.value, None)
    if dtype is None:
        raise UsageError(f"{escape(one.name)} is {one.tensor.spec.dtype.value}, of which no number is made")
    try:
        number = torch.tensor(value, dtype=dtype)
        fits = number.isinf().item() == math.isinf(value) if dtype.is_floating_point else number.item() == value
    except (OverflowError, RuntimeError, ValueError):
        fits = False
    if not fits:
        raise UsageError(f"{escape(one.name)} is {one.tensor.spec.dtype.value}, which cannot hold {value}")
    return number.reshape(1).view(torch.uint8).numpy().tobytes()


def _check_factors(values: LazyTensor, *factors: float) -> None:
    """Raise `UsageError` for a factor beyond the type that arithmetic is done in."""
    import numpy as np

    most = float(np.finfo(values.spec.dtype.value).max)
    beyond = next((factor for factor in factors if abs(factor) > most), None)
    if beyond is not None:
        raise UsageError(f"{beyond:g} is beyond {values.spec.dtype.value}, in which this is computed")


def _rounded(one: Selected, result: LazyTensor) -> LazyTensor:
    """In the type of the tensor, one rounding, which is counted."""
    return counted_cast(result, one.tensor.spec.dtype, one.name)


def scale(one: Selected, given: Scale, around: Tensors) -> LazyTensor:
    """Times a number or a vector, in float32, rounded once."""
    values = wide(one.tensor)
    _check_factors(values, given.shift, *(() if isinstance(given.by, str) else (given.by,)))
    if not isinstance(given.by, str):
        return _rounded(one, LazyTensor.make(Weighted((float(given.by),)), values))
    vector = cast(wide(around.find(given.from_, fill_in(given.by, one.match))), values.spec.dtype)
    along = LazyTensor.make(Along(_axis(one.tensor, given.axis), given.shift), values, vector)
    return _rounded(one, along)


def lowrank(one: Selected, given: LowRank, around: Tensors) -> LazyTensor:
    """Plus a product of factors, as merge-lora adds it."""
    a, b = (around.find(given.from_, fill_in(template, one.match)) for template in (given.a, given.b))
    part = Part(scale=given.scale)
    _check_factors(wide(one.tensor), given.scale)
    part.check(one.tensor.spec, a.spec, b.spec)
    held = part.held_nbytes(one.tensor.spec, a.spec, b.spec, DType.F32, is_whole=False)
    return LazyTensor.make(Lora((part,), held_nbytes=held), one.tensor, a, b)


def combine(one: Selected, given: Combine, around: Tensors) -> LazyTensor:
    """A sum with weights, in float32, rounded once."""
    others = [around.find(other.from_, fill_in(other.tensor, one.match)) for other in given.with_]
    values = wide(one.tensor)
    inputs = [values, *(cast(wide(other), values.spec.dtype) for other in others)]
    weights = (given.weight, *(other.weight for other in given.with_))
    _check_factors(values, *weights)
    return _rounded(one, LazyTensor.make(Weighted(weights), *inputs))


def project(one: Selected, given: Project, around: Tensors) -> LazyTensor:
    """Without its part along a direction, in float32, rounded once."""
    import numpy as np

    values = wide(one.tensor)
    if len(values.spec.shape) != 2:
        raise UsageError(f"{escape(one.name)} is {one.tensor.spec}: a direction is taken out of matrices")
    _check_factors(values, given.weight)
    vector = _direction(one, given, around)
    sides = {"output": values.spec.shape[0], "input": values.spec.shape[1]}
    fitting = [side for side, size in sides.items() if size == len(vector)]
    if not fitting or (given.side is not None and given.side not in fitting):
        raise UsageError(f"{escape(one.name)} is {one.tensor.spec}, and the direction has {len(vector)} numbers")
    side = given.side or (fitting[0] if len(fitting) == 1 else None)
    if side is None:
        raise UsageError(
            f"{escape(one.name)} is square: whether its rows or its columns have the direction is for you to say",
            hint="side: output for what writes to the residual (o_proj, down_proj), input for what reads it",
        )
    kind = values.spec.dtype
    along = LazyTensor.make(Given(kind, (len(vector),), vector.astype(np.dtype(kind.value)).tobytes()))
    return _rounded(one, LazyTensor.make(Projected(given.weight, side == "output"), values, along))


def unit_rows(one: Selected, given: Any, around: Tensors) -> LazyTensor:
    """Each row as a unit vector, in float32, rounded once."""
    return _rounded(one, LazyTensor.make(UnitRows(), wide(one.tensor)))


def _direction(one: Selected, given: Project, around: Tensors) -> NDArray[Any]:
    """The unit vector for a tensor, in float64; raises `UsageError` for what is no direction."""
    import numpy as np

    names = around.names(given.onto)
    name = given.tensor or (names[0] if len(names) == 1 else None)
    if name is None:
        raise UsageError(f"{escape(given.onto)} holds {len(names)} tensors", hint="tensor: NAME says which")
    tensor = wide(around.find(given.onto, fill_in(name, one.match)))
    layer = None
    if len(tensor.spec.shape) == 2 and tensor.spec.shape[0] > 1:
        by = given.by or next((g for g in one.match.groupdict() if (one.match[g] or "").isdecimal()), None)
        if by is None:
            raise UsageError(
                f"{escape(given.onto)}: {escape(name)} is {tensor.spec}, with a direction for each layer",
                hint="by: names the group of select that holds the layer's number",
            )
        layer = int(fill_in(f"{{{by}}}", one.match))
        if layer >= tensor.spec.shape[0]:
            raise UsageError(f"{escape(given.onto)}: {escape(name)} is {tensor.spec}, and has no layer {layer}")
        tensor = one_of(tensor, layer)
    (data,) = around.evaluate([tensor])
    found = np.frombuffer(data, tensor.spec.dtype.value).reshape(-1).astype(np.float64)
    length = float(np.linalg.norm(found))
    if not math.isfinite(length) or length == 0:
        raise UsageError(f"{escape(given.onto)}: {escape(name)} is no direction: its length is {length}")
    if abs(length - 1) > _UNIT:
        note = f"{escape(given.onto)}: {escape(name)} has the length {length:.6g}, and is taken as a unit vector"
        if note not in around.notes:
            around.notes.append(note)
    return found / length


ONE: Mapping[str, Callable[[Selected, Any, Tensors], LazyTensor]] = {
    "take": take,
    "transpose": transpose,
    "view": view,
    "fill": fill,
    "scale": scale,
    "lowrank": lowrank,
    "combine": combine,
    "project": project,
    "unit_rows": unit_rows,
}
SEVERAL: Mapping[str, Callable[[Selected, Any, Tensors], list[LazyTensor]]] = {"split": split, "unstack": unstack}
JOINED = ("concat", "stack")
MOVES = ("name", "drop")
"""What does not look into tensors, so that packed ones may be moved by it."""
