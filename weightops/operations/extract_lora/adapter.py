"""What an extracted adapter is beside its factors: which layers it is for, what it keeps whole, what its config says.

Which tensor is the weight of a Linear layer is told by its name and shape, because a checkpoint holds no modules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from weightops.checkpoint import Checkpoint, Sidecar, written_json
from weightops.errors import IncompatibleInputs
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.adapter.written import PREFIX as PREFIX
from weightops.formats.modules import is_conv1d, last_part
from weightops.formats.sidecars import is_tokenizer_file
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.embeddings import is_vocabulary
from weightops.lazy import LazyTensor
from weightops.operations.extract_lora.places import Places

_HEADS = ("lm_head", "embed_out")
_NOT_LINEAR = re.compile(r"(.*_)?embed(ding)?s?(_.*)?|w[tp]e|shared|relative_attention_bias|(.*_)?router|gate")
"""Modules that keep a matrix and are no Linear layers: embeddings, and routers of experts, by the last part of a name.

The last part of `mlp.gate_proj` is `gate_proj`, which is one.
"""
_HEADLESS = re.compile(r"(h|layers|blocks?|blk)\.\d+\.")


class Pair(NamedTuple):
    """A tensor of the base and its namesake of the tuned model."""

    base: LazyTensor
    tuned: LazyTensor

    @property
    def is_resized(self) -> bool:
        return self.base.spec.shape != self.tuned.spec.shape


@dataclass
class Rest:
    """What is kept whole: modules, tensors by their names in the adapter, biases of layers that have factors."""

    modules: list[str] = field(default_factory=list)
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    has_biases: bool = False


def is_linear(name: str, pair: Pair, places: Places) -> bool:
    """Whether a tensor is the weight of a Linear layer, or of transformers' Conv1D, inside the model."""
    last = last_part(module_of(name))
    is_named = _is_matrix(name, pair) and last not in _HEADS and not _NOT_LINEAR.fullmatch(last)
    return is_named and places.may_be_linear(name)


def is_head(name: str, pair: Pair) -> bool:
    """Whether a tensor is an output embedding, which is a Linear layer too."""
    return _is_matrix(name, pair) and last_part(module_of(name)) in _HEADS


def _is_matrix(name: str, pair: Pair) -> bool:
    return name.endswith(".weight") and len(pair.tuned.spec.shape) == 2 and pair.tuned.spec.numel > 0


def keep_whole(
    names: Iterable[str],
    factored: Collection[str],
    pairs: Mapping[str, Pair],
    places: Places,
    config: Mapping[str, Any],
) -> Rest:
    """Where in an adapter the tensors `names` go, which differ and have no factors.

    A module is kept with all of its tensors, those of modules in it included, for peft asks for all of them (its
    `ModulesToSaveWrapper.adapter_state_dict_load_map`). The bias of a layer that has factors is kept beside them, as
    peft's `bias="lora_only"` does. Raises `IncompatibleInputs` for tensors of modules with factors in them, or no
    floating-point numbers, and for those that transformers makes others of.
    """
    kept, homeless = Rest(), []
    with_factors = {places[name].module for name in factored}
    closed = {parent for module in with_factors for parent in (module, *_parents(module))}
    wanted: dict[str, str] = {}
    for name in names:
        module = places[name].module
        if module in with_factors and name.endswith(".bias"):
            kept.tensors[f"{PREFIX}{module}.base_layer.bias"] = pairs[name].tuned
            kept.has_biases = True
        elif not module or module in closed or not pairs[name].tuned.spec.dtype.is_float or not places.is_known(name):
            homeless.append(name)
        else:
            wanted.setdefault(module, name)
    own: dict[str, list[str]] = {}
    for name in pairs:
        module = places[name].module
        outer = next((parent for parent in (*_parents(module), module) if parent in wanted), None)
        if outer is not None:
            own.setdefault(outer, []).append(name)
    for module, name in wanted.items():
        if module not in own:
            continue  # in one that is kept anyway
        homeless += [n for n in own[module] if not places.is_known(n)][:1]
        kept.modules.append(module)
        kept.tensors |= {f"{PREFIX}{places[n].path}": pairs[n].tuned for n in own[module]}
        head = _tied_head(name, pairs, config, places)
        if head is not None:
            kept.modules.append(head)
            kept.tensors[f"{PREFIX}{head}.weight"] = pairs[name].tuned
    if homeless:
        raise IncompatibleInputs(
            f"{listed(homeless)}: the values differ, and an adapter has no place for them",
            hint="--rest drop leaves them out",
        )
    return kept


