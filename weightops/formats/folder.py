"""Opening a checkpoint: a file, or a folder with or without an index, in any container; headers only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, UsageError
from weightops.formats.adapter.files import find_adapter, trained_beside
from weightops.formats.choose import PART, chosen, find_index, is_weights, weights_without_index
from weightops.formats.compressed import SUFFIX as COMPRESSED
from weightops.formats.compressed import read_compressed
from weightops.formats.index import ShardIndex, parse_index
from weightops.formats.places import Matching, find_place, store_beside
from weightops.formats.proofs import manifest
from weightops.formats.proofs.manifest import Manifest
from weightops.formats.safetensors import read_safetensors
from weightops.formats.sidecars import find_sidecars
from weightops.formats.torch import read_torch
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.stores.reader import FileReader
from weightops.stores.store import Store
from weightops.stores.stores import Stores

if TYPE_CHECKING:
    from weightops.stores.web.web import Web

_READERS = 8
"""Headers that are read at once: on a server nearly all of the time is waiting for it."""


def open_checkpoint(
    path: str | os.PathLike[str], stores: Stores | Web | None = None, weights: str | None = None
) -> Checkpoint:
    """Read the headers of a weight file, or of the weight files of a folder, here or on a server.

    `hf://org/name[@revision]` and http(s) URLs are read through `stores`; where there are none, or a `Web` alone, as
    defaults have it.
    `weights` is a glob for the weight files to go by, in a folder that holds the same model twice; a path may end with
    one as well, `DIR/model-4bit-*.pt`, and then names files of any numbering. Meta's files that hold parts of each
    tensor give every part a name of its own, `consolidated.01/norm.weight`.
    Raises `SourceMissing` when there are none, `CorruptInput` when headers, index and files disagree.
    """
    with (stores if isinstance(stores, Stores) else Stores(stores)).connected() as stores:
        return read_place(find_place(path, stores), stores, weights)


def read_place(place: Store | SourceFile, stores: Stores, weights: str | None = None) -> Checkpoint:
    """The checkpoint in a folder or weight file; raises as `open_checkpoint` does."""
    if not isinstance(place, SourceFile):
        return _read_folder(place, stores, weights)
    beside = store_beside(place)
    (read,) = _read_weights([place], stores)
    names, parts = [place.name], [read]
    if place.name.endswith(".gguf"):
        from weightops.formats.gguf.split import part_names  # imported here because few files are GGUF

        names = part_names(place.name, read.metadata)
        others = [_part(place, name, beside) for name in names if name != place.name]
        parts = _read_weights(others, stores)
        parts.insert(names.index(place.name), read)
    metadata, said = _joined(names, parts)
    tensors, shards = _one_of_each(names, parts, place.shown)
    return Checkpoint(
        place.name,
        tensors,
        shards=shards,
        warnings=(*(sentence for part in parts for sentence in part.warnings), *said),
        metadata=metadata,
        folder=beside,
    )


def _part(place: SourceFile, name: str, folder: Store | None) -> SourceFile:
    """Another part of the model in the file `place`; raises `CorruptInput` where it is missing."""
    if folder is None:
        raise UsageError(
            f"{place.shown}: is one part of a model, the next is {escape(name)}",
            hint="name the folder or the repository that all parts are in, or download them",
        )
    if not folder.has(name):
        raise CorruptInput(
            f"{place.shown}: is one part of a model, and {escape(name)} is missing beside it",
            hint="download the missing parts",
        )
    return folder.identity(name)


def _one_of_each(
    names: Sequence[str], parts: Sequence[_Weights], shown: str
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of several files, and which file each is in; raises `CorruptInput` for one that is in two."""
    tensors, shards = dict[str, LazyTensor](), dict[str, str]()
    for name, part in zip(names, parts, strict=True):
        twice = next((tensor for tensor in part.tensors if tensor in tensors), None)
        if twice is not None:
            raise CorruptInput(f"{shown}: {escape(twice)} is in both {escape(shards[twice])} and {escape(name)}")
        tensors |= part.tensors
        shards |= dict.fromkeys(part.tensors, name)
    return tensors, shards


def open_adapter(path: str | os.PathLike[str], stores: Stores | None = None, weights: str | None = None) -> Checkpoint:
    """Read the headers of a LoRA adapter and of the trained weights beside it; `path` is its folder or its file.

    Which file it is, is peft's rule (`weightops.formats.adapter.files`); where that finds none, and where `weights`
    chooses, the folder is opened as `open_checkpoint` does. Raises as that does.
    """
    with (stores or Stores()).connected() as stores:
        return _open_adapter(find_place(path, stores), stores, weights)


