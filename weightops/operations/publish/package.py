"""What is published of a folder: the files of its manifest, the card, a signature, and last the manifest itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightops.engine.control import Control
from weightops.errors import CorruptInput, Differs, SourceMissing, UsageError, WeightopsError
from weightops.formats.proofs import bundle
from weightops.formats.proofs.manifest import NAME, Manifest, parse_manifest
from weightops.io.digests import GIT_SHA1, cheapest, hash_bytes, hash_files
from weightops.io.escape import escape
from weightops.io.paths import files_below, inside
from weightops.stores.local import read_source
from weightops.stores.outgoing import Outgoing

CARD = "README.md"
_MAX_GIT_NBYTES = 64 << 20
"""What hubs keep in git itself is smaller."""
_FORBIDDEN = (".git", ".cache")
"""Folders that hubs let nobody write into."""


@dataclass(frozen=True, slots=True)
class Package:
    """What of a folder is published: files by `names`, in order, the manifest last; `others` stay here.

    `digests` are those of the files that were read to find this out, by SHA-256: they must not change meanwhile.
    """

    folder: Path
    manifest: Manifest
    names: tuple[str, ...]
    others: tuple[str, ...]
    digests: Mapping[str, str]
    signature: bytes | None

    @property
    def has_card(self) -> bool:
        """Whether the folder has a card of its own."""
        return CARD in self.names


def find_package(folder: Path) -> Package:
    """What there is to publish, by names alone.

    Raises `SourceMissing`, `UsageError` for a single file, and `CorruptInput` for a manifest that is malformed.
    """
    shown = escape(str(folder))
    if os.path.isfile(folder):
        raise UsageError(f"{shown} is a file, and a folder is published", hint="name the folder that it lies in")
    if not os.path.isdir(folder):
        raise SourceMissing(f"{shown}: no such folder")
    if not os.path.lexists(folder / NAME):
        raise SourceMissing(
            f"{shown}: holds no {NAME}, which says what is to be published",
            hint=f"look at the folder, and then: weightops manifest {shown}",
        )
    data = read_source(inside(folder, NAME, shown))[1]
    manifest = parse_manifest(data, f"{shown}/{NAME}")
    for name in manifest.files:
        if {*name.split("/")} & {*_FORBIDDEN} or name in (NAME, bundle.NAME):
            raise UsageError(f"{shown}/{NAME} lists {escape(name)}, which cannot be published", hint="move it away")
    is_signed = os.path.lexists(folder / bundle.NAME)
    signature = read_source(inside(folder, bundle.NAME, shown))[1] if is_signed else None
    card = [CARD] if CARD not in manifest.files and os.path.lexists(folder / CARD) else []
    names = (*manifest.files, *card, *([bundle.NAME] if is_signed else []), NAME)
    known = {NAME: data, **({} if signature is None else {bundle.NAME: signature})}
    return Package(
        folder,
        manifest,
        names,
        tuple(sorted({*files_below(folder, _unreadable)} - {*names})),
        {name: hashlib.sha256(data).hexdigest() for name, data in known.items()},
        signature,
    )


def _unreadable(name: str, error: OSError) -> None:
    raise WeightopsError(f"{escape(name)}: cannot be searched ({error.strerror})")


def prove(package: Package, algorithms: Collection[str], workers: int | None, control: Control) -> list[Outgoing]:
    """Every file of a package, read once and held against the manifest, in order.

    Raises `Differs`, naming the first of the files that are not as the manifest lists them, or that the signature does
    not sign as they are.
    """
    folder, listed = package.folder, package.manifest.files
    shown = escape(str(folder))
    names = package.names
    found_at: dict[str, tuple[int, int]] = {}
    wrong: dict[str, str] = {}
    paths = {name: inside(folder, name, shown) for name in names}
    for name in names:
        try:
            status = paths[name].stat()
        except (FileNotFoundError, NotADirectoryError):
            wrong[name] = "is missing"
            continue
        found_at[name] = status.st_size, status.st_mtime_ns
        if name in listed and listed[name].nbytes != status.st_size:
            wrong[name] = f"has {status.st_size} bytes, expected {listed[name].nbytes}"
    _refuse(wrong, shown)
    expected = {name: cheapest(listed[name].digests, algorithms) if name in listed else {} for name in names}
    expected |= {name: {"sha256": digest} for name, digest in package.digests.items()}
    unknown = next((name for name in names if name in listed and not expected[name]), None)
    if unknown is not None:
        raise CorruptInput(
            f"{shown}/{NAME}: has no digest of {escape(unknown)} that is known here",
            hint=f"look at the folder, and then: weightops manifest {shown} --overwrite",
        )
    control.progress.start("verifying", sum(nbytes for nbytes, _ in found_at.values()))
    hashed = hash_files(
        [
            (paths[name], {*expected[name], *(a for a in algorithms if a != GIT_SHA1 or nbytes <= _MAX_GIT_NBYTES)})
            for name, (nbytes, _) in found_at.items()
        ],
        workers=workers,
        on_bytes=control.progress.advance,
        cancelled=control.check,
    )
    control.progress.stop()
    files = []
    for name, found in zip(names, hashed, strict=True):
        if isinstance(found, WeightopsError):
            raise found
        if not expected[name].items() <= found.digests.items():
            ((algorithm, digest),) = expected[name].items()
            wrong[name] = f"has the {algorithm} {found.digests[algorithm]}, expected {digest}"
        nbytes, mtime_ns = found_at[name]
        files.append(Outgoing(name, nbytes, found.digests, paths[name], mtime_ns))
    _refuse(wrong, shown)
    if package.signature is not None:
        _check_signed(package.signature, {f.name: f.sha256 for f in files}, f"{shown}/{bundle.NAME}")
    return files


def made(name: str, data: bytes, algorithms: Collection[str]) -> Outgoing:
    """A file that is not in the folder."""
    git = {GIT_SHA1: hash_bytes(b"blob %d\0" % len(data) + data, ("sha1",))["sha1"]}
    digests = hash_bytes(data, [each for each in algorithms if each != GIT_SHA1]) | git
    return Outgoing(name, len(data), digests, data=data)


def _refuse(wrong: Mapping[str, str], shown: str) -> None:
    if wrong:
        name, why = next(iter(wrong.items()))
        more = f", and {len(wrong) - 1} more are not as it lists them" if len(wrong) > 1 else ""
        raise Differs(
            f"{shown} is not what its {NAME} lists: {escape(name)} {why}{more}",
            hint="weightops verify names them all; nothing was sent",
        )


def _check_signed(signature: bytes, sent: Mapping[str, str], shown: str) -> None:
    """Refuse a signature that would not be one of what is sent."""
    found = bundle.read_bundle(signature, shown)
    hint = "sign it again, as it is now: weightops sign --overwrite; or take the signature away"
    if found.method["method"] != "files" or found.method["hash_type"] != "sha256":
        raise CorruptInput(f"{shown}: is not a list of the SHA-256 of whole files, which is what is sent", hint=hint)
    signed = {name: file.parts[0].digest for name, file in found.files.items()}
    for name, digest in sent.items():
        if name != bundle.NAME and signed.get(name) != digest:
            how = "as it is" if name in signed else "at all"
            raise Differs(f"{shown}: does not sign {escape(name)} {how}", hint=hint)
    other = next((name for name in signed if name not in sent), None)
    if other is not None:
        raise Differs(f"{shown}: signs {escape(other)}, which is not published, for {NAME} does not list it", hint=hint)
