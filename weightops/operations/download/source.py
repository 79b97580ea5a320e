"""What a download is asked for: a repository, a URL, a list of URLs, or a published name; and what it should hold."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from weightops.errors import CorruptInput, SourceMissing, UsageError
from weightops.formats.bucket_places import list_in_bucket
from weightops.formats.proofs.checksums import BY_LENGTH, ChecksumList, parse_checksums, read_checksums
from weightops.formats.proofs.published import published, repository_of
from weightops.formats.web_places import list_folder
from weightops.io.digests import HEX_DIGITS
from weightops.io.escape import escape
from weightops.stores.local import read_source
from weightops.stores.s3.connection import S3
from weightops.stores.s3.places import BucketPlace, is_bucket, parse_place
from weightops.stores.web.hub import find_commit, find_file, list_commit
from weightops.stores.web.listing import (
    HubFile,
    HubRepository,
    Listing,
    RemoteFile,
    WebFile,
    WebFolder,
    is_commit,
    is_location,
    parse_location,
)
from weightops.stores.web.pages import file_address
from weightops.stores.web.small import describe, read_whole
from weightops.stores.web.urls import DEFAULT_ENDPOINT, is_url, show
from weightops.stores.web.web import Web

_URL_LINE = re.compile(r"(?:([a-z0-9_]+):)?([0-9A-Fa-f]+)\s+(https?://\S+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class UrlList:
    """Files at URLs, each with a digest; `digest` is that of the list itself."""

    name: str
    files: tuple[RemoteFile, ...]
    digest: str

    def __str__(self) -> str:
        return escape(self.name)


@dataclass(frozen=True, slots=True)
class Target:
    """A place, and digests by file name and algorithm that `expected_by` demands of what is there."""

    place: HubRepository | HubFile | WebFile | WebFolder | BucketPlace | UrlList
    expected: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    expected_by: str = ""

    @property
    def revision(self) -> str:
        """The revision that is asked for; empty where there are none."""
        match self.place:
            case HubRepository():
                return self.place.revision
            case HubFile():
                return self.place.repository.revision
        return ""


def find_target(source: str, revision: str | None = None, endpoint: str = DEFAULT_ENDPOINT) -> Target:
    """Read what `source` means: a URL, s3:// or hf://, a list of URLs, a published name, or org/name at `endpoint`.

    Raises `UsageError`, `SourceMissing`, `CorruptInput` for a bad list.
    """
    if is_bucket(source):
        if revision is not None:
            raise UsageError(f"{show(source)}: a bucket has no revision")
        return Target(parse_place(source))
    if is_location(source):
        return Target(parse_location(source, revision, endpoint))
    if Path(source).is_file():
        return Target(read_url_list(Path(source), endpoint))
    if source in published():
        repository = repository_of(source)
        if repository is None:
            raise SourceMissing(
                f"{source}: these files were never published",
                hint="they are what `weightops recover` makes; `weightops verify --manifest` checks them",
            )
        expected = read_checksums(published()[source]).by_file()
        return Target(parse_location(repository, revision), expected, source)
    if "/" not in source:
        known = ", ".join(name for name in published() if repository_of(name))
        raise SourceMissing(
            f"{escape(source)}: no such file, and no published name of that kind (there are {known})",
            hint="write a repository as org/name",
        )
    return Target(parse_location(source, revision, endpoint))


def read_url_list(path: Path, endpoint: str = DEFAULT_ENDPOINT) -> UrlList:
    """A list with lines `DIGEST  URL` or `ALGORITHM:DIGEST  URL`; blank lines and `#` comments are passed over."""
    _, data = read_source(path)
    shown = escape(str(path))
    files: dict[str, RemoteFile] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _URL_LINE.fullmatch(line.strip())
        algorithm = match and (match[1] or BY_LENGTH.get(len(match[2])))
        if not match or not algorithm or len(match[2]) != HEX_DIGITS.get(algorithm):
            raise CorruptInput(f"{shown}: line {number}: expected a digest and a URL, found {escape(line[:200])!r}")
        file = WebFile(file_address(match[3], endpoint))
        listed = RemoteFile(file.file_name, file.url, None, {algorithm: match[2].lower()})
        if not file.file_name or files.setdefault(file.file_name, listed) != listed:
            raise CorruptInput(f"{shown}: line {number}: no file name, or one that is listed already")
    if not files:
        raise CorruptInput(f"{shown}: lists no files")
    return UrlList(path.name, tuple(files.values()), hashlib.sha256(data).hexdigest())


def with_digests(target: Target, digests: Mapping[str, str], checksums: str | None, web: Web) -> Target:
    """The target of one URL with digests that were given on the command line, or are in a list at a path or URL.

    Raises `UsageError` for digests of anything but one URL, or that are none.
    """
    if not digests and checksums is None:
        return target
    if not isinstance(target.place, WebFile | HubFile):
        raise UsageError("--sha256, --md5 and --checksums are for one URL", hint="a hub knows its files' digests")
    for algorithm, digest in digests.items():
        if len(digest) != HEX_DIGITS[algorithm] or digest.strip("0123456789abcdefABCDEF"):
            raise UsageError(f"{escape(digest)!r} is no {algorithm} digest")
    found = {algorithm: digest.lower() for algorithm, digest in digests.items()}
    if checksums is not None:
        listed = _listed(target.place, checksums, web)
        differing = next((name for name in found if listed.get(name, found[name]) != found[name]), None)
        if differing is not None:
            raise UsageError(f"--{differing} and {show(checksums)} name two {differing} digests")
        found |= listed
    return replace(target, expected={target.place.file_name: found}, expected_by="the digest")


def _listed(file: WebFile | HubFile, checksums: str, web: Web) -> dict[str, str]:
    """What a list says of a file: the line whose path the URL ends in, or else the only one with its name."""
    found = _read_list(checksums, web).by_file()
    path = f"/{file.path}" if isinstance(file, HubFile) else unquote(urlsplit(file.url).path)
    named = [name for name in found if name.rpartition("/")[2] == file.file_name]
    if not named:
        raise SourceMissing(f"{show(checksums)}: does not list {escape(file.file_name)}")
    ending = [name for name in named if path.endswith(f"/{name}")]
    if len(named) > 1 and len(ending) == 0:
        raise CorruptInput(
            f"{show(checksums)}: lists {len(named)} files called {escape(file.file_name)}", hint="give --sha256 instead"
        )
    return found[max(ending, key=len) if ending else named[0]]


def _read_list(checksums: str, web: Web) -> ChecksumList:
    if not is_url(checksums):
        return read_checksums(Path(checksums))
    address = file_address(checksums, web.endpoint)
    return parse_checksums(read_whole(address, web), show(checksums), WebFile(address).file_name)


def find_version(target: Target, web: Web) -> str:
    """What tells this version of the target from others: a commit, or a digest; at most one request for a hub.

    Empty for a URL, of which nobody can tell without looking at it.
    """
    match target.place:
        case HubRepository():
            return find_commit(target.place, web)
        case HubFile():
            return find_commit(target.place.repository, web)
        case UrlList():
            return target.place.digest
        case _:
            return ""


def known_version(target: Target) -> str:
    """The version, if the target names one that cannot change."""
    return target.revision if is_commit(target.revision) else ""


def list_target(target: Target, version: str, web: Web) -> Listing:
    """The files of the target at that version."""
    match target.place:
        case HubRepository():
            return list_commit(target.place, version, web)
        case HubFile():
            found = find_file(target.place, version, web)
            return Listing(str(target.place), (found,), version, target.revision)
        case WebFile():
            name = target.place.file_name
            if not name:
                raise UsageError(f"{target.place}: names no file")
            return Listing(str(target.place), (describe(name, target.place.url, web),))
        case UrlList():
            files = tuple(describe(file.name, file.url, web, file.digests) for file in target.place.files)
            return Listing(str(target.place), files, version)
        case WebFolder():
            return list_folder(target.place, web)
        case BucketPlace():
            assert isinstance(web, S3)
            return list_in_bucket(target.place, web)
