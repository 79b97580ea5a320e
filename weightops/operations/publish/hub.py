"""Publishing to a repository of a hub: contents first, then one commit that names its parent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from weightops.engine.control import Control
from weightops.engine.digest import in_threads
from weightops.errors import SourceMissing, UsageError
from weightops.io.digests import GIT_SHA1
from weightops.io.escape import escape
from weightops.operations.publish.destination import There
from weightops.stores.outgoing import Outgoing
from weightops.stores.web.commits import commit, create_repository, modes, moved, who
from weightops.stores.web.hub import find_commit, find_repository, list_commit
from weightops.stores.web.lfs import send_content
from weightops.stores.web.listing import HubRepository, RemoteFile, is_commit
from weightops.stores.web.web import Web

_WORKERS = 4
_MAIN = "main"


class Hub:
    """A branch of a repository. Raises `UsageError` for a folder in one, and for a commit."""

    algorithms = ("sha256", GIT_SHA1)

    def __init__(self, repository: HubRepository, web: Web) -> None:
        if repository.folder:
            raise UsageError(f"{repository}: a whole repository is published to", hint="leave out the folder")
        if is_commit(repository.revision):
            raise UsageError(
                f"{repository}: a commit never changes, and is not published to", hint="name a branch, or none"
            )
        self._repository, self._web = repository, web
        self.title = repository.name
        branch = "" if repository.revision == _MAIN else f"@{escape(repository.revision)}"
        self.shown = f"{repository}{branch}"

    def look(self) -> There:
        owner = self._owner()
        try:
            found = find_repository(self._repository, self._web)
        except SourceMissing:
            return There(owner, "", {}, exists=False)
        if found.name != self._repository.name:
            raise UsageError(f"{self.shown}: is called hf://{escape(found.name)} now", hint="publish to that name")
        try:
            head = find_commit(self._repository, self._web)
        except SourceMissing as error:
            raise SourceMissing(
                f"{self._repository}: has no branch {escape(self._repository.revision)} ({error})",
                hint="make the branch first, on the repository's page",
            ) from None
        return self._at(head, owner, "private" if found.private else "public")

    def _owner(self) -> str:
        """Whose the repository is or will be, seen from the token's owner."""
        name, organizations = who(self._web)
        owner = self._repository.name.partition("/")[0]
        if owner == name:
            return f"{owner} (you)"
        return f"{owner} ({name} is {'a' if owner in organizations else 'no'} member)"

    def _at(self, head: str, owner: str, visibility: str) -> There:
        listing = list_commit(self._repository, head, self._web)
        return There(owner, visibility, {file.name: file for file in listing.files}, version=head)

    def create(self, *, is_private: bool) -> There:
        create_repository(self._repository, is_private=is_private, web=self._web)
        return self.look()

    def check(self, missing: Sequence[Outgoing], there: There) -> None:
        if self._repository.revision != _MAIN and not there.exists:
            raise UsageError(f"{self.shown}: a new repository has the branch {_MAIN} alone", hint="publish there first")

    def proof(self, file: Outgoing, found: RemoteFile, control: Control) -> str:
        ((algorithm, digest),) = found.digests.items()
        if found.nbytes != file.nbytes or file.digests.get(algorithm) != digest:
            return ""
        return f"the hub lists its {'SHA-256' if algorithm == 'sha256' else 'SHA-1 of git'}, {digest}"

    def send(
        self,
        files: Sequence[Outgoing],
        deleted: Sequence[str],
        there: There,
        message: str,
        workers: int | None,
        control: Control,
    ) -> tuple[There, int]:
        how = modes(files, self._repository, self._web)
        large = sorted((file for file in files if how[file.name] == "lfs"), key=lambda file: file.sha256)
        control.progress.start("sending", sum(file.nbytes for file in files))
        sent: list[int] = []

        def content(file: Outgoing) -> Callable[[Control], None]:
            def job(own: Control) -> None:
                own.check()
                was_sent = send_content(file, self._repository, self._web, control.progress.advance)
                if not was_sent:
                    control.progress.advance(file.nbytes)
                sent.append(file.nbytes if was_sent else 0)

            return job

        # Files that are equal are one content, which is sent once.
        contents = [next(same) for _, same in groupby(large, key=lambda file: file.sha256)]
        in_threads(workers or _WORKERS, control, map(content, contents))
        control.check()
        parent, branch = there.version, self._repository
        made = commit([(file, how[file.name]) for file in files], deleted, branch, parent, message, self._web)
        head = made or find_commit(branch, self._web)
        after = self._at(head, there.owner, there.visibility)
        if made is None and not all(
            file.name in after.files and self.proof(file, after.files[file.name], control) for file in files
        ):
            raise moved(branch, parent)
        control.progress.stop()
        return after, sum(sent) + sum(file.nbytes for file in files if how[file.name] == "regular")
