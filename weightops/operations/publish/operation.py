"""Publish: hold a folder against its manifest, and let exactly that be at another place, all of it or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from weightops.engine.control import Control
from weightops.errors import Differs, SourceMissing, UsageError
from weightops.formats.proofs.bundle import GIT
from weightops.formats.proofs.manifest import Manifest
from weightops.io.escape import escape
from weightops.operations.publish.bucket import Bucket
from weightops.operations.publish.destination import Destination, There
from weightops.operations.publish.hub import Hub
from weightops.operations.publish.package import CARD, Package, find_package, made, prove
from weightops.operations.publish.report import FileStatus, Publication, PublishedFile
from weightops.stores.outgoing import Outgoing
from weightops.stores.s3.places import is_bucket, parse_place
from weightops.stores.stores import Stores
from weightops.stores.web.listing import HUB_SCHEME, HubRepository, parse_location

_NEVER = (*GIT, ".weightops")
"""What is never deleted: what a repository goes by, and the work of a job."""
Broken = Callable[[Path], Sequence[str]]
"""Looks for what is wrong with a checkpoint in a folder: errors, in sentences."""

MakeCard = Callable[[Manifest, str, str], bytes]
"""The card for a manifest, by the model's title, and how its place is written down."""


def publish(
    folder: Path,
    place: str,
    *,
    create: bool = False,
    public: bool = False,
    delete: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    broken: Broken = lambda folder: (),
    make_card: MakeCard | None = None,
    workers: int | None = None,
    control: Control | None = None,
) -> Publication:
    """Let the files that the manifest of `folder` lists, its card and its signature be at `place`, and prove that.

    `place` is `hf://org/name`, with `@branch` if not main, or `s3://bucket/prefix`. Only what differs is sent; a run
    that was interrupted sends no file again that has arrived whole. On a hub it is there all at once, in one commit
    with this `message`, and a repository that is not there is made only to `create` it, private unless it is to be
    `public`. In a bucket nothing is replaced, and the manifest is there when all of it is. Files there that the folder
    lacks stay, unless `delete` says otherwise. `dry_run` finds out what would be sent, and sends nothing.
    Raises `Differs` for a folder that is not as its manifest says, that is `broken`, or whose signature is not of
    these files, and for a branch that has moved meanwhile; `OutputExists` for objects that would have to be replaced;
    `UsageError`, `SourceMissing`, `AuthenticationFailed`, `NetworkFailed`, `NoRoom`.
    """
    started = time.monotonic()
    control = control or Control()
    if public and not create:
        raise UsageError("who can see a place is decided when it is made", hint="add --create, or leave out --public")
    package = find_package(folder)
    with control.stores.connected() as stores:
        destination = find_destination(place, stores, has_history=create or message is not None)
        there = destination.look()
        if not there.exists and not create:
            raise SourceMissing(
                f"{destination.shown}: there is no such place, or you may not see it",
                hint="--create makes it, private; --create --public makes it for everybody",
            )
        files = prove(package, destination.algorithms, workers, control)
        _refuse_broken(folder, broken)
        card = _new_card(package, destination, there, make_card)
        files[-1:-1] = card
        proofs = _proofs(destination, files, there, control)
        missing = [file for file in files if file.name not in proofs]
        to_send = {file.name for file in missing}
        destination.check(missing, there)
        deleted, kept = _left(package, files, there, delete=delete)
        visibility = "public" if public else "private"
        found = Publication(
            folder=str(folder),
            destination=destination.shown,
            owner=there.owner,
            visibility=there.visibility or visibility,
            version=there.version,
            created=not there.exists,
            files=tuple(_result(file, proofs, to_send, "to send") for file in files),
            not_sent=package.others,
            deleted=deleted,
            kept=kept,
            sent_nbytes=sum(file.nbytes for file in missing),
            dry_run=dry_run,
            warnings=tuple(_warnings(package, there, kept, public=public, is_new=bool(card))),
        )
        if not dry_run:
            if not there.exists:
                there = destination.create(is_private=not public)
            for name in deleted:
                control.progress.note(f"{destination.shown}: {escape(name)} is deleted")
            sent_nbytes = 0
            if missing or deleted:
                text = message or f"Publish {destination.title} with weightops"
                there, sent_nbytes = destination.send(missing, deleted, there, text, workers, control)
                proofs = _proofs(destination, files, there, control)
                _hold(destination, files, proofs, deleted, there)
            found = replace(
                found,
                visibility=there.visibility,
                version=there.version,
                files=tuple(_result(file, proofs, to_send, "sent") for file in files),
                sent_nbytes=sent_nbytes,
            )
    return replace(found, elapsed_s=time.monotonic() - started)


