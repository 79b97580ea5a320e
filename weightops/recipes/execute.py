"""Running a recipe: open the sources, derive, plan every output, and write all of them from one read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.finished import find_made
from weightops.engine.job.drive import Executor, Threads
from weightops.engine.preflight import default_workers
from weightops.engine.run import run_all
from weightops.engine.staging import Staging
from weightops.engine.values import values
from weightops.errors import UsageError
from weightops.formats.containers import without_place
from weightops.formats.folder import open_adapter, open_checkpoint, open_files
from weightops.formats.proofs.manifest import Manifest
from weightops.formats.sidecars import left_behind
from weightops.io.brief import brief
from weightops.io.escape import escape
from weightops.io.notebook import card, in_units
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.merging.doubt import doubts
from weightops.ops.stored import without_shared_checks
from weightops.plan import Plan, sources_of
from weightops.recipes.jobs import executor_of, place_of_job, write_as_job
from weightops.recipes.planning import Files, StrPath, Wanted, as_file, is_file, plan_of
from weightops.recipes.recipe import Recipe
from weightops.recipes.steps import Location, Step
from weightops.recipes.verbs import find_verb
from weightops.stores.places import Out, as_out
from weightops.stores.stores import Stores

_LOG = logging.getLogger(__name__)
_OPENERS = {frozenset({"adapter"}): open_adapter, frozenset({"tokenizer"}): open_files}
"""How sources are opened that are taken as one thing alone."""
IfExists = Literal["fail", "skip"]


class RunningHere(TypedDict, total=False):
    """How to write, by this process.

    `workers`: shards in work at once. `overwrite`: replace an existing output once the new one is whole. `if_exists`:
    with "skip" an output that the same plan has made, of sources that hold what they held, is left alone if it is
    whole, so that the same call may be made again; anything else there is refused, or overwritten if it may be.
    `restart`: throw a partial output of another plan away. `dry_run`: plan only. `control`: progress and stop, and the
    `web` to read sources on servers through; one with defaults is opened if it has none.
    """

    workers: int | None
    overwrite: bool
    if_exists: IfExists
    restart: bool
    dry_run: bool
    control: Control | None


class Running(RunningHere, total=False):
    """How to write, by whomever.

    `job`: write what is to be done into this folder, for workers on any machine (`weightops.work`, `weightops.finish`).
    `executor`: have it done at once, by "threads" here or by "dask:ADDRESS", the workers of a Dask cluster.
    """

    job: StrPath | None
    executor: str | Executor | None


@dataclass(frozen=True)
class Result:
    """What was written, or with `dry_run` would be: then `manifest` is None.

    `skipped` if it was there already, and with `if_exists="skip"` was left alone. `job` is where the job lies that
    makes it, of so many `groups`; unless an executor has done it, there is no `manifest` yet.
    """

    out: Out
    plan: Plan
    manifest: Manifest | None
    resumed: tuple[str, ...]
    warnings: tuple[str, ...]
    skipped: bool = False
    done: tuple[str, ...] = ()
    """What operations do to make it, a sentence each."""
    job: str | None = None
    groups: int | None = None

    __repr__ = brief

    @property
    def file_nbytes(self) -> dict[str, int]:
        """Bytes of the weight files by name; of compressed ones that are not written yet the most they can have."""
        made = self.manifest
        return {n: made.files[n].nbytes if made else nbytes for n, nbytes in self.plan.shard_nbytes.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files, as `file_nbytes` has them."""
        return sum(self.file_nbytes.values())

    def _repr_html_(self) -> str:
        rows = [(name, in_units(nbytes)) for name, nbytes in self.file_nbytes.items()]
        facts = {"files": len(rows), "size": in_units(self.nbytes), "warnings": len(self.warnings)}
        title = f"{self.out}{'' if self.manifest else ' (not written: a dry run)'}"
        return card(title, facts, ("file", "size"), rows, what="files")


@dataclass(frozen=True)
class Derived:
    """What a recipe's sources and steps are, by name; `sources` are those that were opened."""

    checkpoints: Mapping[str, Checkpoint]
    sources: Mapping[str, Checkpoint]
    evaluate: Evaluate


