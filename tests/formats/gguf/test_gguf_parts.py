"""Models in several GGUF files, found from any of them; what a file is; and metadata that stays with a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hub import Hub
from support import evaluate

from weightops.checkpoint import Checkpoint
from weightops.errors import CorruptInput
from weightops.formats.containers import metadata_in
from weightops.formats.folder import open_checkpoint
from weightops.formats.gguf.metadata import Strings, kind_of, untyped
from weightops.stores.stores import Stores
from weightops.stores.web.policy import Policy
from weightops.stores.web.web import Web

TENSORS = {f"blk.{i}.weight": np.full((2, 32), i, np.float32) for i in range(5)}


def write(path: Path, *, name: str = "tiny", tensors: dict[str, np.ndarray] = TENSORS, per_file: int = 0) -> list[Path]:
    """What gguf writes, in files of so many tensors."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=per_file)
    writer.add_name(name)
    writer.add_token_list(["a", "\u4e2d", ""])
    for key, values in tensors.items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob("*.gguf"))


def held(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: evaluate(tensor) for name, tensor in checkpoint.items()}


@pytest.mark.parametrize("named", [0, 1, 2, None])
def test_a_model_is_read_from_any_of_its_parts(tmp_path: Path, named: int | None) -> None:
    parts = write(tmp_path / "tiny.gguf", per_file=2)
    assert [part.name for part in parts] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    found = open_checkpoint(tmp_path if named is None else parts[named])
    assert held(found) == {name: values.tobytes() for name, values in TENSORS.items()}
    assert list(found) == list(TENSORS)
    assert set(found.shards.values()) == {part.name for part in parts}
    said = untyped(found.metadata)
    assert said == {
        "general.architecture": "llama",
        "general.name": "tiny",
        "tokenizer.ggml.tokens": ["a", "\u4e2d", ""],
    }


def test_parts_on_a_hub_and_at_a_url_are_found_by_their_names(tmp_path: Path) -> None:
    parts = write(tmp_path / "tiny.gguf", per_file=2)
    with Hub() as hub:
        hub.add("org/name", {f"q4/{part.name}": part.read_bytes() for part in parts})
        hub.static |= {part.name: part.read_bytes() for part in parts}
        with Web(Policy(timeout_s=1, attempts=2), endpoint=hub.endpoint) as web, Stores(web).connected() as stores:
            for place in (f"org/name/blob/main/q4/{parts[1].name}", f"static/files/{parts[2].name}"):
                found = open_checkpoint(f"{hub.endpoint}/{place}", stores)
                assert {name: bytes(tensor.read(stores)) for name, tensor in found.items()} == {
                    name: values.tobytes() for name, values in TENSORS.items()
                }


def test_what_lies_beside_a_model_is_not_taken_for_a_part_of_it(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "tiny-imatrix-Q4_K.gguf")
    for name in ("mmproj-F16.gguf", "tiny.mmproj.gguf", "imatrix.gguf"):
        shutil.copy(path, tmp_path / name)
    found = open_checkpoint(tmp_path)
    assert set(found.shards.values()) == {path.name}
    assert [said.partition(" ")[0] for said in found.warnings] == [
        "imatrix.gguf",
        "mmproj-F16.gguf",
        "tiny.mmproj.gguf",
    ]


def test_parts_that_are_missing_or_of_another_model_are_refused(tmp_path: Path) -> None:
    parts = write(tmp_path / "tiny.gguf", per_file=2)
    stray = tmp_path / "stray.gguf"
    shutil.copy(parts[2], stray)
    with pytest.raises(CorruptInput, match=r"stray\.gguf: is part 3 of 3 of a model") as caught:
        open_checkpoint(stray)
    assert "NAME-00003-of-00003.gguf" in str(caught.value.hint)
    stray.unlink()
    other = tmp_path / "other"
    other.mkdir()
    others = write(other / "tiny.gguf", tensors={f"x{i}": np.zeros(32, np.float32) for i in range(6)}, per_file=2)
    shutil.copy(others[1], parts[1])
    with pytest.raises(CorruptInput, match=r"tiny-00002-of-00003\.gguf: is no part of the model .* of 6 tensors"):
        open_checkpoint(parts[0])
    shutil.copy(parts[0], parts[1])
    with pytest.raises(CorruptInput, match="it says part 1 of 3, of 5 tensors in all; expected part 2 of 3"):
        open_checkpoint(tmp_path)
    parts[1].unlink()
    with pytest.raises(CorruptInput, match=r"tiny-00002-of-00003\.gguf is missing"):
        open_checkpoint(parts[2])


def test_a_checkpoint_keeps_its_metadata_and_other_containers_get_strings(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "tiny.gguf")
    found = open_checkpoint(path)
    assert found.metadata["general.name"] == {"string": "tiny"}
    tokens = found.metadata["tokenizer.ggml.tokens"]["array"][1]
    assert isinstance(tokens, Strings)
    assert (tokens[-2], tokens[:2], list(tokens)) == ("\u4e2d", ["a", "\u4e2d"], ["a", "\u4e2d", ""])
    with pytest.raises(IndexError):
        tokens[3]
    assert metadata_in("safetensors", found.metadata) == {"format": "pt"}
    written = metadata_in("gguf", {**found.metadata, "format": "pt"})
    assert written["tokenizer.ggml.tokens"] == {"array": ["string", ["a", "\u4e2d", ""]]}
    assert "format" not in written


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({}, "model"),
        ({"general.type": {"string": "model"}}, "model"),
        ({"general.type": {"string": "mmproj"}}, "mmproj"),
        ({"general.architecture": {"string": "clip"}}, "mmproj"),
        ({"adapter.lora.alpha": {"float32": 16.0}}, "adapter"),
        ({"imatrix.chunk_count": {"uint32": 1}}, "imatrix"),
        ({"general.type": {"uint32": 1}, "format": "pt"}, "model"),
    ],
)
def test_what_a_file_is(metadata: dict[str, Any], kind: str) -> None:
    assert kind_of(metadata) == kind
