"""What is combined to one module: of each adapter that has it the factors, their scale, and the adapter's weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from weightops.errors import IncompatibleInputs
from weightops.formats.adapter.lora import Adapter, Factors, LoraModule, depths_of
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import cast
from weightops.ops.lora.combined import CombinedFactor, WeightedSum, combined_pair, is_of_one_rank
from weightops.spec import DType


@dataclass(frozen=True)
class Term:
    """A module of one adapter: the adapter with its place in the list and its weight, and the module."""

    place: int
    adapter: Adapter
    weight: float
    module: LoraModule

    @property
    def strength(self) -> float:
        """What B A is multiplied by."""
        return self.weight * self.module.scale


def together(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Term]]:
    """The modules of all adapters by what configs call them; raises `IncompatibleInputs` for what cannot be added."""
    groups: dict[str, list[Term]] = {}
    for place, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for module in adapter.modules():
            if module.factors.magnitude is not None:
                raise IncompatibleInputs(
                    f"{escape(adapter.name)}: {escape(module.target)} has a magnitude (DoRA): what it changes depends "
                    "on the base too, and cannot be added up",
                    hint="merge-lora merges it into the base",
                )
            groups.setdefault(module.target, []).append(Term(place, adapter, weight, module))
    if not groups:
        raise IncompatibleInputs(f"{escape(adapters[0].name)}: holds no factors to combine")
    for target, (first, *others) in groups.items():
        for other in others:
            _refuse_unlike(target, first, other)
    depths = depths_of({target: terms[0].module.path for target, terms in groups.items()})
    return {
        target: [replace(term, module=replace(term.module, depth=depths[target])) for term in terms]
        for target, terms in groups.items()
    }


def _refuse_unlike(target: str, first: Term, other: Term) -> None:
    """Refuse modules of one name whose changes have other shapes."""
    one, two = first.module, other.module
    if _kind(one) == _kind(two):
        return
    found = " and ".join(f"{list(each.module.shape)} in {escape(each.adapter.name)}" for each in (first, other))
    raise IncompatibleInputs(
        f"{escape(target)}: the changes are {found}: are the adapters for one base?",
        hint="`weightops inspect ADAPTER --base MODEL` says which base an adapter fits",
    )


def _kind(module: LoraModule) -> tuple[object, ...]:
    own = module.factors
    return module.shape, own.a.spec.shape[1:], own.is_embedding, module.experts


def combined(terms: Sequence[Term], how: CombinedFactor, dtype: DType) -> LoraModule:
    """The module that stands for all these, with a scale of 1; `how` has method and options, and the rank or 0.

    Raises `IncompatibleInputs` for other ranks than a method can add up, and for biases that it has no rule for.
    """
    first, where = terms[0].module, escape(terms[0].module.target)
    ranks = [term.module.rank for term in terms]
    if is_of_one_rank(how.method) and len(set(ranks)) > 1:
        found = ", ".join(f"{rank} in {escape(term.adapter.name)}" for rank, term in zip(ranks, terms, strict=True))
        raise IncompatibleInputs(
            f"{where}: {how.method} adds up factors of one rank, found {found}",
            hint="cat and svd take any; `weightops adapter rank` makes ranks equal",
        )
    rank = sum(ranks) if how.method == "cat" else max(ranks)
    if how.method.endswith("svd"):
        limit = min(*first.shape, *([sum(ranks)] if how.method == "svd" else []))
        rank = min(how.rank or rank, limit)
    op = msgspec.structs.replace(
        how,
        terms=tuple((term.weight, term.module.scale) for term in terms),
        rank=rank,
        label=first.target,
        experts=first.experts,
        places=tuple(term.place for term in terms),
    )
    inputs = [tensor for term in terms for tensor in (term.module.factors.a, term.module.factors.b)]
    a, b = combined_pair(op, inputs)
    bias = _bias(terms, how.method)
    factors = Factors(cast(a, dtype), cast(b, dtype), bias and cast(bias, dtype), None, first.factors.is_embedding)
    return replace(first, rank=rank, scale=1.0, factors=factors)


def _bias(terms: Sequence[Term], method: str) -> LazyTensor | None:
    """The sum of the biases of B, which is a sum for methods that are."""
    biased = [term for term in terms if term.module.factors.bias is not None]
    if not biased:
        return None
    if method not in ("cat", "svd"):
        raise IncompatibleInputs(
            f"{escape(biased[0].adapter.name)}: {escape(biased[0].module.target)} has a bias (lora_bias), for which "
            f"{method} has no rule",
            hint="cat and svd add biases up",
        )
    vectors = [term.module.factors.bias for term in biased]
    weights = tuple(term.strength for term in biased)
    return LazyTensor.make(WeightedSum(weights), *(vector for vector in vectors if vector is not None))
