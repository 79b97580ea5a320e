from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from weightops.errors import SourceMissing
from weightops.formats.proofs import published as manifests
from weightops.formats.proofs.checksums import read_checksums, render_gnu
from weightops.formats.proofs.published import find_manifest, published

COUNTS = {
    "zhixi-13b-base": 6,
    "zhixi-13b-base-fp16": 3,
    "zhixi-13b-diff": 6,
    "zhixi-13b-diff-fp16": 3,
    "zhixi-13b-lora": 1,
}


def test_published_lists_are_as_md5sum_writes_them() -> None:
    assert {name: len(read_checksums(path).entries) for name, path in published().items()} == COUNTS
    for path in published().values():
        found = read_checksums(path)
        assert {entry.algorithm for entry in found.entries} == {"md5"}
        assert render_gnu(found.entries) == path.read_bytes()
        checked = subprocess.run(
            ["md5sum", "-c", "--strict", "--ignore-missing", path], capture_output=True, text=True, cwd=path.parent
        )
        assert "no file was verified" in checked.stderr
        assert "improperly formatted" not in checked.stderr


def test_readme_names_every_list() -> None:
    readme = (Path(__file__).parents[3] / "manifests" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in COUNTS)


def test_name_of_a_published_list() -> None:
    assert find_manifest("zhixi-13b-base") == published()["zhixi-13b-base"]


def test_path_wins_but_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zhixi-13b-base").mkdir()
    assert find_manifest("zhixi-13b-base") == published()["zhixi-13b-base"]
    (tmp_path / "zhixi-13b-lora").write_text("")
    assert find_manifest("zhixi-13b-lora") == Path("zhixi-13b-lora")
    assert find_manifest(str(tmp_path / "zhixi-13b-lora")) == tmp_path / "zhixi-13b-lora"


@pytest.mark.parametrize("name", ["zhixi-13b-bas", "ZHIXI-13b-base"])
def test_misspelt_name_gets_a_suggestion(name: str) -> None:
    with pytest.raises(SourceMissing, match=r"there are zhixi-13b-base, zhixi-13b-base-fp16, ") as caught:
        find_manifest(name)
    assert caught.value.hint == "did you mean zhixi-13b-base?"


@pytest.mark.parametrize("name", ["qqq", "", "a\x1b[2J", "x" * 5000, "a\0b"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(SourceMissing, match="no such file, and no published list of that name") as caught:
        find_manifest(name)
    assert caught.value.hint is None
    assert "\x1b" not in str(caught.value)


def test_installed_lists_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.md5").write_text("")
    monkeypatch.setattr(manifests, "_INSTALLED", tmp_path)
    assert list(published()) == ["other"]
