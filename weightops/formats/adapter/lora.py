"""LoRA adapters as peft saves them: factors by module, and tensors of the base.

Source: `LoraLayer` of peft 0.21. What plain LoRA, DoRA, `modules_to_save` and `trainable_token_indices` need is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, IncompatibleInputs
from weightops.formats import ungathered
from weightops.formats.adapter.config import EDITED, AdapterConfig, read_config
from weightops.formats.adapter.files import CONFIG_NAME, find_adapter, is_adapter
from weightops.formats.adapter.names import Kind, Patterns, parse_name
from weightops.io.escape import escape
from weightops.lazy import LazyTensor
from weightops.ops.arrange import Agreed

_OF_MODULES = {Kind.A, Kind.B, Kind.BIAS, Kind.EMBEDDING_A, Kind.EMBEDDING_B, Kind.MAGNITUDE}
STACKED = ("down_proj", "up_proj", "gate_proj", "gate_up_proj")
"""Parameters that stack experts, in the order in which peft wraps them: the last one that a module declares lies at
depth 0."""
_SUFFIX = {Kind.MAGNITUDE: "lora_magnitude_vector", Kind.BIAS: "lora_B.bias"}


@dataclass
class Factors:
    """What an adapter holds of one module: A `[r, in]`, B `[out, r]`, and with them a bias or a magnitude `[out]`.

    Of an embedding, A is `[r, tokens]` and B `[width, r]`.
    """

    a: LazyTensor
    b: LazyTensor
    bias: LazyTensor | None
    magnitude: LazyTensor | None
    is_embedding: bool


@dataclass(frozen=True)
class LoraModule:
    """A module with factors, of `rank` for each of `experts`, whose change is `scale` times B A.

    `target` is what a config calls it: its path, or with a last part the parameter that stacks experts. `depth` counts
    the wrappers inside which the factors are.
    """

    path: str
    depth: int
    target: str
    rank: int
    scale: float
    factors: Factors
    experts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns of B A, those of one expert."""
        return self.factors.b.spec.shape[0], math.prod(self.factors.a.spec.shape[1:])


@dataclass
class Adapter:
    """An adapter: factors by module and depth (see `adapter_names.Name`), and tensors of or for the base, by path.

    `base` are those of modules with factors, which are loaded before anything is merged, `whole` any others, and `rows`
    new rows of embeddings. `files` says of tensors that lie in another file than the factors in which, by path.
    """

    name: str
    config: AdapterConfig
    tensors: Mapping[str, LazyTensor]
    weight: float
    factors: dict[tuple[str, int], Factors] = field(default_factory=dict)
    base: dict[str, LazyTensor] = field(default_factory=dict)
    whole: dict[str, LazyTensor] = field(default_factory=dict)
    rows: dict[str, LazyTensor] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"{escape(self.name)}: {CONFIG_NAME}"
        self._ranks = Patterns(self.config.rank_pattern or {}, f"{where}: rank_pattern")
        self._alphas = Patterns(self.config.alpha_pattern or {}, f"{where}: alpha_pattern")

    def rank(self, path: str) -> int:
        """The rank of a module by adapter_config.json; `path` is that of a parameter where that is what it targets."""
        found = self._ranks.find(path)
        return self.config.r if found is None else int(found)

    def alpha(self, path: str) -> float:
        """lora_alpha of a module by adapter_config.json."""
        found = self._alphas.find(path)
        return self.config.lora_alpha if found is None else found

    def scale(self, path: str) -> float:
        """What the product of the factors is multiplied by: alpha / r or alpha / sqrt(r), times the weight."""
        rank = self.rank(path)
        # in the order in which peft's `set_scale` computes
        return self.weight * self.alpha(path) / (math.sqrt(rank) if self.config.use_rslora else rank)

    def parameters(self, path: str) -> list[str]:
        """The parameters of the module at `path` that `target_parameters` names, by the depth of their factors.

        That order is known of the `STACKED` alone; others come after them.
        """
        modules = [target.rpartition(".") for target in self.config.target_parameters or () if target]
        return _nested({last for module, _, last in modules if not module or f".{path}".endswith(f".{module}")})

    def target(self, path: str, depth: int) -> str:
        """What the config calls the factors of the module at `path`: the module, or the parameter that they change."""
        parameters = self.parameters(path)
        return f"{path}.{parameters[depth]}" if depth < len(parameters) else path

    def modules(self) -> Iterator[LoraModule]:
        """Every pair of factors, in the file's order; raises `CorruptInput` for ranks that the config contradicts."""
        for (path, depth), factors in self.factors.items():
            target = self.target(path, depth)
            rank, rows = self.rank(target), factors.a.spec.shape[0]
            experts = rows // rank if target != path and not rows % rank else 1
            if rows != rank * experts:
                raise CorruptInput(
                    f"{escape(self.name)}: {escape(target)}: lora_A is {factors.a.spec}, {CONFIG_NAME} says r = {rank}",
                    hint=EDITED,
                )
            yield LoraModule(path, depth, target, rank, self.scale(target), factors, experts)

    def is_saved_whole(self, path: str) -> bool:
        """Whether the tensor at `path` is one of a module in `modules_to_save`."""
        if not self.config.modules_to_save:
            return False
        parts = path.split(".")
        modules = {".".join(parts[i:j]) for j in range(1, len(parts)) for i in range(j)}
        return any(name in modules for name in self.config.modules_to_save)

    def token_rows(self, path: str) -> tuple[int, ...]:
        """The numbers of the rows that `rows` has for the module at `path`."""
        given = self.config.trainable_token_indices
        if not isinstance(given, dict):
            return tuple(given or ())
        return next((tuple(v) for k, v in given.items() if path == k or path.endswith(f".{k}")), ())


