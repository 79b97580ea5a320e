"""Means on the sphere: of directions, with lengths apart.

Every step stays among combinations of the models, so that all angles follow from the products of pairs (the Gram
matrix), which take one pass, and the result is one combination of the models, rounded once. mergekit 0.1.5 rounds every
step to the tensors' dtype, and the angles with it. Tensors of up to 2^20 elements are merged in its steps; of larger
16-bit ones its rounding would cost more than it tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.ops.merging.inputs import Inputs
from weightops.ops.merging.method import Blockwise
from weightops.ops.merging.spherical import CHUNK, sums

if TYPE_CHECKING:
    import torch

    Blocks = Sequence[torch.Tensor]


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
    if inputs.numel > CHUNK:
        return _combination(inputs, _multislerp(gram(inputs, inputs.changes), weights.double(), eps, inputs.name))
    whole = inputs.whole()
    result = _multislerp_in_steps(torch.stack(inputs.changes(whole)), weights, eps, inputs.name)
    result = result if base is None else result + whole[base]
    return lambda blocks, first: result[first : first + blocks[0].numel()]


def _multislerp_in_steps(vectors: torch.Tensor, weights: torch.Tensor, eps: float, name: str) -> torch.Tensor:
    """As mergekit computes it on whole tensors, `[models, elements]`, each step rounded to their dtype."""
    import torch

    norms = torch.norm(vectors, dim=-1, keepdim=True)
    if not norms.any():  # where nobody changed anything there is no direction, and nothing to add
        return vectors[0]
    units = vectors / torch.where(norms + eps > 0, norms + eps, 1)  # eps is 0 in float16
    factors = weights.view(-1, 1)
    mean = (units * factors).sum(dim=0)
    length = torch.norm(mean)
    if length < eps:
        _refuse_no_direction(name, len(weights))
        return (vectors * factors).sum(dim=0)
    mean = mean / length
    tangents = units - (units * mean).sum(dim=-1, keepdim=True) * mean
    tangent = (tangents * factors).sum(dim=0)
    angle = torch.norm(tangent) + eps
    turn = torch.where(angle > 0, torch.sin(angle) / angle, 1)
    direction = mean * torch.cos(angle) + tangent * turn
    result: torch.Tensor = direction * (norms.squeeze(-1) * weights).sum()
    return result


def _multislerp(products: torch.Tensor, weights: torch.Tensor, eps: float, name: str) -> torch.Tensor:
    """The factors of vectors with these products whose combination is their mean."""
    import torch

    norms = products.diagonal().sqrt()
    if not norms.any():
        return torch.zeros_like(norms)
    lengths = torch.where(norms + eps > 0, norms + eps, 1)
    units = products / lengths.outer(lengths)
    length = _norm(weights, units)
    if length < eps:
        _refuse_no_direction(name, len(weights))
        return weights
    mean = weights / length
    tangent = weights - (weights * (units @ mean)).sum() * mean
    angle = _norm(tangent, units) + eps
    size = (norms * weights).sum()
    turn = torch.where(angle > 0, torch.sin(angle) / angle, 1)
    return (mean * torch.cos(angle) + tangent * turn) * size / lengths


def _refuse_no_direction(name: str, n: int) -> None:
    if n > 2:
        raise IncompatibleInputs(
            f"{escape(name)}: the weighted sum of the models' directions is zero, and has no direction",
            hint="merge this tensor with other weights, or by another method than multislerp",
        )


def _norm(vector: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The length of the combination with these coefficients, of vectors with these products."""
    return (vector @ products @ vector).clamp(min=0).sqrt()


def _combination(inputs: Inputs, factors: torch.Tensor) -> Blockwise:
    """The sum of the models, or of their changes, times these factors, rounded once; then the base, if there is one."""
    base, wide, numbers = inputs.base, inputs.wide, factors.tolist()

    def compute(blocks: Blocks, first: int) -> torch.Tensor:
        changes = inputs.changes(blocks)
        total = changes[0].to(wide) * numbers[0]
        for change, factor in zip(changes[1:], numbers[1:], strict=True):
            total.add_(change.to(wide), alpha=factor)
        result: torch.Tensor = total.to(inputs.dtype)
        return result if base is None else result + blocks[base]

    return compute


