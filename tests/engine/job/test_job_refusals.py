"""Whose an output is while a job makes it, where a job may lie, and what its files may say."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import NAMES, copy_inputs, make_family, outputs, write
from support import digests

import weightops
from weightops import errors
from weightops.cli.main import run
from weightops.engine.job.place import refuse_places
from weightops.errors import Claimed, CorruptInput, OutputExists, PlanDiffers, UsageError, WeightopsError
from weightops.io.source_file import SourceFile


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("made"))


@pytest.fixture
def family(made: Path, tmp_path: Path) -> Path:
    return copy_inputs(made, tmp_path / "family")


@pytest.mark.parametrize("options", ["", "--restart", "--overwrite", "--if-exists skip", "--job other"])
def test_no_other_run_has_the_outputs_of_a_job(
    family: Path, options: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family)
    place, _ = write(family)
    before = digests(family)
    assert run(["cast", "raw", "--dtype", "float32", "--out", "one", *options.split()]) == 15
    said = capsys.readouterr().err
    assert f"is being written by the job {place}" in said
    assert f"weightops finish {place} --abandon" in said
    after = digests(family)
    assert {name: digest for name, digest in after.items() if not name.startswith("other/")} == before


def test_a_job_that_is_given_up_leaves_what_was_there_before(family: Path) -> None:
    before = digests(family)
    place, _ = write(family)
    weightops.work(place, 0)
    (place / f".job.json.0123456789ab-1-1-{'0' * 8}.tmp").touch()  # as a killed process leaves one
    weightops.finish(place, abandon=True)
    assert digests(family) == before
    assert not list(family.glob("*.partial"))
    weightops.run(family / "recipe.yaml")


def test_giving_up_removes_no_file_that_the_job_has_not_made(family: Path) -> None:
    place, _ = write(family)
    weightops.work(place, 0)
    (family / "one.partial/output/notes.txt").write_text("mine")
    before = digests(family)
    with pytest.raises(OutputExists, match=r"notes\.txt"):
        weightops.finish(place, abandon=True)
    assert before.items() <= digests(family).items()
    (family / "one.partial/output/notes.txt").rename(family / "notes.txt")
    (place / "notes.txt").write_text("mine too")
    weightops.finish(place, abandon=True)
    assert (family / "notes.txt").exists()
    assert (place / "notes.txt").exists()


def test_what_has_its_name_stays_when_a_job_is_given_up(family: Path) -> None:
    place, count = write(family)
    for number in range(count):
        weightops.work(place, number)
    weightops.finish(place)
    whole = outputs(family)
    weightops.finish(place, abandon=True)
    assert outputs(family) == whole
    assert not list(place.rglob("*.json"))


def test_a_folder_with_something_else_is_no_place_for_a_job(family: Path) -> None:
    (family / "job").mkdir()
    (family / "job/notes.txt").touch()
    with pytest.raises(OutputExists, match=r"notes\.txt"):
        write(family)


def test_another_job_in_the_same_place_is_refused(family: Path) -> None:
    write(family)
    with pytest.raises(PlanDiffers, match="holds another job"):
        weightops.cast(family / "raw", family / "out", dtype="float32", job=family / "job")


@pytest.mark.parametrize("job", ["one", "one/job", "raw/job", "raw", "."])
def test_a_job_lies_neither_in_nor_around_an_input_or_output(family: Path, job: str) -> None:
    with pytest.raises(UsageError, match="inside one another"):
        write(family, name=job)
    assert not (family / "one.partial").exists()


def test_workers_write_beside_the_job_or_where_they_were_told(family: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere/job"
    weightops.cast(family / "raw", family / "out", dtype="float32", job=place)
    for attempt in (weightops.work, lambda job, _: weightops.finish(job)):
        with pytest.raises(UsageError, match="does not lie beside it"):
            attempt(place, 0)
    assert run(["work", str(place), "--group", "0", "--output-root", str(family), "--quiet"]) == 0
    assert run(["finish", str(place), "--output-root", str(tmp_path), "--quiet"]) == 0
    assert (family / "out/weightops-manifest.json").exists()


@pytest.mark.parametrize(
    "path",
    [
        "https://user:password@server/m/model.safetensors",
        "https://server/m/model.safetensors?X-Amz-Signature=0123",
        "https://server/m/model.safetensors?token=secret",
    ],
)
def test_a_source_with_a_secret_is_refused_without_showing_it(path: str) -> None:
    with pytest.raises(UsageError, match="read by others") as caught:
        refuse_places("/job", [], [SourceFile(path, 10, 0)])
    assert "credentials by the environment" in str(caught.value.hint)
    for secret in ("user:password", "0123", "secret"):
        assert secret not in f"{caught.value} {caught.value.hint}"


def test_a_job_of_another_version_is_refused(family: Path) -> None:
    place, _ = write(family)
    document = json.loads((place / "job.json").read_bytes())
    (place / "job.json").write_text(json.dumps({**document, "version": "0.0.1"}))
    for attempt in (lambda: weightops.work(place, 0), lambda: weightops.finish(place)):
        with pytest.raises(UsageError, match=r"written by weightops 0\.0\.1"):
            attempt()


@pytest.mark.parametrize("groups", [-1, 10**9, 10**30])
def test_a_job_of_impossibly_many_groups_is_refused(family: Path, groups: int) -> None:
    place, _ = write(family)
    document = json.loads((place / "job.json").read_bytes())
    (place / "job.json").write_text(json.dumps({**document, "groups": groups}))
    with pytest.raises(CorruptInput, match=r"job\.json"):
        weightops.finish(place)


def test_there_is_no_job(tmp_path: Path) -> None:
    for attempt in (lambda: weightops.work(tmp_path, 0), lambda: weightops.finish(tmp_path)):
        with pytest.raises(errors.SourceMissing, match="there is no job"):
            attempt()


ODD = (None, -1, 10**30, "", "../../evil", "/evil", "a\0b", 1e300, [], {}, [[]], True)


def leaves(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a JSON document."""
    if path:
        yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from leaves(value, (*path, key))


