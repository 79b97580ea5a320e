"""Folders whose index, names or links lie: refused in one sentence before a tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import evaluate, to_bytes, write_checkpoint
from systems import mkfifo

import weightops
from weightops.errors import CorruptInput, SourceMissing
from weightops.formats.folder import open_checkpoint
from weightops.formats.safetensors import MAX_TENSORS

INDEX = "model.safetensors.index.json"
STATE = {name: torch.arange(4.0) + i for i, name in enumerate("abcd")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside.safetensors").write_bytes(b"canary")
    return write_checkpoint(tmp_path / "model", STATE, shards=2)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_bytes())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


def set_file(name: object) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["weight_map"].update(a=name)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "parent folder": set_file("../outside.safetensors"),
    "absolute path": set_file("/etc/passwd"),
    "drive letter": set_file("C:\\model.safetensors"),
    "backslash": set_file("..\\outside.safetensors"),
    "NUL": set_file("a\0b"),
    "newline": set_file("a\nb"),
    "terminal escape": set_file("\x1b[2Jb"),
    "empty name": set_file(""),
    "dot": set_file("./" + FIRST),
    "not text": set_file(7),
    "missing shard": set_file("model-00009-of-00002.safetensors"),
    "folder as file": set_file("."),
    "all in shard 1": lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], FIRST)),
    "tensor not listed": lambda index: index["weight_map"].pop("a"),
    "tensor that is nowhere": lambda index: index["weight_map"].update(ghost=FIRST),
    "no weight_map": lambda index: index.pop("weight_map"),
    "empty weight_map": lambda index: index.update(weight_map={}),
    "weight_map a list": lambda index: index.update(weight_map=["a"]),
}


@pytest.mark.parametrize("fault", EDITS)
def test_lying_indexes_are_refused(folder: Path, fault: str) -> None:
    edit_index(folder, EDITS[fault])
    with pytest.raises(CorruptInput, match=r"index\.json(: | lists 1 files that are missing)") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_duplicate_keys_in_an_index_are_refused(folder: Path) -> None:
    text = (folder / INDEX).read_text().replace('"weight_map": {', '"weight_map": {"a": "x",', 1)
    (folder / INDEX).write_text(text)
    with pytest.raises(CorruptInput, match="occurs twice"):
        open_checkpoint(folder)


def make_special(path: Path, kind: str) -> None:
    path.unlink()
    match kind:
        case "fifo":
            mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "link out":
            path.symlink_to(path.parent.parent / "outside.safetensors")
        case "link in a circle":
            path.symlink_to(path)


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "link out", "link in a circle"])
@pytest.mark.parametrize("name", [FIRST, INDEX])
def test_shards_that_are_no_files_here_are_refused(folder: Path, kind: str, name: str) -> None:
    make_special(folder / name, kind)
    with pytest.raises(CorruptInput, match=r"not a regular file|is a link that leaves the folder"):
        open_checkpoint(folder)


def test_sidecars_that_lead_elsewhere_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(CorruptInput, match="leaves the folder"):
        open_checkpoint(folder)


def test_a_hugging_face_cache_snapshot_is_read_through_its_links(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    write_checkpoint(snapshot, STATE)
    (cache / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(cache / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert evaluate(open_checkpoint(snapshot)["b"]) == to_bytes(STATE["b"])


@pytest.mark.parametrize(
    ("names", "readable"),
    [
        (["model.safetensors"], True),
        (["anything.safetensors"], True),
        (["model-00001-of-00002", "model-00002-of-00002"], True),
        (["model-00000-of-00002", "model-00001-of-00002"], True),
        (["model-00000-of-00001", "model-00001-of-00001"], True),
        (["pytorch_model-1", "pytorch_model-2"], True),
        (["model-00001-of-00003", "model-00003-of-00003"], False),
        (["model-00001-of-00003", "model-00002-of-00003"], False),
        (["model-00001-of-00002"], False),
        (["model-00001-of-00002", "model-00002-of-00003"], False),
        (["one", "other"], False),
    ],
)
def test_folders_without_an_index_hold_one_complete_set(tmp_path: Path, names: list[str], readable: bool) -> None:
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.ones(2)}, tmp_path / (name.removesuffix(".safetensors") + ".safetensors"))
    if readable:
        assert len(open_checkpoint(tmp_path)) == len(names)
    else:
        with pytest.raises(CorruptInput, match="and no index"):
            open_checkpoint(tmp_path)


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file({"a": torch.ones(2)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(CorruptInput, match="a is in both"):
        open_checkpoint(tmp_path)


def test_nothing_there_is_not_corrupt(tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match="nowhere: no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(SourceMissing, match="holds no weights"):
        open_checkpoint(tmp_path)


def test_oddities_are_warned_of(folder: Path) -> None:
    edit_index(folder, lambda index: index["metadata"].update(total_size=1))
    save_file({"x": torch.ones(1)}, folder / "model-00003-of-00002.safetensors")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.X"}}')
    warnings = " ".join(weightops.inspect(folder).warnings)
    assert "total_size is 1, the tensors have 64 bytes" in warnings
    assert "model-00003-of-00002.safetensors holds weights but is not part" in warnings
    assert "modeling_x.py: code, carried along as data and never run" in warnings


def test_a_sparse_half_terabyte_is_inspected_at_once_and_refused_for_lack_of_disk(tmp_path: Path) -> None:
    from weightops.errors import NoRoom
    from weightops.formats.safetensors import safetensors_layout
    from weightops.spec import DType, TensorSpec

    layout = safetensors_layout([("w", TensorSpec(DType.F16, (1 << 18, 1 << 20)))], {})
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(layout.pieces[0].data)
    os.truncate(path, layout.nbytes)
    assert weightops.inspect(path.parent).nbytes == 1 << 39
    with pytest.raises(NoRoom, match="bytes of disk"):
        weightops.shard(path.parent, tmp_path / "out")


def test_more_tensors_than_any_model_has_are_refused_in_seconds(tmp_path: Path) -> None:
    entries = ",".join(f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(MAX_TENSORS + 1))
    header = b"{" + entries.encode() + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CorruptInput, match=f"{MAX_TENSORS + 1} tensors"):
        open_checkpoint(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60), position=st.integers(0, 200), length=st.integers(0, 30))
def test_fuzzed_indexes_are_read_or_refused(folder: Path, data: bytes, position: int, length: int) -> None:
    path = folder / INDEX
    good = path.with_suffix(".good")
    if not good.exists():
        good.write_bytes(path.read_bytes())
    content = bytearray(good.read_bytes())
    content[position : position + length] = data
    path.write_bytes(content)
    try:
        found = open_checkpoint(folder)
    except CorruptInput:
        return
    assert found.keys() == STATE.keys()
