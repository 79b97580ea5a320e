"""Archives whose records lie about one another, a field at a time."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable

import pytest

from weightops.errors import CorruptInput
from weightops.formats.torch.zip_reader import read_archive
from weightops.io.source_file import SourceFile
from weightops.stores.reader import FileReader

NAME, DATA = "x/data", b"0123456789"


def archive(before: bytes = b"") -> bytearray:
    """One stored member, after bytes that belong to none."""
    file = io.BytesIO()
    file.write(before)
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(NAME, DATA)
    return bytearray(file.getvalue())


def put(data: bytearray, magic: bytes, *fields: tuple[int, str, int]) -> bytearray:
    for at, kind, value in fields:
        struct.pack_into(f"<{kind}", data, data.index(magic) + at, value)
    return data


def longer(data: bytearray, by: int) -> bytearray:
    """The member said to be longer, in both of its headers."""
    put(data, b"PK\3\4", (18, "I", len(DATA) + by), (22, "I", len(DATA) + by))
    return put(data, b"PK\1\2", (20, "I", len(DATA) + by), (24, "I", len(DATA) + by))


def padded(data: bytearray) -> bytearray:
    """Four bytes more in the central directory than its entries have."""
    end = data.index(b"PK\5\6")
    (nbytes,) = struct.unpack_from("<I", data, end + 12)
    put(data, b"PK\5\6", (12, "I", nbytes + 4))
    data[end:end] = bytes(4)
    return data


LIES: dict[str, Callable[[], bytearray]] = {
    "16 bytes before the first member": lambda: archive(bytes(16)),
    "reaches byte 47, the central directory begins at 46": lambda: longer(archive(), 1),
    "the central directory has 56 bytes, its entries 52": lambda: padded(archive()),
    "2 members in a central directory of 52 bytes": lambda: put(archive(), b"PK\5\6", (8, "H", 2), (10, "H", 2)),
    "a size beyond 4 GiB is missing": lambda: put(archive(), b"PK\1\2", (24, "I", 0xFFFFFFFF)),
    "is compressed": lambda: put(archive(), b"PK\1\2", (10, "H", 8)),
    "is encrypted, split or of two sizes": lambda: put(archive(), b"PK\1\2", (8, "H", 1)),
    "two sizes": lambda: put(archive(), b"PK\1\2", (20, "I", 9)),
    "it is one part of several": lambda: put(archive(), b"PK\5\6", (4, "H", 1)),
    "one part of several": lambda: put(archive(), b"PK\5\6", (10, "H", 2)),
    "the central directory ends at byte 99": lambda: put(archive(), b"PK\5\6", (16, "I", 47)),
    "the central directory is cut short": lambda: put(archive(), b"PK\1\2", (0, "B", 0)),
    "no local header": lambda: put(archive(), b"PK\3\4", (0, "B", 0)),
    "another name or method in its local header": lambda: put(archive(), b"PK\3\4", (8, "H", 8)),
    "10 bytes in its local header, 10 in": lambda: put(archive(), b"PK\3\4", (14, "I", 1)),
}


def read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> bytes:
    path = tmp_path_factory.mktemp("zip") / "x.zip"
    path.write_bytes(data)
    file = SourceFile.at(path)
    with FileReader() as files:
        (member,) = read_archive(file, files).values()
        assert member.name == NAME
        return bytes(files.read(file, member.offset, member.nbytes))


def test_an_archive_that_does_not_lie_is_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert read(tmp_path_factory, archive()) == DATA


@pytest.mark.parametrize("said", LIES)
def test_records_that_lie_are_refused(tmp_path_factory: pytest.TempPathFactory, said: str) -> None:
    with pytest.raises(CorruptInput, match=said):
        read(tmp_path_factory, LIES[said]())
