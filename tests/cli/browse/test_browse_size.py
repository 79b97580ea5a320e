"""Browsing what is large: many names are quick, and a large tensor takes no more memory than a small one."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("textual")

from test_browse import browse, lines, panel, search, until
from textual.pilot import Pilot

from weightops.cli.browse.app import Browser
from weightops.cli.browse.reading import read
from weightops.cli.browse.subject import Subject, open_side
from weightops.engine.control import Control


def headers_only(folder: Path, tensors: dict[str, list[int]]) -> Path:
    """A checkpoint of zeros, of which the disk holds the header alone."""
    folder.mkdir()
    position, header = 0, {}
    for name, shape in tensors.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + position)
    return folder


def mixture(layers: int, experts: int) -> dict[str, list[int]]:
    names = {f"model.layers.{i}.self_attn.{n}_proj.weight": [512, 512] for i in range(layers) for n in "qkvo"}
    for i in range(layers):
        for e in range(experts):
            names |= {f"model.layers.{i}.mlp.experts.{e}.{n}_proj.weight": [64, 512] for n in ("gate", "up", "down")}
    return names


@pytest.mark.slow
def test_tens_of_thousands_of_tensors_are_there_at_once(tmp_path: Path) -> None:
    folder = headers_only(tmp_path / "m", mixture(40, 256))

    async def steps(browser: Browser, pilot: Pilot[None]) -> None:
        assert len(lines(browser)) <= 3
        await search(browser, pilot, "layers.39.mlp.experts.255.down")
        await until(pilot, lambda: "xxh3_128" in panel(browser))
        assert len(lines(browser)) < 600

    begun = time.process_time()
    browse([folder], steps)
    assert time.process_time() - begun < 20  # seconds where one pass takes one: what grows too fast takes minutes


def test_a_large_tensor_takes_a_few_blocks_of_memory(tmp_path: Path) -> None:
    paths = [headers_only(tmp_path / name, {"w": [1 << 13, 1 << 13]}) for name in ("one", "two")]  # of 128 MiB
    with (paths[1] / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x80\x3f")
    control = Control()
    subject = Subject.of(*(open_side(path, control) for path in paths), control=control)
    tracemalloc.start()
    try:
        found = read("w", subject.rows["w"], subject.alignment, control)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.change is not None
    assert (found.change.changed, found.change.elements) == (1, 1 << 26)
    assert peak < 64 << 20
