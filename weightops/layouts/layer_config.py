"""config.json of a model whose layers are fewer, more or in another order.

Layers differ in more than their tensors: attention may slide in every second one, experts may begin at the fourth.
config.json says so in lists with an entry for each layer, lists of numbers, counts from the beginning and periods.
What the new order of layers makes of them is written where a model can have it, and refused where it cannot.
Sources: the configuration classes of transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.modules import last_part
from weightops.io.escape import escape
from weightops.io.names import listed

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
"""Where config.json of a model for more than text describes its language model."""
OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech|vit\b|mtp\b")
"""In the names of what is beside the language model."""
MAX_LAYERS = 100_000
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_MTP = ("num_nextn_predict_layers", "num_mtp_layers")
"""Layers that predict further tokens: they follow the others, and are numbered on from them."""
_LISTS = {
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_configs",
    "no_rope_layers",
    "layer_rope_theta",
    "indexer_types",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "moe_layer_freq",
    "activation_sparsity_pattern",
    "intermediate_size",
    "num_query_heads",
    "num_kv_heads",
    "num_key_value_heads",
    "ffn_multipliers",
    "attention_layers",
    "hybrid_override_pattern",
}
"""An entry (of a string: a character) for each layer."""
_NUMBERS = {"mlp_only_layers", "cross_attention_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs"}
_NUMBERS |= {"hybrid_layer_ids", "global_attn_idx"}
"""The numbers of certain layers."""
_FIRST = {"first_k_dense_replace": "mlp_layer_types", "num_dense_layers": "mlp_layer_types"}
_FIRST |= {"moe_layer_start_index": "", "max_window_layers": "layer_types"}
"""How many layers from the beginning are of another kind; and the list that says so in its stead."""
_PERIODS = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "layer_group_size": "layer_types",
    "attn_layer_period": "",
    "expert_layer_period": "",
    "decoder_sparse_step": "",
    "moe_layer_freq": "mlp_layer_types",
    "moe_layer_interval": "",
    "interleave_moe_layer_step": "moe_layers",
    "no_rope_layer_interval": "no_rope_layers",
}
"""One layer in so many is of another kind; and the list that says so in its stead."""
_OWN_PERIODS: Mapping[str, Mapping[str, int]] = {
    "afmoe": {"global_attn_every_n_layers": 4},
    "bailing_hybrid": {"layer_group_size": 6},
    "cohere2": {"sliding_window_pattern": 4},
    "exaone4": {"sliding_window_pattern": 4},
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window_pattern": 6},
    "gemma4_text": {"sliding_window_pattern": 6},
    "gpt_oss": {"sliding_window_pattern": 2},
    "jamba": {"attn_layer_period": 8, "expert_layer_period": 2},
    "llama4_text": {"no_rope_layer_interval": 4},
    "minimax": {"full_attention_interval": 2},
    "modernbert": {"global_attn_every_n_layers": 3},
    "olmo3": {"sliding_window_pattern": 4},
    "olmo_hybrid": {"full_attention_interval": 4},
    "qwen3_5_moe_text": {"full_attention_interval": 4},
    "qwen3_5_text": {"full_attention_interval": 4},
    "qwen3_next": {"full_attention_interval": 4},
    "smollm3": {"no_rope_layer_interval": 4},
    "vaultgemma": {"sliding_window_pattern": 2},
}
"""The periods that a model has although its config.json says nothing of them, by `model_type`."""
_ALIKE = """
    apertus arcee baichuan bamba bert biogpt bitnet bloom camembert chatglm codegen cohere ctrl dbrx deberta
    deberta-v2 deepseek_v2 distilbert dots1 electra ernie4_5 ernie4_5_moe falcon falcon_h1 falcon_mamba flex_olmo
    gemma glm glm4 gpt2 gpt_bigcode gpt_neox gptj granite granitemoe granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe internlm2 internlm3 jetmoe llama mamba mamba2 minimax_m2 ministral3 mistral mixtral mpt nanochat
    nemotron olmo olmo2 olmoe openai-gpt opt persimmon phi phi3 phimoe qwen qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl
    qwen2_vl_text qwen3 qwen3_moe qwen3_vl_moe_text qwen3_vl_text roberta seed_oss solar_open stablelm starcoder2
    xglm xlm-roberta
