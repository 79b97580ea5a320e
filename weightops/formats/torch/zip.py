"""Torch files since torch 1.6: a zip archive of a pickle and of storages, which are never unpickled.

Source: torch/serialization.py (`_save`, `_load`) and caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from weightops.errors import CorruptInput
from weightops.formats.torch.objects import ALLOWED, Placed, Storages, TorchFile, find_tensors, place
from weightops.formats.torch.pickle_reader import MAX_NBYTES, read_pickle
from weightops.formats.torch.zip_reader import Member, read_archive
from weightops.io.escape import escape
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.ops.stored import Checked, view
from weightops.stores.reader import FileReader

_SMALL_NBYTES = 4096
_PICKLE = "data.pkl"


def read_torch_zip(file: SourceFile, files: FileReader) -> TorchFile:
    """The tensors of a zip file that torch.save wrote; raises `CorruptInput`.

    Reads the archive's directory, its headers and small members, and the pickle: the storages only when the tensors
    are evaluated, which checks their CRC-32.
    """
    members = read_archive(file, files)
    root = _find_root(members, file.shown)
    for member in members.values():
        if member.nbytes <= _SMALL_NBYTES and not member.name.startswith(f"{root}/data/"):
            _read_member(member, file, files)
    byteorder = members.get(f"{root}/byteorder")
    if byteorder and _read_member(byteorder, file, files) != b"little":
        raise CorruptInput(f"{file.shown}: byteorder is not little", hint="save it again on a little-endian machine")
    pickle = members[f"{root}/{_PICKLE}"]
    if pickle.nbytes > MAX_NBYTES:
        raise CorruptInput(f"{file.shown}: {_PICKLE} has {pickle.nbytes} bytes, at most {MAX_NBYTES} are read")
    what = f"{file.shown}: {_PICKLE}"
    value, end = read_pickle(_read_member(pickle, file, files), 0, what, ALLOWED, Storages())
    if end != pickle.nbytes:
        raise CorruptInput(f"{what}: {pickle.nbytes - end} bytes after its end")
    calls, extras = find_tensors(value, file.shown)
    tensors = {}
    for name, call in calls.items():
        where = f"{file.shown}: {escape(name)}"
        placed = place(call, where)
        storage = members.get(f"{root}/data/{placed.storage.key}")
        if storage is None:
            raise CorruptInput(f"{where}: its storage {escape(placed.storage.key)} is not in the archive")
        tensors[name] = _tensor(placed, storage, file, where)
    return TorchFile(file, tensors, extras, root)


def _find_root(members: Mapping[str, Member], shown: str) -> str:
    """The folder inside the archive, which torch names after the file it wrote first."""
    roots = [name.removesuffix(f"/{_PICKLE}") for name in members if name.endswith(f"/{_PICKLE}")]
    roots = [root for root in roots if "/" not in root]
    if len(roots) != 1:
        raise CorruptInput(f"{shown}: a zip archive with {len(roots)} data.pkl in its folders, expected 1")
    root = roots[0]
    if any(
        name in (f"{root}/constants.pkl", f"{root}/model.json") or name.startswith(f"{root}/code/") for name in members
    ):
        raise CorruptInput(
            f"{shown}: this is a TorchScript program, not a state dict",
            hint="load it with torch.jit.load where you trust it, and torch.save its state_dict()",
        )
    outside = next((name for name in members if not name.startswith(f"{root}/")), None)
    if outside is not None:
        raise CorruptInput(f"{shown}: the member {escape(outside)} lies outside {escape(root)}/")
    return root


def _read_member(member: Member, file: SourceFile, files: FileReader) -> bytes:
    """A member's bytes, whose number the caller has limited."""
    data = files.read(file, member.offset, member.nbytes)
    found = zlib.crc32(data)
    if member.crc32 and found != member.crc32:
        raise CorruptInput(
            f"{file.shown}: {escape(member.name)} has CRC-32 {found:08x}, the archive says {member.crc32:08x}",
            hint="the file was damaged after it was written: fetch it again",
        )
    return data


def _tensor(placed: Placed, member: Member, file: SourceFile, where: str) -> LazyTensor:
    if member.nbytes != placed.storage.nbytes:
        raise CorruptInput(f"{where}: its storage should have {placed.storage.nbytes} bytes, found {member.nbytes}")
    tensor = view(file, member.offset + placed.offset, placed.dtype, placed.shape, placed.strides)
    if not member.crc32 or not tensor.nbytes:
        return tensor
    return LazyTensor.make(Checked(member.crc32, file, member.offset, member.nbytes), tensor)
