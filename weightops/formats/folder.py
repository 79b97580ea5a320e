"""Opening a checkpoint: a file, or a folder with or without an index, in any container; headers only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput, NoWeights, SourceMissing, UsageError
from weightops.formats import manifest
from weightops.formats.adapter_files import find_adapter, model_files, trained_beside
from weightops.formats.index import ShardIndex, parse_index
from weightops.formats.manifest import Manifest
from weightops.formats.safetensors import read_safetensors
from weightops.formats.sidecars import find_sidecars
from weightops.formats.torch_legacy import read_torch
from weightops.io.escape import escape
from weightops.io.folder import Folder, LocalFolder
from weightops.io.source import FileReader, SourceFile
from weightops.lazy import LazyTensor

if TYPE_CHECKING:
    from weightops.remote.web import Web

_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES, ".gguf")
_NOT_WEIGHTS = re.compile(
    r"((training_args|optimizer|scheduler|scaler|sampler|trainer_state)(_\d+)?|rng_state.*|random_states.*"
    r"|.*_optim_states)\.\w+"
)
_PART = re.compile(r"consolidated\.(\d\d)\.pth")
_GLOB = re.compile(r"[*?[]")
_NUMBERED = re.compile(r"(?P<stem>.+?)-(?P<number>\d+)(-of-(?P<count>\d+))?\.\w+")
_REMOTE_READERS = 8
"""Headers that are fetched at once: nearly all of the time is waiting for a server."""


def open_checkpoint(path: str | os.PathLike[str], web: Web | None = None, weights: str | None = None) -> Checkpoint:
    """Read the headers of a weight file, or of the weight files of a folder, here or on a server.

    `hf://org/name[@revision]` and http(s) URLs are read through `web`; one with defaults is opened if it is None.
    `weights` is a glob for the weight files to go by, in a folder that holds the same model twice; a path may end with
    one as well, `DIR/model-4bit-*.pt`, and then names files of any numbering. Meta's files that hold parts of each
    tensor give every part a name of its own, `consolidated.01/norm.weight`.
    Raises `SourceMissing` when there are none, `CorruptInput` when headers, index and files disagree.
    """
    if web is None and is_remote(path):
        from weightops.remote.web import Web

        with Web() as web:
            return open_checkpoint(path, web, weights)
    return read_place(find_place(path, web), web, weights)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is really a repository on a hub or a URL."""
    if "://" not in os.fspath(path):
        return False
    from weightops.remote.listing import is_location

    return is_location(os.fspath(path))


def find_place(path: str | os.PathLike[str], web: Web | None) -> Folder | SourceFile:
    """The folder or weight file that is meant; raises `SourceMissing`."""
    if web is not None and is_remote(path):
        from weightops.formats.remote_place import find_remote

        return find_remote(os.fspath(path), web)
    path = Path(path)
    if path.is_dir():
        return LocalFolder(path)
    if path.exists():
        return SourceFile.at(path)
    if _GLOB.search(path.name) and path.parent.is_dir():
        return _Matching(path.parent, path.name)
    raise SourceMissing(f"{escape(str(path))}: no such file or folder")


class _Matching(LocalFolder):
    """A folder of which only the weight files that match a pattern are looked at."""

    def __init__(self, root: Path, pattern: str) -> None:
        super().__init__(root)
        self._pattern = pattern
        if not any(map(_is_weights, self.names())):
            raise SourceMissing(f"{self.shown}: no weight file matches {escape(pattern)}")

    def names(self) -> list[str]:
        """What lies in it, sorted, without weights that do not match, and without indexes, which list others."""
        return _chosen(super().names(), self._pattern)


def read_place(place: Folder | SourceFile, web: Web | None, weights: str | None = None) -> Checkpoint:
    """The checkpoint in a folder or weight file; raises as `open_checkpoint` does."""
    if not isinstance(place, SourceFile):
        return _read_folder(place, web, weights)
    (read,) = _read_weights([place], web)
    beside = None if place.is_remote else LocalFolder(Path(place.path).parent)
    metadata, said = _joined([read.metadata])
    return Checkpoint(
        place.name,
        read.tensors,
        shards=dict.fromkeys(read.tensors, place.name),
        warnings=(*read.warnings, *said),
        metadata=metadata,
        folder=beside,
    )


