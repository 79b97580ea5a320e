"""What writing commands say of their results in numbers."""

from __future__ import annotations

from weightops.cli.results import _energy_text, _loss_text
from weightops.ops.measures.loss import Loss


def test_what_an_adapter_captures_is_told_in_percent_least_first() -> None:
    notes = {f"m{i}": {"rank": i, "energy": 0.5 + i / 100, "change": 0.25} for i in range(7)}
    lines = _energy_text(dict(reversed(notes.items()))).splitlines()
    assert lines[0].split() == ["module", "rank", "captured", "change"]
    assert [line.split() for line in lines[1:3]] == [
        ["m0", "0", "50", "%", "25", "%"],
        ["m1", "1", "51", "%", "25", "%"],
    ]
    assert len(lines) == 7
    assert lines[-1] == "7 modules, 53 % captured on average"


def test_what_a_cast_loses_is_told_gravest_first() -> None:
    few, many = Loss(elements=100, changed=1, max_relative_error=0.5), Loss(elements=100, changed=50, flushed=2)
    none = Loss(elements=0)
    lines = [line.split() for line in _loss_text({"few": few, "none": none, "many": many}).splitlines()]
    assert [line[0] for line in lines] == ["cast", "all", "many", "few", "none"]
    assert lines[1][2:4] == ["25.5", "%"]
    assert lines[2][1:6] == ["50", "%", "0", "0", "2"]
    assert lines[3][-1] == "0.5"
