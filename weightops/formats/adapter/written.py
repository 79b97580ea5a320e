"""LoRA adapters as peft's `save_pretrained` writes them: names of tensors, and adapter_config.json.

What is written here is plain: a module has a rank and a scale of its own, by `rank_pattern` and `alpha_pattern`, and
`use_rslora` is off. It has the fields that every peft since 0.7 knows, and others only where they say something.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightops.errors import UsageError
from weightops.formats.adapter.lora import LoraModule
from weightops.lazy import LazyTensor
from weightops.spec import DType

FACTOR_DTYPES = (DType.F32, DType.F16, DType.BF16)
"""The types of factors that peft loads."""
PREFIX = "base_model.model."
_LAYER = re.compile(r"\.(\d+)\.")


def check_factor_dtype(dtype: DType | None) -> None:
    """Raise `UsageError` for a type that factors cannot be written in."""
    if dtype is not None and dtype not in FACTOR_DTYPES:
        known = ", ".join(each.value for each in FACTOR_DTYPES)
        raise UsageError(f"an adapter in {dtype.value} is not what peft loads: expected one of {known}")


def lora_tensors(module: LoraModule) -> dict[str, LazyTensor]:
    """The tensors of a module, by the names that peft looks for."""
    stem = f"{PREFIX}{module.path}{'.base_layer' * module.depth}"
    own = module.factors
    a, b = ("lora_embedding_A", "lora_embedding_B") if own.is_embedding else ("lora_A.weight", "lora_B.weight")
    found = {f"{stem}.{a}": own.a, f"{stem}.{b}": own.b}
    if own.bias is not None:
        found[f"{stem}.lora_B.bias"] = own.bias
    if own.magnitude is not None:
        found[f"{stem}.lora_magnitude_vector"] = own.magnitude
    return found


def lora_config(
    modules: Sequence[LoraModule], sources: Sequence[Mapping[str, Any]] = (), **settings: Any
) -> dict[str, Any]:
    """adapter_config.json for these modules; `settings` replace what it says otherwise.

    `sources` are the documents of the adapters that the modules are of, which name them as they name theirs.
    """
    ranks = {module.target: module.rank for module in modules}
    alphas = {module.target: plain_number(module.scale * module.rank) for module in modules}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] if each else 8 for each in (ranks, alphas))
    paths = [module.path for module in modules if module.target == module.path]
    parameters = joined_parameters(sources, modules)
    document = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": joined_targets(sources, paths) if sources else shortest(paths),
        **({"target_parameters": parameters} if parameters else {}),
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if any(module.factors.bias is not None for module in modules):
        document["lora_bias"] = True
    return {**document, **settings}


def plain_number(number: float) -> float | int:
    """A whole number as one, as people write alpha."""
    return int(number) if float(number).is_integer() else number


def shortest(modules: Iterable[str]) -> list[str]:
    """`target_modules` for these, where other modules of the base are not known: the ends of paths, or whole paths.

    Ends stand for all modules of that name, so they are taken where every layer up to the last has each of them.
    """
    paths = sorted(set(modules))
    layers = {int(found[1]) for path in paths if (found := _LAYER.search(path))}
    ends: dict[str, list[str]] = {}
    for path in paths:
        ends.setdefault(path.rpartition(".")[2], []).append(path)
    alike = all(len({_LAYER.sub(".", path) for path in own}) == 1 for own in ends.values())
    whole = all(len(own) == (len(layers) if _LAYER.search(own[0]) else 1) for own in ends.values())
    return sorted(ends) if layers == set(range(len(layers))) and alike and whole else paths


def joined_targets(settings: Sequence[Mapping[str, Any]], modules: Iterable[str]) -> list[str] | str:
    """`target_modules` for the modules of several adapters, of whose configs these are the settings.

    Lists of names are joined, and patterns are alternatives, as peft does it; where a config leaves out layers or
    modules by other fields, whole paths are listed.
    """
    given = [each.get("target_modules") for each in settings]
    narrow = ("layers_to_transform", "exclude_modules", "layers_pattern")
    if not any(each.get(field) for each in settings for field in narrow):
        if all(isinstance(own, list) and all(isinstance(name, str) for name in own) for own in given):
            names = sorted({name for own in given for name in own or ()})
            if all(_is_named(path, names) for path in modules):
                return names
        if all(isinstance(own, str) and own != "all-linear" for own in given):
            patterns = list(dict.fromkeys(map(str, given)))
            return patterns[0] if len(patterns) == 1 else "|".join(f"({pattern})" for pattern in patterns)
    return sorted(set(modules))


def joined_parameters(settings: Sequence[Mapping[str, Any]], modules: Sequence[LoraModule]) -> list[str] | None:
    """`target_parameters` for the modules of several adapters, as these name them; None without stacked experts."""
    targets = sorted({module.target for module in modules if module.target != module.path})
    given = [name for each in settings for name in each.get("target_parameters") or () if isinstance(name, str)]
    if not targets or not all(_is_named(target, given) for target in targets):
        return targets or None
    return list(dict.fromkeys(given))


def _is_named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)
