"""Servers and networks that fail: whatever they do, a file is right or absent, and the exit code says which."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fetching import FINAL, MIB, QUICK, REPO, WEIGHTS, assert_complete, content, fetch, files, sha256
from hub import Fault, Faults, Hub
from systems import opened_below

from weightops.errors import CorruptInput, Differs, NetworkFailed, NoRoom, WeightopsError
from weightops.stores.hashing import FileHasher
from weightops.stores.transfer.fetch import Fetch

DATA, OTHER = content(10 * MIB), content(10 * MIB, seed=1)
MODEL = {"config.json": b"{}", WEIGHTS: DATA}
AT = 6 * MIB  # in the middle of a chunk
SMALL = 64 << 10


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, MODEL)
        yield hub


def status(code: int, retry_after: object = None) -> Fault:
    return Fault("status", code, retry_after)


# What happens to the weights, and how many of their bytes may be sent in vain.
PASSING: dict[str, tuple[list[Faults], int]] = {
    "FIN": ([Fault("cut", AT)], SMALL),
    "FIN three times": ([Fault("cut", MIB)] * 3, SMALL),
    "FIN before the answer": ([Fault("cut", -1)], 0),
    "RST": ([Fault("reset", AT)], MIB),
    "silence": ([Fault("stall", AT, 60)], SMALL),
    "silence before the answer": ([Fault("stall", -1, 60)], 0),
    "a trickle": ([Fault("trickle", AT, 0.1)], SMALL),
    "503": ([status(503)], 0),
    "500, 502, 504": ([status(500), status(502), status(504)], 0),
    "429": ([status(429)], 0),
    "408": ([status(408)], 0),
    "a flipped bit": ([Fault("flip", AT)], len(DATA)),
    "a flipped bit in the last byte": ([Fault("flip", len(DATA) - 1)], len(DATA)),
    "other content for a while": ([Fault("other_content", value=OTHER)], len(DATA)),
    "the rest of another version": ([Fault("cut", AT), Fault("other_content", value=OTHER)], len(DATA)),
    "another version with its own ETag": (
        [Fault("cut", AT), (Fault("other_content", value=OTHER), Fault("etag", value='"other"'))],
        AT + len(DATA),
    ),
    "the rest of one that ignores If-Range": (
        [
            Fault("cut", AT),
            (Fault("other_content", value=OTHER), Fault("etag", value='"other"'), Fault("ignore_if_range")),
        ],
        2 * len(DATA),
    ),
    "another range": ([Fault("wrong_offset", 4096)], len(DATA)),
    "another range in the middle": ([Fault("cut", AT), Fault("wrong_offset", 1)], len(DATA)),
    "another total": ([Fault("wrong_total", 1)], len(DATA)),
    "416": ([Fault("status", 416, headers={"Content-Range": f"bytes */{len(DATA)}"})], 0),
    "416 in the middle": ([Fault("cut", AT), Fault("status", 416)], SMALL),
    "too short": ([Fault("shorter", 1)], len(DATA)),
    "too long": ([Fault("longer", value=b"x")], len(DATA)),
    "no length": ([Fault("no_length")], 0),
    "no length, cut": ([(Fault("no_length"), Fault("cut", AT))], SMALL),
    "chunked": ([Fault("chunked")], SMALL),
    "chunked, cut": ([(Fault("chunked"), Fault("cut", AT))], MIB),
    "gzip": ([Fault("gzip")], 2 * len(DATA)),
    "a coding that it is not in": ([Fault("headers", headers={"Content-Encoding": "gzip"})], len(DATA)),
    "no range": ([Fault("ignore_range")], SMALL),
    "no range in the middle": ([Fault("cut", AT), Fault("ignore_range")], AT + SMALL),
    "no ETag": ([(Fault("etag"), Fault("cut", AT)), Fault("etag")], SMALL),
    "another ETag of the same file": ([Fault("cut", AT), Fault("etag", value='"other"')], SMALL),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_costs_time_and_no_more_bytes_than_it_must(hub: Hub, tmp_path: Path, fault: str) -> None:
    hub.faults[WEIGHTS], spare = PASSING[fault]
    hub.faults[WEIGHTS] = list(hub.faults[WEIGHTS])
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)
    assert hub.faults[WEIGHTS] == []
    assert hub.bytes_sent(WEIGHTS) <= len(DATA) + spare


# What stays as it is, the exit code, and what the message says.
LASTING: dict[str, tuple[Faults, type[WeightopsError], int, str]] = {
    "503": (status(503), NetworkFailed, 1, "status 503.*gave up after 4 attempts"),
    "RST": (Fault("reset", 0), NetworkFailed, 1, "gave up after 4 attempts"),
    "silence": (Fault("stall", 0, 60), NetworkFailed, 1, "gave up after 4 attempts"),
    "too long a wait": (status(429, 86400), NetworkFailed, 1, "asks to wait 86400 s, at most 300"),
    "a wait until a date": (status(503, "Fri, 31 Dec 2999 23:59:59 GMT"), NetworkFailed, 1, "asks to wait .* s"),
    "a flipped bit": (Fault("flip", AT), Differs, 3, f"sha256 is [0-9a-f]{{64}}, expected {sha256(DATA)}"),
    "other content": (Fault("other_content", value=OTHER), Differs, 3, f"is {sha256(OTHER)}, expected {sha256(DATA)}"),
    "a shorter file": (Fault("shorter", 1), Differs, 3, f"has {len(DATA) - 1} bytes, expected {len(DATA)}"),
    "a longer file": (Fault("longer", value=b"x"), Differs, 3, f"has {len(DATA) + 1} bytes, expected {len(DATA)}"),
    "another range": (Fault("wrong_offset", 1), NetworkFailed, 1, "asked for bytes 0 to .*, was offered bytes 1-"),
    "another total": (Fault("wrong_total", 1), Differs, 3, f"has {len(DATA) + 1} bytes, expected {len(DATA)}"),
    "416": (Fault("status", 416, headers={"Content-Range": "bytes */7"}), Differs, 3, "has 7 bytes"),
    "an LFS pointer": (Fault("lfs_pointer"), CorruptInput, 13, "pointer"),
    "an HTML page": (Fault("html"), CorruptInput, 13, "HTML"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_lasts_is_said_and_leaves_no_file_under_the_name(hub: Hub, tmp_path: Path, fault: str) -> None:
    hub.always[WEIGHTS], kind, code, says = LASTING[fault]
    began = time.monotonic()
    with pytest.raises(kind, match=says) as caught:
        fetch(hub, tmp_path)
    assert caught.value.exit_code == code
    assert WEIGHTS in str(caught.value)
    assert files(tmp_path).keys() <= {"config.json"}
    assert not (tmp_path / FINAL).exists()
    assert time.monotonic() - began < 5
    hub.always.clear()
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)


def test_a_wrong_file_is_fetched_twice_and_not_again_and_again(hub: Hub, tmp_path: Path) -> None:
    hub.always[WEIGHTS] = Fault("flip", AT)
    with pytest.raises(Differs, match=r"sha256 is .*, expected"):
        fetch(hub, tmp_path)
    assert hub.bytes_sent(WEIGHTS) == 2 * len(DATA)


def test_what_fails_leaves_no_file_open(hub: Hub, tmp_path: Path) -> None:
    hub.always[WEIGHTS] = Fault("flip", AT)
    for attempt in range(3):
        with pytest.raises(Differs, match=r"sha256 is .*, expected"):
            fetch(hub, tmp_path / str(attempt))
    assert opened_below(tmp_path) == []


def test_chunks_that_the_disk_loses_at_once_are_fetched_again_and_no_others(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the digest at the end, which is taken from the disk here."""
    monkeypatch.setattr(Fetch, "_hash", lambda *_: None)
    finish = Fetch.finish

    def lose(self: Fetch) -> object:
        monkeypatch.setattr(Fetch, "finish", finish)
        with self.claim.data.open("r+b") as file:
            file.write(b"rot")
        return self.finish()

    monkeypatch.setattr(Fetch, "finish", lambda self: lose(self) if self.file.name == WEIGHTS else finish(self))
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)
    assert hub.bytes_sent(WEIGHTS) == len(DATA) + 4 * MIB


