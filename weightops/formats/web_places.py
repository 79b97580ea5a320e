"""Finding what a place on the network holds: a hub's listing, a folder's own manifest, or the usual names."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import quote, urlsplit

from weightops.errors import AuthenticationFailed, NetworkFailed, NoWeights, SourceMissing, WeightopsError
from weightops.formats.choose import WEIGHT_SUFFIXES, find_index
from weightops.formats.gguf.split import named_parts
from weightops.formats.hub_places import find_repository, find_repository_file
from weightops.formats.index import parse_index
from weightops.formats.proofs import manifest
from weightops.io.source_file import SourceFile
from weightops.stores.listed import ListedStore, on_server
from weightops.stores.stores import Stores
from weightops.stores.web.hub import find_commit
from weightops.stores.web.listing import (
    HubFile,
    HubRepository,
    Listing,
    RemoteFile,
    WebFile,
    WebFolder,
    parse_location,
)
from weightops.stores.web.small import describe, read_whole
from weightops.stores.web.urls import show
from weightops.stores.web.web import Web

_USUAL_INDEXES = (
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("delta.safetensors.index.json", "delta.wdelta.index.json"),
)
_USUAL_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "delta.safetensors", "delta.wdelta")
_USUAL_SIDECARS = (
    *("config.json", "generation_config.json", "weightops-delta.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json"),
)
_ASKED_AT_ONCE = 8


def find_remote(text: str, stores: Stores) -> ListedStore | SourceFile:
    """The folder or weight file that `text` means; a hub's repository at the commit that its revision is now.

    Offline it is the commit that the revision was when the cache got it.
    Raises `UsageError` for what is no such place, `SourceMissing`, `AuthenticationFailed`, `NetworkFailed`.
    """
    if stores.offline:
        place = parse_location(text)
        if isinstance(place, WebFile | WebFolder):
            raise NetworkFailed(
                f"{place}: is on a server, and offline none is asked",
                hint="unset HF_HUB_OFFLINE, or name something on this machine",
            )
    else:
        place = parse_location(text, endpoint=stores.web.endpoint)
    match place:
        case HubRepository():
            return find_repository(place, stores)
        case HubFile():
            names, folder = named_parts(place.file_name), place.path[: -len(place.file_name)]
            if len(names) == 1:
                return find_repository_file(place, stores)
            commit = "" if stores.offline else find_commit(place.repository, stores.web)
            repository = replace(place.repository, revision=commit or place.repository.revision)
            parts = [find_repository_file(HubFile(repository, f"{folder}{name}"), stores) for name in names]
            return _parts(Listing(str(place), _nameless(names), commit), parts, stores)
        case WebFolder():
            return ListedStore(list_folder(place, stores.web), on_server, stores)
        case WebFile():
            names, url = named_parts(place.file_name), urlsplit(place.url)
            if len(names) == 1:
                return on_server(describe(place.file_name, place.url, stores.web))
            above = url.path.rpartition("/")[0]
            urls = {name: url._replace(path=f"{above}/{quote(name)}").geturl() for name in names}
            parts = [on_server(describe(name, each, stores.web)) for name, each in urls.items()]
            return _parts(Listing(str(place), _nameless(names)), parts, stores)


def _nameless(names: Iterable[str]) -> tuple[RemoteFile, ...]:
    """Files of which no more is said than their names."""
    return tuple(RemoteFile(name, "") for name in names)


def _parts(listing: Listing, parts: Iterable[SourceFile], stores: Stores) -> ListedStore:
    """The parts of a GGUF model, any of which stands for all, as a folder of their own."""
    found = dict(zip((file.name for file in listing.files), parts, strict=True))
    return ListedStore(listing, lambda file: found[file.name], stores)


def list_folder(folder: WebFolder, web: Web) -> Listing:
    """The files of a folder: what its manifest says, or else which of the usual names are there, without digests."""
    url = _join(folder, manifest.NAME)
    try:
        data = read_whole(url, web)
    except (SourceMissing, AuthenticationFailed) as error:
        return _probe(folder, web, error)
    if not data.lstrip().startswith(b"{"):
        # Some servers answer every name with a page for people.
        return _probe(folder, web, None)
    found = manifest.parse_manifest(data, show(url))
    files = [RemoteFile(n, _join(folder, n), e.nbytes, dict(e.digests)) for n, e in found.files.items()]
    return Listing(str(folder), (*files, RemoteFile(manifest.NAME, url, len(data))))


def _join(folder: WebFolder, name: str) -> str:
    """The URL of a file in a folder, which keeps the folder's query: it may be a signature for all of them."""
    base, mark, query = folder.url.partition("?")
    return f"{base}{quote(name)}{mark}{query}"


def _probe(folder: WebFolder, web: Web, reason: WeightopsError | None) -> Listing:
    """The files that answer to usual names, and those that their index lists."""
    files = _those_there(folder, (*_USUAL_INDEXES, *_USUAL_WEIGHTS, *_USUAL_SIDECARS), web)
    index_name = find_index((file.name for file in files), str(folder))
    if index_name is not None:
        url = _join(folder, index_name)
        index = parse_index(read_whole(url, web), show(url))
        files += _those_there(folder, set(index.files) - {file.name for file in files}, web)
    if not any(file.name.endswith(WEIGHT_SUFFIXES) for file in files):
        if isinstance(reason, AuthenticationFailed):
            raise reason
        raise NoWeights(
            f"{folder}: has no {manifest.NAME}, and none of the usual weight files ({', '.join(_USUAL_WEIGHTS)})",
            hint="name one file by its URL, or ask the publisher for a manifest (`weightops manifest`)",
        )
    return Listing(str(folder), tuple(files))


def _those_there(folder: WebFolder, names: Iterable[str], web: Web) -> list[RemoteFile]:
    """Those of the names that the server has.

    Stores that list nothing to strangers call the others forbidden; some servers answer every name with a page.
    """

    def ask(name: str) -> RemoteFile | None:
        try:
            return describe(name, _join(folder, name), web, pages=False)
        except (SourceMissing, AuthenticationFailed):
            return None

    with ThreadPoolExecutor(_ASKED_AT_ONCE, "probe") as pool:
        return [file for file in pool.map(ask, names) if file is not None]
