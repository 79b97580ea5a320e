"""Sign: read every file of a folder once, and have somebody's name put under the list of digests."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn

from weightops.engine.control import Control
from weightops.errors import CorruptInput, Differs, OutputExists, SourceMissing, UsageError, WeightopsError
from weightops.formats.proofs import manifest as own
from weightops.formats.proofs.bundle import GIT, NAME, SINGLE
from weightops.formats.proofs.signers import Credentials, Signer
from weightops.io.atomic import check_target, write_whole
from weightops.io.digests import cheapest, hash_files
from weightops.io.escape import escape
from weightops.io.paths import check_relative, entries_below, inside
from weightops.operations.sign.report import Signed

_DIGEST = "sha256"
"""The one that model-signing's command line verifies."""


def sign(
    folder: Path,
    credentials: Credentials,
    *,
    out: Path | None = None,
    allow_symlinks: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    control: Control | None = None,
) -> Signed:
    """Write a bundle of OpenSSF model signing that lists every file of `folder`, or one beside a single file.

    Left out are the bundle itself and, at the top, `.git`, `.gitattributes`, `.github` and `.gitignore`. Files that the
    folder's weightops-manifest.json lists are held against it as they are read: what is damaged is not signed.
    Links are refused, or with `allow_symlinks` those to files that lie in the folder are signed as these.
    Raises `UsageError`, `SourceMissing`, `OutputExists`, `Differs` for files that are not as the manifest says,
    `CorruptInput` for what cannot be signed, and as `Signer` does.
    """
    started = time.monotonic()
    control = control or Control()
    if not os.path.exists(folder):
        raise SourceMissing(f"{escape(str(folder))}: no such folder or file")
    is_file = os.path.isfile(folder)
    target = out or (folder.with_name(f"{folder.name}.sig") if is_file else folder / NAME)
    if os.path.lexists(target) and not overwrite:
        raise OutputExists(f"{escape(str(target))} exists", hint="give --overwrite, or check it: weightops verify")
    check_target(target)
    root = folder.parent if is_file else folder
    itself = _within(target, root)
    names = [folder.name] if is_file else _names(folder, itself, allow_symlinks)
    if credentials.key is not None and _within(credentials.key, root) in names:
        raise UsageError(
            f"{escape(str(credentials.key))}: the private key lies among the files to sign, which others get",
            hint="move it elsewhere",
        )
    listed = _listed(folder, is_file, names, itself)
    signer = Signer(credentials)
    paths = [inside(root, name, str(root)) for name in names]
    nbytes = sum(path.stat().st_size for path in paths)
    warnings = () if listed is not None else (f"there is no {own.NAME}: how the model was made is not signed with it",)
    if dry_run:
        return Signed(str(folder), str(target), signer.who, tuple(names), nbytes, dry_run=True, warnings=warnings)
    expected = listed or {}
    control.progress.start("signing", nbytes)
    hashed = hash_files(
        [(path, {_DIGEST, *expected.get(name, {})}) for name, path in zip(names, paths, strict=True)],
        workers=workers,
        on_bytes=control.progress.advance,
        cancelled=control.check,
    )
    control.progress.stop()
    digests = {}
    for name, found in zip(names, hashed, strict=True):
        if isinstance(found, WeightopsError):
            raise found
        if not expected.get(name, {}).items() <= found.digests.items():
            raise Differs(
                f"{escape(name)} is not what the manifest of {escape(str(folder))} lists, and is not signed",
                hint="weightops verify says what differs",
            )
        digests[SINGLE if is_file else name] = found.digests[_DIGEST]
    ignored = [] if is_file else sorted({*GIT, *([itself] if itself else [])})
    title = Path(os.path.realpath(folder)).name
    write_whole(target, signer.sign(title, digests, ignored, allow_symlinks))
    read = sum(each.nbytes for each in hashed if not isinstance(each, WeightopsError))
    elapsed_s = time.monotonic() - started
    return Signed(str(folder), str(target), signer.who, tuple(names), read, elapsed_s, warnings=warnings)


def _within(target: Path, root: Path) -> str | None:
    """What a file is called below a folder; None if it lies elsewhere."""
    real = Path(os.path.realpath(target.parent)) / target.name
    base = Path(os.path.realpath(root))
    return real.relative_to(base).as_posix() if real.is_relative_to(base) else None


def _names(folder: Path, itself: str | None, allow_symlinks: bool) -> list[str]:
    """The files to sign, by name in order. Raises `CorruptInput` for what can be none of them."""
    shown = escape(str(folder))

    def unreadable(name: str, error: OSError) -> NoReturn:
        raise WeightopsError(f"{escape(name) or shown}: cannot be searched ({error.strerror})")

    names = []
    for name, kind in entries_below(folder, GIT, unreadable):
        if name == itself:
            continue
        if kind == "link" and not allow_symlinks:
            raise CorruptInput(
                f"{shown}: {escape(name)!r} is a link", hint="give --allow-symlinks to sign what it leads to"
            )
        if kind not in ("file", "link"):
            what = "a link to a folder" if kind == "linked folder" else "neither a file nor a folder"
            raise CorruptInput(f"{shown}: {escape(name)!r} is {what}, and cannot be signed", hint="take it away")
        names.append(check_relative(name, shown))
    if not names:
        raise SourceMissing(f"{shown}: holds no files to sign")
    return sorted(names)


def _listed(
    folder: Path, is_file: bool, names: Collection[str], itself: str | None
) -> Mapping[str, Mapping[str, str]] | None:
    """A digest of each file that the manifest lists; None if there is no manifest."""
    path = own.beside(folder) if is_file else folder / own.NAME
    if not os.path.lexists(path):
        return None
    found = own.read_manifest(path)
    shown = escape(str(path))
    if itself in found.files:
        raise Differs(f"{shown} lists the signature, which lists it in turn", hint="weightops manifest --overwrite")
    missing = next((name for name in found.files if name not in names), None)
    if missing is not None:
        raise Differs(f"{shown} lists {escape(missing)}, which is not there", hint="weightops verify")
    return {name: cheapest(entry.digests, (_DIGEST,)) for name, entry in found.files.items()}