def test_a_small_file_is_held_against_the_digest_that_git_gave_it(hub: Hub, tmp_path: Path) -> None:
    hub.always["config.json"] = Fault("flip", 0)
    with pytest.raises(Differs, match=r"config\.json: git_sha1 is"):
        fetch(hub, tmp_path)
    assert "config.json" not in files(tmp_path)


@pytest.mark.parametrize("key", ["api", "resolve"])
@pytest.mark.parametrize(
    "fault", [Fault("cut", -1), Fault("reset", 0), Fault("stall", -1, 60), status(503), status(429)]
)
def test_the_hub_itself_may_fail_for_a_while(hub: Hub, tmp_path: Path, key: str, fault: Fault) -> None:
    """At each of the two questions to its API, and when it is asked for a file."""
    hub.faults[key] = [fault, None, fault]
    began = time.monotonic()
    fetch(hub, tmp_path)
    assert time.monotonic() - began < 3
    assert_complete(tmp_path, MODEL)
    assert key != "api" or hub.faults[key] == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", 200, body=b"<html>Maintenance</html>"),
        Fault("status", 200, body=b"[1, 2]"),
        Fault("status", 200, body=b'{"sha": 7}'),
        Fault("status", 200, body=b'{"id": "org/model", "sha": 7}'),
        Fault("status", 200, body=b"\xff{"),
        status(503),
        status(429, 86400),
        status(418),
    ],
)
@pytest.mark.parametrize("commit", [False, True])
def test_a_hub_that_talks_nonsense_is_a_failure_of_the_network(
    hub: Hub, tmp_path: Path, fault: Fault, commit: bool
) -> None:
    """Asked for the commit, or for its files."""
    hub.always["api"] = fault
    began = time.monotonic()
    with pytest.raises(
        NetworkFailed, match=r"gave up after 4 attempts|status 418|a page for people|the server asks to wait"
    ) as caught:
        fetch(hub, tmp_path / "out", f"{REPO}@{hub.add(REPO, MODEL) if commit else 'main'}")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - began < 3


