"""Fetching many files into a folder: small ones first, several at a time, then several streams for what is left.

Each file appears under its final name by a rename, when its digests are right and it is on disk.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import msgspec

from weightops.errors import Interrupted, WeightopsError
from weightops.io.atomic import publish, write_whole
from weightops.stores.hashing import hash_fetched
from weightops.stores.transfer.events import Events
from weightops.stores.transfer.fetch import Fetch
from weightops.stores.transfer.partial import Claims, key_of
from weightops.stores.transfer.pipe import Pipe
from weightops.stores.transfer.places import Stamp, move_into, note_of, other_there, stamp_of, was_brought
from weightops.stores.web.listing import RemoteFile
from weightops.stores.web.web import Web

_TICK_S = 0.1
_WAIT_S = 0.5
_MEASURE_S = 0.5
_GRACE_S = 0.6
"""How long workers may take to end after an interruption: who pressed Ctrl-C waits for it."""
_FAST_RATE = 200e6
"""Bytes per second from which on more streams for one file gain nothing: hashing and the disk are the limit."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is there: size, digests, and the inode and time by which it is known again without reading it.

    `identity` is that of the remote file; `resumed_nbytes` were there before this run.
    """

    name: str
    nbytes: int
    digests: dict[str, str]
    identity: str
    etag: str = ""
    inode: int = 0
    mtime_ns: int = 0
    resumed_nbytes: int = 0

    @property
    def stamp(self) -> Stamp:
        """What `stamp_of` gave when the file was known to be right."""
        return self.inode, self.mtime_ns, self.nbytes

    def satisfies(self, file: RemoteFile) -> bool:
        """Whether this is the content that `file` describes."""
        if file.digests:
            return all(self.digests.get(name) == digest for name, digest in file.digests.items())
        return file.identity != "" and file.identity == self.identity


class Progress(Events, Protocol):
    """Told what happens to files, from any thread."""

    def finished(self, done: Done) -> None:
        """A file is there, under its name."""

    def waiting(self, name: str) -> None:
        """Another run is at work on this file."""

    def tick(self) -> None:
        """Called many times a second from the calling thread; raises in order to stop."""


class Transfer:
    """Files on their way into `out`; a context for the threads that bring them."""

    def __init__(
        self,
        out: Path,
        web: Web,
        progress: Progress,
        workers: int,
        ours: frozenset[str] = frozenset(),
        *,
        claims: Claims | None = None,
        place: Callable[[RemoteFile], str] = lambda file: file.name,
    ) -> None:
        """`ours` are places at which an earlier download brought a file: no other file is replaced.

        `place` is where a file lies below `out`; each has its own. `claims` are on places.
        """
        self._ours = ours
        self._place = place
        self._out, self._web, self._progress = out, web, progress
        self._workers = workers
        self._claims = claims or Claims(out)
        self._lock = threading.Lock()
        self._queue: deque[RemoteFile] = deque()
        self._active: list[Fetch] = []
        self._waiting: set[str] = set()
        self._done: dict[str, Done] = {}
        self._left = 0
        self._failure: BaseException | None = None
        self._received = 0
        self._rate = (time.monotonic(), 0, 0.0)

    def run(self, files: Sequence[RemoteFile], before_first: Callable[[], None] = lambda: None) -> dict[str, Done]:
        """Fetch what is not there yet; all files by name when done. `before_first` is called before a name changes.

        Raises what the first failing file raises; what has arrived of the others stays for the next run.
        """
        self._before_first = before_first
        self._queue.extend(sorted(files, key=lambda file: (file.nbytes or 0, file.name)))
        self._left = len(files)
        threads = [
            threading.Thread(target=self._work, name=f"fetch-{i}", daemon=True)
            for i in range(min(self._workers, max(1, _streams(files))))
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads) and self._failure is None:
                self._progress.tick()
                self._claims.touch()
                self._measure()
                time.sleep(_TICK_S)
            if self._failure is not None:
                raise self._failure
        except BaseException as error:
            self._web.interrupt(error if isinstance(error, WeightopsError) else Interrupted(2))
            until_s = time.monotonic() + _GRACE_S
            for thread in threads:
                thread.join(max(0.0, until_s - time.monotonic()))
            if not any(thread.is_alive() for thread in threads):
                for fetch in self._active:
                    fetch.close()
            self._claims.release_all()
            raise
        return self._done

    def seal(self, name: str, data: bytes, check: Callable[[], object]) -> None:
        """Write the file that says that all others are there, and remove what was kept for resuming."""
        key = key_of(name)
        while (claim := self._claims.take(key)) is None:
            check()
            time.sleep(_TICK_S)
        write_whole(claim.data, data)
        move_into(self._out, name, claim.data)
        self._claims.drop(key)
        self.tidy()

    def tidy(self) -> None:
        """Remove what was kept for resuming."""
        self._claims.clear()

    def _work(self) -> None:
        with ExitStack() as stack:
            pipe = Pipe()
            stack.callback(pipe.close)
            try:
                while self._left and self._failure is None:
                    fetch = self._next()
                    if fetch is not None:
                        self._stream(fetch, pipe)
                    elif self._left:
                        self._web.sleep(_TICK_S)
            except BaseException as error:
                self._failure = self._failure or error
                with suppress(Exception):  # the first failure is the one to tell
                    pipe.drain()

    def _next(self) -> Fetch | None:
        """Something to do: a file that nobody has begun, or a share of one that is slow to come."""
        with self._lock:
            file = self._queue.popleft() if self._queue else None
        if file is None:
            return self._to_help()
        noted = self._noted(file)
        if noted is not None:
            self._finished(noted)
            return None
        key = key_of(self._place(file))
        claim = self._claims.take(key)
        if claim is None:
            self._wait_for(file)
            return None
        self._waiting.discard(file.name)
        present = self._noted(file) or self._read(file)
        if present is not None:
            self._claims.drop(key)
            self._finished(present)
            return None
        self._refuse_other(self._place(file))
        fetch = Fetch(file, claim, self._web, self._progress)
        with self._lock:
            fetch.streams = 1
            self._active.append(fetch)
        return fetch

    def _wait_for(self, file: RemoteFile) -> None:
        """Another run is at work on the file: do others first."""
        with self._lock:
            news = file.name not in self._waiting
            self._waiting.add(file.name)
            self._queue.append(file)
            alone = len(self._queue) <= len(self._waiting)
        if news:
            self._progress.waiting(file.name)
        if alone:
            self._web.sleep(_WAIT_S)

    def _to_help(self) -> Fetch | None:
        """The file with most left to fetch, unless what comes is fast enough already."""
        with self._lock:
            if self._rate[2] > _FAST_RATE:
                return None
            fetch = max(self._active, key=lambda fetch: fetch.todo_nbytes, default=None)
            if fetch is None or not fetch.todo_nbytes or self._rate[2] == 0.0:
                return None
            fetch.streams += 1
            return fetch

    def _measure(self) -> None:
        """Bytes per second that arrived of late."""
        now_s = time.monotonic()
        since_s, before, _ = self._rate
        received = self._web.received_nbytes
        if received == before == 0:
            self._rate = (now_s, 0, 0.0)  # the time until the first byte says nothing about the rate
        elif now_s - since_s >= _MEASURE_S:
            self._rate = (now_s, received, (received - before) / (now_s - since_s))

    def _stream(self, fetch: Fetch, pipe: Pipe) -> None:
        try:
            fetch.stream(pipe)
        finally:
            with self._lock:
                fetch.streams -= 1
                last = fetch.streams == 0 and fetch.is_whole and fetch in self._active
                if last:
                    self._active.remove(fetch)
        if not last:
            return
        try:
            digests = fetch.finish()
        except BaseException:
            fetch.close()
            raise
        if digests is None:
            with self._lock:
                fetch.streams = 1
                self._active.append(fetch)
            self._stream(fetch, pipe)
            return
        self._publish(fetch, digests)

    def _publish(self, fetch: Fetch, digests: Mapping[str, str]) -> None:
        """Give a file that is right its name."""
        place = self._place(fetch.file)
        key = key_of(place)
        try:
            status = fetch.claim.data.stat()
        except FileNotFoundError:
            # We were silent for so long that another machine took over: it has the data, and goes on.
            with self._lock:
                self._queue.append(fetch.file)
            return
        done = Done(
            name=fetch.file.name,
            nbytes=fetch.nbytes,
            digests=dict(digests),
            identity=fetch.file.identity if fetch.file.digests else fetch.etag,
            etag=fetch.etag,
            inode=status.st_ino,
            mtime_ns=status.st_mtime_ns,
            resumed_nbytes=fetch.resumed_nbytes,
        )
        with self._lock:
            self._before_first()
        note = fetch.claim.folder / "done"  # what is not ours, a run that ends meanwhile removes
        self._refuse_other(place)
        write_whole(note, msgspec.json.encode(done))
        may_replace = self._is_ours(place)
        publish(note, note_of(self._out, place))
        move_into(self._out, place, fetch.claim.data, may_replace=may_replace)
        self._claims.drop(key)
        self._finished(done)

    def _is_ours(self, place: str) -> bool:
        return place in self._ours or was_brought(self._out, place)

    def _refuse_other(self, place: str) -> None:
        """Raise `OutputExists` for somebody else's file there; one that is right has been kept by now."""
        path = self._out / place
        if os.path.lexists(path) and not self._is_ours(place):
            raise other_there(path)

    def _finished(self, done: Done) -> None:
        self._progress.finished(done)
        with self._lock:
            self._done[done.name] = done
            self._left -= 1

    def _noted(self, file: RemoteFile) -> Done | None:
        """What an earlier run noted of the file, if that is the one which stands in its place, untouched since."""
        place = self._place(file)
        try:
            done = msgspec.json.decode(note_of(self._out, place).read_bytes(), type=Done)
        except (OSError, msgspec.MsgspecError):
            return None
        if done.stamp != stamp_of(self._out / place) or not done.satisfies(file):
            return None
        return msgspec.structs.replace(done, name=file.name, resumed_nbytes=done.nbytes)

    def _read(self, file: RemoteFile) -> Done | None:
        """The file, if what stands in its place has the right digests."""
        path = self._out / self._place(file)
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        nbytes = status.st_size
        if file.nbytes not in (None, nbytes) or not file.digests:
            return None
        found = hash_fetched(path, ("xxh3_128", *file.digests), nbytes, self._web.check)
        done = Done(
            name=file.name,
            nbytes=nbytes,
            digests=found,
            identity=file.identity,
            inode=status.st_ino,
            mtime_ns=status.st_mtime_ns,
            resumed_nbytes=nbytes,
        )
        return done if done.satisfies(file) else None


def _streams(files: Sequence[RemoteFile]) -> int:
    """How many workers can have something to do."""
    return sum(1 + (file.nbytes or 0) // (32 << 20) for file in files)
