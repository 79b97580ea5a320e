"""Means on the sphere: of directions, with lengths apart.

Every step stays among combinations of the models, so that angles follow from the products of pairs (the Gram matrix),
which take one pass. In 16 bits mergekit 0.1.5 rounds each step, and its angles with them: there the steps are made
again in the tensors' dtype, element by element, with numbers that are rounded as its are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.ops.merging.bits import add
from weightops.ops.merging.inputs import Inputs
from weightops.ops.merging.method import Blockwise
from weightops.ops.merging.spherical import squares, sums, total

if TYPE_CHECKING:
    import torch

    Blocks = Sequence[torch.Tensor]


_MAX_KEPT_NBYTES = 32 << 20
_LEAST = 1e-5
"""The length from which on a mean has a direction."""


def gram(inputs: Inputs, vectors: Callable[[Blocks], Blocks]) -> torch.Tensor:
    """Products of each pair of `vectors`, over whole tensors: `[k, k]` in float64."""
    import torch

    n = len(vectors([torch.zeros(1)] * len(inputs.tensors)))
    pairs = [(i, j) for i in range(n) for j in range(i + 1)]

    def terms(blocks: Blocks) -> list[torch.Tensor]:
        wide = [vector.to(inputs.wide) for vector in vectors(blocks)]
        return [wide[i] * wide[j] for i, j in pairs]

    found = torch.zeros(n, n, dtype=torch.float64)
    for (i, j), value in zip(pairs, sums(inputs, terms), strict=True):
        found[i, j] = found[j, i] = value
    return found


def multislerp(
    inputs: Inputs, *, weight: Sequence[float], normalize_weights: bool = True, eps: float = 1e-8
) -> Blockwise:
    """The weighted mean of directions on the sphere, about their projected mean, times the weighted mean of lengths."""
    import torch

    dtype, base = inputs.dtype, inputs.base
    weights = torch.tensor(inputs.of_others(weight), dtype=dtype)
    if normalize_weights:
        weights = weights / weights.sum()
    if len(weights) == 1:
        (only,) = inputs.others
        return lambda blocks, first: blocks[only].clone()
    norms = sums(inputs, lambda blocks: squares(inputs.changes(blocks), inputs.wide)).sqrt().to(dtype)
    if not norms.any():  # where nobody changed anything there is no direction, and nothing to add
        return lambda blocks, first: blocks[base or 0].clone()
    divisors = torch.where(norms + eps > 0, norms + eps, 1)  # eps is 0 in float16

    def units(blocks: Blocks) -> list[torch.Tensor]:
        return [change / divisor for change, divisor in zip(inputs.changes(blocks), divisors, strict=True)]

    def whole(blocks: Blocks) -> torch.Tensor:
        return add(_times(units(blocks), weights))

    length = sums(inputs, lambda blocks: squares([whole(blocks)], inputs.wide))[0].sqrt().to(dtype)
    if length < eps:
        if len(weights) > 2:
            raise IncompatibleInputs(
                f"{escape(inputs.name)}: the weighted sum of the models' directions is zero, and has no direction",
                hint="merge this tensor with other weights, or by another method than multislerp",
            )
        return lambda blocks, first: _from(base, blocks, add(_times(inputs.changes(blocks), weights)))
    cosines = sums(inputs, lambda blocks: [unit * (whole(blocks) / length) for unit in units(blocks)]).to(dtype)

    def directions(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean's direction, and the tangent at it."""
        mean = whole(blocks) / length
        tangents = [unit - cosine * mean for unit, cosine in zip(units(blocks), cosines, strict=True)]
        return mean, add(_times(tangents, weights))

    angle = sums(inputs, lambda blocks: squares([directions(blocks)[1]], inputs.wide))[0].sqrt().to(dtype) + eps
    turn = torch.where(angle > 0, torch.sin(angle) / angle, 1)
    size = (norms * weights).sum()

    def compute(blocks: Blocks, first: int) -> torch.Tensor:
        mean, tangent = directions(blocks)
        return _from(base, blocks, (mean * torch.cos(angle) + tangent * turn) * size)

    return compute


def _times(vectors: Blocks, factors: torch.Tensor) -> list[torch.Tensor]:
    return [vector * factor for vector, factor in zip(vectors, factors, strict=True)]


def _from(base: int | None, blocks: Blocks, result: torch.Tensor) -> torch.Tensor:
    return result if base is None else result + blocks[base]


def karcher(inputs: Inputs, *, max_iter: int = 10, tol: float = 1e-5) -> Blockwise:
    """The mean of directions on the sphere (Karcher's), times the mean length; no weights (arXiv 2603.04972)."""
    import torch

    if len(inputs.tensors) == 1:
        return lambda blocks, first: blocks[0].clone()
    products = gram(inputs, lambda blocks: blocks)
    norms = products.diagonal().sqrt()
    used = [i for i, norm in enumerate(norms) if norm > tol]
    if not used:
        return lambda blocks, first: blocks[0] * 0
    size = (norms.sum() / len(norms)).to(inputs.wide)
    if torch.finfo(inputs.dtype).bits > 16:
        factors = _mean_factors((products / norms.outer(norms))[used][:, used], max_iter, tol) / norms[used] * size
        return lambda blocks, first: add(_times([blocks[i] for i in used], factors.to(inputs.dtype)))
    steps = _RoundedSteps(inputs, used, norms)
    while len(steps.made) < max_iter and steps.go(tol):
        pass
    return lambda blocks, first: size * steps.mean(blocks, first)


