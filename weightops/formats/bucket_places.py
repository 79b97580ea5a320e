"""Finding what a place in a bucket holds: what the store lists, with the digests of the folder's own manifest."""

from __future__ import annotations

from dataclasses import replace

from weightops.errors import CorruptInput, SourceMissing
from weightops.formats.choose import WEIGHT_SUFFIXES
from weightops.formats.gguf.split import named_parts
from weightops.formats.job_owner import WORK, JobOwner, owner_name
from weightops.formats.proofs import manifest
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.stores.listed import ListedStore, on_server
from weightops.stores.s3.connection import S3
from weightops.stores.s3.listing import list_objects
from weightops.stores.s3.places import BucketPlace, address, parse_place
from weightops.stores.s3.store import identity_of
from weightops.stores.store import PROBES
from weightops.stores.stores import Stores
from weightops.stores.web.listing import Listing, RemoteFile
from weightops.stores.web.small import read_whole

_FILES = (*WEIGHT_SUFFIXES, ".json", ".imatrix", ".dat")


def find_in_bucket(text: str, stores: Stores) -> ListedStore | SourceFile:
    """The folder or file that `s3://bucket/key` means; an object of that very key only if nothing lies below it.

    Raises `UsageError` for what is no such place, `SourceMissing`, `CorruptInput` for a folder that a job still writes,
    and as `S3` does.
    """
    place = parse_place(text)
    if not place.is_folder and place.key.endswith(_FILES):
        try:
            return _find_file(place, stores)
        except SourceMissing:
            pass
    try:
        listing = list_bucket(place, stores.s3)
    except SourceMissing:
        if place.is_folder:
            raise
        return identity_of(stores.s3, address(place.bucket, place.key))
    return ListedStore(_with_digests(listing, stores.s3), on_server, stores)


def list_bucket(place: BucketPlace, connection: S3) -> Listing:
    """The files of a folder in a bucket, each with its ETag; raises as `find_in_bucket` does."""
    inside = f"{place.key}/" if place.key else ""
    objects, _ = list_objects(connection, place.bucket, inside)
    files = tuple(
        RemoteFile(each.key[len(inside) :], address(place.bucket, each.key), each.nbytes, etag=each.etag)
        for each in objects
    )
    if not files:
        raise SourceMissing(f"{place}: no such object or folder")
    names = {file.name for file in files}
    if manifest.NAME not in names and any(n.startswith(f"{WORK}/") and not n.startswith(PROBES) for n in names):
        _refuse_unfinished(place, address(place.bucket, inside + owner_name()), connection)
    return Listing(str(place), tuple(file for file in files if not file.name.startswith(f"{WORK}/")))


def _refuse_unfinished(place: BucketPlace, owner: str, connection: S3) -> None:
    """Raise what it means to read a place that a job still writes."""
    try:
        found = JobOwner.parse(read_whole(owner, connection))
    except SourceMissing:
        found = None
    if found is not None:
        raise CorruptInput(f"{place}: is not finished, the job {escape(found.job)} is writing it", hint=found.hint)
    raise CorruptInput(
        f"{place}: is not finished, it holds {WORK}/ and no {manifest.NAME}",
        hint="run the command that writes it again: it continues",
    )


def list_in_bucket(place: BucketPlace, connection: S3) -> Listing:
    """The files of a folder in a bucket with the digests that its manifest gives, or one file; raises likewise."""
    try:
        return _with_digests(list_bucket(place, connection), connection)
    except SourceMissing:
        if place.is_folder:
            raise
    found = identity_of(connection, address(place.bucket, place.key))
    return Listing(str(place), (RemoteFile(found.name, found.path, found.nbytes, etag=found.etag),))


def _find_file(place: BucketPlace, stores: Stores) -> ListedStore | SourceFile:
    """The object of a key; all parts of a GGUF model, any of which stands for all."""
    found = identity_of(stores.s3, address(place.bucket, place.key))
    beside = {each.key[len(place.key) :] for each in list_objects(stores.s3, place.bucket, f"{place.key}.")[0]}
    if owner_name() in beside and f".{manifest.NAME}" not in beside:
        _refuse_unfinished(place, address(place.bucket, place.key + owner_name()), stores.s3)
    above, _, name = place.key.rpartition("/")
    names = named_parts(name)
    if len(names) == 1:
        return found
    listing = list_bucket(BucketPlace(place.bucket, above), stores.s3)
    present = {file.name: file for file in listing.files}
    missing = next((name for name in names if name not in present), None)
    if missing is not None:
        raise SourceMissing(f"{place}: is one part of a model, and {escape(missing)} is missing beside it")
    return ListedStore(
        replace(listing, source=str(place), files=tuple(map(present.__getitem__, names))), on_server, stores
    )


def _with_digests(listing: Listing, connection: S3) -> Listing:
    """The listing with the digests that the folder's manifest gives; raises `CorruptInput` for other sizes in it."""
    own = next((file for file in listing.files if file.name == manifest.NAME), None)
    if own is None:
        return listing
    known = manifest.parse_manifest(read_whole(own.url, connection), f"{listing.source}/{manifest.NAME}").files
    files = []
    for file in listing.files:
        entry = known.get(file.name)
        if entry is not None and entry.nbytes != file.nbytes:
            raise CorruptInput(
                f"{listing.source}/{escape(file.name)}: has {file.nbytes} bytes, {manifest.NAME} says {entry.nbytes}",
                hint="weightops verify says what else is not as listed",
            )
        files.append(file if entry is None else replace(file, digests=dict(entry.digests)))
    return replace(listing, files=tuple(files))
