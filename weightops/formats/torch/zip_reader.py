"""Zip archives of stored members, read strictly: only what any two readers understand alike.

Format: PKWARE's APPNOTE.TXT. Refused, although other readers accept them: compressed or encrypted members, bytes
before the first member, archive comments, equal names, overlaps, and local headers that contradict the directory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from weightops.errors import CorruptInput
from weightops.io.escape import escape
from weightops.io.paths import check_relative
from weightops.io.source_file import SourceFile
from weightops.stores.reader import FileReader

_MAX_DIRECTORY_NBYTES = 64 << 20
_U16_MAX = 0xFFFF
_U32_MAX = 0xFFFFFFFF
_FLAG_DESCRIPTOR = 0x0008
_FLAG_UTF8 = 0x0800
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_HINT = "the file is incomplete, damaged or made to deceive: fetch it again from a source you trust"


@dataclass(frozen=True, slots=True)
class Member:
    """A member's data: `nbytes` at `offset` of the file. torch can be told to write no CRC-32; it is 0 then."""

    name: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of the central directory; `offset` is that of the local header."""

    name: bytes
    flags: int
    crc32: int
    nbytes: int
    offset: int


class _Bad(Exception):
    """What is wrong with the archive."""


def read_archive(file: SourceFile, files: FileReader) -> dict[str, Member]:
    """All members by name, in the order of their data. Raises `CorruptInput`.

    Reads the end records, the central directory and the local headers.
    """
    try:
        start, nbytes, count = _find_directory(file, files)
        if nbytes > _MAX_DIRECTORY_NBYTES or count > nbytes // _CENTRAL.size:
            raise _Bad(f"{count} members in a central directory of {nbytes} bytes")
        entries = sorted(_parse_directory(files.read(file, start, nbytes), count), key=lambda entry: entry.offset)
        members: dict[str, Member] = {}
        position = 0
        for entry in entries:
            name = _decode(entry.name)
            if entry.offset < position:
                raise _Bad(f"{escape(name)} overlaps the member before it")
            if entry.offset and not members:
                raise _Bad(f"{entry.offset} bytes before the first member")
            if name in members:
                raise _Bad(f"two members are named {escape(name)}")
            data_offset = _check_local(entry, start, file, files)
            position = data_offset + entry.nbytes
            if position > start:
                raise _Bad(f"{escape(name)} reaches byte {position}, the central directory begins at {start}")
            members[name] = Member(name, data_offset, entry.nbytes, entry.crc32)
        return members
    except _Bad as error:
        raise CorruptInput(f"{file.shown}: zip archive: {error}", hint=_HINT) from None


def _find_directory(file: SourceFile, files: FileReader) -> tuple[int, int, int]:
    """Offset, bytes and number of entries of the central directory."""
    tail_nbytes = min(file.nbytes, _END64.size + _LOCATOR.size + _END.size)
    tail = files.read(file, file.nbytes - tail_nbytes, tail_nbytes)
    end_offset = tail_nbytes - _END.size
    if end_offset < 0 or tail[end_offset : end_offset + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise _Bad("no end record at the end of the file")
    _, disk, first_disk, here, count, nbytes, start, _ = _END.unpack_from(tail, end_offset)
    locator_offset = end_offset - _LOCATOR.size
    if locator_offset >= 0 and tail[locator_offset : locator_offset + 4] == b"PK\6\7":
        short = (here, count, nbytes, start)
        end_offset = locator_offset - _END64.size
        expected = (b"PK\6\7", 0, file.nbytes - tail_nbytes, 1)
        if end_offset < 0 or _LOCATOR.unpack_from(tail, locator_offset) != expected or tail[:4] != b"PK\6\6":
            raise _Bad("the zip64 end record is not where it should be")
        _, size, _, _, disk, first_disk, here, count, nbytes, start = _END64.unpack_from(tail)
        limits = (_U16_MAX, _U16_MAX, _U32_MAX, _U32_MAX)
        long = (here, count, nbytes, start)
        if size != 44 or any(s not in (v, m) for s, v, m in zip(short, long, limits, strict=True)):
            raise _Bad("the two end records contradict each other")
    if disk or first_disk or here != count:
        raise _Bad("it is one part of several")
    if start + nbytes != file.nbytes - tail_nbytes + end_offset:
        raise _Bad(f"the central directory ends at byte {start + nbytes}, not where its end record begins")
    return start, nbytes, count


def _parse_directory(data: bytes, count: int) -> list[_Entry]:
    entries = []
    position = 0
    for _ in range(count):
        if len(data) - position < _CENTRAL.size or data[position : position + 4] != b"PK\1\2":
            raise _Bad("the central directory is cut short")
        (_, _, _, flags, method, _, _, crc32, stored, nbytes, name_nbytes, extra_nbytes, comment_nbytes, disk) = (
            _CENTRAL.unpack_from(data, position)[:14]
        )
        offset = _CENTRAL.unpack_from(data, position)[-1]
        position += _CENTRAL.size
        name = data[position : position + name_nbytes]
        extra = data[position + name_nbytes : position + name_nbytes + extra_nbytes]
        position += name_nbytes + extra_nbytes + comment_nbytes
        nbytes, stored, offset = _widen((nbytes, stored, offset), extra)
        shown = escape(_decode(name))
        if method:
            raise _Bad(f"{shown} is compressed (method {method}), expected stored")
        if flags & ~(_FLAG_DESCRIPTOR | _FLAG_UTF8) or disk or stored != nbytes:
            raise _Bad(f"{shown} is encrypted, split or of two sizes ({stored} and {nbytes} bytes)")
        entries.append(_Entry(name, flags, crc32, nbytes, offset))
    if position != len(data):
        raise _Bad(f"the central directory has {len(data)} bytes, its entries {position}")
    return entries


def _check_local(entry: _Entry, limit: int, file: SourceFile, files: FileReader) -> int:
    """Where the member's data begins; its local header must lie before `limit` and agree with the directory."""
    shown = escape(_decode(entry.name))
    name_end = entry.offset + _LOCAL.size + len(entry.name)
    if name_end > limit:
        raise _Bad(f"{shown} begins at byte {entry.offset}, the central directory at {limit}")
    header = files.read(file, entry.offset, name_end - entry.offset)
    (magic, _, flags, method, _, _, crc32, stored, nbytes, name_nbytes, extra_nbytes) = _LOCAL.unpack_from(header)
    if magic != b"PK\3\4" or name_end + extra_nbytes > limit:
        raise _Bad(f"no local header of {shown} at byte {entry.offset}")
    if name_nbytes != len(entry.name) or header[_LOCAL.size :] != entry.name or (flags, method) != (entry.flags, 0):
        raise _Bad(f"{shown} has another name or method in its local header")
    if not flags & _FLAG_DESCRIPTOR:
        extra = files.read(file, name_end, extra_nbytes)
        sizes = _widen((nbytes, stored), extra)
        if sizes != (entry.nbytes, entry.nbytes) or crc32 != entry.crc32:
            raise _Bad(f"{shown} has {sizes[0]} bytes in its local header, {entry.nbytes} in the central directory")
    elif nbytes not in (0, _U32_MAX, entry.nbytes) or stored not in (0, _U32_MAX, entry.nbytes):
        raise _Bad(f"{shown} has {nbytes} bytes in its local header, {entry.nbytes} in the central directory")
    return name_end + int(extra_nbytes)


def _widen(values: tuple[int, ...], extra: bytes) -> tuple[int, ...]:
    """Replace values of all ones by those of the zip64 extra field, which holds exactly these, in order."""
    missing = sum(value == _U32_MAX for value in values)
    if not missing:
        return values
    position = 0
    while len(extra) - position >= 4:
        kind, nbytes = struct.unpack_from("<HH", extra, position)
        field = extra[position + 4 : position + 4 + nbytes]
        if kind == 1 and len(field) == nbytes == 8 * missing:
            wide = iter(struct.unpack(f"<{missing}Q", field))
            return tuple(next(wide) if value == _U32_MAX else value for value in values)
        position += 4 + nbytes
    raise _Bad("a size beyond 4 GiB is missing")


def _decode(name: bytes) -> str:
    """A member's name, which must be a plain path."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise _Bad("a member's name is not UTF-8") from None
    try:
        check_relative(text.removesuffix("/"), "")
    except CorruptInput:
        raise _Bad(f"the member {escape(text)!r} is not named by a plain path") from None
    return text
