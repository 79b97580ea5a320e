"""Every command on models in a bucket gives what it gives on the same models on disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import buckets
import pytest
from command_family import COMMANDS, TELLING, make_family

from weightops.cli.main import run
from weightops.stores.s3.store import S3Store

SAID_OF_SOURCES = ("weightops-manifest.json", "README.md")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, store_endpoint: str) -> Iterator[tuple[Path, str]]:
    """A folder of models, and where they are in a bucket."""
    folder = tmp_path_factory.mktemp("family")
    make_family(folder)
    with pytest.MonkeyPatch.context() as patch, buckets.connect(store_endpoint) as connection:
        for name, value in buckets.environment(store_endpoint).items():
            patch.setenv(name, value)
        patch.chdir(folder)
        assert run(["pack", "integers", "--bits", "4", "--group-size", "32", "--out", "packed", "-q"]) == 0
        store = S3Store(buckets.new_bucket(connection), "models", connection)
        for path in folder.rglob("*"):
            if path.is_file():
                store.put(path.relative_to(folder).as_posix(), path.read_bytes())
        for name in ("recipe.yaml", "steps.yml"):
            text = re.sub(r"\./|(?<=source: )", f"{store.shown}/", (folder / name).read_text())
            (folder / f"there-{name}").write_text(text)
        yield folder, store.shown


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_bucket(family: tuple[Path, str], command: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, bucket = family
    out = folder / "out"

    def contents(words: list[str]) -> tuple[dict[str, bytes], str]:
        writes = words[0] not in TELLING
        given = words if not writes or words[0] == "run" else [*words, "--out", "out"]
        assert run(given) == 0, capsys.readouterr().err
        files = (p for p in out.rglob("*") if p.is_file() and p.name not in SAID_OF_SOURCES)
        # An adapter says what its base is, and a config where a model is from.
        found = {p.name: p.read_bytes().replace(f"{bucket}/".encode(), b"") for p in files}
        shutil.rmtree(out, ignore_errors=True)
        return found, "" if writes else capsys.readouterr().out.replace(f"{bucket}/", "")

    words = command.split()
    names = {path.name for path in folder.iterdir()}
    there = words[:1]
    for word in words[1:]:
        made = word in ("recipe.yaml", "steps.yml")
        there.append(f"there-{word}" if made else f"{bucket}/{word}" if word in names and word != "combine" else word)
    here, expected = contents(words)
    found, said = contents(there)
    assert found == here
    assert said == expected
