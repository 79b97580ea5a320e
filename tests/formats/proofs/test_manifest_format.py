"""Manifests that are not ours, or not of the tensors that they list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import write_checkpoint

from weightops.errors import CorruptInput, SourceMissing
from weightops.formats.proofs.manifest import NAME, parse_manifest, read_manifest


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    from weightops import api

    write_checkpoint(tmp_path / "model", {"a": torch.zeros(2, 3)})
    found: dict[str, Any] = json.loads(api.manifest(tmp_path / "model").to_bytes())
    return found


def test_what_was_written_is_read(document: dict[str, Any]) -> None:
    assert json.loads(parse_manifest(json.dumps(document).encode(), "m").to_bytes()) == document


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other/1"}, "m: not a weightops manifest .*schema"),
        ({"files": None}, "m: not a weightops manifest"),
        ({"more": 1}, "m: not a weightops manifest .*more"),
        ({"tensors": {"a": {"dtype": "F99"}}}, "m: not a weightops manifest"),
        ({"files": {"../a": {"nbytes": 1, "digests": {}}}}, "not a plain path"),
        ({"content_id": "0" * 64}, "m: content_id is 0{64}, its tensors give [0-9a-f]{64}"),
        ({"content_id": None}, "m: content_id is None, its tensors give"),
        ({"tensors": {}}, "m: content_id is [0-9a-f]{64}, its tensors give"),
    ],
)
def test_what_contradicts_itself_or_is_something_else_is_refused(
    document: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorruptInput, match=message):
        parse_manifest(json.dumps(document | changes).encode(), "m")


def test_a_folder_without_tensors_has_no_content(document: dict[str, Any]) -> None:
    assert parse_manifest(json.dumps(document | {"tensors": {}, "content_id": None}).encode(), "m").tensors == {}


def test_there_may_be_none(tmp_path: Path) -> None:
    with pytest.raises(SourceMissing, match="no such file"):
        read_manifest(tmp_path / NAME)
