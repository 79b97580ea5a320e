"""Verifying a single file, such as a GGUF model, against the manifest beside it or a list."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from msgspec import structs
from safetensors.torch import save_file

import weightops
from weightops.errors import SourceMissing, UsageError
from weightops.formats.proofs.manifest import beside


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A single file with its manifest, among other files."""
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, file)
    (tmp_path / "other.txt").write_text("other")
    found = weightops.manifest(tmp_path)
    entry = found.files[file.name]
    beside(file).write_bytes(structs.replace(found, files={file.name: entry}).to_bytes())
    return file


def test_a_single_file_is_held_against_the_manifest_beside_it(one: Path) -> None:
    report = weightops.verify(one)
    assert report.verdict
    assert [(file.name, file.status) for file in report.files] == [("x.safetensors", "ok")]
    assert weightops.verify(one, content=True).verdict
    assert weightops.verify(one, quick=True).verdict
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    one.write_bytes(data)
    report = weightops.verify(one)
    assert not report.verdict
    assert report.tensors_differ == ("a",)
    assert weightops.verify(one, quick=True).verdict
    one.write_bytes(data[:-1])
    assert not weightops.verify(one, quick=True).verdict


def test_a_single_file_may_have_been_renamed_with_its_manifest(one: Path) -> None:
    new = one.rename(one.with_name("y.safetensors"))
    beside(one).rename(beside(new))
    assert weightops.verify(new).verdict
    (report,) = weightops.verify(new).files
    assert report.name == "y.safetensors"


def test_a_single_file_against_lists(one: Path) -> None:
    beside(one).unlink()
    with pytest.raises(SourceMissing, match=r"there is no x\.safetensors\.weightops-manifest\.json beside it"):
        weightops.verify(one)
    lines = {p.name: f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.name}\n" for p in one.parent.iterdir()}
    (one.parent / "MD5SUMS").write_text("".join(lines.values()))
    assert weightops.verify(one, one.parent / "MD5SUMS").verdict
    (one.parent / "other.md5").write_text(lines["other.txt"] + lines["other.txt"].replace("other", "third"))
    with pytest.raises(UsageError, match=r"other\.md5 does not list x\.safetensors"):
        weightops.verify(one, one.parent / "other.md5")


def test_manifests_of_single_files_are_no_extra_files_of_a_folder(one: Path) -> None:
    (one.parent / "MD5SUMS").write_text(
        "".join(f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.name}\n" for p in (one, one.parent / "other.txt"))
    )
    assert weightops.verify(one.parent, extra="fail").verdict
