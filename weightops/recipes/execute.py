"""Running a recipe: open the sources, derive, plan every output, and write all of them from one read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, get_args

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.finished import find_made
from weightops.engine.run import run_all
from weightops.engine.staging import Staging
from weightops.engine.values import values
from weightops.engine.work_folder import WorkFolder
from weightops.errors import UsageError
from weightops.formats.choose import WEIGHT_SUFFIXES as _FILES
from weightops.formats.containers import CONTAINERS, without_place
from weightops.formats.folder import open_adapter, open_checkpoint, open_files
from weightops.formats.proofs import checksums
from weightops.formats.proofs import manifest as manifest_format
from weightops.formats.proofs.manifest import Manifest
from weightops.formats.proofs.published import find_manifest
from weightops.formats.sidecars import left_behind
from weightops.io.brief import brief
from weightops.io.escape import escape
from weightops.io.notebook import card, in_units
from weightops.lazy import Evaluate, LazyTensor
from weightops.ops.merging.doubt import doubts
from weightops.ops.stored import without_shared_checks
from weightops.plan import DEFAULT_SHARD_NBYTES, Expectation, Plan, make_plan, parse_size, sources_of
from weightops.recipes.observe import observe
from weightops.recipes.recipe import Recipe
from weightops.recipes.steps import Location, Step
from weightops.recipes.verbs import find_verb
from weightops.stores.stores import Stores

_LOG = logging.getLogger(__name__)
CARD = "README.md"
_OPENERS = {frozenset({"adapter"}): open_adapter, frozenset({"tokenizer"}): open_files}
"""How sources are opened that are taken as one thing alone."""
_SINGLE = (".gguf", ".dat")
"""What of containers may be an output by itself."""
StrPath = str | os.PathLike[str]


Item = TypeVar("Item", str, float, StrPath)


def several(given: Item | Iterable[Item]) -> tuple[Item, ...]:
    """What was given where there may be several: one by itself counts as one, not as its letters."""
    return (given,) if isinstance(given, str | os.PathLike | int | float) else tuple(given)


class Files(TypedDict, total=False):
    """How a checkpoint is laid out in files.

    `format`: safetensors, torch (byte-identical to torch.save) or torch-1.12 (to that of 2022 and 2023).
    `max_shard_size`: bytes, `"5GB"`, or `"source"` for the grouping of the source's files.
    `expect`: a manifest, checksum list or published name that the result must match to be published.
    `digest`: more algorithms to record per file than xxh3_128. `card`: write a model card, README.md.
    `reflink`: share the blocks of unchanged tensors with the source where the file system can (btrfs, XFS); headers are
    padded for that, so that files are not byte-identical to those of `save_file`.
    """

    format: str
    max_shard_size: str | int
    expect: StrPath | None
    digest: str | Sequence[str]
    card: bool
    reflink: bool


IfExists = Literal["fail", "skip"]


class Running(TypedDict, total=False):
    """How to write.

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


@dataclass(frozen=True)
class Result:
    """What was written, or with `dry_run` would be: then `manifest` is None.

    `skipped` if it was there already, and with `if_exists="skip"` was left alone.
    """

    out: Path
    plan: Plan
    manifest: Manifest | None
    resumed: tuple[str, ...]
    warnings: tuple[str, ...]
    skipped: bool = False
    done: tuple[str, ...] = ()
    """What operations do to make it, a sentence each."""

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
class Wanted:
    """A checkpoint to be written, to a folder or one file; the sources it comes from by role; how it was made.

    `beside` is a folder in which a part of it was made, which nobody needs when it is written.
    `provenance` is what the manifest is to say of that if the plan does not tell; see `weightops.engine.finished`.
    """

    checkpoint: Checkpoint
    files: Files
    recipe: Mapping[str, Any]
    sources: Mapping[str, Checkpoint]
    is_file: bool = False
    beside: WorkFolder | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)


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


def execute(recipe: Recipe, running: Running) -> dict[Path, Result]:
    """Make all that the recipe says; results by folder. Raises any of `weightops.errors`."""
    control = running.get("control") or Control()
    running = {**running, "control": control}
    with derive(recipe, control) as made:
        wanted = {}
        for folder, destination in recipe.outputs.items():
            checkpoint = made.checkpoints[destination.name]
            if destination.cast:
                cast = Step("cast", {"source": (destination.name,)}, destination.cast)
                checkpoint = _apply(cast, made.checkpoints, made.evaluate, control.stores)
            behind = recipe.behind(destination.name)
            origins = {role: source for role, source in made.sources.items() if role in behind}
            files: Files = {**destination.files}  # type: ignore[typeddict-item]  # checked when the recipe was read
            wanted[Path(folder)] = Wanted(checkpoint, files, recipe.to_json(folder), origins)
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


def write_all(wanted: Mapping[Path, Wanted], running: Running) -> dict[Path, Result]:
    """Plan all outputs, and unless it is a dry run write them."""
    wanted = {out: _as_file(each, out) if out.suffix in _named(each) else each for out, each in wanted.items()}
    plans = {out: _plan(each, out) for out, each in wanted.items()}
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
    with control.stores.connected():
        outcomes = run_all(
            missing,
            workers=running.get("workers"),
            overwrite=running.get("overwrite", False),
            restart=running.get("restart", False),
            control=control,
            beside={out: each.beside for out, each in wanted.items() if each.beside is not None},
        )
    for out, done in zip(missing, outcomes, strict=True):
        warnings = (*said[out], *done.warnings, *doubts(done.manifest.notes))
        results[out] = replace(
            results[out], out=done.out, manifest=done.manifest, resumed=done.resumed, warnings=warnings
        )
    return results


