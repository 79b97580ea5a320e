"""Combine adapters: one LoRA that does what several do together, exactly from their factors, or by peft's methods.

Source of the methods: `LoraModel.add_weighted_adapter` of peft 0.21. What it gets wrong is right here: sources with
`use_rslora` or ranks of their own by module, one adapter, experts, and what adapters hold beside factors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from weightops.checkpoint import Checkpoint, Sidecar, written_json
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.carried import carry
from weightops.formats.adapter.config import settings_of
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.adapter.lora import Adapter, LoraModule
from weightops.formats.adapter.values import scan_factors
from weightops.formats.adapter.written import check_factor_dtype, lora_config, lora_tensors
from weightops.formats.sidecars import is_tokenizer_file
from weightops.io.escape import escape
from weightops.io.notebook import in_units
from weightops.lazy import Evaluate
from weightops.operations.adapter.convert import read_ours
from weightops.operations.adapter.terms import combined, together
from weightops.ops.lora.arithmetic import SignVote
from weightops.ops.lora.combined import CombinedFactor, Method, makes_products
from weightops.spec import DType

_STEM = re.compile(r"(?<=\.)\d+\..*")
"""What comes after the names that stand before the number of a layer."""
_PRUNED = ("ties", "dare", "magnitude_prune")
_PER_MINUTE = 2.5e12
"""Multiplications of float64 that a core makes in a minute, about."""


def combine_adapters(
    adapter: Sequence[Checkpoint],
    *,
    method: Method = "cat",
    weight: Sequence[float] = (),
    density: float | None = None,
    rank: int | None = None,
    vote: SignVote = "total",
    seed: int = 0,
    dtype: DType | None = None,
    evaluate: Evaluate,
) -> Checkpoint:
    """One adapter in peft's format whose change of the base is the sum of those of `adapter`, each times its `weight`.

    `cat` is that sum, with the sum of the ranks; `svd` the best approximation of `rank`, by default the largest of the
    ranks. The others are peft's, and no sums: what they are off is noted by module, as the norm of the difference
    divided by that of the sum (`error`). `density`: of what `ties`, `dare` and `magnitude_prune` keep; of their names
    those that end in `_svd` work on the whole products, and say what that takes. `vote`: whether TIES' signs go by sums
    ("total") or by numbers ("frequency"). `seed`: of DARE's masks. `dtype`: of the factors, default float32.

    A module that one adapter alone has goes on with its factors. What adapters hold beside factors is carried where one
    alone has it or all agree. Ranks of single modules are kept apart (`rank_pattern`), scales are 1.

    Raises `IncompatibleInputs` naming the module for adapters of other shapes, magnitudes (DoRA), and contradictions;
    `CorruptInput` for values that are no numbers; `UsageError` for options that cannot be meant.
    """
    weights = _checked(adapter, method, weight, density, rank, seed, dtype)
    adapters = [read_ours(each) for each in adapter]
    groups = together(adapters, weights)
    carried = carry(adapters, weights, evaluate)
    for own in adapters:
        scan_factors(own, evaluate)
    how = CombinedFactor(
        method=method,
        terms=(),
        rank=rank or 0,
        part="a",
        label="",
        density=1.0 if density is None else density,
        vote=vote,
        seed=seed if method.startswith("dare") else 0,
    )
    made = [combined(terms, how, dtype or DType.F32) for terms in groups.values()]
    _refuse_some_biased(made)
    settings = [settings_of(each) for each in adapter]
    config = lora_config(
        made,
        settings,
        task_type=settings[0].get("task_type"),
        base_model_name_or_path=settings[0].get("base_model_name_or_path"),
        fan_in_fan_out=any(each.config.fan_in_fan_out for each in adapters),
        **carried.settings,
    )
    factors = {name: tensor for module in made for name, tensor in lora_tensors(module).items()}
    notes = [*(note for each in adapters for note in each.notes), *carried.notes]
    notes += [*_about_bases(adapter, settings), *_about_names(adapters)]
    return Checkpoint(
        adapter[0].name,
        {**factors, **carried.tensors},
        sidecars={**_tokenizer(adapter), CONFIG_NAME: written_json(config)},
        warnings=(*dict.fromkeys(notes), *_estimate(method, made)),
        prefix="adapter_model",
        in_one_file=True,
    )


def _checked(
    adapter: Sequence[Checkpoint],
    method: str,
    weight: Sequence[float],
    density: float | None,
    rank: int | None,
    seed: int,
    dtype: DType | None,
) -> tuple[float, ...]:
    """The weights; raises `UsageError` for what cannot be meant."""
    if not adapter:
        raise UsageError("there is no adapter to combine", hint="name at least one")
    if weight and len(weight) != len(adapter):
        raise UsageError(
            f"there are {len(weight)} weights for {len(adapter)} adapters", hint="give one for each, in their order"
        )
    if not all(map(math.isfinite, weight)):
        raise UsageError("a weight must be a finite number", hint="1 is what the adapter was trained with")
    is_pruned = method.startswith(_PRUNED)
    if is_pruned and density is None:
        raise UsageError(f"{method} needs a density", hint="the share of numbers that is kept: --density 0.5")
    if density is not None and not is_pruned:
        raise UsageError(f"a density has no use for {method}", hint="leave it out")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"a density of {density:g} is no share: expected more than 0, at most 1")
    if rank is not None and not method.endswith("svd"):
        raise UsageError(f"a rank has no use for {method}", hint="methods that end in svd take one")
    if rank is not None and rank < 1:
        raise UsageError(f"a rank of {rank} holds nothing: expected at least 1")
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"the seed {seed} does not have 64 bits: expected 0 to {(1 << 64) - 1}")
    check_factor_dtype(dtype)
    return tuple(weight) or (1.0,) * len(adapter)


def _refuse_some_biased(made: Sequence[LoraModule]) -> None:
    """Refuse biases that only some modules would have: peft has them for all or none."""
    biased = [module.target for module in made if module.factors.bias is not None]
    if biased and len(biased) < len(made):
        odd = next(module.target for module in made if module.factors.bias is None)
        raise IncompatibleInputs(
            f"{escape(biased[0])} has a bias (lora_bias) in one adapter, and {escape(odd)} in none: peft has biases "
            "for all modules or for none",
            hint="merge the one with biases into the base first",
        )


def _about_bases(adapters: Sequence[Checkpoint], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A word of warning where the adapters say that they were trained on other bases."""
    bases = [own.get("base_model_name_or_path") for own in settings]
    named = {each.name: str(base) for each, base in zip(adapters, bases, strict=True) if base}
    if len({base.rstrip("/").rpartition("/")[2] for base in named.values()}) < 2:
        return []
    said = ", ".join(f"{escape(name)} on {escape(base)}" for name, base in named.items())
    return [
        f"the adapters were trained on bases of other names: {said}; what comes out fits neither unless they are one"
    ]


