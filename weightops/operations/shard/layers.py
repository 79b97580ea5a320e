"""Layers: which layers of a model to keep, in which order; by names and config.json alone, no value is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from weightops.checkpoint import Checkpoint
from weightops.errors import UsageError
from weightops.formats.modules import last_part
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.layouts.layer_config import MAX_LAYERS, edit_config, renumbered
from weightops.layouts.layers import NUMBERED, PACKED_LAYERS, Stack, find_stack, with_names
from weightops.operations.shard.held import hold
from weightops.operations.shard.silent import silenced
from weightops.ops.arrange import concat, cut

_MAX_COPIES = 100


def parse_layers(text: str, count: int) -> tuple[list[int], frozenset[int]]:
    """The numbers in `0-15,20-31`, in that order, and the places of those that `=` stands behind, as in `0-3,3=,4-7`.

    Raises `UsageError` unless each is that of one of `count` layers.
    """
    chosen: list[int] = []
    silent: set[int] = set()
    for part in text.split(","):
        matched = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?(=)?\s*", part, re.ASCII)
        if matched is None:
            raise UsageError(f"cannot read the layers {part!r} of {text!r}", hint="write them as 0-15,20-31 or 0,2,4")
        first, last = int(matched[1]), int(matched[2] or matched[1])
        if first > last:
            raise UsageError(f"the layers {part.strip()} go backwards", hint="name them one by one: 3,2,1")
        if last >= count:
            raise UsageError(f"there is no layer {last}: the model has {count}, 0 to {count - 1}")
        if matched[3]:
            silent |= set(range(len(chosen), len(chosen) + last + 1 - first))
        chosen += range(first, last + 1)
        if len(chosen) > MAX_LAYERS:
            raise UsageError(f"more than {MAX_LAYERS} layers")
    ((most, times),) = Counter(chosen).most_common(1)
    if times > _MAX_COPIES:
        raise UsageError(f"layer {most} is named {times} times, at most {_MAX_COPIES} are written")
    return chosen, frozenset(silent)


def keep_layers(source: Checkpoint, layers: str) -> Checkpoint:
    """The model with those of its layers that `layers` names, in that order and numbered anew; see `parse_layers`.

    A layer that is named twice is there twice (a "frankenmerge", or mergekit's passthrough), see `with_names`. Layers
    come in their new order, where the first of them was. One with `=` behind it is a copy that changes nothing until
    it is trained: what its blocks add to the residual is zero (LLaMA-Pro, Wu and others, 2401.02415).

    config.json gets the new number of layers, and its settings of single layers follow them; those that nobody here
    knows are named in a warning. Tensors with a part for each layer get those of the chosen ones. The result is held
    against transformers' class for config.json, see `layers_held.hold`.

    Raises `UsageError` for layers that are not there, models whose layers cannot be told and orders that the model's
    config.json has no way to describe, `IncompatibleInputs` if config.json and tensors disagree.
    """
    config = source.config()
    if not config and "params.json" in source.sidecars:
        raise UsageError(
            f"{escape(source.name)}: has params.json, which is not edited", hint="weightops convert --to hf first"
        )
    stack = find_stack(source, config, escape(source.name))
    chosen, silent = parse_layers(layers, stack.count - stack.n_mtp)
    order = [*chosen, *range(stack.count - stack.n_mtp, stack.count)]
    result = _with_parts(with_names(source, _renumbered(source, stack, order)), stack.count - stack.n_mtp, chosen)
    if silent:
        result = silenced(result, stack.prefix, silent)
    if not config:
        return result.warned(f"there is no config.json to say that the model has {len(chosen)} layers")
    edited, notes = edit_config(config, order, stack.n_mtp, f"{escape(source.name)}/config.json")
    if order != list(range(stack.count)):
        settings = {key: renumbered(value, stack.prefix, order) for key, value in edited.items()}
        edited = {key: value for key, (value, _) in settings.items()}
        named = [key for key, (_, is_left) in settings.items() if is_left]
        if named:
            notes.append(f"{escape(source.name)}/config.json: names layers by their old numbers, in {listed(named)}")
    result = result.with_config(lambda _: edited).warned(*notes)
    if order != list(range(stack.count)):
        hold(source, result, chosen)
    return result


def _with_parts(checkpoint: Checkpoint, count: int, chosen: Sequence[int]) -> Checkpoint:
    """With the parts of the chosen layers in tensors that hold one for each of `count` layers."""
    if list(chosen) == list(range(count)):
        return checkpoint
    tensors = dict(checkpoint.tensors)
    for name, tensor in checkpoint.items():
        module, _, leaf = name.rpartition(".")
        axis, shape = PACKED_LAYERS.get(last_part(module)), tensor.spec.shape
        if axis is None:
            continue
        if leaf != "weight" or len(shape) != 2 or shape[axis] % count:
            raise UsageError(
                f"{escape(name)} is {tensor.spec}: it holds a part for each of {count} layers, and is not taken apart",
                hint="edit the model before it is quantised",
            )
        width = shape[axis] // count
        tensors[name] = concat([cut(tensor, axis, layer * width, (layer + 1) * width) for layer in chosen], axis)
    digests = {name: found for name, found in checkpoint.digests.items() if tensors[name] is checkpoint[name]}
    return replace(checkpoint, tensors=tensors, digests=digests)


def _renumbered(names: Iterable[str], stack: Stack, order: Sequence[int]) -> list[tuple[str, str]]:
    """Pairs of new and old names: the layers in their new order, where the first of them was."""
    pairs: list[list[tuple[str, str]]] = [[], [], []]
    rests: dict[int, list[str]] = {}
    for name in names:
        matched = NUMBERED.fullmatch(name)
        if matched and matched["prefix"] == stack.prefix:
            rests.setdefault(int(matched["number"]), []).append(matched["rest"])
        else:
            pairs[2 if rests else 0].append((name, name))
    for new, old in enumerate(order):
        pairs[1] += [(f"{stack.prefix}.{new}.{rest}", f"{stack.prefix}.{old}.{rest}") for rest in rests[old]]
    return list(chain(*pairs))
