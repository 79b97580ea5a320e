"""Surgery: parts of models cut out and put back, mixtures of experts edited or made, tensors edited by steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from weightops.api.outputs import Output, one, split_output
from weightops.errors import UsageError
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.io.yaml_document import Document, read_document
from weightops.recipes.editing import with_sources
from weightops.recipes.execute import Result, execute
from weightops.recipes.merging import Expanded, read_text
from weightops.recipes.planning import StrPath, several
from weightops.recipes.recipe import Destination, Recipe, location, place_of, plain_step
from weightops.recipes.steps import Location, Step
from weightops.stores.places import as_out

if TYPE_CHECKING:
    from weightops.layouts.experts import Layout
    from weightops.layouts.parts import Part
    from weightops.operations.experts import By, Keep
    from weightops.operations.part import Droppable, Head, Init


def edit(
    source: StrPath,
    out: StrPath,
    *,
    steps: Sequence[Mapping[str, Any]] = (),
    other: Mapping[str, StrPath] = {},
    set: Mapping[str, Any] = {},
    unset: str | Sequence[str] = (),
    tokenizer: str | None = None,
    architecture: bool = True,
    **output: Unpack[Output],
) -> Result:
    """Change tensors and settings by steps; see `weightops.operations.edit`.

    `source` is the model, or a YAML file with an `edit` block and its `sources`, which says all but where `other`
    sources lie: places by name, of what the steps mention.
    """
    files, running = split_output(output)
    for option, mapping in (("set", set), ("other", other)):
        if not isinstance(mapping, Mapping):
            raise UsageError(f"{option} is a {type(mapping).__name__}, expected a mapping")
    odd = next((name for name, place in other.items() if not isinstance(place, str | os.PathLike)), None)
    if odd is not None:
        raise UsageError(f"other: {escape(str(odd))} is a {type(other[odd]).__name__}, expected a place")
    named = {name: os.fspath(place) for name, place in other.items()}
    config = {"set": dict(set), "unset": list(several(unset))}
    if os.fspath(source).endswith((".yml", ".yaml")):
        if steps or set or unset or tokenizer is not None:
            raise UsageError(
                f"{escape(os.fspath(source))} says what is edited, and how", hint="write it into the file, under edit"
            )
        document, folder = read_document(read_text(Path(source)), escape(os.fspath(source))), Path(source).parent
    else:
        given = {"source": os.fspath(source), "steps": list(steps), "config": config, "tokenizer": tokenizer}
        document, folder = Document({"edit": {k: v for k, v in given.items() if v is not None}}, "edit"), Path()
    places, step = _edit(document, folder, named, architecture)
    recipe = Recipe(places, {"result": step}, {os.fspath(as_out(out)): Destination("result", {}, files)}, document)
    return execute(recipe, running)[as_out(out)]


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
    source: StrPath | None,
    out: StrPath,
    *,
    layout: Layout | None = None,
    keep: Keep | None = None,
    count: int | None = None,
    by: By | None = None,
    per_token: int | None = None,
    ungroup: bool = False,
    from_dense: StrPath | Mapping[str, Any] | None = None,
    seed: int | None = None,
    **output: Unpack[Output],
) -> Result:
    """Stack the experts of a mixture or take them apart, keep some of them, or make a mixture of dense models.

    For the last `source` is None, and `from_dense` mergekit-moe's file, or a mapping of the same fields: its places of
    models count from the working directory, as mergekit has it; `org/name` that is no folder here is on the hub. See
    `weightops.operations.experts`.
    """
    from weightops.operations.experts import parse_keep, with_names

    if keep is not None:
        # What a file says, so that its path is no part of what made the result.
        keep, count, by = parse_keep(keep, count=count, by=by, ungroup=ungroup), None, None
    options: dict[str, Any] = {"layout": layout, "keep": keep, "count": count, "by": by}
    options |= {"per_token": per_token, "ungroup": ungroup, "seed": seed}
    if from_dense is None:
        if source is None:
            raise UsageError("there is no model to edit", hint="weightops experts SOURCE --layout stacked --out DIR")
        return one("experts", {"source": source}, out, output, options)
    if source is not None:
        raise UsageError("from_dense makes a mixture of the models in its file, and has no source to edit")
    if not isinstance(from_dense, Mapping | str | os.PathLike):
        raise UsageError(f"from_dense is a {type(from_dense).__name__}, expected a mapping or the path of a file")
    document = from_dense if isinstance(from_dense, Mapping) else _document(from_dense)
    where = "the mixture" if isinstance(from_dense, Mapping) else escape(os.fspath(from_dense))
    named, places = with_names(document, where, os.path.exists)
    options["from_dense"] = named("source" if len(places) == 1 else "source-{}")
    return one("experts", {"source": places}, out, output, options)


def _document(path: StrPath) -> Mapping[str, Any]:
    return read_document(read_text(Path(path)), escape(os.fspath(path))).data


def _edit(
    document: Document, folder: Path, other: Mapping[str, str], architecture: bool
) -> tuple[dict[str, Location], Step]:
    """Sources and step of a document with an `edit` and maybe `sources`; places in it count from `folder`.

    `other` are places by name that stand for those in it. Raises `UsageError` with lines.
    """
    for name in document.data:
        if name not in ("sources", "edit"):
            document.fail((name,), "unknown field", hint="such a file has sources and edit")
    if "edit" not in document.data:
        document.fail((), "has no edit", hint="edit: {source: ./model, steps: [...]}")
    known = {
        name: location(document, name, value, folder)
        for name, value in document.mapping(("sources",), document.data.get("sources", {})).items()
    }
    known |= {name: Location(place) for name, place in other.items()}
    given, found = with_sources(
        document, ("edit",), document.data["edit"], known, Expanded(), lambda text: place_of(text, folder)
    )
    named = {given["source"], *given.get("other", ())}
    unused = sorted(known.keys() - named)
    if unused:
        document.fail(("sources", unused[0]), "is used by no step", hint=f"used are {listed(named)}")
    if not architecture:
        given["architecture"] = False
    return {**known, **found}, plain_step(document, (), "edit", given, {*known, *found})
