"""Compressed deltas as files: a reader that knows docs/formats.md alone, and files that lie."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from support import write_checkpoint

import weightops
from weightops.cli.main import run
from weightops.errors import CorruptInput, UsageError
from weightops.formats.compressed import MAGIC, MAX_BLOCKS, compressed_layout, read_compressed
from weightops.io.source_file import SourceFile
from weightops.lazy import LazyTensor
from weightops.ops.stored import Stored
from weightops.spec import DType
from weightops.stores.reader import FileReader

MIB = 1 << 20
SIZES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}


def plain_file(data: bytes) -> bytes:
    """The safetensors file that a compressed delta stands for. Nothing of weightops is used here."""
    if data[:8] != b"WDELTA\x00\x01":
        raise ValueError("no compressed delta")
    (header_nbytes,) = struct.unpack_from("<Q", data, 8)
    header = json.loads(data[16 : 16 + header_nbytes])
    tensors = sorted((t for n, t in header.items() if n != "__metadata__"), key=lambda t: t["data_offsets"])
    blocks = []
    for tensor in tensors:
        begin, end = tensor["data_offsets"]
        blocks += [(SIZES[tensor["dtype"]], min(MIB, end - at)) for at in range(begin, end, MIB)]
    lengths = struct.unpack(f"<{len(blocks)}I", data[len(data) - 4 * len(blocks) :])
    position = 16 + header_nbytes
    plain = [data[8:position]]
    for (itemsize, nbytes), length in zip(blocks, lengths, strict=True):
        coded = data[position : position + length]
        position += length
        if length == 0:
            plain.append(bytes(nbytes))
        elif length == nbytes:
            plain.append(coded)
        else:
            planes = zstandard.ZstdDecompressor().decompress(coded, max_output_size=nbytes)
            block = bytearray(nbytes)
            for i in range(itemsize):
                block[i::itemsize] = planes[i * nbytes // itemsize : (i + 1) * nbytes // itemsize]
            plain.append(bytes(block))
    return b"".join(plain)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw, tuned, and their delta plain and compressed: blocks of all three kinds, tensors of several blocks."""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    raw = {
        "tuned": torch.randn(700, 1024).bfloat16(),
        "same": torch.randn(600, 1024).half(),
        "noise": torch.zeros(300, 1024),
        "small": torch.randn(7),
        "empty": torch.zeros(0, 5),
    }
    tuned = {name: tensor.clone() for name, tensor in raw.items()}
    tuned["tuned"] = (raw["tuned"].float() * (1 + 0.01 * torch.randn(700, 1024))).bfloat16()
    noise = bytearray(np.random.default_rng(0).bytes(1200 * 1024))
    tuned["noise"] = torch.frombuffer(noise, dtype=torch.float32).reshape(300, 1024)
    tuned["small"] = raw["small"] + 1
    write_checkpoint(folder / "raw", raw)
    write_checkpoint(folder / "tuned", tuned)
    weightops.diff(folder / "raw", folder / "tuned", folder / "plain")
    weightops.diff(folder / "raw", folder / "tuned", folder / "small", compress=True)
    return folder


def test_a_reader_that_knows_the_page_alone_finds_the_plain_delta(family: Path) -> None:
    data = (family / "small/delta.wdelta").read_bytes()
    assert plain_file(data) == (family / "plain/delta.safetensors").read_bytes()


