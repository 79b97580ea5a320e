"""Ranges that are on their way before they are asked for: the right bytes in order, no more of them than may be."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hub import Fault, Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightops.errors import CorruptInput, Interrupted, NetworkFailed
from weightops.io.source_file import SourceFile
from weightops.stores.reader import FileReader
from weightops.stores.stores import Stores
from weightops.stores.web import ahead, ranges
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

NAME = "w.safetensors"
DATA = np.random.default_rng(0).bytes(2_000_000)
SHA256 = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
QUICK = Policy(timeout_s=0.3, min_rate=100_000, attempts=3, first_delay_s=0.01)
COUNT, RANGE = 3, 100_000


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ahead, ranges):
        monkeypatch.setattr(module, "RANGE_NBYTES", RANGE)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(static={NAME: DATA}) as hub:
        yield hub


@pytest.fixture
def web(hub: Hub) -> Iterator[Web]:
    with Web(QUICK, endpoint=hub.endpoint, ahead=COUNT) as web:
        yield web


def source(hub: Hub, name: str = NAME, digest: str = SHA256) -> SourceFile:
    return SourceFile(f"{hub.endpoint}/static/files/{name}", len(DATA), 0, digest)


def read(web: Web, *files: SourceFile, block: int = 64_000, stop: int = len(DATA)) -> list[bytes]:
    """Files, read by turns."""
    found = [bytearray() for _ in files]
    with FileReader(Stores(web)) as reader:
        for start in range(0, stop, block):
            for data, file in zip(found, files, strict=True):
                part = memoryview(bytearray(min(block, stop - start)))
                reader.read_into(file, start, part, stop - start - len(part))
                data += part
    return [bytes(data) for data in found]


def test_a_file_is_read_through_several_connections_at_a_time(hub: Hub, web: Web) -> None:
    together = threading.Barrier(COUNT, timeout=10)

    def wait(name: str, offset: int) -> None:
        if offset in {ranges._HEAD_NBYTES + i * RANGE for i in range(COUNT)}:
            together.wait()

    hub.on_body = wait
    assert read(web, source(hub)) == [DATA]
    assert web.is_proven(source(hub))
    asked = [request.headers["range"] for request in hub.log]
    assert len(set(asked)) == len(asked)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 600_000)), max_size=8))
def test_any_ranges_in_any_order_are_right(hub: Hub, wanted: list[tuple[int, int]]) -> None:
    with Web(QUICK, endpoint=hub.endpoint, ahead=COUNT) as web, FileReader(Stores(web)) as files:
        for start, nbytes in wanted:
            nbytes = min(nbytes, len(DATA) - start)
            assert files.read(source(hub), start, nbytes) == DATA[start : start + nbytes]


@pytest.mark.parametrize("count", [2, COUNT, COUNT + 2])
def test_files_that_are_read_by_turns_share_what_may_be_on_its_way(hub: Hub, web: Web, count: int) -> None:
    hub.static |= {f"{i}": DATA for i in range(count)}
    order, most = web.ranges._ahead.order, 0

    def counted(*args: Any) -> object:
        nonlocal most
        ordered = order(*args)
        most = max(most, COUNT - web.ranges._ahead._left)
        return ordered

    web.ranges._ahead.order = counted
    assert read(web, *(source(hub, f"{i}") for i in range(count))) == [DATA] * count
    assert most == COUNT
    assert web.ranges._ahead._left == COUNT
    assert len(web.ranges._ahead._buffers) <= COUNT


@pytest.mark.parametrize(
    "fault", [Fault("cut", at=30_000), Fault("status", 503), Fault("reset"), Fault("stall", value=1)]
)
@pytest.mark.parametrize("at", range(1, 5))
def test_a_range_that_fails_is_asked_for_again(hub: Hub, web: Web, fault: Fault, at: int) -> None:
    hub.faults[NAME] = [*[None] * at, fault]
    assert read(web, source(hub)) == [DATA]
    assert web.is_proven(source(hub))


def test_what_stays_broken_is_given_up(hub: Hub, web: Web) -> None:
    read(web, source(hub), stop=60_000)
    hub.always[NAME] = Fault("status", 503)
    with pytest.raises(NetworkFailed, match=r"status 503 .*; gave up after 3 attempts"):
        read(web, source(hub))


def test_another_content_of_later_ranges_is_noticed(hub: Hub, web: Web) -> None:
    read(web, source(hub, digest=""), stop=60_000)
    hub.always[NAME] = Fault("etag", value='"other"')
    with pytest.raises(CorruptInput, match="changed while it was being read"):
        read(web, source(hub, digest=""))


def test_what_was_ordered_and_is_not_read_goes_to_others(hub: Hub, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_RECENT_READS", 2)
    hub.static["left"] = DATA
    with FileReader(Stores(web)) as files:
        files.read_into(source(hub, "left"), 70_000, memoryview(bytearray(1000)), len(DATA) - 71_000)
    assert web.ranges._ahead._left == 0
    assert read(web, source(hub)) == [DATA]
    assert web.ranges._ahead._left == COUNT


def test_who_waits_for_a_range_is_interrupted(hub: Hub, web: Web) -> None:
    waiting = threading.Event()

    def stall(name: str, offset: int) -> None:
        if offset >= 100_000:
            waiting.set()
            hub.stopping.wait(20)

    hub.on_body = stall
    threading.Thread(target=lambda: (waiting.wait(10), web.interrupt(Interrupted(2)))).start()
    with pytest.raises(Interrupted, match="interrupted"):
        read(web, source(hub))
