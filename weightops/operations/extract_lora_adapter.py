"""What an extracted adapter is beside its factors: which layers it is for, what it keeps whole, what its config says.

Which tensor is the weight of a Linear layer is told by its name and shape, because a checkpoint holds no modules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from weightops.checkpoint import Checkpoint, Sidecar, written_json
from weightops.errors import IncompatibleInputs
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.operations.modules import is_conv1d, last_part
from weightops.operations.pairing import is_vocabulary, listed

CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
_HEADS = ("lm_head", "embed_out")
_NOT_LINEAR = re.compile(r"(.*_)?embed(ding)?s?(_.*)?|w[tp]e|shared|relative_attention_bias|(.*_)?router|gate")
"""Modules that keep a matrix and are no Linear layers: embeddings, and routers of experts, by the last part of a name.

The last part of `mlp.gate_proj` is `gate_proj`, which is one.
"""
_RENAMED = {
    "gpt_neox": (r"^embed_out$", "lm_head"),
    "mixtral": (r"\.block_sparse_moe\.gate$", ".mlp.gate"),
    "minimax": (r"\.block_sparse_moe\.gate$", ".mlp.gate"),
}
"""Modules that transformers 5 does not call as the files do, by `model_type`; factors of others are renamed by peft."""
_EXPERT = re.compile(r".+\.experts\.\d+\.[^.]+")
_HEADLESS = re.compile(r"(h|layers|blocks?|blk)\.\d+\.")
_TOKENIZER = ("tokenizer", "special_tokens_map.json", "added_tokens.json", "chat_template", "vocab.", "merges.txt")
_SENTENCEPIECE = ("sentencepiece", "spiece")


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


def is_linear(name: str, pair: Pair) -> bool:
    """Whether a tensor is the weight of a Linear layer, or of transformers' Conv1D, inside the model."""
    last = last_part(module_of(name))
    return _is_matrix(name, pair) and last not in _HEADS and not _NOT_LINEAR.fullmatch(last)


def is_head(name: str, pair: Pair) -> bool:
    """Whether a tensor is an output embedding, which is a Linear layer too."""
    return _is_matrix(name, pair) and last_part(module_of(name)) in _HEADS


def _is_matrix(name: str, pair: Pair) -> bool:
    return name.endswith(".weight") and len(pair.tuned.spec.shape) == 2 and pair.tuned.spec.numel > 0


def module_path(module: str, config: Mapping[str, Any]) -> str:
    """What peft calls a module: as the files do, but for few."""
    pattern, name = _RENAMED.get(str(config.get("model_type")), ("(?!)", ""))
    return re.sub(pattern, name, module)


def is_expert(module: str) -> bool:
    """Whether a layer is one of the experts that transformers 5 and peft stack: all need factors, of one rank."""
    return _EXPERT.fullmatch(module) is not None


def keep_whole(
    names: Iterable[str], factored: Container[str], pairs: Mapping[str, Pair], config: Mapping[str, Any]
) -> Rest:
    """Where in an adapter the tensors `names` go, which differ and have no factors.

    A module is kept with all of its tensors, for peft asks for all of them (its
    `ModulesToSaveWrapper.adapter_state_dict_load_map`). The bias of a layer that has factors is kept beside them, as
    peft's `bias="lora_only"` does. Raises `IncompatibleInputs` for tensors that have no module of their own, or no
    floating-point numbers.
    """
    kept, homeless = Rest(), []
    parents = {parent for name in pairs for parent in _parents(module_of(name))}
    for name in names:
        module = module_of(name)
        if f"{module}.weight" in factored and name.endswith(".bias"):
            kept.tensors[f"{PREFIX}{module}.base_layer.bias"] = pairs[name].tuned
            kept.has_biases = True
        elif not module or module in parents or not pairs[name].tuned.spec.dtype.is_float:
            homeless.append(name)
        elif (path := module_path(module, config)) not in kept.modules:
            kept.modules.append(path)
            own = ((n, pair) for n, pair in pairs.items() if module_of(n) == module)
            kept.tensors |= {f"{PREFIX}{path}.{last_part(n)}": pair.tuned for n, pair in own}
            head = _tied_head(name, pairs, config)
            if head is not None:
                kept.modules.append(head)
                kept.tensors[f"{PREFIX}{head}.weight"] = pairs[name].tuned
    if homeless:
        raise IncompatibleInputs(
            f"{listed(homeless)}: the values differ, and an adapter has no place for them",
            hint="--rest drop leaves them out",
        )
    return kept


def _tied_head(name: str, pairs: Mapping[str, Pair], config: Mapping[str, Any]) -> str | None:
    """The output embedding that is the input embedding `name`, where neither file has it: peft unties the two."""
    module = module_of(name)
    if not is_vocabulary(name) or config.get("tie_word_embeddings") is False:
        return None
    prefix = "language_model." if module.startswith("language_model.model.") else ""
    head = f"{prefix}{'embed_out' if last_part(module) == 'embed_in' else 'lm_head'}"
    is_known = f"{head}.weight" in pairs or last_part(module) in _HEADS or any(_HEADLESS.match(n) for n in pairs)
    return None if is_known else module_path(head, config)


def sidecars(
    ranks: Mapping[str, int], kept: Rest, pairs: Iterable[str], base: Checkpoint, tuned: Checkpoint
) -> dict[str, Sidecar]:
    """adapter_config.json for factors of these ranks, by module, and the tokenizer of `tuned`.

    It has the fields that every peft since 0.7 knows. A module is scaled by lora_alpha / r, which is 1 for all. Factors
    of experts have the rank `r`, which is how peft stacks them.
    """
    settings, known_as = tuned.config(), base.config().get("_name_or_path")
    of_experts = [rank for module, rank in ranks.items() if is_expert(module)]
    usual = Counter(of_experts or ranks.values()).most_common(1)[0][0]
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
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
        "target_modules": _shortest(ranks, (module_path(module_of(name), settings) for name in pairs)),
        "modules_to_save": kept.modules or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    tokenizer = {n: s for n, s in tuned.sidecars.items() if n.startswith((*_TOKENIZER, *_SENTENCEPIECE))}
    return {CONFIG_NAME: written_json(config), **tokenizer}


def _shortest(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """`target_modules` that fits these modules and no others: the ends of their paths if those say it, else paths."""
    wanted = set(modules)
    ends = {last_part(module) for module in wanted}
    alike = {module for module in others if last_part(module) in ends}
    return sorted(ends) if alike == wanted else sorted(wanted)


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
