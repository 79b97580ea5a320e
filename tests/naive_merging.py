"""What each method of merging computes, said again on whole tensors in plain torch; and the op, for one tensor.

Each naive function gets the tensors of all models, the place of the base, shared parameters, and those of each model.
The order of operations, and what is rounded when, is mergekit 0.1.5's; of equal sizes those are taken that are spread
evenly; random numbers are Philox 4x64-10's, by a key that is the seed, the name and the place of a model.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from support import evaluate, from_bytes, given_tensor

from weightops.lazy import LazyTensor
from weightops.ops.merging.method import Value
from weightops.ops.merging.methods import METHODS
from weightops.ops.merging.op import merged

NAME = "model.layers.0.mlp.up_proj.weight"
Tensors = Sequence[torch.Tensor]
Values = Mapping[str, Any]
Naive = Callable[[Tensors, "int | None", Values, Sequence[Values]], torch.Tensor]


def lazily(
    method: str,
    tensors: Tensors,
    base: int | None = None,
    shared: Mapping[str, Value] | None = None,
    own: Sequence[Mapping[str, Value]] | None = None,
    *,
    name: str = NAME,
    seed: int = 0,
    allow_nonfinite: bool = False,
) -> LazyTensor:
    """The tensors merged, with defaults for what is not said."""
    shared, own = with_defaults(method, len(tensors), base, shared, own)
    models = [f"m{i}" for i in range(len(tensors))]
    options: Any = {"seed": seed, "allow_nonfinite": allow_nonfinite}
    inputs = [given_tensor(tensor) for tensor in tensors]
    return merged(name, method, models, inputs, base=base, shared=shared, of_each=own, **options)


def merge(method: str, tensors: Tensors, *arguments: Any, block: int | None = None, **options: Any) -> torch.Tensor:
    """The same, computed: in blocks of so many bytes."""
    lazy = lazily(method, tensors, *arguments, **options)
    dtype: torch.dtype = getattr(torch, lazy.spec.dtype.value)
    return from_bytes(evaluate(lazy, block), dtype, lazy.spec.shape)


def naively(
    method: str,
    tensors: Tensors,
    base: int | None = None,
    shared: Mapping[str, Value] | None = None,
    own: Sequence[Mapping[str, Value]] | None = None,
    *,
    name: str = NAME,
    seed: int = 0,
) -> torch.Tensor:
    """What is to come out of it."""
    shared, own = with_defaults(method, len(tensors), base, shared, own)
    return NAIVE[method](tensors, base, {**shared, "key": f"{seed}\0{name}"}, own)


def with_defaults(
    method: str, n: int, base: int | None, shared: Mapping[str, Value] | None, own: Sequence[Mapping[str, Value]] | None
) -> tuple[dict[str, Value], list[dict[str, Value]]]:
    """The parameters, with defaults for those that are not given."""
    found = METHODS[method]
    defaults = {key: each.default for key, each in found.shared.items()} | dict(shared or {})
    each_default = {key: each.default for key, each in found.of_each.items()}
    of_each = [each_default | dict(values) for values in (own or [{}] * n)]
    return defaults, [{} if i == base else values for i, values in enumerate(of_each)]


# ---- what several need


def others_of(tensors: Tensors, base: int | None) -> list[int]:
    return [i for i in range(len(tensors)) if i != base]


def added(parts: Tensors) -> torch.Tensor:
    return torch.stack(list(parts)).sum(dim=0)


def added_in_order(parts: Tensors) -> torch.Tensor:
    """Rounded once if they are of 16 bits."""
    total = parts[0].to(wide(parts[0]))
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


def wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def length(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The Euclidean length, added up in float64 and rounded to the tensor's dtype."""
    square = x.double().square()
    return (square.sum() if dim is None else square.sum(dim, keepdim=True)).sqrt().to(x.dtype)


