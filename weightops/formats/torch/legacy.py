"""Torch files before torch 1.6, and the choice among torch's containers.

A legacy file is five pickles (magic number, protocol, system, object, storage keys) and then, for each key, the
number of elements (int64) and the storage's bytes. Source: torch/serialization.py (`_legacy_save`, `_legacy_load`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightops.errors import CorruptInput
from weightops.formats.sniff import explain
from weightops.formats.torch.objects import ALLOWED, Storage, Storages, TorchFile, find_tensors, place
from weightops.formats.torch.pickle_reader import MAX_NBYTES, PickleCut, read_pickle
from weightops.formats.torch.zip import read_torch_zip
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.ops.stored import view
from weightops.stores.reader import FileReader

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_FIRST_NBYTES = 64 << 10
_TAR_MAGIC = 257


def read_torch(file: SourceFile, files: FileReader) -> TorchFile:
    """The tensors of a file that torch.save wrote, in either of its formats, without reading them.

    Raises `CorruptInput` for any other file, and for one that holds more than a state dict of dense tensors.
    """
    head = files.read(file, 0, min(512, file.nbytes))
    if head.startswith(b"PK"):
        return read_torch_zip(file, files)
    if head.startswith(b"\x80"):
        return read_torch_legacy(file, files)
    if head[_TAR_MAGIC : _TAR_MAGIC + 5] == b"ustar":
        raise CorruptInput(
            f"{file.shown}: this is a tar archive, as torch before 0.1.10 wrote",
            hint="load it with an old torch where you trust it, and save it again",
        )
    raise explain(head, file.shown, "not a file that torch.save wrote")


def read_torch_legacy(file: SourceFile, files: FileReader) -> TorchFile:
    """The tensors of a legacy file; raises `CorruptInput`. Such files carry no checksums."""
    storages = Storages()
    value, keys, position = _read_pickles(file, files, storages)
    calls, extras = find_tensors(value, file.shown)
    offsets = _walk_storages(keys, storages.by_key, position, file, files)
    tensors = {}
    for name, call in calls.items():
        placed = place(call, f"{file.shown}: {escape(name)}")
        offset = offsets[placed.storage.key] + placed.offset
        tensors[name] = view(file, offset, placed.dtype, placed.shape, placed.strides)
    return TorchFile(file, tensors, extras)


def _read_pickles(file: SourceFile, files: FileReader, storages: Storages) -> tuple[Any, Any, int]:
    """The object, the storage keys, and where the storages begin. Reads no more than some times the pickles' size."""
    largest = min(file.nbytes, MAX_NBYTES)
    nbytes = min(_FIRST_NBYTES, largest)
    while True:
        try:
            return _parse_pickles(files.read(file, 0, nbytes), file.shown, storages)
        except PickleCut:
            if nbytes == largest:
                raise
            nbytes = min(8 * nbytes, largest)
            storages.by_key.clear()


def _parse_pickles(data: bytes, shown: str, storages: Storages) -> tuple[Any, Any, int]:
    magic, position = read_pickle(data, 0, shown, ALLOWED, storages)
    if type(magic) is not int or magic != _MAGIC:
        raise CorruptInput(f"{shown}: a pickle that torch.save did not write")
    protocol, position = read_pickle(data, position, shown, ALLOWED, storages)
    if type(protocol) is not int or protocol != _PROTOCOL:
        raise CorruptInput(f"{shown}: a torch file of another protocol, expected {_PROTOCOL}")
    system, position = read_pickle(data, position, shown, ALLOWED, storages)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise CorruptInput(f"{shown}: not little-endian", hint="save it again on a little-endian machine")
    value, position = read_pickle(data, position, shown, ALLOWED, storages)
    keys, position = read_pickle(data, position, shown, ALLOWED, storages)
    return value, keys, position


def _walk_storages(
    keys: object, storages: Mapping[str, Storage], position: int, file: SourceFile, files: FileReader
) -> dict[str, int]:
    """Where each storage's bytes begin."""
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise CorruptInput(f"{file.shown}: the storage keys are no list of texts")
    if len(keys) != len(storages) or set(keys) != storages.keys():
        raise CorruptInput(f"{file.shown}: has {len(keys)} storages, its tensors use {len(storages)}")
    offsets = {}
    for key in keys:
        storage = storages[key]
        offsets[key] = position + 8
        end = offsets[key] + storage.nbytes
        if end > file.nbytes:
            raise CorruptInput(
                f"{file.shown}: storage {escape(key)} should end at byte {end}, found {file.nbytes} bytes",
                hint="the file is incomplete: fetch it again",
            )
        numel = int.from_bytes(files.read(file, position, 8), "little", signed=True)
        if numel != storage.numel:
            raise CorruptInput(f"{file.shown}: storage {escape(key)} has {numel} elements, expected {storage.numel}")
        position = end
    if position != file.nbytes:
        raise CorruptInput(f"{file.shown}: {file.nbytes - position} bytes after the last storage")
    return offsets