def wdelta(header: dict[str, object] | bytes, blocks: list[bytes], lengths: list[int] | None = None) -> bytes:
    """A file of these parts, whether they go together or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    table = struct.pack(f"<{len(lengths or blocks)}I", *(lengths or map(len, blocks)))
    return MAGIC + struct.pack("<Q", len(text)) + text + b"".join(blocks) + table


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONES = bytes.fromhex("28b52ffd20405d0000180101000200a01122c002")
"""32 elements of 16 bits, each 1: a plane of ones and a plane of zeros, as zstd 1.5.7 has made it smaller."""
HEADER = {"a": entry("U16", [32], 0, 64), "b": entry("U8", [9], 64, 73), "c": entry("U32", [2], 73, 81)}
BLOCKS = [ONES, b"nine more", b""]


def test_a_file_of_the_first_version_is_read_for_ever(tmp_path: Path) -> None:
    (tmp_path / "delta.wdelta").write_bytes(wdelta(HEADER, BLOCKS))
    found = weightops.open_checkpoint(tmp_path / "delta.wdelta")
    assert {n: bytes(t.read()) for n, t in found.items()} == {"a": b"\x01\x00" * 32, "b": b"nine more", "c": bytes(8)}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not begin as a compressed delta"),
        (MAGIC, "too short|is too short"),
        (b"WDELTA\x00\x02" + wdelta(HEADER, BLOCKS)[8:], "another version"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (MAGIC + struct.pack("<Q", 1 << 62) + b"{}", "header of 4611686018427387904 bytes"),
        (wdelta(b"[]", []), "does not begin with '{'"),
        (wdelta(b'{"a":1}', []), "expected exactly dtype, shape and data_offsets"),
        (wdelta({"a": entry("U16", [32], 0, 64), "b": entry("U8", [9], 60, 69)}, BLOCKS[:2]), "overlaps"),
        (wdelta({"a": entry("U16", [33], 0, 64)}, [ONES]), "its offsets span 64 bytes"),
        (wdelta({"a": entry("F99", [32], 0, 64)}, [ONES]), "unknown dtype"),
        (wdelta(HEADER, BLOCKS)[:-1], "its blocks take|takes"),
        (wdelta(HEADER, BLOCKS) + b"\x00", "its blocks take|takes"),
        (wdelta(HEADER, BLOCKS)[:100], "too few for|header of"),
        (wdelta(HEADER, BLOCKS, [20, 8, 0]), "its blocks take 28 bytes, found 29"),
        (wdelta(HEADER, BLOCKS, [65, 9, 0]), "block 0 takes 65 bytes, and holds 64"),
        (wdelta(HEADER, BLOCKS, [20, 9, 4294967295]), "block 2 takes 4294967295 bytes, and holds 8"),
        (wdelta({"a": entry("U8", [1 << 47], 0, 1 << 47)}, [b""] * 64), "describes 134217728 blocks"),
        (wdelta({"a": entry("U8", [1 << 25], 0, 1 << 25)}, [b"x"] * 31), "takes [0-9]+ bytes, and holds 1048576"),
    ],
)
def test_a_file_that_does_not_account_for_every_byte_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "delta.wdelta"
    path.write_bytes(data)
    with FileReader() as files, pytest.raises(CorruptInput, match=words):
        read_compressed(SourceFile.at(path), files)


def read_all(path: Path) -> dict[str, int]:
    return {name: len(tensor.read()) for name, tensor in weightops.open_checkpoint(path).items()}


def test_a_file_that_ends_early_is_refused_wherever_that_is(tmp_path: Path) -> None:
    whole, path = wdelta(HEADER, BLOCKS), tmp_path / "delta.wdelta"
    for nbytes in range(len(whole)):
        path.write_bytes(whole[:nbytes])
        with pytest.raises(CorruptInput, match=r"delta\.wdelta"):
            read_all(path)


@given(st.data())
def test_damage_anywhere_is_refused_or_leaves_every_tensor_its_size(data: st.DataObject) -> None:
    """Bytes changed, taken out and put in, at every place of a file: nothing but the one error comes of it."""
    damaged = bytearray(wdelta(HEADER, BLOCKS))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.wdelta"
        path.write_bytes(damaged)
        with contextlib.suppress(CorruptInput), FileReader() as files:
            found = read_compressed(SourceFile.at(path), files).tensors
            assert {len(tensor.read()) == tensor.nbytes for tensor in found.values()} <= {True}


def test_more_blocks_than_are_read_are_not_written_either(tmp_path: Path) -> None:
    nbytes = (MAX_BLOCKS + 1) << 20
    path = tmp_path / "delta.wdelta"
    path.write_bytes(wdelta({"a": entry("U8", [nbytes], 0, nbytes)}, []))
    os.truncate(path, path.stat().st_size + 4 * (MAX_BLOCKS + 1))  # each takes nothing, so that it is a whole file
    with pytest.raises(CorruptInput, match="describes 4194305 blocks, at most 4194304 are read"):
        read_all(path)
    huge = LazyTensor.make(Stored(SourceFile("x", nbytes, 0), 0, DType.U8, (nbytes,)))
    with pytest.raises(UsageError, match="at most 4194304 blocks"):
        compressed_layout("delta.wdelta", {"a": huge}, {})


def test_a_compressed_delta_under_another_name_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(wdelta(HEADER, BLOCKS))
    with pytest.raises(CorruptInput, match="this is a compressed delta"):
        weightops.open_checkpoint(tmp_path)


def other_frame(nbytes: int) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(nbytes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frame: bytes(len(frame)), "no block of a compressed delta: zstd says"),
        (lambda frame: other_frame(1 << 30), "says that it holds 1073741824 bytes, expected 1048576"),
        (lambda frame: other_frame(1 << 20), "the delta is damaged: it does not give tuned as it was"),
        (lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]), "no block|the delta is damaged: it does not give tuned"),
    ],
    ids=["no frame", "a bomb", "another frame", "one bit"],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_damaged_block_is_one_sentence_and_nothing_is_published(
    family: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[bytes], bytes],
    words: str,
    workers: int,
) -> None:
    """In the place of the first block of `tuned`, of which all offsets and lengths are set right."""
    data = (family / "small/delta.wdelta").read_bytes()
    (header_nbytes,) = struct.unpack_from("<Q", data, 8)
    header = json.loads(data[16 : 16 + header_nbytes])
    start = 16 + header_nbytes
    counts = {n: -(-(t["data_offsets"][1] - t["data_offsets"][0]) // MIB) for n, t in header.items() if n[:2] != "__"}
    blocks = sum(counts.values())
    lengths = list(struct.unpack(f"<{blocks}I", data[-4 * blocks :]))
    order = sorted(counts, key=lambda n: header[n]["data_offsets"])
    at = sum(counts[n] for n in order[: order.index("tuned")])
    offset = start + sum(lengths[:at])
    put = change(data[offset : offset + lengths[at]])
    rest = data[offset + lengths[at] : -4 * blocks]
    lengths[at] = len(put)
    folder = tmp_path / "delta"
    folder.mkdir()
    for name in ("weightops-delta.json", "config.json"):
        (folder / name).write_bytes((family / "small" / name).read_bytes())
    (folder / "delta.wdelta").write_bytes(data[:offset] + put + rest + struct.pack(f"<{blocks}I", *lengths))
    command = ["recover", "--raw", str(family / "raw"), "--diff", str(folder), "--out", str(tmp_path / "out")]
    assert run([*command, "--workers", str(workers)]) == 13
    said = capsys.readouterr().err
    assert any(word in said for word in words.split("|")), said
    assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"delta"}
