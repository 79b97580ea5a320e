"""Experts: mixtures stacked or apart, with fewer experts, or made of dense models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.formats.adapter.files import refuse_adapter
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.io.escape import escape
from weightops.layouts.experts import PER_TOKEN, Layout, find_blocks, find_family, stated, with_numbers
from weightops.lazy import Evaluate
from weightops.operations.check import held_to_class
from weightops.operations.experts.arrange import arranged
from weightops.operations.experts.dense import mixture
from weightops.operations.experts.keep import Keep, kept, parse_keep
from weightops.operations.experts.use import By


def experts(
    source: Sequence[Checkpoint],
    *,
    layout: Layout | None = None,
    keep: Keep | None = None,
    count: int | None = None,
    by: By | None = None,
    per_token: int | None = None,
    ungroup: bool = False,
    from_dense: Mapping[str, Any] | None = None,
    seed: int | None = None,
    names: Sequence[str] = (),
    evaluate: Evaluate,
) -> Checkpoint:
    """A mixture of experts, edited: everything else in it is carried to the bit.

    `layout`: "stacked" puts the experts of a layer into one tensor for gate and up and one for down, as transformers 5
    holds them; "separate" takes them apart, as most families are published. `keep`: which experts to keep, see
    `Keep`; of a file with scores the `count` best of each layer `by` REAP's score, or by frequency. `ungroup`: see
    `kept`. `per_token`: how many experts a token takes from now on. `from_dense`: a document in
    mergekit-moe's language, whose models are `source`, by `names`; see `mixture`; `seed` is that of random routers.

    The result is held against transformers' class for it. Raises `UsageError` for what cannot be meant or done,
    `IncompatibleInputs` for models that do not go together, `CorruptInput` for experts that are not all there.
    """
    for each in source:
        refuse_parts(each)
        refuse_delta(each, "the source")
        refuse_adapter(each, "the source")
    if from_dense is not None:
        if (layout, keep, count, by, per_token) != (None,) * 5 or ungroup:
            raise UsageError("a mixture is made of dense models first, and edited then", hint="take two steps")
        return held_to_class(mixture(dict(zip(names, source, strict=True)), from_dense, seed, evaluate))
    if seed is not None:
        raise UsageError("a seed is that of random routers, and none is made", hint="leave out --seed")
    if len(source) != 1:
        raise UsageError(f"{len(source)} models are named, and one is edited", hint="name one")
    (model,) = source
    if (layout, keep, count, by, per_token) == (None,) * 5:
        raise UsageError("nothing is to be done", hint="--layout, --keep, --per-token or --from-dense says what")
    if keep is None and (count, by) != (None, None):
        raise UsageError("--count and --by choose by a file of scores", hint="--keep names it")
    lists = None if keep is None else parse_keep(keep, count=count, by=by, ungroup=ungroup)
    blocks = find_blocks(model)
    result = model
    if per_token is not None:
        result = _per_token(result, per_token, max(block.count for block in blocks))
    if lists is not None:
        result = kept(result, blocks, lists, ungroup=ungroup)
        blocks = find_blocks(result)
    if layout is not None:
        family = find_family(result, blocks)
        result = result.with_tensors(arranged(result, blocks, family, layout))
        moved = sum(block.count for block in blocks if bool(block.stacks) != (layout == "stacked"))
        result = result.did(
            f"experts: {moved} in {len(blocks)} layers are {layout} now" if moved else f"experts: were {layout} already"
        )
    return held_to_class(result, model)


def _per_token(source: Checkpoint, number: int, count: int) -> Checkpoint:
    config = source.config()
    known = stated(config, PER_TOKEN)
    if not known:
        raise UsageError(f"{escape(source.name)}: config.json does not say how many experts a token takes")
    if not 1 <= number <= count:
        raise UsageError(f"a token cannot take {number} experts", hint=f"the model has {count}")
    return source.with_config(lambda config: with_numbers(config, dict.fromkeys(known, number)))
