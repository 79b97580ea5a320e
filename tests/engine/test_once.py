"""Checks that many threads need are done once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from support import read_torch

from weightops.errors import CorruptInput
from weightops.lazy import Evaluator, Once
from weightops.ops.stored import Checked


def test_whoever_comes_first_checks_and_the_others_wait() -> None:
    once, calls = Once(), []

    def check() -> None:
        calls.append(threading.get_ident())
        time.sleep(0.05)

    threads = [threading.Thread(target=once.do, args=("key", check)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert once.is_done("key")


def test_what_failed_is_checked_again() -> None:
    once = Once()

    def fail() -> None:
        raise CorruptInput("damaged")

    for _ in range(2):
        with pytest.raises(CorruptInput, match="damaged"):
            once.do("key", fail)
    assert not once.is_done("key")


def test_a_storage_that_tensors_share_is_read_once_for_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = torch.arange(300, dtype=torch.float32)
    torch.save({f"{i}": storage[100 * i : 100 * i + 100] for i in range(3)}, tmp_path / "flat.pth")
    reads = []
    monkeypatch.setattr(Checked, "_crc_of_member", lambda self, read: reads.append(self) or self.crc32)
    once = Once()
    for tensor in read_torch(tmp_path / "flat.pth").tensors.values():
        with Evaluator(once=once) as read:
            assert len(read.whole(tensor)) == 400
    assert len(reads) == 1