def open_files(path: str | os.PathLike[str], stores: Stores | None = None, weights: str | None = None) -> Checkpoint:
    """As `open_checkpoint`, and of a folder without weights the files that lie there; for who asks for no more."""
    with (stores or Stores()).connected() as stores:
        place = find_place(path, stores)
        if isinstance(place, SourceFile) or any(map(is_weights, place.names())):
            return read_place(place, stores, weights)
        sidecars, notes, left = find_sidecars(place, place.names(), (), ())
        return Checkpoint(place.name, {}, sidecars, warnings=(*place.notes, *notes), left=left, folder=place)


def _open_adapter(place: Store | SourceFile, stores: Stores, weights: str | None) -> Checkpoint:
    if not isinstance(place, SourceFile):
        return _read_folder(place, stores, weights, find_adapter(place.names()) if weights is None else None)
    folder = store_beside(place)
    if folder is None or place.name.endswith(".gguf"):  # which says all by itself
        return read_place(place, stores)
    is_named = is_weights(place.name)
    return _read_folder(folder, stores, None, place.name if is_named else find_adapter(folder.names()))


def _read_folder(folder: Store, stores: Stores, weights: str | None, adapter: str | None = None) -> Checkpoint:
    """The checkpoint in a folder: its model, or `adapter` and what was trained with it."""
    names = folder.names()
    if weights is not None:
        names = chosen(names, weights)
    index_name = find_index(names, folder.shown) if adapter is None else None
    index = parse_index(folder.get(index_name), f"{folder.shown}/{escape(index_name)}") if index_name else None
    is_named = isinstance(folder, Matching)
    if adapter is not None:
        files = [adapter, *(n for n in trained_beside(filter(is_weights, names)) if n != adapter)]
    else:
        files = index.files if index else weights_without_index(names, folder.shown, is_named)
    present = set(names)
    missing = [name for name in files if name not in present and not folder.has(name)]
    if missing:
        raise CorruptInput(
            f"{folder.shown}: incomplete: {escape(index_name or '')} lists {len(missing)} files that are missing, "
            f"{escape(missing[0])} first",
            hint="download the missing files",
        )
    warnings: list[str] = []
    read = _read_weights([folder.identity(name) for name in files], stores)
    for i, (name, part) in enumerate(zip(files, read, strict=True)):
        warnings += part.warnings
        if adapter not in (None, name) and any("lora_" in tensor for tensor in part.tensors):
            warnings.append(f"{escape(name)} is an adapter of its own beside {escape(str(adapter))}: not used")
            read[i] = part._replace(tensors={})
        elif len(files) > 1 and PART.fullmatch(name):
            apart = {f"{Path(name).stem}/{tensor}": lazy for tensor, lazy in part.tensors.items()}
            read[i] = part._replace(tensors=apart)
    metadata, said = _joined(files, read)
    tensors, shards = _one_of_each(files, read, folder.shown)
    if index and index_name:
        _check_index(index, shards, f"{folder.shown}/{escape(index_name)}")
        warnings += _index_warnings(index, index_name, tensors)
    warnings += said
    stray = [n for n in names if n not in files and is_weights(n) and Path(n).suffix == Path(files[0]).suffix]
    warnings += [f"{escape(n)} holds weights but is not part of this checkpoint" for n in stray]
    sidecars, notes, left = find_sidecars(folder, names, files, stray)
    told = _manifest(folder, names)
    origin = downloaded_from(told) if told else None
    if told is not None and {n: t.spec for n, t in told.tensors.items()} != {n: t.spec for n, t in tensors.items()}:
        told = None
    return Checkpoint(
        folder.name,
        tensors,
        sidecars,
        shards,
        index.total_size if index else None,
        (*folder.notes, *warnings, *notes),
        metadata=metadata,
        left=left,
        folder=folder,
        origin=origin,
        content_id=told.content_id if told else None,
        digests={n: t.xxh3_128 for n, t in told.tensors.items()} if told else {},
    )


