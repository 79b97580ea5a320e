"""Which tensor of a GGUF file gets which block type: the mixes of llama-quantize, such as Q4_K_M.

A file type has a base type, and rules by which some tensors get another: those that matter most, in the layers that do.
Source: `llama_tensor_get_type` and what it calls in llama.cpp's `src/llama-quant.cpp`, as of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from weightops.errors import IncompatibleInputs, UsageError
from weightops.ops.ggml.quantize import NEAREST
from weightops.spec import DType, TensorSpec


@dataclass(frozen=True, kw_only=True)
class MixModel:
    """What the choice hangs on besides tensors: hyperparameters by the names of GGUF's keys.

    `architecture` is `general.architecture`, `layers` is `block_count`, `heads` and `kv_heads` are those of the first
    layer, and `experts` is `expert_count`, 0 where there are none.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def sharing(self) -> int:
        """Query heads to a key head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls the model 70B, which it tells by the number of layers."""
        is_65b = self.architecture == "llama" and self.heads == self.kv_heads
        return self.layers == _LAYERS_OF_70B.get(self.architecture) and not is_65b


_LAYERS_OF_70B = {"llama": 80, "deci": 80, "qwen2": 80, "olmo": 80, "jais2": 68}


class FileType(NamedTuple):
    """A mix: its number in `general.file_type`, and the type of tensors without a rule."""

    number: int
    base: DType


FILE_TYPES: dict[str, FileType] = {
    "F32": FileType(0, DType.F32),
    "F16": FileType(1, DType.F16),
    "BF16": FileType(32, DType.BF16),
    "Q8_0": FileType(7, DType.Q8_0),
    "Q6_K": FileType(18, DType.Q6_K),
    "Q5_K_M": FileType(17, DType.Q5_K),
    "Q5_K_S": FileType(16, DType.Q5_K),
    "Q5_1": FileType(9, DType.Q5_1),
    "Q5_0": FileType(8, DType.Q5_0),
    "Q4_K_M": FileType(15, DType.Q4_K),
    "Q4_K_S": FileType(14, DType.Q4_K),
    "IQ4_NL": FileType(25, DType.IQ4_NL),
    "IQ4_XS": FileType(30, DType.IQ4_XS),
    "Q4_1": FileType(3, DType.Q4_1),
    "Q4_0": FileType(2, DType.Q4_0),
    "Q3_K_L": FileType(13, DType.Q3_K),
    "Q3_K_M": FileType(12, DType.Q3_K),
    "Q3_K_S": FileType(11, DType.Q3_K),
    "Q2_K": FileType(10, DType.Q2_K),
    "Q2_K_S": FileType(21, DType.Q2_K),
}
"""By name, largest first."""
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_NOT_WRITTEN = {
    "IQ1_S": "Q2_K_S",
    "IQ1_M": "Q2_K_S",
    "IQ2_XXS": "Q2_K_S",
    "IQ2_XS": "Q2_K_S",
    "IQ2_S": "Q2_K_S",
    "IQ2_M": "Q2_K",
    "IQ3_XXS": "Q3_K_S",
    "IQ3_XS": "Q3_K_S",
    "IQ3_S": "Q3_K_S",
    "IQ3_M": "Q3_K_M",
    "TQ1_0": "Q2_K_S",
    "TQ2_0": "Q2_K_S",
    "Q1_0": "Q2_K_S",
    "Q2_0": "Q2_K_S",
    "MXFP4_MOE": "IQ4_NL",
    "NVFP4": "IQ4_NL",
}
"""Other file types of llama-quantize, and the nearest in size of those above."""


class _Asked(NamedTuple):
    """What a rule may ask of: the place of a tensor among its kind, and the model."""

    place: int
    of: int
    model: MixModel
    has_importance: bool


_Condition = Callable[[_Asked], bool]
_Rules = tuple[tuple[_Condition, DType], ...]


def _always(asked: _Asked) -> bool:
    return True


def _shared_by_four(asked: _Asked) -> bool:
    return asked.model.sharing >= 4


def _first(count: int) -> _Condition:
    return lambda asked: asked.place < count