def karcher(inputs: Inputs, *, max_iter: int = 10, tol: float = 1e-5) -> Blockwise:
    """The mean of directions on the sphere (Karcher's), times the mean length; no weights (arXiv 2603.04972)."""
    import torch

    if len(inputs.tensors) == 1:
        return lambda blocks, first: blocks[0].clone()
    if inputs.numel <= CHUNK:
        mean = _karcher_in_steps(inputs.whole(), max_iter, tol, inputs.wide)
        return lambda blocks, first: mean[first : first + blocks[0].numel()]
    products = gram(inputs, lambda blocks: blocks)
    norms = products.diagonal().sqrt()
    used = [i for i, norm in enumerate(norms) if norm > tol]
    if not used:
        return lambda blocks, first: blocks[0] * 0
    factors = torch.zeros_like(norms)
    factors[used] = _karcher((products / norms.outer(norms))[used][:, used], max_iter, tol) / norms[used] * norms.mean()
    return _combination(inputs, factors)


def _karcher(products: torch.Tensor, max_iter: int, tol: float) -> torch.Tensor:
    """Of unit vectors with these products those whose combination is their mean."""
    import torch

    n, share = len(products), 1 / len(products)
    mean = torch.full((n,), share, dtype=torch.float64)
    length = _norm(mean, products)
    mean = mean / length if length >= tol else torch.eye(n, dtype=torch.float64)[0]
    for _ in range(max_iter):
        cosines = (products @ mean).clamp(-1, 1)
        angles = torch.arccos(cosines)
        moves = angles >= tol
        factors = torch.where(moves, share * angles / torch.sin(torch.where(moves, angles, 1)), 0)
        tangent = factors - (factors * cosines).sum() * mean
        step = _norm(tangent, products)
        if not step >= tol:
            break
        mean = torch.cos(step) * mean + torch.sin(step) * tangent / step
        length = _norm(mean, products)
        mean = mean / length if length > tol else mean
    return mean


def _karcher_in_steps(tensors: Sequence[torch.Tensor], max_iter: int, tol: float, wide: torch.dtype) -> torch.Tensor:
    """As mergekit computes it on whole tensors: each step is rounded to their dtype, and so are the angles."""
    import torch

    def length(vector: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.linalg.vector_norm(vector.to(wide))
        return found

    dtype, norms = tensors[0].dtype, [length(tensor) for tensor in tensors]
    pairs = zip(tensors, norms, strict=True)
    units = [(tensor / norm).to(dtype) for tensor, norm in pairs if norm.item() > tol]
    if not units:
        return tensors[0] * 0
    share = 1 / len(units)
    mean = _added([share * unit for unit in units])
    size = length(mean)
    mean = units[0] if size.item() < tol else (mean / size).to(dtype)
    for _ in range(max_iter):
        parts = []
        for unit in units:
            cosine = torch.clamp(torch.dot(mean, unit), -1, 1)
            angle = torch.arccos(cosine)
            if not angle.item() < tol:
                parts.append(share * (angle / torch.sin(angle)) * (unit - cosine * mean))
        tangent = _added([torch.zeros_like(mean), *parts])
        step = length(tangent)
        if step.item() < tol:
            break
        mean = (torch.cos(step) * mean + torch.sin(step) * (tangent / step)).to(dtype)
        size = length(mean)
        if size.item() > tol:
            mean = (mean / size).to(dtype)
    return sum((norm / len(tensors) for norm in norms), start=torch.zeros((), dtype=wide)) * mean


def _added(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, each addition rounded."""
    result = vectors[0]
    for vector in vectors[1:]:
        result = result + vector
    return result
