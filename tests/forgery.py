"""Pickles and archives that torch.save would never write."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

FLOATS = struct.pack("<6f", *range(6))
"""The storage that `storage()` describes."""

Members = list[tuple[str, bytes]]


class Runs:
    """Pickles as a call."""

    def __init__(self, name: str, *arguments: object) -> None:
        self.name, self.arguments = name, arguments


class Name:
    """Pickles as a global of that name, whether there is one or not."""

    def __init__(self, name: str) -> None:
        self.name = name


class Pid:
    """Pickles as a persistent id."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts


class Forger(pickle._Pickler):
    """Writes pickles that say what they should not."""

    def persistent_id(self, value: object) -> object:
        return value.parts if isinstance(value, Pid) else None

    def save(self, value: object, save_persistent_id: bool = True) -> None:
        if isinstance(value, Name):
            self.write(b"c" + value.name.replace(" ", "\n").encode() + b"\n")
        elif isinstance(value, Runs):
            self.save(Name(value.name))
            self.save(value.arguments)
            self.write(b"R")
        else:
            super().save(value, save_persistent_id)


def forge(value: object) -> bytes:
    stream = io.BytesIO()
    Forger(stream, protocol=2).dump(value)
    return stream.getvalue()


def storage(key: object = "0", numel: object = 6, kind: object = "torch FloatStorage") -> Pid:
    return Pid("storage", Name(kind) if isinstance(kind, str) else kind, key, "cpu", numel)


def tensor(pid: object = None, offset: object = 0, size: object = (2, 3), stride: object = (3, 1)) -> Runs:
    hooks = Runs("collections OrderedDict")
    return Runs("torch._utils _rebuild_tensor_v2", pid or storage(), offset, size, stride, False, hooks)


def resave(path: Path, change: Callable[[Members], Members]) -> None:
    """Write an archive again, with `change` applied to its members' names and bytes."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    write_archive(path, change(members))


def write_archive(path: Path, members: Members, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
