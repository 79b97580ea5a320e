"""Finding what a repository holds: what its hub lists, with what the cache has of that; offline the cache alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from weightops.errors import CorruptInput, NetworkFailed, SourceMissing, UsageError
from weightops.formats.choose import find_index, is_weights
from weightops.formats.index import parse_index
from weightops.formats.sidecars import kind_of
from weightops.io.escape import escape
from weightops.io.names import listed
from weightops.io.source_file import SourceFile
from weightops.stores.cache import CachedRepository, HubCache
from weightops.stores.listed import ListedStore, on_server
from weightops.stores.stores import Stores
from weightops.stores.web.hub import find_commit, find_file, list_commit
from weightops.stores.web.listing import HubFile, HubRepository, Listing, RemoteFile


def find_repository(repository: HubRepository, stores: Stores) -> ListedStore:
    """A repository, or a folder of it, at the commit that its revision is now, with what the cache has of it.

    Offline it is the commit that the revision was when the cache got it, and only what the cache has.
    Raises `SourceMissing`, `AuthenticationFailed`, `NetworkFailed`, `CorruptInput`.
    """
    if stores.offline:
        return _find_offline(repository, stores)
    commit = find_commit(repository, stores.web)
    listing = list_commit(repository, commit, stores.web)
    cached, notes = _cached(listing.files, repository, commit, stores)
    return ListedStore(
        replace(listing, files=tuple(_below(file, repository) for file in listing.files)),
        lambda file: cached.get(_name(file, repository)) or on_server(file),
        stores,
        notes,
    )


def find_repository_file(place: HubFile, stores: Stores) -> SourceFile:
    """A file of a repository, as `find_repository` finds them; raises as that does."""
    repository = place.repository
    if stores.offline:
        own = _cache(repository, stores).repository(repository.name)
        commit = own.find_commit(repository.revision)
        if place.path not in own.names(commit):
            raise own.lacking(f"does not have {escape(place.path)} of commit {commit}")
        return own.file_offline(commit, place.path, own.find_tree(commit).get(place.path))
    commit = find_commit(repository, stores.web)
    found = find_file(place, commit, stores.web)
    cached, _ = _cached([replace(found, name=place.path)], repository, commit, stores)
    return cached.get(place.path) or on_server(found)


def _cached(
    files: Iterable[RemoteFile], repository: HubRepository, commit: str, stores: Stores
) -> tuple[dict[str, SourceFile], list[str]]:
    """Those of a commit's files that the cache has, by name, and what there is to say of copies that are no good."""
    if stores.cache is None:
        return {}, []
    own = stores.cache.repository(repository.name)
    found: dict[str, SourceFile] = {}
    notes = []
    for file in files:
        try:
            cached = own.find(commit, file)
        except (CorruptInput, SourceMissing) as error:
            notes.append(f"{repository}: {escape(file.name)} is read from the hub, not from the cache: {error}")
        else:
            found |= {} if cached is None else {file.name: cached}
    return found, notes


def _below(file: RemoteFile, repository: HubRepository) -> RemoteFile:
    """The file, named as in the repository's folder, if one is meant."""
    return replace(file, name=file.name.removeprefix(f"{repository.folder}/")) if repository.folder else file


def _name(file: RemoteFile, repository: HubRepository) -> str:
    """What such a file is called in the whole repository."""
    return f"{repository.folder}/{file.name}" if repository.folder else file.name


def _cache(repository: HubRepository, stores: Stores) -> HubCache:
    if stores.cache is None:
        raise NetworkFailed(
            f"{repository}: is on a hub, and offline none is asked",
            hint="unset HF_HUB_OFFLINE, or name something on this machine",
        )
    return stores.cache


