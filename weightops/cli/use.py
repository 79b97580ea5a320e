"""What of a model could go: how much its layers change, and how its experts are used, as lines of text."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from weightops.cli.output import table
from weightops.io.escape import escape

if TYPE_CHECKING:
    from weightops.inference.evaluate import Score
    from weightops.inference.figures import LayerFigures
    from weightops.operations.experts import LayerUse

_SPANS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""How many layers in a row are thought away; up to half of them, --json has all."""
_LOWEST = 4
"""Experts with the lowest scores that are shown; the file has all."""
_MOST = 0.9


def layers_text(score: Score) -> str:
    """Tables of block influence, and of the rows of layers that change the least."""
    assert score.layers is not None
    return f"{_influence(score.name, score.layers)}\n\n{_spans(score.layers)}"


def _influence(name: str, found: LayerFigures) -> str:
    order = sorted(range(len(found.influence)), key=lambda i: found.influence[i].value)
    places = {layer: place for place, layer in enumerate(order, start=1)}
    rows = [(f"{escape(name)}: layer", "block influence", "±", "from the least")]
    rows += [
        (str(i), f"{each.value:.5f}", f"{each.error:.2g}", str(places[i])) for i, each in enumerate(found.influence)
    ]
    return table(rows, right=(0, 1, 2, 3))


def _spans(found: LayerFigures) -> str:
    depth = len(found.influence)
    rows = [("layers in a row", "least angular distance", "which", "without them")]
    for n in (n for n in _SPANS if n == 1 or n <= depth // 2):
        distances = found.distances[n - 1]
        first = min(range(len(distances)), key=distances.__getitem__)
        rest = ",".join(_range(*ends) for ends in ((0, first), (first + n, depth)) if ends[0] < ends[1])
        rows.append((str(n), f"{distances[first]:.5f}", _range(first, first + n), f"shard --layers {rest}"))
    return table(rows, right=(0, 1))


def _range(first: int, stop: int) -> str:
    return str(first) if stop == first + 1 else f"{first}-{stop - 1}"


def experts_text(score: Score) -> str:
    """A line for each layer with experts: which are used the least, and how many do most of the work."""
    assert score.experts is not None
    heads = (
        "experts",
        "unused",
        "least used",
        "most used",
        f"{100 * _MOST:.0f} % of choices go to",
        "lowest by REAP, of the mean",
    )
    rows: list[tuple[str, ...]] = [(f"{escape(score.name)}: layer", *heads)]
    rows += [(escape(name), *_expert_cells(layer)) for name, layer in score.experts.layers.items()]
    return table(rows, right=(0, 1, 2))


def _expert_cells(layer: LayerUse) -> tuple[str, ...]:
    often, numbers = layer.frequency, range(len(layer.frequency))
    least, most = min(numbers, key=often.__getitem__), max(numbers, key=often.__getitem__)
    sums = accumulate(sorted(often, reverse=True))
    # Rounding must not keep the last sum below the whole.
    busy = next(n for n, total in enumerate(sums, start=1) if total >= _MOST * sum(often) - 1e-9)
    mean = sum(layer.reap) / len(layer.reap) or 1.0
    lowest = sorted(numbers, key=layer.reap.__getitem__)[:_LOWEST]
    return (
        str(len(often)),
        str(sum(1 for share in often if share == 0)),
        f"{least}: {100 * often[least]:.2f} %",
        f"{most}: {100 * often[most]:.2f} %",
        f"{busy} of {len(often)}",
        ", ".join(f"{i}: {100 * layer.reap[i] / mean:.0f} %" for i in lowest),
    )
