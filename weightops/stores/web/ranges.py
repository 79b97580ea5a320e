"""Reading ranges of remote files in whatever order they are asked for, with few requests and few bytes too many.

Tensors that lie one after the other come in one answer, which stays open while other files are read. At a new place a
request asks for what is wanted there; where reading goes on, for as much again as has been read. So a header costs one
small request, and a file that is read through a dozen. Where several ranges may be on their way at a time (`Ahead`),
what would be one large answer comes in pieces, given out in order.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from weightops.errors import CorruptInput, WeightopsError
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.stores.proof import Proofs
from weightops.stores.store import SKIPPED_NBYTES
from weightops.stores.web.ahead import RANGE_NBYTES, Ahead, Range
from weightops.stores.web.body import Body, RangeRefused
from weightops.stores.web.http import Http, Tries
from weightops.stores.web.policy import Transient

_HEAD_NBYTES = 64 << 10
"""The beginning of a file is asked for and kept: a header is there, read bit by bit as its length becomes known."""
_MAX_HEADS = 64
_LEAST_NBYTES = 4 << 10
_SKIPPED_FOR_LITTLE_NBYTES = 64 << 10
"""The gap that is read through on the way to a few bytes: the headers of an archive may lie a megabyte apart."""
_MAX_IDLE = 16
_RECENT_READS = 64
"""Whoever has not read a stream during so many reads of others has probably left it; its ranges go to those."""
_DIFFERS_HINT = "run the same command again; if it differs again, the server's copy is damaged or was replaced"


@dataclass
class _Stream:
    """A place that reading has come to from `begin` on, and the answer that goes on from there up to `stop`, if any.

    Or else `ranges` go on from there that are on their way, the first of which holds `position`; more of them are
    wanted up to `stop`. `read_at` is when it was last read, counted in reads of all streams.
    """

    file: SourceFile
    begin: int
    position: int
    stop: int = 0
    body: Body | None = None
    ranges: deque[Range] = field(default_factory=deque)
    read_at: int = 0

    def close(self) -> None:
        if self.body is not None:
            self.body.close()
            self.body = None

    def retire(self) -> None:
        """Close, after the little that may be left: the connection can be used again then."""
        try:
            while self.body is not None and 0 < self.stop - self.position <= _HEAD_NBYTES:
                rest = self.body.read(self.stop - self.position)
                self.position = self.position + len(rest) if rest else self.stop
        except WeightopsError:
            pass
        self.close()


class RangeReader:
    """Positioned reads from files on servers, for all threads. `proofs` sees every byte that arrives, in order.

    `ahead` ranges of 8 MiB may be on their way at a time, over all files; with 1 there is one answer for each.
    """

    def __init__(self, web: Http, ahead: int = 1) -> None:
        self.proofs = Proofs(lambda file: _DIFFERS_HINT)
        self._web = web
        self._ahead = Ahead(self._fetch, ahead)
        self._reads = 0
        self._idle: list[_Stream] = []
        self._heads: dict[SourceFile, memoryview] = {}
        self._etags: dict[SourceFile, str] = {}
        self._lock = threading.Lock()

    def read_into(self, file: SourceFile, offset: int, out: memoryview, following: int = 0) -> None:
        """Fill `out` with the bytes at `offset`, going on at the very byte where a connection breaks.

        `following` is how many bytes after these will be wanted too. Raises `CorruptInput` if the file has changed or
        ends before, `Differs` with its last byte if its digest is wrong, `WeightopsError` if the server gives no
        ranges; what `Web.get` and `Tries` raise.
        """
        stop = offset + len(out)
        if stop > file.nbytes:
            raise CorruptInput(f"{file.shown}: ends at byte {file.nbytes}, expected at least {stop} bytes")
        if out and offset < _HEAD_NBYTES:
            part = self._head(file)[offset:stop]
            out[: len(part)] = part
            offset, out = offset + len(part), out[len(part) :]
        if out:
            self._fill(file, offset, out, following)

    def _head(self, file: SourceFile) -> memoryview:
        """The first bytes of a file."""
        head = self._heads.get(file)
        if head is None:
            head = memoryview(bytearray(min(_HEAD_NBYTES, file.nbytes)))
            self._fill(file, 0, head, 0)
            with self._lock:
                self._heads[file] = head
                if len(self._heads) > _MAX_HEADS:
                    del self._heads[next(iter(self._heads))]
        return head

    def _fill(self, file: SourceFile, offset: int, out: memoryview, following: int) -> None:
        stop = offset + len(out)
        stream = self._take(file, offset, SKIPPED_NBYTES if len(out) > _HEAD_NBYTES else _SKIPPED_FOR_LITTLE_NBYTES)
        try:
            tries = Tries(self._web, file.shown)
            while stream.position < stop:
                try:
                    data = self._next(stream, stop, following)
                except Transient as error:
                    stream.close()
                    tries.failed(error)
                    continue
                tries.progressed()
                start, stream.position = stream.position, stream.position + len(data)
                if stream.position > offset:
                    skipped = max(0, offset - start)
                    out[start + skipped - offset : stream.position - offset] = data[skipped:]
        finally:
            self._give_back(stream)

    def _take(self, file: SourceFile, offset: int, gap: int) -> _Stream:
        """A stream from which `offset` is soon reached: one that stands there, or shortly before, or else a new one."""
        with self._lock:
            self._reads += 1
            near = [s for s in self._idle if s.file == file and 0 <= offset - s.position <= gap]
            if near:
                stream = max(near, key=lambda s: s.position)
                self._idle.remove(stream)
                if stream.body is not None or stream.ranges or stream.position == offset:
                    stream.read_at = self._reads
                    return stream
        # Begin shortly before, if the digest would miss those bytes.
        proven = self.proofs.position(file)
        start = proven if file.digest and 0 <= offset - proven <= gap else offset
        return _Stream(file, start, start, read_at=self._reads)

    def _give_back(self, stream: _Stream) -> None:
        self._go_on(stream)
        with self._lock:
            self._idle.append(stream)
            retired = self._idle.pop(0) if len(self._idle) > _MAX_IDLE else None
        if retired is not None:
            self._release(retired)
            retired.retire()

    def _next(self, stream: _Stream, stop: int, following: int) -> memoryview | bytes:
        """The next bytes of a stream, up to `stop` at most; to be used before the next ones are asked for."""
        self._go_on(stream)
        if stream.body is None and not stream.ranges:
            self._ask(stream, stop + following)
        data: memoryview | bytes = b""
        if stream.ranges:
            first = stream.ranges[0]
            data = first.part(stream.position, stop)
            if not data:
                self._release(stream)
                stream.stop = first.stop
                stream.body = self._open(stream.file, stream.position, stream.stop)
        if stream.body is not None:
            data = stream.body.read(min(stop, stream.stop) - stream.position)
            if not data:
                raise Transient(f"{stream.file.shown}: ended at byte {stream.position}, expected {stream.stop} bytes")
            if stream.position + len(data) == stream.stop:
                stream.close()
        self.proofs.passed(stream.file, stream.position, data)
        return data

    def _ask(self, stream: _Stream, stop: int) -> None:
        """Open an answer at the stream's position that goes up to `stop` at least, or order ranges up to there."""
        start = stream.position
        stream.stop = min(start + max(stop - start, start - stream.begin, _LEAST_NBYTES), stream.file.nbytes)
        if self._ahead.count > 1 and stream.stop - start >= 2 * RANGE_NBYTES:
            self._order(stream)
            if stream.ranges:
                return
            stream.stop = start + RANGE_NBYTES
        stream.body = self._open(stream.file, start, stream.stop)

    def _order(self, stream: _Stream) -> None:
        """Order the ranges that come next in a stream, as many as fall to each of those that are being read."""
        with self._lock:
            others = [other for other in self._idle if other.ranges and other is not stream]
            left = [other for other in others if self._reads - other.read_at > _RECENT_READS]
            for other in left:
                self._release(other)
            share = max(1, self._ahead.count // (1 + len(others) - len(left)))
        start = stream.ranges[-1].stop if stream.ranges else stream.position
        while start < stream.stop and len(stream.ranges) < share:
            ordered = self._ahead.order(stream.file, start, min(start + RANGE_NBYTES, stream.stop))
            if ordered is None:
                break
            stream.ranges.append(ordered)
            start = ordered.stop

    def _go_on(self, stream: _Stream) -> None:
        """Let go of a range that has been read, and order more in its place."""
        if stream.ranges and stream.position == stream.ranges[0].stop:
            self._ahead.release(stream.ranges.popleft())
            self._order(stream)

    def _release(self, stream: _Stream) -> None:
        """Let go of all ranges of a stream."""
        while stream.ranges:
            self._ahead.release(stream.ranges.popleft())

    def _fetch(self, ordered: Range) -> None:
        """Fill a range in one attempt: whoever reads it makes further ones."""
        with self._open(ordered.file, ordered.start, ordered.stop) as body:
            while not ordered.is_unwanted and (left := ordered.stop - ordered.start - ordered.arrived_nbytes):
                data = body.read(left)
                if not data:
                    return
                ordered.arrived(data)

    def _open(self, file: SourceFile, start: int, stop: int) -> Body:
        """An answer with the bytes `[start, stop)`, held against what is known of the file."""
        # A digest says more than an ETag, which servers of one file need not agree on.
        etag = "" if file.digest else self._etags.get(file, file.etag)
        is_whole = (start, stop) == (0, file.nbytes)
        try:
            body = self._web.get(file.path, start, None if is_whole else stop, etag)
        except RangeRefused as error:
            raise _changed(file, f"{file.nbytes} bytes", f"{error.total}") from None
        try:
            if body.total not in (None, file.nbytes):
                raise _changed(file, f"{file.nbytes} bytes", f"{body.total}")
            if etag and body.etag not in ("", etag):
                raise _changed(file, f"ETag {etag}", body.etag)
            if body.start != start or not (is_whole or body.is_part):
                if body.is_decoded:
                    raise Transient(f"{file.shown}: the answer is encoded ({body.coding}), expected plain bytes")
                raise WeightopsError(
                    f"{file.shown}: the server sends whole files only, not the parts that are asked for",
                    hint="fetch it first: weightops download",
                )
        except BaseException:
            body.close()
            raise
        self._etags.setdefault(file, body.etag)
        return body

    def forget(self, file: SourceFile) -> None:
        """Begin anew with a file, as when another run reads it."""
        self.proofs.forget(file)
        self._etags.pop(file, None)
        with self._lock:
            self._heads.pop(file, None)

    def close(self) -> None:
        with self._lock:
            while self._idle:
                stream = self._idle.pop()
                self._release(stream)
                stream.close()
        self._ahead.close()


def _changed(file: SourceFile, expected: str, found: str) -> CorruptInput:
    return CorruptInput(
        f"{file.shown}: changed while it was being read (expected {expected}, found {escape(found)})",
        hint="run the command again",
    )