def changed(document: Any, path: tuple[Any, ...], chance: random.Random) -> Any:
    """The document with something else in one place, or nothing."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    odd = chance.choice([*ODD, ...])
    if odd is not ...:
        inner[path[-1]] = odd
    elif isinstance(inner, dict):
        inner[f"{path[-1]}x"] = inner.pop(path[-1])
    else:
        del inner[path[-1]]
    return copy


@pytest.mark.parametrize("name", ["job.json", "groups/00000.json", "outputs/1.json", "records/00001.json"])
@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_files_of_a_job_that_say_anything_else_are_refused_or_followed_inside_the_outputs(
    family: Path, tmp_path: Path, name: str, count: int
) -> None:
    """No traceback, and nothing outside the outputs. What is to be computed is the job's own affair."""
    place, groups = write(family)
    for number in range(1, groups):
        weightops.work(place, number)
    document = json.loads((place / name).read_bytes())
    places = list(leaves(document))
    chance = random.Random(name)
    before = files(tmp_path)
    weightops.work(place, 0)
    weightops.finish(place)
    reference = outputs(family)
    refused = 0
    for _ in range(count):
        restore(tmp_path, before)
        path = chance.choice(places)
        (place / name).write_text(json.dumps(changed(document, path, chance)))
        try:
            weightops.work(place, 0)
            weightops.finish(place)
        except WeightopsError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name}: {path}") from error
        assert {str(p.relative_to(tmp_path)).split("/")[0] for p in tmp_path.rglob("*")} == {"family"}
        own = {*NAMES, *(f"{output}.weightops-manifest.json" for output in NAMES)}
        assert not {*(p.name for p in family.iterdir())} - {*(p.split("/")[1] for p in before), *own}
        if name == "job.json" and (family / "two").exists():
            assert outputs(family) == reference, path
    assert refused > count // 2


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def restore(folder: Path, wanted: dict[str, bytes]) -> None:
    for name in NAMES:
        shutil.rmtree(folder / "family" / name, ignore_errors=True)
    for path in [p for p in folder.rglob("*") if p.is_file() and str(p.relative_to(folder)) not in wanted]:
        path.unlink()
    for name, data in wanted.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    for name in NAMES:
        shutil.rmtree(folder / f"family/{name}.partial/whole", ignore_errors=True)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema":"weightops-job/9"}'])
def test_files_that_are_none_of_a_job(family: Path, data: bytes) -> None:
    place, _ = write(family)
    for name in ("groups/00000.json", "job.json"):
        (place / name).write_bytes(data)
        with pytest.raises(CorruptInput, match=name):
            weightops.work(place, 0)


def test_an_error_comes_whole_from_another_process() -> None:
    """Whatever its arguments are."""
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, WeightopsError)]
    for kind in kinds:
        error = kind.__new__(kind, "what")
        error.args, error.hint = ("what",), "do this"
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert (str(again), again.hint, again.exit_code) == ("what", "do this", kind.exit_code)
    unfinished = pickle.loads(pickle.dumps(errors.Unfinished("left", (1, 2), hint="do them")))
    assert unfinished.groups == (1, 2)
    assert isinstance(pickle.loads(pickle.dumps(Claimed("held"))), Claimed)
