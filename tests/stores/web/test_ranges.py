"""Reading ranges of files on servers: the right bytes in any order, few requests, nothing wrong believed."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from fetching import wait_until
from hub import Fault, Faults, Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightops.errors import CorruptInput, Differs, Interrupted, NetworkFailed, SourceMissing, WeightopsError
from weightops.io.source_file import SourceFile
from weightops.stores.reader import FileReader
from weightops.stores.stores import Stores
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

NAME = "w.safetensors"
DATA = np.random.default_rng(0).bytes(3_000_000)
SHA256 = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
QUICK = Policy(timeout_s=0.3, min_rate=100_000, attempts=4, first_delay_s=0.01)
AT = 1_234_567


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(static={NAME: DATA}) as hub:
        yield hub


@pytest.fixture
def web(hub: Hub) -> Iterator[Web]:
    with Web(QUICK, endpoint=hub.endpoint) as web:
        yield web


def source(hub: Hub, digest: str = SHA256, nbytes: int = len(DATA), etag: str = "") -> SourceFile:
    return SourceFile(f"{hub.endpoint}/static/files/{NAME}", nbytes, 0, digest, etag)


def read(web: Web, file: SourceFile, *ranges: tuple[int, int]) -> bytes:
    with FileReader(Stores(web)) as files:
        return b"".join(files.read(file, start, stop - start) for start, stop in ranges)


def in_blocks(stop: int, block: int = 300_000, start: int = 0) -> list[tuple[int, int]]:
    return [(at, min(at + block, stop)) for at in range(start, stop, block)]


ranges = st.tuples(st.integers(0, len(DATA)), st.integers(0, 400_000)).map(
    lambda pair: (pair[0], min(sum(pair), len(DATA)))
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.lists(ranges, max_size=12))
def test_any_ranges_in_any_order_are_right(hub: Hub, wanted: list[tuple[int, int]]) -> None:
    with Web(QUICK, endpoint=hub.endpoint) as web:
        assert read(web, source(hub), *wanted) == b"".join(DATA[start:stop] for start, stop in wanted)


def test_reading_through_costs_each_byte_once_and_few_requests(hub: Hub, web: Web) -> None:
    header = [(0, 64), (8, 50_000)]
    assert read(web, source(hub), *header, *in_blocks(len(DATA), start=50_000)) == (
        DATA[:64] + DATA[8:50_000] + DATA[50_000:]
    )
    wait_until(lambda: hub.bytes_sent(NAME) == len(DATA))
    assert len(hub.log) <= 8
    assert web.ranges.proofs.is_proven(source(hub))


def test_a_header_costs_little(hub: Hub, web: Web) -> None:
    read(web, source(hub), (0, 64), (8, 10_000))
    wait_until(lambda: hub.bytes_sent(NAME) == 64 << 10)
    assert len(hub.log) == 1


def test_a_tensor_in_the_middle_is_asked_for_as_a_whole(hub: Hub, web: Web) -> None:
    out = memoryview(bytearray(100_000))
    with FileReader(Stores(web)) as files:
        for at in range(2_000_000, 2_500_000, len(out)):
            files.read_into(source(hub), at, out, 2_500_000 - at - len(out))
            assert out == DATA[at : at + len(out)]
    assert [r.headers["range"] for r in hub.log] == ["bytes=2000000-2499999"]


def test_two_places_of_a_file_and_other_files_are_read_by_turns(hub: Hub, web: Web) -> None:
    hub.static["other"] = DATA[::-1]
    other = SourceFile(f"{hub.endpoint}/static/files/other", len(DATA), 0)
    with FileReader(Stores(web)) as files:
        for at in range(0, 1_400_000, 100_000):
            assert files.read(source(hub), at, 100_000) == DATA[at : at + 100_000]
            assert files.read(source(hub), at + 1_500_000, 100_000) == DATA[at + 1_500_000 : at + 1_600_000]
            assert files.read(other, at, 100_000) == DATA[::-1][at : at + 100_000]
    assert len(hub.log) < 20


def test_what_is_put_away_for_others_is_asked_for_again(hub: Hub, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """More files and places than are kept: each is right all the same, and no more connections stay open."""
    monkeypatch.setattr("weightops.stores.web.ranges._MAX_HEADS", 2)
    monkeypatch.setattr("weightops.stores.web.ranges._MAX_IDLE", 2)
    others = {f"{i}": DATA[i:] + DATA[:i] for i in range(5)}
    hub.static |= others
    many = {name: SourceFile(f"{hub.endpoint}/static/files/{name}", len(DATA), 0) for name in others}
    with FileReader(Stores(web)) as files:
        for at in (0, 100_000, 2_000_000):
            for name, file in many.items():
                assert files.read(file, at, 70_000) == others[name][at : at + 70_000]
                assert files.read(file, 0, 64) == others[name][:64]
        assert len(web.ranges._heads) == 2
        assert len(web.ranges._idle) == 2
    heads = [request for request in hub.log if request.headers["range"] == "bytes=0-65535"]
    assert len(heads) > len(many)  # asked for again


def test_gaps_are_read_through_and_count_for_the_digest(hub: Hub, web: Web) -> None:
    blocks = [(start, stop - 1000) for start, stop in in_blocks(len(DATA))]
    read(web, source(hub), *blocks, (len(DATA) - 10, len(DATA)))
    assert web.ranges.proofs.is_proven(source(hub))
    wait_until(lambda: hub.bytes_sent(NAME) == len(DATA))


def test_threads_share_connections_and_digest(hub: Hub, web: Web) -> None:
    wrong = []

    def work(blocks: list[tuple[int, int]]) -> None:
        for block in blocks:
            if read(web, source(hub), block) != DATA[slice(*block)]:
                wrong.append(block)

    blocks = in_blocks(len(DATA), 50_000)
    threads = [threading.Thread(target=work, args=(blocks[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


PASSING: dict[str, list[Faults]] = {
    "FIN": [Fault("cut", AT)],
    "FIN at once": [Fault("cut", 0), Fault("cut", -1)],
    "RST": [Fault("reset", AT)],
    "503": [Fault("status", 503), Fault("status", 503, value="0")],
    "429": [Fault("status", 429)],
    "silence": [Fault("stall", AT, 60)],
    "silence before the answer": [Fault("stall", -1, 60)],
    "a trickle": [Fault("trickle", AT, 0.1)],
    "gzip": [Fault("gzip")],
    "another range": [Fault("wrong_offset", 5)],
    "no ETag": [Fault("cut", AT), Fault("etag", value=None)],
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_survived(hub: Hub, web: Web, fault: str) -> None:
    read(web, source(hub), (0, 64))
    hub.faults[NAME] = list(PASSING[fault])
    assert read(web, source(hub), *in_blocks(len(DATA))) == DATA
    assert web.ranges.proofs.is_proven(source(hub))
    assert hub.faults[NAME] == []


def changed(hub: Hub) -> None:
    hub.static[NAME] = DATA[::-1]


def grown(hub: Hub) -> None:
    hub.static[NAME] = DATA + b"x"


def cut(hub: Hub) -> None:
    hub.static[NAME] = DATA[:AT]


def without_ranges(hub: Hub) -> None:
    hub.ranges = False


def damaged(hub: Hub) -> None:
    hub.always[NAME] = Fault("flip", AT)


def gone(hub: Hub) -> None:
    del hub.static[NAME]


def broken(hub: Hub) -> None:
    hub.always[NAME] = Fault("status", 503)


LASTING: dict[str, tuple[Callable[[Hub], None], type[WeightopsError], str]] = {
    "other content": (changed, Differs, "sha256 is"),
    "more bytes": (grown, CorruptInput, r"expected 3000000 bytes, found 3000001"),
    "fewer bytes": (cut, CorruptInput, rf"expected 3000000 bytes, found {AT}"),
    "no ranges": (without_ranges, WeightopsError, "whole files only"),
    "a flipped bit": (damaged, Differs, rf"sha256 is [0-9a-f]{{64}}, expected {SHA256[7:]}"),
    "404": (gone, SourceMissing, "status 404"),
    "503": (broken, NetworkFailed, "gave up after 4 attempts"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_lasts_is_said(hub: Hub, web: Web, fault: str) -> None:
    read(web, source(hub), (0, 64))
    change, error, words = LASTING[fault]
    change(hub)
    with pytest.raises(error, match=words):
        read(web, source(hub), *in_blocks(len(DATA)))
    assert not web.ranges.proofs.is_proven(source(hub))


def test_a_file_without_digest_is_not_read_in_two_versions(hub: Hub, web: Web) -> None:
    read(web, source(hub, digest=""), (0, 64))
    changed(hub)
    with pytest.raises(CorruptInput, match="changed while it was being read"):
        read(web, source(hub, digest=""), *in_blocks(len(DATA)))


def test_with_a_digest_no_etag_is_asked_for_or_believed(hub: Hub, web: Web) -> None:
    hub.faults[NAME] = [Fault("etag", value=f'"{i}"') for i in range(20)]
    assert read(web, source(hub, etag="old"), *in_blocks(len(DATA))) == DATA
    assert not any("if-range" in request.headers for request in hub.log)


def test_a_file_of_another_etag_than_its_plan_says_is_refused(hub: Hub, web: Web) -> None:
    with pytest.raises(CorruptInput, match="expected ETag old, found"):
        read(web, source(hub, digest="", etag="old"), (0, 64))


def test_a_range_that_leaves_the_file_asks_no_server(hub: Hub, web: Web) -> None:
    with pytest.raises(CorruptInput, match="ends at byte 3000000, expected at least 3000001"):
        read(web, source(hub), (len(DATA) - 1, len(DATA) + 1))
    assert hub.log == []


@pytest.mark.parametrize("algorithm", ["sha256", "git_sha1", "xxh3_128", "md5"])
def test_digests_of_every_kind_follow_the_bytes(hub: Hub, web: Web, algorithm: str) -> None:
    from weightops.stores.hashing import FileHasher

    hasher = FileHasher([algorithm], len(DATA))
    hasher.update(memoryview(DATA))
    file = source(hub, f"{algorithm}:{hasher.digests()[algorithm]}")
    read(web, file, *in_blocks(len(DATA)))
    assert web.ranges.proofs.is_proven(file)
    hub.always[NAME] = Fault("flip", len(DATA) - 1)
    web.ranges.forget(file)
    assert not web.ranges.proofs.is_proven(file)
    with pytest.raises(Differs, match=algorithm):
        read(web, file, *in_blocks(len(DATA)))


def test_what_passes_ahead_of_its_turn_or_again_does_not_count(hub: Hub, web: Web) -> None:
    hub.always[NAME] = Fault("flip", 100)
    position = web.ranges.proofs.position
    read(web, source(hub), (2_000_000, 3_000_000))
    assert position(source(hub)) == 0
    hub.always.clear()
    read(web, source(hub), (0, 500_000), (200_000, 400_000))
    assert position(source(hub)) == 500_000
    read(web, source(hub), (400_000, 3_000_000))
    assert web.ranges.proofs.is_proven(source(hub))


def test_an_interruption_ends_a_silent_read_within_a_second(hub: Hub) -> None:
    hub.always[NAME] = Fault("stall", 1000, 60)
    with Web(endpoint=hub.endpoint) as web:
        began = time.monotonic()
        threading.Timer(0.2, web.interrupt, [Interrupted(2)]).start()
        with pytest.raises(Interrupted, match="interrupted"):
            read(web, source(hub), *in_blocks(len(DATA)))
        assert time.monotonic() - began < 1.2


def test_without_a_web_there_is_a_sentence(hub: Hub) -> None:
    with pytest.raises(WeightopsError, match="is on a server"), FileReader() as files:
        files.read(source(hub), 0, 1)


def test_a_query_is_not_shown(hub: Hub, web: Web) -> None:
    file = SourceFile(f"{hub.endpoint}/static/files/none?Signature=secret", 10, 0)
    assert file.name == "none"
    with pytest.raises(SourceMissing, match="none: status 404") as caught:
        read(web, file, (0, 1))
    assert "secret" not in str(caught.value)
