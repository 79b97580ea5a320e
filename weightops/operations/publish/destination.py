"""What a place that can be published to is asked for. A new kind of place is one file that answers this."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from weightops.engine.control import Control
from weightops.stores.outgoing import Outgoing
from weightops.stores.web.listing import RemoteFile


@dataclass(frozen=True, slots=True)
class There:
    """What is at a destination: `files` by name, if it `exists`; whose it is, and who can see it.

    `version` is the commit that this is, where there are such.
    """

    owner: str
    visibility: str
    files: Mapping[str, RemoteFile]
    exists: bool = True
    version: str = ""


class Destination(Protocol):
    """A place that files are published to, all of them or none."""

    @property
    def shown(self) -> str:
        """Where it is, safe for a terminal."""

    @property
    def title(self) -> str:
        """What the model is called there."""

    @property
    def algorithms(self) -> Collection[str]:
        """Digests that are wanted of every file; `git_sha1` of small ones alone."""

    def look(self) -> There:
        """What is there now. Raises `AuthenticationFailed`, `NetworkFailed`, `SourceMissing` for what must be there."""

    def create(self, *, is_private: bool) -> There:
        """Make the place, where that is a thing of its own."""

    def check(self, missing: Sequence[Outgoing], there: There) -> None:
        """Refuse before anything is sent what cannot be sent: files that are not there, or there otherwise."""

    def proof(self, file: Outgoing, found: RemoteFile, control: Control) -> str:
        """In words, what proves that a file there is this one; empty if it is not."""

    def send(
        self,
        files: Sequence[Outgoing],
        deleted: Sequence[str],
        there: There,
        message: str,
        workers: int | None,
        control: Control,
    ) -> tuple[There, int]:
        """Let these files be there and those not; what is there then, and how many bytes were sent for it.

        The last file is there when all are. Raises `Differs` if what was `there` has changed.
        """
