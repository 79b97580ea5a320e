"""Edit: tensors and settings changed by steps, one after the other; what no step names is carried to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError, WeightopsError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.formats.quantized.parts import module_of_part
from weightops.formats.quantized.weights import stated
from weightops.formats.sidecars import is_tokenizer_file
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.io.yaml_document import Document
from weightops.layouts.embeddings import embeddings_and_heads
from weightops.layouts.experts import parts_of
from weightops.layouts.renamed import check_name, with_modules
from weightops.lazy import Evaluate, LazyTensor
from weightops.operations.check import held_to_class
from weightops.operations.edit.document import Step, fill_in, parse_steps
from weightops.operations.edit.fold import folded
from weightops.operations.edit.primitives import JOINED, MOVES, ONE, SEVERAL, Selected, Tensors, join
from weightops.operations.edit.settings import with_settings


def edit(
    source: Checkpoint,
    other: Sequence[Checkpoint] = (),
    *,
    steps: Sequence[Mapping[str, Any]] = (),
    set: Mapping[str, Any] = {},
    unset: Sequence[str] = (),
    tokenizer: str | None = None,
    architecture: bool = True,
    names: Sequence[str] = (),
    evaluate: Evaluate,
) -> Checkpoint:
    """The model that the steps make of `source`; `other` are what they call by `names` besides.

    Each step selects tensors by a regular expression that whole names match, does one thing with them and names the
    results; see `PRIMITIVES`. `set` and `unset`: what to change in config.json, and what to take out of it, dots
    standing for what is within. `tokenizer`: the source whose tokenizer and chat template the result has. With
    `architecture` the result is held against transformers' class for it.

    Arithmetic is done in float32 and rounded once, and what that changes is counted. Raises `UsageError` with the step
    for one that selects nothing, makes a name twice, or cannot be done, and for quantised tensors that are not only
    moved.
    """
    document = Document({"steps": steps}, "edit")
    for each in (source, *other):
        refuse_parts(each)
        refuse_delta(each, "the source")
        refuse_adapter(each, "the source")
    by_name = dict(zip(names, (source, *other), strict=True)) if names else {}
    if not (steps or set or unset or tokenizer):
        raise UsageError("nothing is to be done", hint="an edit has steps, config or tokenizer")
    work = _Work(document, source, by_name, evaluate)
    for step in parse_steps(document, list(steps)) if steps else ():
        work.apply(step)
    if (set or unset) and "config.json" not in source.sidecars:
        raise UsageError(
            f"{escape(source.name)}: has no config.json, in which settings are set", hint="put it beside the weights"
        )
    result = work.result().with_config(lambda known: with_settings(known, set, unset, escape(source.name)))
    _refuse_half_tied(result, source)
    if tokenizer is not None:
        result = _with_tokenizer(result, by_name, tokenizer)
    return held_to_class(result, source) if architecture else result


def _refuse_half_tied(result: Checkpoint, source: Checkpoint) -> None:
    """Raise `UsageError` where only one of embedding and head was changed, of a model that is to read one of them."""
    if not any(part.get("tie_word_embeddings") is True for part in parts_of(result.config())):
        return
    for embedding, heads in embeddings_and_heads(result):
        for head in heads:
            pair = [(result.get(name), source.get(name)) for name in (embedding, head)]
            changed = [new is not old for new, old in pair]
            if pair[1][0] is not None and changed[0] != changed[1]:
                name = embedding if changed[0] else head
                raise UsageError(
                    f"{escape(result.name)}: {escape(embedding)} and {escape(head)} are tied, and only {escape(name)} "
                    "was changed",
                    hint="do the same to both, or drop the head; or set tie_word_embeddings: false",
                )


def _with_tokenizer(result: Checkpoint, by_name: Mapping[str, Checkpoint], name: str) -> Checkpoint:
    if name not in by_name:
        raise UsageError(f"edit: tokenizer: there is no source {escape(name)}", hint=f"there are {listed(by_name)}")
    theirs = {n: file for n, file in by_name[name].sidecars.items() if is_tokenizer_file(n)}
    if not theirs:
        raise UsageError(f"edit: tokenizer: {escape(name)} has no tokenizer")
    kept = {n: file for n, file in result.sidecars.items() if not is_tokenizer_file(n)}
    return result.with_sidecars({**kept, **theirs})


@dataclass
class _Work:
    """The tensors as the steps so far have left them."""

    document: Document
    source: Checkpoint
    by_name: Mapping[str, Checkpoint]
    evaluate: Evaluate
    tensors: dict[str, LazyTensor] = field(init=False)
    origins: dict[str, str] = field(init=False)
    """By the names of tensors that were only moved, those that they had in the source."""
    notes: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """Of `dropped`, the names in the source."""

    def __post_init__(self) -> None:
        self.tensors = dict(self.source.tensors)
        self.origins = {name: name for name in self.source}
        self.around = Tensors(self._find, self._names, self.source.config(), self.evaluate, self.notes)

    def apply(self, step: Step) -> None:
        """Do a step; what it raises names it."""
        try:
            self._apply(step)
        except WeightopsError as error:
            if str(error).startswith(self.document.shown):
                raise
            raise self.document.blame(step.place, error) from None

    def _apply(self, step: Step) -> None:
        pool = self.tensors if step.source is None else self._source(step.source).tensors
        selected = [Selected(name, m, tensor) for name, tensor in pool.items() if (m := step.match(name))]
        if not selected:
            raise UsageError(
                f"no tensor's whole name matches {' or '.join(escape(each.pattern) for each in step.patterns)}",
                hint=f"names are like {escape(next(iter(pool), ''))}; steps see those that the steps before gave",
            )
        if step.primitive == "fold":
            found = folded([one.name for one in selected], self.tensors, self.source.config(), self.notes)
            self.tensors |= found
            self.notes.append(
                f"fold: {len(selected)} norms are in the {len(found) - len(selected)} tensors behind them"
            )
            return
        if step.primitive != "drop":
            self._refuse_packed(step, selected, pool)
        made = list(self._made(step, selected, self._around(step.source)))
        self._put(step, selected, made)
        self.done.append(_said(step, selected, made))

    def _around(self, source: str | None) -> Tensors:
        """What a step sees besides: sizes are those of the model that it selects in."""
        return self.around if source is None else replace(self.around, config=self._source(source).config())

    def _made(
        self, step: Step, selected: Sequence[Selected], around: Tensors
    ) -> Iterator[tuple[str, LazyTensor, Selected]]:
        """Names and tensors of the results, each with what it comes from."""
        if step.primitive in JOINED:
            groups: dict[str, list[Selected]] = {}
            for one in selected:
                groups.setdefault(fill_in(step.names[0], one.match), []).append(one)
            for name, several in groups.items():
                yield name, join(several, step.arguments, around), several[0]
            return
        for one in selected:
            if step.primitive == "drop":
                continue
            if step.primitive in SEVERAL:
                pieces = SEVERAL[step.primitive](one, step.arguments, around)
                templates = step.names if len(step.names) == len(pieces) else step.names * len(pieces)
                if step.primitive == "split" and len(step.names) not in (1, len(pieces)):
                    raise UsageError(f"{len(pieces)} pieces have {len(step.names)} names")
                for number, (template, piece) in enumerate(zip(templates, pieces, strict=True)):
                    yield fill_in(template, one.match, number), piece, one
                continue
            name = fill_in(step.names[0], one.match) if step.names else one.name
            done = ONE.get(step.primitive)
            yield name, one.tensor if done is None else done(one, step.arguments, around), one

    def _put(self, step: Step, selected: Sequence[Selected], made: Sequence[tuple[str, LazyTensor, Selected]]) -> None:
        """The results in the place of what they come from, unless that is to stay or is another source's."""
        stays = step.keep or step.source is not None
        gone = set() if stays else {one.name for one in selected}
        moved = {name: self.origins.pop(name) for name in gone if name in self.origins}
        fresh: dict[str, LazyTensor] = {}
        after: dict[str, list[str]] = {}
        for name, tensor, one in made:
            check_name(one.name, name)
            if name in fresh:
                raise UsageError(f"two results would be named {escape(name)}", hint="name them apart: {group}, {n}")
            there = name in self.tensors and name not in gone
            if there and not step.replace:
                raise UsageError(
                    f"there is a tensor {escape(name)} already", hint="replace: true puts the result in its place"
                )
            fresh[name] = tensor
            if not there and step.source is None:
                after.setdefault(one.name, []).append(name)
            if there:
                self.origins.pop(name, None)
            if one.name in moved and name not in self.origins and (step.primitive == "name" or name == one.name):
                self.origins[name] = moved[one.name]
        if step.primitive == "drop":
            self.dropped |= dict.fromkeys(gone, "left out by an edit")
            self.lost += moved.values()
        left: dict[str, LazyTensor] = {}
        for name, tensor in self.tensors.items():
            if name not in gone:
                left[name] = fresh.get(name, tensor)
            left |= {new: fresh[new] for new in after.get(name, ())}
        self.tensors = {**left, **{name: tensor for name, tensor in fresh.items() if name not in left}}

    def _refuse_packed(self, step: Step, selected: Sequence[Selected], pool: Mapping[str, LazyTensor]) -> None:
        """Quantised tensors are only moved, and into a model only that is quantised in their way."""
        owner = self.source if step.source is None else self._source(step.source)
        method, own = (stated(each)[0].get("quant_method") for each in (owner, self.source))
        if step.primitive in MOVES and method == own:
            return
        modules = {module_of_part(name) for name in pool}
        for one in selected:
            dtype, module = one.tensor.spec.dtype, one.name.removesuffix(".weight")
            small = not dtype.is_float or dtype.bits < 16
            known = method is not None or module in modules
            if dtype.is_packed or dtype.is_block or (small and known) or module_of_part(one.name) is not None:
                why = "which is only moved here" if method == own else "and what is edited is not quantised so"
                raise UsageError(
                    f"{escape(one.name)} is {one.tensor.spec}, part of a quantised weight, {why}",
                    hint="weightops dequantize makes plain weights of it",
                )

    def _source(self, name: str) -> Checkpoint:
        if name not in self.by_name:
            raise UsageError(f"there is no source {escape(name)}", hint=f"there are {listed(self.by_name)}")
        return self.by_name[name]

    def _find(self, source: str | None, name: str) -> LazyTensor:
        pool = self.tensors if source is None else self._source(source).tensors
        if name not in pool:
            raise UsageError(f"there is no tensor {escape(name)}" + (f" in {escape(source)}" if source else ""))
        return pool[name]

    def _names(self, source: str) -> Sequence[str]:
        return list(self._source(source))

    def result(self) -> Checkpoint:
        """The checkpoint, in which what was only moved keeps what is known of it."""
        if not self.tensors:
            raise UsageError("edit: no tensor would be left")
        result = self.source.with_tensors(self.tensors)
        for each in self.by_name.values():
            own = {id(tensor): name for name, tensor in each.items()}
            digests = {
                new: each.digests[own[id(tensor)]]
                for new, tensor in self.tensors.items()
                if own.get(id(tensor)) in each.digests
            }
            result = result.with_digests({**result.digests, **digests})
        if self.dropped:
            result = result.with_dropped(self.dropped)
        names = {origin: name for name, origin in self.origins.items()}
        result = result.with_config(lambda config: with_modules(config, names, self.lost))
        return result.warned(*self.notes).did(*self.done)


def _said(step: Step, selected: Sequence[Selected], made: Sequence[tuple[str, LazyTensor, Selected]]) -> str:
    """What a step does, by its first tensor."""
    first = selected[0]
    shown = f"{int(step.place[1]) + 1}. {step.primitive}: {escape(first.name)} {first.tensor.spec}"
    if step.primitive == "drop":
        return f"{shown}, {len(selected)} in all, left out"
    results = [f"{escape(name)} {tensor.spec}" for name, tensor, one in made if one is first]
    return f"{shown} becomes {', '.join(results)}; in all {len(selected)} become {len(made)}"
