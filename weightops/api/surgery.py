"""Surgery: parts of models cut out and put back, mixtures of experts edited or made, tensors edited by steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from weightops.api.outputs import Output, local, one, split_output
from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.io.yaml_document import Document, read_document
from weightops.recipes.editing import with_sources
from weightops.recipes.execute import Result, StrPath, execute
from weightops.recipes.merging import Expanded, read_text
from weightops.recipes.recipe import Destination, Recipe, location, one_step, place_of, plain_step
from weightops.recipes.steps import Location, Step

if TYPE_CHECKING:
    from weightops.layouts.experts import Layout
    from weightops.layouts.parts import Part
    from weightops.operations.experts import By, Keep
    from weightops.operations.part import Droppable, Head, Init


def edit(
    steps: StrPath | Sequence[Mapping[str, Any]],
    out: StrPath,
    *,
    source: StrPath | None = None,
    sources: Mapping[str, StrPath] = {},
    config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    check: bool = True,
    **output: Unpack[Output],
) -> Result:
    """Change tensors and settings by steps; see `weightops.operations.edit`.

    `steps` is a YAML file with an `edit` block and its `sources`, or a list of steps, which are made of `source`.
    `sources` are places by name, of what the steps mention; in a file places count from its folder.
    """
    files, running = split_output(output)
    named = {name: os.fspath(place) for name, place in sources.items()}
    if isinstance(steps, str | os.PathLike):
        if source is not None or config is not None or tokenizer is not None:
            raise UsageError(f"{escape(os.fspath(steps))} says what is edited, and how", hint="write it into the file")
        places, step, document = _read_edit(Path(steps), named)
    else:
        if source is None:
            raise UsageError("there is no model to edit", hint="source= says which")
        given = {"source": os.fspath(source), "steps": list(steps), "config": config, "tokenizer": tokenizer}
        document = Document({"edit": {**{k: v for k, v in given.items() if v is not None}, "check": check}}, "edit")
        places, step, document = _parse_edit(document, Path(), named)
    recipe = Recipe(places, {"result": step}, {str(local(out)): Destination("result", {}, files)}, document)
    return execute(recipe, running)[local(out)]


def part(
    source: StrPath,
    out: StrPath,
    *,
    take: Part | None = None,
    graft: StrPath | None = None,
    drop: Droppable | Sequence[Droppable] = (),
    mtp: StrPath | None = None,
    head: Head | None = None,
    labels: int | None = None,
    init: Init = "zero",
    seed: int = 0,
    **output: Unpack[Output],
) -> Result:
    """Cut a part out of a model, put one in its place, or leave one out; see `weightops.operations.part`."""
    sources = {"source": source, "graft": graft, "mtp": mtp}
    options = {
        "take": take,
        "drop": (drop,) if isinstance(drop, str) else tuple(drop),
        "head": head,
        "labels": labels,
        "init": init,
        "seed": seed,
    }
    return one("part", {role: path for role, path in sources.items() if path is not None}, out, output, options)


def experts(
    source: StrPath,
    out: StrPath,
    *,
    layout: Layout | None = None,
    keep: Keep | None = None,
    count: int | None = None,
    by: By | None = None,
    per_token: int | None = None,
    ungroup: bool = False,
    **output: Unpack[Output],
) -> Result:
    """Stack the experts of a mixture or take them apart, or keep some of them; see `weightops.operations.experts`."""
    from weightops.operations.experts import parse_keep

    if keep is not None:
        # What a file says, so that its path is no part of what made the result.
        keep, count, by = parse_keep(keep, count=count, by=by, ungroup=ungroup), None, None
    options = {"layout": layout, "keep": keep, "count": count, "by": by, "per_token": per_token, "ungroup": ungroup}
    return one("experts", {"source": source}, out, output, options)


def experts_from_dense(
    mixture: StrPath | Mapping[str, Any], out: StrPath, *, seed: int | None = None, **output: Unpack[Output]
) -> Result:
    """Make a mixture of experts of dense models, as mergekit-moe's file says, or a mapping of the same fields.

    Its places of models count from the working directory, as mergekit has it; `org/name` that is no folder here is on
    the hub. See `weightops.operations.experts`.
    """
    from weightops.operations.experts import with_names

    document = mixture if isinstance(mixture, Mapping) else _document(mixture)
    where = "the mixture" if isinstance(mixture, Mapping) else escape(os.fspath(mixture))
    named, places = with_names(document, where, os.path.exists)
    files, running = split_output(output)
    recipe = one_step(
        "experts",
        {"source": tuple(Location(place) for place in places)},
        {"from_dense": named("source" if len(places) == 1 else "source-{}"), "seed": seed},
        str(local(out)),
        files,
    )
    return execute(recipe, running)[local(out)]


def _document(path: StrPath) -> Mapping[str, Any]:
    return read_document(read_text(Path(path)), escape(os.fspath(path))).data


def _read_edit(path: Path, sources: Mapping[str, str]) -> tuple[dict[str, Location], Step, Document]:
    """Sources and step of a file with an `edit` and maybe `sources`; places count from the file's folder.

    `sources` are places by name that stand for those in the file. Raises `SourceMissing`, `UsageError` with lines.
    """
    return _parse_edit(read_document(read_text(path), escape(str(path))), path.parent, sources)


def _parse_edit(
    document: Document, folder: Path, sources: Mapping[str, str]
) -> tuple[dict[str, Location], Step, Document]:
    """The same of a document; places count from `folder`."""
    for name in document.data:
        if name not in ("sources", "edit"):
            document.fail((name,), "unknown field", hint="such a file has sources and edit")
    if "edit" not in document.data:
        document.fail((), "has no edit", hint="edit: {source: ./model, steps: [...]}")
    known = {
        name: location(document, name, value, folder)
        for name, value in document.mapping(("sources",), document.data.get("sources", {})).items()
    }
    known |= {name: Location(place) for name, place in sources.items()}
    given, found = with_sources(
        document, ("edit",), document.data["edit"], known, Expanded(), lambda text: place_of(text, folder)
    )
    named = {given["source"], *given.get("others", ())}
    unused = sorted(known.keys() - named)
    if unused:
        document.fail(("sources", unused[0]), "is used by no step", hint=f"used are {listed(named)}")
    step = plain_step(document, (), "edit", given, {*known, *found})
    return {**known, **found}, step, document
