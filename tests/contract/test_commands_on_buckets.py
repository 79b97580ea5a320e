"""Every command on models in a bucket gives what it gives on the same models on disk, and writes the same to either."""

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
from weightops.stores.stores import BUCKETS, Stores

WRITING = [command for command in COMMANDS if command.split()[0] not in TELLING]
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
        recipe = (folder / "recipe.yaml").read_text()
        (folder / "to-recipe.yaml").write_text(re.sub(r"(?m)^  out:", f"  {store.shown}/to/run:", recipe))
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


@pytest.mark.parametrize("command", WRITING)
def test_a_command_into_a_bucket(
    family: tuple[Path, str], command: str, store_endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, bucket = family
    words = command.split()
    there = f"{bucket}/to/{WRITING.index(command)}" if words[0] != "run" else f"{bucket}/to/run"
    if words[0] == "run":
        given = [words, ["run", "to-recipe.yaml"]]
    else:
        given = [[*words, "--out", "out"], [*words, "--out", there]]
    for each in given:
        assert run([*each, "-q"]) == 0, capsys.readouterr().err
    out = folder / "out"
    expected = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(out)
    with Stores(connect={BUCKETS: lambda: buckets.connect(store_endpoint)}).connected() as stores:
        store = stores.writable(there)
        assert {name: store.get(name) for name in store.listed("")} == expected
    assert run(["verify", there, "-q"]) == 0