"""
"""Models whose layers are all alike, but for what config.json says in so many words."""
_SHARED = "num_kv_shared_layers"
"""How many layers, the last, take keys and values of the last layer of their type that has its own."""
_LAST_WITH_EXPERTS = "moe_layer_end_index"
_TIED_TO_NUMBERS = ("scale_attn_by_inverse_layer_idx",)
_NUMBERED = ("beam", "diffllama", "inkling2", "inkling2_text", "minimax", "zaya")
"""Models whose layers compute with their own numbers, whatever config.json says; minimax with their count too."""
_UNADJUSTED = re.compile(r"layer|block|pattern|interval|period|every_n|_freq|indices|idxs?\b")
_UNRELATED = re.compile(
    r"norm|drop|eps|init|scale|block_size|per_layer_input|type_vocab|mtp|feature|token_i|adapter|vision|multiple_of|^arch|^keys_to"
)


def _levels(config: Mapping[str, Any]) -> list[str]:
    """The keys of the parts of config.json that count the layers; of config.json itself the key is empty."""
    parts = ["", *(key for key in TEXT_CONFIGS if isinstance(config.get(key), dict))]
    return [key for key in parts if _counts(config[key] if key else config)]


def _counts(document: Mapping[str, Any]) -> list[Any]:
    found = [document[key] for key in _COUNTS if document.get(key) is not None]
    kinds = document.get("layers_block_type")  # Nemotron-H says how many there are by this alone
    return found or ([len(kinds)] if isinstance(kinds, list) and kinds else [])


def count_layers(config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """How many layers config.json counts, and how many for further tokens it says to follow them."""
    documents = [config[key] if key else config for key in _levels(config)]
    counts = [count for document in documents for count in _counts(document)]
    if not counts or any(type(n) is not int or n != counts[0] or not 0 < n <= MAX_LAYERS for n in counts):
        found = f"says {listed(map(str, counts))}" if counts else f"has none of {', '.join(_COUNTS)}"
        raise UsageError(
            f"{where}: config.json does not say how many layers there are: it {found}",
            hint="add num_hidden_layers to config.json, or correct it",
        )
    following = [document[key] for document in documents for key in _MTP if type(document.get(key)) is int]
    return counts[0], max(0, *following, 0)


def edit_config(
    config: Mapping[str, Any], order: Sequence[int], n_mtp: int, where: str
) -> tuple[dict[str, Any], list[str]]:
    """config.json for the layers of the old numbers `order`, the last `n_mtp` of them for further tokens.

    With it come warnings that name what may depend on the layers and is as it was. Raises `UsageError` for an order
    that it cannot describe, `IncompatibleInputs` for a list with too few or too many entries.
    """
    result, notes = dict(config), []
    for level in _levels(config):
        document = config[level] if level else config
        edited = _Editor(document, tuple(order), n_mtp, f"{where}: {level}" if level else where)
        if level:
            result[level] = edited.result()
        else:
            result |= edited.result()
        notes += edited.notes()
    return result, notes


def layer_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of single layers in lists, by the key of its part and its own."""
    known = {*_LISTS, *_NUMBERS, "per_layer_config", "attention_types"}
    found = {}
    for level in _levels(config):
        for key, value in (config[level] if level else config).items():
            if key in known and isinstance(value, list | str | dict) and value:
                found[f"{level}.{key}" if level else key] = value
    return found