def dot(x: torch.Tensor, y: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The product of two vectors: of each pair in the tensors' dtype, then added up likewise."""
    product = (x * y).double()
    return (product.sum() if dim is None else product.sum(dim, keepdim=True)).to(x.dtype)


def size_keys(x: torch.Tensor) -> torch.Tensor:
    """Sizes as integers in their order, NaN the largest."""
    return x.float().view(torch.int32).to(torch.int64) & 0x7FFFFFFF


def with_ranks(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Where the elements are whose sizes have ranks from `low` to `high`; of `m` equal ones `w`, spread evenly."""
    keys = size_keys(x.reshape(-1))
    _, group, m = keys.unique(return_inverse=True, return_counts=True)
    below = m.cumsum(0) - m
    w = ((below + m).clamp(max=high) - below.clamp(min=low)).clamp(min=0)
    places = group.argsort(stable=True)
    j = torch.empty_like(group)
    j[places] = torch.arange(len(group)) - below[group[places]]
    mask = (j + 1) * w[group] // m[group] > j * w[group] // m[group]
    return mask.reshape(x.shape)


def draws(key: str, model: int, n: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Words of 32 bits, two from each of numpy's Philox."""
    philox = int.from_bytes(hashlib.blake2b(f"{key}\0{model}".encode(), digest_size=16).digest(), "little")
    return np.random.Philox(key=philox).random_raw((n + 1) // 2).astype("<u8").view("<u4")[:n]


def rescaled(change: torch.Tensor, kept: torch.Tensor, wanted: bool) -> torch.Tensor:
    before, after = (x.double().abs().sum().to(kept.dtype) for x in (change, kept))
    return kept * (before / after) if wanted and before >= 1e-7 and after >= 1e-7 else kept


# ---- elementwise


def linear(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    weights = torch.tensor([values["weight"] for values in own], dtype=wide(tensors[0]))
    total = torch.zeros(tensors[0].shape, dtype=weights.dtype)
    for x, weight in zip(tensors, weights, strict=True):
        total = torch.addcmul(total, x.to(weights.dtype), weight)
    return (total / weights.sum() if shared["normalize"] else total).to(tensors[0].dtype)


def passthrough(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    scale = own[0]["scale"]
    return tensors[0] if scale is None else tensors[0] * scale


def nearswap(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    b, (x,) = tensors[base or 0], (tensors[i] for i in others_of(tensors, base))
    share = torch.clamp(shared["t"] / torch.clamp(torch.abs(b - x), min=1e-6), 0, 1)
    return share * x + (1 - share) * b


def ram(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    b = tensors[base or 0]
    changes = [tensors[i] - b for i in others_of(tensors, base)]
    moved = [change.abs() > shared["epsilon"] for change in changes]
    times = torch.stack(moved).sum(dim=0)
    parts = []
    for change, own_moved in zip(changes, moved, strict=True):
        alone = change * own_moved * (times == 1)
        if "r" in shared:
            n_shared, n_alone = (int((own_moved & t).sum()) for t in (times > 1, times == 1))
            rho = torch.tensor([n_shared]) / torch.tensor([n_alone]).clamp(min=shared["epsilon"])
            alone = alone * (1 + shared["r"] * rho.clamp(0, shared["alpha"]))
        parts.append(alone + change * own_moved * (times > 1) / times.clamp(min=1))
    return (b + added(parts)).reshape(b.shape)


# ---- a reduction first


def slerp(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    (other,) = others_of(tensors, base)
    x, y = tensors[base or 0].to(wide(tensors[0])), tensors[other].to(wide(tensors[0]))
    t = float(torch.tensor(shared["t"], dtype=torch.float32))
    norms = [n if (n := float(v.double().norm())) >= 1e-8 else 1.0 for v in (x, y)]
    cosine = float((x.double() * y.double()).sum()) / norms[0] / norms[1]
    if abs(cosine) > 0.9995:
        return ((1 - t) * x + t * y).to(tensors[0].dtype)
    angle = math.acos(cosine)
    a, b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return (a * x + b * y).to(tensors[0].dtype)


def nuslerp(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    others = others_of(tensors, base)
    weights = [own[i]["weight"] for i in others]
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    x, y = (tensors[i] - tensors[base] if base is not None else tensors[i] for i in others)
    dim = None if shared["nuslerp_flatten"] else (0 if shared["nuslerp_row_wise"] else -1)
    dim = None if x.dim() == 0 else dim
    units = [v / length(v, dim).clamp(min=1e-7) for v in (x, y)]
    cosine = dot(*units, dim).clamp(-1, 1)
    straight = 1 - cosine.square() <= 1e-16
    angle = torch.acos(torch.where(straight, 0, cosine))
    arc = (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)
    result = torch.where(straight, (1 - t) * x + t * y, arc)
    return result if base is None else tensors[base] + result


def multislerp(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    others, eps = others_of(tensors, base), shared["eps"]
    if len(others) == 1:
        return tensors[others[0]]
    changes = [tensors[i] - tensors[base] if base is not None else tensors[i] for i in others]
    weights = torch.tensor([own[i]["weight"] for i in others], dtype=tensors[0].dtype)
    weights = weights / weights.sum() if shared["normalize_weights"] else weights
    lengths = torch.stack([length(change) for change in changes])
    units = [torch.nan_to_num(change / (n + eps)) for change, n in zip(changes, lengths, strict=True)]
    if not lengths.any():
        return tensors[base or 0]
    mean = added([unit * w for unit, w in zip(units, weights, strict=True)])
    if length(mean) < eps:
        assert len(others) == 2
        result = added([change * w for change, w in zip(changes, weights, strict=True)])
    else:
        mean = mean / length(mean)
        tangents = [unit - dot(unit, mean) * mean for unit in units]
        tangent = added([each * w for each, w in zip(tangents, weights, strict=True)])
        angle = length(tangent) + eps
        result = mean * torch.cos(angle) + tangent * torch.nan_to_num(torch.sin(angle) / angle, 1.0)
        result = result * (lengths * weights).sum()
    return result if base is None else result + tensors[base]


def karcher(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0]
    dtype, tol = tensors[0].dtype, shared["tol"]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x.double().norm().to(wide(x))

    lengths = [norm(x) for x in tensors]
    units = [(x / n).to(dtype) for x, n in zip(tensors, lengths, strict=True) if n > tol]
    if not units:
        return torch.zeros_like(tensors[0])
    share = 1 / len(units)
    mean = torch.zeros_like(units[0])
    for unit in units:
        mean = mean + share * unit
    mean = (mean / norm(mean)).to(dtype) if norm(mean) >= tol else units[0]
    for _ in range(shared["max_iter"]):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = (mean.double() * unit.double()).sum().to(dtype).clamp(-1, 1)
            angle = torch.arccos(cosine)
            if angle.item() >= tol:
                tangent = tangent + share * (angle / torch.sin(angle)) * (unit - cosine * mean)
        step = norm(tangent)
        if step < tol:
            break
        mean = (torch.cos(step) * mean + torch.sin(step) * (tangent / step)).to(dtype)
        mean = (mean / norm(mean)).to(dtype) if norm(mean) > tol else mean
    size: torch.Tensor = sum(lengths, start=torch.zeros((), dtype=wide(mean))) / len(tensors)
    return (size * mean).to(dtype)


def model_stock(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    b, others = tensors[base or 0], [tensors[i] for i in others_of(tensors, base)]
    dim = -1 if shared["filter_wise"] and b.dim() else None
    changes = [x - b for x in others]
    cosines = [
        (dot(x, y, dim) / (length(x, dim) * length(y, dim)).clamp(min=1e-6)).clamp(-1, 1)
        for x, y in itertools.combinations(changes, 2)
    ]
    cosine, k = torch.stack(cosines).mean(dim=0), len(others)
    below = 1 + (k - 1) * cosine
    t = torch.where(below.abs() < 1e-6, 0, k * cosine / torch.where(below.abs() < 1e-6, 1, below))
    mean = sum(others, start=torch.zeros((), dtype=b.dtype)) / k
    return t * mean + (1 - t) * b


def sce(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    b = tensors[base or 0]
    changes = torch.stack([tensors[i] - b for i in others_of(tensors, base)])
    if shared["select_topk"] < 1:
        spread = torch.var(changes.double(), dim=0, unbiased=False).to(b.dtype)
        count = int(int(spread.count_nonzero()) * shared["select_topk"])
        changes = changes * with_ranks(spread, b.numel() - count, b.numel())
    up = torch.where(changes.sum(dim=0) >= 0, 1, -1)
    agree = torch.sign(changes) == up
    energy = changes.square().double().reshape(len(changes), -1).mean(dim=1).to(b.dtype)
    few = abs(energy.sum().item()) < 1e-6
    weights = torch.ones_like(energy) / len(energy) if few else energy / energy.sum()
    counted = weights.reshape(-1, *[1] * b.dim()) * agree
    return b + (changes * counted).sum(dim=0) / counted.sum(dim=0).clamp(min=1e-6)


def arcee_fusion(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
    b, (x,) = tensors[base or 0], (tensors[i] for i in others_of(tensors, base))
    p, q = (torch.softmax(each, dim=-1) + 1e-8 for each in (x, b))
    score = (x - b).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    ordered = score.reshape(-1).sort().values
    low, middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return b + (x - b) * (score >= middle + 1.5 * (high - low)).float()


# ---- task vectors


Thin = Callable[[torch.Tensor, int, Values, Values], torch.Tensor]


def all_of_it(change: torch.Tensor, model: int, shared: Values, own: Values) -> torch.Tensor:
    return change


def _between(limits: Callable[[int, Values], tuple[int, int]]) -> Thin:
    def thin(change: torch.Tensor, model: int, shared: Values, own: Values) -> torch.Tensor:
        if not 0 < own["density"] < 1:
            return change if own["density"] else change * 0
        return rescaled(change, change * with_ranks(change, *limits(change.numel(), own)), shared["rescale"])

    return thin


def _largest(n: int, own: Values) -> tuple[int, int]:
    return n - max(1, int(own["density"] * n)), n


def _middle(n: int, own: Values) -> tuple[int, int]:
    count = int(own["density"] * n)
    low = max(0, n - count - int(own["gamma"] * n))
    return low, low + count


def chances(change: torch.Tensor, own: Values) -> np.ndarray[Any, np.dtype[np.float64]]:
    """With which probability each element is kept."""
    if "epsilon" not in own:
        return np.full(change.shape, own["density"])
    keys = size_keys(change.reshape(-1, change.shape[-1] if change.dim() else 1)).numpy()
    one, other = keys[:, :, None], keys[:, None, :]
    ranks = (other < one).sum(axis=2) + ((other == one).sum(axis=2) - 1) / 2
    share = ranks / (keys.shape[1] - 1) if keys.shape[1] > 1 else np.full(ranks.shape, 0.5)
    return (own["density"] - own["epsilon"] + 2 * own["epsilon"] * share).reshape(change.shape)


def _by_chance(change: torch.Tensor, model: int, shared: Values, own: Values) -> torch.Tensor:
    if not 0 < own["density"] < 1:
        return change if own["density"] else change * 0
    words = draws(shared["key"], model, change.numel()).reshape(change.shape)
    mask = torch.from_numpy(np.asarray(words < chances(change, own) * 2**32))
    if not shared["rescale"]:
        return change * mask
    work = change.to(torch.bfloat16 if change.dtype == torch.bfloat16 else torch.float32)
    return rescaled(work, work * mask, True).to(change.dtype)


def task_vectors(thin: Thin, *, elect: bool, added: Callable[[Tensors], torch.Tensor] = added) -> Naive:
    def combine(tensors: Tensors, base: int | None, shared: Values, own: Sequence[Values]) -> torch.Tensor:
        b, others = tensors[base or 0], others_of(tensors, base)
        if not others:
            return b
        weights = torch.tensor([own[i]["weight"] for i in others], dtype=b.dtype)
        changes = [thin(tensors[i] - b, i, shared, own[i]) * w for i, w in zip(others, weights, strict=True)]
        if elect:
            up = torch.where(added(changes) >= 0, 1, -1)
            agree = [torch.sign(change) == up for change in changes]
            divisor = added([w * each for w, each in zip(weights, agree, strict=True)])
            divisor = torch.where(divisor == 0, 1, divisor)
            change = added([change * each for change, each in zip(changes, agree, strict=True)])
        else:
            divisor = weights.sum()
            divisor = torch.where(divisor.abs() < 1e-8, 1, divisor)
            change = added(changes)
        change = change / divisor if shared["normalize"] else change
        return b + (change if shared["lambda"] == 1 else change * shared["lambda"])

    return combine


_BY_NAME = (linear, slerp, nuslerp, multislerp, karcher, model_stock, sce, nearswap, arcee_fusion, ram, passthrough)
NAIVE: dict[str, Naive] = {function.__name__: function for function in _BY_NAME} | {
    "ramplus_tl": ram,
    "task_arithmetic": task_vectors(all_of_it, elect=False),
    "ties": task_vectors(_between(_largest), elect=True),
    "breadcrumbs": task_vectors(_between(_middle), elect=False),
    "breadcrumbs_ties": task_vectors(_between(_middle), elect=True),
    "dare_linear": task_vectors(_by_chance, elect=False),
    "dare_ties": task_vectors(_by_chance, elect=True),
    "della_linear": task_vectors(_by_chance, elect=False, added=added_in_order),
    "della": task_vectors(_by_chance, elect=True, added=added_in_order),
}
