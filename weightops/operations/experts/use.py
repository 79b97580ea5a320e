"""How experts are used on a text, as `eval` measures it and `experts` keeps by it."""

from __future__ import annotations

from typing import Literal

import msgspec

from weightops.errors import UsageError
from weightops.io.brief import brief
from weightops.io.escape import escape
from weightops.layouts.experts import OF

By = Literal["reap", "frequency"]
"""What experts are kept by: the higher, the better."""


class LayerUse(msgspec.Struct, frozen=True, kw_only=True):
    """How the experts of a layer are used, each by its number.

    `frequency` is the share of tokens that are routed to an expert: together, as many as a token takes. `reap` is the
    mean, over these tokens, of the router's weight times the length (L2) of what the expert gives: g(x) * ||f(x)||
    (REAP, arXiv 2510.13999). It is 0 where no token came.
    """

    frequency: tuple[float, ...]
    reap: tuple[float, ...]


class ExpertUse(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-experts/1"):
    """What `eval --experts` writes and `experts --keep` reads: how a model's experts are used on a text.

    `tokens` were run, in windows of `seq_len`. `groups` is how many groups of experts routers choose among, 1 for all
    at once. `layers` are by their numbers.
    """

    model: str
    tokens: int
    seq_len: int
    groups: int
    layers: dict[str, LayerUse]

    __repr__ = brief


def best(use: ExpertUse, count: int, by: By, *, ungroup: bool, where: str) -> dict[str, int | list[int]]:
    """Lists by layer of the `count` best experts of each, with the number `of` experts that they are chosen from.

    Of equals the one with the lower number is kept. Where routers choose among groups every group keeps as many, unless
    `ungroup`. Raises `UsageError` for a count that cannot be, and for files that say different things of a layer.
    """
    totals = {name: len(layer.reap) for name, layer in use.layers.items()}
    odd = [name for name, layer in use.layers.items() if len(layer.frequency) != len(layer.reap)]
    if not totals or odd or len(set(totals.values())) > 1:
        what = f"says different things of layer {escape(odd[0])}" if odd else "has no layers of as many experts each"
        raise UsageError(f"{where}: {what}", hint="`weightops eval --experts` writes such files")
    total, groups = next(iter(totals.values())), 1 if ungroup else use.groups
    if not 1 <= count <= total:
        raise UsageError(f"{where}: of {total} experts {count} cannot be kept", hint=f"--count is 1 to {total}")
    if groups < 1 or total % groups or count % groups:
        raise UsageError(
            f"{where}: routers choose among {groups} groups of experts, and {count} of {total} cannot be kept of all "
            "groups alike",
            hint=f"give a --count that {groups} divides; or --ungroup, which changes the routing",
        )
    size = total // groups

    def chosen(values: tuple[float, ...]) -> list[int]:
        found: list[int] = []
        for first in range(0, total, size):
            # `sorted` leaves equals in their order.
            ranked = sorted(range(first, first + size), key=lambda i: -values[i])
            found += ranked[: count // groups]
        return sorted(found)

    return {OF: total, **{name: chosen(getattr(layer, by)) for name, layer in use.layers.items()}}
