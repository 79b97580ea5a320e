"""Manifest: digest a folder as it is, so that it can be verified later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.errors import WeightopsError
from weightops.formats import manifest as format
from weightops.formats.checksums import ChecksumEntry, render_gnu
from weightops.formats.manifest import FileEntry, Manifest, TensorEntry, content_id
from weightops.io.digests import hash_files
from weightops.io.escape import escape
from weightops.io.paths import files_below, inside
from weightops.operations.verify import is_listing
from weightops.spec import TensorSpec
from weightops.versions import library_versions


def make_manifest(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, tuple[TensorSpec, str]],
    digests: Sequence[str],
    workers: int | None,
    control: Control,
) -> Manifest:
    """The manifest of `folder`: all its files, hidden ones and lists apart, and the given digests of its tensors."""
    names = sorted(name for name in files_below(folder, _refuse) if not is_listing(name))
    algorithms = tuple(dict.fromkeys(("xxh3_128", *digests)))
    paths = [inside(folder, name, str(folder)) for name in names]
    control.progress.start("hashing", sum(path.stat().st_size for path in paths))
    hashed = hash_files(
        [(path, algorithms) for path in paths],
        workers=workers,
        on_bytes=control.progress.advance,
        cancelled=control.check,
    )
    control.progress.stop()
    files = {}
    for name, found in zip(names, hashed, strict=True):
        if isinstance(found, WeightopsError):
            raise found
        files[name] = FileEntry(nbytes=found.nbytes, digests=found.digests)
    return Manifest(
        schema=format.SCHEMA,
        content_id=content_id(tensors),
        files=files,
        tensors={
            n: TensorEntry(dtype=spec.dtype, shape=spec.shape, xxh3_128=digest, file=checkpoint.shards[n])
            for n, (spec, digest) in tensors.items()
        },
        recipe={"operation": "manifest"},
        provenance=library_versions(),
    )


def _refuse(name: str, error: OSError) -> NoReturn:
    raise WeightopsError(f"{escape(name) or 'the folder'}: cannot be searched ({error.strerror})")


def checksum_list(manifest: Manifest, algorithm: str) -> bytes:
    """The manifest's files as `md5sum -c`, `sha256sum -c` or `xxhsum -c` read them."""
    entries = (ChecksumEntry(name, algorithm, entry.digests[algorithm]) for name, entry in manifest.files.items())
    return render_gnu(entries)
