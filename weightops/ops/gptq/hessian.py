"""The Hessian of a layer's squared output error, and its factor, in little more memory than one matrix.

With X the inputs that a linear layer sees, [tokens, columns], the error of changed weights is quadratic, with
H = 2/n X^T X. GPTQ (Frantar et al., arXiv 2210.17323) takes the Cholesky factor of the inverse of H + damping, three
steps of columns^3. But its result is also that of rounding with feedback from H = R R^T itself, R upper triangular
(LDLQ: Chee et al., QuIP, arXiv 2307.13304, theorem 6), which is one Cholesky factorisation of the reversed matrix, and
is done in place in the lower half of it. The upper half stays as it was, for measuring errors, and for another try
where H is singular.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weightops.errors import UsageError
from weightops.ops.gptq.grid import Settings

DAMP_STEP = 0.01
"""By how much damping grows each time that the Hessian is not positive definite."""
_FLOOR_ROUNDS = 6
_TILE = 512


class Hessian:
    """2/n X^T X in float32, added up batch by batch; never more than this one matrix and a batch in float32."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns = columns
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add inputs of any float type, [..., columns]. Raises UsageError for another number of columns."""
        if inputs.shape[-1] != self.columns:
            raise UsageError(f"inputs have {inputs.shape[-1]} columns, and the layer has {self.columns}")
        batch = inputs.detach().reshape(-1, self.columns).to(device=self._sum.device, dtype=torch.float32)
        if not len(batch):
            return
        # The sum is symmetric: only its lower half is added up, which saves half of the work.
        for start in range(0, self.columns, _TILE):
            stop = min(start + _TILE, self.columns)
            self._sum[start:, start:stop].addmm_(batch[:, start:].T, batch[:, start:stop])
        self.tokens += len(batch)

    def matrix(self) -> Tensor:
        """2/n X^T X [columns, columns], symmetric; zeros if nothing was added. Ends the adding up."""
        if self.tokens:
            self._sum.mul_(2 / self.tokens)
        _mirror_(self._sum)
        return self._sum


@dataclass(frozen=True)
class Factor:
    """A Hessian made ready for any number of layers that see the same inputs.

    `order` [columns] holds the columns as they will be taken. `matrix` [columns, columns] is in the reverse of that
    order: up to the diagonal the factor, above it the Hessian; `diagonal` [columns] is the Hessian's own, in the order.
    `damp` is the share of the mean diagonal that was added; `floor` tells of a diagonal that had to be raised further.
    `dead` [columns] marks, in the order, columns whose inputs were always 0. `is_inverse`: the factor is GPTQ's own, U
    with (H + damping)^-1 = U^T U, not R.
    """

    order: Tensor
    matrix: Tensor
    diagonal: Tensor
    dead: Tensor
    damp: float
    floor: float = 0.0
    is_inverse: bool = False

    def rows(self, start: int, stop: int, end: int | None = None) -> Tensor:
        """U[start:stop, start:end], from the diagonal on; of R with columns divided by their diagonal elements."""
        total = len(self.order)
        columns = slice(0 if end is None else total - end, total - start)
        rows = self.matrix[total - stop : total - start, columns].flip(0, 1)
        return rows if self.is_inverse else rows.div_(self.matrix.diagonal()[columns].flip(0))

    def error(self, change: Tensor) -> Tensor:
        """The mean over tokens of the squared change of the outputs, summed over outputs; float64, no dimensions.

        `change` [columns, outputs] in the order is what the weights change by. It is tr(D^T H D) / 2.
        """
        reverse = change.flip(0)
        total = (change.square().sum(1, dtype=torch.float64) * self.diagonal).sum() / 2
        for start in range(0, len(reverse), _TILE):
            part = slice(start, start + _TILE)
            product = self.matrix[part, part].triu(1) @ reverse[part]
            product.addmm_(self.matrix[part, start + _TILE :], reverse[start + _TILE :])
            total += (product.mul_(reverse[part])).sum(dtype=torch.float64)
        return total


def factorise(hessian: Tensor, settings: Settings) -> Factor | str:
    """Order, damp, factorise and invert a Hessian [columns, columns], which is overwritten; or why that cannot be done.

    Damping starts at `damp_percent` of the mean diagonal and grows by 0.01 while the Hessian is not positive definite;
    then a floor of 1e-6 * 10^k of the greatest diagonal is tried as well. `settings` must divide the columns.
    """
    diagonal = hessian.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()) or not bool(torch.isfinite(hessian.sum())):
        return "activations are NaN or infinite"
    dead = diagonal == 0
    if bool(dead.all()):
        return "no activation reached this layer"
    order = column_order(diagonal, settings)
    diagonal, dead = diagonal[order], dead[order]
    _permute_(hessian, order.flip(0))
    filled = diagonal.masked_fill(dead, 1.0 if settings.reference_order else float(diagonal[~dead].mean()))
    mean, greatest = filled.mean(), filled.max()
    steps = int((1 - settings.damp_percent) / DAMP_STEP + 0.5)
    damps = [settings.damp_percent + step * DAMP_STEP for step in range(max(1, steps))]
    floors = [1e-6 * 10**k for k in range(_FLOOR_ROUNDS)]
    for damp, floor in [(damp, 0.0) for damp in damps] + [(damps[-1], floor) for floor in floors]:
        damped = (filled + damp * mean).clamp_(min=float(floor * greatest))
        hessian.diagonal().copy_(damped.flip(0))
        if _factor_(hessian, settings):
            return Factor(order, hessian, diagonal, dead, damp, floor, settings.reference_order)
        _mirror_(hessian, upper=True)
    return "the Hessian is singular, and damping does not help"


def column_order(diagonal: Tensor, settings: Settings) -> Tensor:
    """The columns, as the solver takes them, from the Hessian's diagonal [columns]."""
    columns = len(diagonal)
    width = settings.width(columns)
    free = settings.group_aware and (settings.static_groups or width == columns) and not settings.reference_order
    if settings.desc_act or free:
        return torch.argsort(diagonal, descending=True, stable=True)
    if not settings.group_aware:
        return torch.arange(columns, device=diagonal.device)
    values, inside = diagonal.reshape(-1, width).sort(dim=1, descending=True, stable=True)
    groups = torch.argsort(values[:, 0], descending=True, stable=True)
    return (inside + torch.arange(0, columns, width, device=diagonal.device)[:, None])[groups].reshape(-1)


