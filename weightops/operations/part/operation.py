"""Part: what belongs together in a model, cut out, put back, left out or added; no value is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.layouts.parts import Part
from weightops.operations.check import held_to_class
from weightops.operations.part.ends import Head, Init, with_head, with_mtp, without_mtp
from weightops.operations.part.text import grafted, text_part, tower

Droppable = Literal["mtp"]


def part(
    source: Checkpoint,
    graft: Checkpoint | None = None,
    mtp: Checkpoint | None = None,
    *,
    take: Part | None = None,
    drop: Sequence[Droppable] = (),
    head: Head | None = None,
    labels: int | None = None,
    init: Init = "zero",
    seed: int = 0,
) -> Checkpoint:
    """A part of a model alone, or the model with a part put in its place, left out or added; all else to the bit.

    `take`: "text" is the language model of one that also sees or hears, as its own class loads it; "vision" and
    "audio" are towers. `graft`: a language model that takes the place of the one in `source`. `drop`: "mtp" are the
    layers that predict further tokens. `mtp`: a model from which those are taken. `head`, `labels`, `init` and `seed`:
    see `with_head`.

    The edits are made in this order. The result is held against transformers' class for it. Raises `UsageError` for
    what cannot be meant, `IncompatibleInputs` for models that do not belong together.
    """
    for role, each in {"the source": source, "the graft": graft, "the model with further layers": mtp}.items():
        if each is not None:
            refuse_parts(each)
            refuse_delta(each, role)
            refuse_adapter(each, role)
    if not (take or drop or head) and graft is None and mtp is None:
        raise UsageError("nothing is to be done", hint="--take, --graft, --drop, --mtp or --head says what")
    if take is not None and graft is not None:
        raise UsageError("a part is taken or put back, not both", hint="take two steps")
    if head is None and (labels is not None or init != "zero" or seed):
        raise UsageError("labels, init and seed are those of a new head", hint="--head classifier --labels 2")
    result = source
    if take is not None:
        result = text_part(result) if take == "text" else tower(result, take)
    if graft is not None:
        result = grafted(result, graft)
    if drop:
        result = without_mtp(result)
    if mtp is not None:
        result = with_mtp(result, mtp)
    if head is not None:
        result = with_head(result, head, labels, init, seed)
    try:
        return held_to_class(result, source)
    except IncompatibleInputs as error:
        if mtp is not None:
            error.hint = (
                "transformers passes over such layers under the numbers of the published model alone: keep its "
                "number of layers, or leave them out, with num_nextn_predict_layers 0 (--drop mtp)"
            )
        raise
