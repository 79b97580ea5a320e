from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from systems import mkfifo, needs_itself

from weightops.errors import CorruptInput, Interrupted, SourceMissing, UsageError, WeightopsError
from weightops.io import digests
from weightops.io.digests import HEX_DIGITS, NAMED, FileDigests, hash_file, hash_files, new_hasher

INSTALLED = [name for name in NAMED if name != "b3"]
BLOCKS = [0, 1, digests._BLOCK_NBYTES, digests._THREAD_BLOCK_NBYTES + 1, 3 * digests._THREAD_BLOCK_NBYTES - 7]


def reference(name: str, data: bytes) -> str:
    if name in ("xxh64", "xxh3_64", "xxh3_128"):
        value: int = getattr(xxhash, name)(data).intdigest()
        return value.to_bytes(HEX_DIGITS[name] // 2, "big").hex()
    return hashlib.new(name, data).hexdigest()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("md5", "b1946ac92492d2347c6235b4d2611184"),
        ("sha1", "f572d396fae9206628714fb2ce00f72e94f2258f"),
        ("xxh64", "e4c191d091bd8853"),
        ("xxh3_64", "99fc819aaba2462a"),
        ("xxh3_128", "6bba86c7e069f56d5a10b435f1c8e49c"),
    ],
)
def test_golden(name: str, expected: str) -> None:
    """What md5sum, sha1sum and xxhsum 0.8.1 print for `hello` and a newline."""
    hasher = new_hasher(name)
    hasher.update(memoryview(b"hello\n"))
    assert hasher.hexdigest() == expected


@pytest.mark.parametrize("nbytes", BLOCKS)
def test_every_algorithm_in_one_pass(tmp_path: Path, nbytes: int) -> None:
    data = os.urandom(nbytes)
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    told: list[int] = []
    found = hash_file(path, INSTALLED, told.append)
    assert found == FileDigests(nbytes, {name: reference(name, data) for name in INSTALLED})
    assert sum(told) == nbytes
    assert {name: len(digest) for name, digest in found.digests.items()} == {n: HEX_DIGITS[n] for n in INSTALLED}


@pytest.mark.parametrize("bits", [8, 128, 256, 504])
def test_blake2b_of_other_lengths_is_what_b2sum_prints(bits: int) -> None:
    printed = subprocess.run(["b2sum", "-l", str(bits)], input=b"hello", capture_output=True, check=True).stdout
    hasher = new_hasher(f"blake2b-{bits}")
    hasher.update(memoryview(b"hello"))
    assert printed.split()[0].decode() == hasher.hexdigest()


@pytest.mark.parametrize("nbytes", BLOCKS)
def test_fast_algorithms_alone(tmp_path: Path, nbytes: int) -> None:
    data = os.urandom(nbytes)
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    assert hash_file(path, ["xxh3_128"]).digests == {"xxh3_128": reference("xxh3_128", data)}


def test_b3_agrees_with_b3sum_or_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"")
    try:
        import blake3  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="blake3 package") as caught:
            hash_files([(path, ["b3"])])
        assert caught.value.hint == "pip install 'weightops[b3]'"
    else:
        empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        assert hash_file(path, ["b3"]).digests == {"b3": empty}


@pytest.mark.parametrize("name", ["crc32", "MD5", "", "sha-256"])
def test_unknown_algorithm(name: str) -> None:
    with pytest.raises(UsageError, match="expected one of md5, sha1"):
        new_hasher(name)


def test_results_keep_the_order_and_errors_their_place(tmp_path: Path) -> None:
    for i, nbytes in enumerate([10, 5_000_000, 0, 300]):
        (tmp_path / str(i)).write_bytes(bytes(nbytes))
    mkfifo(tmp_path / "fifo")
    names = ["0", "1", "absent", "2", "fifo", "3"]
    found = hash_files([(tmp_path / name, ["md5"]) for name in names], workers=3)
    assert [r.nbytes if isinstance(r, FileDigests) else type(r) for r in found] == [
        10,
        5_000_000,
        SourceMissing,
        0,
        CorruptInput,
        300,
    ]


def test_no_files_and_no_workers() -> None:
    assert hash_files([]) == []
    with pytest.raises(UsageError, match="0 workers"):
        hash_files([], workers=0)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket"])
