"""Which tensors of a model for more than text are its language model, and which are its towers.

Families differ in prefixes, before and after transformers 4.52; all spellings are read. Sources: transformers 5.23
(conversion_mapping, and the classes of each family), and what the models are published as.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weightops.layouts.layer_config import TEXT_CONFIGS

Part = Literal["text", "vision", "audio"]

_HEADS = ("lm_head.", "embed_out.")


@dataclass(frozen=True)
class Spelling:
    """How names of a language model are spelled within those of the whole: prefixes, and what they are in its own."""

    prefixes: Mapping[str, str]

    def text(self, name: str) -> str | None:
        """The name that a tensor has in the language model alone; None for what is not part of it."""
        if _BESIDE.match(name):
            return None
        for prefix, own in self.prefixes.items():
            if name.startswith(prefix):
                return f"{own}{name.removeprefix(prefix)}"
        return None

    def whole(self, name: str) -> str | None:
        """The inverse of `text`."""
        for prefix, own in self.prefixes.items():
            if name.startswith(own):
                return f"{prefix}{name.removeprefix(own)}"
        return None


def _with_head(prefix: str) -> Spelling:
    return Spelling({prefix: "model.", **{head: head for head in _HEADS}})


_SPELLINGS = (
    Spelling({"language_model.model.": "model.", **{f"language_model.{head}": head for head in _HEADS}}),
    _with_head("model.language_model."),
    _with_head("model.text_model."),
    _with_head("language_model."),
)
_FLAT = _with_head("model.")
"""Qwen2-VL and 2.5: the language model has the names that it has alone, the tower is beside it."""
_BESIDE = re.compile(r"(model\.)?(vis|audio|image|speech|multi_modal|mm_|embed_vision|embed_audio|connector|mtp\b)")
"""How names begin of what is beside a language model."""

TOWERS: Mapping[str, tuple[str, ...]] = {
    "vision": ("vision_tower.", "visual.", "vision_model.", "vision_encoder."),
    "audio": ("audio_tower.", "audio_model.", "audio_encoder."),
}
"""What towers are called, also behind `model.`; by the part of config.json that describes them, without `_config`."""

TEXT_TYPES: Mapping[str, str] = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""The model_type of a language model alone, where it has none of its own within the whole."""
TEXT_SETTINGS: Mapping[str, Mapping[str, Any]] = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
"""What a language model does within the whole without a setting for it, and alone by one."""
CLASSES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""transformers' classes of the usual language models, so that its tables, which take seconds, need not be read."""
CROSS_ATTENTION = ("mllama", "mllama_text_model")
"""Whose language model attends to images in layers of their own, and is not one without them."""
OF_IMAGES = re.compile(r"^(image|video|audio|vision|boi|eoi|boa|eoa)_")
"""Settings of config.json that say where in a text images and sounds are."""

MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""What config.json calls the number of layers that predict further tokens."""


def is_whole(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes a model of several parts."""
    return text_key(config) is not None or any(isinstance(config.get(f"{tower}_config"), dict) for tower in TOWERS)


def text_key(config: Mapping[str, Any]) -> str | None:
    """Where config.json describes the language model, None if that is config.json itself."""
    return next((key for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)


def spelling_of(names: Iterable[str]) -> Spelling | None:
    """How the language model's names are spelled; None where none are known."""
    known = list(names)
    for spelling in _SPELLINGS:
        prefix = next(iter(spelling.prefixes))
        if any(name.startswith(prefix) for name in known):
            return spelling
    return _FLAT if any(name.startswith("model.layers.") for name in known) else None


def tower_prefix(names: Iterable[str], part: str) -> str | None:
    """What the names of a tower begin with."""
    known = list(names)
    prefixes = [f"{before}{tower}" for tower in TOWERS[part] for before in ("", "model.")]
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in known)), None)


def is_mtp(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a tensor is of the layers that predict further tokens: behind the last that counts, or called so."""
    text = config[key] if (key := text_key(config)) else config
    count = text.get("num_hidden_layers")

    def found(name: str) -> bool:
        if re.match(r"(?:model\.|language_model\.)*mtp\.", name):
            return True
        matched = re.match(r"(?:model\.|language_model\.)*layers\.(\d{1,6})\.", name)
        return matched is not None and isinstance(count, int) and int(matched[1]) >= count

    return found
