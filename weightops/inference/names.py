"""Which tensor of a checkpoint fills which parameter of transformers' model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs
from weightops.inference.skeleton import is_persistent
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.arrange import concat
from weightops.ops.elementwise import Reinterpret

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_LOADED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Tensors that old checkpoints hold and transformers computes for itself."""
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<name>\w+)\.weight")
_JOINED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Of a mixture of experts transformers 5 keeps one parameter, where files have these of each expert."""
_SHOWN = 3


@dataclass(frozen=True)
class Part:
    """A parameter or persistent buffer: its names in the module (several if it is tied) and its tensor."""

    names: tuple[str, ...]
    source: str
    tensor: LazyTensor
    dtype: torch.dtype
    is_buffer: bool

    @property
    def nbytes(self) -> int:
        """Bytes in memory, in the dtype that the model computes in."""
        return self.tensor.spec.numel * self.dtype.itemsize


def match(module: PreTrainedModel, checkpoint: Checkpoint, shown: str) -> list[Part]:
    """What each parameter and persistent buffer is filled from; refuses names and shapes that do not fit."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    buffers = {name: buffer for name, buffer in module.named_buffers() if is_persistent(module, name)}
    found = _Found(module, checkpoint, {name for names in groups.values() for name in names} | set(buffers))
    if not all(any(name in found for name in names) for names in groups.values()):
        found.rename(module)
        found.join_experts(groups.values())
    parts: list[Part] = []
    missing: list[str] = []
    for names in groups.values():
        first = next((name for name in names if name in found), None)
        if first is None:
            missing.append(names[0])
            continue
        # Tied by config.json, yet stored as several that differ: as in transformers, what is stored counts.
        by_tensor: dict[LazyTensor, list[str]] = {}
        for name in names:
            by_tensor.setdefault(found.tensor(name if name in found else first), []).append(name)
        dtype = module.get_parameter(first).dtype
        for tensor, of in by_tensor.items():
            parts.append(Part(tuple(of), found.source(of[0] if of[0] in found else first), tensor, dtype, False))
    for name, buffer in buffers.items():
        if name in found:
            parts.append(Part((name,), found.source(name), found.tensor(name), buffer.dtype, True))
        elif buffer.device.type == "meta":
            missing.append(name)
    _refuse_missing(missing, module, shown)
    _refuse_unexpected(found.left, module, shown)
    for part in parts:
        like = module.get_buffer(part.names[0]) if part.is_buffer else module.get_parameter(part.names[0])
        if part.tensor.spec.shape != tuple(like.shape):
            raise IncompatibleInputs(
                f"{shown}: {escape(part.source)} has the shape {list(part.tensor.spec.shape)}, "
                f"expected {list(like.shape)} by config.json",
                hint="config.json and weights are of different models",
            )
    return parts


class _Found:
    """Tensors by the names that the module has for them."""

    def __init__(self, module: PreTrainedModel, checkpoint: Checkpoint, wanted: set[str]) -> None:
        self._checkpoint, self._wanted = checkpoint, wanted
        self._prefix = f"{module.base_model_prefix}."
        self._tensors: dict[str, tuple[str, LazyTensor]] = {}
        self._renamed: dict[str, str] = {}
        self.left = set(checkpoint)
        """Names in the checkpoint that nothing has asked for."""
        for name in checkpoint:
            self._take(name, name)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> LazyTensor:
        return self._tensors[name][1]

    def source(self, name: str) -> str:
        """The name in the checkpoint; of experts that were joined, that of the first."""
        return self._tensors[name][0]

    def _take(self, source: str, name: str) -> None:
        for known in (name, f"{self._prefix}{name}"):
            if known in self._wanted and known not in self._tensors:
                self._tensors[known] = (source, self._checkpoint[source])
                self.left.discard(source)
                return

    def rename(self, module: PreTrainedModel) -> None:
        """Look once more for what is left, under the names that transformers gives to those of older files."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renamings = [each for each in get_model_conversion_mapping(module) if isinstance(each, WeightRenaming)]
        for source in sorted(self.left):
            name = source
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            self._renamed[name] = source
            self._take(source, name)

    def join_experts(self, groups: Iterable[list[str]]) -> None:
        """Make one tensor of those of many experts, for the parameters that are wanted so."""
        experts: dict[str, dict[int, dict[str, str]]] = {}
        for name, source in self._renamed.items():
            matched = _EXPERT.fullmatch(name)
            if matched:
                numbered = experts.setdefault(matched["experts"], {})
                numbered.setdefault(int(matched["number"]), {})[matched["name"]] = source
        for target in (name for names in groups for name in names if name not in self._tensors):
            owner, _, leaf = target.rpartition(".")
            numbered = experts.get(owner) or experts.get(owner.removeprefix(self._prefix)) or {}
            for names in _JOINED.get(leaf, ()):
                if numbered and all(set(names) <= set(numbered.get(i, ())) for i in range(len(numbered))):
                    sources = [numbered[i][name] for i in range(len(numbered)) for name in names]
                    self._tensors[target] = (sources[0], self._stacked(sources, len(numbered)))
                    self.left -= set(sources)

    def _stacked(self, sources: list[str], count: int) -> LazyTensor:
        """`[experts, rows, columns]` from matrices that stand in this order."""
        joined = concat([self._checkpoint[source] for source in sources], 0)
        rows, *rest = joined.spec.shape
        return LazyTensor.make(Reinterpret(joined.spec.dtype, (count, rows // count, *rest)), joined)


def _refuse_missing(missing: list[str], module: PreTrainedModel, shown: str) -> None:
    if missing:
        is_tied = module.config.get_text_config(decoder=True).tie_word_embeddings
        hint = None
        if missing == ["lm_head.weight"] and not is_tied:
            hint = "if the head is the embedding, set tie_word_embeddings to true in config.json"
        raise IncompatibleInputs(f"{shown}: lacks {_listed(missing)}, which {type(module).__name__} has", hint=hint)


def _refuse_unexpected(left: set[str], module: PreTrainedModel, shown: str) -> None:
    known = [*_NOT_LOADED, *(module._keys_to_ignore_on_load_unexpected or ())]
    strange = sorted(name for name in left if not any(re.search(pattern, name) for pattern in known))
    if strange:
        raise IncompatibleInputs(
            f"{shown}: holds {_listed(strange)}, which {type(module).__name__} by its config.json does not have",
            hint="`weightops shard --drop` leaves tensors out, `--drop-prefix` and `--rename` give others names",
        )


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(map(escape, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
