"""Completion as shells ask for it: commands, options, values, published names, files and folders; and quickly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from weightops.cli.commands.completion import SHELLS
from weightops.cli.main import COMMANDS, COMPLETION, run
from weightops.cli.params import DIGESTS
from weightops.formats.proofs.published import published
from weightops.io.digests import NAMED

ALL = sorted(COMMANDS)


def ask(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash is told of the last word of a line, as the script asks for it."""
    monkeypatch.setenv(COMPLETION, "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit) as raised:
        run([])
    assert raised.value.code == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out.splitlines()


PLAIN = [
    ("weightops ", ALL),
    ("weightops ver", ["verify"]),
    ("weightops x", []),
    ("weightops nonsense --o", []),
    ("weightops cast --on", ["--on-overflow"]),
    ("weightops cast model --on-overflow ", ["inf", "refuse", "saturate"]),
    ("weightops cast model --dtype bf", ["bfloat16"]),
    ("weightops convert --to g", ["gguf"]),
    ("weightops dequantize --checkpoint-format gptq_", ["gptq_v2"]),
    ("weightops check --ignore na", ["nan"]),
    ("weightops shard --progress ", ["auto", "json", "none", "plain"]),
    ("weightops shard --max-shard-size ", ["source"]),
    ("weightops shard --digest sha25", ["sha256"]),
    ("weightops generate --device c", ["cpu", "cuda"]),
    ("weightops quantize --bits ", ["2", "3", "4", "8"]),
    ("weightops completion ", sorted(SHELLS)),
    ("weightops adapter ", ["combine", "convert", "rank"]),
    ("weightops adapter combine one two --method tie", ["ties", "ties_svd"]),
    ("weightops adapter convert one --to m", ["mlx"]),
    ("weightops verify x --manifest zhixi-13b-b", ["zhixi-13b-base", "zhixi-13b-base-fp16"]),
]


@pytest.mark.parametrize(("line", "expected"), PLAIN, ids=[line for line, _ in PLAIN])
def test_words_are_completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, expected: list[str]
) -> None:
    found = [each.removeprefix("plain,") for each in ask(line, monkeypatch, capsys) if each.startswith("plain,")]
    assert sorted(found) == expected


@pytest.mark.parametrize(
    "line",
    [
        "weightops verify ./mo",
        "weightops download ./li",
        "weightops cast ./mo",
        "weightops cast model --out ./o",
        "weightops recover --raw ./ra",
        "weightops shard --expect ./MD5",
        "weightops quantize --calibration ./te",
        "weightops run ./re",
        "weightops check --html ./pa",
    ],
)
def test_files_and_folders_are_left_to_the_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert ask(line, monkeypatch, capsys) == [f"file,{line.split(' ')[-1]}"]


def test_published_names_are_completed_for_downloads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ask("weightops download zhixi", monkeypatch, capsys)
    assert {each.removeprefix("plain,") for each in found if each.startswith("plain,")} == published().keys()


def test_digests_that_are_completed_are_those_there_are() -> None:
    assert DIGESTS == NAMED


def test_a_hub_that_is_none_is_no_matter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "no url")
    assert ask("weightops cas", monkeypatch, capsys) == ["plain,cast"]


@pytest.mark.parametrize(
    ("line", "without"),
    [
        ("weightops ca", "weightops.cli.commands"),
        ("weightops cast --o", "numpy"),
        ("weightops quantize --ca", "torch"),
        ("weightops adapter rank --by s", "torch"),
    ],
)
def test_only_what_is_needed_is_imported(line: str, without: str) -> None:
    code = "import sys; from weightops.cli.main import run\ntry: run([])\nfinally: print(*sys.modules)"
    environment = {**os.environ, COMPLETION: "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *found, modules = done.stdout.splitlines()
    assert found
    assert without not in modules.split()


def test_zsh_and_fish_are_told_what_commands_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_WORDS", "weightops ver")
    monkeypatch.setenv("COMP_CWORD", "1")
    for shell, word in (("zsh", "ver"), ("fish", "ver")):
        monkeypatch.setenv(COMPLETION, f"{shell}_complete")
        monkeypatch.setenv("COMP_CWORD", "1" if shell == "zsh" else word)
        with pytest.raises(SystemExit):
            run([])
        assert COMMANDS["verify"] in capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_asks_this_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"{COMPLETION}={shell}_complete" in script
    assert "weightops" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_real_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    program = tmp_path / "weightops"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m weightops "$@"\n')
    program.chmod(0o755)
    (tmp_path / "my model").mkdir()
    asked = """
compopt() { local IFS=" "; echo "compopt $*"; }
source ./script
complete -p weightops
for words in "weightops ver" "weightops cast --on-overflow s" "weightops verify ./my"; do
    COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
    _weightops_completion weightops
    echo "${COMPREPLY[@]}"
done
"""
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", asked], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "complete -o nosort -F _weightops_completion weightops"
    assert lines[1:] == ["verify", "saturate", "compopt -o default", ""]
    assert done.stderr == ""
