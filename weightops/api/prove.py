"""Commands that fetch, look and prove: what they give is a report, or files as they are published."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from weightops.api.outputs import local
from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.engine.digest import digest_tensors
from weightops.errors import Differs, NoWeights, SourceMissing, UsageError, WeightopsError
from weightops.formats.adapter.files import looks_like_adapter
from weightops.formats.folder import open_adapter, open_checkpoint, read_place
from weightops.formats.places import find_place, is_remote
from weightops.formats.proofs import checklist
from weightops.formats.proofs.manifest import Manifest
from weightops.formats.proofs.published import find_manifest
from weightops.io.digests import check_algorithm
from weightops.io.escape import escape
from weightops.recipes.planning import StrPath, several
from weightops.stores.local import read_source
from weightops.stores.places import as_out
from weightops.stores.s3.places import is_bucket

if TYPE_CHECKING:
    from weightops.formats.hub_places import Snapshot
    from weightops.operations.check import CheckOptions, CheckReport
    from weightops.operations.download import Download
    from weightops.operations.inspect import Inspection
    from weightops.operations.sign import Signed
    from weightops.operations.verify import VerifyReport
    from weightops.stores.web.web import Web


def download(
    source: str,
    out: StrPath | None = None,
    *,
    cache: StrPath | None = None,
    revision: str | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    sha256: str | None = None,
    md5: str | None = None,
    checksums: str | None = None,
    workers: int | None = None,
    prune: bool = False,
    overwrite: bool = False,
    offline: bool = False,
    dry_run: bool = False,
    control: Control | None = None,
) -> Download:
    """Fetch a repository, URL, list of URLs or published name into a folder, and prove every file right.

    With `cache` in the place of `out`, a repository of a hub goes into that Hugging Face cache, in which transformers
    and huggingface_hub find it; nothing there is replaced or removed. `out` may be a folder in a bucket.
    `sha256`, `md5` and `checksums` (a list at a path or URL) are for one URL. The same call continues what
    an earlier one began. Files that no download brought are kept if they are the ones wanted, and replaced only with
    `overwrite`. See `weightops.operations.download`; the control's `stores` know hub, token, proxies and limits.
    """
    from weightops.operations.download import download_into, download_into_bucket, download_into_cache

    control = control or Control()
    digests = {name: digest for name, digest in (("sha256", sha256), ("md5", md5)) if digest}
    if cache is not None:
        given = {"out": out, **digests, "checksums": checksums, "prune": prune, "overwrite": overwrite}
        for name in (name for name, value in {**given, "offline": offline}.items() if value):
            raise UsageError(f"{name} has no use with a cache, which is only added to", hint="leave it out")
        place = Path(cache)
        return download_into_cache(
            source, place, revision, several(include), several(exclude), workers, dry_run, control
        )
    if out is None:
        raise UsageError("there is no folder to write", hint="give out, or cache for a Hugging Face cache")
    there = as_out(out)
    if isinstance(there, str):
        given = {"prune": prune, "overwrite": overwrite, "offline": offline}
        for name in (name for name, value in given.items() if value):
            raise UsageError(f"{name} has no use with a bucket, in which nothing is replaced", hint="leave it out")
        chosen = several(include), several(exclude)
        return download_into_bucket(source, there, revision, *chosen, digests, checksums, workers, dry_run, control)
    return download_into(
        source,
        there,
        revision,
        several(include),
        several(exclude),
        digests,
        checksums,
        workers,
        prune,
        overwrite,
        offline,
        dry_run,
        control,
    )


def hold_checklist(folder: Path) -> None:
    """Hold a folder against its own checklist.chk; raises `Differs`."""
    report = verify(folder, folder / checklist.NAME)
    if not report.verdict:
        raise Differs(
            f"{escape(str(folder))} is not what its {checklist.NAME} lists", hint="`weightops verify` says more"
        )


def inspect(
    source: StrPath,
    *,
    include: str | Sequence[str] = (),
    stats: bool = False,
    base: StrPath | None = None,
    workers: int | None = None,
    web: Web | None = None,
    control: Control | None = None,
) -> Inspection:
    """What a checkpoint holds, from its headers alone; one on a server is read through `web`, or those of `control`.

    `include`: globs of the tensors to look at. With `stats` each of them is read once, for its digest and statistics,
    and of a LoRA adapter the singular values of what it adds. `base`: a model that an adapter is held against.
    See `weightops.operations.inspect`.
    """
    from weightops.operations.inspect import inspect as operation

    control = control or Control(web=web)
    with control.stores.connected() as stores:
        place = find_place(source, stores)
        checkpoint = read_place(place, stores)
        return operation(
            checkpoint,
            place,
            os.fspath(source),
            include=several(include),
            stats=stats,
            adapter=open_adapter(source, stores) if looks_like_adapter(checkpoint) else None,
            base=open_checkpoint(base, stores) if base is not None else None,
            base_path=None if base is None else os.fspath(base),
            workers=workers,
            control=control,
        )


def check(source: StrPath, *, control: Control | None = None, **options: Unpack[CheckOptions]) -> CheckReport:
    """Look for what is wrong with a checkpoint; see `weightops.operations.check` for it and the options."""
    from weightops.operations.check import check as operation

    control = control or Control()
    with control.stores.connected() as stores:
        if "ignore" in options:
            options["ignore"] = several(options["ignore"])
        return operation(open_checkpoint(source, stores), control=control, **options)


def verify(
    folder: StrPath,
    manifest: StrPath | None = None,
    *,
    quick: bool = False,
    content: bool = False,
    extra: str | None = None,
    algorithm: str | None = None,
    signature: StrPath | None = None,
    key: StrPath | None = None,
    certificate: StrPath | Sequence[StrPath] = (),
    identity: str | None = None,
    issuer: str | None = None,
    trust_config: StrPath | None = None,
    workers: int | None = None,
    control: Control | None = None,
) -> VerifyReport:
    """Hold a folder or file against its own manifest, another one, a checksum list, a published name or a signature.

    What is in a bucket is read there. `hf://org/name` is its copy in the cache of the control's `stores`, which is held
    against the hub's digests if no other manifest is given; offline against the names of its blobs, which are digests.
    A folder that differs is a report whose verdict is False, not an error.

    With `signature`, a bundle of OpenSSF model signing, the files have to be those that it lists, and it has to be
    signed by one of: a public `key`, a certificate that those in `certificate` vouch for, or an `identity` of Sigstore
    that `issuer` knows; all are files but the last two. `extra` is what to do about files that are not listed: warn,
    and with a signature fail, unless it says otherwise.
    """
    from weightops.operations.verify import verify as operation
    from weightops.operations.verify import verify_bucket

    control = control or Control()
    trusted = {"key": key, "certificate": certificate, "identity": identity, "issuer": issuer}
    trusted["trust_config"] = trust_config
    for name in (name for name, value in trusted.items() if value and signature is None):
        raise UsageError(f"{name} says whose signature counts, and there is none", hint="give the signature too")
    if is_bucket(os.fspath(folder)):
        if signature is not None:
            raise UsageError("what is in a bucket has no signature to be verified there", hint="download it first")
        return verify_bucket(
            os.fspath(folder),
            find_manifest(os.fspath(manifest)) if manifest is not None else None,
            quick=quick,
            content=content,
            extra="warn" if extra is None else extra,
            algorithm=algorithm,
            workers=workers,
            control=control,
        )
    snapshot = _snapshot(folder, control) if is_remote(folder) else None
    if signature is not None:
        from weightops.formats.proofs.signers import Trust
        from weightops.operations.verify import verify_signature

        others = {"manifest": manifest, "quick": quick, "content": content, "algorithm": algorithm}
        for name in (name for name, value in others.items() if value):
            raise UsageError(f"{name} has no use with a signature, which is a list of digests", hint="leave it out")
        return verify_signature(
            local(folder) if snapshot is None else snapshot.folder,
            Path(signature),
            Trust(_path(key), _paths(certificate), identity, issuer, _path(trust_config)),
            extra="fail" if extra is None else extra,
            name=None if snapshot is None else snapshot.name,
            workers=workers,
            control=control,
        )
    return operation(
        local(folder) if snapshot is None else snapshot.folder,
        find_manifest(os.fspath(manifest)) if manifest is not None else None,
        quick=quick,
        content=content,
        extra="warn" if extra is None else extra,
        algorithm=algorithm,
        workers=workers,
        control=control,
        tensors=lambda path: digest_tensors(open_checkpoint(path), workers, control),
        structure=_structure,
        snapshot=snapshot,
    )


def _path(place: StrPath | None) -> Path | None:
    return None if place is None else Path(place)


def _paths(places: StrPath | Sequence[StrPath]) -> tuple[Path, ...]:
    return tuple(map(Path, [places] if isinstance(places, str | os.PathLike) else places))


def sign(
    folder: StrPath,
    *,
    out: StrPath | None = None,
    key: StrPath | None = None,
    password_file: StrPath | None = None,
    certificate: StrPath | None = None,
    chain: StrPath | Sequence[StrPath] = (),
    sigstore: bool = False,
    identity_token: StrPath | None = None,
    trust_config: StrPath | None = None,
    allow_symlinks: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    control: Control | None = None,
) -> Signed:
    """Sign all files of a folder, or a single file, as a bundle of OpenSSF model signing: model.sig in the folder.

    With a private `key`, which the first line of `password_file` unlocks; with a `certificate` for it, and a `chain` of
    those that lead to one that others trust; or with `sigstore`, by the OpenID Connect token in `identity_token`, that
    of the machine, or a browser. All of these are files. See `weightops.operations.sign`.
    """
    from weightops.formats.proofs.signers import Credentials
    from weightops.operations.sign import sign as operation

    credentials = Credentials(
        _path(key),
        _first_line(password_file) if password_file is not None else None,
        _path(certificate),
        _paths(chain),
        sigstore,
        _first_line(identity_token).decode("ascii", "replace") if identity_token is not None else None,
        _path(trust_config),
    )
    return operation(
        local(folder),
        credentials,
        out=_path(out),
        allow_symlinks=allow_symlinks,
        overwrite=overwrite,
        dry_run=dry_run,
        workers=workers,
        control=control,
    )


def _first_line(path: StrPath) -> bytes:
    return read_source(Path(path))[1].partition(b"\n")[0].removesuffix(b"\r")


def _snapshot(folder: StrPath, control: Control) -> Snapshot:
    from weightops.formats.hub_places import find_snapshot
    from weightops.stores.web.listing import HubRepository, parse_location

    with control.stores.connected() as stores:
        text = os.fspath(folder)
        place = parse_location(text) if stores.offline else parse_location(text, endpoint=stores.web.endpoint)
        if not isinstance(place, HubRepository):
            raise UsageError(f"{place}: expected a folder on this machine or hf://org/name", hint="weightops download")
        return find_snapshot(place, stores)


def manifest(
    folder: StrPath, *, digest: str | Sequence[str] = (), workers: int | None = None, control: Control | None = None
) -> Manifest:
    """Digest every file and tensor of a folder; the caller decides where to keep the result."""
    from weightops.operations.manifest import make_manifest

    control, folder, digests = control or Control(), local(folder), several(digest)
    if not folder.is_dir():
        raise SourceMissing(f"{escape(str(folder))}: no such folder")
    for name in digests:
        check_algorithm(name)
    try:
        checkpoint = open_checkpoint(folder)
    except NoWeights:
        checkpoint = Checkpoint(folder.name, {})
    return make_manifest(folder, checkpoint, digest_tensors(checkpoint, workers, control), digests, workers, control)


def _structure(path: Path) -> Sequence[str]:
    try:
        open_checkpoint(path)
    except (NoWeights, UsageError):
        return ()  # nothing that is read here, such as other quantised types
    except WeightopsError as error:
        return (str(error),)
    return ()