def _first_part(divisor: int) -> _Condition:
    return lambda asked: asked.place < asked.of // divisor


def _in_first_eighth_without_importance(asked: _Asked) -> bool:
    return not asked.has_importance and asked.place < asked.of // 8


def _in_first_eighth_with_importance(asked: _Asked) -> bool:
    return asked.has_importance and asked.place < asked.of // 8


def _more(asked: _Asked) -> bool:
    """`use_more_bits`: the first and last eighth, and every third layer between."""
    place, count = asked.place, asked.of
    return place < count // 8 or place >= 7 * count // 8 or (place - count // 8) % 3 == 2


_V, _DOWN, _OUTPUT = "attn_v", "ffn_down", "attn_output"
_Q3_K, _Q4_K, _Q5_K, _Q6_K = DType.Q3_K, DType.Q4_K, DType.Q5_K, DType.Q6_K
_NONLINEAR: dict[str, _Rules] = {
    _V: ((_shared_by_four, _Q5_K),),
    _DOWN: ((_in_first_eighth_without_importance, _Q5_K),),
}
_RULES: dict[str, dict[str, _Rules]] = {
    "Q2_K": {
        _V: ((_shared_by_four, _Q4_K), (_always, _Q3_K)),
        _DOWN: ((_always, _Q3_K),),
        _OUTPUT: ((_always, _Q3_K),),
    },
    "Q2_K_S": {_V: ((_shared_by_four, _Q4_K),), _DOWN: ((_first_part(8), _Q4_K),)},
    "Q3_K_M": {
        _V: ((_first(2), _Q5_K), (_always, _Q4_K)),
        _DOWN: ((_first_part(16), _Q5_K), (_always, _Q4_K)),
        _OUTPUT: ((_always, _Q4_K),),
    },
    "Q3_K_L": {_V: ((_always, _Q5_K),), _DOWN: ((_always, _Q5_K),), _OUTPUT: ((_always, _Q5_K),)},
    "Q4_K_S": {_V: ((_first(4), _Q5_K),), _DOWN: ((_first_part(8), _Q5_K),)},
    "Q4_K_M": {_V: ((_more, _Q6_K),), _DOWN: ((_more, _Q6_K),)},
    "Q5_K_M": {_V: ((_more, _Q6_K),), _DOWN: ((_more, _Q6_K),)},
    "IQ4_NL": _NONLINEAR,
    "IQ4_XS": _NONLINEAR,
    "Q4_0": {_DOWN: ((_in_first_eighth_with_importance, DType.Q4_1),)},
    "Q5_0": {_DOWN: ((_in_first_eighth_with_importance, DType.Q5_1),)},
}
"""By file type and kind of tensor: the first condition that holds gives the type; where none does, it is the base."""
_RULES_OF_FALCON: dict[str, dict[str, _Rules]] = {
    "Q2_K": {_OUTPUT: ()},
    "Q3_K_M": {_DOWN: ((_first_part(16), _Q5_K), (_more, _Q4_K)), _OUTPUT: ()},
    "Q3_K_L": {_DOWN: ((_always, _Q4_K),), _OUTPUT: ((_always, _Q4_K),)},
    "Q4_K_M": {_DOWN: ((_first_part(16), _Q6_K), (_more, _Q5_K))},
    "Q4_K_S": {_DOWN: ()},
}
"""Those that are others for Falcon."""
_OUTPUT_OF_EIGHT_EXPERTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
"""File types in which a model of eight experts gets Q5_K for attn_output; in others the base."""
_FALLBACKS = {
    DType.IQ4_XS: DType.IQ4_NL,
    DType.Q2_K: DType.Q4_0,
    DType.Q3_K: DType.Q4_0,
    DType.Q4_K: DType.Q5_0,
    DType.Q5_K: DType.Q5_1,
    DType.Q6_K: DType.Q8_0,
}
"""For rows that are not whole blocks of 256; F16 where they are none of 32 either."""

