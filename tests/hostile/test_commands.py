"""Every command that reads a checkpoint, given a hostile one: exit code 13, one sentence, nothing run or written."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forgery import FLOATS, Runs, forge, storage, tensor, write_archive
from support import digests, write_checkpoint

from weightops.cli.main import run
from weightops.errors import CorruptInput
from weightops.formats.folder import open_checkpoint


def safetensors(header: object, data: bytes = b"data") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def archive(path: Path, body: bytes) -> None:
    write_archive(path, [("archive/data.pkl", body), ("archive/version", b"3\n"), ("archive/data/0", FLOATS)])


def as_file(content: bytes, name: str = "model.safetensors") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def as_archive(body: bytes) -> Callable[[Path], object]:
    return lambda folder: archive(folder / "pytorch_model.bin", body)


def outside(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"w": "../canary"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damaged(folder: Path) -> None:
    torch.save({"w": torch.arange(6.0)}, folder / "pytorch_model.bin")
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    data[data.index(FLOATS) + 5] ^= 1
    (folder / "pytorch_model.bin").write_bytes(data)


HUGE = 1 << 40
ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
HOSTILE: dict[str, Callable[[Path], object]] = {
    "header longer than the file": as_file(struct.pack("<Q", HUGE) + b"{}"),
    "overlapping tensors": as_file(safetensors({"a": ENTRY, "b": ENTRY})),
    "huge shape": as_file(safetensors({"a": {**ENTRY, "shape": [HUGE, HUGE]}})),
    "nested too deep": as_file(safetensors(b'{"a":' + b"[" * 100_000)),
    "terminal escapes": as_file(safetensors({"\x1b[2J\u202e": {**ENTRY, "dtype": "\x1b]0;x\x07"}})),
    "Git LFS pointer": as_file(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "index that points outside": outside,
    "pickle that runs a command": as_archive(forge({"w": tensor(), "x": Runs("os system", "touch canary")})),
    "raw pickle": as_file(forge(Runs("os system", "touch canary")), "pytorch_model.bin"),
    "huge storage": as_archive(forge({"w": tensor(storage(numel=HUGE), size=(HUGE,), stride=(1,))})),
    "expanded tensor": as_archive(forge({"w": tensor(size=(HUGE,), stride=(0,))})),
    "view beyond its storage": as_archive(forge({"w": tensor(offset=3)})),
    "HTML page": as_file(b"<html>login</html>", "pytorch_model.bin"),
}
COMMANDS = [
    "inspect hostile",
    "inspect hostile --stats --tree",
    "recover --raw hostile --diff good --out out",
    "recover --raw good --diff hostile --out out",
    "diff --raw good --tuned hostile --out out",
    "shard hostile --out out",
    "merge hostile --method linear --weight 1 --out out",
    "manifest hostile",
]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile").mkdir()
    write_checkpoint(tmp_path / "good", {"w": torch.ones(2, 3)})
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_checkpoints_are_refused_by_every_command(
    folders: Path, attack: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    HOSTILE[attack](folders / "hostile")
    before = digests(folders)
    assert run(command.split()) == 13
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ")
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.err
    assert digests(folders) == before
    assert not (folders / "canary").exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "inspect" not in c])
def test_a_flipped_bit_in_an_archive_is_found_by_every_command_that_reads_it(folders: Path, command: str) -> None:
    damaged(folders / "hostile")
    before = digests(folders)
    assert run(command.replace("good", "hostile").split()) == 13
    assert digests(folders) == before


@pytest.mark.parametrize("attack", HOSTILE)
def test_nothing_is_allocated_before_the_checks(folders: Path, attack: str) -> None:
    HOSTILE[attack](folders / "hostile")
    tracemalloc.start()
    try:
        with pytest.raises(CorruptInput, match="hostile"):
            open_checkpoint(folders / "hostile")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