def find_destination(place: str, stores: Stores, *, has_history: bool = False) -> Destination:
    """What is published to; `has_history` if that is to be a thing of its own, with commits.

    Raises `UsageError` for what is no such place.
    """
    if is_bucket(place):
        if has_history:
            raise UsageError(
                f"{parse_place(place)}: a folder in a bucket is not made, belongs to the bucket, and has no commits",
                hint="leave out --create, --public and --message",
            )
        return Bucket(parse_place(place), stores)
    if place.startswith(HUB_SCHEME):
        found = parse_location(place)
        if isinstance(found, HubRepository):
            return Hub(found, stores.web)
    raise UsageError(
        f"{escape(place)}: nothing can be published there",
        hint="name a repository, hf://org/name or hf://org/name@branch, or a folder in a bucket, s3://bucket/prefix",
    )


def _refuse_broken(folder: Path, broken: Broken) -> None:
    problems = broken(folder)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise Differs(
            f"{escape(str(folder))} is broken, and not published: {problems[0]}{more}", hint="weightops check says more"
        )


def _new_card(package: Package, destination: Destination, there: There, make_card: MakeCard | None) -> list[Outgoing]:
    """A card for a folder that has none, unless there is one at the destination, which may have been edited there.

    A signed folder would not be as it was signed with it.
    """
    if package.has_card or package.signature is not None or CARD in there.files or make_card is None:
        return []
    data = make_card(package.manifest, destination.title, destination.shown)
    return [made(CARD, data, destination.algorithms)]


def _left(
    package: Package, files: Collection[Outgoing], there: There, *, delete: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of what is there and the folder lacks: what is to go, and what stays, as a card does where there is no other."""
    names = {file.name for file in files}
    strange = [name for name in there.files if name not in names and name.partition("/")[0] not in _NEVER]
    stays = {CARD} if package.signature is None else set[str]()
    deleted = tuple(name for name in strange if delete and name not in stays)
    return deleted, tuple(name for name in strange if name not in deleted)


def _warnings(package: Package, there: There, kept: Sequence[str], *, public: bool, is_new: bool) -> Iterator[str]:
    if is_new:
        yield f"the folder has no {CARD}: one is published that is made from its manifest"
    elif not package.has_card and CARD not in there.files:
        yield f"the folder has no {CARD}, and is signed without one: none is published"
    if kept and package.signature is not None:
        yield f"what stays there is not signed, and will not verify: {escape(kept[0])}" + (
            f" and {len(kept) - 1} more" if len(kept) > 1 else ""
        )
    if there.exists and public and there.visibility != "public":
        yield f"the place is there already, and stays {there.visibility}"


def _proofs(destination: Destination, files: Sequence[Outgoing], there: There, control: Control) -> dict[str, str]:
    """Of the files that are there already as they are, what proves that."""
    found = {f.name: destination.proof(f, there.files[f.name], control) for f in files if f.name in there.files}
    return {name: proof for name, proof in found.items() if proof}


def _result(file: Outgoing, proofs: Mapping[str, str], missing: Collection[str], status: FileStatus) -> PublishedFile:
    return PublishedFile(file.name, file.nbytes, status if file.name in missing else "there", proofs.get(file.name, ""))


def _hold(
    destination: Destination,
    files: Sequence[Outgoing],
    proofs: Mapping[str, str],
    deleted: Sequence[str],
    after: There,
) -> None:
    """Refuse what is there now if it is not what was sent."""
    wrong = [file.name for file in files if file.name not in proofs]
    left = [name for name in deleted if name in after.files]
    if wrong or left:
        what = "is not as it was sent" if wrong else "is still there"
        raise Differs(
            f"{destination.shown}: {escape((wrong or left)[0])} {what}",
            hint="trust none of it, and run the command again",
        )
