"""A Hugging Face cache, as huggingface_hub fills it: what it has of a repository, and reading that, proven.

    CACHE/models--ORG--NAME/blobs/DIGEST               contents: SHA-256 of an LFS file, else SHA-1 of the git blob
    CACHE/models--ORG--NAME/snapshots/COMMIT/FILE      a relative link to a blob; a copy where there are no links
    CACHE/models--ORG--NAME/refs/REVISION              the commit that a revision was when it was fetched last
    CACHE/models--ORG--NAME/trees/COMMIT.json          what the hub lists of a commit (huggingface_hub 2)

A source file of it has the path `hf-cache:///CACHE/models--ORG--NAME/snapshots/COMMIT/FILE`, so that plans know it by
the file's own name, and its bytes are those of the blob with its digest. Links are followed for reading, as far as they
stay inside the cache. Source: `file_download` and `_tree_cache` of huggingface_hub 2.4.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from weightops.errors import CorruptInput, SourceMissing, WeightopsError
from weightops.io.digests import GIT_SHA1
from weightops.io.escape import escape
from weightops.io.paths import check_relative, open_regular
from weightops.io.source_file import SourceFile
from weightops.stores.local import read_from, read_source
from weightops.stores.proof import Proofs
from weightops.stores.store import SKIPPED_NBYTES
from weightops.stores.web.listing import RemoteFile, is_commit

_SCHEME = "hf-cache"
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TREE_VERSION = 1
_GAP_NBYTES = SKIPPED_NBYTES
_MAX_SMALL_NBYTES = 200_000_000


class _TreeEntry(msgspec.Struct, omit_defaults=True):
    """A file of a commit, as huggingface_hub notes it."""

    size: int
    blob_id: str
    lfs_sha256: str | None = None
    lfs_size: int | None = None


class _Tree(msgspec.Struct):
    format_version: int
    files: dict[str, _TreeEntry]


@dataclass(frozen=True, slots=True)
class CachedRepository:
    """What a cache has of a model repository. Nothing is read of files but their sizes."""

    cache: Path
    name: str

    @property
    def folder(self) -> Path:
        """Where all of it lies."""
        return self.cache / f"models--{self.name.replace('/', '--')}"

    @property
    def shown(self) -> str:
        """The repository, safe for a terminal."""
        return f"hf://{escape(self.name)}"

    def blob(self, digest: str) -> Path:
        """Where a content lies, by the hexadecimal digits of its digest."""
        return self.folder / "blobs" / digest

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit's files."""
        return self.folder / "snapshots" / commit

    def find_commit(self, revision: str) -> str:
        """The commit that a revision was when it was fetched last; a commit is itself.

        Raises `SourceMissing` if the cache has nothing of it, `CorruptInput` for a ref that names no commit.
        """
        if not self.folder.is_dir():
            raise self.lacking("does not have it")
        commit = revision if is_commit(revision) else self._ref(revision)
        if not self.snapshot(commit).is_dir():
            raise self.lacking(f"has nothing of commit {commit}")
        return commit

    def _ref(self, revision: str) -> str:
        path = self.folder / "refs" / check_relative(revision, self.shown)
        try:
            _, data = read_source(self.resolved(path))
        except SourceMissing:
            raise self.lacking(f"does not know {escape(revision)}") from None
        commit = data.decode("ascii", "replace").strip()
        if not is_commit(commit):
            raise CorruptInput(f"{escape(str(path))}: names no commit ({escape(commit[:80])!r})")
        return commit

    def lacking(self, what: str) -> SourceMissing:
        """The error for what the cache has not, while no server is asked."""
        return SourceMissing(
            f"{self.shown}: the cache {escape(str(self.cache))} {what}, and offline no server is asked",
            hint=f"with a network, `weightops download --cache {escape(self.name)}` fetches it",
        )

    def find_tree(self, commit: str) -> dict[str, RemoteFile]:
        """What the hub lists of a commit, if that was noted; empty if not, or if the note makes no sense."""
        try:
            _, data = read_source(self.resolved(self.tree_path(commit)))
            tree = msgspec.json.decode(data, type=_Tree)
        except (WeightopsError, msgspec.MsgspecError, UnicodeDecodeError):
            return {}
        found = {name: _listed(name, entry) for name, entry in tree.files.items()}
        is_known = tree.format_version == _TREE_VERSION and all(
            _BLOB.fullmatch(digest) for file in found.values() for digest in file.digests.values()
        )
        return found if is_known else {}

    def tree_path(self, commit: str) -> Path:
        """Where it is noted what the hub lists of a commit."""
        return self.folder / "trees" / f"{commit}.json"

    def names(self, commit: str) -> list[str]:
        """The files of a commit that are in the cache."""
        root = self.snapshot(commit)
        found = (path for path in root.rglob("*") if path.is_symlink() or path.is_file())
        return sorted(path.relative_to(root).as_posix() for path in found)

    def find(self, commit: str, file: RemoteFile) -> SourceFile | None:
        """A file of a commit that the hub lists, if its content is in the cache, by its digest and size.

        Raises `CorruptInput` for what has its name and is not it, as far as can be seen without reading.
        """
        digest = next(iter(file.digests.values()))
        try:
            path = self.snapshot(commit) / check_relative(file.name, self.shown)
        except CorruptInput:
            return None  # whoever opens it says so
        for place in (self.blob(digest), path):
            # A link says nothing that the digest does not.
            if os.path.lexists(place) and (place != path or not path.is_symlink()):
                return self._file(path, place, next(iter(file.digests)), digest, file.nbytes)
        return None

    def file_offline(self, commit: str, name: str, listed: RemoteFile | None) -> SourceFile:
        """A file of a commit, held to what its name in the cache says, and to what is `listed` of it if that is noted.

        Raises `SourceMissing`, `CorruptInput` for what has no digest for a name, or another one.
        """
        path = self.snapshot(commit) / check_relative(name, self.shown)
        digest = next(iter(listed.digests.values())) if listed else ""
        if path.is_symlink():
            linked = self.linked_blob(path)
            if linked is None:
                raise _wrong(path, f"leads to {escape(str(path.readlink()))}, which is no blob of its repository")
            if digest not in ("", linked):
                raise _wrong(path, f"leads to blob {linked}, expected {digest}")
            digest = linked
        elif not digest:
            raise _wrong(path, "is no link to a blob, so nothing says what it should hold")
        blob = self.blob(digest)
        algorithm = "sha256" if len(digest) == 64 else GIT_SHA1
        place = blob if os.path.lexists(blob) else path
        return self._file(path, place, algorithm, digest, listed.nbytes if listed else None)

    def linked_blob(self, path: Path) -> str | None:
        """The digest of the blob that a file's link leads to; None if it leads to anything else."""
        target = Path(os.path.normpath(path.parent / path.readlink()))
        is_beside = os.path.realpath(target.parent) == os.path.realpath(self.folder / "blobs")
        return target.name if is_beside and _BLOB.fullmatch(target.name) else None

    def _file(self, path: Path, place: Path, algorithm: str, digest: str, nbytes: int | None) -> SourceFile:
        """The file `path`, whose bytes are at `place`; raises `SourceMissing`, `CorruptInput` for another size."""
        try:
            status = self.resolved(place).stat()
        except OSError as error:
            raise SourceMissing(f"{escape(str(place))}: cannot be read ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):
            raise _wrong(place, "is no regular file")
        if nbytes not in (None, status.st_size):
            raise _wrong(place, f"has {status.st_size} bytes, expected {nbytes}")
        url = f"{_SCHEME}:///{quote(path.as_posix().lstrip('/'))}"
        return SourceFile(url, status.st_size, 0, f"{algorithm}:{digest}")

    def resolved(self, path: Path) -> Path:
        """Where a path leads; raises `CorruptInput` for one that leaves the cache.

        The repository's folder may itself be a link to a disk with more room.
        """
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(os.path.realpath(root)) for root in (self.cache, self.folder)):
            raise _wrong(path, "is a link that leaves the cache")
        return real

    def open(self, file: SourceFile) -> int:
        """A descriptor to read the file's bytes from; raises as `open_regular` does, `CorruptInput` as `resolved`."""
        blob = self.blob(file.digest.partition(":")[2])
        return open_regular(self.resolved(blob if os.path.lexists(blob) else file.local_path))


