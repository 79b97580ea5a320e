"""Publishing into a bucket: objects that are there when they are whole, and the manifest when all of them are."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence

from weightops.engine.control import Control
from weightops.engine.digest import in_threads
from weightops.errors import OutputExists
from weightops.formats.proofs.manifest import NAME
from weightops.io.crc64 import Crc64
from weightops.io.escape import escape
from weightops.operations.publish.destination import There
from weightops.stores.listed import on_server
from weightops.stores.outgoing import Outgoing
from weightops.stores.reader import FileReader
from weightops.stores.s3.listing import list_objects
from weightops.stores.s3.places import BucketPlace, address
from weightops.stores.s3.store import S3Store
from weightops.stores.s3.target import PART_NBYTES, part_nbytes
from weightops.stores.stores import Stores
from weightops.stores.web.listing import RemoteFile

_WORKERS = 2
"""Each holds two parts of an object in memory."""
_BLOCK_NBYTES = 4 << 20


class Bucket:
    """A folder in a bucket, which is published once: its manifest is created last, and replaces nothing."""

    algorithms = ("sha256",)

    def __init__(self, place: BucketPlace, stores: Stores) -> None:
        self._place, self._stores = place, stores
        self._store = S3Store(place.bucket, place.key, stores.s3)
        self._etags: dict[str, str] = {}
        self.shown = self._store.shown
        self.title = self._store.name

    def look(self) -> There:
        place = self._place
        prefix = f"{place.key}/" if place.key else ""
        found = list_objects(self._stores.s3, place.bucket, prefix)[0]
        files = {
            each.key.removeprefix(prefix): RemoteFile(
                each.key.removeprefix(prefix), address(place.bucket, each.key), each.nbytes, {}, each.etag
            )
            for each in found
        }
        return There(f"the bucket {escape(place.bucket)}", "as the bucket's policy says", files)

    def create(self, *, is_private: bool) -> There:
        return self.look()  # a folder in a bucket is what lies in it

    def check(self, missing: Sequence[Outgoing], there: There) -> None:
        """Refuse to replace anything."""
        taken = [file.name for file in missing if file.name in there.files]
        if NAME in taken:
            raise OutputExists(
                f"{self.shown}: another model is published there, of which {NAME} is another",
                hint="name another folder: one in a bucket is published once",
            )
        if taken:
            raise OutputExists(
                f"{self.shown}/{escape(taken[0])} exists, and is not the file that is to be published",
                hint="name another folder, or remove it there first",
            )

    def proof(self, file: Outgoing, found: RemoteFile, control: Control) -> str:
        if found.nbytes != file.nbytes:
            return ""
        if file.name not in self._etags:
            etag = _ETag(file.nbytes)
            for block in file.blocks():
                control.check()
                etag.update(block)
            self._etags[file.name] = etag.text()
        proofs = []
        if found.etag == self._etags[file.name]:
            proofs.append(f"ETag, {found.etag}")
        kept = self._kept_checksum(found)
        if kept and kept != _checksum(file, control):
            return ""
        if kept:
            proofs.append(f"CRC64NVME, {kept}")
        if proofs:
            return f"the store lists its size and {' and '.join(proofs)}"
        # Not every store makes ETags of MD5, nor every program parts of this size.
        return f"read again there, SHA-256 {file.sha256}" if self._read_again(found, control) == file.sha256 else ""

    def _kept_checksum(self, found: RemoteFile) -> str:
        """The CRC-64/NVME of a whole object in base64, which Amazon's store keeps; empty if this one does not."""
        connection, headers = self._stores.s3, {"x-amz-checksum-mode": "ENABLED"}
        answer = connection.retried(found.name, lambda: connection.call("HEAD", found.url, headers=headers))
        is_of_parts = answer.headers.get("x-amz-checksum-type", "") == "COMPOSITE"
        return "" if is_of_parts else answer.headers.get("x-amz-checksum-crc64nvme", "")

    def _read_again(self, found: RemoteFile, control: Control) -> str:
        source, state = on_server(found), hashlib.sha256()
        with FileReader(self._stores) as reader:
            for part in reader.blocks(source, _BLOCK_NBYTES):
                control.check()
                state.update(part)
        return state.hexdigest()

    def send(
        self,
        files: Sequence[Outgoing],
        deleted: Sequence[str],
        there: There,
        message: str,
        workers: int | None,
        control: Control,
    ) -> tuple[There, int]:
        self._store.probe()
        control.progress.start("sending", sum(file.nbytes for file in files))

        def job(file: Outgoing) -> Callable[[Control], None]:
            return lambda own: self._send(file, own)

        in_threads(workers or _WORKERS, control, [job(file) for file in files if file.name != NAME])
        for file in files:
            if file.name == NAME:
                self._store.create(NAME, file.read())
        # What a run that was interrupted could not abort: nobody needs it, now that these names are taken for good.
        self._store.abort_uploads([file.name for file in files if file.nbytes > PART_NBYTES])
        for name in deleted:
            self._store.remove(name)
        control.progress.stop()
        return self.look(), sum(file.nbytes for file in files)

    def _send(self, file: Outgoing, control: Control) -> None:
        """An object, in parts that are each signed with their SHA-256."""
        target, etag, done = self._store.target(file.name, file.nbytes), _ETag(file.nbytes), 0
        try:
            for block in file.blocks():
                control.check()
                target.write(done, block, len(block))
                etag.update(block)
                done += len(block)
                control.progress.advance(len(block))
            target.close()
            target.commit()
        except BaseException:
            target.abandon()
            raise
        self._etags[file.name] = etag.text()


def _checksum(file: Outgoing, control: Control) -> str:
    state = Crc64()
    for block in file.blocks():
        control.check()
        state.update(block)
    return base64.b64encode(state.digest()).decode()


class _ETag:
    """The ETag of an object of `nbytes` bytes that is sent as we send it: of more than one part that of their MD5s.

    Source: "Checking object integrity" in the user guide of Amazon S3.
    """

    def __init__(self, nbytes: int) -> None:
        self._part_nbytes = part_nbytes(nbytes)
        self._is_whole = nbytes <= self._part_nbytes
        self._state, self._left = _md5(), self._part_nbytes
        self._digests: list[bytes] = []

    def update(self, block: memoryview) -> None:
        while len(block):
            taken = block[: self._left]
            self._state.update(taken)
            self._left -= len(taken)
            block = block[len(taken) :]
            if not self._left:
                self._end_part()

    def _end_part(self) -> None:
        self._digests.append(self._state.digest())
        self._state, self._left = _md5(), self._part_nbytes

    def text(self) -> str:
        if self._is_whole and not self._digests:
            return self._state.hexdigest()
        if self._left < self._part_nbytes:
            self._end_part()
        if self._is_whole:
            return self._digests[0].hex()
        whole = _md5()
        whole.update(b"".join(self._digests))
        return f"{whole.hexdigest()}-{len(self._digests)}"


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)