def test_a_hub_that_is_down_is_no_success_because_the_folder_holds_something(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "unrelated").write_text("here before")
    with Hub() as gone:
        pass
    with pytest.raises(NetworkFailed, match="Connection refused; gave up after 4 attempts") as caught:
        fetch(gone, tmp_path)
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unrelated"]


def test_the_wait_that_a_server_asks_for_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [status(429, 1)]
    began = time.monotonic()
    fetch(hub, tmp_path)
    assert 1 <= time.monotonic() - began < 3
    assert_complete(tmp_path, MODEL)


def test_attempts_are_counted_from_the_last_progress(hub: Hub, tmp_path: Path) -> None:
    """Connections that are cut again and again, each after a part of a chunk."""
    hub.faults[WEIGHTS] = [Fault("cut", MIB)] * 9
    fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)
    assert hub.bytes_sent(WEIGHTS) <= len(DATA) + SMALL


@pytest.mark.parametrize("cut", [[], [Fault("cut", AT)]])
def test_servers_without_ranges_send_the_whole_file(tmp_path: Path, cut: list[Faults]) -> None:
    with Hub(ranges=False) as hub:
        hub.add(REPO, MODEL)
        hub.faults[WEIGHTS] = cut
        fetch(hub, tmp_path)
    assert_complete(tmp_path, MODEL)


@pytest.mark.parametrize("framing", ["chunked", "no_length"])
@pytest.mark.parametrize("ending", [(), (Fault("cut", AT),), (Fault("cut", 0),), (Fault("reset", AT),)])
def test_files_of_unknown_length_are_fetched_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framing: str, ending: tuple[Fault, ...]
) -> None:
    """Hashing lags behind writing, as it does on a fast disk."""
    data, hash_it = content(17 * MIB), FileHasher.update
    monkeypatch.setattr(FileHasher, "update", lambda self, part: (time.sleep(0.01), hash_it(self, part)))
    listed = tmp_path / "list"
    with Hub(ranges=False) as hub:
        hub.static[WEIGHTS] = data
        hub.always[WEIGHTS] = Fault(framing)
        listed.write_text(f"{sha256(data)}  {hub.endpoint}/static/files/{WEIGHTS}\n")
        hub.faults[WEIGHTS] = [None, ending or None]
        fetch(hub, tmp_path / "out", str(listed))
    assert_complete(tmp_path / "out", {WEIGHTS: data})


