"""weightops run"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import weightops
from weightops.cli.colour import say
from weightops.cli.options import executor, job_options, run_options
from weightops.cli.output import print_json, running, warn
from weightops.cli.params import WRITE_CODES, Command, epilog


@click.command("run", cls=Command, epilog=epilog(WRITE_CODES))
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@run_options
@job_options
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

    Steps are recover, diff, convert, shard, cast, merge-lora, extract-lora, dequantize, pack and repack, with the
    options of those commands. Outputs take the options of cast, and those that say how files are written. Paths count
    from the folder of the recipe.
    """
    # Imported here because help and completion do without them.
    from weightops.cli.results import show_job, show_result, what_a_recipe_does
    from weightops.recipes.recipe import read_recipe
    from weightops.recipes.report import run_json

    parsed = read_recipe(recipe)
    options["executor"] = executor(options["executor"], options["workers"])
    with running(quiet) as control:
        results = weightops.run(parsed, control=control, **options)
    if as_json:
        print_json(run_json(results.values(), options["workers"]))
        return
    if options["dry_run"]:
        say(what_a_recipe_does(parsed, results, options["workers"]))
    first = next(iter(results.values()))
    if first.job is not None and first.manifest is None:
        warn(warning for result in results.values() for warning in result.warnings)
        if not quiet:
            show_job(first.job, first.groups or 0)
        return
    for result in results.values():
        if options["dry_run"] and not result.skipped:
            warn(result.warnings)
        else:
            show_result(result, False, quiet, options["workers"])
