"""Layers as names tell them: the numbered modules that a model has most of, and tensors under other names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from weightops.checkpoint import Checkpoint
from weightops.errors import IncompatibleInputs, UsageError
from weightops.io.names import listed
from weightops.layouts.layer_config import OTHER_TOWERS, count_layers
from weightops.lazy import LazyTensor
from weightops.ops.elementwise import Reinterpret

NUMBERED = re.compile(r"(?P<prefix>(?:[^.]+\.)*?[^.]+)\.(?P<number>0|[1-9]\d{0,5})\.(?P<rest>.+)")
"""The outermost number in a name, with what stands before and after it."""
PACKED_LAYERS = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
"""Modules whose weight holds a part for each layer, side by side along this axis (Gemma 3n and 4)."""


@dataclass(frozen=True)
class Stack:
    """The layers of a model: tensors named `prefix.<number>.`, with numbers from 0 to `count`, exclusive.

    The last `n_mtp` of them predict further tokens, and are not counted in config.json.
    """

    prefix: str
    count: int
    n_mtp: int = 0


def find_stack(names: Iterable[str], config: Mapping[str, Any], where: str) -> Stack:
    """The layers that config.json counts, or without config.json the only ones there are.

    Names like `model.layers.3.mlp.experts.7.w1` count for the outermost number. Raises `UsageError` if there are none
    or several, `IncompatibleInputs` if their number is not that of config.json.
    """
    if config.get("is_encoder_decoder") is True:
        raise UsageError(f"{where}: layers of encoder-decoders are not edited")
    numbers: dict[str, set[int]] = {}
    for name in names:
        if matched := NUMBERED.fullmatch(name):
            numbers.setdefault(matched["prefix"], set()).add(int(matched["number"]))
    whole = {prefix: len(found) for prefix, found in numbers.items() if max(found) == len(found) - 1}
    if not whole:
        raise UsageError(f"{where}: no tensors are named <prefix>.<number>.<rest> with numbers from 0 without a gap")
    count, n_mtp = count_layers(config, where) if config else (None, 0)
    fitting = {p: n for p, n in whole.items() if count is None or n in (count, count + n_mtp)}
    main = {prefix: n for prefix, n in fitting.items() if not OTHER_TOWERS.search(prefix)} or fitting
    shown = listed([f"{prefix} ({n})" for prefix, n in (main or whole).items()])
    if not main:
        raise IncompatibleInputs(
            f"{where}: config.json says {count} layers, the tensors have {shown}",
            hint="are configuration and weights of one model?",
        )
    if len(main) > 1:
        raise UsageError(
            f"{where}: cannot tell which layers are meant: {shown}", hint="encoder-decoders are not edited"
        )
    ((prefix, found),) = main.items()
    return Stack(prefix, found, 0 if count is None else found - count)


def with_names(source: Checkpoint, names: Iterable[tuple[str, str]]) -> Checkpoint:
    """The tensors of `source` under other names, from pairs of new and old ones; the rest is left out.

    A tensor that is taken again is another tensor of the same bytes. Equal lazy tensors would be stored once in torch
    files, and transformers 5 makes parameters of what it loads, without copying: two layers that share their memory,
    of which training the one would change the other.
    """
    pairs = list(names)
    taken: Counter[str] = Counter()
    tensors: dict[str, LazyTensor] = {}
    for new, old in pairs:
        tensors[new] = copied(source[old], taken[old])
        taken[old] += 1
    return replace(
        source,
        tensors=tensors,
        shards={new: source.shards[old] for new, old in pairs if old in source.shards},
        digests={new: source.digests[old] for new, old in pairs if old in source.digests},
        total_size=None,
        content_id=None,
    )


def copied(tensor: LazyTensor, number: int) -> LazyTensor:
    """The same bytes as a tensor that equals neither the original, which is number 0, nor another copy."""
    for _ in range(number):
        tensor = LazyTensor.make(Reinterpret(tensor.spec.dtype, tensor.spec.shape), tensor)
    return tensor
