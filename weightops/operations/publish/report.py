"""What was published, as a value and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from weightops.io.brief import brief
from weightops.io.notebook import card, in_units
from weightops.io.strict_json import as_json

FileStatus = Literal["sent", "there", "to send"]


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file of `nbytes` bytes, which was sent, was there before, or would be sent.

    `proof` says what shows that it is there as it is here.
    """

    name: str
    nbytes: int
    status: FileStatus
    proof: str = ""


class PublishDocument(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="weightops-publish/1"):
    """What `publish --json` prints: a `Publication` as it stands. `sent_bytes` were sent in `elapsed_s` seconds."""

    folder: str
    destination: str
    owner: str
    visibility: str
    version: str
    created: bool
    files: tuple[PublishedFile, ...]
    not_sent: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]
    bytes: int
    sent_bytes: int
    elapsed_s: float
    dry_run: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Publication:
    """What is at a destination now, or with `dry_run` would be.

    `owner` and `visibility` say whose it is and who sees it, `version` is the commit, where there are such, and
    `created` whether the place was made. `not_sent` are files of the folder that stay here; `deleted` and `kept` those
    at the destination that the folder lacks. `sent_nbytes` were sent for it, or would be, `nbytes` are those of all
    its files.
    """

    folder: str
    destination: str
    owner: str
    visibility: str
    version: str
    created: bool
    files: tuple[PublishedFile, ...]
    not_sent: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]
    sent_nbytes: int
    elapsed_s: float = 0.0
    dry_run: bool = False
    warnings: tuple[str, ...] = ()

    __repr__ = brief

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.nbytes for file in self.files)

    def _repr_html_(self) -> str:
        facts = {"for": self.visibility, "files": len(self.files), "size": in_units(self.nbytes)}
        rows = [(file.name, file.status, file.proof) for file in self.files]
        return card(self.destination, facts, ("file", "", "proof"), rows, what="files")

    def to_json(self) -> dict[str, Any]:
        """A document of schema `weightops-publish/1`."""
        document = PublishDocument(
            folder=self.folder,
            destination=self.destination,
            owner=self.owner,
            visibility=self.visibility,
            version=self.version,
            created=self.created,
            files=self.files,
            not_sent=self.not_sent,
            deleted=self.deleted,
            kept=self.kept,
            bytes=self.nbytes,
            sent_bytes=self.sent_nbytes,
            elapsed_s=round(self.elapsed_s, 3),
            dry_run=self.dry_run,
            warnings=self.warnings,
        )
        return as_json(document)