@dataclass(frozen=True)
class _Editor:
    """One part of config.json, and the old numbers of the layers that are to be in it."""

    document: Mapping[str, Any]
    order: tuple[int, ...]
    n_mtp: int
    where: str

    @property
    def _kept(self) -> tuple[int, ...]:
        return self.order[: len(self.order) - self.n_mtp]

    @property
    def _old(self) -> int:
        return int(_counts(self.document)[0])

    @property
    def _is_changed(self) -> bool:
        return self._kept != tuple(range(self._old))

    def result(self) -> dict[str, Any]:
        """The part with what is known of layers adjusted."""
        if self._is_changed:
            self._check_periods()
            kind = self.document.get("model_type")
            is_moved = any(new != old for new, old in enumerate(self._kept))
            if kind in _NUMBERED and (is_moved or kind == "minimax"):
                raise UsageError(
                    f"{self.where}: layers of a {kind} compute with their own numbers, and would get others"
                )
            for key in _TIED_TO_NUMBERS:
                if self.document.get(key):
                    raise UsageError(f"{self.where}: {key} is set, which ties layers to their numbers")
        return {key: self._value(key, value) for key, value in self.document.items()}

    def _value(self, key: str, value: Any) -> Any:
        if key in _COUNTS and value is not None:
            return len(self._kept)
        if key in _LISTS and isinstance(value, list | str) and value:
            return self._selected(key, value)
        if key in _NUMBERS and isinstance(value, list):
            odd = [number for number in value if type(number) is not int or not 0 <= number < self._old]
            if odd:
                raise IncompatibleInputs(
                    f"{self.where}: {key} has {odd[0]!r}, which is no number of {self._old} layers"
                )
            return [new for new, old in enumerate(self._kept) if old in value]
        if key in _FIRST and type(value) is int:
            return self._first(key, value)
        if key == _SHARED and type(value) is int and value:
            return self._shared(value)
        if key == _LAST_WITH_EXPERTS and type(value) is int and value != -1:
            return self._last(value)
        if key == "per_layer_config" and isinstance(value, dict):
            return {str(new): value[str(old)] for new, old in enumerate(self._kept) if str(old) in value}
        if key == "attention_types" and isinstance(value, list):
            return self._attention_types(value)
        return value

    def _selected(self, key: str, value: Sequence[Any]) -> Any:
        order = {self._old: self._kept, self._old + self.n_mtp: self.order}.get(len(value))
        if order is None:
            raise IncompatibleInputs(f"{self.where}: {key} has {len(value)} entries for {self._old} layers")
        found = [value[old] for old in order]
        return "".join(found) if isinstance(value, str) else found

    def _first(self, key: str, value: int) -> int:
        """How many of the layers from the beginning on were among the first `value`."""
        among = [old < value for old in self._kept]
        if all(among) and value >= len(among):
            return value
        has_effect = not self.document.get(_FIRST[key]) and (key != "max_window_layers" or self._slides)
        if sorted(among, reverse=True) != among and has_effect:
            raise self._refused(key, f"the first {value} layers are of another kind, and would not be first", "")
        return sum(among)

    def _last(self, value: int) -> int:
        """The last layer that may have experts: the rest from there on has none."""
        among = [old <= value for old in self._kept]
        if sorted(among, reverse=True) != among:
            raise self._refused(
                _LAST_WITH_EXPERTS, f"layers after {value} are of another kind, and would not be last", ""
            )
        return sum(among) - 1

    def _shared(self, value: int) -> int:
        """How many layers take keys and values of another; refused unless it is the one that they took them of."""
        first, kinds = self._old - value, self.document.get("layer_types")
        if not self._is_changed:
            return value
        if not isinstance(kinds, list) or len(kinds) != self._old:
            raise self._refused(_SHARED, "which layers share is not known without layer_types", "layer_types")
        shares = [old >= first for old in self._kept]
        if sorted(shares) != shares:
            raise self._refused(_SHARED, f"layers from {first} on share keys and values, and would not be last", "")
        own = [old for old in self._kept if old < first]
        for kind in dict.fromkeys(kinds[old] for old in self._kept if old >= first):
            giver = max((old for old in range(first) if kinds[old] == kind), default=None)
            now = next((old for old in reversed(own) if kinds[old] == kind), None)
            if giver != now:
                reason = f"layer {giver} gives its keys and values to the {kind!r} layers from {first} on, and would "
                raise self._refused(_SHARED, reason + ("be left out" if giver not in own else "not be the last"), "")
        return sum(shares)

    @property
    def _slides(self) -> bool:
        return self.document.get("use_sliding_window") is True

    def _attention_types(self, value: list[Any]) -> list[Any]:
        """GPT-Neo's `[[["global", "local"], 12]]`."""
        try:
            kinds = [kind for pattern, times in value for kind in list(pattern) * min(times, MAX_LAYERS)]
        except (TypeError, ValueError):
            raise IncompatibleInputs(f"{self.where}: attention_types is no list of patterns and counts") from None
        return [[self._selected("attention_types", kinds), 1]]

    def _check_periods(self) -> None:
        """Refuse an order that brings layers out of step with the periods that make them differ."""
        own = _OWN_PERIODS.get(str(self.document.get("model_type")), {})
        for key, instead in _PERIODS.items():
            value = self.document.get(key, own.get(key))
            period = len(value) if isinstance(value, str) else value
            if type(period) is not int or period < 2 or self.document.get(instead):
                continue
            odd = next((new for new, old in enumerate(self._kept) if (new - old) % period), None)
            if odd is not None:
                reason = f"layers differ with a period of {period}, and layer {self._kept[odd]} would be {odd}"
                raise self._refused(key, reason, instead)

    def _refused(self, key: str, reason: str, instead: str) -> UsageError:
        other = f", or write {instead} into config.json first, as transformers does" if instead else ""
        return UsageError(f"{self.where}: {key}: {reason}", hint=f"choose layers that stay in step{other}")

    def notes(self) -> list[str]:
        """What may depend on the layers, and is as it was."""
        if not self._is_changed:
            return []
        known = {
            *_COUNTS,
            *_MTP,
            *_LISTS,
            *_NUMBERS,
            *_FIRST,
            *_PERIODS,
            *_TIED_TO_NUMBERS,
            _SHARED,
            _LAST_WITH_EXPERTS,
        }
        known |= {"attention_types", "per_layer_config", "attn_layer_offset", "expert_layer_offset"}
        doubtful = [
            key
            for key, value in self.document.items()
            if value
            and isinstance(value, int | str | list | dict)
            and not isinstance(value, bool)
            and key not in known
            and (_UNADJUSTED.search(key) or (isinstance(value, list) and len(value) == self._old > 1))
            and not _UNRELATED.search(key)
        ]
        notes = (
            [f"{self.where}: may depend on the layers, and is as it was: {listed(doubtful, 20)}"] if doubtful else []
        )
        kind = str(self.document.get("model_type"))
        told = any(key in _LISTS and isinstance(value, list) and value for key, value in self.document.items())
        told = told or "first_k_dense_replace" in self.document or "num_dense_layers" in self.document
        # Qwen2-MoE's windows slide in every second layer, those of others from the layer that max_window_layers says.
        odd_windows = self._slides and (kind == "qwen2_moe" or "max_window_layers" not in self.document)
        known_alike = kind in (*_OWN_PERIODS, *_NUMBERED) or (kind in _ALIKE.split() and not odd_windows)
        if not told and not known_alike:
            notes.append(f"{self.where}: whether layers of a {escape(kind)} differ by their number is not known here")
        return notes


