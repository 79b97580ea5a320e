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
from weightops.stores.s3.places import is_bucket

if TYPE_CHECKING:
    from weightops.formats.hub_places import Snapshot
    from weightops.operations.check import CheckOptions, CheckReport
    from weightops.operations.download import Download
    from weightops.operations.inspect import Inspection
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
    and huggingface_hub find it; nothing there is replaced or removed.
    `sha256`, `md5` and `checksums` (a list at a path or URL) are for one URL. The same call continues what
    an earlier one began. Files that no download brought are kept if they are the ones wanted, and replaced only with
    `overwrite`. See `weightops.operations.download`; the control's `stores` know hub, token, proxies and limits.
    """
    from weightops.operations.download import download_into, download_into_cache

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
    return download_into(
        source,
        Path(out),
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
    extra: str = "warn",
    algorithm: str | None = None,
    workers: int | None = None,
    control: Control | None = None,
) -> VerifyReport:
    """Hold a folder or file against its own manifest, another one, a checksum list or a published name.

    What is in a bucket is read there. `hf://org/name` is its copy in the cache of the control's `stores`, which is held
    against the hub's digests if no other manifest is given; offline against the names of its blobs, which are digests.
    A folder that differs is a report whose verdict is False, not an error.
    """
    from weightops.operations.verify import verify as operation
    from weightops.operations.verify import verify_bucket

    control = control or Control()
    if is_bucket(os.fspath(folder)):
        return verify_bucket(
            os.fspath(folder),
            find_manifest(os.fspath(manifest)) if manifest is not None else None,
            quick=quick,
            content=content,
            extra=extra,
            algorithm=algorithm,
            workers=workers,
            control=control,
        )
    snapshot = _snapshot(folder, control) if is_remote(folder) else None
    return operation(
        local(folder) if snapshot is None else snapshot.folder,
        find_manifest(os.fspath(manifest)) if manifest is not None else None,
        quick=quick,
        content=content,
        extra=extra,
        algorithm=algorithm,
        workers=workers,
        control=control,
        tensors=lambda path: digest_tensors(open_checkpoint(path), workers, control),
        structure=_structure,
        snapshot=snapshot,
    )


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
