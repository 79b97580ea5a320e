"""Merge models: one checkpoint of several, by mergekit's methods and in its language, streaming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import yaml

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.io.yaml_document import Document, read_documents
from weightops.lazy import Evaluate
from weightops.operations.merge.arrangement import Arrangement, Job, arrange
from weightops.operations.merge.document import parse_stage
from weightops.operations.merge.inputs import plain, refuse_strangers, refuse_what_is_no_model, with_heads
from weightops.operations.merge.making import is_copied, make
from weightops.operations.merge.references import References
from weightops.operations.merge.result import finished
from weightops.operations.merge.stage import Stage
from weightops.operations.merge.vocabulary import Vocabulary, aligned
from weightops.ops.merging.method import Value


def merge(
    models: Sequence[Checkpoint],
    *,
    config: Mapping[str, Any],
    text: str = "",
    file: str = "",
    said: Sequence[str] = (),
    seed: int | None = None,
    allow_nonfinite: bool = False,
    plugin: str | None = None,
    names: Sequence[str],
    evaluate: Evaluate,
) -> Checkpoint:
    """What a stage of a merge file makes of `models`, which it calls by `names`, in their order.

    `config` is one document in mergekit's language, in which each model is one of the names (see `Stage.plain`).
    `text` is the merge file as it was given, to lie beside the result, and `file` its name for messages; `said` are
    further notes. `seed` is that of random masks, 0 by default. NaN and infinities are refused where they are met,
    unless `allow_nonfinite`. `plugin` is the SHA-256 of the file that brought further methods.

    Raises `UsageError` for what the file cannot mean, with line and field where `text` has them, `IncompatibleInputs`
    for models that do not belong together. Everything that does not depend on values is refused here.
    """
    stage = read_stage(config, text, file)
    ready = _Ready.of(stage, models, names, evaluate)
    made = make(ready.arrangement.jobs, stage.out_dtype, seed=seed or 0, allow_nonfinite=allow_nonfinite)
    result = finished(
        ready.donor,
        ready.models,
        made.tensors,
        ready.arrangement.chosen,
        ready.vocabulary,
        text or yaml.safe_dump(stage.document.data, sort_keys=False, allow_unicode=True),
    )
    own = {name: model for name, model in zip(names, models, strict=True) if name in ready.models}
    watch = (*(tensor for model in own.values() for tensor in model.watch), *made.watch)
    unused = [f"said, and not used: {', '.join(map(escape, stage.unused))}"] if stage.unused else []
    dropped = {name: reason for model in own.values() for name, reason in model.dropped.items()}
    return replace(
        result,
        name=stage.name or result.name,
        watch=watch,
        documents=(),
        dropped=dropped | dict(ready.arrangement.dropped),
        warnings=tuple(dict.fromkeys((*said, *result.warnings, *unused, *ready.notes))),
    )


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a model that goes into a merge, with the parameters of that model for it."""

    model: str
    tensor: str
    is_base: bool
    parameters: dict[str, Value]


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """How a tensor of the result is made: `method` is `copy` for what goes out as it came in."""

    tensor: str
    method: str
    inputs: tuple[Input, ...]
    parameters: dict[str, Value]


class MergePlan(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-merge-plan/1"):
    """How each tensor of a merge is made, in the order in which they are written."""

    tensors: tuple[Made, ...]


def explain(
    models: Sequence[Checkpoint],
    *,
    config: Mapping[str, Any],
    text: str = "",
    file: str = "",
    said: Sequence[str] = (),
    names: Sequence[str],
    evaluate: Evaluate,
) -> MergePlan:
    """For each tensor of the result, in order, how it is made. Raises as `merge` does."""
    stage = read_stage(config, text, file)
    jobs = _Ready.of(stage, models, names, evaluate).arrangement.jobs
    return MergePlan(tensors=tuple(_explained(job) for job in jobs))


def _explained(job: Job) -> Made:
    inputs = tuple(
        Input(model=found.model, tensor=found.name, is_base=i == job.base, parameters=dict(own))
        for i, (found, own) in enumerate(zip(job.inputs, job.of_each, strict=True))
    )
    method = "copy" if is_copied(job) else job.method.name
    return Made(tensor=job.name, method=method, inputs=inputs, parameters=dict(job.shared))


def read_stage(config: Mapping[str, Any], text: str = "", file: str = "") -> Stage:
    """The stage that `config` says, its models being names; raises `UsageError`, with lines where `text` has them."""
    shown = escape(file) if file else "merge"
    name = config.get("name")
    documents = read_documents(text, shown) if text else []
    lines = next((each.lines for each in documents if len(documents) == 1 or each.data.get("name") == name), {})
    stages = {each.data["name"] for each in documents if "name" in each.data} if len(documents) > 1 else ()
    return parse_stage(Document(config, shown, lines), References(lambda path: True, frozenset(stages)))


@dataclass(frozen=True)
class _Ready:
    """Models that are fit to be merged, and what is made of them."""

    donor: Checkpoint
    models: Mapping[str, Checkpoint]
    arrangement: Arrangement
    vocabulary: Vocabulary | None
    notes: Sequence[str]

    @classmethod
    def of(cls, stage: Stage, models: Sequence[Checkpoint], names: Sequence[str], evaluate: Evaluate) -> _Ready:
        given = dict(zip(names, models, strict=True))
        for place, found in stage.models.items():
            if found.model not in given:
                hint = f"there are {', '.join(map(escape, given))}"
                stage.document.fail(place, f"there is no model {escape(found.model)}", hint=hint)
        named = list(dict.fromkeys(found.model for found in stage.models.values()))
        idle = next((name for name in given if name not in named), None)
        if idle is not None:
            raise UsageError(f"{stage.document.shown}: no field names the model {escape(idle)}")
        for name in named:
            refuse_what_is_no_model(name, given[name])
        sources = {s.model.model for module in stage.modules for piece in module.slices for s in piece.sources}
        merging = {name: given[name] for name in (stage.donor.model, *named) if name in {*sources, stage.donor.model}}
        # Parts of models may be merged that have other parts besides, and are of another kind for that.
        is_whole = len(stage.modules) == 1
        notes = refuse_strangers(merging, same_layers=not stage.modules[0].is_sliced) if is_whole else []
        ready = {name: plain(given[name], stage.dtype, evaluate) for name in named}
        donor = ready[stage.donor.model]
        vocabulary = aligned(stage, ready, evaluate)
        if vocabulary is not None:
            for name, tensors in vocabulary.tensors.items():
                ready[name] = replace(ready[name], tensors={**ready[name].tensors, **tensors})
            notes += vocabulary.notes
        headed, said = with_heads({name: ready[name] for name in ready if name in sources})
        ready |= headed
        return cls(donor, ready, arrange(stage, ready), vocabulary, [*notes, *said])
