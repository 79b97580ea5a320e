"""Merging models: by a merge file, or by a method and its parameters; what is made of what; and the proof."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import yaml

from weightops.api.comparison import Comparisons, compare
from weightops.api.outputs import Output, split_output
from weightops.engine.control import Control
from weightops.engine.digest import digest_tensors
from weightops.errors import UsageError
from weightops.formats.folder import open_checkpoint
from weightops.io.escape import escape
from weightops.io.yaml_document import Document
from weightops.recipes.execute import Result, derive, execute
from weightops.recipes.merging import OPTIONS, as_document, expand, read_text
from weightops.recipes.planning import StrPath
from weightops.recipes.recipe import Destination, Recipe
from weightops.recipes.steps import Location
from weightops.recipes.verbs import find_verb
from weightops.stores.places import as_out

if TYPE_CHECKING:
    from weightops.operations.merge import MergePlan, MergeProof

Models = StrPath | Sequence[StrPath | Mapping[str, Any]]
"""A merge file; or models, each a place or mergekit's `{"model": ..., "parameters": {...}}`."""
_DOCUMENT = ("method", "base", "parameters", "dtype", "out_dtype", "tokenizer_source", "chat_template")
_RESULT = "result"


class Merging(TypedDict, total=False):
    """How to merge.

    Models that are not in a merge file: `method`, `base`, `parameters` by name for all models, and mergekit's `dtype`,
    `out_dtype`, `tokenizer_source` and `chat_template`. Of any: `seed` of random masks; `allow_nonfinite` merges NaN
    and infinities instead of refusing them; `plugin` is a Python file with more methods, which is run.
    """

    method: str | None
    base: StrPath | None
    parameters: Mapping[str, Any]
    dtype: str | None
    out_dtype: str | None
    tokenizer_source: str | None
    chat_template: str | None
    seed: int
    allow_nonfinite: bool
    plugin: StrPath | None


class MergeOptions(Merging, Output, total=False):
    """How to merge, and how to write the result."""


def merge(models: Models, out: StrPath, **options: Unpack[MergeOptions]) -> Result:
    """Merge models by mergekit's methods; see `weightops.operations.merge`.

    `models` is a merge file in mergekit's language, or the models themselves, with `method` and its parameters. Places
    in a merge file count from the working directory, as mergekit has it.
    """
    merging = {name: value for name, value in options.items() if name in Merging.__annotations__}
    files, running = split_output({n: v for n, v in options.items() if n not in merging})  # type: ignore[arg-type]
    recipe = _recipe(models, merging)
    return execute(_to(recipe, os.fspath(as_out(out)), files), running)[as_out(out)]


def explain_merge(models: Models, *, control: Control | None = None, **merging: Unpack[Merging]) -> MergePlan:
    """What would be done for each tensor of the result: its inputs, the method, and its parameters."""
    from weightops.operations.merge import explain

    recipe = _recipe(models, merging)
    step = recipe.steps[_RESULT]
    with derive(recipe, control or Control(), without=_RESULT) as made:
        names = step.inputs["models"]
        verb = find_verb("merge")
        options = {name: verb.option(name, step.options[name]) for name in ("config",)}
        given = [made.checkpoints[name] for name in names]
        return explain(given, names=names, evaluate=made.evaluate, **options, **step.given)


def verify_merge(
    models: Models,
    folder: StrPath,
    *,
    workers: int | None = None,
    control: Control | None = None,
    **merging: Unpack[Merging],
) -> MergeProof:
    """Whether `folder` holds what this merge makes, bit for bit; nothing is written."""
    from weightops.operations.merge import prove

    control = control or Control()
    recipe = _recipe(models, merging)
    with derive(recipe, control) as made:
        found = open_checkpoint(os.fspath(folder), control.stores)
        expected = made.checkpoints[_RESULT]
        plugin = recipe.steps[_RESULT].options.get("plugin")
        return prove(expected, found, lambda tensors: digest_tensors(tensors, workers, control), plugin)


def compare_merge(
    models: Models,
    folder: StrPath,
    *,
    workers: int | None = None,
    control: Control | None = None,
    **merging: Unpack[Merging],
) -> Comparisons:
    """How far the merged model in `folder` is from each of the models that it was made of; see `weightops.compare`."""
    recipe = _recipe(models, merging)
    with derive(recipe, control or Control(), without=_RESULT) as made:
        others = [made.checkpoints[name] for name in recipe.steps[_RESULT].inputs["models"]]
        return compare(folder, others, workers=workers, control=control)


def _recipe(models: Models, merging: Mapping[str, Any]) -> Recipe:
    """The recipe that a merge is, without an output."""
    from weightops.operations.merge import References, parse_stage, parse_stages
    from weightops.ops.merging.plugin import load_plugin

    plugin = merging.get("plugin")
    digest = load_plugin(Path(plugin)) if plugin is not None else None
    said = {name: merging[name] for name in _DOCUMENT if merging.get(name)}
    if isinstance(models, str | os.PathLike):
        if said:
            raise UsageError(
                f"{escape(os.fspath(models))}: {min(said)} has no use beside a merge file, which says all",
                hint="write it into the file, or name the models to be merged instead",
            )
        text = read_text(Path(models))
        stages: Sequence[Any] = parse_stages(text, escape(os.fspath(models)), os.path.exists)
    else:
        if "method" not in said:
            raise UsageError("there is no method to merge by", hint="for example --method slerp, or a merge file")
        document = _ordered(as_document({**said, "models": [_plain(model) for model in models]}))
        stages = [parse_stage(Document(document, "merge"), References(os.path.exists))]
        text = _as_text(document)
    options = {name: merging[name] for name in OPTIONS if merging.get(name)}
    options |= {"plugin": digest} if digest else {}
    found = expand(stages, text, _RESULT, options, locate=Location)
    return Recipe(found.sources, found.steps, {}, Document({}, "merge"))


def _to(recipe: Recipe, out: str, files: Mapping[str, Any]) -> Recipe:
    return Recipe(recipe.sources, recipe.steps, {out: Destination(_RESULT, {}, files)}, recipe.document)


def _plain(value: Any) -> Any:
    """With texts for paths."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _ordered(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with texts for paths, in mergekit's usual order."""
    data = _plain(document)
    order = ("merge_method", "base_model", "models", "parameters")
    return {**{name: data[name] for name in order if name in data}, **data}


def _as_text(document: Mapping[str, Any]) -> str:
    """The document as YAML; raises `UsageError` for what YAML has no words for."""
    try:
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    except yaml.representer.RepresenterError as error:
        odd = escape(repr(error.args[-1]))
        raise UsageError(f"expected numbers, texts and lists of them, found {odd}") from None