def _find_offline(repository: HubRepository, stores: Stores) -> ListedStore:
    own = _cache(repository, stores).repository(repository.name)
    commit = own.find_commit(repository.revision)
    tree = own.find_tree(commit)

    def locate(file: RemoteFile) -> SourceFile:
        name = _name(file, repository)
        return own.file_offline(commit, name, tree.get(name))

    inside = f"{repository.folder}/" if repository.folder else ""
    names = dict.fromkeys(own.names(commit))
    found = ListedStore(
        Listing(
            str(repository),
            tuple(_below(RemoteFile(name, ""), repository) for name in names if name.startswith(inside)),
            commit,
            repository.revision,
        ),
        locate,
        stores,
        [_offline_note(repository, commit), *_lacking(repository, [n for n in tree if n not in names], inside)],
    )
    missing = _first_missing(found, [name.removeprefix(inside) for name in tree if name.startswith(inside)])
    if missing is not None:
        raise own.lacking(f"does not have {escape(missing)} of commit {commit}")
    return found


def _lacking(repository: HubRepository, names: Iterable[str], inside: str) -> list[str]:
    """What would go along with the weights, and is not in the cache."""
    along = [name for name in names if name.startswith(inside) and kind_of(name.removeprefix(inside))]
    return [f"{repository}: not in the cache, so left out: {listed(along)}"] if along else []


def _first_missing(found: ListedStore, names_of_commit: Iterable[str]) -> str | None:
    """The first weight file that the cache lacks: of those in the index, or of the commit's if it has none."""
    names = found.names()
    index_name = find_index(names, found.shown)
    if index_name is not None:
        index = parse_index(found.get(index_name), f"{found.shown}/{escape(index_name)}")
        return next((name for name in index.files if not found.has(name)), None)
    if any(map(is_weights, names)):
        return None
    return next(filter(is_weights, sorted(names_of_commit)), "any weights")


@dataclass(frozen=True)
class Snapshot:
    """The folder in a cache with a commit's files, and what these should be `by` the hub, or by the cache itself.

    `name` is the repository at its commit; `notes` say what of it is not there.
    """

    name: str
    folder: Path
    by: str
    files: Mapping[str, RemoteFile]
    notes: tuple[str, ...]


def find_snapshot(place: HubRepository, stores: Stores) -> Snapshot:
    """The copy of a repository that the cache has; raises `SourceMissing` if it has none, and as `find_repository`."""
    if stores.cache is None:
        raise UsageError(f"{place}: there is no cache that could have a copy of it", hint="give Stores(cache=PATH)")
    own = _cache(place, stores).repository(place.name)
    if stores.offline:
        commit, by = own.find_commit(place.revision), "the cache itself"
        tree = own.find_tree(commit)
        notes = [_offline_note(place, commit)]
    else:
        commit, by = find_commit(place, stores.web), "its hub"
        tree = {file.name: file for file in list_commit(place, commit, stores.web).files}
        notes = []
    inside = f"{place.folder}/" if place.folder else ""
    names = dict.fromkeys(name for name in own.names(commit) if name.startswith(inside))
    if not names:
        raise SourceMissing(
            f"{place}: nothing of commit {commit} is in the cache {escape(str(own.cache))}",
            hint=f"`weightops download --cache {escape(place.name)}` fetches it",
        )
    lacking = [name for name in tree if name.startswith(inside) and name not in names]
    if lacking:
        notes.append(f"{place}: not in the cache, so not verified: {listed(lacking)}")
    files = {n: tree[n] if n in tree else _by_link(own, commit, n) for n in names if n in tree or stores.offline}
    return Snapshot(
        f"{place}@{commit}",
        own.snapshot(commit) / place.folder,
        by,
        {name.removeprefix(inside): file for name, file in files.items()},
        tuple(notes),
    )


def _by_link(own: CachedRepository, commit: str, name: str) -> RemoteFile:
    """What a file should be by the blob that its link names; raises `CorruptInput` if it names none."""
    file = own.file_offline(commit, name, None)
    algorithm, _, digest = file.digest.partition(":")
    return RemoteFile(name, "", file.nbytes, {algorithm: digest})


def _offline_note(place: HubRepository, commit: str) -> str:
    return f"{place}: offline: {escape(place.revision)} is commit {commit} in the cache"