_KINDS = (
    ("attn_qkv.weight", _V),
    ("attn_kv_b.weight", _V),
    ("attn_v.weight", _V),
    ("attn_k.weight", "attn_k"),
    ("attn_output.weight", _OUTPUT),
    ("ffn_up", ""),
    ("ffn_gate", ""),
    ("ffn_down", _DOWN),
)
"""What a name holds, and of which kind the tensor then is: the first counts."""
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_LAST = "output.weight"
_KEPT = ("position_embd.weight", "token_types.weight")
_KEPT_WITH = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|time_mix_(first|[wv][012]|a[12]|a0|g[12]|decay_w[12]|lerp_fused)"
    r"\.weight|attn_rel_b\.weight|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd"
    r"|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
"""Small tensors, or such as take harm, by what their names hold."""
_AT_LEAST_Q8_0 = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}


def file_type(name: str) -> str:
    """The name of a file type as `FILE_TYPES` has it, in any case; raises `UsageError` for others."""
    upper = name.upper().replace("-", "_")
    found = _ALIASES.get(upper, upper)
    if found in FILE_TYPES:
        return found
    if found in _NOT_WRITTEN:
        raise UsageError(f"{found} is not written", hint=f"{_NOT_WRITTEN[found]} is the nearest that is")
    raise UsageError(f"there is no file type {name!r}", hint=f"choose one of {', '.join(FILE_TYPES)}")


def file_order(names: Iterable[str]) -> list[str]:
    """Names as llama-quantize sorts them: those outside layers first, then layer by layer, each by the alphabet."""

    def key(name: str) -> tuple[int, bytes]:
        layer = _layer(name)
        return -1 if layer is None else layer, name.encode()

    return sorted(names, key=key)


def mix(
    name: str,
    tensors: Mapping[str, TensorSpec],
    model: MixModel,
    *,
    has_importance: bool = False,
    pure: bool = False,
    overrides: Sequence[tuple[str, DType]] = (),
    output: DType | None = None,
    embedding: DType | None = None,
) -> dict[str, DType]:
    """The type that each tensor gets in a file of this type, in the order of llama-quantize's output.

    `tensors` are all of the file's, by GGUF's names; vectors, and what is not for quantising, keep their type. `pure`
    is the base type for all others. `overrides` are regular expressions that are looked for in names, and types: the
    first that is found counts, before every rule. `output` and `embedding` are types of output.weight and
    token_embd.weight; where there is no output.weight, `output` is for the embedding, as it is both.

    Raises `UsageError` for types that are not written, rows that are no whole blocks of a type that was asked for by
    name, and Q2_K_S without importance; `IncompatibleInputs` for a tensor of a layer that the model has not.
    """
    chosen = file_type(name)
    patterns = [(_compiled(pattern), dtype) for pattern, dtype in overrides]
    for dtype in (output, embedding, *(dtype for _, dtype in patterns)):
        if dtype in NEAREST:
            raise UsageError(f"{dtype.value} is not written", hint=f"{NEAREST[dtype].value} is the nearest that is")
    order = file_order(tensors)
    rules = _Chooser(chosen, model, order, has_importance, output)
    found: dict[str, DType] = {}
    for tensor in order:
        spec = tensors[tensor]
        found[tensor] = spec.dtype
        if not _is_quantised(tensor, spec):
            continue
        by_name = next((dtype for pattern, dtype in patterns if pattern.search(tensor)), None)
        own = tensor == _EMBEDDINGS[1] and by_name is not None
        if embedding is not None and tensor in _EMBEDDINGS and not own:
            found[tensor] = _fitting(tensor, spec, embedding)
        elif output is not None and tensor == _LAST:
            found[tensor] = _fitting(tensor, spec, output)
        elif not FILE_TYPES[chosen].base.is_packed:
            found[tensor] = FILE_TYPES[chosen].base
        elif by_name is not None:
            found[tensor] = _with_fallback(spec, by_name)
        else:
            found[tensor] = _with_fallback(spec, FILE_TYPES[chosen].base if pure else rules.choose(tensor, spec))
        wants = chosen == "Q2_K_S" and found[tensor] is DType.Q2_K and tensor not in (*_EMBEDDINGS, _LAST)
        if wants and not has_importance:
            raise UsageError(
                f"{tensor}: Q2_K_S needs an importance matrix",
                hint="give one, or choose Q2_K",
            )
    return found


