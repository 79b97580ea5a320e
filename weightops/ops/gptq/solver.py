"""GPTQ: a linear layer's weights rounded one input column after the other, each error made good by the columns to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323.
Pure functions of torch tensors on any device. The result is integers, zero points and scales as the file holds them,
and weights are rounded with just these scales, so that what was optimised is what is stored.

The loop works on the transposed matrix, where a column's weights are contiguous. Errors spread in three steps: column
by column inside a strip of 16, strip by strip inside a block of 128, and from a block to all that follows.

Integers are the same from run to run on one machine; another BLAS or number of threads adds up in another order, and
changes a few integers in a hundred, but not the error in its first three digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.io.escape import escape
from weightops.ops.gptq.grid import CEILING, FLOOR, Settings, find, levels, spans, stored
from weightops.ops.gptq.hessian import Factor, Hessian, factorise

__all__ = [
    "Factor",
    "Hessian",
    "Settings",
    "Solved",
    "dequantized",
    "factorise",
    "output_power",
    "round_to_nearest",
    "solve",
    "solve_together",
]

_STRIP = 16
_MEASURED = 256
"""Of how many outputs, evenly spaced, errors are measured: that of all is within a few percent of it."""
_OUTPUTS = 256


@dataclass(frozen=True)
class Solved:
    """A quantised layer of `columns` inputs (K), `outputs` (N) and G groups: `scales[g] * (q - zeros[g])`.

    `q` uint8 [K, N], `scales` float16 [G, N], `zeros` uint8 [G, N] (the true zero points), `g_idx` int32 [K], the group
    of each column.

    `loss` is the mean over the calibration tokens of the squared change of the outputs, summed over outputs (of more
    than 256, no more than that are measured, and the sum is in proportion); `error_rtn` what rounding to nearest would
    give. Both are NaN where no Hessian could be used. `damp` is the share of the Hessian's mean diagonal that was added
    to it, `floor` that of its greatest diagonal below which none was left. `dead_columns` counts inputs that were
    always 0. `fallback` says why weights were rounded to nearest; None where GPTQ was used.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    loss: float
    error_rtn: float
    damp: float = 0.0
    floor: float = 0.0
    dead_columns: int = 0
    fallback: str | None = None

    @property
    def floored_scales(self) -> int:
        """Scales that were raised to the least normal float16."""
        return int((self.scales <= FLOOR).sum())


def solve(weight: Tensor, hessian: Tensor | Factor | str, settings: Settings, *, label: str = "the weight") -> Solved:
    """Quantise `weight` [outputs, columns] of any float type by GPTQ, or to nearest where GPTQ cannot be used.

    `hessian` [columns, columns] in float32 is overwritten. What `factorise` made of it may be given instead, which may
    be the reason for having no factor. GPTQ's result is given up for rounding to nearest if that has the smaller error.
    Raises CorruptInput for NaN or infinite weights, IncompatibleInputs for weights too large for float16 scales or a
    Hessian of another size, and UsageError for columns that do not divide into groups; `label` is what messages call
    the weight.
    """
    return solve_together({label: weight}, hessian, settings)[label]


def solve_together(
    weights: Mapping[str, Tensor], hessian: Tensor | Factor | str, settings: Settings
) -> dict[str, Solved]:
    """`solve` for layers that see the same inputs, by their labels: one loop over their columns is enough."""
    for label, weight in weights.items():
        _check(weight, settings, label)
        columns = weight.shape[1]
        size = hessian.matrix.shape if isinstance(hessian, Factor) else getattr(hessian, "shape", (columns, columns))
        if tuple(size) != (columns, columns):
            raise IncompatibleInputs(f"{escape(label)} has {columns} columns, and its Hessian is {list(size)}")
    factor = factorise(hessian, settings) if isinstance(hessian, Tensor) else hessian
    if isinstance(factor, str):
        return {label: _rounded(weight, settings, None, fallback=factor) for label, weight in weights.items()}
    whole, start, found = _loop(list(weights.values()), factor, settings), 0, {}
    for label, weight in weights.items():
        found[label] = _compared(weight, _at(whole, slice(start, start + len(weight))), factor, settings)
        start += len(weight)
    return found


