"""GGUF: byte-identical writing, reading equal to gguf's own reader, and every malformed header refused."""

from __future__ import annotations

import argparse
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.scripts.gguf_convert_endian import convert_byteorder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import evaluate

from weightops.errors import CorruptInput, UsageError, WeightopsError
from weightops.formats.gguf import GgufFile, gguf_layout, read_gguf
from weightops.formats.layout import Data, Layout, Literal
from weightops.io.source_file import SourceFile
from weightops.spec import DType, TensorSpec
from weightops.stores.reader import FileReader

DTYPES = [DType[kind.name] for kind in gguf.GGMLQuantizationType if kind.name != "Q8_1"]
"""Of Q8_1, which no file has, gguf takes blocks to have 40 bytes; to ggml they have 36."""
INTEGERS = {f"{sign}int{bits}": bits for bits in (8, 16, 32, 64) for sign in ("u", "")}

integers = {
    kind: st.integers(0, 2**bits - 1) if kind[0] == "u" else st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for kind, bits in INTEGERS.items()
}
scalars = integers | {
    "float32": st.floats(width=32, allow_nan=False),
    "float64": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "string": st.text(st.characters(codec="utf-8"), max_size=9),
}
values = st.one_of(
    *[st.fixed_dictionaries({kind: value}) for kind, value in scalars.items()],
    *[
        st.fixed_dictionaries({"array": st.tuples(st.just(kind), st.lists(value, min_size=1, max_size=5)).map(list)})
        for kind, value in scalars.items()
    ],
)
metadatas = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), values, max_size=6).map(
    lambda pairs: {"general.architecture": {"string": "llama"}, **pairs}
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=15)


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    block = dtype.block[0] if dtype.is_packed else draw(st.integers(1, 7))
    return TensorSpec(dtype, (*shape, block * draw(st.integers(1, 2))))


tensor_lists = st.dictionaries(names, specs(), max_size=5).map(lambda found: list(found.items()))


def content(name: str, spec: TensorSpec) -> bytes:
    return np.random.default_rng(len(name) + spec.nbytes).bytes(spec.nbytes)


def render(layout: Layout, tensors: list[tuple[str, TensorSpec]]) -> bytes:
    by_name = dict(tensors)
    parts = []
    for piece in layout.pieces:
        assert isinstance(piece, Literal | Data)
        parts.append(piece.data if isinstance(piece, Literal) else content(piece.name, by_name[piece.name]))
    return b"".join(parts)


