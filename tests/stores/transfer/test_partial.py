"""Claims on partial files: one owner at a time, whoever dies, sleeps or comes at the same moment; and late writers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from fetching import QUICK, REPO, WEIGHTS, assert_complete, content, fetch
from hub import Hub

from weightops.io.owner import Owner
from weightops.stores.transfer import partial
from weightops.stores.transfer.fetch import Fetch, _Segment
from weightops.stores.transfer.partial import STATE, Claims, key_of
from weightops.stores.transfer.transfer import Done
from weightops.stores.web.listing import RemoteFile
from weightops.stores.web.web import Web

KEY = "0123456789abcdef"
ELSEWHERE = f"{'0' * 12}-1-1-abcdef"


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / STATE).iterdir())


def dead() -> str:
    """The name of a process on this machine that is gone."""
    command = "from weightops.io.owner import Owner; print(Owner.here())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return f"{done.stdout.strip()}-abcdef"


def test_one_run_has_a_claim_and_the_next_one_gets_what_it_left(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    claim = first.take(KEY)
    assert claim is not None
    claim.data.write_bytes(b"data")
    assert second.take(KEY) is None
    first.release_all()
    taken = second.take(KEY)
    assert taken is not None
    assert taken.data.read_bytes() == b"data"
    assert first.take(KEY) is None


LINES = [b'[0,"aa"]', b'[1,"bb"]', b'[2,"cc"]']


@pytest.mark.parametrize(
    ("tail", "chunks"),
    [
        (b"", {}),
        (b'[0,"a', {}),
        (b'[0,"aa"]', {}),
        (b"[0\n" + LINES[1] + b"\n", {}),
        (LINES[0] + b"\n", {0: "aa"}),
        (LINES[0] + b'\n[1,"bb', {0: "aa"}),
        (LINES[0] + b"\n\xff\n" + LINES[2] + b"\n", {0: "aa"}),
        (b"\n".join([*LINES, b""]), {0: "aa", 1: "bb", 2: "cc"}),
    ],
)
def test_a_journal_counts_up_to_the_line_that_a_crash_cut_short(
    tmp_path: Path, tail: bytes, chunks: dict[int, str]
) -> None:
    header = partial.Header(url="http://hub/x", nbytes=9, digests={"md5": "0"})
    (tmp_path / "journal").write_bytes(msgspec.json.encode(header) + b"\n" + tail)
    assert partial._read_journal(tmp_path / "journal") == (header, chunks)


@pytest.mark.parametrize("data", [b"", b"\n", b"{", b"\xff\xfe", b"[" * 5000, b'{"url": 1}\n[0,"aa"]\n', b"null\n"])
def test_a_journal_that_is_none_is_begun_anew(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "journal").write_bytes(data)
    assert partial._read_journal(tmp_path / "journal") == (None, {})
    assert partial._read_journal(tmp_path / "none") == (None, {})


def test_the_claim_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    left = tmp_path / STATE / f"{KEY}.part.{dead()}"
    left.mkdir(parents=True)
    (left / "data").write_bytes(b"data")
    claim = Claims(tmp_path).take(KEY)
    assert claim is not None
    assert claim.data.read_bytes() == b"data"
    assert len(names(tmp_path)) == 1


def test_the_claim_of_another_machine_is_taken_over_after_its_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SILENCE_S", 0.1)
    left = tmp_path / STATE / f"{KEY}.part.{ELSEWHERE}"
    left.mkdir(parents=True)
    claims = Claims(tmp_path)
    for second in range(3):
        os.utime(left, (second, second))
        assert claims.take(KEY) is None
        time.sleep(0.06)
    time.sleep(0.1)
    assert claims.take(KEY) is not None


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_two_that_come_at_the_same_moment_do_not_both_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]
) -> None:
    """The second one looked before the first one was there, and acts after it."""
    first, second = Claims(tmp_path), Claims(tmp_path)
    first._name, second._name = (f"{Owner.here()}-{letter * 6}" for letter in order)
    rename, taken = partial._renamed, []

    def renamed(source: Path, target: Path) -> bool:
        monkeypatch.setattr(partial, "_renamed", rename)
        taken.append(first.take(KEY))
        return rename(source, target)

    monkeypatch.setattr(partial, "_renamed", renamed)
    taken.append(second.take(KEY))
    assert sum(claim is not None for claim in taken) == 1
    first.release_all()
    second.release_all()
    assert names(tmp_path) == [f"{KEY}.part"]
    assert second.take(KEY) is not None


def test_clearing_leaves_what_others_are_at_work_on(tmp_path: Path) -> None:
    claims, other = Claims(tmp_path), Claims(tmp_path)
    claim = other.take("a")
    assert claim is not None
    for name in ("b.part", f"c.part.{dead()}"):
        (tmp_path / STATE / name).mkdir()
        (tmp_path / STATE / name / "data").write_bytes(b"data")
    (tmp_path / STATE / "d.done").write_bytes(b"{}")
    claims.clear()
    assert names(tmp_path) == [claim.folder.name]
    other.drop("a")
    other.clear()
    assert not (tmp_path / STATE).exists()


@pytest.mark.parametrize("name", ["b.part", "b.part.OWNER"])
def test_a_clearing_that_was_killed_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / STATE / name.replace("OWNER", dead())
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"data")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            Claims(tmp_path).clear()
    assert len(names(tmp_path)) == 1
    Claims(tmp_path).clear()
    assert not (tmp_path / STATE).exists()


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_lost_its_claim_to_another_machine_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was silent for too long; the other one dies in turn."""
    monkeypatch.setattr(partial, "SILENCE_S", 0.3)
    data = content(5 << 20)
    with Hub(rate=20 << 20) as hub:
        hub.add(REPO, {WEIGHTS: data})

        def take_over(name: str, offset: int) -> None:
            if name != WEIGHTS or offset < 2 << 20:
                return
            hub.on_body = lambda name, offset: None
            (claim,) = (tmp_path / STATE).glob("*.part.*")
            claim.rename(claim.with_name(f"{claim.name.partition('.')[0]}.part.{ELSEWHERE}"))

        hub.on_body = take_over
        fetch(hub, tmp_path, policy=replace(QUICK, deadline_s=20))
        assert hub.bytes_sent(WEIGHTS) == len(data)
    assert_complete(tmp_path, {WEIGHTS: data})


