"""Methods of merging with parameters, and tensors to merge, for tests of what each computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """A method with parameters, `own` for each model in turn. `is_exact`: no sum over a tensor enters.

    `others`: how many models there are besides the base. `bases`: whether there is a base.
    """

    method: str
    shared: dict[str, Any] = field(default_factory=dict)
    own: tuple[dict[str, Any], ...] = ({},)
    others: tuple[int, ...] = (1, 2, 5)
    bases: tuple[bool, ...] = (True,)
    is_exact: bool = True

    def __str__(self) -> str:
        own = {key: str(value) for values in self.own[:2] for key, value in values.items() if key != "weight"}
        return " ".join((self.method, *(f"{key}={value}" for key, value in {**self.shared, **own}.items())))


WEIGHTS: tuple[dict[str, Any], ...] = ({"weight": 0.7}, {"weight": -0.2}, {"weight": 1}, {"weight": 0.35})


def weighted(*own: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple(weight | own[i % len(own)] for i, weight in enumerate(WEIGHTS))


HALF, MOST, FEW = ({"density": d} for d in (0.5, 0.8, 0.1))
CASES = (
    Case("linear", {}, WEIGHTS, bases=(False,)),
    Case("linear", {"normalize": False}, WEIGHTS, bases=(False,)),
    Case("passthrough", {}, ({"scale": 0.3},), (1,), (False,)),
    Case("passthrough", {}, ({"scale": 0.0},), (1,), (False,)),
    Case("nearswap", {"t": 0.004}, others=(1,)),
    Case("ram"),
    Case("ram", {"epsilon": 0.01}),
    Case("ramplus_tl"),
    Case("ramplus_tl", {"r": 0.5, "alpha": 1.5, "epsilon": 0.01}),
    Case("slerp", {"t": 0.3}, others=(1,), is_exact=False),
    Case("nuslerp", {}, WEIGHTS, (2,), (True, False), is_exact=False),
    Case("nuslerp", {"nuslerp_flatten": False}, WEIGHTS, (2,), (True, False), is_exact=False),
    Case("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, WEIGHTS, (2,), (True,), is_exact=False),
    Case("multislerp", {}, WEIGHTS, bases=(True, False), is_exact=False),
    Case("multislerp", {"normalize_weights": False}, WEIGHTS, is_exact=False),
    Case("karcher", {}, others=(1, 2, 3, 5), bases=(False,), is_exact=False),
    Case("karcher", {"max_iter": 1}, others=(3,), bases=(False,), is_exact=False),
    Case("task_arithmetic", {}, WEIGHTS),
    Case("task_arithmetic", {"normalize": True, "lambda": 0.9}, WEIGHTS),
    Case("ties", {}, WEIGHTS),
    Case("ties", {}, weighted(HALF, FEW)),
    Case("ties", {"normalize": False, "lambda": 1.1}, weighted(FEW, {"density": 0.0}, MOST)),
    Case("ties", {"rescale": True}, weighted(HALF), is_exact=False),
    Case("breadcrumbs", {}, weighted(HALF, FEW | {"gamma": 0.4})),
    Case("breadcrumbs", {"rescale": True, "normalize": True}, weighted(MOST), is_exact=False),
    Case("breadcrumbs_ties", {}, weighted(MOST | {"gamma": 0.1}, {"density": 0.95, "gamma": 0.2})),
    Case("dare_linear", {"rescale": False}, weighted(HALF, FEW)),
    Case("dare_linear", {}, weighted(HALF), is_exact=False),
    Case("dare_ties", {"rescale": False, "normalize": True}, weighted(HALF, MOST)),
    Case("della", {"rescale": False}, weighted(HALF, MOST)),
    Case("della", {}, weighted(HALF), is_exact=False),
    Case("della_linear", {"rescale": False, "lambda": 0.5}, weighted(HALF | {"epsilon": 0.45}, {"density": 0.0})),
    Case("model_stock", others=(2, 3, 5), is_exact=False),
    Case("model_stock", {"filter_wise": True}, others=(2, 3, 5), is_exact=False),
    Case("sce", is_exact=False),
    Case("sce", {"select_topk": 0.4}, is_exact=False),
    Case("arcee_fusion", others=(1,), is_exact=False),
)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, n: int, seed: int = 0) -> list[torch.Tensor]:
    """A base, and `n` models that are not far from it: part of each is as it is in the base, and many changes tie."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=random) * 0.05
    found = [base]
    for _ in range(n):
        change = torch.randn(shape, generator=random) * 0.01 * (torch.rand(shape, generator=random) > 0.125)
        found.append(base + change)
    return [each.to(dtype) for each in found]
