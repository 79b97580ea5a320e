"""torch's files from before 1.6, and files that are none of torch's."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forgery import FLOATS, Name, Pid, Runs, forge, storage, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import evaluate, read_torch, to_bytes

from weightops.errors import CorruptInput, SourceMissing
from weightops.formats.torch.objects import TorchFile

GOLDEN = Path(__file__).parents[2] / "golden" / "torch-1.12"
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def save(value: object, path: Path, protocol: int = 2) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)


def state_dict() -> dict[str, torch.Tensor]:
    base = torch.arange(60, dtype=torch.float64).reshape(3, 4, 5)
    return {
        "whole": base,
        "slice": base[1:, 2:, ::2],
        "transposed": base.transpose(0, 2),
        "parameter": torch.nn.Parameter(base[:, 0]),
        "half": base.to(torch.bfloat16),
        "scalar": torch.tensor(True),
        "empty": torch.empty(2, 0),
        "fp8": base.to(torch.float8_e5m2)[2],
    }


def assert_equal(found: TorchFile, expected: dict[str, torch.Tensor]) -> None:
    assert list(found.tensors) == list(expected)
    for name, lazy in found.tensors.items():
        assert f"torch.{lazy.spec.dtype.value}" == str(expected[name].dtype)
        assert lazy.spec.shape == expected[name].shape
        assert evaluate(lazy) == to_bytes(expected[name])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_that_were_saved(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.bin"
    save({"version": 1, **state_dict()}, path, protocol)
    found = read_torch(path)
    assert_equal(found, state_dict())
    assert found.extras == ("version",)


def test_tensors_equal_those_of_torch_load(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    save({name: value for name, value in state_dict().items() if name != "fp8"}, path)
    assert_equal(read_torch(path), torch.load(path, weights_only=True))
    golden = GOLDEN / "legacy.bin"
    assert_equal(read_torch(golden), torch.load(golden, weights_only=True))


def test_pickles_longer_than_the_first_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    tensors = {f"layers.{i}.weight": torch.full((2,), i) for i in range(3000)}
    save(tensors, path)
    assert_equal(read_torch(path), tensors)


def write(
    path: Path, value: object, keys: object = ("0",), rest: bytes = struct.pack("<q", 6) + FLOATS, **changes: Any
) -> TorchFile:
    """Write a forged file, and read it."""
    parts = [changes.get("magic", MAGIC), changes.get("protocol", 1001), changes.get("system", SYSTEM), value]
    keys = list(keys) if isinstance(keys, tuple) else keys
    path.write_bytes(b"".join(map(forge, [*parts, keys])) + rest)
    return read_torch(path)


def test_forged_files_are_read_when_nothing_is_wrong(tmp_path: Path) -> None:
    assert evaluate(write(tmp_path / "x", {"w": tensor()}).tensors["w"]) == FLOATS


def test_views_of_storages_are_read(tmp_path: Path) -> None:
    """torch before 0.4 wrote storages that are parts of others."""
    part = Pid(*storage().parts, ("view", 2, 4))
    found = write(tmp_path / "x", {"w": tensor(part, offset=1, size=(3,), stride=(1,)), "v": tensor()})
    assert evaluate(found.tensors["w"]) == FLOATS[12:]
    for view in [("view", 3, 4), ("view", -1, 4), ("view", 0), ("view", 0, None), 3]:
        with pytest.raises(CorruptInput, match=r"a malformed view of a storage|of a storage that has 6"):
            write(tmp_path / "x", {"w": tensor(Pid(*storage().parts, view))})
    with pytest.raises(CorruptInput, match="w: reaches up to byte 20 of storage 0, which has 16"):
        write(tmp_path / "x", {"w": tensor(part, offset=2, size=(3,), stride=(1,))})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": 3}, "a pickle that torch.save did not write"),
        ({"magic": {}}, "a pickle that torch.save did not write"),
        ({"protocol": 1002}, "another protocol, expected 1001"),
        ({"system": {**SYSTEM, "little_endian": False}}, "not little-endian"),
        ({"system": 1}, "not little-endian"),
        ({"keys": ()}, "has 0 storages, its tensors use 1"),
        ({"keys": ("0", "0")}, "has 2 storages, its tensors use 1"),
        ({"keys": ("0", "1")}, "has 2 storages, its tensors use 1"),
        ({"keys": ("1",)}, "has 1 storages, its tensors use 1"),
        ({"keys": (0,)}, "the storage keys are no list of texts"),
        ({"keys": "0"}, "the storage keys are no list of texts"),
        ({"rest": struct.pack("<q", 5) + FLOATS}, "storage 0 has 5 elements, expected 6"),
        ({"rest": struct.pack("<q", -1) + FLOATS}, "storage 0 has -1 elements, expected 6"),
        ({"rest": struct.pack("<q", 6) + FLOATS[1:]}, r"storage 0 should end at byte \d+, found \d+ bytes"),
        ({"rest": struct.pack("<q", 6) + FLOATS + b"x"}, "1 bytes after the last storage"),
        ({"rest": b""}, "should end at byte"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptInput, match=message):
        write(tmp_path / "x", {"w": tensor()}, **changes)


def test_storage_sizes_beyond_the_file_allocate_nothing(tmp_path: Path) -> None:
    value = {"w": tensor(storage(numel=1 << 40), size=(1 << 40,), stride=(1,))}
    with pytest.raises(CorruptInput, match=r"should end at byte"):
        write(tmp_path / "x", value, rest=struct.pack("<q", 1 << 40))


def test_calls_are_refused_and_not_made(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    call = Runs("os system", f"touch {canary}")
    for changes in ({"value": {"w": call}}, {"magic": call}, {"system": {"little_endian": call}}, {"keys": call}):
        with pytest.raises(CorruptInput, match=r"asks to run `os\.system`"):
            write(tmp_path / "x", **{"value": {"w": tensor()}, **changes})
    with pytest.raises(CorruptInput, match=r"asks to run `os\.system`"):
        write(tmp_path / "x", {"w": tensor(Pid("module", Name("os system"), "x.py", "source"))})
    assert not canary.exists()


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_pickles_are_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "x").write_bytes(pickle.dumps(Evil(f"touch {canary}"), protocol))
    with pytest.raises(CorruptInput, match=r"not a file that torch\.save wrote|asks to run `\w+\.system`"):
        read_torch(tmp_path / "x")
    assert not canary.exists()


def test_tar_files_are_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "pickle").write_bytes(b"x")
    with tarfile.open(tmp_path / "x", "w") as archive:
        archive.add(tmp_path / "pickle", "pickle")
    with pytest.raises(CorruptInput, match=r"a tar archive, as torch before 0\.1\.10 wrote") as caught:
        read_torch(tmp_path / "x")
    assert "save it again" in (caught.value.hint or "")


@pytest.mark.parametrize("data", [b"", b"P", b"PK", b"\x80", b"version https://git-lfs", b"<html>", b"\0" * 600])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CorruptInput, match=r"not a file that torch.save wrote|is cut short|this is a|no end record"):
        read_torch(tmp_path / "x")


def test_numpy_objects_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([Evil("false")], dtype=object), allow_pickle=True)
    for path in (tmp_path / "x.npy", tmp_path):
        with pytest.raises(CorruptInput, match=r"not a regular file|this is a NumPy file"):
            read_torch(path)
    with pytest.raises(SourceMissing, match="missing: no such file"):
        read_torch(tmp_path / "missing")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_damage_is_harmless(tmp_path: Path, random: Any) -> None:
    """Without checksums it may go unnoticed, but nothing worse."""
    path = tmp_path / "x"
    save({"w": torch.arange(6.0), "t": torch.ones(2, 3).t()}, path)
    data = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 3)):
        data[random.randrange(len(data))] = random.randrange(256)
    path.write_bytes(data[: random.choice([len(data), random.randrange(len(data))])])
    with contextlib.suppress(CorruptInput):
        for found in read_torch(path).tensors.values():
            evaluate(found)