def open_adapter(path: str | os.PathLike[str], web: Web | None = None, weights: str | None = None) -> Checkpoint:
    """Read the headers of a LoRA adapter and of the trained weights beside it; `path` is its folder or its file.

    Which file it is, is peft's rule (`weightops.formats.adapter_files`); where that finds none, and where `weights`
    chooses, the folder is opened as `open_checkpoint` does. Raises as that does.
    """
    if web is None and is_remote(path):
        from weightops.remote.web import Web

        with Web() as web:
            return open_adapter(path, web, weights)
    place = find_place(path, web)
    if not isinstance(place, SourceFile):
        return _read_folder(place, web, weights, find_adapter(place.names()) if weights is None else None)
    if place.is_remote:
        return read_place(place, web)
    folder = LocalFolder(Path(place.path).parent)
    is_named = _is_weights(place.name)
    return _read_folder(folder, web, None, place.name if is_named else find_adapter(folder.names()))


def _read_folder(folder: Folder, web: Web | None, weights: str | None, adapter: str | None = None) -> Checkpoint:
    """The checkpoint in a folder: its model, or `adapter` and what was trained with it."""
    names = folder.names()
    if weights is not None:
        names = _chosen(names, weights)
    index_name = find_index(names, folder.shown) if adapter is None else None
    index = parse_index(folder.read(index_name), f"{folder.shown}/{escape(index_name)}") if index_name else None
    is_named = isinstance(folder, _Matching)
    if adapter is not None:
        files = [adapter, *(n for n in trained_beside(filter(_is_weights, names)) if n != adapter)]
    else:
        files = index.files if index else _weights_without_index(names, folder.shown, is_named)
    present = set(names)
    missing = [name for name in files if name not in present and not folder.has(name)]
    if missing:
        raise CorruptInput(
            f"{folder.shown}: incomplete: {escape(index_name or '')} lists {len(missing)} files that are missing, "
            f"{escape(missing[0])} first",
            hint="download the missing files",
        )
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    warnings: list[str] = []
    read = _read_weights([folder.file(name) for name in files], web)
    for name, weights_in_it in zip(files, read, strict=True):
        found = weights_in_it.tensors
        warnings += weights_in_it.warnings
        if adapter not in (None, name) and any("lora_" in tensor for tensor in found):
            warnings.append(f"{escape(name)} is an adapter of its own beside {escape(str(adapter))}: not used")
            continue
        if len(files) > 1 and _PART.fullmatch(name):
            found = {f"{Path(name).stem}/{tensor}": lazy for tensor, lazy in found.items()}
        twice = next((t for t in found if t in tensors), None)
        if twice is not None:
            raise CorruptInput(f"{folder.shown}: {escape(twice)} is in both {shards[twice]} and {escape(name)}")
        tensors |= found
        shards |= dict.fromkeys(found, name)
    if index and index_name:
        _check_index(index, shards, f"{folder.shown}/{escape(index_name)}")
        warnings += _index_warnings(index, index_name, tensors)
    metadata, said = _joined([each.metadata for each in read])
    warnings += said
    stray = [n for n in names if n not in files and _is_weights(n) and Path(n).suffix == Path(files[0]).suffix]
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
        (*warnings, *notes),
        metadata=metadata,
        left=left,
        folder=folder,
        origin=origin,
        content_id=told.content_id if told else None,
        digests={n: t.xxh3_128 for n, t in told.tensors.items()} if told else {},
    )


def _joined(found: Iterable[Mapping[str, str]]) -> tuple[dict[str, str], list[str]]:
    """The `__metadata__` of all files, which every file of an output gets; and what they do not agree on.

    `format` says to loaders which library's tensors these are; transformers reads no file without it.
    """
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


def _manifest(folder: Folder, names: Iterable[str]) -> Manifest | None:
    """What lies in the folder as its manifest, unless that is none: then `verify` has something to say, not we."""
    if manifest.NAME not in names:
        return None
    try:
        return manifest.parse_manifest(folder.read(manifest.NAME), folder.shown)
    except CorruptInput:
        return None


def refuse_parts(checkpoint: Checkpoint) -> None:
    """Raise `UsageError` for Meta's files that hold parts of each tensor, where whole tensors are wanted."""
    if len({name for name in checkpoint.shards.values() if _PART.fullmatch(name)}) > 1:
        raise UsageError(
            f"{escape(checkpoint.name)}: each file holds a part of every tensor",
            hint="weightops convert --to hf joins them, and so does --to meta --model-parallel 1",
        )


def find_index(names: Iterable[str], shown: str) -> str | None:
    """The index to go by: safetensors before torch, the usual name before others."""
    found = [n for n in names if n.endswith(".index.json")]
    for pattern in ("model.safetensors", "*.safetensors", "pytorch_model.bin", "*.bin"):
        matching = [n for n in found if Path(n.removesuffix(".index.json")).match(pattern)]
        if len(matching) > 1:
            raise CorruptInput(
                f"{shown}: several indexes ({', '.join(map(escape, matching))})",
                hint="keep one variant per folder",
            )
        if matching:
            return matching[0]
    return None