def _compared(weight: Tensor, solved: Solved, factor: Factor, settings: Settings) -> Solved:
    """With its errors; or the weight rounded to nearest, if that is better."""
    rows = _measured(weight)
    error_rtn = _error(weight[rows], _rounded(weight[rows], settings, None), factor) * len(weight) / len(rows)
    loss = _error(weight[rows], _at(solved, rows), factor) * len(weight) / len(rows)
    if loss <= error_rtn or settings.reference_order:
        return replace(solved, loss=loss, error_rtn=error_rtn)
    return _rounded(
        weight, settings, factor, f"GPTQ's error of {loss:.3g} exceeds the {error_rtn:.3g} of rounding to nearest"
    )


def round_to_nearest(
    weight: Tensor, settings: Settings, hessian: Factor | None = None, *, label: str = "the weight"
) -> Solved:
    """Quantise `weight` [outputs, columns] to the nearest points of each group's grid; groups are those of the columns.

    With the factor of a Hessian, `loss` tells the error. Raises as `solve` does.
    """
    _check(weight, settings, label)
    return _rounded(weight, settings, hessian)


def dequantized(solved: Solved) -> Tensor:
    """The weight [outputs, columns] in float32."""
    groups = solved.g_idx.long()
    difference = solved.q.float().sub_(solved.zeros.float()[groups])
    return difference.mul_(solved.scales.float()[groups]).T


def _check(weight: Tensor, settings: Settings, label: str) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UsageError(f"{escape(label)} is {weight.dtype} {list(weight.shape)}, not a matrix of floats")
    settings.width(weight.shape[1])
    if not weight.numel():
        raise UsageError(f"{escape(label)} has no outputs")
    low, high = torch.aminmax(weight)
    greatest = float(torch.maximum(-low, high))
    if greatest != greatest or greatest == float("inf"):
        raise CorruptInput(
            f"{escape(label)} holds NaN or infinity, and cannot be quantised", hint="`weightops check` lists them all"
        )
    # The widest grid: symmetric, or an asymmetric one that has one point less (v1).
    if greatest * 2 / (settings.maxq - 1) > CEILING:
        raise IncompatibleInputs(
            f"{escape(label)} holds {greatest:.3g}, too large for a float16 scale at {settings.bits} bits",
            hint="keep this layer unquantised",
        )


