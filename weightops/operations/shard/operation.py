"""Shard: the same bytes in other files, under other names, in fewer or more layers; no value is ever decoded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.formats.delta import refuse_delta
from weightops.formats.folder import refuse_parts
from weightops.io.escape import escape
from weightops.io.names import listed, matching
from weightops.layouts.embeddings import embeddings_and_heads
from weightops.layouts.layer_config import TEXT_CONFIGS
from weightops.layouts.layers import with_names
from weightops.layouts.renamed import renamed, without_names
from weightops.lazy import LazyTensor
from weightops.operations.shard.layers import keep_layers
from weightops.ops.arrange import Agreed

_TIE = "tie_word_embeddings"
_MAX_LISTED = 50


def shard(
    source: Checkpoint,
    *,
    rename: Mapping[str, str] = {},
    drop_prefix: str | None = None,
    add_prefix: str | None = None,
    drop: Sequence[str] = (),
    tie: bool = False,
    untie: bool = False,
    layers: str | None = None,
) -> Checkpoint:
    """The tensors of `source`, to the bit, edited by name; without options as they are, for other files.

    The edits are made in this order, each on the names that the one before it gave:

    `drop`: globs of tensors to leave out. `drop_prefix`: taken off the names that begin with it. `rename`: regular
    expressions and what to put in their place, in order, as Python's `re.sub` does: wherever a name holds the
    expression (`^` and `$` stand for its ends), with `\\1` for groups. They are the user's own, and may take as long as
    they like. `add_prefix`: put before every name. `layers`: which layers to keep, in which order; see
    `keep_layers`. `tie`: leave the output embedding out, and say in config.json that it is
    the input embedding; both must be equal, which is checked before anything is written. `untie`: write the input
    embedding once more as the output embedding, and say in config.json that it is a tensor of its own.

    Raises `UsageError` for edits that cannot be meant, `IncompatibleInputs` for embeddings of different shapes or
    types. Embeddings that differ in values are found when the plan is run.
    """
    refuse_parts(source)
    if tie and untie:
        raise UsageError("embeddings are tied or untied, not both", hint="leave out --tie or --untie")
    if not (rename or drop or tie or untie or drop_prefix is not None or add_prefix is not None or layers is not None):
        return source
    refuse_delta(source, "the source")
    if source.documents:
        raise UsageError(f"{escape(source.name)}: a delta's tensors are not edited", hint="edit the models themselves")
    result = _without(source, drop) if drop else source
    if drop_prefix is not None:
        result = _without_prefix(result, drop_prefix)
    for pattern, replacement in rename.items():
        result = _replaced(result, pattern, replacement)
    if add_prefix is not None:
        result = renamed(result, {name: f"{add_prefix}{name}" for name in result})
    if layers is not None:
        result = keep_layers(result, layers)
    if tie:
        result = _tied(result)
    return _untied(result) if untie else result


def _without(source: Checkpoint, globs: Sequence[str]) -> Checkpoint:
    unused = [glob for glob in globs if not matching(source, [glob])]
    if unused:
        raise UsageError(
            f"{escape(source.name)}: no tensor is named like {escape(unused[0])}, which is to be left out",
            hint="weightops inspect shows the names; * stands for any characters, dots included",
        )
    dropped = matching(source, globs)
    if len(dropped) == len(source):
        raise UsageError(f"{escape(source.name)}: all {len(source)} tensors would be left out")
    return without_names(source, dropped, "matches --drop").warned(f"left out: {listed(dropped, _MAX_LISTED)}")


def _without_prefix(source: Checkpoint, prefix: str) -> Checkpoint:
    others = [name for name in source if not name.startswith(prefix)]
    if len(others) == len(source):
        raise UsageError(
            f"{escape(source.name)}: no tensor's name begins with {escape(prefix)!r}",
            hint=f"names are like {escape(next(iter(source), ''))!r}",
        )
    result = renamed(source, {name: name.removeprefix(prefix) for name in source})
    if not others:
        return result
    return result.warned(f"not under {escape(prefix)}, and named as before: {listed(others, _MAX_LISTED)}")


def _replaced(source: Checkpoint, pattern: str, replacement: str) -> Checkpoint:
    try:
        compiled = re.compile(pattern)
        names = {name: compiled.sub(replacement, name) for name in source}
    except (re.error, IndexError, OverflowError) as error:
        raise UsageError(
            f"cannot rename '{escape(pattern)}' to '{escape(replacement)}': {escape(str(error))}",
            hint="a regular expression of Python and its replacement; \\. is a dot, \\1 the first group",
        ) from None
    if not any(compiled.search(name) for name in source):
        raise UsageError(
            f"{escape(source.name)}: no tensor's name holds '{escape(pattern)}'",
            hint="edits are made one after the other; weightops inspect shows the names before the first",
        )
    return renamed(source, names)


def _tied(source: Checkpoint) -> Checkpoint:
    _check_can_tie(source)
    pairs = [(i, o) for i, outputs in embeddings_and_heads(source) for o in outputs if o in source]
    embedding, head = _only(source, pairs, "no output embedding beside an input embedding, known by their names")
    if source[embedding].spec != source[head].spec:
        raise IncompatibleInputs(
            f"{escape(source.name)}: {escape(embedding)} is {source[embedding].spec}, {escape(head)} is "
            f"{source[head].spec}: they cannot be tied",
            hint="the model has two embeddings: leave --tie out",
        )
    result = without_names(source, [head], f"tied to {embedding}, which holds the same")
    if source[embedding] != source[head]:
        problem, hint = f"{source.name}: {head} cannot be tied to {embedding}", "leave --tie out"
        agreed = LazyTensor.make(Agreed(problem, "incompatible", hint), source[embedding], source[head])
        result = replace(result, watch=(*source.watch, agreed))
    return _with_tie(result, True)


def _untied(source: Checkpoint) -> Checkpoint:
    _check_can_tie(source)
    found = [(i, outputs) for i, outputs in embeddings_and_heads(source)]
    embedding, heads = _only(source, found, "no input embedding that is known by its name")
    present = next((head for head in heads if head in source), None)
    if present is not None:
        raise UsageError(f"{escape(source.name)}: has an output embedding already, {escape(present)}")
    return _with_tie(with_names(source, [*((name, name) for name in source), (heads[0], embedding)]), False)


def _check_can_tie(source: Checkpoint) -> None:
    config = source.config()
    if not config:
        raise UsageError(
            f"{escape(source.name)}: has no config.json, which says whether embeddings are tied",
            hint="give the folder that the weights are in",
        )
    if config.get("is_encoder_decoder") is True:
        raise UsageError(f"{escape(source.name)}: encoder-decoders tie more than two embeddings, and are not edited")


def _only(source: Checkpoint, found: Sequence[tuple[str, Any]], nothing: str) -> tuple[str, Any]:
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{escape(source.name)}: cannot tell which embeddings are meant: {listed(name for name, _ in found)}"
        )
    raise UsageError(
        f"{escape(source.name)}: there is {nothing}", hint="known are model.embed_tokens and lm_head, and their like"
    )


def _with_tie(checkpoint: Checkpoint, tied: bool) -> Checkpoint:
    """config.json for embeddings that are tied or not, in the part for the language model too if there is one."""

    def edit(config: dict[str, Any]) -> dict[str, Any]:
        parts = {key: {**config[key], _TIE: tied} for key in TEXT_CONFIGS if isinstance(config.get(key), dict)}
        return {**config, _TIE: tied, **parts}

    return checkpoint.with_config(edit)