def _nested(parameters: Collection[str]) -> list[str]:
    """Parameters of one module by the depth of their factors."""
    return [*(name for name in STACKED if name in parameters), *sorted(set(parameters).difference(STACKED))]


def depths_of(targets: Mapping[str, str]) -> dict[str, int]:
    """The depth of each target's factors; `targets` gives the module of each."""
    own: dict[str, list[str]] = {}
    for target, path in targets.items():
        if target != path:
            own.setdefault(path, []).append(target.rpartition(".")[2])
    return {
        target: _nested(own[path]).index(target.rpartition(".")[2]) if target != path else 0
        for target, path in targets.items()
    }


def read_adapter(checkpoint: Checkpoint, weight: float = 1.0) -> Adapter:
    """The adapter in an opened folder, every scale times `weight`.

    Raises `SourceMissing` without adapter_config.json, `CorruptInput` where the files contradict themselves or each
    other, `IncompatibleInputs` for what is not plain LoRA or DoRA.
    """
    where = escape(checkpoint.name)
    config, notes = read_config(checkpoint)
    _refuse_models(checkpoint)
    adapter = Adapter(checkpoint.name, config, checkpoint.tensors, weight, notes=notes)
    own = next(iter(checkpoint.shards.values()), "")
    modules: dict[tuple[str, int], dict[Kind, str]] = {}
    tensors: dict[Kind, dict[str, LazyTensor]] = {kind: {} for kind in Kind}
    for text, tensor in checkpoint.items():
        file = checkpoint.shards.get(text, own)
        place = where if file == own else f"{where}/{escape(file)}"
        name = parse_name(text, place)
        refuse_odd(tensor, place, text)
        if name.kind in _OF_MODULES:
            parts = modules.setdefault((name.path, name.depth), {})
            if name.kind in parts:
                raise _twice(where, parts[name.kind], text)
            parts[name.kind] = text
            continue
        known = tensors[name.kind]
        if file != own and name.kind is Kind.WHOLE:
            adapter.files.setdefault(name.path, file)
            if name.path in known:
                problem = f"{place}: {name.path} and the same in another file"
                tensor = LazyTensor.make(Agreed(problem), known[name.path], tensor)
        elif name.path in known:
            raise _twice(where, name.path, text)
        known[name.path] = tensor
    adapter.factors = {key: _factors(parts, checkpoint, adapter.config) for key, parts in modules.items()}
    adapter.base, adapter.rows = tensors[Kind.BASE], tensors[Kind.ROWS]
    adapter.whole = _whole(tensors, adapter, where)
    if tensors[Kind.ORIGINAL]:
        adapter.notes += (f"{where}: what modules_to_save replaces is in it too, and not used",)
    if adapter.config.trainable_token_indices and not adapter.rows:
        raise CorruptInput(
            f"{where}: {CONFIG_NAME} has trainable_token_indices, and there are no rows for them",
            hint="fetch the adapter again",
        )
    return adapter