def test_only_regular_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "fifo":
        mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    with pytest.raises(CorruptInput, match="not a regular file"):
        hash_file(path, ["md5"])


@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite"])
@pytest.mark.parametrize("algorithm", ["md5", "xxh3_128"])
def test_changed_while_hashed(tmp_path: Path, change: str, algorithm: str) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(10_000_000))
    os.utime(path, (1, 1))

    def meddle(_: int) -> None:
        if change == "grow":
            with path.open("ab") as file:
                file.write(bytes(1 << 20))
        elif change == "shrink":
            os.truncate(path, 9_999_999)
        else:
            with path.open("r+b") as file:
                file.write(b"x")

    with pytest.raises(CorruptInput, match="changed while it was being hashed"):
        hash_file(path, [algorithm], meddle)


def test_file_that_grows_forever_ends(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(bytes(1000))
    told = []

    def append(nbytes: int) -> None:
        told.append(nbytes)
        with path.open("ab") as file:
            file.write(bytes(4000))

    with pytest.raises(CorruptInput, match="changed"):
        hash_file(path, ["md5"], append)
    assert len(told) <= 2


@needs_itself("/proc")
def test_pseudo_file_without_a_size() -> None:
    with pytest.raises(CorruptInput, match="changed"):
        hash_file(Path("/proc/self/status"), ["md5"])


@pytest.mark.parametrize("algorithms", [["md5", "sha256"], ["xxh3_128"]])
def test_cancelled_stops_within_a_block(tmp_path: Path, algorithms: list[str]) -> None:
    files = [tmp_path / name for name in "abcd"]
    for path in files:
        with path.open("wb") as file:
            file.truncate(1 << 30)
    told: list[int] = []
    stop = threading.Event()

    def advance(nbytes: int) -> None:
        told.append(nbytes)
        stop.set()

    def cancelled() -> None:
        if stop.is_set():
            raise Interrupted(15)

    started = time.monotonic()
    with pytest.raises(Interrupted, match="interrupted") as caught:
        hash_files([(p, algorithms) for p in files], workers=2, on_bytes=advance, cancelled=cancelled)
    assert caught.value.exit_code == 143
    assert sum(told) <= 4 * digests._THREAD_BLOCK_NBYTES
    assert time.monotonic() - started < 5


@needs_itself("fork")
def test_ctrl_c_stops_within_a_block(tmp_path: Path) -> None:
    for name in "ab":
        with (tmp_path / name).open("wb") as file:
            file.truncate(64 << 30)
    code = """if True:
        import signal
        from pathlib import Path
        from weightops.io.digests import hash_files
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        files = [(Path(name), ["md5", "sha256"]) for name in "ab"]
        try:
            hash_files(files, on_bytes=lambda nbytes: print(nbytes, flush=True))
        except KeyboardInterrupt:
            print("stopped")
        """
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=20)
    assert printed.splitlines()[-1] == b"stopped"


def test_error_in_a_callback_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10))

    def broken(_: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        hash_files([(path, ["md5"])], on_bytes=broken)


def test_read_error_names_file_and_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10))

    class Failing:
        def fileno(self) -> int:
            return self.fd

        def __init__(self, fd: int, *_: object, **__: object) -> None:
            self.fd = fd

        def readinto(self, _: memoryview) -> int:
            raise OSError(5, "Input/output error")

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.fd)

    monkeypatch.setattr(digests, "open", Failing, raising=False)
    with pytest.raises(WeightopsError, match=r"a: cannot be read at byte 0 \(Input/output error\)"):
        hash_file(path, ["md5"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_leaves_no_threads(tmp_path: Path, threads: None) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(9_000_000))
    hash_files([(path, ["md5", "sha256"])] * 3, workers=2)


@pytest.mark.parametrize(("tool", "name"), [("md5sum", "md5"), ("sha256sum", "sha256"), ("b2sum", "blake2b")])
def test_agrees_with_coreutils(tmp_path: Path, tool: str, name: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(os.urandom(5_000_001))
    printed = subprocess.run([tool, path], capture_output=True, check=True, text=True).stdout
    assert hash_file(path, [name]).digests[name] == printed.split()[0]
