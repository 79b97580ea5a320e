"""Conversion of what lies on a hub: parts, parameters and tokenizer are read from there, and nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from meta_model import meta_download

import weightops
from weightops.engine.control import Control
from weightops.stores.web.web import Web

OPTIONS: dict[str, Any] = {"set": {"context_length": "2048"}}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    meta_download(tmp_path / "meta", parts=2, dim=512, n_layers=2, ffn_dim=1536)
    with Hub() as hub:
        hub.add("org/llama", {path.name: path.read_bytes() for path in (tmp_path / "meta").iterdir()})
        yield hub


@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_the_same_comes_out_as_from_disk(hub: Hub, tmp_path: Path, to: str) -> None:
    local = weightops.convert(tmp_path / "meta", tmp_path / "local", to=to, **OPTIONS)
    with Web(endpoint=hub.endpoint) as web:
        remote = weightops.convert("hf://org/llama", tmp_path / "remote", to=to, control=Control(web=web), **OPTIONS)
    assert local.manifest is not None
    assert remote.manifest is not None
    theirs, ours = (
        {name: path.digests for name, path in found.files.items()} for found in (local.manifest, remote.manifest)
    )
    assert ours.keys() == theirs.keys()
    # The name of the source is in GGUF's metadata, and nowhere else.
    assert to == "gguf" or ours == theirs
    assert ours.keys() > {"gguf": set(), "hf": {"tokenizer.model", "tokenizer.json"}, "meta": {"params.json"}}[to]


def test_a_dry_run_reads_headers_and_little_more(hub: Hub, tmp_path: Path) -> None:
    with Web(endpoint=hub.endpoint) as web:
        control = Control(web=web)
        weightops.convert("hf://org/llama", tmp_path / "out", to="hf", dry_run=True, control=control, **OPTIONS)
    sent = sum(request.bytes_sent for request in hub.log if request.name and request.name.endswith(".pth"))
    assert sent < 0.1 * sum(path.stat().st_size for path in (tmp_path / "meta").glob("*.pth"))
    assert not (tmp_path / "out").exists()
