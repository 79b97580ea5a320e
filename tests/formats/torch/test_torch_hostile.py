"""Hostile zip files are refused, each with a sentence; numbers are rows of the acceptance corpus."""

from __future__ import annotations

import contextlib
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import FLOATS, Pid, Runs, forge, resave, storage, tensor, write_archive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import evaluate, read_torch, to_bytes

from weightops.errors import CorruptInput
from weightops.formats.torch.objects import TorchFile

ReadBody = Callable[..., TorchFile]


@pytest.fixture
def read_body(tmp_path: Path) -> ReadBody:
    """Reads an archive with a given pickle."""

    def read(body: bytes, data: bytes = FLOATS) -> TorchFile:
        path = tmp_path / "forged.bin"
        write_archive(path, [("archive/data.pkl", body), ("archive/version", b"3\n"), ("archive/data/0", data)])
        return read_torch(path)

    return read


def test_forged_archives_are_read_when_nothing_is_wrong(read_body: ReadBody) -> None:
    assert evaluate(read_body(forge({"w": tensor()})).tensors["w"]) == FLOATS


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "pip main",
        "pkgutil resolve_name",
        "operator methodcaller",
        "_interpreters run_string",
        "torch load",
    ],
)
def test_28_29_calls_are_refused_and_not_made(read_body: ReadBody, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(CorruptInput, match=f"asks to run `{name.replace(' ', '.')}`"):
        read_body(forge({"w": tensor(), "x": Runs(name, f"touch {canary}")}))
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("extra", ["archive/data.pkl", "other/data.pkl", "archive/data/0", "archive/version"])
def test_30_names_that_occur_twice_are_refused(tmp_path: Path, extra: str) -> None:
    path = tmp_path / "x.bin"
    body = forge({"w": tensor()})
    members = [("archive/data.pkl", body), ("archive/version", b"3\n"), ("archive/data/0", FLOATS), (extra, body)]
    write_archive(path, members)
    with pytest.raises(CorruptInput, match=r"two members are named|2 data\.pkl"):
        read_torch(path)


def valid(tmp_path: Path) -> tuple[Path, bytearray, int]:
    """A file of torch's, its bytes, and where its central directory begins."""
    path = tmp_path / "x.bin"
    torch.save({"w": torch.arange(6.0), "v": torch.ones(100)}, path)
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<Q", data, data.rindex(b"PK\6\6") + 48)
    return path, data, start


@pytest.mark.parametrize("pattern", [b"x/data.pkl", b"x/data/0", b"x/version"])
def test_30_local_names_that_differ_are_refused(tmp_path: Path, pattern: bytes) -> None:
    path, data, start = valid(tmp_path)
    at = data.index(pattern)
    assert at < start
    data[at] = ord("y")
    path.write_bytes(data)
    with pytest.raises(CorruptInput, match="another name or method in its local header"):
        read_torch(path)


def test_30_overlapping_members_are_refused(tmp_path: Path) -> None:
    path, data, start = valid(tmp_path)
    first = data.index(b"x/data/0", start) - 46
    second = data.index(b"x/data/1", start) - 46
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    with pytest.raises(CorruptInput, match=r"overlaps|another name"):
        read_torch(path)


@pytest.mark.parametrize("name", ["w", "part", "column"])
def test_31_flipped_bits_in_storages_are_noticed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.bin"
    whole = torch.arange(4000.0).reshape(40, 100)
    torch.save({"w": whole, "part": whole[:3], "column": whole[:, 3]}, path)
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<4f", 3000, 3001, 3002, 3003))
    data[at] ^= 1
    path.write_bytes(data)
    found = read_torch(path)
    with pytest.raises(CorruptInput, match="CRC-32"):
        evaluate(found.tensors[name], block=400)


@pytest.mark.parametrize("part", [b"torch._utils", b"little", b"3\n", b"FloatStorage"])
def test_31_flipped_bits_in_small_members_are_noticed(tmp_path: Path, part: bytes) -> None:
    path, data, _ = valid(tmp_path)
    data[data.index(part)] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptInput, match="CRC-32"):
        read_torch(path)


@pytest.mark.parametrize("data", [b"", FLOATS[:-1], FLOATS + b"\0"])
def test_32_storages_of_another_size_are_refused(read_body: ReadBody, data: bytes) -> None:
    with pytest.raises(CorruptInput, match=f"w: its storage should have 24 bytes, found {len(data)}"):
        read_body(forge({"w": tensor()}), data)


