"""Weights that several tensors make up, whatever the format: what each is called, and how its numbers are had.

Tensors decide, module by module, what a weight is; the configuration gives parameters that no tensor shows, and where
the two contradict each other that is said by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats.sidecars import QUANTISED
from weightops.io import strict_json
from weightops.io.escape import escape
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.elementwise import reshaped
from weightops.ops.numbers.affine import Affine
from weightops.spec import DType

CONFIG_KEY = "quantization_config"
_NESTED = ("text_config", "vision_config", "llm_config", "language_config", "thinker_config")
NATIVE = (DType.F16, DType.BF16)
FLOATS = (*NATIVE, DType.F32)
DAMAGED = "the files are damaged, or of two models"
AUTO_ROUND = frozenset({"auto-round", "intel/auto-round"})
"""Names of the method of auto-round, which packs as GPTQ or as AWQ."""

Value = Callable[[DType, bool], LazyTensor]
"""The lazy tensor of a weight in a type, or of its steps."""


@dataclass(frozen=True)
class Integers:
    """A weight `[n, k]` as integers, apart from any container: `scales[:, g] * (codes - zeros[:, g])`.

    `codes` uint8 `[n, k]` of `bits` bits; `scales` floats `[n, g]`; `zeros` uint8 `[n, g]`, or None for
    `2**(bits-1)` everywhere. Column j is in group `j // group_size`, or where there is `g_idx`, int32 `[k]`, as that
    says.
    """

    codes: LazyTensor
    scales: LazyTensor
    zeros: LazyTensor | None
    bits: int
    group_size: int
    g_idx: LazyTensor | None = None


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight: its `name` in a plain checkpoint, the tensors that make it up by role, the type that the format's own
    library gives it, and its numbers in any of the types of `ops.numbers.affine.DTYPES`. `scheme` says in words how it
    is stored; `integers` are there for formats of integers with scales, whatever words hold them."""

    name: str
    format: str
    scheme: str
    parts: Mapping[str, str]
    native: DType
    value: Value
    integers: Integers | None = None

    def in_dtype(self, dtype: DType | None = None) -> LazyTensor:
        """Its numbers, in the native type by default."""
        return self.value(dtype or self.native, False)

    def steps(self) -> LazyTensor:
        """How far from each number the next is that could be stored, in float32."""
        return self.value(DType.F32, True)


