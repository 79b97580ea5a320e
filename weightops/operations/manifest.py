"""Manifest: digest a folder as it is, so that it can be verified later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from weightops.checkpoint import Checkpoint
from weightops.engine.control import Control
from weightops.errors import WeightopsError
from weightops.formats.proofs import manifest as format
from weightops.formats.proofs.checksums import ChecksumEntry, render_gnu
from weightops.formats.proofs.manifest import FileEntry, Manifest, TensorEntry, content_id
from weightops.io.digests import HEX_DIGITS, hash_files
from weightops.io.escape import escape
from weightops.io.paths import files_below, inside
from weightops.operations.verify import is_listing
from weightops.spec import TensorSpec
from weightops.version import library_versions


def make_manifest(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, tuple[TensorSpec, str]],
    digests: Sequence[str],
    workers: int | None,
    control: Control,
) -> Manifest:
    """The manifest of `folder`: all its files, hidden ones and lists apart, and the given digests of its tensors.

    What an earlier manifest says of how these tensors were made, it says too, and has digests by the same algorithms.
    """
    names = sorted(name for name in files_below(folder, _refuse) if not is_listing(name))
    earlier = earlier_manifest(folder)
    known = {name for entry in earlier.files.values() for name in entry.digests} if earlier else set()
    algorithms = tuple(dict.fromkeys(("xxh3_128", *sorted(known & HEX_DIGITS.keys()), *digests)))
    paths = [inside(folder, name, str(folder)) for name in names]
    control.progress.start("hashing", sum(map(_nbytes, paths)))
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
    made = Manifest(
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
    if earlier is None or not _is_same(earlier, made):
        return made
    return msgspec.structs.replace(
        made,
        recipe=earlier.recipe,
        sources=earlier.sources,
        provenance=earlier.provenance,
        losses=earlier.losses,
        notes=earlier.notes,
    )


def earlier_manifest(folder: Path) -> Manifest | None:
    """The manifest that the folder has; None also for one that cannot be read, of which there is nothing to keep."""
    try:
        return format.read_manifest(folder / format.NAME)
    except WeightopsError:
        return None


def _is_same(earlier: Manifest, made: Manifest) -> bool:
    """Whether an earlier manifest is of what is there: of the same tensors, or of the same files if it has none."""
    if earlier.content_id is not None:
        return earlier.content_id == made.content_id
    return all(
        name in made.files and entry.digests.items() & made.files[name].digests.items()
        for name, entry in earlier.files.items()
    )


def _nbytes(path: Path) -> int:
    """A file's size, for progress; what is not there, or cannot be read, is told of when its turn comes."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _refuse(name: str, error: OSError) -> NoReturn:
    raise WeightopsError(f"{escape(name) or 'the folder'}: cannot be searched ({error.strerror})")


def checksum_list(manifest: Manifest, algorithm: str) -> bytes:
    """The manifest's files as `md5sum -c`, `sha256sum -c` or `xxhsum -c` read them."""
    entries = (ChecksumEntry(name, algorithm, entry.digests[algorithm]) for name, entry in manifest.files.items())
    return render_gnu(entries)