def _chosen(names: Iterable[str], pattern: str) -> list[str]:
    """The weight files and indexes that match a pattern, and all other files."""
    return [n for n in names if fnmatch(n, pattern) or not (_is_weights(n) or n.endswith(".index.json"))]


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHT_SUFFIXES) and not name.startswith(".") and not _NOT_WEIGHTS.fullmatch(name)


def _weights_without_index(names: Iterable[str], shown: str, is_named: bool = False) -> list[str]:
    """The weight files of a folder that has no index: one file, or one complete numbered set.

    Files that were named by a pattern (`is_named`) may also have no numbers.
    """
    known = model_files([n for n in names if _is_weights(n)])
    for suffixes in ((".safetensors",), _TORCH_SUFFIXES, (".gguf",)):
        weights = [n for n in known if n.endswith(suffixes)]
        usual = [n for n in weights if n in ("model.safetensors", "pytorch_model.bin")]
        if weights and all(map(_PART.fullmatch, weights)):
            return _check_parts(weights, shown)
        if usual or len(weights) == 1:
            (single,) = usual or weights
            matched = _NUMBERED.fullmatch(single)
            if matched and matched["count"] and int(matched["count"]) > 1:
                _check_numbering(weights, shown)
            return [single]
        if weights:
            if not (is_named and any(_NUMBERED.fullmatch(n) is None for n in weights)):
                _check_numbering(weights, shown)
            return weights
    raise NoWeights(f"{shown}: holds no weights (looked for {', '.join(WEIGHT_SUFFIXES)})")


def _check_numbering(weights: list[str], shown: str) -> None:
    """Accept `-0000i-of-0000n` sets from 0 or 1 without gaps, and `-i` sets; refuse anything else."""
    matches = [_NUMBERED.fullmatch(n) for n in weights]
    if None in matches or len({(m["stem"], m["count"]) for m in matches if m}) > 1:
        raise CorruptInput(
            f"{shown}: holds {len(weights)} weight files, {escape(weights[0])} first, and no index",
            hint="name one file or, in quotes, a pattern that all of them match, or add the index",
        )
    numbers = sorted(int(m["number"]) for m in matches if m)
    count = matches[0]["count"] if matches[0] else None
    first = 0 if numbers[0] == 0 else 1
    last = first + len(numbers) - 1
    complete = numbers == list(range(first, last + 1)) and (count is None or int(count) in (last, last + 1))
    if not complete or (count is not None and first == 1 and int(count) != last):
        raise CorruptInput(
            f"{shown}: incomplete: shards {', '.join(map(str, numbers))} of {count or 'a numbered set'}, and no index",
            hint="download the missing shards",
        )


def _check_parts(weights: list[str], shown: str) -> list[str]:
    """Accept `consolidated.00.pth` and its successors without gaps."""
    numbers = [int(m[1]) for name in weights if (m := _PART.fullmatch(name))]
    if numbers != list(range(len(numbers))):
        raise CorruptInput(
            f"{shown}: holds the parts {', '.join(f'{n:02d}' for n in numbers)} of a model in Meta's layout, "
            f"expected {', '.join(f'{n:02d}' for n in range(len(numbers)))}",
            hint="download the missing parts",
        )
    return weights


class _Weights(NamedTuple):
    """The tensors of a file, what there is to say about it, and a safetensors file's `__metadata__`."""

    tensors: dict[str, LazyTensor]
    warnings: tuple[str, ...] = ()
    metadata: Mapping[str, str] = {}


def _read_weights(files: Sequence[SourceFile], web: Web | None) -> list[_Weights]:
    """The headers of weight files; several at a time if they are on servers."""

    def read(file: SourceFile) -> _Weights:
        with FileReader(web) as reader:
            return _read_file(file, reader)

    if not any(file.is_remote for file in files):
        return [read(file) for file in files]
    with ThreadPoolExecutor(_REMOTE_READERS, "header") as pool:
        return list(pool.map(read, files))


def _read_file(file: SourceFile, files: FileReader) -> _Weights:
    if file.name.endswith(".safetensors"):
        found = read_safetensors(file, files)
        return _Weights(found.tensors, metadata=found.metadata)
    if file.name.endswith(".gguf"):
        from weightops.formats.gguf import read_gguf  # imported here because few folders hold one

        return _Weights(read_gguf(file, files).tensors)
    read = read_torch(file, files)
    written_as = _PART.fullmatch(f"{read.root}.pth")
    if written_as and _PART.fullmatch(file.name) and file.name != written_as[0]:
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
