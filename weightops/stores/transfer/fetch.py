"""Fetching one file: any number of streams bring ranges of it, each chunk goes to disk and into the journal.

Digests follow the bytes in order: a chunk that arrives where the digests stand is hashed on its way, others are read
again once it is their turn. The file gets its final name when its digests are right, and no sooner.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import xxhash

from weightops.errors import Differs, NetworkFailed
from weightops.io.direct import DirectFile, write_failure
from weightops.io.escape import escape
from weightops.io.platform.files import read_at
from weightops.stores.hashing import FileHasher
from weightops.stores.transfer.events import Events
from weightops.stores.transfer.partial import CHUNK_NBYTES, Claim, Header, Journal, right_chunks
from weightops.stores.transfer.pipe import Pipe
from weightops.stores.web.body import Body, Miscoded, RangeRefused
from weightops.stores.web.http import Tries
from weightops.stores.web.listing import RemoteFile
from weightops.stores.web.policy import Transient
from weightops.stores.web.web import Web

_MIN_SEGMENT, _MAX_SEGMENT = 4, 64
"""Chunks that one request asks for: 16 to 256 MiB."""
_MAX_RESTARTS = 3
_HEAD_NBYTES = 4096
_COMPRESSED = (".gz", ".tgz", ".br", ".zst")
"""Files that are compressed themselves: servers call that a coding, and mean the file as it is."""


class _Stale(Exception):
    """What is being fetched has been given up for another version."""


@dataclass
class _Segment:
    """Chunks `[first, stop)`, given to one stream; `generation` counts the versions of the file that were seen."""

    first: int
    stop: int
    generation: int


class Fetch:
    """One file in work. Streams call `stream`; when `is_whole`, one of them calls `finish`."""

    def __init__(self, file: RemoteFile, claim: Claim, web: Web, events: Events) -> None:
        """Continue from what is on disk and right."""
        self.file, self.claim = file, claim
        self._web, self._events = web, events
        self._shown = escape(file.name)
        self._nbytes = file.nbytes
        self._state = threading.Condition()
        self._hash_lock = threading.Lock()
        self._generation = self._restarts = self._writers = self._mistakes = 0
        self._ranges = True
        self._raw = file.name.endswith(_COMPRESSED)
        self._was_decoded = False
        self._content_type = ""
        self._todo: deque[range] = deque()
        self._have: set[int] = set()
        self._scratch: memoryview | None = None
        self.streams = 0
        etag = "" if file.digests else file.etag
        header = Header(url=file.url, nbytes=file.nbytes, digests=dict(file.digests), etag=etag)
        self._journal = Journal(claim, header)
        self._algorithms = tuple(dict.fromkeys(("xxh3_128", *file.digests)))
        try:
            self._data = DirectFile(claim.data, file.nbytes or 0, resume=True)
            self.resumed_nbytes = self._recheck()
        except BaseException:
            self._journal.close()
            raise
        events.started(file.name, self._nbytes or 0, self.resumed_nbytes)

    def _recheck(self) -> int:
        """Go by what is on disk: keep the chunks whose digests are right; the bytes in them."""
        self._start_hashing()
        nbytes = self._nbytes or 0
        good: dict[int, str] = {}
        for index, part in right_chunks(self.claim.data, self._journal, nbytes):
            self._web.check()
            if part is not None:
                good[index] = self._journal.chunks[index]
                if index == self._position:
                    self._hasher.update(part)
                    self._position += 1
        if self._journal.chunks:
            self._journal.begin(self._journal.header, good)
        self._have = set(good)
        self._todo = deque(_gaps(good.keys(), self._count))
        return sum(self._chunk_nbytes(index) for index in good)

    def _start_hashing(self) -> None:
        self._hasher = FileHasher(self._algorithms, self._nbytes or 0)
        self._position = 0

    @property
    def _count(self) -> int:
        """Chunks of the file; one if its size is not known, for then it comes in one piece."""
        return -(-self._nbytes // CHUNK_NBYTES) if self._nbytes is not None else 1

    def _chunk_nbytes(self, index: int) -> int:
        return CHUNK_NBYTES if self._nbytes is None else min(CHUNK_NBYTES, self._nbytes - index * CHUNK_NBYTES)

    @property
    def is_whole(self) -> bool:
        """Whether every chunk is on disk."""
        with self._state:
            return self._nbytes is not None and len(self._have) == self._count

    @property
    def todo_nbytes(self) -> int:
        """Bytes that no stream has taken on; none if one stream has to bring them all."""
        with self._state:
            return sum(map(len, self._todo)) * CHUNK_NBYTES if self._ranges and self._nbytes else 0

    def stream(self, pipe: Pipe) -> None:
        """Fetch segments until none is left to take. Raises `NetworkFailed`, `Differs` and what `Web.get` does."""
        tries = Tries(self._web, self._shown)
        while (segment := self._take()) is not None:
            try:
                self._pull(segment, pipe, tries)
                pipe.drain()
            except _Stale:
                continue
            finally:
                self._give_back(segment)

    def _take(self) -> _Segment | None:
        with self._state:
            if not self._todo:
                return None
            run = self._todo.popleft()
            share = sum(map(len, self._todo), len(run)) // (2 * max(self.streams, 1))
            size = len(run) if not self._ranges else min(len(run), max(_MIN_SEGMENT, min(share, _MAX_SEGMENT)))
            if size < len(run):
                self._todo.appendleft(run[size:])
            return _Segment(run[0], run[0] + size, self._generation)

    def _give_back(self, segment: _Segment) -> None:
        """What a stream took and did not bring is to be done again."""
        with self._state:
            if segment.generation == self._generation:
                taken = range(segment.first, segment.stop)
                self._todo.extendleft(reversed([range(i, i + 1) for i in taken if i not in self._have]))

    def _pull(self, segment: _Segment, pipe: Pipe, tries: Tries) -> None:
        """Bring a segment, going on at the very byte where a connection broke."""
        position, filled, slot = segment.first * CHUNK_NBYTES, 0, pipe.slot()
        while not self._is_done(segment, position):
            began = position
            try:
                with self._open(segment, position) as body:
                    if body.start != position:
                        self._events.advanced(self.file.name, -filled)
                        position, filled = 0, 0
                    while not self._is_done(segment, position):
                        data = body.read(min(CHUNK_NBYTES - filled, self._stop(segment) - position))
                        if segment.generation != self._generation:
                            raise _Stale
                        slot[filled : filled + len(data)] = data
                        filled += len(data)
                        position += len(data)
                        self._events.advanced(self.file.name, len(data))
                        if not data:
                            self._ended(position, segment)
                        if filled and (filled == CHUNK_NBYTES or self._is_done(segment, position)):
                            self._put(pipe, segment, (position - 1) // CHUNK_NBYTES, slot, filled)
                            filled, slot = 0, pipe.slot()
                            tries.progressed()
            except Transient as error:
                if isinstance(error, Miscoded):
                    self._raw = True
                if position - began >= self._web.policy.min_rate * self._web.policy.timeout_s:
                    tries.progressed()
                tries.failed(error)
            except BaseException:
                self._events.advanced(self.file.name, -filled)
                raise

    def _stop(self, segment: _Segment) -> int:
        """The byte that ends a segment; far away if nobody knows where the file ends."""
        return 1 << 62 if self._nbytes is None else min(segment.stop * CHUNK_NBYTES, self._nbytes)

    def _is_done(self, segment: _Segment, position: int) -> bool:
        return position >= self._stop(segment)

    def _ended(self, position: int, segment: _Segment) -> None:
        """The body is over: that is the end of a file whose size was not known, and a fault of any other."""
        if self._nbytes is not None:
            raise Transient(f"{self._shown}: ended at byte {position}, expected {self._stop(segment)}")
        with self._state:
            self._nbytes = position
            segment.stop = self._count

    def _open(self, segment: _Segment, position: int) -> Body:
        """A body that begins at `position`, or at 0 if the file has to begin anew; held against what is known."""
        if segment.generation != self._generation:
            raise _Stale
        stop = self._stop(segment)
        whole = position == 0 and (stop == self._nbytes or self._nbytes is None) and stop <= CHUNK_NBYTES
        ranged = not whole and self._ranges
        start, end = (position, stop) if ranged else (0, None)
        try:
            body = self._web.get(self.file.url, start, end, self._journal.header.etag, raw=self._raw)
            if body.is_decoded and self._nbytes is not None and body.sent_nbytes == self._nbytes:
                body.close()
                self._raw = True  # the file is what is sent, whatever the server calls it
                body = self._web.get(self.file.url, start, end, self._journal.header.etag, raw=True)
        except RangeRefused as error:
            if error.total != self._nbytes:
                raise self._mistaken(f"has {error.total} bytes, expected {self._nbytes}") from None
            raise Transient(str(error)) from None
        try:
            self._compare(body, segment, position, ranged)
        except BaseException:
            body.close()
            raise
        return body

    def _compare(self, body: Body, segment: _Segment, position: int, ranged: bool) -> None:
        """Whether the body is of the version that is being fetched; begins anew if not."""
        if self._nbytes is not None and body.total not in (None, self._nbytes):
            self._events.look(self.file, body.read(_HEAD_NBYTES), body.content_type, doubtful=True)
            raise self._mistaken(f"has {body.total} bytes, expected {self._nbytes}")
        if not body.ends_by_itself and not self.file.digests:
            raise NetworkFailed(
                f"{self._shown}: the server says neither how long it is nor when it ends",
                hint="give a digest, so that a whole file can be told from a part",
            )
        if body.coding and not (body.is_decoded or self._raw or self.file.digests):
            raise NetworkFailed(f"{self._shown}: the server sends it encoded ({body.coding}), which is not read")
        self._was_decoded |= body.is_decoded
        self._content_type = body.content_type
        # With a digest, an ETag says nothing that counts: servers of one file need not agree on it.
        known, etag = (self._journal.header.etag, body.etag) if not self.file.digests else ("", "")
        if body.start != position or (ranged and not body.is_part):
            self._take_all(segment, etag)
        elif known not in ("", etag) and (self._have or position):
            self._restart(segment, etag, whole=False)
            raise _Stale
        elif etag != known and not self._have:
            with self._state:
                self._journal.begin(msgspec.structs.replace(self._journal.header, etag=etag))

    def _take_all(self, segment: _Segment, etag: str) -> None:
        """The server sends the whole file, whatever it is asked for: one stream brings all of it."""
        with self._state:
            self._ranges = False
            if self._have or segment.first or self.streams > 1 or not self._todo:
                self._restart(segment, etag, whole=True)
            else:
                segment.stop = self._count
                self._todo.clear()
                self._journal.begin(msgspec.structs.replace(self._journal.header, etag=etag))

    def _restart(self, segment: _Segment, etag: str, *, whole: bool) -> None:
        """Give up what has arrived: the server has another version, or gives no part of it."""
        with self._state:
            if segment.generation != self._generation:
                raise _Stale
            self._restarts += 1
            if self._restarts > _MAX_RESTARTS:
                raise NetworkFailed(f"{self._shown}: the server's copy changes all the time, or it gives no ranges")
            self._generation += 1
            while self._writers:
                self._state.wait()
            self._events.advanced(self.file.name, -sum(map(self._chunk_nbytes, self._have)))
            self._have = set()
            self._journal.begin(msgspec.structs.replace(self._journal.header, etag=etag))
            with self._hash_lock:
                self._start_hashing()
            self._todo = deque() if whole else deque([range(self._count)])
            if whole:
                segment.first, segment.stop, segment.generation = 0, self._count, self._generation

    def _mistaken(self, why: str) -> Exception:
        """What the server says cannot be: worth a second try, and no third."""
        self._mistakes += 1
        return Transient(f"{self._shown}: {why}") if self._mistakes == 1 else Differs(f"{self._shown}: {why}")

    def _put(self, pipe: Pipe, segment: _Segment, index: int, slot: memoryview, filled: int) -> None:
        if index == 0:
            self._events.look(self.file, bytes(slot[: min(filled, _HEAD_NBYTES)]), self._content_type, doubtful=False)
        generation = segment.generation
        pipe.put(
            lambda: self._hash(generation, index, slot[:filled]), lambda: self._write(generation, index, slot, filled)
        )

    def _hash(self, generation: int, index: int, part: memoryview) -> None:
        """Hash a chunk from memory if it is its turn and nobody else is hashing."""
        if self._hash_lock.acquire(blocking=False):
            try:
                if generation == self._generation and index == self._position:
                    self._hasher.update(part)
                    self._position += 1
                    self._catch_up()
            finally:
                self._hash_lock.release()

    def _catch_up(self) -> None:
        """Hash from disk what has been written ahead of the digests."""
        while self._position in self._have:
            if self._scratch is None:
                self._scratch = memoryview(bytearray(CHUNK_NBYTES))
            part = self._scratch[: self._chunk_nbytes(self._position)]
            try:
                with self.claim.data.open("rb", buffering=0) as file:
                    count = read_at(file.fileno(), part, self._position * CHUNK_NBYTES)
            except OSError as error:
                raise write_failure(self.claim.data, error) from None
            self._hasher.update(part[:count])
            self._position += 1

    def _write(self, generation: int, index: int, slot: memoryview, filled: int) -> None:
        digest = xxhash.xxh3_128_hexdigest(slot[:filled])
        with self._writing(generation) as current:
            if current:
                self._data.write(index * CHUNK_NBYTES, slot, filled)
                with self._state:
                    self._journal.add(index, digest)
                    self._have.add(index)

    @contextmanager
    def _writing(self, generation: int) -> Iterator[bool]:
        """Whether the generation still counts; while the block runs, no other one begins."""
        with self._state:
            current = generation == self._generation
            self._writers += current
        try:
            yield current
        finally:
            with self._state:
                self._writers -= current
                self._state.notify_all()

    def finish(self) -> dict[str, str] | None:
        """The digests of the whole file, now flushed to disk; None if they were wrong and it is to be fetched again.

        Raises `Differs` when they are wrong for the second time.
        """
        with self._hash_lock:
            self._catch_up()
            found = self._hasher.digests()
        wrong = next((name for name, digest in self.file.digests.items() if found[name] != digest), None)
        if wrong is None:
            self._data.close(self._nbytes)
            self._journal.close()
            return found
        self._mistakes += 1
        if self._mistakes > 1:
            self._journal.begin(self._journal.header)
            raise Differs(
                f"{self._shown}: {wrong} is {found[wrong]}, expected {self.file.digests[wrong]}, twice over",
                hint="the server's copy is damaged or was replaced: ask its owner, or name another revision",
            )
        if self._was_decoded:
            self._raw = not self._raw
        with self._state:
            had_nbytes = sum(map(self._chunk_nbytes, self._have))
            kept_nbytes = self._recheck()
            if kept_nbytes == had_nbytes:
                # The disk holds what arrived, so what arrived was wrong, and nothing says in which chunk.
                self._nbytes = self.file.nbytes
                self._journal.begin(self._journal.header)
                kept_nbytes = self._recheck()
            self._events.advanced(self.file.name, kept_nbytes - had_nbytes)
        return None

    def close(self) -> None:
        self._data.abandon()
        self._journal.close()

    @property
    def etag(self) -> str:
        """The server's ETag."""
        return self._journal.header.etag

    @property
    def nbytes(self) -> int:
        """The file's size; to be asked when it is whole."""
        return self._nbytes or 0


def _gaps(have: Iterable[int], count: int) -> list[range]:
    """The runs of chunks below `count` that are missing."""
    edges = [-1, *sorted(have), count]
    return [range(a + 1, b) for a, b in pairwise(edges) if b - a > 1]