@pytest.mark.parametrize("numel", [1 << 60, 1 << 200, -1, True, None, "6", 6.0])
def test_32_absurd_storage_sizes_are_refused(read_body: ReadBody, numel: object) -> None:
    with pytest.raises(CorruptInput, match="a storage of unknown type, key or size"):
        read_body(forge({"w": tensor(storage(numel=numel))}))


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": (2, 4)},
        {"size": (3, 3)},
        {"offset": 1},
        {"offset": 1 << 60},
        {"offset": -1},
        {"size": (-2, 3)},
        {"size": (2, -3)},
        {"stride": (-3, 1)},
        {"stride": (4, 1)},
        {"stride": (1 << 62, 1)},
        {"stride": (3,)},
        {"size": [2, 3]},
        {"size": (True, 3)},
        {"size": (2.0, 3)},
        {"size": None},
        {"stride": None},
        {"offset": None},
        {"size": (1 << 63, 0)},
        {"size": (1,) * 65, "stride": (1,) * 65},
    ],
)
def test_33_views_that_leave_the_storage_are_refused(read_body: ReadBody, arguments: dict[str, Any]) -> None:
    with pytest.raises(CorruptInput, match="w: "):
        read_body(forge({"w": tensor(**arguments)}))


@pytest.mark.parametrize("size", [(1 << 40,), (7,), (1 << 20, 1 << 20)])
def test_34_expanded_tensors_are_refused(read_body: ReadBody, size: tuple[int, ...]) -> None:
    with pytest.raises(CorruptInput, match="expanded from a storage of 24"):
        read_body(forge({"w": tensor(size=size, stride=(0,) * len(size))}))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_35_compressed_members_are_refused(tmp_path: Path, method: int) -> None:
    path = tmp_path / "x.bin"
    members = [("archive/data.pkl", forge({"w": tensor()})), ("archive/data/0", bytes(1 << 24))]
    write_archive(path, members, method)
    with pytest.raises(CorruptInput, match=r"data\.pkl is compressed \(method \d+\), expected stored"):
        read_torch(path)


@pytest.mark.parametrize(
    "pid",
    [
        storage(key="../../x"),
        storage(key="1"),
        storage(key=""),
        storage(key=0),
        storage(key=None),
        storage(kind=None),
        storage(kind="torch.storage TypedStorage"),
        storage(kind="torch float32"),
        storage(kind="torch QInt8Storage"),
        Pid("module", 1, 2, 3, 4),
        Pid("storage"),
        Pid(*["storage"] * 5),
    ],
)
def test_36_other_persistent_ids_are_refused(read_body: ReadBody, pid: Pid) -> None:
    with pytest.raises(
        CorruptInput, match=r"a storage of unknown type, key or size|an unusual dtype|no storage|is not in the archive"
    ):
        read_body(forge({"w": tensor(pid)}))


def test_36_a_storage_of_two_types_is_refused(read_body: ReadBody) -> None:
    with pytest.raises(CorruptInput, match="storage 0 has"):
        read_body(forge({"w": tensor(), "v": tensor(storage(kind="torch IntStorage"))}))


def test_37_memo_bombs_are_skipped_without_walking_them(read_body: ReadBody) -> None:
    doubled = b"".join(b"(h%ch%clq%c0" % (i, i, i + 1) for i in range(60))
    body = b"\x80\x02]q\x000" + doubled + b"}X\x01\0\0\0wh\x3csX\x01\0\0\0vh\x3cs."
    assert read_body(body).extras == ("w", "v")


def test_37_truncated_pickles_are_refused(read_body: ReadBody) -> None:
    body = forge({"w": tensor()})
    for length in range(len(body)):
        with pytest.raises(CorruptInput, match=r"goes wrong at byte|is cut short"):
            read_body(body[:length])
    with pytest.raises(CorruptInput, match="1 bytes after its end"):
        read_body(body + b".")


@pytest.mark.parametrize("name", ["../../x", "/x", "archive/../x", "archive/a\\b", "other/x", "archive/\x1b[2J", "x"])
def test_38_members_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(1)}, path)
    resave(path, lambda members: [*members, (name, b"x")])
    with pytest.raises(CorruptInput, match=r"is not named by a plain path|lies outside") as caught:
        read_torch(path)
    assert "\x1b" not in str(caught.value)


def test_38_bytes_before_or_after_the_archive_are_refused(tmp_path: Path) -> None:
    path, data, _ = valid(tmp_path)
    for changed in (b"PK" + data, b"PK\3\4" * 16 + data, data + b"x", data + bytes(22), data[:-2] + b"\1\0x"):
        path.write_bytes(changed)
        with pytest.raises(CorruptInput, match="zip archive: "):
            read_torch(path)


