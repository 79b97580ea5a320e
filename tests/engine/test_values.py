"""The values of tensors before there is a plan: the same in one thread and in several, and to be stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import to_bytes, write_checkpoint

from weightops.engine import values as module
from weightops.engine.control import Control, Silent
from weightops.engine.values import values
from weightops.errors import Interrupted
from weightops.formats.folder import open_checkpoint


class Counting(Silent):
    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, what: str, total_nbytes: int) -> None:
        self.total = total_nbytes

    def advance(self, nbytes: int, name: str = "") -> None:
        self.done += nbytes


@pytest.mark.parametrize("notable", [0, 1 << 30])
def test_values_in_one_thread_and_in_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notable: int) -> None:
    monkeypatch.setattr(module, "_NOTABLE_NBYTES", notable)
    state = {f"t{i}": torch.randn(i * 40, 3) for i in range(12)}
    tensors = open_checkpoint(write_checkpoint(tmp_path / "model", state))
    progress = Counting()
    found = values(list(tensors.values()), Control(progress))
    assert found == [to_bytes(state[name]) for name in tensors]
    expected = 0 if notable else sum(t.nbytes for t in state.values())
    assert (progress.total, progress.done) == (expected, expected)
    stopped = Control()
    stopped.cancel()
    if not notable:
        with pytest.raises(Interrupted, match="interrupted"):
            values(list(tensors.values()), stopped)
