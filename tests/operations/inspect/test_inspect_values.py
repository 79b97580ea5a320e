"""`weightops inspect --stats` and `--include`: what is read, and what is left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support import write_checkpoint

import weightops
from weightops.engine.control import Control, Silent
from weightops.errors import Interrupted, UsageError

TENSORS = {
    "a.weight": torch.tensor([[1.0, -2.0], [0.0, 5.0]]),
    "b.weight": torch.tensor([float("nan"), float("inf"), 0.0]),
    "c.ids": torch.tensor([3, 4]),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", TENSORS, shards=2)


def test_statistics_are_those_that_check_has(model: Path) -> None:
    found = weightops.inspect(model, stats=True)
    checked = weightops.check(model, architecture=False)
    assert found.reports == checked.tensors
    assert found.reports["b.weight"].statistics is not None
    assert found.to_json()["tensors"] == checked.to_json()["tensors"]


def test_without_stats_no_value_is_read(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")].ljust(len(data), b"\xff"))
    assert weightops.inspect(model).reports["a.weight"].xxh3_128 is None
    document = weightops.inspect(model).to_json()["tensors"]["a.weight"]
    assert document.keys() == {"dtype", "shape", "nbytes", "file", "xxh3_128"}


def test_only_what_is_included_is_counted_and_read(model: Path) -> None:
    class Counting(Silent):
        nbytes = 0

        def start(self, what: str, total_nbytes: int) -> None:
            self.nbytes = total_nbytes

    progress = Counting()
    found = weightops.inspect(model, include=["b.*", "c.*"], stats=True, control=Control(progress))
    assert found.tensors.keys() == found.reports.keys() == {"b.weight", "c.ids"}
    assert progress.nbytes == found.nbytes == 3 * 4 + 2 * 8
    assert found.parameters == 5
    assert {top.label for top in found.tree} == {"b.weight", "c.ids"}
    assert weightops.inspect(model, include="c.*").tensors.keys() == {"c.ids"}


def test_a_glob_that_matches_nothing_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match=re.escape("model: no tensor matches x\\u202e* or y")) as caught:
        weightops.inspect(model, include=["x\u202e*", "y"])
    assert caught.value.hint == "its tensors are a.weight, b.weight, c.ids"


def test_a_stop_is_heard_between_blocks(model: Path) -> None:
    control = Control()
    control.cancel()
    with pytest.raises(Interrupted, match="interrupted"):
        weightops.inspect(model, stats=True, control=control)


def test_shared_and_packed_tensors_are_weighed_once(tmp_path: Path) -> None:
    parts = {"qweight": (128, 8), "qzeros": (2, 8)}
    packed = {f"m.{part}": torch.zeros(shape, dtype=torch.int32) for part, shape in parts.items()}
    source = write_checkpoint(tmp_path, {**packed, "m.scales": torch.zeros(2, 64).half(), "n": torch.zeros(3)})
    found = weightops.inspect(source)
    assert found.weights == {"m.qweight": 128 * 64, "m.qzeros": 0, "m.scales": 0, "n": 3}
    torch.save({"x": TENSORS["a.weight"], "y": TENSORS["a.weight"]}, tmp_path / "shared.bin")
    assert weightops.inspect(tmp_path / "shared.bin").weights == {"x": 4, "y": 0}
