"""Compare: what one checkpoint is to another, tensor by tensor, from one pass over both.

Layouts, prefixes of names, files, containers and number types are no differences: both are brought to what they have in
common first. Whatever has no partner is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.values import values as values_of
from weightops.errors import UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.operations.compare.alignment import align
from weightops.operations.compare.config import config_changes
from weightops.operations.compare.measure import Measured, measure
from weightops.operations.compare.relation import findings, relation
from weightops.operations.compare.report import Comparison, count_kinds
from weightops.operations.compare.tokenizer import tokenizer_changes
from weightops.ops.measures.difference import angle


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    tolerance: float | None = None,
    strict: bool = False,
    workers: int | None = None,
    control: Control | None = None,
) -> Comparison:
    """How `b` differs from `a`: every tensor, the configuration, the tokenizer.

    Each tensor of both is read once, by one thread per core unless `workers` says otherwise; twice more where that
    leaves a doubt about a low rank. With a `tolerance` the result says whether the two differ beyond it: by
    ||B - A|| / ||A|| of any tensor, by a NaN or an infinity that one of them has alone, by rows that one has more, or
    by a tensor without a partner; with `strict` also by configuration that changes results, or the tokenizer.

    Raises `UsageError` for a tolerance that is none and for adapters and deltas, `CorruptInput` for tensors that cannot
    be read, `Differs` for files on servers or in a cache whose digest is wrong.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(f"the tolerance is {tolerance}, expected a number from zero on")
    if strict and tolerance is None:
        raise UsageError("strict says what counts as a difference, for which there is no tolerance", hint="give one: 0")
    for role, checkpoint in (("A", a), ("B", b)):
        refuse_delta(checkpoint, role)
        refuse_adapter(checkpoint, role)
    control = control or Control()
    aligned = align(a, b, control)
    config, config_notes = config_changes(aligned.a, aligned.b, partial(values_of, control=control))
    tokenizer, tokenizer_notes = tokenizer_changes(*aligned.words)
    measured = measure(aligned.pairing.pairs, workers, control)
    tensors = tuple(map(aligned.change, measured))
    lone = tuple(aligned.lone)
    relative, one_minus_cosine = _whole(measured)
    result = Comparison(
        a=a.name,
        b=b.name,
        relation=relation(tensors, lone, relative, one_minus_cosine),
        findings=tuple(findings(tensors, lone, config, tokenizer)),
        relative=relative,
        angle=one_minus_cosine,
        kinds=count_kinds(tensors),
        tensors=tensors,
        lone=lone,
        config=tuple(config),
        tokenizer=tuple(tokenizer),
        notes=(*aligned.notes, *config_notes, *tokenizer_notes),
    )
    return result.held(tolerance, strict=strict)


def _whole(measured: Sequence[Measured]) -> tuple[float | None, float | None]:
    """||B - A|| / ||A|| and 1 - cosine of all tensors taken as one vector; None where they mean nothing."""
    found = [each.found for each in measured if each.found is not None and not each.is_repeated]
    a, d = (math.sqrt(sum(n * n for n in norms)) for norms in ([f.norm_a for f in found], [f.norm_d for f in found]))
    relative = d / a if a and math.isfinite(a) and math.isfinite(d) else None if d else 0.0
    return relative, angle(a, sum(each.dot for each in found), d)