class _Chooser:
    """The rules, and how many tensors of each kind have passed them."""

    def __init__(
        self, name: str, model: MixModel, names: Sequence[str], has_importance: bool, output: DType | None
    ) -> None:
        falcon = _RULES_OF_FALCON.get(name, {}) if model.architecture == "falcon" else {}
        self.rules = {**_RULES.get(name, {}), **falcon}
        self.name, self.model, self.has_importance, self.output = name, model, has_importance, output
        self.base = FILE_TYPES[name].base
        self.is_tied = _LAST not in names
        self.counts = {_V: sum(_kind(tensor) == _V for tensor in names), _DOWN: model.layers}
        self.passed = {_V: 0, _DOWN: 0}

    def choose(self, tensor: str, spec: TensorSpec) -> DType:
        """The type of the next tensor, whether or not its rows are whole blocks of it."""
        model = self.model
        if any(part in tensor for part in _AT_LEAST_Q8_0.get(model.architecture, ())):
            return DType.Q8_0
        if tensor == _LAST or (self.is_tied and tensor in _EMBEDDINGS):
            return self._last(spec)
        kind = _kind(tensor)
        place = self.passed.get(kind, 0)
        if kind in self.passed:
            self.passed[kind] += 1
        if kind == _DOWN and model.experts > 1:
            place = self._layer(tensor)
        if model.experts == 8 and kind in (_V, "attn_k"):
            return DType.Q8_0
        if model.experts == 8 and kind == _OUTPUT and model.architecture != "falcon":
            return _Q5_K if self.name in _OUTPUT_OF_EIGHT_EXPERTS else self.base
        asked = _Asked(place, self.counts.get(kind, 0), model, self.has_importance)
        chosen = next((dtype for holds, dtype in self.rules.get(kind, ()) if holds(asked)), self.base)
        return _Q5_K if kind == _V and model.is_70b and chosen in (_Q3_K, _Q4_K) else chosen

    def _last(self, spec: TensorSpec) -> DType:
        """Of what gives the logits."""
        if self.output is not None:
            return self.output
        if self.model.architecture == "falcon" or spec.shape[-1] % self.base.block[0]:
            return DType.Q8_0
        return self.base if self.base is DType.Q8_0 else _Q6_K

    def _layer(self, tensor: str) -> int:
        layer = _layer(tensor)
        if layer is None or layer >= self.model.layers:
            raise IncompatibleInputs(
                f"{tensor}: is of none of the {self.model.layers} layers that the model has",
                hint="the choice of a type for experts hangs on the layer",
            )
        return layer


def _kind(tensor: str) -> str:
    if tensor == _LAST or tensor in _EMBEDDINGS:
        return ""
    return next((kind for part, kind in _KINDS if part in tensor), "")


def _layer(tensor: str) -> int | None:
    found = re.match(r"blk\.(\d+)\.", tensor)
    return int(found[1]) if found else None


def _is_quantised(tensor: str, spec: TensorSpec) -> bool:
    """Matrices that are weights, but for the small ones (`tensor_allows_quantization`)."""
    rank = next((len(spec.shape) - i for i, size in enumerate(spec.shape) if size > 1), 1)
    return rank >= 2 and tensor.endswith("weight") and tensor not in _KEPT and not _KEPT_WITH.search(tensor)


def _with_fallback(spec: TensorSpec, dtype: DType) -> DType:
    """The type, or another where rows are not whole blocks of it (`tensor_type_fallback`)."""
    for found in (dtype, _FALLBACKS.get(dtype, dtype)):
        if _fits(spec, found):
            return found
    return DType.F16


def _fits(spec: TensorSpec, dtype: DType) -> bool:
    return not dtype.is_packed or spec.shape[-1] % dtype.block[0] == 0


def _fitting(tensor: str, spec: TensorSpec, dtype: DType) -> DType:
    if not _fits(spec, dtype):
        raise UsageError(
            f"{tensor}: has rows of {spec.shape[-1]}, {dtype.value} takes multiples of {dtype.block[0]}",
            hint="choose another type for it",
        )
    return dtype


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression: {error}") from None
