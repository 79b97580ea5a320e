"""LoRA adapters as peft saves them: adapter_config.json, and factors by module.

Source: `LoraConfig` and `LoraLayer` of peft 0.21. What plain LoRA, DoRA, `modules_to_save` and
`trainable_token_indices` need is read; every other setting is known to change nothing, or refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing
from weightops.formats.adapter_names import Kind, Patterns, parse_name
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.arrange import Agreed

CONFIG_NAME = "adapter_config.json"
_CHANGES_NOTHING = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
"""Settings of training and loading, and of where factors are; they are where the file has them."""
_REFUSED = {
    "alora_invocation_tokens": "aLoRA is active for some tokens only",
    "arrow_config": "Arrow chooses among adapters for each token",
    "enable_lora": "merged linear layers are no longer part of peft",
    "kasa_config": "KaSA changes the base too",
    "layer_replication": "the layers of the base are replicated",
    "megatron_config": "it is for Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA is no plain LoRA",
    "use_bdlora": "BD-LoRA is no plain LoRA",
    "use_qalora": "QA-LoRA is for quantised weights",
    "velora_config": "VeLoRA is no plain LoRA",
}
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "mica")
_EDITED = "was the config edited, or taken from another adapter?"
_OF_MODULES = {Kind.A, Kind.B, Kind.BIAS, Kind.EMBEDDING_A, Kind.EMBEDDING_B, Kind.MAGNITUDE}
_MAX_RANK = 1 << 20
_SUFFIX = {Kind.MAGNITUDE: "lora_magnitude_vector", Kind.BIAS: "lora_B.bias"}
_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "lora_ga")


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """adapter_config.json, as far as it says what the tensors mean."""

    peft_type: str = ""
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str | None = True


@dataclass
class Factors:
    """What an adapter holds of one module: A `[r, in]`, B `[out, r]`, and with them a bias or a magnitude `[out]`.

    Of an embedding, A is `[r, tokens]` and B `[width, r]`.
    """

    a: LazyTensor
    b: LazyTensor
    bias: LazyTensor | None
    magnitude: LazyTensor | None
    is_embedding: bool


@dataclass
class Adapter:
    """An adapter: factors by module and depth (see `adapter_names.Name`), and tensors of or for the base, by path.

    `base` are those of modules with factors, which are loaded before anything is merged, `whole` any others, and `rows`
    new rows of embeddings.
    """

    name: str
    config: AdapterConfig
    tensors: Mapping[str, LazyTensor]
    weight: float
    factors: dict[tuple[str, int], Factors] = field(default_factory=dict)
    base: dict[str, LazyTensor] = field(default_factory=dict)
    whole: dict[str, LazyTensor] = field(default_factory=dict)
    rows: dict[str, LazyTensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"{escape(self.name)}: {CONFIG_NAME}"
        self._ranks = Patterns(self.config.rank_pattern or {}, f"{where}: rank_pattern")
        self._alphas = Patterns(self.config.alpha_pattern or {}, f"{where}: alpha_pattern")

    def rank(self, path: str) -> int:
        """The rank of a module by adapter_config.json; `path` is that of a parameter where that is what it targets."""
        found = self._ranks.find(path)
        return self.config.r if found is None else int(found)

    def scale(self, path: str) -> float:
        """What the product of the factors is multiplied by: alpha / r or alpha / sqrt(r), times the weight."""
        found, rank = self._alphas.find(path), self.rank(path)
        alpha = self.config.lora_alpha if found is None else found
        # in the order in which peft's `set_scale` computes
        return self.weight * alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def is_saved_whole(self, path: str) -> bool:
        """Whether the tensor at `path` is one of a module in `modules_to_save`."""
        if not self.config.modules_to_save:
            return False
        parts = path.split(".")
        modules = {".".join(parts[i:j]) for j in range(1, len(parts)) for i in range(j)}
        return any(name in modules for name in self.config.modules_to_save)

    def token_rows(self, path: str) -> tuple[int, ...]:
        """The numbers of the rows that `rows` has for the module at `path`."""
        given = self.config.trainable_token_indices
        if not isinstance(given, dict):
            return tuple(given or ())
        return next((tuple(v) for k, v in given.items() if path == k or path.endswith(f".{k}")), ())


def read_adapter(checkpoint: Checkpoint, weight: float = 1.0) -> Adapter:
    """The adapter in an opened folder, every scale times `weight`.

    Raises `SourceMissing` without adapter_config.json, `CorruptInput` where the files contradict themselves or each
    other, `IncompatibleInputs` for what is not plain LoRA or DoRA.
    """
    where = escape(checkpoint.name)
    adapter = Adapter(checkpoint.name, read_config(checkpoint), checkpoint.tensors, weight)
    modules: dict[tuple[str, int], dict[Kind, str]] = {}
    tensors: dict[Kind, dict[str, LazyTensor]] = {kind: {} for kind in Kind}
    for text, tensor in checkpoint.items():
        name = parse_name(text, where)
        if not tensor.spec.dtype.is_float or tensor.spec.dtype.is_packed:
            raise IncompatibleInputs(
                f"{where}: {escape(text)} is {tensor.spec}, expected floating-point numbers",
                hint="a quantised adapter: fetch it as it was trained",
            )
        if name.kind in _OF_MODULES:
            parts = modules.setdefault((name.path, name.depth), {})
            if name.kind in parts:
                raise _twice(where, parts[name.kind], text)
            parts[name.kind] = text
        elif name.path in tensors[name.kind]:
            raise _twice(where, name.path, text)
        else:
            tensors[name.kind][name.path] = tensor
    adapter.factors = {key: _factors(parts, checkpoint, adapter.config) for key, parts in modules.items()}
    adapter.base, adapter.rows = tensors[Kind.BASE], tensors[Kind.ROWS]
    adapter.whole = _whole(tensors, adapter, where)
    if tensors[Kind.ORIGINAL]:
        adapter.notes += (f"{where}: what modules_to_save replaces is in it too, and not used",)
    if adapter.config.trainable_token_indices and not adapter.rows:
        raise CorruptInput(
            f"{where}: {CONFIG_NAME} has trainable_token_indices, and there are no rows for them",
            hint="fetch the adapter again",
        )
    return adapter


def _whole(tensors: Mapping[Kind, Mapping[str, LazyTensor]], adapter: Adapter, where: str) -> dict[str, LazyTensor]:
    """The tensors that replace those of the base; what they were before is of no use then."""
    whole = dict(tensors[Kind.WHOLE])
    for path, tensor in tensors[Kind.COPY].items():
        problem = f"{where}: {path} and the same in modules_to_save differ"
        whole[path] = LazyTensor.make(Agreed(problem), whole[path], tensor) if path in whole else tensor
    odd = next((path for path in tensors[Kind.ORIGINAL] if not (path in whole and adapter.is_saved_whole(path))), None)
    if odd is not None:
        raise CorruptInput(
            f"{where}: has what {escape(odd)} was, and nothing in its place", hint="fetch the adapter again"
        )
    both = next((path for path in whole if path in adapter.base), None)
    if both is not None:
        raise _twice(where, both, f"{both} beside factors")
    return whole


def _twice(where: str, first: str, second: str) -> CorruptInput:
    return CorruptInput(
        f"{where}: {escape(first)} and {escape(second)} are the same part of a module",
        hint="save the adapter once more with peft",
    )


def _factors(parts: Mapping[Kind, str], checkpoint: Checkpoint, config: AdapterConfig) -> Factors:
    """The factors of one module, whose tensors are named by kind; refuses what does not belong together."""
    where, shown = escape(checkpoint.name), escape(next(iter(parts.values())))
    is_embedding = Kind.EMBEDDING_A in parts or Kind.EMBEDDING_B in parts
    a, b = (Kind.EMBEDDING_A, Kind.EMBEDDING_B) if is_embedding else (Kind.A, Kind.B)
    missing = [kind.name.replace("EMBEDDING", "embedding") for kind in (a, b) if kind not in parts]
    if missing:
        raise CorruptInput(f"{where}: {shown} has no lora_{missing[0]} beside it", hint="fetch the adapter again")
    odd = next((name for kind, name in parts.items() if kind not in (a, b, Kind.BIAS, Kind.MAGNITUDE)), None)
    if odd is not None:
        raise CorruptInput(
            f"{where}: {shown} and {escape(odd)} cannot both be parts of one module", hint="fetch the adapter again"
        )
    for kind, setting, is_set in (
        (Kind.MAGNITUDE, "use_dora", config.use_dora),
        (Kind.BIAS, "lora_bias", config.lora_bias),
    ):
        if (kind in parts) != is_set:
            what = "has no" if is_set else "has a"
            raise CorruptInput(
                f"{where}: {CONFIG_NAME} has {setting}: {str(is_set).lower()}, but {shown} {what} {_SUFFIX[kind]}",
                hint=_EDITED,
            )
    tensors = {kind: checkpoint[name] for kind, name in parts.items()}
    return Factors(tensors[a], tensors[b], tensors.get(Kind.BIAS), tensors.get(Kind.MAGNITUDE), is_embedding)


def read_config(checkpoint: Checkpoint) -> AdapterConfig:
    """adapter_config.json of an adapter; raises as `read_adapter` does."""
    where = escape(checkpoint.name)
    data = checkpoint.sidecar(CONFIG_NAME)
    if data is None:
        is_model = "config.json" in checkpoint.sidecars
        raise SourceMissing(
            f"{where}: has no {CONFIG_NAME}",
            hint="this is a model, not an adapter" if is_model else "name the folder that holds it and the adapter",
        )
    settings = strict_json.load_object(data, f"{where}: {CONFIG_NAME}")
    _refuse_kind(settings, where)
    try:
        config = msgspec.convert(settings, AdapterConfig)
    except msgspec.ValidationError as error:
        raise CorruptInput(f"{where}: {CONFIG_NAME}: {escape(str(error))}", hint=_EDITED) from None
    if config.use_dora and config.lora_bias:
        raise CorruptInput(f"{where}: {CONFIG_NAME} has both use_dora and lora_bias, which peft has not", hint=_EDITED)
    _check_numbers(config, where)
    _check_initialisation(config, where)
    return config


def _refuse_kind(settings: Mapping[str, Any], where: str) -> None:
    """Refuse what is not LoRA, and settings that make something else of it."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise IncompatibleInputs(
            f"{where}: {CONFIG_NAME} has peft_type {escape(str(kind))}, expected LORA",
            hint="merge it with peft itself: other kinds have arithmetic of their own",
        )
    known = {*AdapterConfig.__struct_fields__, *_CHANGES_NOTHING}
    for key, value in settings.items():
        if key in known or not value:
            continue
        reason = _REFUSED.get(key)
        if reason is not None:
            raise IncompatibleInputs(
                f"{where}: {CONFIG_NAME} has {key}: {reason}", hint="such an adapter cannot be merged here"
            )
        raise IncompatibleInputs(
            f"{where}: {CONFIG_NAME} has the setting {escape(key)}, which is not known here",
            hint="if it does not change the arithmetic, take it out",
        )


def _check_numbers(config: AdapterConfig, where: str) -> None:
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    alphas = [config.lora_alpha, *(config.alpha_pattern or {}).values()]
    if min(ranks) < 1 or max(ranks) > _MAX_RANK:
        odd = min(ranks) if min(ranks) < 1 else max(ranks)
        raise CorruptInput(f"{where}: {CONFIG_NAME}: a rank of {odd}", hint=_EDITED)
    if not all(map(math.isfinite, alphas)):
        raise CorruptInput(f"{where}: {CONFIG_NAME}: an alpha that is not finite", hint=_EDITED)


def _check_initialisation(config: AdapterConfig, where: str) -> None:
    """Refuse adapters for a base that peft makes of the base when it loads them."""
    how = config.init_lora_weights
    if not isinstance(how, str) or how.lower() in _INITIALISATIONS:
        return
    known = how.lower().startswith(_CHANGE_THE_BASE)
    raise IncompatibleInputs(
        f"{where}: {CONFIG_NAME} has init_lora_weights: {escape(how)}"
        f"{', which changes the base when peft loads it' if known else ', which is not known here'}",
        hint="save it with save_pretrained(path_initial_model_for_weight_conversion=...), which makes it plain LoRA",
    )
