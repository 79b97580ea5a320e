"""Layouts of torch files, byte-identical to what torch.save writes for a dict of contiguous CPU tensors.

`torch` is the layout of torch 2.13 on Linux, `torch-1.12` that of torch 1.6 to 2.0. One quirk of torch is out of
reach: a tensor whose data begins with the bytes 50 4B 07 08 changes the serialization id of the newer layout,
because torch takes it for a data descriptor. Readers ignore that id.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence

from weightops.errors import UsageError
from weightops.formats.layout import Crcs, Data, Late, Layout, Literal
from weightops.formats.torch.libstdcxx import iteration_order, string_hash
from weightops.formats.torch.miniz import ArchiveLayout
from weightops.formats.torch.pickle_writer import STORAGE_CLASSES, PickledTensor, pickle_state_dict
from weightops.io.escape import escape
from weightops.spec import TensorSpec

Flavour = typing.Literal["torch", "torch-1.12"]


def torch_layout(
    tensors: Sequence[tuple[str, TensorSpec]],
    aliases: Mapping[str, str],
    *,
    flavour: Flavour,
    root: str,
    prefix: str = "",
) -> Layout:
    """The file of a state dict with these tensors, in this order.

    `aliases` maps names to earlier ones, of the same spec, with which they share a storage. `root` is the name of
    the file up to its last dot; torch names the archive's folder after it, unless it is not ASCII or the flavour is
    `torch-1.12`. `prefix`, which tells parts of a tensor apart, is left out of the names in the file.
    Raises `UsageError` for a dtype that torch, or torch 1.12, cannot store.
    """
    for name, spec in tensors:
        if spec.dtype.is_packed or (flavour == "torch-1.12" and spec.dtype not in STORAGE_CLASSES):
            writer = "torch" if spec.dtype.is_packed else "torch 1.12"
            hint = (
                "`weightops dequantize` makes plain weights of GGUF files"
                if spec.dtype.is_block
                else "use --format safetensors"
            )
            raise UsageError(f"{escape(name)}: {writer} cannot store {spec.dtype.value}", hint=hint)
    keys: dict[str, str] = {}
    storages: dict[str, Data] = {}
    for name, spec in tensors:
        keys[name] = keys[aliases[name]] if name in aliases else str(len(storages))
        storages.setdefault(keys[name], Data(name, spec.nbytes))
    pickled = pickle_state_dict([PickledTensor(name.removeprefix(prefix), spec, keys[name]) for name, spec in tensors])
    is_old = flavour == "torch-1.12"
    folder = root if root.isascii() and not is_old else "archive"
    archive = ArchiveLayout()
    archive.add(f"{folder}/data.pkl", Literal(pickled))
    if not is_old:
        archive.add(f"{folder}/.format_version", Literal(b"1"))
        archive.add(f"{folder}/.storage_alignment", Literal(b"64"))
        archive.add(f"{folder}/byteorder", Literal(b"little"))
    for key in sorted(storages) if is_old else storages:
        archive.add(f"{folder}/data/{key}", storages[key])
    archive.add(f"{folder}/version", Literal(b"3\n"))
    if not is_old:
        archive.add(f"{folder}/.data/serialization_id", _serialization_id(archive, len(folder) + 1))
    return Layout(archive.finish(), dict(aliases))


def _serialization_id(archive: ArchiveLayout, prefix_nbytes: int) -> Late:
    """The id of `PyTorchStreamWriter::writeSerializationId`: two combined hashes of 20 decimal digits each.

    The first is over the names of the members, in the order of a C++ set; the second over the CRC-32s of the members
    that hold data, in file order.
    """
    members = tuple(archive.members)
    names = _combine(iteration_order([string_hash(member.name[prefix_nbytes:]) for member in members]))

    def render(crcs: Crcs) -> bytes:
        data = _combine([member.crc(crcs) for member in members if member.nbytes])
        return f"{names:020}{data:020}".encode()

    return Late(40, render)


def _combine(hashes: Sequence[int]) -> int:
    """`c10::hash_combine` over hashes, from 0."""
    seed = 0
    for value in hashes:
        seed ^= (value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & (1 << 64) - 1
    return seed
