"""adapter_config.json of LoRA adapters: what of it says what the tensors mean, and what is no plain LoRA.

Source: `LoraConfig` of peft 0.21. Its settings are read, known to change nothing, or refused; others peft does not
know either, and ignores with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs, SourceMissing
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.gguf.metadata import is_typed
from weightops.io import strict_json
from weightops.io.escape import escape

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
EDITED = "was the config edited, or taken from another adapter?"
_MAX_RANK = 1 << 20
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


KNOWN = {*AdapterConfig.__struct_fields__, *_CHANGES_NOTHING, *_REFUSED}
"""The settings of every version of peft so far."""


def read_config(checkpoint: Checkpoint) -> tuple[AdapterConfig, tuple[str, ...]]:
    """adapter_config.json of an adapter, and what there is to say of it; raises as `read_adapter` does."""
    where = escape(checkpoint.name)
    data = checkpoint.sidecar(CONFIG_NAME)
    if data is None:
        is_model = "config.json" in checkpoint.sidecars or any(map(is_typed, checkpoint.metadata.values()))
        raise SourceMissing(
            f"{where}: has no {CONFIG_NAME}",
            hint="this is a model, not an adapter"
            if is_model
            else "peft's save_pretrained writes it, with rank and scale: put it beside the adapter",
        )
    settings = strict_json.load_object(data, f"{where}: {CONFIG_NAME}")
    unknown = _refuse_kind(settings, where)
    try:
        config = msgspec.convert(settings, AdapterConfig)
    except msgspec.ValidationError as error:
        raise CorruptInput(f"{where}: {CONFIG_NAME}: {escape(str(error))}", hint=EDITED) from None
    if config.use_dora and config.lora_bias:
        raise CorruptInput(f"{where}: {CONFIG_NAME} has both use_dora and lora_bias, which peft has not", hint=EDITED)
    _check_numbers(config, where)
    _check_initialisation(config, where)
    text = (
        f"{where}: {CONFIG_NAME} has settings that peft does not know, and ignores: {', '.join(map(escape, unknown))}"
    )
    return config, (text,) if unknown else ()


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """adapter_config.json as data, whatever it says; empty where there is none."""
    data = checkpoint.sidecar(CONFIG_NAME)
    return strict_json.load_object(data, f"{escape(checkpoint.name)}: {CONFIG_NAME}") if data is not None else {}


def _refuse_kind(settings: Mapping[str, Any], where: str) -> list[str]:
    """Refuse what is not LoRA, and settings that make something else of it; gives those that are unknown."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise IncompatibleInputs(
            f"{where}: {CONFIG_NAME} has peft_type {escape(str(kind))}, expected LORA",
            hint="merge it with peft itself: other kinds have arithmetic of their own",
        )
    for key, reason in _REFUSED.items():
        if settings.get(key):
            raise IncompatibleInputs(
                f"{where}: {CONFIG_NAME} has {key}: {reason}", hint="such an adapter cannot be merged here"
            )
    return [key for key, value in settings.items() if value and key not in KNOWN]


def _check_numbers(config: AdapterConfig, where: str) -> None:
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if min(ranks) < 1 or max(ranks) > _MAX_RANK:
        odd = min(ranks) if min(ranks) < 1 else max(ranks)
        raise CorruptInput(f"{where}: {CONFIG_NAME}: a rank of {odd}", hint=EDITED)


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
