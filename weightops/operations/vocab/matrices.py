"""The tensors of a changed vocabulary: each row of each from where the change says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.vocab.body import Body, TokenTensor
from weightops.operations.vocab.change import After, Change, Mix, Row
from weightops.ops.elementwise import Reinterpret
from weightops.ops.gather import combined
from weightops.ops.pursuit import Pursuit
from weightops.ops.rows import FiniteMean, Given, NormalRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DEFAULT_STD = 0.02
_NO_ROW = -1
Term = tuple[int, int, float]


@dataclass(frozen=True)
class Chance:
    """Where normal numbers come from: a seed, and their standard deviation."""

    seed: int
    std: float


def deviation(config: Mapping[str, Any]) -> float:
    """The standard deviation that a model's weights are made with, by its config.json."""
    stated = config.get("initializer_range")
    return float(stated) if isinstance(stated, int | float) and not isinstance(stated, bool) else _DEFAULT_STD


def changed_tensors(body: Body, change: Change, chance: Chance, evaluate: Evaluate) -> dict[str, LazyTensor]:
    """The tensors with an entry for each token, by name, as they are to be.

    Of tied embeddings that are stored twice both are the same. Means are computed here, in one pass over each matrix
    that needs one. Raises `IncompatibleInputs` where such a matrix holds NaN or infinities.
    """
    wanted = {each.name: _rows(each, body, change) for each in body.tensors}
    means = _means(body, [each for each in body.tensors if "mean" in wanted[each.name]], evaluate)
    made: dict[str, LazyTensor] = {}
    for each in body.tensors:
        if body.is_tied and each.holds == "output":
            made[each.name] = made[body.embedding.name]
        else:
            made[each.name] = _made(each, wanted[each.name], change.after, means.get(each.name), chance)
    return made


def per_layer_rows(body: Body, change: Change) -> int | None:
    """How many rows the embeddings of single layers get, which may have fewer than the others; None without such."""
    return next((len(_rows(each, body, change)) for each in body.tensors if each.holds == "per layer"), None)


def _rows(each: TokenTensor, body: Body, change: Change) -> Sequence[Row]:
    """The rows of one tensor."""
    rows = change.inputs if each.holds in ("input", "per layer") else change.outputs
    if each.holds == "bias":
        # A bias has no donor, and normal numbers are for weights.
        return ["zero" if row == "donor" else "mean" if row == "normal" else row for row in rows]
    if each.holds != "per layer":
        return rows
    rows = ["mean" if row == "donor" else row for row in rows]
    if each.entries == body.rows:
        return rows
    # Tokens that come later have no vector for each layer, and need none.
    last = max((i for i, row in enumerate(rows) if isinstance(row, int) and row < each.entries), default=-1)
    there = [row if not isinstance(row, int) or row < each.entries else "zero" for row in rows[: last + 1]]
    return [row if not isinstance(row, Mix) or max(row.rows) < each.entries else "zero" for row in there]


def _matrix(each: TokenTensor) -> LazyTensor:
    """The tensor as `[tokens, columns]`; vectors have one column."""
    shape = each.tensor.spec.shape
    if len(shape) == 2 and each.axis == 0:
        return each.tensor
    if each.tensor.spec.numel != each.entries:
        raise IncompatibleInputs(f"{escape(each.name)} is {each.tensor.spec}, expected one number for each token")
    return LazyTensor.make(Reinterpret(each.tensor.spec.dtype, (each.entries, 1)), each.tensor)


def _means(body: Body, wanted: Sequence[TokenTensor], evaluate: Evaluate) -> dict[str, LazyTensor]:
    """The mean row of each tensor that needs one, as a tensor that is known already."""
    needed = [each for each in wanted if not (body.is_tied and each.holds == "output")]
    matrices = [_matrix(each) for each in needed]
    labels = [f"{body.checkpoint.name}: {each.name}" for each in needed]
    means = [LazyTensor.make(FiniteMean(label), m) for label, m in zip(labels, matrices, strict=True)]
    return {
        each.name: LazyTensor.make(Given(mean.spec.dtype, mean.spec.shape, data))
        for each, mean, data in zip(needed, means, evaluate(means), strict=True)
    }


def _made(
    each: TokenTensor, rows: Sequence[Row], after: After | None, mean: LazyTensor | None, chance: Chance
) -> LazyTensor:
    matrix = _matrix(each)
    if list(rows) == list(range(each.entries)):
        return each.tensor
    import numpy as np

    inputs = [matrix]

    def put(tensor: LazyTensor) -> int:
        inputs.append(tensor)
        return len(inputs) - 1

    columns, dtype = matrix.spec.shape[1], matrix.spec.dtype
    mean_at = put(mean) if mean is not None else 0
    normal_at = put(_normal(each, len(rows), chance)) if "normal" in rows else 0
    after_at = put(_pursuit(each, after)) if after is not None and "donor" in rows else 0
    first = len(after.rows) if after is not None else 0
    numbers = np.fromiter((row if type(row) is int else _NO_ROW for row in rows), "<i4", len(rows))
    if after is not None and after_at:
        same = numbers[:first] == np.array(after.rows[: len(rows)])
        copied = np.flatnonzero(same & (numbers[:first] != _NO_ROW)).tolist()
    else:
        copied = []
    terms: dict[int, list[Term]] = {i: [(after_at, i, 1.0)] for i in copied}
    for i in np.flatnonzero(numbers == _NO_ROW).tolist():
        row = rows[i]
        if isinstance(row, Mix):
            terms[i] = [(0, old, weight) for old, weight in zip(row.rows, row.weights, strict=True)]
        else:
            made_by = {"mean": (mean_at, 0, 1.0), "normal": (normal_at, i, 1.0), "donor": (after_at, i, 1.0)}
            terms[i] = [made_by[str(row)]] if row != "zero" else []
    made = _combined(inputs, numbers, terms)
    if made.spec.shape == (len(rows), columns) and len(each.tensor.spec.shape) == 2 and each.axis == 0:
        return made
    shape = tuple(len(rows) if axis == each.axis else size for axis, size in enumerate(each.tensor.spec.shape))
    return LazyTensor.make(Reinterpret(dtype, shape), made)


def _combined(inputs: Sequence[LazyTensor], numbers: NDArray[Any], terms: Mapping[int, list[Term]]) -> LazyTensor:
    """Rows of the first input by their numbers, but for those that have terms of their own."""
    import numpy as np

    counts = np.ones(len(numbers), "<i8")
    for i, own in terms.items():
        counts[i] = len(own)
    begins = counts.cumsum() - counts
    places, weights = np.zeros((int(counts.sum()), 2), "<i8"), np.ones(int(counts.sum()))
    plain = np.ones(len(numbers), bool)
    plain[list(terms)] = False
    places[begins[plain], 1] = numbers[plain]
    for i, own in terms.items():
        for at, (source, place, weight) in enumerate(own, int(begins[i])):
            places[at], weights[at] = (source, place), weight
    return combined(inputs, places, counts, weights)


def _normal(each: TokenTensor, rows: int, chance: Chance) -> LazyTensor:
    spec = each.tensor.spec
    return LazyTensor.make(NormalRows(spec.dtype, (rows, spec.shape[1]), chance.std, chance.seed, each.name))


def _pursuit(each: TokenTensor, after: After) -> LazyTensor:
    import numpy as np

    donor = after.donor.embedding if each.holds == "input" else after.donor.head
    rows, common = np.array(after.rows, "<i4").tobytes(), np.array(after.common, "<i4").tobytes()
    return LazyTensor.make(Pursuit(rows, common, after.k), donor.tensor, each.tensor)
