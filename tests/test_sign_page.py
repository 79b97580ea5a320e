"""The page about signing: its commands, as they stand, on a small model."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from signing_keys import save_certificate, save_key
from support import write_checkpoint

from weightops.cli.main import run

PAGE = Path(__file__).parents[1] / "docs/sign.md"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the page makes its keys with openssl")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model", {"a": torch.ones(4)})
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    key = save_key(tmp_path, "root")
    save_certificate(tmp_path, "leaf", save_key(tmp_path, "leaf"), (save_certificate(tmp_path, "root", key), key))
    lines = re.findall(r"^    ((?:openssl|weightops) .*)", PAGE.read_text(), re.MULTILINE)
    found = [shlex.split(line) for line in lines]
    assert [words[1] for words in found] == ["ecparam", "ec", *("sign", "verify") * 3]
    for words in found:
        if words[0] == "openssl":
            subprocess.run(words, check=True)
        else:
            assert run(words[1:]) == 0, words
    assert "signed by certificate CN=leaf" in capfd.readouterr().out
    (tmp_path / "model/config.json").write_text("{}")
    assert run(found[-1][1:]) == 3
