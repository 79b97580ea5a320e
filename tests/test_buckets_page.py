"""The page about buckets: its commands, as they stand, as far as a server on this machine goes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import buckets
import pytest
import torch
from hub import Hub
from support import write_checkpoint

from weightops.cli.main import run
from weightops.stores.s3.store import S3Store

PAGE = Path(__file__).parents[1] / "docs/buckets.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    words = [shlex.split(line)[1:] for line in re.findall(r"^    (weightops .*)", text, re.MULTILINE)]
    names = ["inspect", "verify", "cast", "cast", "verify", "cast", "work", "work", "finish", "download"]
    assert [each[0] for each in words] == names
    with buckets.ministack() as endpoint, buckets.connect(endpoint) as connection, Hub() as hub:
        for name, value in {**buckets.environment(endpoint), "HF_ENDPOINT": hub.endpoint}.items():
            monkeypatch.setenv(name, value)
        hub.add("org/name", {"config.json": b"{}"})
        connection.call("PUT", "s3://models/")
        store = S3Store("models", "", connection)
        write_checkpoint(tmp_path / "llama", {"a": torch.ones(4)})
        assert run(["shard", "llama", "--out", "s3://models/llama", "-q"]) == 0
        for each in words:
            assert run(each) == 0, each
        assert not [name for name in store.listed("") if ".weightops/" in name]
        manifests = {name.partition("/")[0] for name in store.listed("") if name.endswith("weightops-manifest.json")}
        assert manifests == {"llama", "llama-bf16", "llama-fp32", "name"}
        abandon = re.search(r"`weightops (finish .*?)`", text)
        assert abandon is not None
        assert run(shlex.split(abandon[1])) == 0
        assert [name for name in store.listed("") if name.startswith("llama-job/")] == []