def _factor_(matrix: Tensor, settings: Settings) -> bool:
    """Replace the lower half of a reversed Hessian by its Cholesky factor; False if it has none."""
    if settings.reference_order:
        return _in_three_steps_(matrix)
    if not _cholesky_(matrix):
        return False
    diagonal = matrix.diagonal()
    return bool((torch.isfinite(diagonal) & (diagonal > 0)).all())


def _in_three_steps_(matrix: Tensor) -> bool:
    """The factor of the inverse instead, as gptqmodel makes it: factor, inverse, factor of the inverse."""
    factor, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info):
        return False
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if int(info):
        return False
    matrix.triu_(1).add_(upper.flip(0, 1))
    return True


def _cholesky_(matrix: Tensor) -> bool:
    """Replace the lower half by the Cholesky factor; nothing above the diagonal changes. False if there is none."""
    size = len(matrix)
    for start in range(0, size, _TILE):
        stop = min(start + _TILE, size)
        corner, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if int(info):
            return False
        _set_lower_(matrix[start:stop, start:stop], corner)
        panel = torch.linalg.solve_triangular(corner.mT, matrix[stop:, start:stop], upper=True, left=False)
        matrix[stop:, start:stop] = panel
        for left in range(stop, size, _TILE):
            right = min(left + _TILE, size)
            tile = panel[left - stop : right - stop]
            matrix[left:right, left:right] -= (tile @ tile.mT).tril_()
            matrix[right:, left:right].addmm_(panel[right - stop :], tile.mT, alpha=-1)
    return True


def _set_lower_(tile: Tensor, lower: Tensor) -> None:
    """Set what is on and below the diagonal to that of `lower`."""
    tile.copy_(lower.tril() + tile.triu(1))


def _mirror_(matrix: Tensor, upper: bool = False) -> None:
    """Make a matrix symmetric by copying one half to the other: the lower one, or the upper one."""
    for start in range(0, len(matrix), _TILE):
        stop = min(start + _TILE, len(matrix))
        corner = matrix[start:stop, start:stop]
        half = corner.triu(1) if upper else corner.tril(-1)
        corner.copy_(half + half.mT + corner.diagonal().diag())
        if upper:
            matrix[stop:, start:stop] = matrix[start:stop, stop:].mT
        else:
            matrix[start:stop, stop:] = matrix[stop:, start:stop].mT


def _permute_(matrix: Tensor, order: Tensor) -> None:
    """Rows and columns of a symmetric matrix in another order, in place: columns, transpose, columns."""
    for again in (True, False):
        for start in range(0, len(matrix), _TILE):
            part = matrix[start : start + _TILE]
            part.copy_(part.index_select(1, order))
        if again:
            _transpose_(matrix)


def _transpose_(matrix: Tensor) -> None:
    """A square matrix transposed in place, tile by tile."""
    for top in range(0, len(matrix), _TILE):
        for left in range(top, len(matrix), _TILE):
            one = matrix[top : top + _TILE, left : left + _TILE]
            other = matrix[left : left + _TILE, top : top + _TILE]
            kept = one.mT.clone()
            one.copy_(other.mT.clone())
            other.copy_(kept)