def _mean_factors(products: torch.Tensor, max_iter: int, tol: float) -> torch.Tensor:
    """Of unit vectors with these products those whose combination is their mean."""
    import torch

    n, share = len(products), 1 / len(products)

    def norm(vector: torch.Tensor) -> torch.Tensor:
        return (vector @ products @ vector).clamp(min=0).sqrt()

    mean = torch.full((n,), share, dtype=torch.float64)
    mean = mean / norm(mean) if norm(mean) >= tol else torch.eye(n, dtype=torch.float64)[0]
    for _ in range(max_iter):
        cosines = (products @ mean).clamp(-1, 1)
        angles = torch.arccos(cosines)
        moves = angles >= tol
        factors = torch.where(moves, share * angles / torch.sin(torch.where(moves, angles, 1)), 0)
        tangent = factors - (factors * cosines).sum() * mean
        step = norm(tangent)
        if not step >= tol:
            break
        mean = torch.cos(step) * mean + torch.sin(step) * tangent / step
        mean = mean / norm(mean) if norm(mean) > tol else mean
    return mean


class _RoundedSteps:
    """Steps towards the mean of unit vectors of 16 bits, each rounded to them, as are the angles that decide on it.

    The mean is kept in memory, or where that takes too much, made again from the first step on.
    """

    def __init__(self, inputs: Inputs, used: Sequence[int], norms: torch.Tensor) -> None:
        import torch

        self._inputs, self._used = inputs, used
        self._norms = norms.to(inputs.wide)
        self._share = 1 / len(used)
        self.made: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """Of each step the cosines, the factors of the vectors, the length of the step, and that of the mean then."""
        nbytes = inputs.numel * inputs.spec.dtype.itemsize
        self._kept = torch.empty(inputs.numel, dtype=inputs.dtype) if nbytes <= _MAX_KEPT_NBYTES else None
        self._n_kept = -1
        (square,) = sums(inputs, lambda blocks: squares([self._first(self._units(blocks))], inputs.wide))
        self._length = square.sqrt().to(inputs.wide)

    def mean(self, blocks: Blocks, first: int) -> torch.Tensor:
        """A block of the mean after the steps that were made."""
        units = self._units(blocks)
        if self._kept is not None and self._n_kept >= 0:
            begin = self._n_kept
            mean = self._kept[first : first + blocks[0].numel()]
        else:
            begin = 0
            mean = (self._first(units) / self._length).to(self._inputs.dtype) if self._length >= _LEAST else units[0]
        for cosines, factors, step, length in self.made[begin:]:
            mean = self._moved(mean, self._tangent(units, mean, cosines, factors), step)
            mean = (mean / length).to(self._inputs.dtype)
        return mean

    def go(self, tol: float) -> bool:
        """One step; whether there was one to be made."""
        import torch

        inputs, wide = self._inputs, self._inputs.wide

        def products(blocks: Blocks, first: int) -> torch.Tensor:
            mean = self.mean(blocks, first)
            if self._kept is not None:
                self._kept[first : first + mean.numel()] = mean
            return torch.stack([total(mean.to(wide) * unit.to(wide), wide) for unit in self._units(blocks)])

        none = torch.zeros((), dtype=torch.float64)
        dots = sum(inputs.over_blocks(products), start=none)
        self._n_kept = len(self.made) if self._kept is not None else -1
        cosines = dots.to(inputs.dtype).clamp(-1, 1)
        angles = torch.arccos(cosines)
        moves = angles.double() >= tol
        factors = torch.where(moves, self._share * (angles / torch.sin(torch.where(moves, angles, 1))), 0)

        def tangents(blocks: Blocks, first: int) -> torch.Tensor:
            tangent = self._tangent(self._units(blocks), self.mean(blocks, first), cosines, factors)
            return total(tangent.to(wide).square(), wide)

        step = sum(inputs.over_blocks(tangents), start=none).sqrt().to(wide)
        if not step >= tol:
            return False

        def moved(blocks: Blocks, first: int) -> torch.Tensor:
            mean = self.mean(blocks, first)
            tangent = self._tangent(self._units(blocks), mean, cosines, factors)
            return total(self._moved(mean, tangent, step).to(wide).square(), wide)

        length = sum(inputs.over_blocks(moved), start=none).sqrt().to(wide)
        self.made.append((cosines, factors, step, length if length > tol else torch.ones_like(length)))
        return True

    def _units(self, blocks: Blocks) -> list[torch.Tensor]:
        return [(blocks[i] / self._norms[i]).to(self._inputs.dtype) for i in self._used]

    def _first(self, units: Blocks) -> torch.Tensor:
        mean = self._share * units[0]
        for unit in units[1:]:
            mean = mean + self._share * unit
        return mean

    def _tangent(self, units: Blocks, mean: torch.Tensor, cosines: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        tangent = mean * 0
        for unit, cosine, factor in zip(units, cosines, factors, strict=True):
            if factor != 0:
                tangent = tangent + factor * (unit - cosine * mean)
        return tangent

    def _moved(self, mean: torch.Tensor, tangent: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        import torch

        return (torch.cos(step) * mean + torch.sin(step) * (tangent / step)).to(self._inputs.dtype)