def _listed(name: str, entry: _TreeEntry) -> RemoteFile:
    if entry.lfs_sha256 is not None:
        return RemoteFile(name, "", entry.size, {"sha256": entry.lfs_sha256})
    return RemoteFile(name, "", entry.size, {GIT_SHA1: entry.blob_id})


def _wrong(path: Path, what: str) -> CorruptInput:
    return CorruptInput(f"{escape(str(path))}: {what}", hint=f"remove {escape(str(path))}, and it is fetched again")


class HubCache:
    """Reads files of a Hugging Face cache (a `Remote`), for all threads; they pass by their digests.

    A file is opened for each read: nothing is held, and one that changes in between is noticed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._proofs = Proofs(self._hint)
        self._seen: dict[SourceFile, tuple[int, ...]] = {}
        self._stopped: WeightopsError | None = None

    def repository(self, name: str) -> CachedRepository:
        """What the cache has of `org/name`, if anything."""
        return CachedRepository(self.folder, name)

    def _repository_of(self, file: SourceFile) -> CachedRepository:
        try:
            first, *_ = file.local_path.relative_to(self.folder).parts
        except ValueError:
            raise WeightopsError(f"{file.shown}: is not in the cache {escape(str(self.folder))}") from None
        return CachedRepository(self.folder, first.removeprefix("models--").replace("--", "/"))

    def _hint(self, file: SourceFile) -> str:
        blob = self._repository_of(file).blob(file.digest.partition(":")[2])
        place = blob if os.path.lexists(blob) else file.local_path
        return f"the copy in the cache is damaged: remove {escape(str(place))}, and it is fetched again"

    def read_into(self, file: SourceFile, offset: int, out: memoryview, following: int = 0) -> None:
        """Fill `out` with the bytes at `offset`.

        Raises `CorruptInput` if the file has changed or ends before, or is a link that leaves the cache, `Differs` with
        its last byte if its digest is wrong, `SourceMissing`, `WeightopsError` if the disk fails.
        """
        if self._stopped is not None:
            raise self._stopped
        stop = offset + len(out)
        if stop > file.nbytes:
            raise CorruptInput(f"{file.shown}: ends at byte {file.nbytes}, expected at least {stop} bytes")
        fd = self._open(file)
        try:
            known = self._proofs.position(file)
            if 0 < offset - known <= _GAP_NBYTES:
                # The digest would miss those bytes, such as a header that was read by an earlier run.
                gap = memoryview(bytearray(offset - known))
                read_from(fd, file, known, gap)
                self._proofs.passed(file, known, gap)
            read_from(fd, file, offset, out)
        finally:
            os.close(fd)
        self._proofs.passed(file, offset, out)

    def _open(self, file: SourceFile) -> int:
        fd = self._repository_of(file).open(file)
        status = os.fstat(fd)
        found = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if status.st_size != file.nbytes or self._seen.setdefault(file, found) != found:
            os.close(fd)
            self.forget(file)
            raise CorruptInput(
                f"{file.shown}: changed while it was being read (expected {file.nbytes} bytes, found {status.st_size})",
                hint="run the command again",
            )
        return fd

    def read(self, file: SourceFile) -> bytes:
        """A small file, whole, held against its digest; raises as `read_into`."""
        if file.nbytes > _MAX_SMALL_NBYTES:
            raise CorruptInput(f"{file.shown}: {file.nbytes} bytes is too large for a file of this kind")
        data = bytearray(file.nbytes)
        fd = self._open(file)
        try:
            read_from(fd, file, 0, memoryview(data))
        finally:
            os.close(fd)
        self._proofs.whole(file, data)
        return bytes(data)

    def proven_nbytes(self, file: SourceFile) -> int:
        return self._proofs.position(file)

    def is_proven(self, file: SourceFile) -> bool:
        return self._proofs.is_proven(file)

    def forget(self, file: SourceFile) -> None:
        self._proofs.forget(file)
        self._seen.pop(file, None)

    def interrupt(self, error: WeightopsError) -> None:
        self._stopped = self._stopped or error

    def resume(self) -> None:
        self._stopped = None

    def close(self) -> None:
        """Nothing is held."""


def tree_document(files: Iterable[RemoteFile]) -> bytes:
    """What huggingface_hub notes of a commit's listing, which says offline what a snapshot should hold."""
    entries = {file.name: _entry(file) for file in sorted(files, key=lambda file: file.name)}
    return msgspec.json.format(msgspec.json.encode(_Tree(_TREE_VERSION, entries)), indent=1)


def _entry(file: RemoteFile) -> _TreeEntry:
    sha256 = file.digests.get("sha256")
    assert file.nbytes is not None
    return _TreeEntry(file.nbytes, file.git_oid, sha256, file.nbytes if sha256 else None)
