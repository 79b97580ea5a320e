"""A download into a Hugging Face cache, in huggingface_hub's own layout; see `weightops.stores.cache`.

Blobs first, then the names of a commit's files, then what the commit lists, and last the ref: who asks the cache by a
revision finds all of it, or what was there before. Nothing is replaced but a ref that has moved on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from weightops.engine.control import Control
from weightops.errors import CorruptInput, Differs, OutputExists, SourceMissing, UsageError, WeightopsError
from weightops.io.atomic import check_folder, fsync_folder, make_folder, write_new, writing_whole
from weightops.io.digests import FileDigests, hash_files
from weightops.io.direct import write_failure
from weightops.io.escape import escape
from weightops.io.paths import check_names, check_relative, open_regular
from weightops.io.platform.entries import make_link
from weightops.operations.download import operation
from weightops.operations.download import source as sources
from weightops.operations.download.operation import Download, Files, Reporter
from weightops.stores.cache import CachedRepository, tree_document
from weightops.stores.transfer.hub_locks import LockedClaims
from weightops.stores.transfer.partial import STATE, key_of
from weightops.stores.transfer.places import check_place, move_into
from weightops.stores.transfer.transfer import Transfer
from weightops.stores.web.hub import find_commit, list_commit
from weightops.stores.web.listing import HubFile, HubRepository, Listing, RemoteFile, is_commit
from weightops.stores.web.web import Web

_BLOCK_NBYTES = 4 << 20
_LEFT_HINT = "it is left alone: remove it, and run the same command again"


def download_into_cache(
    source: str,
    cache: Path,
    revision: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    workers: int | None,
    dry_run: bool,
    control: Control,
) -> Download:
    """What `weightops.api.prove.download` does with `cache`.

    Raises `UsageError` for anything but a repository of a hub or a file of it, `Differs` and `CorruptInput` for what
    is in the cache under a name and is not what it should be, and what a download raises.
    """
    with control.stores.connected() as stores:
        web = stores.web
        target = sources.find_target(source, revision, web.endpoint)
        if not isinstance(target.place, HubRepository | HubFile):
            raise UsageError(
                f"{target.place}: a Hugging Face cache holds repositories of a hub", hint="give --out for anything else"
            )
        repository = target.place.repository if isinstance(target.place, HubFile) else target.place
        commit = find_commit(repository, web)
        whole = list_commit(replace(repository, folder=""), commit, web)
        whole = operation.with_expected(whole, target.expected, target.expected_by)
        files, warnings = operation.select_all(_wanted(whole, target.place), tuple(include), tuple(exclude))
        filling = _Filling(CachedRepository(Path(os.path.abspath(cache)), repository.name), whole, files)
        filling.check_places()
        if dry_run:
            have = {file.name: file.nbytes or 0 for file in files if filling.stands(file)}
        else:
            have = filling.proven(control)
        out = filling.own.snapshot(commit)
        planned = Download(out, replace(whole, source=str(target.place)), files, have, warnings=tuple(warnings))
        missing = [file for file in files if file.name not in have]
        operation.check_room(filling.own.folder, sum(file.nbytes or 0 for file in _contents(missing).values()))
        if dry_run:
            return planned
        filling.fill(missing, web, workers or operation.DEFAULT_WORKERS, control)
        return replace(planned, is_cached=True)


def _wanted(listing: Listing, place: HubRepository | HubFile) -> Listing:
    """The files of the repository that are meant by a place in it."""
    if isinstance(place, HubFile):
        files = tuple(file for file in listing.files if file.name == place.path)
    else:
        files = tuple(
            file for file in listing.files if file.name.startswith(f"{place.folder}/" if place.folder else "")
        )
    if not files:
        raise SourceMissing(f"{place}: no such file or folder at {escape(listing.revision)}")
    return replace(listing, source=str(place), files=files)


def _digest(file: RemoteFile) -> str:
    """What the hub knows the content by, and the cache names it by."""
    return next(iter(file.digests.values()))


def _contents(files: Sequence[RemoteFile]) -> dict[str, RemoteFile]:
    """One file for each content; others of the same name it once more."""
    return {_digest(file): file for file in reversed(files)}


@dataclass(frozen=True)
class _Filling:
    """A repository in a cache, a commit of it (`listing`), and the files of that which are to be there."""

    own: CachedRepository
    listing: Listing
    files: Files

    def path(self, file: RemoteFile) -> Path:
        """Where the file has its name."""
        return self.own.snapshot(self.listing.commit) / file.name

    def check_places(self) -> None:
        """Refuse names that cannot be written, before anything is fetched.

        Raises `CorruptInput` for a link or file in the place of a folder, or a link to another content.
        """
        check_folder(self.own.folder)
        check_names(self.own.snapshot(self.listing.commit), [f.name for f in self.files], self.listing.source)
        own, listing = self.own, self.listing
        check_relative(listing.revision, listing.source)
        for name in ("blobs/x", f"{STATE}/data", f"trees/{listing.commit}.json", f"refs/{listing.revision}"):
            check_place(own.folder, name)
        for file in self.files:
            folder = Path(file.name).parent
            check_place(own.folder, f"snapshots/{listing.commit}/{folder / 'x'}")
            path = self.path(file)
            if path.is_symlink() and own.linked_blob(path) != _digest(file):
                raise CorruptInput(
                    f"{escape(str(path))} is a link to {escape(str(path.readlink()))}, expected blob {_digest(file)}",
                    hint=_LEFT_HINT,
                )

    def _content(self, file: RemoteFile) -> Path:
        """Where the file's bytes are, or are to be: a copy in its place, or its blob."""
        path = self.path(file)
        return path if os.path.lexists(path) and not path.is_symlink() else self.own.blob(_digest(file))

    def stands(self, file: RemoteFile) -> bool:
        """Whether something of the file's size is there."""
        try:
            return self._content(file).stat().st_size == file.nbytes
        except OSError:
            return False

    def proven(self, control: Control) -> dict[str, int]:
        """The bytes of files whose content is there, once it is held against its digests.

        Raises `Differs`, and `CorruptInput` for a link that leaves the cache.
        """
        places = {self._content(file): file for file in self.files if os.path.lexists(self._content(file))}
        control.progress.start("checking", sum(file.nbytes or 0 for file in places.values()))
        found = hash_files(
            [(self.own.resolved(place), file.digests) for place, file in places.items()],
            on_bytes=control.progress.advance,
            cancelled=control.check,
        )
        control.progress.stop()
        for (place, file), each in zip(places.items(), found, strict=True):
            if isinstance(each, WeightopsError):
                raise each
            _compare(place, file, each)
        return {file.name: file.nbytes or 0 for file in self.files if self._content(file) in places}

    def fill(self, missing: Sequence[RemoteFile], web: Web, workers: int, control: Control) -> None:
        """Bring the contents that are missing, and give all files their names."""
        own, commit = self.own, self.listing.commit
        make_folder(own.snapshot(commit))
        make_folder(own.folder / "blobs")
        contents = list(_contents(missing).values())
        locks = own.cache / ".locks" / own.folder.name
        transfer = Transfer(
            own.folder,
            web,
            Reporter(control),
            workers,
            claims=LockedClaims(own.folder, {key_of(_blob(f)): locks / f"{_digest(f)}.lock" for f in contents}),
            place=_blob,
        )
        control.progress.start("downloading", sum(file.nbytes or 0 for file in contents))
        transfer.run(contents)
        control.progress.stop()
        for file in self.files:
            control.check()
            self._name(file)
        self._note_tree()
        if is_commit(self.listing.revision) or self._is_known():
            transfer.tidy()
        else:
            transfer.seal(f"refs/{self.listing.revision}", commit.encode(), control.check)

    def _name(self, file: RemoteFile) -> None:
        """Give a file its name: a relative link to its blob, or a copy of it where there are no links."""
        path, blob = self.path(file), self.own.blob(_digest(file))
        make_folder(path.parent)
        try:
            if not os.path.lexists(path) and not make_link(path, Path(os.path.relpath(blob, path.parent))):
                self._copy(blob, file)
            fsync_folder(path.parent)
        except FileExistsError:
            pass  # somebody else names it at this moment
        except OSError as error:
            raise write_failure(path, error) from None
        if path.is_symlink() and self.own.linked_blob(path) != _digest(file):
            raise CorruptInput(f"{escape(str(path))} was made a link to something else meanwhile")
        if not self.stands(file):
            raise SourceMissing(
                f"{escape(str(self._content(file)))} was removed meanwhile", hint="run the same command again"
            )

    def _copy(self, blob: Path, file: RemoteFile) -> None:
        place = f"snapshots/{self.listing.commit}/{file.name}"
        temporary = self.own.folder / STATE / f".{key_of(place)}.tmp"
        make_folder(temporary.parent)
        with writing_whole(temporary) as write, open(open_regular(blob), "rb") as source:
            while block := source.read(_BLOCK_NBYTES):
                write(block)
        move_into(self.own.folder, place, temporary, may_replace=False)

    def _is_known(self) -> bool:
        """Whether the ref says already that the revision is this commit."""
        try:
            return self.own.find_commit(self.listing.revision) == self.listing.commit
        except (CorruptInput, SourceMissing):
            return False

    def _note_tree(self) -> None:
        path = self.own.tree_path(self.listing.commit)
        if not os.path.lexists(path):
            make_folder(path.parent)
            with suppress(OutputExists):  # another run notes the same at this moment
                write_new(path, tree_document(self.listing.files))


def _blob(file: RemoteFile) -> str:
    return f"blobs/{_digest(file)}"


def _compare(place: Path, file: RemoteFile, found: FileDigests) -> None:
    """Raise `Differs` unless what is at a place is the file that the hub lists."""
    for algorithm, expected in file.digests.items():
        if found.digests[algorithm] != expected:
            raise Differs(
                f"{escape(str(place))}: is not {escape(file.name)}: {algorithm} is {found.digests[algorithm]} "
                f"({found.nbytes} bytes), expected {expected} ({file.nbytes} bytes)",
                hint=_LEFT_HINT,
            )
