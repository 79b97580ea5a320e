"""One tensor by itself: the same as in the pass over all, stopped between blocks, without a word to connections."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import write_checkpoint

import weightops
from weightops.engine.control import Control, Silent
from weightops.engine.examine import examine, examine_one
from weightops.errors import Interrupted
from weightops.stores.stores import Stores

TENSORS = {"a.weight": torch.randn(3, 5), "model.embed_tokens.weight": torch.zeros(4, 2), "empty": torch.zeros(0)}


def test_one_tensor_is_what_it_is_among_all(tmp_path: Path) -> None:
    checkpoint = weightops.open_checkpoint(write_checkpoint(tmp_path / "m", TENSORS))
    everything = examine(checkpoint, None, Control())
    for name, tensor in checkpoint.items():
        found, said = examine_one(tensor, name, Control())
        expected = everything[name]
        assert (found.spec, found.xxh3_128, found.statistics) == (expected.spec, expected.xxh3_128, expected.statistics)
        assert said == ()


def test_a_stop_ends_one_reading_and_nothing_else(tmp_path: Path) -> None:
    checkpoint = weightops.open_checkpoint(write_checkpoint(tmp_path / "m", {"a": torch.zeros(3 << 20)}))

    class Stores_(Stores):
        interrupted = False

        def interrupt(self, error: object) -> None:
            self.interrupted = True

    parent = Control(stores=Stores_())

    class Stopping(Silent):
        nbytes = 0

        def advance(self, nbytes: int, name: str = "") -> None:
            self.nbytes += nbytes
            work.stop()

    progress = Stopping()
    work = Control(progress, parent=parent)
    with pytest.raises(Interrupted, match="interrupted"):
        examine_one(checkpoint["a"], "a", work)
    assert 0 < progress.nbytes < checkpoint["a"].nbytes
    parent.check()
    assert isinstance(parent.stores, Stores_)
    assert not parent.stores.interrupted
    assert examine_one(checkpoint["a"], "a", Control(parent=parent))[0].statistics is not None