def _joined(names: Sequence[str], parts: Sequence[_Weights]) -> tuple[dict[str, Any], list[str]]:
    """The metadata of all files, which every file of an output gets; and what they do not agree on.

    `format` says to loaders which library's tensors these are; transformers reads no file without it. GGUF files have
    metadata of their own, with types.
    """
    found = [part.metadata for part in parts]
    if names[0].endswith(".gguf"):
        from weightops.formats.gguf.split import joined_metadata

        return joined_metadata(names, [(part.metadata, len(part.tensors)) for part in parts]), []
    joined: dict[str, str] = {}
    differ = set()
    for metadata in found:
        differ |= {key for key, value in metadata.items() if joined.setdefault(key, value) != value}
    said = (
        [f"the files' __metadata__ disagrees on {', '.join(map(escape, sorted(differ)))}: left out"] if differ else []
    )
    return {"format": "pt"} | {key: value for key, value in joined.items() if key not in differ}, said


def downloaded_from(found: Manifest) -> str | None:
    """Where a download came from, `hf://org/name@commit` or a URL, if its manifest is that of one."""
    source, commit = found.recipe.get("source"), found.recipe.get("commit")
    if found.recipe.get("operation") != "download" or not isinstance(source, str):
        return None
    return f"{source}@{commit}" if isinstance(commit, str) and commit else source


def _manifest(folder: Store, names: Iterable[str]) -> Manifest | None:
    """What lies in the folder as its manifest, unless that is none: then `verify` has something to say, not we."""
    if manifest.NAME not in names:
        return None
    try:
        return manifest.parse_manifest(folder.get(manifest.NAME), folder.shown)
    except CorruptInput:
        return None


def refuse_parts(checkpoint: Checkpoint) -> None:
    """Raise `UsageError` for Meta's files that hold parts of each tensor, where whole tensors are wanted."""
    if len({name for name in checkpoint.shards.values() if PART.fullmatch(name)}) > 1:
        raise UsageError(
            f"{escape(checkpoint.name)}: each file holds a part of every tensor",
            hint="weightops convert --to hf joins them, and so does --to meta --model-parallel 1",
        )


class _Weights(NamedTuple):
    """The tensors of a file, what there is to say about it, and a safetensors file's `__metadata__` or that of GGUF."""

    tensors: dict[str, LazyTensor]
    warnings: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = {}


def _read_weights(files: Sequence[SourceFile], stores: Stores) -> list[_Weights]:
    """The headers of weight files, several at a time."""

    def read(file: SourceFile) -> _Weights:
        with FileReader(stores) as reader:
            return _read_file(file, reader)

    if len(files) == 1:
        return [read(files[0])]
    with ThreadPoolExecutor(_READERS, "header") as pool:
        return list(pool.map(read, files))


def _read_file(file: SourceFile, files: FileReader) -> _Weights:
    if file.name.endswith(".safetensors"):
        found = read_safetensors(file, files)
        return _Weights(found.tensors, metadata=found.metadata)
    if file.name.endswith(COMPRESSED):
        found = read_compressed(file, files)
        return _Weights(found.tensors, metadata=found.metadata)
    if file.name.endswith(".gguf"):
        from weightops.formats.gguf import read_gguf  # imported here because few folders hold one

        gguf = read_gguf(file, files)
        return _Weights(gguf.tensors, metadata=gguf.metadata)
    read = read_torch(file, files)
    written_as = PART.fullmatch(f"{read.root}.pth")
    if written_as and PART.fullmatch(file.name) and file.name != written_as[0]:
        raise CorruptInput(
            f"{file.shown}: was written as {escape(written_as[0])}, so the parts of this model were renamed",
            hint="give each part its own name again",
        )
    skipped = f"{escape(file.name)}: no weights, left out: {', '.join(map(escape, read.extras[:10]))}"
    return _Weights(read.tensors, (skipped,) if read.extras else ())


def _check_index(index: ShardIndex, shards: Mapping[str, str], shown: str) -> None:
    """Index and headers must agree exactly; a loader that trusts either would lose tensors in silence."""
    for tensor, name in index.weight_map.items():
        actual = shards.get(tensor)
        if actual != name:
            where = f"it is in {escape(actual)}" if actual else "no shard holds it"
            raise CorruptInput(f"{shown}: says {escape(tensor)} is in {escape(name)}, but {where}")
    for tensor, name in shards.items():
        if tensor not in index.weight_map:
            raise CorruptInput(f"{shown}: does not list {escape(tensor)}, which is in {escape(name)}")


def _index_warnings(index: ShardIndex, name: str, tensors: Mapping[str, LazyTensor]) -> list[str]:
    total = sum(t.nbytes for t in tensors.values())
    unshared = sum(t.nbytes for t in set(tensors.values()))
    if index.total_size in (None, total, unshared):
        return []
    return [f"{escape(name)}: total_size is {index.total_size}, the tensors have {total} bytes"]
