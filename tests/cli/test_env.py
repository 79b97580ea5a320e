"""`weightops env`: what there is, found without torch, and no secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weightops.cli import machine
from weightops.cli.machine import Gpu, count_cache
from weightops.cli.main import run
from weightops.io.platform.machine import find_mount

MOUNTS = r"""22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:26 / /data rw shared:5 - xfs /dev/sdb rw
31 30 0:27 / /data/with\040space rw shared:6 master:2 - nfs4 host:/x rw
32 22 0:28 / /data rw - btrfs /dev/sdc rw""".splitlines()


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/home/me", "ext4"), ("/data", "btrfs"), ("/data/with space/x", "nfs4"), ("/database", "ext4"), ("x", None)],
)
def test_the_file_system_is_the_innermost_and_the_last_mounted(folder: str, kind: str | None) -> None:
    assert find_mount(MOUNTS, Path(folder)) == kind


def test_the_cache_is_counted_without_its_links(tmp_path: Path) -> None:
    for name, nbytes in (("models--a--b/blobs/1", 5), ("models--a--b/blobs/2", 7), ("models--c/blobs/3", 11)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * nbytes)
    (tmp_path / "models--a--b/snapshots/main").mkdir(parents=True)
    (tmp_path / "models--a--b/snapshots/main/config.json").symlink_to("../../blobs/1")
    (tmp_path / "version.txt").write_text("1")
    assert count_cache(tmp_path) == 23
    assert count_cache(tmp_path, limit_s=-1.0) is None
    assert count_cache(tmp_path / "none") == 0


def test_a_token_is_said_to_be_there_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", raising=False)
    assert run(["env", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["hub"]["has_token"] is True
    assert "secret" not in shown.out + shown.err
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert run(["env"]) == 0
    assert "token            not set" in capsys.readouterr().out


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called nvidia-smi, to be written, first on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "nvidia-smi"


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        (
            "echo 'NVIDIA A100, 80GB, 81559'; echo 'Part, [N/A]'",
            (Gpu(name="NVIDIA A100, 80GB", nbytes=81559 << 20), Gpu(name="Part", nbytes=None)),
        ),
        ("true", ()),
        ("echo no devices; exit 9", None),
    ],
)
def test_gpus_are_those_of_nvidia_smi(smi: Path, script: str, gpus: tuple[Gpu, ...] | None) -> None:
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    found = machine.describe()
    assert (found.gpus, found.gpus_by) == (gpus, None if gpus is None else "nvidia-smi")


@pytest.mark.slow
def test_torch_is_asked_only_when_it_is_to_be() -> None:
    code = "import sys; from weightops.cli.main import run; run(sys.argv[1:]); print('torch' in sys.modules)"
    for options, imported in (([], "False"), (["--gpu"], "True")):
        done = subprocess.run(
            [sys.executable, "-c", code, "env", "--json", *options], capture_output=True, text=True, check=True
        )
        document, _, last = done.stdout.strip().rpartition("\n")
        assert last == imported
        assert (json.loads(document)["gpus_by"] == "torch") == bool(options)


def test_what_is_shown_is_what_a_report_should_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(["env"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[0] != " ")
    assert shown["kernels"] == "not installed" or shown["kernels"][0].isdigit()
    assert {
        "weightops",
        "python",
        "torch",
        "transformers",
        "peft",
        "huggingface_hub",
        "safetensors",
        "numpy",
        "triton",
    } <= shown.keys()
    assert str(tmp_path) in shown["disk"]
    assert "not to be asked" in shown["hub"]
    assert {"system", "cores", "memory", "gpu", "token", "cache"} <= shown.keys()
