"""Every command over stores that fail: at each call of theirs in turn, and then the same command without a fault."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_family import COMMANDS, TELLING, make_family

from weightops.cli.main import run
from weightops.errors import NoRoom, WeightopsError
from weightops.stores.local import LocalStore, LocalTarget
from weightops.stores.reader import FileReader

READING = [(LocalStore, name) for name in ("names", "identity", "get")] + [(FileReader, "read_into")]
WRITING = [(LocalStore, name) for name in ("put", "putting", "target")]
WRITING += [(LocalTarget, name) for name in ("write", "close", "commit")]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    make_family(folder)
    return folder


@contextmanager
def faults(fatal: int) -> Iterator[list[int]]:
    """The `fatal`-th call of a store fails; lends how many there were."""
    count = [0]

    def wrap(original: Callable[..., Any], error: WeightopsError) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == fatal:
                raise error
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind, name in READING:
            patch.setattr(kind, name, wrap(getattr(kind, name), WeightopsError("the store: cannot be read")))
        for kind, name in WRITING:
            patch.setattr(kind, name, wrap(getattr(kind, name), NoRoom("the store: the disk is full")))
        yield count


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "step"),
    [*((each, 7) for each in COMMANDS), *(pytest.param(each, 1, marks=pytest.mark.slow) for each in COMMANDS)],
)
def test_a_command_survives_a_fault_at_every_call(
    family: Path, command: str, step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(family)
    if command.split()[1] == "packed" and not (family / "packed").exists():
        assert run(["pack", "integers", "--bits", "4", "--group-size", "32", "--out", "packed"]) == 0
    out, words = family / "out", command.split()
    writes = words[0] not in TELLING
    arguments = words if not writes or words[0] == "run" else [*words, "--out", "out", "--workers", "1"]
    with faults(0) as calls:
        assert run(arguments) == 0, capsys.readouterr().err
    expected, said = contents(out) if writes else {}, capsys.readouterr().out
    assert calls[0] > 4
    for fatal in range(1, calls[0] + 1, step):
        shutil.rmtree(out, ignore_errors=True)
        with faults(fatal):
            code = run(arguments)
        told = capsys.readouterr()
        assert code in (1, 3, 16), (fatal, told.err)
        assert "the store: " in told.err + told.out, (fatal, told.err)
        assert "bug" not in told.err
        assert not out.exists() or contents(out) == expected, fatal
        assert run(arguments) == 0, (fatal, capsys.readouterr().err)
        assert capsys.readouterr().out == said or writes
        assert not writes or contents(out) == expected, fatal
        assert [path.name for path in family.iterdir() if "partial" in path.name] == []
    shutil.rmtree(out, ignore_errors=True)
