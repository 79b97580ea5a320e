"""Surgery: parts of models cut out and put back, mixtures of experts edited or made, tensors edited by steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from weightops.api.outputs import Output, local, one, split_output
from weightops.io.escape import escape
from weightops.io.yaml_document import read_document
from weightops.recipes.execute import Result, StrPath, execute
from weightops.recipes.merging import read_text
from weightops.recipes.recipe import one_step
from weightops.recipes.steps import Location

if TYPE_CHECKING:
    from weightops.layouts.experts import Layout
    from weightops.layouts.parts import Part
    from weightops.operations.part import Droppable, Head, Init


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
    keep: str | Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    per_token: int | None = None,
    ungroup: bool = False,
    **output: Unpack[Output],
) -> Result:
    """Stack the experts of a mixture or take them apart, or keep some of them; see `weightops.operations.experts`."""
    options = {"layout": layout, "keep": _kept(keep), "per_token": per_token, "ungroup": ungroup}
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


def _kept(keep: str | Sequence[int] | Mapping[str, Sequence[int]] | None) -> Any:
    """Lists of experts; what a file says, so that its path is no part of what made the result."""
    from weightops.operations.experts import parse_keep

    return parse_keep(keep) if isinstance(keep, str) else keep
