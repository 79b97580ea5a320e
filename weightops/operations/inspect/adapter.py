"""What a LoRA adapter does: the rank and scale of every target, how large its change is, and which base it fits."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.formats.adapter.config import settings_of
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.adapter.lora import Adapter, Factors, read_adapter
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.lora.spectrum import Spectrum

_MOST = 0.99
"""The share of ||B A||^2 that `r99` asks for."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What factors add to a weight, scale times B A, by its singular values, largest first.

    `norm` is the Frobenius norm. `r99` is the least rank that holds 99 % of the norm's square, `stable_rank` is
    norm^2 / s1^2 with the largest singular value s1: how many directions there are that matter. Both are null of a
    change of zeros, and all is where factors hold NaN or infinities.
    """

    norm: float | None
    r99: int | None
    stable_rank: float | None
    singular_values: tuple[float, ...] | None


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A module that an adapter changes, or with its last part a parameter that stacks experts.

    `rank` is that of its factors, `alpha` and `scale` (alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA)
    are those of adapter_config.json. `shape` is that of B A, `[out, in]`, for each of `experts`. `magnitude`: a vector
    of norms follows, as in DoRA, so that the change depends on the base too. `change` is there where values were read.
    `in_base` are the tensors of the base that it is for, where one was given, and `problem` says what is wrong.
    """

    module: str
    rank: int
    alpha: float
    scale: float
    shape: tuple[int, int]
    experts: int
    embedding: bool
    bias: bool
    magnitude: bool
    change: Change | None = None
    in_base: tuple[str, ...] | None = None
    problem: str | None = None


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that an adapter holds in the place of one of the base, or in the place of some of its `rows`."""

    tensor: str
    shape: tuple[int, ...]
    rows: int | None = None
    in_base: tuple[str, ...] | None = None
    problem: str | None = None


class AdapterReport(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter: what its config says, and every target.

    `base_model` is what its config calls the base. Where one was given, `base` is its path, and `fits` whether every
    part of the adapter has its place there, by name and shape.
    """

    base_model: str | None
    rank: int
    alpha: float
    rank_stabilised: bool
    dora: bool
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    targets: tuple[Target, ...]
    whole: tuple[Whole, ...]
    base: str | None = None
    fits: bool | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with its parts, in sentences."""
        said = [*(target.problem for target in self.targets), *(tensor.problem for tensor in self.whole)]
        return tuple(problem for problem in said if problem is not None)


def report_adapter(
    checkpoint: Checkpoint,
    *,
    wanted: Collection[LazyTensor] | None,
    base: Checkpoint | None,
    base_path: str | None,
    evaluate: Evaluate | None,
) -> tuple[AdapterReport, tuple[str, ...]]:
    """What there is to say of an adapter, and what it has to say of itself.

    `wanted` are the tensors to look at, default all; `base` a model that it is held against, headers alone. With
    `evaluate` the factors are read for the size and the singular values of what they add. Raises as `read_adapter`.
    """
    adapter = read_adapter(checkpoint)
    factors = {
        key: each for key, each in adapter.factors.items() if wanted is None or {each.a, each.b}.intersection(wanted)
    }
    targets = {key: _target(adapter, *key, each) for key, each in factors.items()}
    whole = {
        path: Whole(tensor=path, shape=tensor.spec.shape)
        for path, tensor in {**adapter.base, **adapter.whole}.items()
        if wanted is None or tensor in wanted
    }
    for path, tensor in adapter.rows.items():
        if wanted is None or tensor in wanted:
            whole[f"{path}.weight"] = Whole(tensor=f"{path}.weight", shape=tensor.spec.shape, rows=tensor.spec.shape[0])
    if evaluate is not None:
        targets = _measured(targets, factors, evaluate)
    if base is not None:
        targets, whole = _fitted(adapter, targets, whole, base)
    settings = settings_of(checkpoint)
    named = settings.get("base_model_name_or_path")
    modules = settings.get("target_modules")
    listed = [modules] if isinstance(modules, str) else modules if isinstance(modules, list) else []
    report = AdapterReport(
        base_model=named if isinstance(named, str) and named else None,
        rank=adapter.config.r,
        alpha=adapter.config.lora_alpha,
        rank_stabilised=adapter.config.use_rslora,
        dora=adapter.config.use_dora,
        target_modules=tuple(sorted(map(str, [*listed, *(adapter.config.target_parameters or ())]))),
        modules_to_save=tuple(adapter.config.modules_to_save or ()),
        targets=tuple(targets.values()),
        whole=tuple(whole.values()),
        base=base_path,
    )
    return msgspec.structs.replace(report, fits=None if base is None else not report.problems), adapter.notes


def _target(adapter: Adapter, path: str, depth: int, factors: Factors) -> Target:
    """A target by adapter_config.json and the shapes of its factors; what the two disagree on is its problem."""
    name = adapter.target(path, depth)
    a, b = factors.a.spec.shape, factors.b.spec.shape
    rows, rank = a[0], adapter.rank(name)
    experts = rows // rank if name != path and not rows % rank else 1
    problem = None
    if rows != rank * experts:
        problem = f"{escape(adapter.name)}: {escape(name)}: lora_A is {factors.a.spec}, {CONFIG_NAME} says r = {rank}"
    return Target(
        module=name,
        rank=rows // experts,
        alpha=adapter.alpha(name),
        scale=adapter.scale(name),
        shape=(b[0], math.prod(a[1:])),
        experts=experts,
        embedding=factors.is_embedding,
        bias=factors.bias is not None,
        magnitude=factors.magnitude is not None,
        problem=problem,
    )


def _measured(
    targets: Mapping[tuple[str, int], Target], factors: Mapping[tuple[str, int], Factors], evaluate: Evaluate
) -> dict[tuple[str, int], Target]:
    """The targets with their changes."""
    products = {}
    found = dict(targets)
    for key, each in factors.items():
        try:
            products[key] = LazyTensor.make(Spectrum(targets[key].experts), each.a, each.b)
        except IncompatibleInputs as error:
            found[key] = msgspec.structs.replace(targets[key], problem=targets[key].problem or str(error))
    for (key, _), data in zip(products.items(), evaluate(list(products.values())), strict=True):
        change = _change(list(struct.unpack(f"<{len(data) // 8}d", data)), targets[key].scale)
        problem = targets[key].problem
        if change.norm is None:
            problem = problem or f"{escape(targets[key].module)}: the factors hold NaN or infinities"
        found[key] = msgspec.structs.replace(targets[key], change=change, problem=problem)
    return found


def _change(singular_values: list[float], scale: float) -> Change:
    """A change by the singular values of B A."""
    values = [abs(scale) * value for value in singular_values]
    squares = [value * value for value in values]
    total = math.fsum(squares)
    if not math.isfinite(total):
        return Change(norm=None, r99=None, stable_rank=None, singular_values=None)
    held, r99 = 0.0, None
    for number, square in enumerate(squares, 1) if total else ():
        held += square
        if held >= _MOST * total:
            r99 = number
            break
    return Change(
        norm=math.sqrt(total),
        r99=r99,
        stable_rank=total / squares[0] if total else None,
        singular_values=tuple(values),
    )


def _fitted(
    adapter: Adapter, targets: Mapping[tuple[str, int], Target], whole: Mapping[str, Whole], base: Checkpoint
) -> tuple[dict[tuple[str, int], Target], dict[str, Whole]]:
    """Targets, and what is held whole, with their places in the base."""
    from weightops.operations.merge_lora import fit  # imported here because few look at adapters with their base

    modules, tensors = fit(adapter, base)
    fitted = {
        key: msgspec.structs.replace(each, in_base=modules[key].tensors, problem=modules[key].problem or each.problem)
        for key, each in targets.items()
    }
    placed = {
        path: msgspec.structs.replace(each, in_base=tensors[path].tensors, problem=tensors[path].problem)
        for path, each in whole.items()
    }
    return fitted, placed
