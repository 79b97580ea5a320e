"""Importance matrices as llama-quantize takes them, in both forms, and what is none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightops.errors import CorruptInput, UsageError, WeightopsError
from weightops.formats.gguf.imatrix import ImportanceMatrix, read_imatrix
from weightops.io.source_file import SourceFile
from weightops.lazy import Evaluator

GOLDEN = Path(__file__).parents[2] / "golden" / "imatrix"


def read(path: Path) -> ImportanceMatrix:
    return read_imatrix(SourceFile.at(path))


def values(path: Path) -> dict[str, np.ndarray]:
    with Evaluator() as evaluate:
        return {
            name: np.frombuffer(evaluate.whole(tensor), np.float32).reshape(tensor.spec.shape)
            for name, tensor in read(path).weights.items()
        }


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_both_forms_are_what_llama_quantize_takes(form: str) -> None:
    found = read(GOLDEN / f"imatrix.{form}")
    expected = json.loads((GOLDEN / "weights.json").read_text())[form]
    means = values(GOLDEN / f"imatrix.{form}")
    digests = {name: hashlib.sha256(mean.tobytes()).hexdigest() for name, mean in means.items()}
    assert digests == {name: entry["sha256"] for name, entry in expected.items()}
    assert {mean.ndim for mean in means.values()} == {1}
    assert (found.datasets, found.chunks) == (("calibration.txt",), 37)


def write(path: Path, kind: str, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_each_expert_has_a_row_and_those_never_asked_have_ones(tmp_path: Path) -> None:
    sums = np.array([[2, 4, 6], [5, 5, 5]], np.float32)
    counts = np.array([[2], [0]], np.float32)
    path = write(tmp_path / "a.gguf", "imatrix", {"w.in_sum2": sums, "w.counts": counts})
    assert values(path)["w"].tolist() == [[1, 2, 3], [1, 1, 1]]


def dat(*entries: tuple[bytes, int, list[float]], tail: bytes = b"") -> bytes:
    found = struct.pack("<i", len(entries))
    for name, calls, sums in entries:
        found += struct.pack(f"<i{len(name)}sii{len(sums)}f", len(name), name, calls, len(sums), *sums)
    return found + tail


def test_a_dat_without_calls_or_ending_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(dat((b"a", 2, [1, 3]), (b"b", 0, [1, 3])))
    assert {name: mean.tolist() for name, mean in values(path).items()} == {"a": [0.5, 1.5], "b": [1, 3]}
    assert (read(path).datasets, read(path).chunks) == ((), 0)


def test_what_is_no_importance_matrix_is_refused(tmp_path: Path) -> None:
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(UsageError, match=r"is no importance matrix: .* is model"):
        read(write(tmp_path / "model.gguf", "model", {"w": ones}))
    for name, tensors in {
        "lone": {"w.in_sum2": ones},
        "counts": {"w.in_sum2": ones, "w.counts": ones},
        "empty": {"w.counts": ones},
        "half": {"w.in_sum2": ones.astype(np.float16), "w.counts": ones[:, :1]},
    }.items():
        with pytest.raises(CorruptInput, match=rf"{name}\.gguf: "):
            read(write(tmp_path / f"{name}.gguf", "imatrix", tensors))
    for i, data in enumerate(
        [
            b"",
            b"abc",
            dat(),
            dat((b"a", 1, [1])) + b"x",
            dat((b"a", 1, [1]), (b"a", 1, [2])),
            dat((b"\xff", 1, [1])),
            b"\xff" * 40,
        ]
    ):
        path = tmp_path / f"{i}.dat"
        path.write_bytes(data)
        with pytest.raises(CorruptInput, match=rf"{i}\.dat: "):
            read(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=9), position=st.integers(0, 300), stop=st.integers(0, 8000))
def test_spoilt_and_cut_files_are_read_or_refused(tmp_path: Path, data: bytes, position: int, stop: int) -> None:
    for form in ("gguf", "dat"):
        good = bytearray((GOLDEN / f"imatrix.{form}").read_bytes()[:stop])
        good[position : position + len(data)] = data
        path = tmp_path / f"imatrix.{form}"
        path.write_bytes(good)
        with contextlib.suppress(WeightopsError):
            assert read(path).weights
