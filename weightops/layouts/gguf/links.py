"""Which tensors of transformers are which of GGUF: names by the gguf package's own maps, with what is done to values.

Source: gguf (tensor_mapping.py), llama.cpp's convert_hf_to_gguf (modify_tensors of its models).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from weightops.errors import CorruptInput, IncompatibleInputs, UsageError
from weightops.io.escape import escape
from weightops.layouts.gguf.families import Family
from weightops.layouts.gguf.transforms import (
    SAME,
    GateAndUp,
    GateAndUpBias,
    KeysAndValues,
    Mxfp4,
    Rotary,
    Shifted,
    Stacked,
    Transform,
    Transposed,
)
from weightops.lazy import LazyTensor

if TYPE_CHECKING:
    from gguf import TensorNameMap

_FOLLOWS = re.compile(r".*(\.rotary_emb\.inv_freq|\.attention\.masked_bias|\.attention\.bias)")
"""Buffers that any reader computes anew."""
_TIED = re.compile(r"(model\.)?lm_head\.weight")
_SUFFIXES = (".weight", ".bias")
_GPT_OSS = re.compile(r"(gate_up_proj|down_proj|sinks)(_bias|_blocks|_scales)?$")


@dataclass(frozen=True)
class Link:
    """Tensors of transformers (`saved`) that are, by a transform, tensors of GGUF (`packed`)."""

    saved: tuple[str, ...]
    packed: tuple[str, ...]
    transform: Transform = SAME

    def out(self, tensors: Sequence[LazyTensor], where: str) -> list[LazyTensor]:
        """Those of GGUF; raises `CorruptInput` for shapes that make none."""
        return self._transformed(self.transform.out, tensors, self.packed, where)

    def back(self, tensors: Sequence[LazyTensor], where: str) -> list[LazyTensor]:
        """Those of transformers; raises likewise."""
        return self._transformed(self.transform.back, tensors, self.saved, where)

    def _transformed(
        self,
        transform: Callable[[Sequence[LazyTensor]], list[LazyTensor]],
        tensors: Sequence[LazyTensor],
        names: Sequence[str],
        where: str,
    ) -> list[LazyTensor]:
        try:
            made = transform(tensors)
        except (ValueError, ArithmeticError, IndexError, IncompatibleInputs) as error:
            raise CorruptInput(f"{where}: {escape(names[0])} cannot be made of {tensors[0].spec}") from error
        if len(made) != len(names):
            raise CorruptInput(
                f"{where}: {tensors[0].spec} makes {len(made)} tensors, {escape(names[0])} is of {len(names)}"
            )
        return made


@dataclass(frozen=True)
class Links:
    """All of a model, in the order in which GGUF files have them; and the reason for each name that has none."""

    links: tuple[Link, ...]
    dropped: Mapping[str, str]


def find_links(family: Family, config: Mapping[str, Any], names: Iterable[str], where: str) -> Links:
    """The links of tensors that transformers calls `names`, in their order.

    `config` has the fields of config.json. Raises `UsageError` for a name that has no place in the family, and
    `CorruptInput` for experts that are not all there.
    """
    found, dropped, waiting = list[Link](), dict[str, str](), dict[tuple[int, str], dict[int, str]]()
    for name in names:
        reason = _why_dropped(name, family, config)
        apart = re.fullmatch(family.experts.apart, name) if family.experts else None
        if reason is not None:
            dropped[name] = reason
        elif apart is not None and family.experts is not None:
            layer = int(apart[1])
            waiting.setdefault((layer, apart[3]), {})[int(apart[2])] = name
            count = _experts(config)
            keys = [(layer, part) for part in family.experts.parts]
            if all(len(waiting.get(key, ())) == count for key in keys):  # written when the last of a layer is there
                found += _stacks(family, config, layer, [waiting.pop(key) for key in keys])
        else:
            found += _links(name, family, config, where)
    if waiting and family.experts is not None:
        count, layer = _experts(config), next(iter(waiting))[0]
        there = {part: len(waiting.get((layer, part), ())) for part in family.experts.parts}
        part = next((part for part, number in there.items() if number != count), family.experts.parts[0])
        raise CorruptInput(
            f"{where}: layer {layer} has {there[part]} experts with a {part}, expected {count}",
            hint="is a file of it missing? llama.cpp has all experts of a layer in one tensor",
        )
    found.sort(key=lambda link: not isinstance(link.transform, Mxfp4))  # which the converter repacks first
    return Links(tuple(found), dropped)


def _why_dropped(name: str, family: Family, config: Mapping[str, Any]) -> str | None:
    if _FOLLOWS.fullmatch(name):
        return "follows from the parameters, and is computed by whoever loads the model"
    if _TIED.fullmatch(name) and config.get("tie_word_embeddings"):
        return "tied to the embedding, which holds the same"
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    if family.arch == "deepseek2" and layer is not None and int(layer[1]) >= config["num_hidden_layers"]:
        return "predicts tokens beyond the next, which llama.cpp does not do with DeepSeek"
    return None


def _experts(config: Mapping[str, Any]) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((config[name] for name in names if type(config.get(name)) is int), 0)


def _stacks(family: Family, config: Mapping[str, Any], layer: int, groups: list[dict[int, str]]) -> Iterator[Link]:
    assert family.experts is not None
    for part, group in zip(family.experts.parts, groups, strict=True):
        together = family.experts.together.format(layer=layer, part=part)
        saved = tuple(group[i] for i in sorted(group))
        yield Link(saved, (_mapped(together, family, config, saved[0]),), Stacked())


def _links(name: str, family: Family, config: Mapping[str, Any], where: str) -> Iterator[Link]:
    """The link of one tensor of transformers."""

    def mapped(other: str) -> str:
        return _mapped(other, family, config, f"{where}: {escape(name)}")

    if name.endswith("e_score_correction_bias"):
        yield Link((name,), (mapped(name.replace("e_score_correction_bias", "e_score_correction.bias")),))
    elif name.endswith("kv_b_proj.weight") and family.arch == "deepseek2":
        parts = tuple(mapped(name.replace("kv_b_proj", f"{part}_b_proj")) for part in "kv")
        heads = config.get("@heads_kv", config["num_key_value_heads"])
        yield Link((name,), parts, KeysAndValues(heads, config["qk_nope_head_dim"]))
    elif family.arch == "gpt-oss" and (part := _GPT_OSS.search(name)):
        stem, kind = name[: part.start()], "bias" if part[2] == "_bias" else "weight"
        if part[1] == "sinks":
            yield Link((name,), (mapped(f"{name}.weight"),))
            return
        sides = ("down",) if part[1] == "down_proj" else ("gate", "up")
        targets = tuple(mapped(f"{stem}{side}_proj.{kind}") for side in sides)
        if part[2] == "_scales":
            yield Link((f"{stem}{part[1]}_blocks", name), targets, Mxfp4(len(sides)))
        elif part[2] != "_blocks":  # which go with their scales
            plain: Transform = Transposed() if sides == ("down",) else GateAndUp()
            biases: Transform = SAME if sides == ("down",) else GateAndUpBias()
            yield Link((name,), targets, biases if part[2] else plain)
    else:
        yield Link((name,), (mapped(name),), _transform(name, family, config))


def _transform(name: str, family: Family, config: Mapping[str, Any]) -> Transform:
    module = name.rpartition(".")[0].rpartition(".")[2]
    if family.rotary and module in ("q_proj", "k_proj"):
        return Rotary(config["num_attention_heads" if module == "q_proj" else "num_key_value_heads"])
    if family.norm_shift and name.endswith("norm.weight"):
        return Shifted(family.norm_shift)
    return SAME


def _mapped(name: str, family: Family, config: Mapping[str, Any], shown: str) -> str:
    """gguf's name for a tensor."""
    found = _names(family.arch, config["num_hidden_layers"]).get_name(name, try_suffixes=_SUFFIXES)
    if found is None:
        raise UsageError(
            f"{shown} is no tensor of a {family.model_type} model that llama.cpp knows",
            hint="vision, speech and other parts beside the language model are not converted",
        )
    return found


@lru_cache(maxsize=4)
def _names(arch: str, layers: int) -> TensorNameMap:
    """gguf's map, of which making one takes longer than using it."""
    import gguf

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(number, layers)