@contextmanager
def derive(recipe: Recipe, control: Control, without: str | None = None) -> Iterator[Derived]:
    """Open the sources and apply the steps, but for the step `without`; places are open for the length of a block."""
    with control.stores.connected() as stores:
        made = {}
        for name, place in recipe.sources.items():
            opener = _OPENERS.get(frozenset(recipe.roles(name)), open_checkpoint)
            made[name] = opener(place.path, stores, place.weights)
            _log_opened(name, place, made[name])
        sources, evaluate = dict(made), _evaluate(control)
        for name in recipe.order():
            if name != without:
                made[name] = _apply(recipe.steps[name], made, evaluate, stores)
        yield Derived(made, sources, evaluate)


def execute(recipe: Recipe, running: Running) -> dict[Out, Result]:
    """Make all that the recipe says; results by folder. Raises any of `weightops.errors`."""
    control = running.get("control") or Control()
    running = {**running, "control": control}
    if running.get("job") is not None:
        recipe = recipe.absolute()
    with derive(recipe, control) as made:
        wanted: dict[Out, Wanted] = {}
        for folder, destination in recipe.outputs.items():
            checkpoint = made.checkpoints[destination.name]
            if destination.cast:
                cast = Step("cast", {"source": (destination.name,)}, destination.cast)
                checkpoint = _apply(cast, made.checkpoints, made.evaluate, control.stores)
            behind = recipe.behind(destination.name)
            origins = {role: source for role, source in made.sources.items() if role in behind}
            files: Files = {**destination.files}  # type: ignore[typeddict-item]  # checked when the recipe was read
            wanted[as_out(folder)] = Wanted(checkpoint, files, recipe.to_json(folder), origins)
        return write_all(wanted, running)


def _apply(step: Step, made: Mapping[str, Checkpoint], evaluate: Evaluate, stores: Stores) -> Checkpoint:
    """The checkpoint that a step makes, with the warnings of all that went into it."""
    verb = find_verb(step.verb)
    inputs: dict[str, Any] = {}
    for role, names in step.inputs.items():
        inputs[role] = [made[name] for name in names] if verb.roles[role] else made[names[0]]
    options = {name: verb.option(name, value) for name, value in step.options.items()}
    sources = [name for names in step.inputs.values() for name in names]
    known = {"evaluate": evaluate, "stores": stores, "names": sources, **step.given}
    supplied = {name: known[name] for name in verb.supplied if name in known}
    result = verb.function(**inputs, **options, **supplied)
    of = ", ".join(map(escape, sources))
    by = "".join(f", {escape(name)} {escape(str(value))}" for name, value in step.said.items())
    _LOG.info("%s of %s%s: %d tensors", step.verb, of, by, len(result))
    said = [warning for name in sources for warning in made[name].warnings]
    before = [sentence for name in sources for sentence in made[name].done]
    # What lay beside a source says nothing of what was made of it.
    return replace(
        result,
        warnings=tuple(dict.fromkeys((*said, *result.warnings))),
        done=tuple(dict.fromkeys((*before, *result.done))),
        folder=None,
    )


def _log_opened(name: str, place: Location, found: Checkpoint) -> None:
    files = sources_of(found.values())
    listed = ", ".join(f"{escape(file.name)} ({file.nbytes:,} bytes)" for file in files)
    _LOG.info("opened %s as %s: %d tensors in %s", escape(place.path), escape(name), len(found), listed or "no file")


def _evaluate(control: Control) -> Evaluate:
    def evaluate(tensors: Sequence[LazyTensor]) -> list[bytes]:
        return values([without_shared_checks(tensor) for tensor in tensors], control)

    return evaluate