def _tied_head(name: str, pairs: Mapping[str, Pair], config: Mapping[str, Any], places: Places) -> str | None:
    """The output embedding that is the input embedding `name`, where neither file has it: peft unties the two."""
    module = places[name].module
    if not is_vocabulary(name) or config.get("tie_word_embeddings") is False:
        return None
    if any(last_part(module_of(n)) in _HEADS or _HEADLESS.match(n) for n in pairs):
        return None
    return "language_model.lm_head" if module.startswith("language_model.model.") else "lm_head"


def sidecars(
    ranks: Mapping[str, int],
    experts: Mapping[str, int],
    kept: Rest,
    places: Places,
    base: Checkpoint,
    tuned: Checkpoint,
) -> dict[str, Sidecar]:
    """adapter_config.json for factors of these ranks, by module, and the tokenizer of `tuned`.

    `experts` are the parameters that stack those of experts, with the rank of each expert's factors; peft puts those of
    the two layers in `gate_up_proj` side by side, which doubles it. A module is scaled by lora_alpha / r, which is 1
    for all. Where no experts are stacked, it has the fields that every peft since 0.7 knows.
    """
    settings, known_as = tuned.config(), base.config().get("_name_or_path")
    usual = Counter(experts.values() or ranks.values()).most_common(1)[0][0]
    doubled = {name: rank * (2 if name.endswith(".gate_up_proj") else 1) for name, rank in experts.items()}
    ranks = {**ranks, **doubled}
    parameters = {target: places.parameter(target) for target in ranks}
    unusual = {parameters[target] or target: rank for target, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": None if _headless(ranks) else "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": known_as if known_as and isinstance(known_as, str) else base.name,
        "revision": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "lora_only" if kept.has_biases else "none",
        "fan_in_fan_out": any(is_conv1d(module, settings.get("model_type")) for module in ranks),
        "init_lora_weights": True,
        "target_modules": places.shortest(target for target, parameter in parameters.items() if parameter is None),
        **({"target_parameters": sorted(filter(None, parameters.values()))} if any(parameters.values()) else {}),
        "modules_to_save": kept.modules or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    tokenizer = {n: s for n, s in tuned.sidecars.items() if is_tokenizer_file(n)}
    return {CONFIG_NAME: written_json(config), **tokenizer}


def notes(pairs: Mapping[str, Pair], modules: Iterable[str], kept: Rest) -> list[str]:
    """What whoever loads the adapter has to know."""
    found = []
    if kept.modules:
        nbytes = sum(tensor.nbytes for tensor in kept.tensors.values())
        found.append(f"kept whole, in {nbytes} bytes: {listed(kept.modules)}")
    resized = [name for name, pair in pairs.items() if pair.is_resized]
    if resized and kept.modules:
        old, new = (tensor.spec.shape[0] for tensor in pairs[resized[0]])
        found.append(
            f"tuned has a vocabulary of {new}, base one of {old}: "
            f"call resize_token_embeddings({new}) on the base model before peft loads the adapter"
        )
    headless = _headless(modules)
    if headless is not None:
        found.append(
            f"the names are those of a model without its head ({escape(headless)}): "
            "the adapter fits what AutoModel loads, not AutoModelForCausalLM"
        )
    renamed = next((module for module in modules if module.startswith("language_model.")), None)
    if renamed is not None:
        found.append(
            f"the names are those of the files ({escape(renamed)}), where transformers 5 has model.language_model: "
            "peft may not find the modules"
        )
    return found


def _headless(modules: Iterable[str]) -> str | None:
    """The first module that has a number where models with a head have a name before it."""
    return next((module for module in modules if _HEADLESS.match(module)), None)


def module_of(name: str) -> str:
    """The module of a tensor: its name without the last part."""
    return name.rpartition(".")[0]


def _parents(module: str) -> Iterable[str]:
    """The modules that a module is part of."""
    parts = module.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))