@dataclass
class View:
    """A checkpoint whose weights are being found: what no format has claimed yet, and what its configuration says."""

    checkpoint: Checkpoint
    evaluate: Evaluate
    settings: Mapping[str, Any]
    stated_in: str
    """The file that `settings` come from, "" where no file says anything."""
    shape_of: Callable[[str], tuple[int, ...] | None] = lambda name: None
    """The shape of a weight by the model's architecture, for formats whose files do not say it."""
    shapes_only: bool = False
    """Nobody asks for the numbers of these weights: what only they depend on need not be looked at."""
    taken: dict[str, str] = field(default_factory=dict)
    """Tensors that are part of a weight, with its name."""
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return escape(self.checkpoint.name)

    @property
    def method(self) -> str | None:
        """How the configuration says that the checkpoint is quantised."""
        found = self.settings.get("quant_method")
        return str(found).lower() if found is not None else None

    def __iter__(self) -> Iterator[str]:
        """The names that no weight has taken, in the checkpoint's order."""
        return (name for name in self.checkpoint if name not in self.taken)

    def get(self, name: str) -> LazyTensor | None:
        return None if name in self.taken else self.checkpoint.get(name)

    def ending(self, suffix: str) -> list[str]:
        """What stands before `suffix` in the names that end so."""
        return [name.removesuffix(suffix) for name in self if name.endswith(suffix)]

    def need(self, name: str, of: str) -> LazyTensor:
        """A tensor without which `of` is no weight; raises `CorruptInput`."""
        found = self.get(name)
        if found is None:
            raise CorruptInput(
                f"{self.where}: {escape(of)} has no {escape(name)}",
                hint="is a file of the model missing? its scales may lie in another shard",
            )
        return found

    def part(self, name: str, of: str, dtypes: Collection[DType], dimensions: int | None = None) -> LazyTensor:
        """`need`, where it is not empty and of one of these types, with so many dimensions, or two and more.

        Raises `CorruptInput`.
        """
        found = self.need(name, of)
        shape = found.spec.shape
        fits = len(shape) == dimensions or (dimensions is None and len(shape) >= 2)
        if found.spec.dtype not in dtypes or not fits or 0 in shape:
            kinds = " or ".join(dtype.value for dtype in dtypes)
            many = f"{dimensions} dimensions" if dimensions is not None else "2 dimensions or more"
            raise self.misfit(name, f"is {found.spec}, expected {kinds} of {many}")
        return found

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of small tensors by name, read together."""
        listed = list(names)
        return dict(zip(listed, self.evaluate([self.checkpoint[name] for name in listed]), strict=True))

    def dtype_named(self) -> DType | None:
        """The type of 16 bits that config.json names for the model."""
        return named_dtype(self.checkpoint.config())

    def model_dtype(self) -> DType:
        """The same, or bfloat16 where it names none."""
        return self.dtype_named() or DType.BF16

    def native(self, scales: LazyTensor) -> DType:
        """The type of weights: that of the scales where it has 16 bits, or else the model's, or bfloat16.

        compressed-tensors gives weights in float32 where it stores such scales.
        """
        if self.method == "compressed-tensors" and scales.spec.dtype is DType.F32:
            return DType.F32
        return scales.spec.dtype if scales.spec.dtype in NATIVE else self.model_dtype()

    def misfit(self, name: str, problem: str, hint: str = DAMAGED) -> CorruptInput:
        """The error for tensors that do not belong together."""
        return CorruptInput(f"{self.where}: {escape(name)}: {problem}", hint=hint)


def refuse_method(view: View, methods: frozenset[str], name: str, scheme: str) -> None:
    """Raise `IncompatibleInputs` where the configuration names another method than the tensors of `name` show."""
    if view.method is not None and view.method not in methods:
        raise IncompatibleInputs(
            f"{view.where}: {view.stated_in} says quant_method {escape(view.method)}, the tensors of {escape(name)} "
            f"are {scheme}",
            hint="the configuration is of another model; correct or remove what it says of quantisation",
        )


@dataclass(frozen=True)
class NumberFormat:
    """A published format: the values of `quant_method` that name it, how its weights are found among tensors, and how
    the names of their parts end."""

    name: str
    methods: frozenset[str]
    find: Callable[[View], Iterator[QuantizedWeight]]
    endings: tuple[str, ...] = ()


def named_dtype(config: Mapping[str, Any]) -> DType | None:
    """float16 or bfloat16 where config.json names one of them, at the top or for the language model."""
    parts = [config, *(config[key] for key in _NESTED if isinstance(config.get(key), Mapping))]
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            said = str(part.get(key)).removeprefix("torch.")
            found = next((dtype for dtype in NATIVE if dtype.value == said), None)
            if found is not None:
                return found
    return None


def stated(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """What the files of a checkpoint say of its quantisation, and which says it; empty where none does."""
    config = checkpoint.config()
    for part in (config, *(config[key] for key in _NESTED if isinstance(config.get(key), Mapping))):
        for key in (CONFIG_KEY, "quantization"):
            found = part.get(key)
            if isinstance(found, Mapping):
                is_mlx = "quantization" in part and "quant_method" not in found
                return ({"quant_method": "mlx", **found} if is_mlx else found), "config.json"
            if found is not None and key == CONFIG_KEY:
                raise CorruptInput(
                    f"{escape(checkpoint.name)}: config.json: {key} is {type(found).__name__}, expected an object"
                )
    for name in QUANTISED:
        data = checkpoint.sidecar(name)
        if data is not None:
            document = strict_json.load_object(data, f"{escape(checkpoint.name)}: {name}")
            return _from_file(name, document), name
    return {}, ""


def refuse_quantised(checkpoint: Checkpoint, role: str, reason: str) -> None:
    """Raise `IncompatibleInputs` for a checkpoint that its files say is quantised, where plain weights are needed."""
    settings, file = stated(checkpoint)
    if settings:
        method = escape(str(settings.get("quant_method", "a method without a name")))
        raise IncompatibleInputs(
            f"{role}, {escape(checkpoint.name)}, is quantised ({method}, says {file}): {reason}",
            hint="`weightops dequantize` makes a plain checkpoint of it",
        )


def _from_file(name: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The document of a file as config.json would have it."""
    inner = document.get("quantization")
    if name == "hf_quant_config.json" and isinstance(inner, Mapping):
        return {"quant_method": "modelopt", **inner}
    if name == "quanto_qmap.json":
        return {"quant_method": "quanto", "modules": document}
    if "w_bit" in document or "q_group_size" in document:
        return {"quant_method": "awq", **document}
    return {"quant_method": "gptq", **document}


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of quantisation, so that the model loads as a plain one."""
    plain = {key: value for key, value in config.items() if key not in (CONFIG_KEY, "quantization")}
    for key in _NESTED:
        if isinstance(plain.get(key), dict):
            plain[key] = without_quantization(plain[key])
    return plain


def affine(op: Callable[[DType, bool], Affine], *inputs: LazyTensor, shape: tuple[int, ...] | None = None) -> Value:
    """The numbers of codes with scales, as a function of the type; `shape` where it is not that of the codes."""

    def value(dtype: DType, steps: bool) -> LazyTensor:
        made = LazyTensor.make(op(dtype, steps), *inputs)
        return made if shape is None else reshaped(made, shape)

    return value
