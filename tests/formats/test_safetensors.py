"""safetensors: byte-identical writing, reading equal to the library, and every malformed header refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from support import evaluate, same_bits, state_dicts, to_bytes

from weightops.errors import CorruptInput
from weightops.formats.folder import open_checkpoint
from weightops.formats.layout import Data, Layout, Literal
from weightops.formats.safetensors import safetensors_layout
from weightops.spec import DType, TensorSpec

_BY_NAME = {d.value: d for d in DType}


def render(layout: Layout, data: dict[str, bytes]) -> bytes:
    parts = []
    for piece in layout.pieces:
        assert isinstance(piece, (Literal, Data))
        parts.append(piece.data if isinstance(piece, Literal) else data[piece.name])
    return b"".join(parts)


@given(state_dicts(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=1))
def test_layout_is_byte_identical_to_save_file(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    specs = [(n, TensorSpec(_BY_NAME[str(t.dtype)[6:]], tuple(t.shape))) for n, t in tensors.items()]
    ours = render(safetensors_layout(specs, metadata), {n: to_bytes(t) for n, t in tensors.items()})
    assert ours == save(tensors, metadata or None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=state_dicts())
def test_reader_equals_safe_open(tmp_path: Path, tensors: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors))
    found = open_checkpoint(path)
    with safe_open(path, "pt") as reference:
        expected = {name: reference.get_tensor(name) for name in reference.keys()}  # noqa: SIM118
    assert same_bits(expected, tensors)
    assert {n: evaluate(t) for n, t in found.items()} == {n: to_bytes(t) for n, t in expected.items()}


def test_every_dtype_code_is_read(tmp_path: Path) -> None:
    dtypes = [d for d in DType if d.in_safetensors]
    layout = safetensors_layout([(d.name, TensorSpec(d, (8, 3))) for d in dtypes], {})
    path = tmp_path / "all.safetensors"
    path.write_bytes(render(layout, {d.name: bytes(TensorSpec(d, (8, 3)).nbytes) for d in dtypes}))
    assert {n: t.spec for n, t in open_checkpoint(path).items()} == {d.name: TensorSpec(d, (8, 3)) for d in dtypes}
    with safe_open(path, "np") as reference:
        assert {n: reference.get_slice(n).get_dtype() for n in reference.keys()} == {d.name: d.name for d in dtypes}  # noqa: SIM118


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def text(header: Any) -> bytes:
    return json.dumps(header).encode()


MALFORMED: dict[str, bytes | tuple[bytes, int]] = {
    "nothing": (b"", -1),
    "seven bytes": (b"1234567", -1),
    "length 2**63": (struct.pack("<Q", 2**63) + b"{}", -1),
    "length 2**64-1": (struct.pack("<Q", 2**64 - 1) + b"{}", -1),
    "length 100 MB + 1": (struct.pack("<Q", 100_000_001) + b"{}", -1),
    "length beyond the end": (struct.pack("<Q", 3) + b"{}", -1),
    "length 0": (struct.pack("<Q", 0), -1),
    "array": b"[]",
    "not JSON": b"{nope",
    "not UTF-8": b'{"\xff":1}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "leading spaces": b"  {}",
    "trailing NUL": b"{}\0\0",
    "duplicate tensor": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
    b'"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
    "duplicate field": b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "overlap": text({"a": entry(), "b": entry()}),
    "partial overlap": text({"a": entry(), "b": entry(offsets=(2, 6))}),
    "gap": text({"a": entry(shape=(1,), offsets=(0, 1)), "b": entry(shape=(1,), offsets=(3, 4))}),
    "gap at the start": text({"a": entry(shape=(3,), offsets=(1, 4))}),
    "reversed offsets": text({"a": entry(offsets=(4, 0))}),
    "truncated data": text({"a": entry(shape=(9,), offsets=(0, 9))}),
    "trailing bytes": text({"a": entry(shape=(2,), offsets=(0, 2))}),
    "product overflows": text({"a": entry(shape=(2**40, 2**40))}),
    "huge with a zero": text({"a": entry(shape=(2**63, 0), offsets=(0, 0)), "b": entry()}),
    "negative size": text({"a": entry(shape=(-4,))}),
    "fractional size": text({"a": entry(shape=(4.0,))}),
    "boolean size": text({"a": entry(shape=(True, 4))}),
    "size as text": text({"a": entry(shape=("4",))}),
    "a million dimensions": text({"a": entry(shape=[1] * 1_000_000 + [4])}),
    "offset 2**64": text({"a": entry(offsets=(0, 2**64))}),
    "negative offset": text({"a": entry(offsets=(-4, 0))}),
    "three offsets": text({"a": entry(offsets=(0, 2, 4))}),
    "fractional offset": text({"a": entry(offsets=(0.0, 4.0))}),
    "unknown dtype": text({"a": entry(dtype="F17")}),
    "lower-case dtype": text({"a": entry(dtype="u8")}),
    "dtype of torch files only": text({"a": entry(dtype="C128", shape=(0,), offsets=(0, 0)), "b": entry()}),
    "dtype not text": text({"a": entry(dtype=["U8"])}),
    "unknown field": text({"a": entry(extra=1)}),
    "missing field": text({"a": {"dtype": "U8", "shape": [4]}}),
    "metadata of numbers": text({"__metadata__": {"a": 1}, "a": entry()}),
    "nested metadata": text({"__metadata__": {"a": {}}, "a": entry()}),
    "metadata a list": text({"__metadata__": [], "a": entry()}),
    "depth 100k": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "number of 10k digits": b'{"a":{"dtype":"U8","shape":[' + b"1" * 10_000 + b'],"data_offsets":[0,4]}}',
    "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}',
    "lone surrogate": b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "odd 4-bit count": text({"a": entry(dtype="F4", shape=(7,))}),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", -1),
    "HTML": (b"<!DOCTYPE html><html><body>login</body></html>", -1),
    "zip": (b"PK\x03\x04" + bytes(60), -1),
    "GGUF": (b"GGUF" + bytes(60), -1),
}


def malformed_file(content: bytes | tuple[bytes, int]) -> bytes:
    if isinstance(content, tuple):
        return content[0]
    return struct.pack("<Q", len(content)) + content + b"data"


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_headers_are_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(malformed_file(MALFORMED[fault]))
    with pytest.raises(CorruptInput, match=r"model\.safetensors: ") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "word"), [("Git LFS pointer", "git lfs pull"), ("HTML", "login"), ("zip", ".bin"), ("GGUF", "original")]
)
def test_files_of_another_kind_get_a_hint(tmp_path: Path, fault: str, word: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(malformed_file(MALFORMED[fault]))
    with pytest.raises(CorruptInput, match="this is a") as caught:
        open_checkpoint(path)
    assert word in str(caught.value.hint)


def test_null_metadata_and_misaligned_offsets_are_accepted(tmp_path: Path) -> None:
    header = {
        "__metadata__": None,
        "a": entry(shape=(1,), offsets=(0, 1)),
        "b": entry(dtype="F32", shape=(1,), offsets=(1, 5)),
    }
    path = tmp_path / "model.safetensors"
    content = text(header)
    path.write_bytes(struct.pack("<Q", len(content)) + content + b"xdata")
    assert evaluate(open_checkpoint(path)["b"]) == b"data"


def test_names_are_data(tmp_path: Path) -> None:
    odd = ["", "\0", "\x1b[2J", "\u202e", "../../etc/passwd", "x" * 1_000_000]
    header = {name: entry(shape=(0,), offsets=(0, 0)) for name in odd} | {"z": entry()}
    content = text(header)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content + b"data")
    assert set(open_checkpoint(path)) == {*odd, "z"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), position=st.integers(0, 150), length=st.integers(0, 20))
def test_fuzzed_headers_are_read_or_refused(tmp_path: Path, data: bytes, position: int, length: int) -> None:
    good = bytearray(malformed_file(text({"__metadata__": {"format": "pt"}, "w": entry(shape=(2, 2))})))
    good[position : position + length] = data
    path = tmp_path / "model.safetensors"
    path.write_bytes(good)
    try:
        found = open_checkpoint(path)
    except CorruptInput:
        return
    assert sum(t.nbytes for t in found.values()) <= len(good)
