"""What a download records of itself, and what can be told from that without a network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightops.errors import CorruptInput, NetworkFailed
from weightops.formats.proofs import manifest
from weightops.formats.proofs.manifest import FileEntry, Manifest
from weightops.io.escape import escape
from weightops.stores.web.listing import Listing
from weightops.stores.web.small import read_whole
from weightops.stores.web.web import Web
from weightops.version import __version__

OPERATION = "download"


def recorded(path: Path) -> Manifest | None:
    """The manifest at `path`, if there is one and a download made it."""
    found = manifest.read_manifest(path) if os.path.lexists(path) else None
    return found if found is not None and found.recipe.get("operation") == OPERATION else None


def is_complete(out: Path, found: Manifest, request: Mapping[str, Any]) -> bool:
    """Whether a manifest answers the request, and every file in it stands there with its size."""
    if any(found.recipe.get(key) != value for key, value in request.items()):
        return False
    try:
        return all((out / name).lstat().st_size == entry.nbytes for name, entry in found.files.items())
    except OSError:
        return False


def request_of(
    source: str, commit: str, expected_by: str, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Any]:
    """What makes two downloads the same, as the manifest records it."""
    chosen = {"include": list(include), "exclude": list(exclude), "expected_by": expected_by}
    return {"source": source, "commit": commit, **chosen}


def offline(out: Path, source: str, revision: str, include: Sequence[str], exclude: Sequence[str]) -> Manifest:
    """The manifest of a folder that is complete as far as can be told without a network.

    Raises `NetworkFailed` if the folder is of another source or revision, is not complete, or lacks files that were
    chosen otherwise.
    """
    found = recorded(out / manifest.NAME)
    if found is None:
        raise NetworkFailed(f"{escape(str(out))}: no complete download of {source}, and --offline asks no server")
    recipe = found.recipe
    if recipe.get("source") != source or revision not in ("", recipe.get("revision"), recipe.get("commit")):
        raise NetworkFailed(
            f"{escape(str(out))}: is {recipe.get('source')} at {recipe.get('revision')}, not {source} at {revision}"
        )
    had = (list(recipe.get("include", ())), list(recipe.get("exclude", ())))
    if had not in (([], []), (list(include), list(exclude))):
        raise NetworkFailed(
            f"{escape(str(out))}: holds what other --include and --exclude chose, and --offline asks no server"
        )
    if not is_complete(out, found, {}):
        raise NetworkFailed(f"{escape(str(out))}: files are missing or cut, and --offline asks no server")
    return found


def manifest_of(
    listing: Listing,
    files: Mapping[str, FileEntry],
    etags: Mapping[str, str],
    request: Mapping[str, Any],
    web: Web,
    stale: Sequence[str] = (),
    unproven: Sequence[str] = (),
) -> Manifest:
    """What a download records of its `files`, and of their tensors what their source's own manifest says."""
    described = _own_manifest(listing, files, web)
    return Manifest(
        schema=manifest.SCHEMA,
        content_id=described.content_id if described else None,
        tensors=described.tensors if described else {},
        files=dict(sorted(files.items())),
        recipe={
            "operation": OPERATION,
            **request,
            "revision": listing.revision,
            "etags": dict(sorted(etags.items())),
            "stale": list(stale),
            **({"unproven": list(unproven)} if unproven else {}),
        },
        provenance={"weightops": __version__},
    )


def _own_manifest(listing: Listing, files: Mapping[str, FileEntry], web: Web) -> Manifest | None:
    """What the source's own manifest says of its tensors, if the files that hold them are those that arrived."""
    own = next((file for file in listing.files if file.name == manifest.NAME), None)
    if own is None:
        return None
    try:
        found = manifest.parse_manifest(read_whole(own.url, web, own.digests), f"{listing.source}: {manifest.NAME}")
    except CorruptInput:
        return None  # it only adds to what is known; the files have been compared with the source's digests
    holders = {entry.file for entry in found.tensors.values()}
    there = holders <= files.keys() & found.files.keys()
    return found if holders and there and all(_agree(files[name], found.files[name]) for name in holders) else None


def _agree(ours: FileEntry, theirs: FileEntry) -> bool:
    """Whether two descriptions are of one file, as far as they use the same algorithms."""
    common = ours.digests.keys() & theirs.digests.keys()
    return ours.nbytes == theirs.nbytes and bool(common) and all(ours.digests[n] == theirs.digests[n] for n in common)