def _about_names(adapters: Sequence[Adapter]) -> list[str]:
    """A word of warning where adapters have the same modules under names that begin otherwise.

    transformers 4.52 renamed the modules of models with pictures, and programs that find no module go on without it.
    """
    stems = [{_STEM.sub("", path): path for path, _ in each.factors if _STEM.search(path)} for each in adapters]
    for i, one in enumerate(stems):
        for j, two in enumerate(stems[:i]):
            ends = {path.rpartition(".")[2] for path, _ in adapters[i].factors}
            if one and two and not one.keys() & two.keys() and ends & {p.rpartition(".")[2] for p in two.values()}:
                shown = [(escape(adapters[k].name), escape(next(iter(stems[k].values())))) for k in (j, i)]
                said = " and ".join(f"{path} in {name}" for name, path in shown)
                return [
                    f"the adapters' names begin otherwise, {said}: if these are the same modules, a program finds one "
                    "half of what comes out and passes over the other"
                ]
    return []


def _estimate(method: str, made: Sequence[LoraModule]) -> list[str]:
    """What a method that needs whole products takes."""
    if not makes_products(method):
        return []
    held = multiplications = 0
    for module in made:
        for node in module.factors.a.walk():
            if isinstance(node.op, CombinedFactor):
                inputs = [each.spec for each in node.inputs]
                held = max(held, node.op.held_nbytes(*inputs))
                multiplications += node.op.multiplications(*inputs)
    minutes = round(multiplications / _PER_MINUTE)
    time = f"{minutes} minutes of a core" if minutes > 1 else "a minute of a core at most"
    largest = 4 * max(math.prod(module.shape) for module in made)
    return [
        f"{method} makes and decomposes the whole product of each of {len(made)} modules, one after another: up to "
        f"{in_units(largest)} each, of which {in_units(held)} are held at once, and about {multiplications:.1e} "
        f"multiplications in all, {time}"
    ]


def _tokenizer(adapters: Sequence[Checkpoint]) -> dict[str, Sidecar]:
    """The tokenizer of the first adapter that has one."""
    for adapter in adapters:
        found = {name: file for name, file in adapter.sidecars.items() if is_tokenizer_file(name)}
        if found:
            return found
    return {}
