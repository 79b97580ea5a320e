"""Zip archives laid out as miniz does for torch: stored, 64-byte aligned, with data descriptors, always zip64.

Sources: `mz_zip_writer_add_mem_ex_v2` and `mz_zip_writer_finalize_archive` of miniz 2 and 3 (their bytes are the
same), and `getPadding` of torch's caffe2/serialize/inline_container.cc. Members carry no times.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from weightops.formats.layout import Crcs, Data, Late, Literal, Piece

_ALIGNMENT = 64
_U16_MAX = 0xFFFF
_U32_MAX = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """A member: `offset` is that of its local header; `crc` gives its CRC-32 once its data has passed."""

    name: bytes
    offset: int
    nbytes: int
    crc: Callable[[Crcs], int]

    def local_header(self) -> bytes:
        """The header, and extra fields that put the data on a multiple of 64 bytes."""
        # miniz writes the zip64 field before it knows the compressed size.
        zip64 = self._zip64(compressed_nbytes=0)
        padding = -(self.offset + 30 + len(self.name) + len(zip64) + 4) % _ALIGNMENT
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fixed = (b"PK\3\4", 0, self._flags, 0, 0, 0, 0, 0, 0, len(self.name), len(extra))
        return struct.pack("<4s5H3I2H", *fixed) + self.name + extra

    def descriptor(self, crc32: int) -> bytes:
        """What follows the data, if there is data."""
        form = "<4sI2Q" if self._zip64(self.nbytes) else "<4sI2I"
        return struct.pack(form, b"PK\7\x08", crc32, self.nbytes, self.nbytes) if self.nbytes else b""

    def central_header(self, crc32: int) -> bytes:
        """The entry in the central directory."""
        extra = self._zip64(self.nbytes)
        nbytes, offset = min(self.nbytes, _U32_MAX), min(self.offset, _U32_MAX)
        sizes = (crc32, nbytes, nbytes, len(self.name), len(extra))
        fixed = (b"PK\1\2", 0, 0, self._flags, 0, 0, 0, *sizes, 0, 0, 0, 0, offset)
        return struct.pack("<4s6H3I5H2I", *fixed) + self.name + extra

    @property
    def _flags(self) -> int:
        """UTF-8 name; CRC and sizes in a descriptor."""
        return 0x0808 if self.nbytes else 0x0800

    def _zip64(self, compressed_nbytes: int) -> bytes:
        """The extra field for what exceeds 32 bits, or nothing."""
        sizes = (self.nbytes, compressed_nbytes) if self.nbytes >= _U32_MAX else ()
        fields = (*sizes, self.offset) if self.offset >= _U32_MAX else sizes
        return struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""


class ArchiveLayout:
    """An archive in the making, member by member."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self._pieces: list[Piece] = []
        self._nbytes = 0

    def add(self, name: str, content: Piece) -> None:
        """Append a member."""
        member = Member(name.encode(), self._nbytes, content.nbytes, _crc_of(content))
        self.members.append(member)
        descriptor_nbytes = len(member.descriptor(0))
        descriptor = Late(descriptor_nbytes, lambda crcs: member.descriptor(member.crc(crcs)))
        self._append(Literal(member.local_header()), content)
        if descriptor_nbytes:
            self._append(Literal(descriptor.render({})) if isinstance(content, Literal) else descriptor)

    def finish(self) -> tuple[Piece, ...]:
        """All pieces, the central directory included."""
        directory = _Directory(tuple(self.members), self._nbytes)
        return (*self._pieces, Late(directory.nbytes, directory.render))

    def _append(self, *pieces: Piece) -> None:
        self._pieces += pieces
        self._nbytes += sum(piece.nbytes for piece in pieces)


def _crc_of(content: Piece) -> Callable[[Crcs], int]:
    if isinstance(content, Literal):
        crc32 = zlib.crc32(content.data)
        return lambda _: crc32
    if isinstance(content, Data):
        return lambda crcs: crcs[content.name] if content.nbytes else 0
    assert isinstance(content, Late)
    return lambda crcs: zlib.crc32(content.render(crcs))


@dataclass(frozen=True, slots=True)
class _Directory:
    """The central directory, which begins at `offset`, and its three end records."""

    members: tuple[Member, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return sum(len(member.central_header(0)) for member in self.members) + 56 + 20 + 22

    def render(self, crcs: Crcs) -> bytes:
        entries = b"".join(member.central_header(member.crc(crcs)) for member in self.members)
        count, nbytes = len(self.members), len(entries)
        end64 = (b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, nbytes, self.offset)
        locator = (b"PK\6\7", 0, self.offset + nbytes, 1)
        short = min(count, _U16_MAX)
        end = (b"PK\5\6", 0, 0, short, short, min(nbytes, _U32_MAX), min(self.offset, _U32_MAX), 0)
        return b"".join(
            (entries, struct.pack("<4sQ2H2I4Q", *end64), struct.pack("<4sIQI", *locator), struct.pack("<4s4H2IH", *end))
        )
