"""Which tensor of a checkpoint fills which parameter of transformers' model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.errors import IncompatibleInputs
from weightops.inference.linears import TransposedLinear, expert_weights
from weightops.inference.weights import read_all
from weightops.io.escape import escape
from weightops.layouts.loaded_names import renaming
from weightops.layouts.skeleton import is_persistent
from weightops.lazy import LazyTensor
from weightops.ops.arrange import cut
from weightops.ops.elementwise import Reinterpret
from weightops.ops.gptq.tensors import Dequantize
from weightops.ops.transpose import transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_LOADED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Tensors that old checkpoints hold and transformers computes for itself."""
_EXPERT = re.compile(r"(?<=\.experts\.)(?P<number>\d+)\.(?P<layer>w1|w2|w3|fc1|fc2|fc3)(?=\.)")
_LAYERS = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}
"""What files call the layers of an expert by number, under the names that transformers has for them."""
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


def match(
    module: PreTrainedModel, checkpoint: Checkpoint, shown: str, control: Control
) -> tuple[list[Part], tuple[str, ...]]:
    """What each parameter and persistent buffer is filled from, and warnings; refuses names and shapes that do not fit.

    Biases of zeros that the model does not have are left out: AutoGPTQ gave one to every layer that it quantised.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    buffers = {name: buffer for name, buffer in module.named_buffers() if is_persistent(module, name)}
    found = _Found(module, checkpoint, {name for names in groups.values() for name in names} | set(buffers))
    if not all(any(name in found for name in names) for names in groups.values()):
        found.rename(module)
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
    weights = {part.source for part in parts}
    biases = {n: checkpoint[n] for n in sorted(found.left) if f"{n.removesuffix('bias')}weight" in weights}
    zeros = _of_zeros(biases, control)
    _refuse_unexpected(found.left - set(zeros), set(biases), module, shown)
    warnings = (f"{shown}: {len(zeros)} biases of zeros are left out: {_listed(zeros)}",) if zeros else ()
    return [replace(part, tensor=_as_in_module(module, part, shown)) for part in parts], warnings


class _Found:
    """Tensors by the names that the module has for them."""

    def __init__(self, module: PreTrainedModel, checkpoint: Checkpoint, wanted: set[str]) -> None:
        self._checkpoint, self._wanted = checkpoint, wanted
        self._prefix = f"{module.base_model_prefix}."
        self._tensors: dict[str, tuple[str, LazyTensor]] = {}
        self.left = set(checkpoint)
        """Names in the checkpoint that nothing has asked for."""
        for name in checkpoint:
            self._take(name, name)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> LazyTensor:
        return self._tensors[name][1]

    def source(self, name: str) -> str:
        """The name in the checkpoint."""
        return self._tensors[name][0]

    def _take(self, source: str, name: str) -> None:
        for known in (name, f"{self._prefix}{name}"):
            if known in self._wanted and known not in self._tensors:
                self._tensors[known] = (source, self._checkpoint[source])
                self.left.discard(source)
                return

    def rename(self, module: PreTrainedModel) -> None:
        """Look once more for what is left, under the names that transformers gives to those of older files."""
        renamed = renaming(module)
        for source in sorted(self.left):
            self._take(source, _EXPERT.sub(_named_layer, renamed(source)))


def _named_layer(found: re.Match[str]) -> str:
    return f"{found['number']}.{_LAYERS[found['layer'][-1]]}"


def split_experts(module: PreTrainedModel, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a tensor for each matrix of an expert, where it holds those of all experts in one.

    Raises `IncompatibleInputs` for such a tensor of another shape than config.json says.
    """
    wanted = expert_weights(module)
    if not wanted:
        return checkpoint
    renamed, prefix = renaming(module), f"{module.base_model_prefix}."
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for source, tensor in checkpoint.items():
        known = renamed(source) if len(tensor.spec.shape) == 3 else source
        name = known if known in wanted else f"{prefix}{known}"
        parts = {source: tensor}
        if name in wanted:
            shape, weights = wanted[name]
            _refuse_shape(escape(checkpoint.name), source, tensor, shape)
            # Names as in the file, if it has the model's own names.
            left = name.removesuffix(source) if name.endswith(source) else ""
            flat = LazyTensor.make(Reinterpret(tensor.spec.dtype, (shape[0] * shape[1], shape[2])), tensor)
            rows = shape[0] * shape[1] // len(weights)
            parts = {w.removeprefix(left): cut(flat, 0, i * rows, (i + 1) * rows) for i, w in enumerate(weights)}
        tensors |= parts
        shards |= dict.fromkeys(parts, checkpoint.shards[source]) if source in checkpoint.shards else {}
    if tensors.keys() == checkpoint.keys():
        return checkpoint
    digests = {name: digest for name, digest in checkpoint.digests.items() if name in tensors}
    return replace(checkpoint, tensors=tensors, shards=shards, total_size=None, content_id=None, digests=digests)


def _as_in_module(module: PreTrainedModel, part: Part, shown: str) -> LazyTensor:
    """A part's tensor in the form that the module has it in; refuses other shapes."""
    name = part.names[0]
    like = module.get_buffer(name) if part.is_buffer else module.get_parameter(name)
    # Weights that are computed from integers come as [out, in], however plain checkpoints keep them.
    is_turned = (
        isinstance(module.get_submodule(name.rpartition(".")[0]), TransposedLinear)
        and like.ndim == 2
        and not isinstance(part.tensor.op, Dequantize)
    )
    _refuse_shape(shown, part.source, part.tensor, tuple(like.shape[::-1] if is_turned else like.shape))
    return transposed(part.tensor) if is_turned else part.tensor


def _refuse_shape(shown: str, source: str, tensor: LazyTensor, expected: tuple[int, ...]) -> None:
    found = tensor.spec.shape
    if found != expected:
        raise IncompatibleInputs(
            f"{shown}: {escape(source)} has the shape {list(found)}, expected {list(expected)} by config.json",
            hint="config.json and weights are of different models",
        )


def _refuse_missing(missing: list[str], module: PreTrainedModel, shown: str) -> None:
    if missing:
        is_tied = module.config.get_text_config(decoder=True).tie_word_embeddings
        hint = None
        if missing == ["lm_head.weight"] and not is_tied:
            hint = "if the head is the embedding, set tie_word_embeddings to true in config.json"
        raise IncompatibleInputs(f"{shown}: lacks {_listed(missing)}, which {type(module).__name__} has", hint=hint)


def _of_zeros(tensors: Mapping[str, LazyTensor], control: Control) -> list[str]:
    values = read_all([(tensor, torch.float32) for tensor in tensors.values()], "cpu", control)
    return [name for name, value in zip(tensors, values, strict=True) if not bool(value.any())]


def _refuse_unexpected(left: set[str], biases: set[str], module: PreTrainedModel, shown: str) -> None:
    known = [*_NOT_LOADED, *(module._keys_to_ignore_on_load_unexpected or ())]
    strange = sorted(name for name in left if not any(re.search(pattern, name) for pattern in known))
    if strange:
        hint = "`weightops shard --drop` leaves tensors out, `--drop-prefix` and `--rename` give others names"
        if biases.issuperset(strange):
            hint = "they are not zero; config.json has a setting for biases (attention_bias and mlp_bias of LLaMA)"
        raise IncompatibleInputs(
            f"{shown}: holds {_listed(strange)}, which {type(module).__name__} by its config.json does not have",
            hint=hint,
        )


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(map(escape, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
