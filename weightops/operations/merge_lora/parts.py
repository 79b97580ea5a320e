"""Where the factors of an adapter belong: which tensors of a base they change, and how peft would merge them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from weightops.errors import IncompatibleInputs
from weightops.formats.adapter.files import CONFIG_NAME
from weightops.formats.adapter.lora import STACKED, Adapter, Factors
from weightops.formats.modules import is_conv1d
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.operations.merge_lora.names import is_head
from weightops.ops.lora.factors import DTYPES, Precision
from weightops.ops.lora.product import Part
from weightops.spec import TensorSpec

_TRANSPOSED_EXPERTS = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
"""Models whose stacked experts are `[experts, in, out]`."""
_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Parameters that stack the experts, and what files hold of each, one after the other in the rows."""


@dataclass(frozen=True)
class Placed:
    """One change of one tensor of the base; `path` is the module's weight as the adapter names it."""

    name: str
    path: str
    part: Part
    inputs: tuple[LazyTensor, ...]
    bias: LazyTensor | None = None


class Placing:
    """Places the factors of one adapter; raises `IncompatibleInputs` for those that do not fit the base.

    `find` gives the tensor that a path is, as a name in `tensors`, or None.
    """

    def __init__(
        self,
        adapter: Adapter,
        tensors: Mapping[str, LazyTensor],
        find: Callable[[str], str | None],
        model_type: str | None,
        precision: Precision,
        two_roundings: bool,
    ) -> None:
        self._adapter, self._base, self._find, self._model = adapter, tensors, find, model_type
        self._precision, self._two = precision, two_roundings
        self._where = escape(adapter.name)

    def place(self) -> Iterator[Placed]:
        """All factors."""
        for (path, depth), factors in self._adapter.factors.items():
            yield from self.place_one(path, depth, factors)

    def place_one(self, path: str, depth: int, factors: Factors) -> Iterator[Placed]:
        """The factors of one module."""
        name = self._find(f"{path}.weight")
        if name is not None and depth == 0:
            yield self._linear(path, name, factors)
        else:
            yield from self._experts(path, depth, factors)

    def _fail(self, path: str, problem: str, hint: str) -> IncompatibleInputs:
        """An error that names adapter and module."""
        return IncompatibleInputs(f"{self._where}: {escape(path)}: {problem}", hint=hint)

    def _linear(self, path: str, name: str, factors: Factors) -> Placed:
        """A linear layer, or an embedding."""
        weight = self._spec(path, name)
        if len(weight.shape) != 2:
            what = "a convolution" if len(weight.shape) > 2 else "no matrix"
            raise self._fail(path, f"{escape(name)} is {weight}, {what}", "merge this adapter with peft itself")
        stacked = self._is_stacked(path)
        part = Part(
            self._scale(path, path if stacked is None else stacked, factors, 1),
            is_transposed=factors.is_embedding or self._is_conv1d(path, factors, weight),
            rounds_change=self._rounds(factors.is_embedding or stacked is not None),
            has_magnitude=factors.magnitude is not None,
        )
        return self._placed(path, name, part, factors)

    def _rounds(self, in_peft: bool) -> bool:
        """Whether a change is rounded before it is added: if that was asked for, or if peft does so."""
        return self._two or (in_peft and self._precision == "float32")

    def _placed(self, path: str, name: str, part: Part, factors: Factors) -> Placed:
        vector = () if factors.magnitude is None else (factors.magnitude,)
        inputs = (factors.a, factors.b, *vector)
        try:
            part.check(self._spec(path, name), *(t.spec for t in inputs))
        except IncompatibleInputs as error:
            hint = "is this the base that the adapter was trained on?"
            raise self._fail(path, f"{error}, the base's {escape(name)}", hint) from None
        return Placed(name, f"{path}.weight", part, inputs, factors.bias)

    def _spec(self, path: str, name: str) -> TensorSpec:
        """What a tensor of the base is: numbers that something can be added to."""
        spec = self._base[name].spec
        if spec.dtype not in DTYPES:
            hint = "a quantised base: merge into the one it was made from"
            raise self._fail(path, f"{escape(name)} is {spec}, expected float32, float16 or bfloat16", hint)
        return spec

    def _scale(self, path: str, target: str, factors: Factors, experts: int) -> float:
        """The scale of factors whose rank is that of `target` in the config."""
        rank, rows = self._adapter.rank(target), factors.a.spec.shape[0] if factors.a.spec.shape else 0
        if rows != rank * experts:
            times = f" for each of {experts} experts" if experts > 1 else ""
            problem = f"lora_A is {factors.a.spec}, {CONFIG_NAME} says r = {rank}{times}"
            raise self._fail(path, problem, "was the config edited, or taken from another adapter?")
        return self._adapter.scale(target)

    def _is_conv1d(self, path: str, factors: Factors, weight: TensorSpec) -> bool:
        """Whether a weight is `[in, out]`, as in transformers' Conv1D; told by shape where that says it.

        peft goes by the module's type, and corrects `fan_in_fan_out` by it.
        """
        factored, flag = _factored(factors), self._adapter.config.fan_in_fan_out
        if weight.shape == factored != factored[::-1]:
            return False
        known = is_conv1d(path, self._model)
        return known or (flag and (self._model is None or weight.shape != factored))

    def _is_stacked(self, path: str) -> str | None:
        """What the config calls a weight that transformers 5 keeps as a bare parameter; None of other weights.

        Those are parameters that the adapter targets by name, experts, and what chooses among them. peft rounds their
        change before it is added.
        """
        weight, parts = f"{path}.weight", path.split(".")
        if any(weight == t or weight.endswith(f".{t}") for t in self._adapter.config.target_parameters or ()):
            return weight
        is_expert = len(parts) > 2 and parts[-3] == "experts" and parts[-2].isdigit()
        if is_expert and self._adapter.config.use_rslora:
            raise self._fail(
                path,
                "with use_rslora, peft scales the factors of single experts by another number than in training",
                "merge it with the version of peft that it was trained with",
            )
        is_router = parts[-1] == "gate" and self._count_experts(".".join([*parts[:-1], "experts"])) > 0
        return path if is_expert or is_router else None

    def _count_experts(self, path: str) -> int:
        """How many experts the files have, each with tensors of its own or all in one, in the module at `path`."""
        for parameter, spellings in _FUSED.items():
            fused = self._find(f"{path}.{parameter}")
            if fused is not None:
                return self._base[fused].spec.shape[0]
            for leaf, *_ in spellings:
                count = 0
                while self._find(f"{path}.{count}.{leaf}.weight") is not None:
                    count += 1
                if count:
                    return count
        return 0

    def _experts(self, path: str, depth: int, factors: Factors) -> Iterator[Placed]:
        """Factors of a parameter that is no module's weight: `target_parameters`, as for stacked experts."""
        parameter = self._parameter(path, depth)
        whole = self._find(f"{path}.{parameter}")
        if whole is not None:
            yield self._stacked(path, parameter, whole, factors)
            return
        count = self._count_experts(path)
        for leaves in _FUSED.get(parameter, ()):
            names = [[self._find(f"{path}.{e}.{leaf}.weight") for leaf in leaves] for e in range(count)]
            if count and all(name is not None for row in names for name in row):
                scale = self._scale(path, f"{path}.{parameter}", factors, count)
                yield from self._separate(path, [[n for n in row if n is not None] for row in names], factors, scale)
                return
        raise self._fail(path, f"the base has no {escape(parameter)} there", "is this the base that it was trained on?")

    def _parameter(self, path: str, depth: int) -> str:
        """The parameter whose factors lie at this depth, by the config; raises if there is no such module at all."""
        found = [p for p in self._adapter.parameters(path) if self._has_parameter(path, p)]
        if not found:
            raise self._missing(path)
        if depth >= len(found) or (len(found) > 1 and not set(found).issubset(STACKED)):
            shown = ", ".join(map(escape, sorted(found)))
            problem = f"which of the parameters {shown} the factors are for is not known here"
            raise self._fail(path, problem, "merge this adapter with peft itself")
        return found[depth]

    def _has_parameter(self, path: str, parameter: str) -> bool:
        leaves = [leaf for spelling in _FUSED.get(parameter, ()) for leaf in spelling]
        paths = [f"{path}.{parameter}", *(f"{path}.0.{leaf}.weight" for leaf in leaves)]
        return any(self._find(p) is not None for p in paths)

    def _missing(self, path: str) -> IncompatibleInputs:
        """The error for a module that the base does not have, or has in another form."""
        for parameter, what in (
            ("qweight", "quantised"),
            ("in_proj_weight", "a MultiheadAttention module"),
            ("weight_packed", "quantised"),
        ):
            if self._find(f"{path}.{parameter}") is not None:
                return self._fail(path, f"is {what} in the base", "such modules are not merged here: use peft itself")
        if is_head(f"{path}.weight"):
            return self._fail(path, "the base has no such tensor", "a base model without its head: take the whole one")
        return self._fail(path, "the base has no such module", "is this the base that the adapter was trained on?")

    def _stacked(self, path: str, parameter: str, name: str, factors: Factors) -> Placed:
        """A parameter as the files have it: `[experts, out, in]`, `[experts, in, out]` or a matrix."""
        shape = self._spec(path, name).shape
        experts = shape[0] if len(shape) == 3 else 1
        scale = self._scale(path, f"{path}.{parameter}", factors, experts)
        factored = _factored(factors)
        is_square = factored == factored[::-1]
        is_transposed = shape[-2:] != factored or (is_square and self._model in _TRANSPOSED_EXPERTS)
        part = Part(scale, is_transposed=is_transposed, rounds_change=self._rounds(True), experts=experts)
        return self._placed(path, name, part, factors)

    def _separate(self, path: str, names: list[list[str]], factors: Factors, scale: float) -> Iterator[Placed]:
        """A parameter of which the files hold each expert for itself, perhaps in several tensors."""
        experts, rows = len(names), 0
        for expert, own in enumerate(names):
            rows = 0
            for name in own:
                part = Part(
                    scale,
                    rounds_change=self._rounds(True),
                    experts=experts,
                    expert=expert,
                    first_row=rows,
                )
                yield self._placed(path, name, part, factors)
                rows += self._base[name].spec.shape[0]
        if factors.b.spec.shape[:1] != (rows,):
            problem = f"lora_B is {factors.b.spec}, the experts of the base have {rows} rows"
            raise self._fail(path, problem, "is this the base that the adapter was trained on?")


def _factored(factors: Factors) -> tuple[int, ...]:
    """`[out, in]` by the factors."""
    return (*factors.b.spec.shape[:1], *factors.a.spec.shape[1:2])