def write_all(wanted: Mapping[Out, Wanted], running: Running) -> dict[Out, Result]:
    """Plan all outputs, and unless it is a dry run write them."""
    executor = executor_of(running.get("executor"), running.get("workers"))
    wanted = {out: as_file(each, out) if is_file(each, out) else each for out, each in wanted.items()}
    plans = {out: plan_of(each, out) for out, each in wanted.items()}
    for out, plan in plans.items():
        count, others = len(plan.shards), ", ".join(map(escape, sorted(plan.sidecars))) or "nothing"
        nbytes, mark = f"{plan.total_nbytes:,}", plan.fingerprint[:12]
        _LOG.info(
            "%s: %d weight files of %s bytes, beside them %s; plan %s", escape(str(out)), count, nbytes, others, mark
        )
    said = {out: (*each.checkpoint.warnings, *_without_place(each, plans[out])) for out, each in wanted.items()}
    results = {
        out: Result(out, plan, None, (), said[out], done=wanted[out].checkpoint.done) for out, plan in plans.items()
    }
    results |= {out: replace(results[out], manifest=made, skipped=True) for out, made in _made(plans, running).items()}
    if running.get("dry_run"):
        return results
    missing = {out: plan for out, plan in plans.items() if not results[out].skipped}
    control = running.get("control") or Control()
    place = place_of_job(running.get("job"), executor, missing)
    if place is not None:
        results |= _as_job(place, missing, results, executor or _here(running, missing.values()), control, running)
        for beside in (each.beside for out, each in wanted.items() if results[out].manifest is not None):
            if beside is not None:
                beside.remove()
        return results
    with control.stores.connected():
        outcomes = run_all(
            {Path(out): plan for out, plan in missing.items()},
            workers=running.get("workers"),
            overwrite=running.get("overwrite", False),
            restart=running.get("restart", False),
            control=control,
            beside={Path(out): each.beside for out, each in wanted.items() if each.beside is not None},
        )
    for out, done in zip(missing, outcomes, strict=True):
        warnings = (*said[out], *done.warnings, *doubts(done.manifest.notes))
        results[out] = replace(
            results[out], out=done.out, manifest=done.manifest, resumed=done.resumed, warnings=warnings
        )
    return results


def _here(running: Running, plans: Iterable[Plan]) -> Executor | None:
    """Who does a job that nobody asked for: this process. One that was asked for is for others."""
    if running.get("job") is not None:
        return None
    return Threads(running.get("workers") or default_workers(list(plans)))


def _as_job(
    place: str,
    plans: Mapping[Out, Plan],
    results: Mapping[Out, Result],
    executor: Executor | None,
    control: Control,
    running: Running,
) -> dict[Out, Result]:
    made = write_as_job(
        place,
        plans,
        executor,
        control,
        workers=running.get("workers"),
        overwrite=running.get("overwrite", False),
        restart=running.get("restart", False),
    )
    shown = made.place if running.get("job") is not None else None
    found = {}
    for out in plans:
        manifest = made.manifests.get(out)
        said = doubts(manifest.notes) if manifest is not None else ()
        warnings = (*results[out].warnings, *made.warnings, *said)
        found[out] = replace(results[out], manifest=manifest, warnings=warnings, job=shown, groups=made.groups)
    return found


def _made(plans: Mapping[Out, Plan], running: Running) -> dict[Out, Manifest]:
    """Of outputs that are there and may be left alone the manifests."""
    if not may_skip(running):
        return {}
    may_differ = running.get("overwrite", False)
    control = running.get("control") or Control()
    with control.stores.connected() as stores:
        found = {out: find_made(out, plan, stores, may_differ=may_differ) for out, plan in plans.items()}
    made = {out: manifest for out, manifest in found.items() if manifest is not None}
    for out in made if not running.get("dry_run") else ():
        if isinstance(out, Path):
            Staging.clean_up_after(out)
    return made


def may_skip(running: RunningHere) -> bool:
    """Whether an output that is there and right may be left alone; raises `UsageError` for what is no answer."""
    chosen = running.get("if_exists", "fail")
    if chosen not in get_args(IfExists):
        raise UsageError(f"if_exists is {chosen!r}, expected one of {', '.join(get_args(IfExists))}")
    return chosen == "skip"


def _without_place(wanted: Wanted, plan: Plan) -> tuple[str, ...]:
    """What the checkpoint and the folders of its sources hold, and the output does not."""
    checkpoints = wanted.sources.values() or (wanted.checkpoint,)
    left = [sentence for checkpoint in checkpoints for sentence in left_behind(checkpoint)]
    return (*without_place(wanted.checkpoint.metadata, plan.container), *left)