class Nobody:
    def started(self, name: str, nbytes: int, done_nbytes: int) -> None: ...

    def advanced(self, name: str, nbytes: int) -> None: ...

    def finished(self, done: Done) -> None: ...

    def look(self, name: str, head: bytes) -> None: ...


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Fetch]:
    """A file of three chunks, of which nothing is there yet."""
    claim = Claims(tmp_path).take(key_of(WEIGHTS))
    assert claim is not None
    with Web() as web:
        file = RemoteFile(WEIGHTS, "http://127.0.0.1:9/", 3 * partial.CHUNK_NBYTES, {"sha256": "0" * 64})
        fetch = Fetch(file, claim, web, Nobody())
        yield fetch
        fetch.close()


def chunk(byte: bytes) -> memoryview:
    from weightops.io.platform.machine import page_memory

    buffer = memoryview(page_memory(partial.CHUNK_NBYTES))
    buffer[:] = byte * len(buffer)
    return buffer


def test_a_late_write_of_a_version_that_was_given_up_changes_nothing(begun: Fetch) -> None:
    begun._write(0, 0, chunk(b"o"), partial.CHUNK_NBYTES)
    begun._restart(_Segment(0, 3, 0), "new", whole=False)
    begun._write(1, 0, chunk(b"n"), partial.CHUNK_NBYTES)
    begun._write(0, 0, chunk(b"o"), partial.CHUNK_NBYTES)
    begun._write(0, 1, chunk(b"o"), partial.CHUNK_NBYTES)
    data = begun.claim.data.read_bytes()
    assert data[: partial.CHUNK_NBYTES] == b"n" * partial.CHUNK_NBYTES
    assert data[partial.CHUNK_NBYTES :].strip(b"\0") == b""
    assert begun._have == {0}


def test_a_version_is_given_up_once_nobody_is_writing_it_any_more(begun: Fetch) -> None:
    """Else the old bytes could land on top of the new ones, after these were hashed."""
    restarted = threading.Event()

    def restart() -> None:
        begun._restart(_Segment(0, 3, 0), "new", whole=False)
        restarted.set()

    thread = threading.Thread(target=restart)
    with begun._writing(0) as current:
        assert current
        thread.start()
        assert not restarted.wait(0.1)
    assert restarted.wait(5)
    thread.join()