def _rounded(weight: Tensor, settings: Settings, factor: Factor | None, fallback: str | None = None) -> Solved:
    """Every group by itself; the error too, if there is a factor."""
    outputs, columns = weight.shape
    width, device = settings.width(columns), weight.device
    q = torch.empty(columns, outputs, dtype=torch.uint8, device=device)
    scales = torch.empty(columns // width, outputs, dtype=torch.float32, device=device)
    zeros = torch.empty_like(scales)
    for group, start in enumerate(range(0, columns, width)):
        values = weight[:, start : start + width].T.float().contiguous()
        scales[group], zeros[group] = find(values, settings)
        q[start : start + width] = levels(values, scales[group], zeros[group], settings.maxq)
    g_idx = torch.arange(columns, dtype=torch.int32, device=device) // width
    rounded = _solved(q, scales, zeros, g_idx, factor, fallback)
    if factor is None:
        return rounded
    rows = _measured(weight)
    error = _error(weight[rows], _at(rounded, rows), factor) * outputs / len(rows)
    return replace(rounded, loss=error, error_rtn=error)


def _loop(weights: Sequence[Tensor], factor: Factor, settings: Settings) -> Solved:
    """GPTQ proper, of weights one below the other, without a look at the errors."""
    order, columns, outputs = factor.order, len(factor.order), sum(map(len, weights))
    width, maxq, device = settings.width(columns), settings.maxq, weights[0].device
    given = torch.empty(columns, outputs, dtype=torch.float32, device=device)
    for start in range(0, columns, settings.block_size):
        part = slice(start, start + settings.block_size)
        torch.cat([weight.index_select(1, order[part]).T for weight in weights], 1, out=given[part])
    taken = torch.arange(columns, device=device) if settings.desc_act and not settings.static_groups else order
    groups = taken // width
    scales = torch.empty(columns // width, outputs, dtype=torch.float32, device=device)
    zeros = torch.empty_like(scales)
    if settings.static_groups:
        back = torch.argsort(order)
        for group, start in enumerate(range(0, columns, width)):
            scales[group], zeros[group] = find(given[back[start : start + width]], settings)
    # U tells what follows from the error of a weight that was changed before, R from that of the weight itself.
    rest = given if factor.is_inverse else given.clone()
    if settings.reference_order:
        rest[factor.dead] = 0
    q = torch.empty(columns, outputs, dtype=torch.uint8, device=device)
    near = torch.empty(outputs, dtype=torch.float32, device=device)
    strip = settings.block_size if settings.reference_order else min(_STRIP, width)
    numbers, natural, sign = groups.tolist(), order.tolist(), -1 if factor.is_inverse else 1
    # Rows are taken apart once: making a view takes as long as the arithmetic of a thousand weights.
    integers, scale_of, zero_of = q.unbind(), scales.unbind(), zeros.unbind()
    for start, stop in spans(0, columns, width, settings.block_size):
        upper, block = factor.rows(start, stop), rest[start:stop]
        errors = torch.empty(stop - start, outputs, dtype=torch.float32, device=device)
        values, wanted, missed = block.unbind(), given[start:stop].unbind(), errors.unbind()
        for first, last in spans(start, stop, width, strip):
            a, b = first - start, last - start
            for i in range(a, b):
                k = start + i
                group = numbers[k]
                if not settings.static_groups and k % width == 0:
                    part = slice(k, k + width)
                    scales[group], zeros[group] = find(_corrected(rest[part], given[part], factor, k), settings)
                scale, zero = scale_of[group], zero_of[group]
                levels(values[i], scale, zero, maxq, out=near)
                integers[natural[k]].copy_(near)
                torch.sub(wanted[i], near.sub_(zero).mul_(scale), out=missed[i])
                if factor.is_inverse:
                    missed[i].div_(upper[i, i])
                    block[i + 1 : b] -= upper[i, i + 1 : b, None] * missed[i]
                elif i + 1 < b:
                    block[i + 1 : b].addr_(upper[i, i + 1 : b], missed[i])
            if b < stop - start:
                block[b:].addmm_(upper[a:b, b : stop - start].T, errors[a:b], alpha=sign)
        if stop < columns:
            rest[stop:].addmm_(upper[:, stop - start :].T, errors, alpha=sign)
    return _solved(q, scales, zeros, groups[torch.argsort(order)].int(), factor)


def _corrected(rest: Tensor, given: Tensor, factor: Factor, start: int) -> Tensor:
    """The group of columns [columns, outputs] from `start` on, as it is best after the errors before it."""
    if factor.is_inverse or not start:
        return rest
    # From R each column is corrected for all columns before it, of which those in the group are still to come.
    stop = start + len(rest)
    corner = factor.rows(start, stop, stop)
    change: Tensor = torch.linalg.solve_triangular(corner.T, rest - given, upper=False, unitriangular=True)
    return change.add_(given)


def _solved(
    q: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor, factor: Factor | None, fallback: str | None = None
) -> Solved:
    """What was found, in the types of the file."""
    nan = float("nan")
    solved = Solved(q, stored(scales), zeros.byte(), g_idx, nan, nan, fallback=fallback)
    if factor is None:
        return solved
    return replace(solved, damp=factor.damp, floor=factor.floor, dead_columns=int(factor.dead.sum()))


def output_power(weight: Tensor, factor: Factor) -> float:
    """The mean over the calibration tokens of the squared outputs, summed over outputs: what `loss` is a part of."""
    outputs = _measured(weight)
    total = float(factor.error(weight[outputs].T.float()[factor.order]))
    return total * len(weight) / len(outputs)


def _measured(weight: Tensor) -> Tensor:
    """The outputs of which errors are measured."""
    step = -(-len(weight) // _MEASURED)
    return torch.arange(0, len(weight), step, device=weight.device)


def _at(solved: Solved, outputs: Tensor | slice) -> Solved:
    q, scales, zeros = (part[:, outputs].contiguous() for part in (solved.q, solved.scales, solved.zeros))
    return replace(solved, q=q, scales=scales, zeros=zeros)


def _error(weight: Tensor, solved: Solved, factor: Factor) -> float:
    """The error of the outputs that the stored integers, scales and zero points give."""
    total, groups = 0.0, solved.g_idx.long()
    for start in range(0, len(weight), _OUTPUTS):
        part = slice(start, start + _OUTPUTS)
        change = solved.q[:, part].float().sub_(solved.zeros[:, part].float()[groups])
        change.mul_(solved.scales[:, part].float()[groups]).sub_(weight[part].T)
        total += float(factor.error(change[factor.order]))
    return total
