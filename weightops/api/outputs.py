"""Writing results: of one operation, a recipe, or checkpoints that are open; and the options that all writing has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.formats.places import is_remote
from weightops.io.escape import escape
from weightops.io.yaml_document import Document
from weightops.recipes.execute import Result, Running, RunningHere, execute, write_all
from weightops.recipes.planning import Files, StrPath, Wanted
from weightops.recipes.recipe import FILE_FIELDS, Recipe, one_step, parse_recipe, read_recipe
from weightops.recipes.steps import Location
from weightops.stores.places import Out, as_out


class Output(Files, Running, total=False):
    """How to write a result: what of its files (`Files`), and how (`Running`)."""


class OutputHere(Files, RunningHere, total=False):
    """The same, of what only this process can do."""


def run(recipe: StrPath | Mapping[str, Any] | Recipe, **running: Unpack[Running]) -> dict[Out, Result]:
    """Carry out a recipe: a YAML file, the same as a mapping, or a `Recipe`; results by output folder.

    All outputs are written from one read of the sources, and appear when all are whole.
    """
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(Document(recipe, "recipe"))
    elif not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe))
    return execute(recipe, running)


def save(checkpoint: Checkpoint, out: StrPath, **output: Unpack[Output]) -> Result:
    """Write any checkpoint, opened or derived, to a folder, with index, sidecars and manifest."""
    files, running = split_output(output)
    return write_all({as_out(out): _wanted(checkpoint, files)}, running)[as_out(out)]


def save_all(outputs: Mapping[StrPath, tuple[Checkpoint, Files]], **running: Unpack[Running]) -> dict[Out, Result]:
    """Write several checkpoints, each to its folder: what they share is read and computed once."""
    wanted = {as_out(out): _wanted(checkpoint, files) for out, (checkpoint, files) in outputs.items()}
    return write_all(wanted, running)


def _wanted(checkpoint: Checkpoint, files: Files) -> Wanted:
    return Wanted(checkpoint, files, {"operation": "save", "from": checkpoint.name}, {})


def split_output(output: Output | OutputHere, known: type = Output) -> tuple[Files, Running]:
    """What of the keywords is about files, and what about the run."""
    unknown = next((name for name in output if name not in known.__annotations__), None)
    if unknown is not None:
        raise TypeError(f"unexpected keyword argument {unknown!r}; outputs take {', '.join(known.__annotations__)}")
    files = {name: value for name, value in output.items() if name in FILE_FIELDS and value is not None}
    running = {name: value for name, value in output.items() if name not in FILE_FIELDS}
    return files, running  # type: ignore[return-value]  # both are parts of `Output`


def one(
    verb: str,
    sources: Mapping[str, StrPath | Sequence[StrPath]],
    out: StrPath,
    output: Output,
    options: Mapping[str, Any],
    weights: str | None = None,
) -> Result:
    """Carry out one operation; `weights` says which files of the sources to go by."""
    given = {
        role: Location(os.fspath(source), weights)
        if isinstance(source, str | os.PathLike)
        else tuple(Location(os.fspath(each), weights) for each in source)
        for role, source in sources.items()
    }
    files, running = split_output(output)
    (result,) = execute(one_step(verb, given, options, os.fspath(as_out(out)), files), running).values()
    return result


def local(path: StrPath) -> Path:
    """A path on this machine; raises `UsageError` for a URL, which `Path` would quietly take for one."""
    if is_remote(path):
        raise UsageError(f"{escape(os.fspath(path))}: expected a folder on this machine", hint="weightops download")
    return Path(path)
