"""What writing commands say of their results."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from weightops.cli.colour import say
from weightops.cli.meter import duration, human
from weightops.cli.output import print_json, table, warn
from weightops.engine.estimate import read_rate
from weightops.engine.limits import peak_memory
from weightops.engine.preflight import default_workers, free_disk
from weightops.engine.proof import fetched_nbytes
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.ops.measures.loss import Loss
from weightops.recipes.execute import Result
from weightops.recipes.recipe import Recipe
from weightops.recipes.report import write_json
from weightops.stores.places import Out

SKIPPED = "is there, made by this very plan of these sources, and complete by the sizes of its files: skipped"
_SHOWN_LOSSES = 5


def show_result(result: Result, as_json: bool, quiet: bool, workers: int | None) -> None:
    """What a writing command says when it is done, or with --dry-run would do."""
    if not result.skipped:
        warn(result.warnings)
    if as_json:
        print_json(write_json(result, workers))
    elif result.skipped:
        if not quiet:
            say(f"{escape(str(result.out))}: {SKIPPED}")
    elif result.manifest is None and result.job is not None:
        if not quiet:
            show_job(result.job, result.groups or 0)
    elif result.manifest is None:
        say(_dry_run_text(result, workers))
    elif not quiet:
        nbytes, count = result.nbytes, len(result.plan.shards)
        kept = f", {len(result.resumed)} kept from before" if result.resumed else ""
        say(
            f"{escape(str(result.out))}: {len(result.manifest.tensors)} tensors, {human(nbytes)} in {count} files{kept}"
        )
        if result.manifest.losses:
            say(_loss_text(result.manifest.losses))
        energies = {name: note for name, note in result.manifest.notes.items() if "energy" in note}
        if energies:
            say(_energy_text(energies))
        errors = {name: note for name, note in result.manifest.notes.items() if {"error", "norm"} <= note.keys()}
        if errors:
            say(_error_text(errors))
        say(f"content {result.manifest.content_id}")


def show_job(place: str, groups: int) -> None:
    """What there is to do for a job that was written."""
    shown = escape(place)
    say(
        f"{shown}: {groups} groups to do, on any machine that sees the same files:\n"
        f"  weightops work {shown} --group K      for each K from 0 to {groups - 1}\n"
        f"  weightops finish {shown}"
    )


def _loss_text(losses: Mapping[str, Loss]) -> str:
    """What the casts lost: the sum, and the tensors with the gravest losses."""
    worst = sorted(losses.items(), key=lambda item: (-item[1].too_large, -item[1].flushed, -item[1].changed))
    rows: list[tuple[str, ...]] = []
    for name, loss in [("all tensors", sum(losses.values(), Loss())), *worst[:_SHOWN_LOSSES]]:
        counts = (loss.overflowed, loss.saturated, loss.flushed, loss.subnormal, loss.nan)
        share = f"{100 * loss.changed / max(1, loss.elements):.3g} %"
        rows.append((escape(name), share, *map(str, counts), f"{loss.max_relative_error:.2g}"))
    heads = ("cast", "changed", "to infinity", "clamped", "to zero", "subnormal", "NaN before", "largest error")
    return table([heads, *rows], right=range(1, 8))


def _energy_text(notes: Mapping[str, Mapping[str, float]]) -> str:
    """How much of each change an adapter's rank has captured: the mean, and the modules with least."""
    least = sorted(notes.items(), key=lambda item: item[1]["energy"])
    rows = [("module", "rank", "captured", "change")]
    rows += [
        (escape(n), f"{note['rank']:.0f}", f"{100 * note['energy']:.4g} %", f"{100 * note.get('change', 0):.3g} %")
        for n, note in least[:_SHOWN_LOSSES]
    ]
    mean = sum(note["energy"] for note in notes.values()) / len(notes)
    return f"{table(rows, right=(1, 2, 3))}\n{len(notes)} modules, {100 * mean:.4g} % captured on average"


def _error_text(notes: Mapping[str, Mapping[str, float]]) -> str:
    """How far an adapter is from what it stands for: over all modules, and those that are farthest."""
    most = sorted(notes.items(), key=lambda item: -item[1]["error"])
    rows = [("module", "rank", "off by")]
    rows += [(escape(n), f"{note['rank']:.0f}", f"{100 * note['error']:.3g} %") for n, note in most[:_SHOWN_LOSSES]]
    off, whole = (sum(x * x for x in each) for each in _norms(notes.values()))
    share = f"{100 * math.sqrt(off / whole):.3g} %" if whole else "nothing"
    return f"{table(rows, right=(1, 2))}\n{len(notes)} modules, off by {share} of the exact change"


