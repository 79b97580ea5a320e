"""What `eval` prints of layers and experts that could go."""

from __future__ import annotations

import click

from weightops.cli.use import experts_text, layers_text
from weightops.inference.evaluate import Score
from weightops.inference.figures import Estimate, LayerFigures
from weightops.operations.experts import ExpertUse, LayerUse


def score(layers: LayerFigures | None = None, experts: ExpertUse | None = None) -> Score:
    return Score("model", 1.0, 0.1, 10, 2, 0.5, layers=layers, experts=experts)


def test_layers_are_ranked_and_rows_of_them_named() -> None:
    values = (0.9, 0.01, 0.02, 0.5)
    found = LayerFigures(
        influence=tuple(Estimate(value=value, error=0.001) for value in values),
        distances=((0.4, 0.1, 0.2, 0.3), (0.5, 0.15, 0.3), (0.6, 0.7), (0.8,)),
        windows=2,
    )
    assert click.unstyle(layers_text(score(found))).splitlines() == [
        "model: layer  block influence      ±  from the least",
        "           0          0.90000  0.001               4",
        "           1          0.01000  0.001               1",
        "           2          0.02000  0.001               2",
        "           3          0.50000  0.001               3",
        "",
        "layers in a row  least angular distance  which  without them",
        "              1                 0.10000  1      shard --layers 0,2-3",
        "              2                 0.15000  1-2    shard --layers 0,3",
    ]


def test_experts_have_a_line_for_each_layer() -> None:
    layer = LayerUse(frequency=(1.0, 0.9, 0.1, 0.0), reap=(2.0, 1.5, 0.5, 0.0))
    even = LayerUse(frequency=(0.5, 0.5, 0.5, 0.5), reap=(1.0, 1.0, 1.0, 1.0))
    use = ExpertUse(model="model", tokens=10, seq_len=5, groups=1, layers={"1": layer, "2": even})
    heads, *lines = (line.split("  ") for line in click.unstyle(experts_text(score(experts=use))).splitlines())
    assert [cell.strip() for cell in heads if cell] == [
        *("model: layer", "experts", "unused", "least used", "most used"),
        *("90 % of choices go to", "lowest by REAP, of the mean"),
    ]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["1", "4", "1", "3: 0.00 %", "0: 100.00 %", "2 of 4", "3: 0 %, 2: 50 %, 1: 150 %, 0: 200 %"],
        ["2", "4", "0", "0: 50.00 %", "0: 50.00 %", "4 of 4", "0: 100 %, 1: 100 %, 2: 100 %, 3: 100 %"],
    ]