def reference(path: Path, tensors: list[tuple[str, TensorSpec]], metadata: dict[str, Any]) -> bytes:
    """The file that GGUFWriter writes."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        ((kind, item),) = value.items()
        if kind == "array":
            writer.add_key_value(key, item[1], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[item[0].upper()])
        elif key != "general.architecture":
            writer.add_key_value(key, item, gguf.GGUFValueType[kind.upper()])
        if key == "general.alignment":
            writer.data_alignment = item
    for name, spec in tensors:
        code = gguf.GGMLQuantizationType[spec.dtype.name]
        data = np.frombuffer(content(name, spec), np.int8)
        writer.add_tensor(name, data, raw_shape=spec.shape, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def read(path: Path) -> GgufFile:
    with FileReader() as files:
        return read_gguf(SourceFile.at(path), files)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=tensor_lists, metadata=metadatas, alignment=st.sampled_from([None, 8, 128]))
def test_layout_is_byte_identical_to_the_writer_of_gguf_and_read_back(
    tmp_path: Path, tensors: list[tuple[str, TensorSpec]], metadata: dict[str, Any], alignment: int | None
) -> None:
    if alignment:
        metadata = {**metadata, "general.alignment": {"uint32": alignment}}
    path = tmp_path / "model.gguf"
    expected = reference(path, tensors, metadata)
    assert render(gguf_layout(tensors, metadata), tensors) == expected
    found = read(path)
    assert found.metadata == metadata
    assert {name: tensor.spec for name, tensor in found.tensors.items()} == dict(tensors)
    assert {n: evaluate(t) for n, t in found.tensors.items()} == {n: content(n, s) for n, s in tensors}


def test_the_reader_of_gguf_finds_the_same(tmp_path: Path) -> None:
    tensors = [(f"blk.{i}.weight", TensorSpec(dtype, (3, 1, 256))) for i, dtype in enumerate(DTYPES)]
    metadata = {
        "a.number": {"uint32": 7},
        "a.text": {"string": "\u2581x"},
        "general.architecture": {"string": "llama"},
        "some.scores": {"array": ["float32", [0.5, -1.25]]},
        "some.tokens": {"array": ["string", ["", "a", "\u4e2d"]]},
        "a.flag": {"bool": True},
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(render(gguf_layout(tensors, metadata), tensors))
    theirs, ours = gguf.GGUFReader(path), read(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert next(iter(fields)) == "general.architecture"
    plain = {key: value.get("array", [None, *value.values()])[1] for key, value in metadata.items()}
    assert fields == plain
    for tensor in theirs.tensors:
        lazy = ours.tensors[tensor.name]
        assert (tensor.tensor_type.name, *tensor.shape[::-1]) == (lazy.spec.dtype.name, *lazy.spec.shape)
        assert tensor.data.tobytes() == evaluate(lazy)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(name: bytes = b"w", shape: tuple[int, ...] = (8,), code: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def with_data(head: bytes, nbytes: int = 32) -> bytes:
    return head + bytes(-len(head) % 32 + nbytes)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return pair(b"a", 9, struct.pack("<IQ", kind, count) + data)


HUGE = 2**64 - 1
MALFORMED = {
    "nothing": b"",
    "magic alone": b"GGUF",
    "another magic": b"GGML" + bytes(60),
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "version 1": header(version=1),
    "version 4, big-endian": b"GGUF" + struct.pack(">IQQ", 4, 0, 0),
    "big-endian, cut": b"GGUF" + struct.pack(">IQQ", 3, 0, 1),
    "2**64-1 tensors": header(tensors=HUGE),
    "2**64-1 keys": header(keys=HUGE),
    "250,001 tensors": header(bytes(1 << 20), tensors=250_001),
    "fewer tensors than counted": with_data(header(info(), tensors=2)),
    "key of 2**64-1 bytes": header(struct.pack("<Q", HUGE), keys=1),
    "key not UTF-8": header(pair(b"\xff", 0, b"\0"), keys=1),
    "key twice": header(pair(b"a", 0, b"\0") * 2, keys=2),
    "unknown value type": header(pair(b"a", 13, b"\0" * 8), keys=1),
    "value cut": header(pair(b"a", 12, b"\0" * 7), keys=1),
    "bool 2": header(pair(b"a", 7, b"\2"), keys=1),
    "string longer than the file": header(pair(b"a", 8, struct.pack("<Q", 1 << 20)), keys=1),
    "string not UTF-8": header(pair(b"a", 8, string(b"\xc3(")), keys=1),
    "array of texts not UTF-8": header(array(8, 2, string(b"a") + string(b"\xc3")), keys=1),
    "array of halves of a character": header(array(8, 2, string(b"\xc3") + string(b"\xa9")), keys=1),
    "array of texts, one of 2**64-1": header(array(8, 2, string(b"a") + struct.pack("<Q", HUGE)), keys=1),
    "65,537 keys": header(bytes(1 << 20), keys=65_537),
    "arrays of 2**23 in all": header(array(0, 1 << 22, bytes(1 << 22)), array(0, 1 << 22), keys=2),
    "array of 2**64-1": header(array(0, HUGE), keys=1),
    "array longer than the file": header(array(4, 1 << 20), keys=1),
    "array of empty strings": header(array(8, 1 << 40, bytes(1 << 16)), keys=1),
    "array of arrays": header(array(9, 1, struct.pack("<IQB", 0, 1, 0)), keys=1),
    "array of an unknown type": header(array(99, 1, bytes(8)), keys=1),
    "bools of 0 and 3": header(array(7, 2, b"\0\3"), keys=1),
    "alignment 0": with_data(header(pair(b"general.alignment", 4, bytes(4)), info(), keys=1, tensors=1)),
    "alignment 24": with_data(header(pair(b"general.alignment", 4, b"\x18\0\0\0"), info(), keys=1, tensors=1)),
    "alignment as text": with_data(header(pair(b"general.alignment", 8, string(b"32")), info(), keys=1, tensors=1)),
    "name of 64 bytes": with_data(header(info(b"x" * 64), tensors=1)),
    "name with NUL": with_data(header(info(b"x\0y"), tensors=1)),
    "tensor twice": with_data(header(info() * 2, tensors=2)),
    "five dimensions": with_data(header(info(shape=(8, 1, 1, 1, 1)), tensors=1)),
    "2**32-1 dimensions": header(string(b"w"), struct.pack("<I", 2**32 - 1), bytes(99), tensors=1),
    "size 2**64-1": with_data(header(info(shape=(HUGE,)), tensors=1)),
    "sizes that overflow": with_data(header(info(shape=(1 << 40, 1 << 40)), tensors=1)),
    "huge with a zero": with_data(header(info(shape=(1 << 63, 0)), tensors=1)),
    "unknown type": with_data(header(info(code=99), tensors=1)),
    "half a block": with_data(header(info(shape=(16, 2), code=8), tensors=1)),
    "no dimension for blocks": with_data(header(info(shape=(), code=8), tensors=1)),
    "offset 2**64-1": with_data(header(info(offset=HUGE), tensors=1)),
    "offset unaligned": with_data(header(info(offset=8), tensors=1), 64),
    "offset over another": with_data(header(info(b"a") + info(b"b"), tensors=2), 64),
    "gap": with_data(header(info(b"a") + info(b"b", offset=64), tensors=2), 96),
    "truncated data": with_data(header(info(), tensors=1), 31),
    "trailing bytes": with_data(header(info(), tensors=1), 33),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_headers_are_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(MALFORMED[fault])
    with pytest.raises(CorruptInput, match=r"model\.gguf: ") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_headers_that_are_spoilt_above_are_good_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for good in (
        header(),
        header(version=2),
        with_data(header(info(), tensors=1)),
        with_data(header(info(b"a") + info(b"b", offset=32), tensors=2), 64),
        with_data(header(info(b"x" * 63, shape=()), tensors=1), 4),
        header(pair(b"a", 7, b"\1"), array(7, 2, b"\0\1").replace(b"a", b"b", 1), keys=2),
    ):
        path.write_bytes(good)
        read(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.binary(max_size=12), position=st.integers(0, 330), length=st.integers(0, 12), stop=st.integers(0, 700))
def test_spoilt_and_cut_files_are_read_or_refused(
    tmp_path: Path, data: bytes, position: int, length: int, stop: int
) -> None:
    tensors = [("a", TensorSpec(DType.F16, (3, 5))), ("b", TensorSpec(DType.Q4_0, (2, 64)))]
    metadata = {
        "general.alignment": {"uint32": 32},
        "some.tokens": {"array": ["string", ["x", "y"]]},
        "some.types": {"array": ["bool", [True, False]]},
        "a.name": {"string": "abc"},
    }
    good = bytearray(render(gguf_layout(tensors, metadata), tensors))
    good[position : position + length] = data
    path = tmp_path / "model.gguf"
    path.write_bytes(good[:stop])
    try:
        found = read(path)
    except WeightopsError:
        return
    assert sum(tensor.nbytes for tensor in found.tensors.values()) <= len(good)


@pytest.mark.parametrize(("code", "kind"), [(4, "Q4_2"), (33, "Q4_0_8_8"), (36, "IQ4_NL_4_4")])
def test_types_that_ggml_has_no_longer_are_named(tmp_path: Path, code: int, kind: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(with_data(header(info(b"blk.0.attn_q.weight", (256, 4), code=code), tensors=1), 576))
    with pytest.raises(UsageError, match=rf"blk\.0\.attn_q\.weight: is {kind}"):
        read(path)


def test_files_of_big_endian_machines_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned round by llama.cpp's own script, for the types that it knows."""
    kinds = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4", "NVFP4")
    tensors = [(f"blk.{kind}", TensorSpec(DType[kind], (2, 256))) for kind in kinds]
    metadata = {
        "general.architecture": {"string": "llama"},
        "some.tokens": {"array": ["string", ["x", "\u4e2d"]]},
        "some.scores": {"array": ["float32", [0.5, -1.25]]},
        "a.number": {"int64": -7},
        "a.flag": {"bool": True},
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(render(gguf_layout(tensors, metadata), tensors))
    little = read(path)
    held = {name: evaluate(tensor) for name, tensor in little.tensors.items()}
    monkeypatch.setattr("builtins.input", lambda _: "YES")
    convert_byteorder(gguf.GGUFReader(path, "r+"), argparse.Namespace(order="big", dry_run=False))
    assert path.read_bytes()[4:8] == b"\0\0\0\3"
    big = read(path)
    assert big.metadata == metadata
    assert {name: evaluate(tensor) for name, tensor in big.tensors.items()} == held


def test_a_type_whose_bytes_cannot_be_turned_round_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    info = struct.pack(">Q", 1) + b"w" + struct.pack(">IQIQ", 1, 256, 16, 0)
    path.write_bytes(with_data(b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + info, 66))
    with pytest.raises(UsageError, match="w: is iq2_xxs in a file of a big-endian machine"):
        read(path)


def test_only_the_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec(DType.F32, (1 << 16, 1 << 14))
    texts = [f"token {i}" for i in range(50_000)]
    layout = gguf_layout([("w", spec)], {"some.tokens": {"array": ["string", texts]}})
    head = layout.pieces[0]
    assert isinstance(head, Literal)
    path = tmp_path / "model.gguf"
    path.write_bytes(head.data)
    os.truncate(path, layout.nbytes)
    asked: list[int] = []
    original = FileReader.read_into
    monkeypatch.setattr(FileReader, "read_into", lambda *a: asked.append(len(a[3])) or original(*a))
    assert read(path).tensors["w"].spec == spec
    assert sum(asked) < 3 * len(head.data)


@pytest.mark.parametrize(
    ("name", "spec", "value", "word"),
    [
        ("w", TensorSpec(DType.F8_E4M3, (4,)), 1, "float8_e4m3fn"),
        ("w" * 64, TensorSpec(DType.F32, (4,)), 1, "63 bytes"),
        ("w", TensorSpec(DType.F32, (1,) * 5), 1, "cannot hold"),
        ("w", TensorSpec(DType.Q8_0, (64, 16)), 1, "cannot hold"),
        ("w", TensorSpec(DType.F32, (4,)), 2**32, "a.number"),
        ("w", TensorSpec(DType.F32, (4,)), "1", "a.number"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(name: str, spec: TensorSpec, value: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        gguf_layout([(name, spec)], {"a.number": {"uint32": value}})
