"""The page about publishing: its commands, as they stand, against a hub on this machine."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from publishing import TOKEN, listed, make_model
from writable_hub import WritableHub

from weightops.cli.main import run

PAGE = Path(__file__).parents[1] / "docs/publish.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model")
    lines = re.findall(r"^    (weightops .*)", PAGE.read_text(), re.MULTILINE)
    words = [shlex.split(line)[1:] for line in lines]
    assert [each[3:4] for each in words] == [["--create"], ["--create"], ["--message"], ["--delete"]]
    with WritableHub(token=TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert run(words[0]) == 0
        said = capfd.readouterr().out
        assert "place       hf://org/name, new\nowner       org (me is a member)\nvisibility  private\nsend  " in said
        assert "not sent    notes.txt" in said
        assert hub.repos == {}
        assert [run(each) for each in words[1:]] == [0, 0, 0]
        made = hub.files("org/name")
    assert {name: data for name, data in made.items() if name != ".gitattributes"} == listed(model)
    assert len(hub.commits) == 1
    assert TOKEN not in "".join(capfd.readouterr())
