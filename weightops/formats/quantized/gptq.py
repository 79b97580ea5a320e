"""GPTQ checkpoints: quantize_config.json, and the tensors of each quantised module.

Tensors are believed, flags are not: sizes and bits are derived from shapes, and the config is held against them.
Sources: AutoGPTQ 0.7 (`quantize_config.json`), transformers 5 (`quantization_config` in config.json), GPTQModel 7.7.
For a module `P` of K inputs, N outputs and G groups of columns see `ops.gptq_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from weightops.checkpoint import Checkpoint, written_json
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.gptq.tensors import SCALES, as_codes, pack_zeros
from weightops.ops.numbers.bitpack import BITS, pack
from weightops.spec import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

CONFIG_NAME = "quantize_config.json"
CONFIG_KEY = "quantization_config"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
MULTIPLE = 32
"""K and N are multiples of this, so that rows of words are whole for all bits."""
_SMALLEST_SCALE = 2.0**-14
"""The smallest normal number of float16."""
_LARGEST_FP16 = 65504.0

CheckpointFormat = Literal["gptq", "gptq_v2"]
"""gptq (v1) stores zero points minus one, gptq_v2 as they are."""


class QuantizeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a checkpoint is quantised, as quantize_config.json and config.json say it. `group_size` -1: one group.

    `desc_act`: columns are grouped by falling importance, as g_idx says. `sym`: all zero points are `2**(bits-1)`.
    `dynamic`: what is different for modules whose names match a pattern (GPTQModel). Fields that are not here say how
    the model was made, and not what it is.
    """

    bits: int
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: CheckpointFormat = "gptq"
    lm_head: bool = False
    damp_percent: float | None = None
    true_sequential: bool = True
    static_groups: bool = False
    pack_dtype: Literal["int32"] = "int32"
    quant_method: Literal["gptq"] = "gptq"
    meta: dict[str, Any] | None = None
    dynamic: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}, expected one of {', '.join(map(str, BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}, expected -1 or a number above zero")

    def to_json(self) -> dict[str, Any]:
        """The fields for both files; what is None is left out. GPTQModel 7 calls the format `format` as well."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in fields.items() if value is not None} | {"format": self.checkpoint_format}

    @property
    def quantizers(self) -> tuple[str, ...]:
        """The programs that made the checkpoint, as far as it says."""
        found = (self.meta or {}).get("quantizer")
        return tuple(map(str, found)) if isinstance(found, list) else (str(found),) if found else ()

    def groups(self, columns: int) -> int:
        """The groups of a module with so many input columns."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)


@dataclass(frozen=True)
class Module:
    """A quantised module: its tensors, and what their shapes say. `group_size` is None where nothing says it."""

    prefix: str
    in_features: int
    out_features: int
    groups: int
    bits: int
    group_size: int | None
    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor
    g_idx: LazyTensor | None
    bias: LazyTensor | None


def parse_config(document: Mapping[str, Any], where: str) -> QuantizeConfig:
    """A quantize_config as read from JSON; `where` names it in errors.

    Raises `IncompatibleInputs` for other methods and formats than those of GPTQ, `CorruptInput` for fields that cannot
    be what they are.
    """
    method = document.get("quant_method") or document.get("method") or "gptq"
    stated = document.get("checkpoint_format") or document.get("format")
    other = document.get("format")
    known = ("gptq", "gptq_v2")
    if method != "gptq":
        raise IncompatibleInputs(
            f"{where}: quantised by {escape(str(method))[:80]}, expected gptq",
            hint="the configuration is of another model; correct or remove what it says of quantisation",
        )
    if document.get("is_marlin_format") or (stated or "gptq") not in known:
        shown = escape(str("marlin" if document.get("is_marlin_format") else stated))[:80]
        raise IncompatibleInputs(
            f"{where}: quantised by gptq in the format {shown}, expected the format {' or '.join(known)}",
            hint="use the library that wrote it",
        )
    if other in known and other != stated:
        raise CorruptInput(
            f"{where}: checkpoint_format is {stated}, format is {other}",
            hint="remove the one that is wrong; gptq stores zero points minus one",
        )
    fields = {name: document[name] for name in QuantizeConfig.__struct_fields__ if document.get(name) is not None}
    if isinstance(fields.get("pack_dtype"), str):
        fields["pack_dtype"] = fields["pack_dtype"].removeprefix("torch.")
    try:
        return msgspec.convert(
            {**fields, "quant_method": method, "checkpoint_format": stated or "gptq"}, QuantizeConfig
        )
    except msgspec.ValidationError as error:
        text = str(error).replace("`", "").replace(" - at $.", ": ").replace("Object missing", "there is no")
        raise CorruptInput(f"{where}: {escape(text)}", hint="correct or remove it") from None


def read_config(checkpoint: Checkpoint) -> QuantizeConfig | None:
    """What config.json or quantize_config.json says of a checkpoint; None if neither says anything.

    Raises as `parse_config` does, and `CorruptInput` where the two contradict each other.
    """
    found = {}
    name = escape(checkpoint.name)
    inner = checkpoint.config().get(CONFIG_KEY)
    if inner is not None:
        if not isinstance(inner, dict):
            raise CorruptInput(f"{name}: config.json: {CONFIG_KEY} is {type(inner).__name__}, expected an object")
        found["config.json"] = parse_config(inner, f"{name}: config.json: {CONFIG_KEY}")
    data = checkpoint.sidecar(CONFIG_NAME)
    if data is not None:
        where = f"{name}: {CONFIG_NAME}"
        found[CONFIG_NAME] = parse_config(strict_json.load_object(data, where), where)
    if len(found) == 2:
        first, second = found.values()
        for field in ("bits", "group_size", "desc_act", "sym", "checkpoint_format"):
            one, other = getattr(first, field), getattr(second, field)
            if one != other:
                raise CorruptInput(
                    f"{name}: config.json says {field} {one}, {CONFIG_NAME} says {other}",
                    hint="correct the one that is wrong",
                )
    return next(iter(found.values()), None)


def with_config(checkpoint: Checkpoint, config: QuantizeConfig) -> Checkpoint:
    """`checkpoint` with both files that say how it is quantised: older loaders look for quantize_config.json alone."""
    document = config.to_json()
    described = replace(checkpoint, sidecars={**checkpoint.sidecars, CONFIG_NAME: written_json(document)})
    return described.with_config(lambda known: {**known, CONFIG_KEY: document})


def prefixes(checkpoint: Mapping[str, object]) -> list[str]:
    """The names of the quantised modules, in the order of their first tensors."""
    found = (name.rpartition(".") for name in checkpoint)
    return list(dict.fromkeys(prefix for prefix, _, part in found if part == "qweight"))


def modules(checkpoint: Checkpoint, config: QuantizeConfig | None = None) -> dict[str, Module]:
    """The quantised modules by name, as their tensors say, held against `config`.

    Raises `CorruptInput` for tensors that are not there or do not fit each other, `IncompatibleInputs` where they are
    not what `config` says.
    """
    return {prefix: read_module(checkpoint, prefix, config) for prefix in prefixes(checkpoint)}


def read_module(checkpoint: Checkpoint, prefix: str, config: QuantizeConfig | None = None) -> Module:
    """One module; raises as `modules` does."""
    where = f"{escape(checkpoint.name)}: {escape(prefix)}"
    parts = {part: checkpoint.get(f"{prefix}.{part}") for part in (*PARTS, "bias")}
    qweight, qzeros, scales, g_idx = (parts[part] for part in PARTS)
    if qweight is None or qzeros is None or scales is None:
        missing = next(part for part in PARTS if parts[part] is None)
        old = f"{prefix}.zeros" in checkpoint
        raise CorruptInput(
            f"{where} has no {missing}, expected qweight, qzeros and scales",
            hint="files of before 2023-04 hold zeros in float instead; convert them with the program that wrote them"
            if old
            else "is a file of the model missing?",
        )
    _check_types(where, parts)
    groups, outputs = scales.spec.shape
    bits, rest = divmod(qzeros.spec.shape[1] * 32, outputs)
    if rest or bits not in BITS or qzeros.spec.shape[0] != groups or qweight.spec.shape[1] != outputs:
        raise CorruptInput(
            f"{where}: qweight {_shape(qweight)}, qzeros {_shape(qzeros)} and scales {_shape(scales)} do not fit each "
            "other, expected [K * bits / 32, N], [G, N * bits / 32] and [G, N]",
            hint="AWQ packs in another way; otherwise the files are damaged, or of two models",
        )
    columns, rest = divmod(qweight.spec.shape[0] * 32, bits)
    if rest or columns % MULTIPLE or outputs % MULTIPLE:
        raise CorruptInput(
            f"{where}: has {columns} inputs and {outputs} outputs at {bits} bits, expected multiples of {MULTIPLE}",
            hint="AWQ packs in another way; otherwise the files are damaged, or of two models",
        )
    for part, size in (("g_idx", columns), ("bias", outputs)):
        tensor = parts[part]
        if tensor is not None and tensor.spec.shape != (size,):
            raise CorruptInput(
                f"{where}: {part} is {_shape(tensor)}, expected [{size}]",
                hint="the files are damaged, or of two models",
            )
    if not 0 < groups <= columns:
        raise CorruptInput(
            f"{where}: has {groups} groups for {columns} inputs", hint="the files are damaged, or of two models"
        )
    _check_config(where, config, bits, columns, groups)
    group_size = _group_size(config, columns, groups)
    if group_size is None and g_idx is None:
        raise CorruptInput(
            f"{where}: {columns} inputs are not {groups} groups of one size, and there is neither g_idx nor a config",
            hint=f"add {CONFIG_NAME} with bits and group_size",
        )
    return Module(prefix, columns, outputs, groups, bits, group_size, qweight, qzeros, scales, g_idx, parts["bias"])


def _check_types(where: str, parts: Mapping[str, LazyTensor | None]) -> None:
    """Refuse dtypes and ranks that no module has."""
    expected = {"qweight": ((DType.I32,), 2), "qzeros": ((DType.I32,), 2), "scales": (SCALES, 2)}
    expected["g_idx"] = ((DType.I32,), 1)
    for part, (dtypes, rank) in expected.items():
        tensor = parts[part]
        if tensor is None:
            continue
        if tensor.spec.dtype not in dtypes or len(tensor.spec.shape) != rank or not tensor.spec.numel:
            kinds = " or ".join(dtype.value for dtype in dtypes)
            raise CorruptInput(
                f"{where}.{part} is {tensor.spec}, expected {kinds} of {rank} dimension{'s' * (rank > 1)}",
                hint="is it a GPTQ model? `weightops inspect` lists its tensors",
            )


def _check_config(where: str, config: QuantizeConfig | None, bits: int, columns: int, groups: int) -> None:
    """Hold a module against the config, unless that has settings of their own for some modules that it quantises."""
    if config is None or any(not pattern.startswith("-:") for pattern in config.dynamic or ()):
        return
    if bits != config.bits:
        raise IncompatibleInputs(
            f"{where}: the tensors have {bits} bits, the config says {config.bits}",
            hint="the config is of another model, or was edited; correct bits",
        )
    if groups != config.groups(columns):
        raise IncompatibleInputs(
            f"{where}: the tensors have {groups} groups of {columns} inputs, the config's group_size "
            f"{config.group_size} makes {config.groups(columns)}",
            hint="the config is of another model, or was edited; correct group_size",
        )


def _group_size(config: QuantizeConfig | None, columns: int, groups: int) -> int | None:
    """Columns in a group, as far as that is known; `columns` where there is one."""
    if groups == 1:
        return columns
    if config is not None and config.groups(columns) == groups:
        return config.group_size
    return columns // groups if columns % groups == 0 else None


def _shape(tensor: LazyTensor) -> str:
    return str(list(tensor.spec.shape))


def write_module(
    prefix: str,
    q: Array,
    zeros: Array,
    scales: Array,
    g_idx: Array,
    bias: Array | None,
    bits: int,
    checkpoint_format: CheckpointFormat = "gptq",
) -> dict[str, Array]:
    """The tensors of a module as they are stored, by full name in the order qweight, qzeros, scales, g_idx, bias.

    `q` uint8 `[K, N]`; `zeros` uint8 `[G, N]`, the true zero points; `scales` float16 `[G, N]`; `g_idx` `[K]`;
    `bias` of any float type `[N]`, stored as float16.
    Raises `IncompatibleInputs` for shapes that do not fit or are no multiples of 32, integers out of range, zero points
    of 0 in v1, scales that are zero, subnormal or no numbers, and biases beyond float16.
    """
    import numpy as np

    where = escape(prefix)
    (columns, outputs), groups = q.shape, len(scales)
    if zeros.shape != scales.shape or scales.shape != (groups, outputs) or g_idx.shape != (columns,):
        shapes = ", ".join(f"{name} {list(a.shape)}" for name, a in [("q", q), ("zeros", zeros), ("scales", scales)])
        raise IncompatibleInputs(
            f"{where}: {shapes} and g_idx {list(g_idx.shape)} do not fit each other, expected [K, N], [G, N], [G, N] "
            "and [K]"
        )
    check_sizes(where, columns, outputs)
    check_scales(scales, f"{prefix}.scales")
    check_groups(g_idx, groups, f"{prefix}.g_idx")
    tensors = {
        "qweight": pack(as_codes(q, bits, f"{prefix}.q"), bits),
        "qzeros": pack_zeros(zeros, bits, checkpoint_format == "gptq", f"{prefix}.zeros"),
        "scales": np.ascontiguousarray(scales),
        "g_idx": g_idx.astype(np.int32),
    }
    if bias is not None:
        if bias.shape != (outputs,) or not (np.abs(bias.astype(np.float64)) <= _LARGEST_FP16).all():
            raise IncompatibleInputs(f"{where}.bias {list(bias.shape)}: expected {outputs} numbers within float16")
        tensors["bias"] = bias.astype(np.float16)
    return {f"{prefix}.{part}": tensor for part, tensor in tensors.items()}


def check_sizes(where: str, columns: int, outputs: int) -> None:
    """Raise `IncompatibleInputs` unless both are multiples of 32."""
    if columns % MULTIPLE or outputs % MULTIPLE or not columns or not outputs:
        raise IncompatibleInputs(
            f"{where}: has {columns} inputs and {outputs} outputs, expected multiples of {MULTIPLE}",
            hint="leave the module unquantised: the format has no room for it",
        )


def check_scales(scales: Array, label: str) -> None:
    """Raise `IncompatibleInputs` unless all are float16, finite and in magnitude at least its smallest normal number.

    Below that a scale has so few bits, or none, that the integers no longer stand for the weights they were made of.
    """
    import numpy as np

    if scales.dtype != np.float16:
        raise IncompatibleInputs(f"{escape(label)} is {scales.dtype}, expected float16")
    magnitudes = np.abs(scales.astype(np.float32))
    bad = ~(np.isfinite(magnitudes) & (magnitudes >= _SMALLEST_SCALE))
    if bad.any():
        group, output = (int(i) for i in np.argwhere(bad)[0])
        raise IncompatibleInputs(
            f"{escape(label)} holds {scales[group, output]} for group {group} of output {output}, and "
            f"{int(bad.sum()) - 1} more that are zero, subnormal in float16 or no numbers",
            hint="quantise the module with a floor under its scales, or leave it unquantised",
        )


def check_groups(g_idx: Array, groups: int, label: str) -> None:
    """Raise `IncompatibleInputs` unless every column is in a group that there is."""
    if g_idx.size and (g_idx.min() < 0 or g_idx.max() >= groups):
        odd = int(g_idx.min() if g_idx.min() < 0 else g_idx.max())
        raise IncompatibleInputs(f"{escape(label)} names group {odd}, expected 0 to {groups - 1}")


def is_act_order(g_idx: Array) -> bool:
    """Whether columns are grouped in another order than they stand in (desc_act)."""
    return bool((g_idx[1:] < g_idx[:-1]).any())
