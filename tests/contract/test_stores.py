"""What every store answers, asked of each: a folder, one in a bucket or on a web server, a hub's repository, a copy.

After restic's backend suite and zarr's StoreTests. A new kind of store is one more `Kind` here.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import buckets
import pytest
from hub import Hub
from huggingface_hub import snapshot_download
from safetensors.numpy import save

from weightops.errors import CorruptInput, NoRoom, OutputExists, SourceMissing, WeightopsError
from weightops.formats.places import find_place
from weightops.io.platform.machine import page_memory
from weightops.io.source_file import SourceFile
from weightops.stores.local import LocalStore
from weightops.stores.reader import FileReader
from weightops.stores.s3 import target
from weightops.stores.s3.store import S3Store
from weightops.stores.store import Store, WritableStore
from weightops.stores.stores import BUCKETS, Stores
from weightops.stores.web.http import Http
from weightops.stores.web.policy import Policy, Transient
from weightops.stores.web.web import Web

WEIGHTS = save({}, {"filler": "x" * 300_000})
FILES: Mapping[str, bytes] = {
    "model.safetensors": WEIGHTS,
    "config.json": b"{}",
    "generation_config.json": b"",
    "additional_chat_templates/rag.jinja": b"{{ messages }}",
}
QUICK = Policy(attempts=2, timeout_s=5)


@dataclass
class Kind:
    """A store with `FILES` in it, how to reach it, and how somebody else changes a file of it."""

    stores: Stores
    open: Callable[[], Store]
    change: Callable[[str, bytes], None]
    has_subfolders: bool = True


@pytest.fixture(params=["local", "s3", "s3 listed", "web", "hub", "cache", "cache offline"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    if request.param == "local":
        for name, data in FILES.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        yield Kind(Stores(), lambda: LocalStore(tmp_path), lambda name, data: slowly(tmp_path / name, data))
        return
    if request.param.startswith("s3"):
        yield from in_bucket(request.getfixturevalue("store_endpoint"), is_listed=request.param.endswith("listed"))
        return
    with Hub() as hub, Web(QUICK, endpoint=hub.endpoint) as web:
        is_cached = request.param.startswith("cache")
        cache = tmp_path / "cache" if is_cached else None
        stores, files = Stores(web, cache=cache, offline=request.param.endswith("offline")), dict(FILES)

        def publish() -> None:
            hub.static.update({f"m/{name}": data for name, data in files.items()})
            hub.add("org/m", files)
            if cache is not None:
                snapshot_download("org/m", cache_dir=cache, endpoint=hub.endpoint)
            hub.log.clear()

        def change(name: str, data: bytes) -> None:
            files[name] = data
            publish()

        def place() -> Store:
            url = f"{hub.endpoint}/static/files/m/" if request.param == "web" else "hf://org/m"
            found = find_place(url, stores)
            assert not isinstance(found, SourceFile)
            return found

        publish()
        yield Kind(stores, place, change, has_subfolders=request.param != "web")
        assert not is_cached or hub.bytes_sent() == 0


def in_bucket(endpoint: str, *, is_listed: bool) -> Iterator[Kind]:
    """A store that asks anew each time, or one of what was listed when it was opened."""
    with buckets.connect(endpoint) as connection:
        stores = Stores(connect={BUCKETS: lambda: buckets.connect(endpoint)})
        store = S3Store(buckets.new_bucket(connection), "models/m", connection)
        for name, data in FILES.items():
            store.put(name, data)

        def place() -> Store:
            found = find_place(store.shown, stores)
            assert not isinstance(found, SourceFile)
            return found

        yield Kind(stores, place if is_listed else lambda: store, store.put)
        with stores.connected():
            pass  # what is open still is closed at the end


def slowly(path: Path, data: bytes) -> None:
    """Write a file at another time than it was written before, as far as the file system tells times apart."""
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:
        time.sleep(0.01)
        path.write_bytes(data)


def top() -> list[str]:
    return sorted(name for name in FILES if "/" not in name)


def read(kind: Kind, file: SourceFile) -> bytes:
    with FileReader(kind.stores) as files:
        data = files.read(file, 0, file.nbytes)
        files.check_unchanged()
        return data


# --- reading ----------------------------------------------------------------------------------------------------------


def test_names_are_those_that_lie_directly_in_it(kind: Kind) -> None:
    store = kind.open()
    assert [name for name in store.names() if name in FILES] == top()
    assert store.shown
    assert store.name
    if kind.has_subfolders:
        assert store.below("additional_*") == ["additional_chat_templates/rag.jinja"]
    assert store.below("nothing*") == []


def test_what_is_there_can_be_read_and_what_is_not_is_missing(kind: Kind) -> None:
    store = kind.open()
    for name in top():
        assert store.has(name)
        assert store.get(name) == FILES[name]
        assert store.identity(name).nbytes == len(FILES[name])
        assert store.identity(name).name == name
    assert not store.has("nowhere.json")
    for ask in (store.identity, store.get):
        with pytest.raises(SourceMissing, match=r"nowhere\.json"):
            ask("nowhere.json")


def test_a_failure_is_over_when_the_last_command_under_it_is(kind: Kind) -> None:
    file = kind.open().identity("model.safetensors")
    with kind.stores.connected(), suppress(WeightopsError):
        kind.stores.interrupt(WeightopsError("enough"))
        read(kind, file)
        assert not file.is_remote
    assert read(kind, file) == WEIGHTS


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "sub/../../config.json", "", "."])
def test_no_name_leads_out_of_it(kind: Kind, name: str) -> None:
    store = kind.open()
    for ask in (store.identity, store.get):
        with pytest.raises(CorruptInput, match=r"name|path|file"):
            ask(name)


def test_any_range_is_that_part_of_the_whole(kind: Kind) -> None:
    draw = random.Random(0)
    file = kind.open().identity("model.safetensors")
    with FileReader(kind.stores) as files:
        for _ in range(60):
            start = draw.randrange(len(WEIGHTS))
            nbytes = draw.choice([0, 1, 7, 4096, 70_000])
            nbytes = min(nbytes, len(WEIGHTS) - start)
            assert files.read(file, start, nbytes) == WEIGHTS[start : start + nbytes]
        with pytest.raises(CorruptInput, match="ends at byte"):
            files.read(file, len(WEIGHTS) - 3, 4)


def test_an_identity_stays_as_long_as_the_bytes_do(kind: Kind) -> None:
    assert kind.open().identity("model.safetensors") == kind.open().identity("model.safetensors")


@pytest.mark.parametrize("other", [WEIGHTS[:-9] + b"y" * 9, WEIGHTS + b" ", WEIGHTS[:1000]], ids=str.__class__)
def test_other_bytes_are_another_identity_and_the_first_never_gives_them(kind: Kind, other: bytes) -> None:
    before = kind.open().identity("model.safetensors")
    kind.change("model.safetensors", other)
    after = kind.open().identity("model.safetensors")
    assert after != before
    assert read(kind, after) == other
    try:
        found = read(kind, before)
    except WeightopsError as error:
        assert "model.safetensors" in str(error)  # noqa: PT017  # a hub keeps what it had, and may give that
    else:
        assert found == WEIGHTS


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def writable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WritableStore]:
    if request.param == "local":
        yield LocalStore(tmp_path)
        return
    with buckets.connect(request.getfixturevalue("store_endpoint")) as connection:
        yield S3Store(buckets.new_bucket(connection), "out", connection)


def names(store: Store) -> list[str]:
    return [name for name in store.names() if not name.startswith(".")]


def stream(store: WritableStore, name: str, data: bytes) -> None:
    target = store.target(name, len(data))
    try:
        block = memoryview(page_memory(1 << 16))
        for start in range(0, len(data), len(block)):
            used = len(data[start : start + len(block)])
            block[:used] = data[start : start + used]
            target.write(start, block, used)
        target.close()
    except BaseException:
        target.abandon()
        raise
    target.commit()


def pieces(store: WritableStore, name: str, data: bytes) -> None:
    with store.putting(name) as write:
        for start in range(0, len(data), 1000):
            write(data[start : start + 1000])


WAYS: Mapping[str, Callable[[WritableStore, str, bytes], None]] = {
    "create": lambda store, name, data: store.create(name, data),
    "put": lambda store, name, data: store.put(name, data),
    "putting": pieces,
    "target": stream,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@ways
@pytest.mark.parametrize("name", ["a.bin", "sub/folder/a.bin"])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, 200_001])
def test_what_was_written_is_what_is_read(
    writable: WritableStore, way: Callable[..., None], name: str, nbytes: int
) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    way(writable, name, data)
    assert writable.get(name) == data
    assert writable.identity(name).nbytes == nbytes
    assert names(writable) == [name.partition("/")[0]]


def test_a_name_that_is_taken_is_not_created(writable: WritableStore) -> None:
    writable.create("a", b"first")
    with pytest.raises(OutputExists, match="a exists"):
        writable.create("a", b"second")
    assert writable.get("a") == b"first"
    writable.put("a", b"third")
    assert writable.get("a") == b"third"


def test_of_many_that_create_one_name_one_wins(writable: WritableStore) -> None:
    won: list[int] = []
    ready = threading.Barrier(8)

    def create(number: int) -> None:
        ready.wait()
        try:
            writable.create("lock", b"%d" % number * 1000)
        except OutputExists:
            return
        won.append(number)

    threads = [threading.Thread(target=create, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert writable.get("lock") == b"%d" % won[0] * 1000


def test_a_target_has_no_name_before_it_is_committed(writable: WritableStore) -> None:
    block = memoryview(page_memory(4096))
    for end in ("abandon", "close"):
        target = writable.target("a", 4096)
        target.write(0, block, 4096)
        getattr(target, end)()
        assert not writable.has("a")
    target.commit()
    assert writable.get("a") == bytes(block)


def test_what_is_removed_is_gone_and_what_is_not_there_is_none(writable: WritableStore) -> None:
    writable.put("sub/a", b"data")
    assert writable.find("sub/a") == b"data"
    for _ in range(2):
        writable.remove("sub/a")
        assert writable.find("sub/a") is None
    assert not writable.has("sub/a")


def test_a_target_of_which_only_the_most_was_known_ends_where_it_ends(writable: WritableStore) -> None:
    """More than the disk has: no room is taken ahead."""
    target = writable.target("a", 1 << 40, is_most=True)
    block = memoryview(page_memory(8192))
    block[:5] = b"whole"
    target.write(0, block, 8192)
    target.write(8192, block, 5)
    target.close(8197)
    target.commit()
    assert writable.get("a") == bytes(block) + b"whole"


def test_all_files_below_a_folder_are_listed(writable: WritableStore) -> None:
    for name in ("b/2/x", "b/1", "a", "bb/y"):
        writable.put(name, b"")
    assert writable.listed("") == ["a", "b/1", "b/2/x", "bb/y"]
    assert writable.listed("b") == ["b/1", "b/2/x"]
    assert writable.listed("nowhere") == []


class Faults:
    """The `fatal`-th of all calls fails: it is not made, or, if its answer `is_lost`, made and then fails."""

    def __init__(self, fatal: int, error: Exception, *, is_lost: bool = False) -> None:
        self.count, self._fatal, self._error, self._is_lost = 0, fatal, error, is_lost

    def among(self, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.count += 1
            if self.count != self._fatal:
                return original(*args, **kwargs)
            if self._is_lost:
                original(*args, **kwargs).close()  # type: ignore[attr-defined]
            raise self._error

        return call


@ways
def test_a_fault_at_every_call_leaves_the_name_with_nothing_or_the_whole(
    writable: WritableStore, way: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[tuple[object, list[str], Exception, bool]] = [
        (os, ["open", "write", "pwrite", "fsync", "replace", "link", "rename"], OSError(28, os.strerror(28)), False)
    ]
    if isinstance(writable, S3Store):
        monkeypatch.setattr(target, "PART_NBYTES", 20_000)
        monkeypatch.setattr(target, "_STEP_NBYTES", 1)
        kinds = [(Http, ["request"], NoRoom("full"), False), (Http, ["request"], Transient("lost"), True)]
    data = random.Random(1).randbytes(70_000)
    for where, calls, error, is_lost in kinds:
        for fatal in range(1, 100):
            name, faults = f"file-{is_lost}-{fatal}", Faults(fatal, error, is_lost=is_lost)
            with monkeypatch.context() as patch:
                for call in calls:
                    patch.setattr(where, call, faults.among(getattr(where, call)))
                with suppress(*(() if is_lost else (WeightopsError,))):
                    way(writable, name, data)
            # What had its name before the folder could be flushed is whole too.
            assert not writable.has(name) or writable.get(name) == data
            if faults.count < fatal:
                break
        assert fatal > (1 if isinstance(writable, S3Store) else 3)


@ways
@pytest.mark.parametrize("name", ["../a", "/tmp/a", "out/a"])
def test_nothing_is_written_outside(tmp_path: Path, way: Callable[..., None], name: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "out").symlink_to(tmp_path / "other")
    with pytest.raises(CorruptInput, match="a"):
        way(LocalStore(tmp_path / "store"), name, b"data")
    assert list((tmp_path / "other").iterdir()) == []


@ways
def test_a_link_is_not_written_through(tmp_path: Path, way: Callable[..., None]) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "a").symlink_to(tmp_path / "theirs")
    try:
        way(LocalStore(tmp_path), "a", b"ours")
    except OutputExists:
        assert (tmp_path / "a").is_symlink()
    else:
        assert (tmp_path / "a").read_bytes() == b"ours"
        assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