def test_without_length_end_and_digest_nothing_is_believed(tmp_path: Path) -> None:
    with Hub() as hub:
        hub.static[WEIGHTS] = DATA
        hub.always[WEIGHTS] = (Fault("no_length"), Fault("ignore_range"))
        with pytest.raises(NetworkFailed, match="neither how long it is nor when it ends") as caught:
            fetch(hub, tmp_path, f"{hub.endpoint}/static/files/{WEIGHTS}")
    assert "digest" in (caught.value.hint or "")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("fault", ["lfs_pointer", "html"])
def test_what_stands_in_for_weights_is_refused_without_a_digest_too(hub: Hub, tmp_path: Path, fault: str) -> None:
    hub.static[WEIGHTS] = DATA
    hub.always[WEIGHTS] = Fault(fault)
    with pytest.raises(CorruptInput, match=r"not the file|not the weights") as caught:
        fetch(hub, tmp_path, f"{hub.endpoint}/static/files/{WEIGHTS}")
    assert caught.value.exit_code == 13
    assert caught.value.hint
    assert files(tmp_path) == {}


@pytest.mark.parametrize("fault", [None, Fault("ignore_if_range"), Fault("ignore_range")])
def test_a_file_without_digest_is_not_pieced_together_from_two_versions(tmp_path: Path, fault: Faults) -> None:
    with Hub() as hub:
        hub.static[WEIGHTS] = DATA

        def replace_it(name: str, offset: int) -> None:
            if offset >= AT:
                hub.static[WEIGHTS] = OTHER

        hub.on_body = replace_it
        hub.faults[WEIGHTS] = [None, Fault("cut", AT + MIB), fault]
        url = f"{hub.endpoint}/static/files/{WEIGHTS}"
        fetch(hub, tmp_path, url)
        assert_complete(tmp_path, {WEIGHTS: OTHER})
        hub.static[WEIGHTS] = DATA
        hub.on_body = lambda name, offset: None
        fetch(hub, tmp_path, url)
        assert_complete(tmp_path, {WEIGHTS: DATA})


def test_content_that_changes_between_listing_and_fetching_is_recorded_as_what_came(tmp_path: Path) -> None:
    with Hub() as hub:
        hub.static[WEIGHTS] = DATA
        hub.faults[WEIGHTS] = [None, (Fault("other_content", value=OTHER), Fault("etag", value='"other"'))]
        url = f"{hub.endpoint}/static/files/{WEIGHTS}"
        fetch(hub, tmp_path, url)
        assert files(tmp_path) == {WEIGHTS: OTHER}
        fetch(hub, tmp_path, url)
        assert files(tmp_path) == {WEIGHTS: DATA}


def test_what_is_whole_already_is_not_taken_for_a_later_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a file had arrived when the run was stopped; meanwhile the server has another."""
    with Hub() as hub:
        hub.static[WEIGHTS] = DATA
        url = f"{hub.endpoint}/static/files/{WEIGHTS}"
        with monkeypatch.context() as patched:
            patched.setattr("weightops.stores.transfer.fetch.Fetch.finish", _fail)
            with pytest.raises(NoRoom, match="before the file had its name"):
                fetch(hub, tmp_path, url)
        hub.static[WEIGHTS] = OTHER
        fetch(hub, tmp_path, url)
    assert_complete(tmp_path, {WEIGHTS: OTHER})


def _fail(*_: object) -> None:
    raise NoRoom("before the file had its name")


def test_a_deadline_ends_it_all(hub: Hub, tmp_path: Path) -> None:
    hub.always[WEIGHTS] = Fault("stall", AT, 60)
    began = time.monotonic()
    with pytest.raises(NetworkFailed, match=r"deadline of 0\.5 s") as caught:
        fetch(hub, tmp_path, policy=replace(QUICK, timeout_s=60, deadline_s=0.5))
    assert caught.value.exit_code == 1
    assert time.monotonic() - began < 2


def test_the_rate_can_be_limited(hub: Hub, tmp_path: Path) -> None:
    began = time.monotonic()
    fetch(hub, tmp_path, policy=replace(QUICK, limit_rate=20 * MIB))
    assert time.monotonic() - began > 0.4
