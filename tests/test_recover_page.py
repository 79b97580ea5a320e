"""The page about recovering: its walk-through as it stands, on KnowLM's golden files, which a local hub serves."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hub import Hub

from weightops.cli.main import run
from weightops.formats.proofs import published as manifests
from weightops.formats.proofs.manifest import read_manifest

PAGE = Path(__file__).parents[1] / "docs/recover.md"
GOLDEN = Path(__file__).parent / "golden" / "knowlm"
REPOSITORY = "zjunlp/knowlm-13b-diff"


def walk_through() -> list[str]:
    """The commands of the section, in blocks and in sentences, in their order."""
    section = PAGE.read_text().partition("## Recover ZhiXi-13B")[2].partition("\n## ")[0]
    found = re.findall(r"^    (weightops (?:.*\\\n)*.*)|`(weightops [^`]*)`", section, re.MULTILINE)
    return [(block or inline).replace("\\\n", " ") for block, inline in found]


def test_the_walk_through_ends_with_verified_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    shutil.copy(GOLDEN / "recovered.md5", lists / "zhixi-13b-base.md5")
    diff = {path.name: path.read_bytes() for path in (GOLDEN / "diff").iterdir()}
    sums = [f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in diff.items() if name.endswith(".bin")]
    (lists / "zhixi-13b-diff.md5").write_text("".join(sums))
    (lists / "sources.json").write_text(json.dumps({"zhixi-13b-diff": {"repository": REPOSITORY}}))
    monkeypatch.setattr(manifests, "_folder", lambda: lists)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "raw", tmp_path / "llama-13b")
    commands = walk_through()
    assert [command.split()[1] for command in commands] == [
        *("download", "recover", "recover", "verify", "recover", "inspect"),
    ]
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for repository in (REPOSITORY, "org/name"):
            hub.add(repository, diff)
        for command in commands:
            if command.startswith("weightops recover") and "hf://" in command:
                shutil.move("zhixi", "zhixi-local")
            assert run(shlex.split(command.replace("10GB", "150KB"))[1:]) == 0, command
    local, streamed = (read_manifest(tmp_path / out / "weightops-manifest.json") for out in ("zhixi-local", "zhixi"))
    assert local.content_id == streamed.content_id is not None
    expected = dict(reversed(line.split()) for line in (GOLDEN / "recovered.md5").read_text().splitlines())
    assert {n: hashlib.md5((tmp_path / "zhixi-local" / n).read_bytes()).hexdigest() for n in expected} == expected