def test_38_files_cut_short_anywhere_are_refused(tmp_path: Path) -> None:
    path, data, _ = valid(tmp_path)
    for length in [*range(0, len(data), 37), *range(len(data) - 100, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises(CorruptInput, match=r"no end record|not a file that torch.save wrote"):
            read_torch(path)


@pytest.mark.parametrize("field", [24, 32, 40, 48])
def test_38_absurd_counts_in_the_end_records_are_refused(tmp_path: Path, field: int) -> None:
    path, data, _ = valid(tmp_path)
    at = data.rindex(b"PK\6\6")
    end = data.rindex(b"PK\5\6")
    data[end + 8 : end + 20] = b"\xff" * 12
    for value in (0, 1 << 20, 1 << 40, (1 << 64) - 1):
        changed = bytearray(data)
        changed[at + field : at + field + 8] = struct.pack("<Q", value)
        path.write_bytes(changed)
        with pytest.raises(CorruptInput, match="zip archive: "):
            read_torch(path)


def test_38_two_end_records_that_say_different_places_are_refused(tmp_path: Path) -> None:
    """The locator names one zip64 record, and the bytes before it are another: readers would choose differently."""
    path, data, _ = valid(tmp_path)
    locator = data.rindex(b"PK\6\7")
    for at, value in ((4, 1), (8, 0), (8, data.rindex(b"PK\6\6") - 1), (16, 2), (16, 0)):
        changed = bytearray(data)
        struct.pack_into("<I" if at != 8 else "<Q", changed, locator + at, value)
        path.write_bytes(changed)
        with pytest.raises(CorruptInput, match="the zip64 end record is not where it should be"):
            read_torch(path)


@pytest.mark.parametrize(
    ("record", "field", "form"),
    [(b"PK\6\6", 4, "<Q"), (b"PK\5\6", 8, "<H"), (b"PK\5\6", 10, "<H"), (b"PK\5\6", 12, "<I")],
)
def test_38_end_records_that_contradict_each_other_are_refused(
    tmp_path: Path, record: bytes, field: int, form: str
) -> None:
    path, data, _ = valid(tmp_path)
    struct.pack_into(form, data, data.rindex(record) + field, 7)
    path.write_bytes(data)
    with pytest.raises(CorruptInput, match="the two end records contradict each other"):
        read_torch(path)


def test_38_local_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_archive(path, [("archive/data.pkl", forge({"w": tensor()})), ("archive/data/0", FLOATS)])
    data = bytearray(path.read_bytes())
    at = data.index(b"archive/data/0") - 30
    for field in (14, 18, 22):
        changed = bytearray(data)
        changed[at + field] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CorruptInput, match="24 in the central directory"):
            read_torch(path)


def test_quantized_tensors_are_refused(read_body: ReadBody) -> None:
    body = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_qtensor\n)Rs."
    with pytest.raises(CorruptInput, match=r"holds a quantised tensor.*_rebuild_qtensor"):
        read_body(body)


def test_39_torchscript_is_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    members = [("x/data.pkl", b"\x80\x02}."), ("x/code/__torch__.py", b""), ("x/constants.pkl", b"\x80\x02).")]
    write_archive(path, members)
    with pytest.raises(CorruptInput, match="a TorchScript program") as caught:
        read_torch(path)
    assert "torch.jit.load" in (caught.value.hint or "")


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(1)}, path)
    resave(path, lambda members: [(n, b"big" if n.endswith("byteorder") else d) for n, d in members])
    with pytest.raises(CorruptInput, match="byteorder is not little"):
        read_torch(path)


def test_a_zip_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_archive(path, [("a.txt", b"x")])
    with pytest.raises(CorruptInput, match=r"0 data\.pkl"):
        read_torch(path)
    write_archive(path, [])
    with pytest.raises(CorruptInput, match=r"0 data\.pkl in its folders, expected 1"):
        read_torch(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_damage_is_noticed_or_harmless(tmp_path: Path, random: Any) -> None:
    path = tmp_path / "x.bin"
    expected = {"w": torch.arange(6.0), "v": torch.ones(9, dtype=torch.int8), "t": torch.ones(2, 3).t()}
    torch.save(OrderedDict(expected), path)
    data = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 3)):
        data[random.randrange(len(data))] = random.randrange(256)
    path.write_bytes(data)
    with contextlib.suppress(CorruptInput):
        found = {n: t.spec for n, t in read_torch(path).tensors.items() if evaluate(t) != to_bytes(expected[n])}
        assert found == {}