def _norms(notes: Collection[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """The norms of what is off, and of the exact changes."""
    return [note["error"] * note["norm"] for note in notes], [note["norm"] for note in notes]


def _dry_run_text(result: Result, workers: int | None) -> str:
    plan = result.plan
    rows = [("file", "tensors", "size")]
    rows += [(s.name, str(len(s.tensors)), human(plan.shard_nbytes[s.name])) for s in plan.shards]
    rows += [("total", str(sum(1 for _ in plan.tensors)), human(plan.total_nbytes))]
    memory = peak_memory([plan], workers or default_workers([plan]))
    fetched = fetched_nbytes(plan)
    network = f", {human(fetched)} over the network" if fetched else ""
    most = "at most " if plan.least_nbytes < plan.total_nbytes else ""
    return "\n".join(
        [
            table(rows, right=(1, 2)),
            "",
            f"reads    {human(sum(f.nbytes for f in plan.sources))} from {len(plan.sources)} files{network}",
            *_time(plan.sources),
            f"memory   at most {human(memory)}",
            f"disk     {most}{human(plan.total_nbytes)}{_free(result.out)}",
            f"others   {', '.join(map(escape, sorted(plan.sidecars))) or 'none'}",
            *(f"{'does' if not i else '':<8} {sentence}" for i, sentence in enumerate(result.done)),
        ]
    )


def _free(out: Out) -> str:
    """The room where an output goes, if that is known."""
    return f" of {human(free_disk(out))} free" if isinstance(out, Path) else " in a bucket"


def _time(files: Collection[SourceFile]) -> list[str]:
    """How long it takes at least to read files, if there is a rate to go by."""
    rate = None if any(file.is_remote for file in files) else read_rate(files)
    if rate is None:
        return []
    least_s = sum(file.nbytes for file in files) / rate
    return [f"time     at least {duration(least_s)} at {human(rate)}/s, as fast as this disk was read just now"]


def what_a_recipe_does(recipe: Recipe, results: Mapping[Out, Result], workers: int | None) -> str:
    """What would be read, done and written."""
    plans = [result.plan for result in results.values()]
    origins = {origin.role: origin for plan in plans for origin in plan.origins}
    sources: list[Sequence[str]] = [("source", "from", "tensors", "size")]
    for role, place in recipe.sources.items():
        own = origins[role]
        sources.append((escape(role), escape(place.path), str(len(own.tensors)), human(own.nbytes)))
    steps: list[Sequence[str]] = [("tensors", "operation", "of", "with")]
    for name in recipe.order():
        step = recipe.steps[name]
        inputs = ", ".join(escape(each) for names in step.inputs.values() for each in names)
        said = ", ".join(f"{key} {value}" for key, value in step.said.items())
        steps.append((escape(name), step.verb, inputs, escape(said)))
    written: list[Sequence[str]] = [("output", "from", "cast", "files", "size", "disk free")]
    for (out, result), destination in zip(results.items(), recipe.outputs.values(), strict=True):
        cast = ", ".join(str(value) for value in destination.cast.values()) or "as it is"
        count, nbytes = len(result.plan.shards), human(result.plan.total_nbytes)
        free = human(free_disk(out)) if isinstance(out, Path) else ""
        written.append((escape(str(out)), escape(destination.name), escape(cast), str(count), nbytes, free))
    files = {file: None for plan in plans for file in plan.sources}
    read = f"reads    {human(sum(f.nbytes for f in files))} from {len(files)} files"
    if any(plan.is_remote for plan in plans):
        read += f", {human(sum(map(fetched_nbytes, plans)))} over the network"
    memory = human(peak_memory(plans, workers or default_workers(plans)))
    total = human(sum(plan.total_nbytes for plan in plans))
    tables = [table(sources, right=(2, 3))]
    tables += [table(steps)] if len(steps) > 1 else []
    tables += [table(written, right=(3, 4, 5))]
    tables += ["\n".join([read, *_time(files), f"writes   {total}", f"memory   at most {memory}"])]
    return "\n\n".join(tables)
