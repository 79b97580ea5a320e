"""Digests of whole files: one pass for any number of algorithms, several files at a time.

All hash functions release the GIL, so threads suffice.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from weightops.errors import CorruptInput, Interrupted, UsageError, WeightopsError
from weightops.io.escape import escape
from weightops.io.paths import open_regular
from weightops.io.platform.files import advise_in_order
from weightops.io.platform.machine import cores

HEX_DIGITS = {
    "md5": 32,
    "sha1": 40,
    "sha224": 56,
    "sha256": 64,
    "sha384": 96,
    "sha512": 128,
    "blake2b": 128,
    "b3": 64,
    "xxh64": 16,
    "xxh3_64": 16,
    "xxh3_128": 32,
}
NAMED = tuple(HEX_DIGITS)
"""What there is to choose from."""
HEX_DIGITS |= {f"blake2b-{bits}": bits // 4 for bits in range(8, 512, 8)}
"""The algorithms, and the length of their digests in hexadecimal digits; `blake2b-256` is what `b2sum -l 256` makes."""
GIT_SHA1 = "git_sha1"
"""SHA-1 of a git blob, which is `blob NBYTES NUL` and the content: what hubs know small files by."""

_QUICK = ("xxh3_128", "xxh3_64", "xxh64", "b3")
"""What costs next to nothing beside another digest, in the order in which they are preferred."""
_XXHASH: dict[str, Callable[[], Hasher]] = {
    "xxh64": xxhash.xxh64,
    "xxh3_64": xxhash.xxh3_64,
    "xxh3_128": xxhash.xxh3_128,
}
_BLOCK_NBYTES = 1 << 20
_THREAD_BLOCK_NBYTES = 4 << 20
"""Larger where a block changes threads, so that this takes next to no time beside the hashing."""
_MAX_WAIT_S = 0.5


class Hasher(Protocol):
    """A running digest."""

    def update(self, data: memoryview, /) -> object:
        """Add the bytes to the digest."""

    def hexdigest(self) -> str:
        """The digest so far, in lower-case hexadecimal."""


class ToHash(NamedTuple):
    """A file to digest by some algorithms: all of it, or its bytes from `start` to before `stop`."""

    path: Path
    algorithms: Collection[str]
    start: int = 0
    stop: int | None = None


class FileDigests(NamedTuple):
    """How many bytes were read, which of a whole file is its size, and their digests by algorithm."""

    nbytes: int
    digests: dict[str, str]


def check_algorithm(name: str) -> None:
    """Raise `UsageError` unless there is such an algorithm."""
    if name not in HEX_DIGITS:
        raise UsageError(f"unknown digest algorithm {escape(name)!r}, expected one of {', '.join(NAMED)}")


def cheapest(digests: Mapping[str, str], computed: Collection[str]) -> dict[str, str]:
    """Of the digests of one file the one that costs least, where some are computed anyway; none if none is known."""
    known = [name for name in (*computed, *_QUICK, *digests) if name in digests and name in HEX_DIGITS]
    return {known[0]: digests[known[0]]} if known else {}


def new_hasher(algorithm: str, nbytes: int | None = None) -> Hasher:
    """A fresh digest; its hexadecimal form is what md5sum, sha256sum, b2sum, b3sum and xxhsum print.

    `nbytes` is the size of the file, which git's goes by.
    Raises `UsageError` for an unknown algorithm, or for b3 without the blake3 package.
    """
    if algorithm == GIT_SHA1 and nbytes is not None:
        return hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
    check_algorithm(algorithm)
    if algorithm in _XXHASH:
        return _XXHASH[algorithm]()
    if algorithm == "b3":
        return _new_blake3()
    if algorithm.startswith("blake2b-"):
        return hashlib.blake2b(digest_size=HEX_DIGITS[algorithm] // 2)
    return hashlib.new(algorithm, usedforsecurity=False)


def _new_blake3() -> Hasher:
    try:
        from blake3 import blake3
    except ImportError:
        raise UsageError(
            "b3 digests need the blake3 package, which is not installed", hint="pip install 'weightops[b3]'"
        ) from None
    hasher: Hasher = blake3()
    return hasher


def hash_bytes(data: bytes, algorithms: Collection[str]) -> dict[str, str]:
    """Digests of bytes in memory, by algorithm; raises as `new_hasher` does."""
    hashers = {name: new_hasher(name) for name in algorithms}
    for hasher in hashers.values():
        hasher.update(memoryview(data))
    return {name: hasher.hexdigest() for name, hasher in hashers.items()}


def hash_file(
    path: Path,
    algorithms: Collection[str],
    on_bytes: Callable[[int], object] | None = None,
    cancelled: Callable[[], object] | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    is_alone: bool = True,
) -> FileDigests:
    """Read a regular file once, or its bytes from `start` to before `stop`, and digest it by every algorithm.

    If it `is_alone`, other cores are idle: then it is read in one thread and digested in others.

    Between blocks of at most 4 MiB, `on_bytes` is told how many bytes were read, and `cancelled` raises in order
    to stop.
    Raises `SourceMissing`, `CorruptInput` when it is no regular file or changes meanwhile, `WeightopsError` when
    it cannot be read.
    """

    def tick(nbytes: int) -> None:
        if on_bytes is not None and nbytes:
            on_bytes(nbytes)
        if cancelled is not None:
            cancelled()

    with open(open_regular(path), "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        expected = (before.st_size if stop is None else stop) - start
        hashers = {name: new_hasher(name, expected) for name in algorithms}
        advise_in_order(file.fileno())
        # A block that changes cores leaves the caches, which costs a fifth. And the xxHash family outruns the disk and
        # the page cache: handing its blocks to a thread would cost more.
        threaded = is_alone and expected > _THREAD_BLOCK_NBYTES and not hashers.keys() <= _XXHASH.keys()
        block_nbytes = _THREAD_BLOCK_NBYTES if threaded else _BLOCK_NBYTES
        update = _update_threaded if threaded else _update
        if start:
            file.seek(start)
        # One byte more than a whole file has would show that it grows.
        most = expected + (stop is None)
        nbytes = update(list(hashers.values()), _blocks(file, escape(str(path)), start, most, block_nbytes, tick))
        after = os.fstat(file.fileno())
    if nbytes != expected or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise CorruptInput(
            f"{escape(str(path))}: changed while it was being hashed"
            f" (expected {before.st_size} bytes, found {max(start + nbytes, after.st_size)})",
            hint="wait until whatever writes it has finished, then run the command again",
        )
    return FileDigests(nbytes, {name: hasher.hexdigest() for name, hasher in hashers.items()})


def _blocks(
    file: FileIO, shown: str, start: int, most: int, block_nbytes: int, tick: Callable[[int], None]
) -> Iterator[memoryview]:
    """What follows in the file, which is read from `start` on, in two buffers by turns.

    A block stays whole while the next one is read. Never more than `most` bytes, lest a file that grows as fast as it
    is read keep us forever.
    """
    buffers = [memoryview(bytearray(min(most, block_nbytes))) for _ in range(2)]
    done = 0
    tick(0)
    while done < most:
        try:
            count = file.readinto(buffers[0][: most - done])
        except OSError as error:
            raise WeightopsError(f"{shown}: cannot be read at byte {start + done} ({error.strerror})") from None
        if not count:
            return
        yield buffers[0][:count]
        buffers.reverse()
        done += count
        tick(count)


def _update(hashers: Sequence[Hasher], blocks: Iterator[memoryview]) -> int:
    nbytes = 0
    for block in blocks:
        for hasher in hashers:
            hasher.update(block)
        nbytes += len(block)
    return nbytes


def _update_threaded(hashers: Sequence[Hasher], blocks: Iterator[memoryview]) -> int:
    """The same with a thread for each hasher, while this one reads the next block."""
    nbytes = 0
    with ThreadPoolExecutor(len(hashers), "hash") as pool:
        pending: list[Future[object]] = []
        for block in blocks:
            _finish(pending)
            pending = [pool.submit(hasher.update, block) for hasher in hashers]
            nbytes += len(block)
        _finish(pending)
    return nbytes


def _finish(futures: Iterable[Future[Any]]) -> None:
    """Wait for all of them; raises what one of them raised."""
    for future in futures:
        future.result()


def hash_files(
    files: Sequence[tuple[Path, Collection[str]] | ToHash],
    *,
    workers: int | None = None,
    on_bytes: Callable[[int], object] | None = None,
    cancelled: Callable[[], object] | None = None,
) -> list[FileDigests | WeightopsError]:
    """Digest each file, or part of one, `workers` of them at a time (by default one per core), largest first.

    The results stand in the order of `files`; a file that cannot be hashed has its error in its place. Callbacks
    as for `hash_file`, one call at a time but from several threads. An exception from a callback, and a
    KeyboardInterrupt, stop all workers within a block and come out here.
    Raises `UsageError` for an algorithm that is unknown or not installed.
    """
    wanted = [ToHash(*each) for each in files]
    for algorithm in {name for each in wanted for name in each.algorithms}:
        new_hasher(algorithm, 0)
    if workers is not None and workers < 1:
        raise UsageError(f"cannot hash with {workers} workers, expected at least 1")
    stop = threading.Event()
    lock = threading.Lock()
    workers = workers or cores()
    is_alone = len(wanted) < workers

    def advance(nbytes: int) -> None:
        with lock:
            if on_bytes is not None:
                on_bytes(nbytes)

    def check() -> None:
        if stop.is_set():
            raise Interrupted(signal.SIGINT)
        with lock:
            if cancelled is not None:
                cancelled()

    def work(each: ToHash) -> FileDigests | WeightopsError:
        try:
            return hash_file(
                each.path, each.algorithms, advance, check, start=each.start, stop=each.stop, is_alone=is_alone
            )
        except Interrupted:
            raise
        except WeightopsError as error:
            return error

    pool = ThreadPoolExecutor(workers, "hash-file")
    try:
        futures = {i: pool.submit(work, wanted[i]) for i in _largest_first(wanted)}
        pending = set(futures.values())
        while pending:
            # Python may miss a signal that comes just before a wait, and see it when the wait is over.
            done, pending = wait(pending, _MAX_WAIT_S, FIRST_EXCEPTION)
            _finish(done)
        return [futures[i].result() for i in range(len(wanted))]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _largest_first(wanted: Sequence[ToHash]) -> list[int]:
    """Indices of `wanted`; what cannot be asked for its size goes last, and fails when its turn comes."""

    def nbytes(index: int) -> int:
        each = wanted[index]
        if each.stop is not None:
            return each.stop - each.start
        try:
            return each.path.stat().st_size - each.start
        except OSError:
            return 0

    return sorted(range(len(wanted)), key=nbytes, reverse=True)