def _made(plans: Mapping[Path, Plan], running: Running) -> dict[Path, Manifest]:
    """Of outputs that are there and may be left alone the manifests."""
    if not may_skip(running):
        return {}
    found = {out: find_made(out, plan, may_differ=running.get("overwrite", False)) for out, plan in plans.items()}
    made = {out: manifest for out, manifest in found.items() if manifest is not None}
    for out in made if not running.get("dry_run") else ():
        Staging.clean_up_after(out)
    return made


def may_skip(running: Running) -> bool:
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


def _named(wanted: Wanted) -> tuple[str, ...]:
    """How names of files end, and those of folders do not."""
    return (*_FILES, ".dat") if wanted.checkpoint.container == "imatrix.dat" else _FILES


def _as_file(wanted: Wanted, out: Path) -> Wanted:
    """The same, to be written as the single file `out`; raises `UsageError` for what needs a folder."""
    checkpoint = wanted.checkpoint
    made = CONTAINERS[_container(checkpoint.container, wanted.files.get("format"))].suffix
    if out.suffix != made or made not in _SINGLE:
        raise UsageError(
            f"{escape(str(out))} is the name of a file, and this writes a folder of {made} files with what goes along",
            hint=f"name a folder: --out {escape(str(out.with_suffix('')))}",
        )
    if wanted.files.get("max_shard_size") not in (None, "source"):
        raise UsageError(
            f"{escape(str(out))} is one file, which has no largest size",
            hint=f"name a folder for its parts: --out {escape(str(out.with_suffix('')))}",
        )
    if wanted.files.get("card"):
        raise UsageError("a model card needs a folder", hint="leave out --card, or name a folder: --out DIR")
    left = ", ".join(map(escape, checkpoint.sidecars))
    said = (f"a single file has no place for {left}: left out; --out DIR takes them along",) if left else ()
    return replace(
        wanted,
        checkpoint=replace(checkpoint, prefix=out.stem, sidecars={}, warnings=(*checkpoint.warnings, *said)),
        is_file=True,
    )


def _plan(wanted: Wanted, out: Path) -> Plan:
    checkpoint, files = wanted.checkpoint, wanted.files
    recipe = dict(wanted.recipe)
    if checkpoint.dropped:
        recipe["dropped"] = dict(checkpoint.dropped)
    checkpoint, origins = observe(checkpoint, wanted.sources)
    container = _container(checkpoint.container, files.get("format"))
    size = files.get("max_shard_size")
    if size not in (None, "source") and (checkpoint.in_one_file or not CONTAINERS[container].is_divided):
        raise UsageError(
            f"{escape(str(out))}: what is written here is not divided by size", hint="leave out --max-shard-size"
        )
    is_whole = container in CONTAINERS and CONTAINERS[container].is_whole
    default = "source" if is_whole else DEFAULT_SHARD_NBYTES
    expect = files.get("expect")
    if files.get("card"):
        checkpoint = replace(checkpoint, sidecars={n: s for n, s in checkpoint.sidecars.items() if n != CARD})
    plan = make_plan(
        checkpoint,
        recipe,
        container=container,
        max_shard_nbytes=_limit("source" if checkpoint.in_one_file else size or default),
        digests=several(files.get("digest", ())),
        expect=read_expectation(expect) if expect is not None else None,
        origins=origins,
        reflink=files.get("reflink", False),
        is_file=wanted.is_file,
    )
    plan = replace(plan, provenance=wanted.provenance)
    if not files.get("card"):
        return plan
    from weightops.recipes.card import card, quantization_of  # imported here because few runs write one

    names = {origin.role: origin.name for origin in origins}
    readme = card(
        out.name,
        recipe,
        names,
        files=plan.shard_nbytes,
        warnings=checkpoint.warnings,
        quantization=quantization_of(checkpoint.config()),
    )
    return replace(plan, documents=(*plan.documents, readme))


def _limit(size: str | int) -> int | None:
    """Bytes per file; None for the grouping that the checkpoint has."""
    return None if size == "source" else size if isinstance(size, int) else parse_size(size)


def _container(own: str | None, wanted: str | None) -> str:
    """The container that a layout demands, or else the one that is wanted; raises `UsageError` if they differ."""
    if own is None or wanted in (None, own):
        return own or wanted or "safetensors"
    if (own, wanted) == ("torch", "torch-1.12"):
        return wanted
    raise UsageError(f"this layout is always written as {own} files, not {wanted}", hint="leave out --format")


def read_expectation(name_or_path: StrPath) -> Expectation:
    """What a manifest of ours (its tensors) or a checksum list (its files) demands of an output."""
    path = find_manifest(os.fspath(name_or_path))
    if path.suffix == ".json":
        found = manifest_format.read_manifest(path)
        return Expectation(path.name, {}, {n: t.xxh3_128 for n, t in found.tensors.items()})
    return Expectation(path.name, checksums.read_checksums(path).by_file(), {})
