"""Resize an adapter: another rank, the same for all modules, or as low as what is to be kept of each allows.

A lower rank is the best approximation of what the adapter changes, from its factors alone; a higher one is the same
change, with room for training. How ranks are chosen by what they keep is that of sd-scripts (`networks/resize_lora.py`
of kohya-ss), which calls the measures by these names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.carried import carry
from weightops.formats.adapter.config import settings_of
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.adapter.lora import Factors, LoraModule
from weightops.formats.adapter.values import scan_factors
from weightops.formats.adapter.written import check_factor_dtype, lora_config, lora_tensors
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.adapter.convert import read_ours
from weightops.ops.arrange import concat, cut
from weightops.ops.elementwise import cast
from weightops.ops.lora.combined import CombinedFactor, WeightedSum, combined_pair
from weightops.ops.lora.spectrum import Spectrum
from weightops.ops.lora.spread import Uniform
from weightops.ops.rows import fit
from weightops.spec import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

Measure = Literal["squares", "sv_fro", "sv_cumulative", "sv_ratio"]


def resize_adapter(
    adapter: Checkpoint,
    *,
    rank: int | None = None,
    keep: float | None = None,
    by: Measure = "squares",
    seed: int = 0,
    dtype: DType | None = None,
    evaluate: Evaluate,
) -> Checkpoint:
    """`adapter` with other ranks, in peft's format: of `rank`, or by `keep` the least of each module that keeps enough.

    `keep` is measured `by` a share of the squares of the singular values ("squares"), of the norm, the root of their
    sum ("sv_fro"), of the sum of the singular values ("sv_cumulative"), or as the ratio of the largest to the smallest
    that is kept ("sv_ratio"); `rank` is then the highest that a module may get. What a lower rank is off is noted by
    module. A module that keeps its rank keeps its factors; for a higher one B gets zeros and A random rows, drawn by
    `seed`, so that the change is the same. `dtype`: of the factors, default float32.

    Raises `UsageError` for options that cannot be meant, `IncompatibleInputs` for magnitudes (DoRA), `CorruptInput` for
    values that are no numbers.
    """
    _check_options(rank, keep, by, seed)
    check_factor_dtype(dtype)
    own = read_ours(adapter)
    modules = list(own.modules())
    odd = next((module for module in modules if module.factors.magnitude is not None), None)
    if odd is not None:
        raise IncompatibleInputs(
            f"{escape(adapter.name)}: {escape(odd.target)} has a magnitude (DoRA), which depends on the factors "
            "that it was trained with: their rank cannot be changed",
            hint="merge-lora merges it into the base",
        )
    if not modules:
        raise IncompatibleInputs(f"{escape(adapter.name)}: holds no factors")
    scan_factors(own, evaluate)
    carried = carry([own], [1.0], evaluate)
    if keep is None:
        assert rank is not None
        ranks = [rank] * len(modules)
    else:
        ranks = _chosen(modules, keep, by, rank, evaluate)
    made = [_resized(module, new, seed, dtype or DType.F32) for module, new in zip(modules, ranks, strict=True)]
    settings = settings_of(adapter)
    config = lora_config(
        made,
        [settings],
        **{key: settings.get(key) for key in ("task_type", "base_model_name_or_path", "revision", "lora_dropout")},
        fan_in_fan_out=own.config.fan_in_fan_out,
        **carried.settings,
    )
    factors = {name: tensor for module in made for name, tensor in lora_tensors(module).items()}
    return Checkpoint(
        adapter.name,
        {**factors, **carried.tensors},
        sidecars={**adapter.sidecars, CONFIG_NAME: written_json(config)},
        warnings=own.notes,
        prefix="adapter_model",
        in_one_file=True,
    )


def _check_options(rank: int | None, keep: float | None, by: str, seed: int) -> None:
    if rank is None and keep is None:
        raise UsageError("neither a rank nor a share is given", hint="--rank 16, or --keep 0.99 for what that takes")
    if rank is not None and rank < 1:
        raise UsageError(f"a rank of {rank} holds nothing: expected at least 1")
    if keep is None and by != "squares":
        raise UsageError(f"{by} measures what is kept, and nothing says how much that is to be", hint="--keep")
    if keep is not None and by == "sv_ratio" and not (math.isfinite(keep) and keep >= 1):
        raise UsageError(f"a ratio of {keep:g} of the largest singular value to the smallest: expected at least 1")
    if keep is not None and by != "sv_ratio" and not 0 < keep <= 1:
        raise UsageError(f"{keep:g} is no share: expected more than 0, at most 1", hint="--keep 0.99")
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"the seed {seed} does not have 64 bits: expected 0 to {(1 << 64) - 1}")


def _chosen(
    modules: Sequence[LoraModule], keep: float, by: Measure, limit: int | None, evaluate: Evaluate
) -> list[int]:
    """The rank of each module by what it keeps; of stacked experts that of the one that needs most."""
    import numpy as np

    spectra = [LazyTensor.make(Spectrum(1), *pair) for module in modules for pair in _experts(module)]
    found = iter([least_rank(np.frombuffer(data), keep, by) for data in evaluate(spectra)])
    needed = [max(next(found) for _ in range(module.experts)) for module in modules]
    return [least if limit is None else min(least, limit) for least in needed]


def _experts(module: LoraModule) -> list[tuple[LazyTensor, LazyTensor]]:
    """The factors of each expert, or those of the module."""
    a, b, count = module.factors.a, module.factors.b, module.experts
    if count == 1:
        return [(a, b)]
    rows = [cut(a, 0, i * module.rank, (i + 1) * module.rank) for i in range(count)]
    columns = [
        concat([cut(b, 1, j * count + i, j * count + i + 1) for j in range(module.rank)], 1) for i in range(count)
    ]
    return list(zip(rows, columns, strict=True))


def least_rank(values: NDArray[Any], keep: float, by: Measure) -> int:
    """The least rank that keeps enough of a change with these singular values, largest first; at least 1."""
    import numpy as np

    if not len(values) or not values[0] > 0:
        return 1
    if by == "sv_ratio":
        return max(1, int((values > values[0] / keep).sum()))
    sums = np.cumsum(values if by == "sv_cumulative" else values**2)
    wanted = keep**2 if by == "sv_fro" else keep
    return min(len(values), int(np.searchsorted(sums / sums[-1], wanted)) + 1)


def _resized(module: LoraModule, rank: int, seed: int, dtype: DType) -> LoraModule:
    """The module with factors of that rank."""
    own, scale = module.factors, module.scale
    a, b, bias = own.a, own.b, own.bias
    if rank < module.rank:
        rank = min(rank, *module.shape)
        how = CombinedFactor("svd", ((1.0, scale),), rank, "a", module.target, module.experts)
        a, b = combined_pair(how, (a, b))
        bias, scale = bias and LazyTensor.make(WeightedSum((scale,)), bias), 1.0
    elif rank > module.rank:
        a, b = _grown(module, rank, seed)
    factors = Factors(cast(a, dtype), cast(b, dtype), bias and cast(bias, dtype), None, own.is_embedding)
    return replace(module, rank=rank, scale=scale, factors=factors)


def _grown(module: LoraModule, rank: int, seed: int) -> tuple[LazyTensor, LazyTensor]:
    """Factors of a higher rank with the same product: zeros in B, in A what peft begins to train with."""
    a, b = (cast(each, DType.F32) for each in (module.factors.a, module.factors.b))
    shape = (rank - module.rank, *a.spec.shape[1:])
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    rows = []
    for i in range(module.experts):
        new = LazyTensor.make(Uniform(shape, bound, seed, f"{module.target}\0{i}"))
        rows += [cut(a, 0, i * module.rank, (i + 1) * module.rank), new]
    columns = (b.spec.shape[0], rank * module.experts, *b.spec.shape[2:])
    return concat(rows, 0), fit(b, columns, bytes(DType.F32.itemsize))
