"""A folder in a bucket, to be read and written: small objects by one request, large ones as `S3Target`."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from weightops.errors import AuthenticationFailed, NetworkFailed, SourceMissing, WeightopsError
from weightops.io.escape import escape
from weightops.io.paths import check_relative
from weightops.io.reflink import Extent
from weightops.io.source_file import SourceFile
from weightops.stores.s3.connection import S3
from weightops.stores.s3.listing import list_objects
from weightops.stores.s3.places import BucketPlace, address, located
from weightops.stores.s3.refusals import Taken
from weightops.stores.s3.target import S3Target
from weightops.stores.s3.uploads import abort_uploads
from weightops.stores.store import PROBES
from weightops.stores.web.policy import Transient
from weightops.stores.web.small import describe, read_whole

_LOG = logging.getLogger(__name__)
CREATE_ONLY = {"If-None-Match": "*"}


class S3Store:
    """The objects of `bucket` whose keys begin with `prefix`, as files; every question asks the server anew.

    An object is there when it is whole. There is no folder without a file in it. Raises as `S3` does.
    """

    is_near = False
    notes: tuple[str, ...] = ()

    def __init__(self, bucket: str, prefix: str, connection: S3) -> None:
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.shown = str(BucketPlace(bucket, self.prefix))
        self.name = self.prefix.rpartition("/")[2] or bucket
        self._connection = connection
        self._inside = f"{self.prefix}/" if self.prefix else ""

    def _address(self, name: str) -> str:
        return address(self.bucket, self._inside + check_relative(name, self.shown))

    def names(self) -> list[str]:
        found, folders = list_objects(self._connection, self.bucket, self._inside, delimiter="/")
        start = len(self._inside)
        return sorted([each.key[start:] for each in found] + [folder[start:].rstrip("/") for folder in folders])

    def below(self, pattern: str) -> list[str]:
        names = (name for name in self.listed("") if name.count("/") == 1)
        return [name for name in names if fnmatchcase(name.partition("/")[0], pattern)]

    def listed(self, folder: str) -> list[str]:
        """The names of all files below a folder of it, at any depth, sorted; of all there are for an empty name."""
        inside = self._inside + (f"{check_relative(folder, self.shown)}/" if folder else "")
        return [each.key[len(self._inside) :] for each in list_objects(self._connection, self.bucket, inside)[0]]

    def has(self, name: str) -> bool:
        try:
            self.identity(name)
        except SourceMissing:
            return False
        return True

    def identity(self, name: str) -> SourceFile:
        return identity_of(self._connection, self._address(name))

    def get(self, name: str) -> bytes:
        return read_whole(self._address(name), self._connection)

    def find(self, name: str) -> bytes | None:
        """A small file, whole; None if there is none of that name."""
        try:
            return self.get(name)
        except SourceMissing:
            return None

    def create(self, name: str, data: bytes) -> None:
        """A new file; raises `OutputExists` for a name that is taken.

        An answer that is lost on the way leaves it open whose file is there: one with these very bytes is ours.
        """
        url, lost = self._address(name), False

        def attempt() -> None:
            nonlocal lost
            try:
                self._connection.call("PUT", url, headers=CREATE_ONLY, body=data)
            except Transient:
                lost = True
                raise
            except Taken:
                if not lost or self.find(name) != data:
                    raise

        self._connection.retried(f"{self.shown}/{escape(name)}", attempt)

    def put(self, name: str, data: bytes) -> None:
        """A file, in the place of what may have its name."""
        url = self._address(name)
        self._connection.retried(f"{self.shown}/{escape(name)}", lambda: self._connection.call("PUT", url, body=data))

    @contextmanager
    def putting(self, name: str) -> Iterator[Callable[[bytes], None]]:
        """As `put`, piece by piece: lends a function that takes them."""
        target = S3Target(self._connection, self._address(name), may_replace=True)
        position = 0

        def write(data: bytes) -> None:
            nonlocal position
            target.write(position, memoryview(data), len(data))
            position += len(data)

        try:
            yield write
            target.close()
            target.commit()
        except BaseException:
            target.abandon()
            raise

    def target(
        self, name: str, nbytes: int, shared: Mapping[SourceFile, Sequence[Extent]] = {}, *, is_most: bool = False
    ) -> S3Target:
        """A file of `nbytes` bytes to be written piece by piece, see `S3Target`; nothing is shared in a bucket."""
        return S3Target(self._connection, self._address(name), nbytes)

    def remove(self, name: str) -> None:
        """See that there is no file of that name."""
        url = self._address(name)
        with suppress(SourceMissing):
            self._connection.retried(f"{self.shown}/{escape(name)}", lambda: self._connection.call("DELETE", url))

    def probe(self) -> None:
        """Raise `WeightopsError` if the server only pretends to create what is not there, and replaces what is.

        It is shown by doing so: a small object of a random name is created twice, and removed.
        """
        name = f"{PROBES}{secrets.token_hex(8)}"
        self._connection.retried(self.shown, lambda: self._connection.call("PUT", self._address(name), body=b"1"))
        try:
            self.create(name, b"2")
        except Taken:
            return
        finally:
            with suppress(WeightopsError):
                self.remove(name)
        server = urlsplit(self._connection.account.endpoint.of(self.bucket, "")).netloc or "the store"
        raise WeightopsError(
            f"{self.shown}: {escape(server)} only pretends conditional writes: it replaced an object that it was asked "
            "not to replace, so two runs could overwrite each other",
            hint="write to a folder on this machine, or to a store that keeps If-None-Match",
        )

    def abort_uploads(self, names: Collection[str]) -> None:
        """Abort all uploads to these names that have not ended, whoever began them; to no others.

        Of a store that does not list them, or not to everybody, they are left: they are seen by nobody, and its own
        rules end them.
        """
        for name in names:
            try:
                abort_uploads(self._connection, *located(self._address(name)))
            except (AuthenticationFailed, NetworkFailed) as error:
                _LOG.warning("uploads that have not ended are left: %s", error)
                return


def identity_of(connection: S3, url: str) -> SourceFile:
    """The object at an address as it is now; raises `SourceMissing`."""
    found = describe(url.rpartition("/")[2], url, connection)
    return SourceFile(url, found.nbytes or 0, 0, etag=found.etag)
