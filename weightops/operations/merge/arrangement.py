"""Which tensors of the result are made of which tensors of the models, and with which values of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.modules import last_part
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.embeddings import has_rows_of_tokens
from weightops.layouts.layers import PACKED_LAYERS, Stack, find_stack
from weightops.layouts.names import is_derived
from weightops.lazy import LazyTensor
from weightops.operations.merge.layers import Parted, in_modules, parted, positions, unnamed_modules
from weightops.operations.merge.parameters import position, values
from weightops.operations.merge.settings import Settings
from weightops.operations.merge.stage import Module, Slice, Source, Stage
from weightops.ops.merging.method import Method, Value


@dataclass(frozen=True)
class Input:
    """A tensor of a model."""

    model: str
    name: str
    tensor: LazyTensor


@dataclass(frozen=True)
class Job:
    """The tensor `name` of the result, made of `inputs` by `method`; `base` is the place of the base among them."""

    name: str
    inputs: tuple[Input, ...]
    method: Method
    base: int | None
    shared: Mapping[str, Value]
    of_each: tuple[Mapping[str, Value], ...]


@dataclass(frozen=True)
class Chosen:
    """Layers of a model in slices: those of the first source of each, by model and number, in their new order.

    `stack` are the layers that the model has whose names they get.
    """

    stack: Stack
    layers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Arrangement:
    """All jobs, in the order of the result; which layers were chosen, if slices say so; what was left out, and why."""

    jobs: tuple[Job, ...]
    chosen: Chosen | None
    dropped: Mapping[str, str] = field(default_factory=dict)


def arrange(stage: Stage, models: Mapping[str, Checkpoint]) -> Arrangement:
    """What a stage makes of opened models, by the names that the stage has for them.

    Every tensor of every source goes somewhere, is named in `dropped`, or is refused; but for slices, which choose
    layers, and take what is before and after them from the first and the last one. Raises `IncompatibleInputs` for
    tensors that some lack or that have other shapes, `UsageError` for what the file says and the models do not have.
    """
    return _Arranger(stage, models).arrangement()


@dataclass
class _Arranger:
    stage: Stage
    models: Mapping[str, Checkpoint]
    dropped: dict[str, str] = field(default_factory=dict)
    chosen: Chosen | None = None

    def arrangement(self) -> Arrangement:
        jobs: list[Job] = []
        for module, names in self._modules():
            jobs += self._sliced(module, names) if module.is_sliced else self._whole(module, names)
        if not jobs:
            raise UsageError(f"{self.stage.document.shown}: there is no tensor that the result would have")
        return Arrangement(tuple(jobs), self.chosen, self.dropped)

    def _modules(self) -> Iterator[tuple[Module, dict[str, list[str]]]]:
        """Each module with the names of its tensors in each of its models."""
        modules = self.stage.modules
        own = [module.name for module in modules]
        every = {name: list(self.models[name]) for module in modules for name in _models(module)}
        rest = unnamed_modules(every, own)
        if len(rest) > 1:
            parts = {name.partition(".")[0] for names in every.values() for name in names}
            self.stage.document.fail(
                ("modules", rest[1]),
                f"no tensor's name begins with {escape(rest[1])}, nor any with {escape(rest[0])}",
                hint=f"names begin with {listed(parts)}; at most one module stands for what the others do not take",
            )
        by_module = {model: in_modules(names, own) for model, names in every.items()}
        left = [(model, name) for model, found in by_module.items() for name in found[""]]
        if left and not rest:
            model, name = left[0]
            self.stage.document.fail(
                ("modules",),
                f"no module takes {escape(name)} of {escape(model)}",
                hint=_copied(name.partition(".")[0], model),
            )
        for module in modules:
            key = "" if rest == [module.name] else module.name
            yield module, {model: by_module[model][key] for model in _models(module)}

    # ---- modules with all layers

    def _whole(self, module: Module, names: Mapping[str, Sequence[str]]) -> Iterator[Job]:
        (piece,) = module.slices
        places = positions(name for own in names.values() for name in own)
        return self._alike(module, piece, _themselves(names), lambda name: name, lambda name: places.get(name, 0.0))

    # ---- modules with chosen layers

    def _sliced(self, module: Module, names: Mapping[str, Sequence[str]]) -> Iterator[Job]:
        if self.chosen is not None:
            self.stage.document.fail(module.place, "has slices, as another module has: one can have its layers chosen")
        stacks = {m: find_stack(own, self.models[m].config(), escape(m)) for m, own in names.items()}
        parts = {model: parted(own, stacks[model]) for model, own in names.items()}
        first, last = module.slices[0], module.slices[-1]
        layers = [(piece, i) for piece in module.slices for i in range(self._count(piece, parts))]
        if not layers:
            self.stage.document.fail(first.place, "no slice has a layer, so the result would have none")
        lead = first.sources[0].model.model
        self.chosen = Chosen(
            stacks[lead], tuple((p.sources[0].model.model, _number(p.sources[0], i)) for p, i in layers)
        )
        self._refuse_packed(names, stacks)
        prefix = parts[lead].prefix
        yield from self._beside(module, first, {m: parts[m].before for m in _of(first)})
        for number, (piece, i) in enumerate(layers):
            old = {source.model.model: _number(source, i) for source in piece.sources}
            at = position(i, self._count(piece, parts))
            rests = {model: parts[model].named(number) for model, number in old.items()}
            yield from self._layer(module, piece, f"{prefix}.{number}", rests, at)
        for i in range(max(parts[model].n_further for model in _of(last))):
            rests = {m: parts[m].named(len(parts[m].layers) - parts[m].n_further + i) for m in _of(last)}
            yield from self._layer(module, last, f"{prefix}.{len(layers) + i}", rests, 0.0)
        yield from self._beside(module, last, {m: parts[m].after for m in _of(last)})

    def _count(self, piece: Slice, parts: Mapping[str, Parted]) -> int:
        """How many layers a slice has; raises `UsageError` for layers that a source does not have."""
        for source in piece.sources:
            model = parts[source.model.model]
            there = len(model.layers) - model.n_further
            if source.layers is not None and source.layers[1] > there:
                self.stage.document.fail(
                    (*source.place, "layer_range"),
                    f"ends at {source.layers[1]}, and {escape(source.model.model)} has {there} layers",
                    hint=f"[0, {there}] are all of them",
                )
        first, stop = piece.sources[0].layers or (0, 0)
        return stop - first

    def _refuse_packed(self, names: Mapping[str, Sequence[str]], stacks: Mapping[str, Stack]) -> None:
        """Tensors that hold a part for each layer are not taken apart."""
        assert self.chosen is not None
        order = [number for _, number in self.chosen.layers]
        for model, own in names.items():
            packed = next((n for n in own if last_part(n.removesuffix(".weight")) in PACKED_LAYERS), None)
            if packed is not None and order != list(range(stacks[model].count - stacks[model].n_mtp)):
                raise UsageError(
                    f"{escape(packed)} of {escape(model)} holds a part for each layer, and slices would need others",
                    hint="choose the layers by weightops shard --layers, and merge the results by models:",
                )

    def _beside(self, module: Module, piece: Slice, names: Mapping[str, Sequence[str]]) -> Iterator[Job]:
        """What is in no layer, of the sources of one slice."""
        places = positions(name for own in names.values() for name in own)
        return self._alike(module, piece, _themselves(names), lambda name: name, lambda name: places.get(name, 0.0))

    def _layer(
        self, module: Module, piece: Slice, new: str, names: Mapping[str, Mapping[str, str]], at: float
    ) -> Iterator[Job]:
        """One layer of the result, of layers that may have other numbers in the models."""
        return self._alike(module, piece, names, lambda rest: f"{new}.{rest}", lambda rest: at)

    def _alike(
        self,
        module: Module,
        piece: Slice,
        names: Mapping[str, Mapping[str, str]],
        new: Callable[[str], str],
        at: Callable[[str], float],
    ) -> Iterator[Job]:
        """The tensors that all models of a slice have: `names` in each by what they are called in all."""
        for key in self._agreed(names):
            inputs = [Input(model, own[key], self.models[model][own[key]]) for model, own in names.items()]
            yield self._job(module, piece, new(key), inputs, at(key))

    def _agreed(self, names: Mapping[str, Mapping[str, str]]) -> list[str]:
        """What all models have, in the order of the first; raises unless that is all.

        What follows from a model's settings is left out if some lack it.
        """
        every: dict[str, str] = {}
        for own in names.values():
            every |= {key: name for key, name in own.items() if key not in every}
        lacking = [key for key in every if any(key not in own for own in names.values())]
        missing = [key for key in lacking if not is_derived(every[key])]
        if missing:
            name = every[missing[0]]
            owners = [model for model, own in names.items() if missing[0] in own]
            others = [model for model, own in names.items() if missing[0] not in own]
            more = f" (and so with {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise IncompatibleInputs(
                f"{escape(name)} is in {listed(owners)}, and not in {listed(others)}{more}",
                hint=self._remedy(name, owners[0], others),
            )
        self.dropped |= dict.fromkeys(
            (every[key] for key in lacking), "follows from the configuration, and not all models have it"
        )
        return [key for key in every if key not in lacking]

    def _remedy(self, name: str, owner: str, others: Sequence[str]) -> str:
        """What to do about a tensor that `owner` has and the others lack: a tower of its own, or a damaged model?"""
        parts = name.split(".")
        for part in (".".join(parts[:n]) for n in range(1, len(parts))):
            if not any(other.startswith(f"{part}.") for model in others for other in self.models[model]):
                is_tower = sum(own.startswith(f"{part}.") for own in self.models[owner]) > 1
                if is_tower and not any(map(str.isdigit, part.split("."))):
                    return f"to take {escape(part)} from one model, {_copied(part, owner)}"
                break
        return "is the model downloaded in full? Tensors are merged that all models have"

    # ---- one tensor

    def _job(self, module: Module, piece: Slice, name: str, inputs: Sequence[Input], at: float) -> Job:
        self._refuse_shapes(name, inputs)
        method, base = module.method, piece.base_index
        levels = (piece.parameters, *module.levels)

        def missing(key: str) -> NoReturn:
            self.stage.document.fail(
                ("parameters",) if "parameters" in self.stage.document.data else (),
                f"{method.name} needs {key}, and nothing says what it is for {escape(name)}",
                hint=_whose(key),
            )

        shared = values(method.shared, levels, name, at, missing)
        of_each = tuple(
            {} if i == base else self._own(method, source, levels, found, at)
            for i, (source, found) in enumerate(zip(piece.sources, inputs, strict=True))
        )
        problem = method.check(shared, of_each) if method.check is not None else None
        if problem is not None:
            self.stage.document.fail(piece.place, f"{problem}, for {escape(name)}")
        return Job(name, tuple(inputs), method, base, shared, of_each)

    def _own(
        self, method: Method, source: Source, levels: Sequence[Settings], found: Input, at: float
    ) -> dict[str, Value]:
        def missing(key: str) -> NoReturn:
            self.stage.document.fail(
                source.place,
                f"{method.name} needs {key}, and nothing says what it is for {escape(found.name)} of "
                f"{escape(found.model)}",
                hint=_whose(key),
            )

        return values(method.of_each, (source.parameters, *levels), found.name, at, missing)

    def _refuse_shapes(self, name: str, inputs: Sequence[Input]) -> None:
        first = inputs[0]
        for other in inputs[1:]:
            ours, theirs = first.tensor.spec.shape, other.tensor.spec.shape
            if ours == theirs:
                continue
            rows = has_rows_of_tokens(name) and ours[1:] == theirs[1:]
            hint = "tokenizer: {source: union} or {source: base} in the merge file gives all the same tokens"
            raise IncompatibleInputs(
                f"{escape(name)} is {list(ours)} in {escape(first.model)} and {list(theirs)} in {escape(other.model)}",
                hint=hint if rows else "models of other sizes are not merged",
            )


def _models(module: Module) -> list[str]:
    return list(dict.fromkeys(source.model.model for piece in module.slices for source in piece.sources))


def _of(piece: Slice) -> list[str]:
    return [source.model.model for source in piece.sources]


def _number(source: Source, i: int) -> int:
    return (source.layers or (0, 0))[0] + i


def _whose(key: str) -> str:
    return f"write {key} under parameters:, with a last rule without filter where there are rules"


def _themselves(names: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    return {model: {name: name for name in own} for model, own in names.items()}


def _copied(module: str, model: str) -> str:
    """How a merge file says that a part of the result comes from one model."""
    entry = f"{escape(module)}: {{merge_method: passthrough, models: [{{model: {escape(model)}}}]}}"
    return f"put what is merged under modules: {{default: ...}}, and beside it {entry}"
