"""What `download --json` prints."""

from __future__ import annotations

from typing import Any

import msgspec

from weightops.io.strict_json import as_json
from weightops.operations.download.operation import Download


class FileDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the source: bytes if they are known, digests that the source gives, whether it was there before."""

    name: str
    nbytes: int | None
    digests: dict[str, str]
    here: bool


class DownloadDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-download/1"):
    """What `download --json` prints; see `weightops.operations.download.Download`.

    `complete` says that every file is there and proven. `nbytes` are those of all files whose size is known.
    """

    out: str
    source: str
    revision: str
    commit: str
    complete: bool
    nbytes: int
    files: tuple[FileDocument, ...]
    stale: tuple[str, ...]
    unproven: tuple[str, ...]
    warnings: tuple[str, ...]


def download_json(found: Download) -> dict[str, Any]:
    """A document of schema `weightops-download/1`."""
    files = tuple(
        FileDocument(name=file.name, nbytes=file.nbytes, digests=dict(file.digests), here=file.name in found.have)
        for file in found.files
    )
    return as_json(
        DownloadDocument(
            out=str(found.out),
            source=found.listing.source,
            revision=found.listing.revision,
            commit=found.listing.commit,
            complete=found.manifest is not None,
            nbytes=found.nbytes,
            files=files,
            stale=found.stale,
            unproven=found.unproven,
            warnings=found.warnings,
        )
    )
