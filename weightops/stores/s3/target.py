"""An object that is written part by part, and is there when all of it is: a multipart upload of S3."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple
from xml.sax.saxutils import escape as xml_escape

from weightops.errors import NetworkFailed, SourceMissing, UploadGone, WeightopsError
from weightops.io.source_file import SourceFile
from weightops.stores.s3.connection import S3
from weightops.stores.s3.refusals import Taken, code_of, parse_answer, refusal
from weightops.stores.web.policy import Transient
from weightops.stores.web.small import describe
from weightops.stores.web.urls import show

PART_NBYTES = 16 << 20
_MAX_PARTS = 10_000
_STEP_NBYTES = 4 << 20
_BUFFERS = 2
_BLOCK_NBYTES = 1 << 20


def part_nbytes(nbytes: int) -> int:
    """How large the parts of an object of `nbytes` are: all but the last alike, as R2 wants them, 10,000 at most."""
    least = -(-nbytes // _MAX_PARTS)
    return max(PART_NBYTES, -(-least // _STEP_NBYTES) * _STEP_NBYTES)


class _Sent(NamedTuple):
    """A part as it arrived: its size in bytes and SHA-256, and its ETag, which stays the server's own word."""

    nbytes: int
    digest: str
    etag: str


class _Part:
    """A part in one of the buffers, and its upload."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = memoryview(bytearray(nbytes))
        self.used = 0
        self.sent: Future[_Sent] | None = None


class S3Target:
    """An object of `nbytes` bytes at an address, in parts of which two are in memory; a small one in one request.

    `write` copies what it is given. Nothing is there before `commit`, which replaces nothing unless it `may_replace`:
    an object with these very bytes, which another attempt has written meanwhile, counts as this one. Each target has an
    upload of its own and aborts no other. Raises as `S3` does, `OutputExists` for another object of that name.
    """

    shared_nbytes = 0

    def __init__(self, connection: S3, url: str, nbytes: int = 0, *, may_replace: bool = False) -> None:
        self._connection, self._url, self._shown = connection, url, show(url)
        self._conditions = {} if may_replace else {"If-None-Match": "*"}
        self._part_nbytes = part_nbytes(nbytes)
        self._parts = [_Part(min(self._part_nbytes, nbytes) or self._part_nbytes)]
        self._upload = ""
        self._sent: list[Future[_Sent]] = []
        self._nbytes = 0
        self._pool: ThreadPoolExecutor | None = None

    def write(self, offset: int, block: memoryview, used: int) -> None:
        """Take the first `used` bytes of `block`, at `offset`, which follows what was written before."""
        if offset != self._nbytes:
            raise ValueError(f"{self._shown}: written at {offset}, expected {self._nbytes}")
        done = 0
        while done < used:
            part = self._parts[-1]
            if part.used == len(part.buffer):
                part = self._next_part()
            count = min(used - done, len(part.buffer) - part.used)
            part.buffer[part.used : part.used + count] = block[done : done + count]
            part.used += count
            done += count
        self._nbytes += used

    def _next_part(self) -> _Part:
        """Send the part that is full; an empty one, as soon as there is a buffer for it."""
        self._send(self._parts[-1])
        if len(self._parts) < _BUFFERS:
            self._parts.append(_Part(self._part_nbytes))
        else:
            self._parts.append(self._parts.pop(0))
        part = self._parts[-1]
        if part.sent is not None:
            part.sent.result()
        part.used = 0
        return part

    def _send(self, part: _Part) -> None:
        """Begin to send a part, under an upload that is made for the first."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_BUFFERS, "part")
            self._upload = self._connection.retried(self._shown, self._begin)
        number, data = len(self._sent) + 1, part.buffer[: part.used]
        part.sent = self._pool.submit(self._send_part, number, data)
        self._sent.append(part.sent)

    def _begin(self) -> str:
        answer = self._connection.call("POST", self._url, {"uploads": ""})
        upload = parse_answer(answer.data, self._shown).findtext("UploadId")
        if not upload:
            raise Transient("an upload without a name")
        return upload

    def _send_part(self, number: int, data: memoryview) -> _Sent:
        """Send a part. What proves that it arrived whole is the digest that it is signed with."""
        digest = hashlib.sha256(data).hexdigest()
        query = {"partNumber": str(number), "uploadId": self._upload}
        answer = self._connection.retried(
            self._shown, lambda: self._connection.call("PUT", self._url, query, body=data, sha256=digest)
        )
        etag = answer.headers.get("ETag", "")
        if not etag:
            raise WeightopsError(f"{self._shown}: the store gives no ETag for part {number}")
        return _Sent(len(data), digest, etag)

    def close(self, nbytes: int | None = None) -> None:
        """Send the rest; what fits into one part is kept for `commit`. Nothing is cut that was sent already."""
        part = self._parts[-1]
        if nbytes is not None:
            surplus, self._nbytes = self._nbytes - nbytes, nbytes
            if not 0 <= surplus <= part.used:
                raise ValueError(f"{self._shown}: cannot be cut to {nbytes} bytes")
            part.used -= surplus
        if self._upload:
            if part.used:
                self._send(part)
            for sent in self._sent:
                sent.result()
            self._end_pool()

    def _end_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def commit(self) -> None:
        """Give it its name. An attempt whose answer was lost on the way may have done so, as another process may."""
        try:
            self._connection.retried(self._shown, self._complete if self._upload else self._put)
        except (Taken, UploadGone, NetworkFailed) as error:
            if not self._is_there():
                raise
            if isinstance(error, Taken):
                self.abandon()
        self._upload = ""

    def _put(self) -> None:
        part = self._parts[-1]
        self._connection.call("PUT", self._url, headers=self._conditions, body=part.buffer[: part.used])

    def _complete(self) -> None:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{xml_escape(sent.result().etag)}</ETag></Part>"
            for number, sent in enumerate(self._sent, 1)
        )
        body = f'<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{parts}</CompleteMultipartUpload>'
        answer = self._connection.call("POST", self._url, {"uploadId": self._upload}, self._conditions, body.encode())
        # The status may have been sent before the parts were joined.
        code = code_of(answer.data.strip())
        if code:
            raise refusal(self._shown, "the store", 200, code)

    def _is_there(self) -> bool:
        """Whether the object of that name has the bytes of this one: it is read again, for names and sizes lie."""
        try:
            found = describe("", self._url, self._connection)
        except SourceMissing:
            return False
        file = SourceFile(self._url, self._nbytes, 0, etag=found.etag)
        last = self._parts[-1]
        rest = _Sent(last.used, hashlib.sha256(last.buffer[: last.used]).hexdigest(), "")
        start = 0
        for part in [sent.result() for sent in self._sent] or [rest]:
            if found.nbytes != self._nbytes or self._digest(file, start, start + part.nbytes) != part.digest:
                return False
            start += part.nbytes
        return True

    def _digest(self, file: SourceFile, start: int, stop: int) -> str:
        hasher, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_NBYTES))
        for offset in range(start, stop, _BLOCK_NBYTES):
            piece = block[: stop - offset]
            self._connection.read_into(file, offset, piece, stop - offset - len(piece))
            hasher.update(piece)
        return hasher.hexdigest()

    def abandon(self) -> None:
        """Abort the upload, if there is one, without a promise."""
        self._end_pool()
        if self._upload:
            with suppress(WeightopsError):
                self._connection.call("DELETE", self._url, {"uploadId": self._upload})
            self._upload = ""
