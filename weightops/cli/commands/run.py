"""weightops run"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from weightops import api
from weightops.cli.meter import human
from weightops.cli.options import run_options
from weightops.cli.output import print_json, running, table, warn
from weightops.cli.params import WRITE_CODES, Command, epilog
from weightops.cli.results import show_result
from weightops.engine.limits import peak_memory
from weightops.engine.preflight import default_workers, free_disk
from weightops.engine.proof import fetched_nbytes
from weightops.io.escape import escape
from weightops.recipes.execute import Result
from weightops.recipes.recipe import Recipe, read_recipe
from weightops.recipes.report import run_json


@click.command("run", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@run_options
def command(recipe: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Carry out a recipe: several steps and several results, in one go.

    A recipe is a YAML file. It names sources, what is made of them, and the folders that results go to. Nothing is
    written between the steps, and what several results have in common is read and computed once. They appear when all
    are complete; if the command is interrupted, the same command continues.

    \b
    Example:
      weightops run ./release.yaml --dry-run
      weightops run ./release.yaml

    \b
    A recipe that recovers a model, merges an adapter into it, and writes three folders:
      sources:  {raw: ./llama-13b, diff: hf://org/zhixi-13b-diff, lora: ./lora}
      tensors:
        base:   {recover: {raw: raw, diff: diff}}
        chat:   {merge-lora: {base: base, adapter: lora}}
      outputs:
        ./zhixi:          {from: base, format: torch-1.12, max_shard_size: 10GB, expect: zhixi-13b-base}
        ./zhixi-chat:     {from: chat, dtype: bfloat16, max_shard_size: 5GB}
        ./zhixi-chat-f16: {from: chat, dtype: float16}

    Steps are recover, diff, convert, shard, cast, merge-lora, extract-lora, dequantize and pack, with the options of
    those commands. Outputs take the options of cast, and those that say how files are written. Paths count from the
    folder of the recipe.
    """
    parsed = read_recipe(recipe)
    with running(quiet) as control:
        results = api.run(parsed, control=control, **options)
    if as_json:
        print_json(run_json(results.values(), options["workers"]))
        return
    if options["dry_run"]:
        click.echo(_dry_run_text(parsed, results, options["workers"]))
    for result in results.values():
        if options["dry_run"]:
            warn(result.warnings)
        else:
            show_result(result, False, quiet, options["workers"])


def _dry_run_text(recipe: Recipe, results: Mapping[Path, Result], workers: int | None) -> str:
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
        written.append(
            (escape(str(out)), escape(destination.name), escape(cast), str(count), nbytes, human(free_disk(out)))
        )
    files = {file: None for plan in plans for file in plan.sources}
    read = f"reads    {human(sum(f.nbytes for f in files))} from {len(files)} files"
    if fetched := sum(map(fetched_nbytes, plans)):
        read += f", {human(fetched)} over the network"
    memory = human(peak_memory(plans, workers or default_workers(plans)))
    total = human(sum(plan.total_nbytes for plan in plans))
    tables = [table(sources, right=(2, 3))]
    tables += [table(steps)] if len(steps) > 1 else []
    tables += [table(written, right=(3, 4, 5)), f"{read}\nwrites   {total}\nmemory   at most {memory}"]
    return "\n\n".join(tables)