def refuse_odd(tensor: LazyTensor, place: str, text: str) -> None:
    """Refuse a tensor that holds no numbers to merge."""
    if not tensor.spec.dtype.is_float or tensor.spec.dtype.is_packed:
        raise IncompatibleInputs(
            f"{place}: {escape(text)} is {tensor.spec}, expected floating-point numbers",
            hint="a quantised adapter: fetch it as it was trained",
        )
    if not tensor.spec.numel:
        raise CorruptInput(f"{place}: {escape(text)} is {tensor.spec}, without elements", hint=ungathered.HINT)


def _refuse_models(checkpoint: Checkpoint) -> None:
    """Refuse the model that lies in a folder with an adapter, which `open_checkpoint` finds there."""
    folder = checkpoint.folder
    beside = find_adapter(folder.names()) if folder is not None and checkpoint.shards else None
    if beside is not None and not is_adapter(checkpoint):
        raise IncompatibleInputs(
            f"{escape(checkpoint.name)}: {escape(next(iter(checkpoint.shards.values())))} is a model, "
            f"the adapter beside it is {beside}",
            hint="name that file or the folder as the adapter; in a recipe, as a source of its own",
        )


def _whole(tensors: Mapping[Kind, Mapping[str, LazyTensor]], adapter: Adapter, where: str) -> dict[str, LazyTensor]:
    """The tensors that replace those of the base; what they were before is of no use then."""
    whole = dict(tensors[Kind.WHOLE])
    for path, tensor in tensors[Kind.COPY].items():
        problem = f"{where}: {path} and the same in modules_to_save differ"
        whole[path] = LazyTensor.make(Agreed(problem), whole[path], tensor) if path in whole else tensor
    # With ensure_weight_tying, peft saves the tied module and does not list it in modules_to_save.
    saved = {path for path in whole if adapter.config.ensure_weight_tying or adapter.is_saved_whole(path)}
    odd = next((path for path in tensors[Kind.ORIGINAL] if path not in saved), None)
    if odd is not None:
        raise CorruptInput(
            f"{where}: has what {escape(odd)} was, and nothing in its place", hint="fetch the adapter again"
        )
    both = next((path for path in whole if path in adapter.base), None)
    if both is not None:
        raise _twice(where, both, f"{both} beside factors")
    return whole


def _twice(where: str, first: str, second: str) -> CorruptInput:
    return CorruptInput(
        f"{where}: {escape(first)} and {escape(second)} are the same part of a module",
        hint="save the adapter once more with peft",
    )


def _factors(parts: Mapping[Kind, str], checkpoint: Checkpoint, config: AdapterConfig) -> Factors:
    """The factors of one module, whose tensors are named by kind; refuses what does not belong together."""
    where, shown = escape(checkpoint.name), escape(next(iter(parts.values())))
    is_embedding = Kind.EMBEDDING_A in parts or Kind.EMBEDDING_B in parts
    a, b = (Kind.EMBEDDING_A, Kind.EMBEDDING_B) if is_embedding else (Kind.A, Kind.B)
    missing = [kind.name.replace("EMBEDDING", "embedding") for kind in (a, b) if kind not in parts]
    if missing:
        raise CorruptInput(f"{where}: {shown} has no lora_{missing[0]} beside it", hint="fetch the adapter again")
    odd = next((name for kind, name in parts.items() if kind not in (a, b, Kind.BIAS, Kind.MAGNITUDE)), None)
    if odd is not None:
        raise CorruptInput(
            f"{where}: {shown} and {escape(odd)} cannot both be parts of one module", hint="fetch the adapter again"
        )
    for kind, setting, is_set in (
        (Kind.MAGNITUDE, "use_dora", config.use_dora),
        (Kind.BIAS, "lora_bias", config.lora_bias),
    ):
        if (kind in parts) != is_set:
            what = "has no" if is_set else "has a"
            raise CorruptInput(
                f"{where}: {CONFIG_NAME} has {setting}: {str(is_set).lower()}, but {shown} {what} {_SUFFIX[kind]}",
                hint=EDITED,
            )
    tensors = {kind: checkpoint[name] for kind, name in parts.items()}
    first, second = tensors[a].spec, tensors[b].spec
    if min(len(first.shape), len(second.shape)) < 2 or first.shape[0] != second.shape[1]:
        raise CorruptInput(
            f"{where}: {escape(parts[a])} is {first} and its lora_B {second}: they are not of one rank",
            hint=ungathered.HINT,
        )
    return Factors(tensors[a], tensors[b], tensors.get(Kind.BIAS), tensors.get(Kind.MAGNITUDE), is_embedding)