def renumbered(value: Any, prefix: str, order: Sequence[int]) -> tuple[Any, bool]:
    """A setting whose lists name modules of layers, as quantisation's exceptions do, with the layers' new numbers.

    Files and loaders may call what is before `layers` differently. Also says whether there is something in it, such as
    an expression, that names layers and is as it was.
    """
    if isinstance(value, dict):
        parts = {key: renumbered(part, prefix, order) for key, part in value.items()}
        left = any(part[1] for part in parts.values()) or any(_names_layers(key, prefix) for key in value)
        return {key: part[0] for key, part in parts.items()}, left
    if not isinstance(value, list):
        return value, isinstance(value, str) and _names_layers(value, prefix)
    plain = re.compile(rf"((?:[\w-]+\.)*{re.escape(last_part(prefix))})\.(\d+)((?:\.[\w-]+)*)")
    found, left = [], False
    for part in value:
        matched = plain.fullmatch(part) if isinstance(part, str) else None
        if matched is None:
            own, is_left = renumbered(part, prefix, order)
            found.append(own)
            left = left or is_left
        elif OTHER_TOWERS.search(matched[1]):
            found.append(part)
        else:
            numbers = [new for new, old in enumerate(order) if old == int(matched[2])]
            found += [f"{matched[1]}.{number}{matched[3]}" for number in numbers]
    return found, left


def _names_layers(text: str, prefix: str) -> bool:
    return re.search(rf"\b{re.escape(last_part(prefix))}(\.|\\\.)[\d(\[\\]", text) is not None
