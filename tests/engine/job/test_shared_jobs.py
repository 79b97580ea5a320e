"""A job done in whatever order, by whomever, any number of times, is what one run would have written."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from jobs import NAMES, copy_inputs, make_with_outputs, outputs, write
from support import digests

import weightops
from weightops.cli.main import run
from weightops.engine.control import Control
from weightops.engine.job.documents import Group
from weightops.engine.job.finish import finish
from weightops.errors import (
    CorruptInput,
    Differs,
    IncompatibleInputs,
    Interrupted,
    Locked,
    OutputExists,
    SourceMissing,
    Unfinished,
    UsageError,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_with_outputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def reference(made: Path) -> dict[str, str]:
    """What one run of the recipe writes."""
    return outputs(made)


@pytest.fixture
def family(made: Path, tmp_path: Path) -> Path:
    return copy_inputs(made, tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_and_some_groups_twice(family: Path, reference: dict[str, str], seed: int) -> None:
    place, count = write(family)
    chance = random.Random(seed)
    numbers = [*range(count), *chance.choices(range(count), k=2)]
    chance.shuffle(numbers)
    done = [weightops.work(place, number) for number in numbers]
    assert sum(done) == count
    weightops.finish(place)
    assert outputs(family) == reference
    assert not list(family.glob("*.partial"))


def test_all_groups_by_three_workers_at_once_and_six_finishers(family: Path, reference: dict[str, str]) -> None:
    place, count = write(family)
    with ThreadPoolExecutor(3 * count) as pool:
        list(pool.map(lambda number: weightops.work(place, number), [*range(count)] * 3))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: [each.manifest for each in weightops.finish(place)], range(6)))
    assert outputs(family) == reference
    assert all(each == found[0] for each in found)


def test_three_drivers_at_once(family: Path, reference: dict[str, str]) -> None:
    """Each has written the job, or is told that another is at it."""

    def attempt(_: int) -> bool:
        try:
            write(family)
        except Locked:
            return False
        return True

    with ThreadPoolExecutor(3) as pool:
        assert any(pool.map(attempt, range(3)))
    place, count = write(family)
    for number in range(count):
        weightops.work(place, number)
    weightops.finish(place)
    assert outputs(family) == reference


def test_threads_go_through_the_same_door(family: Path, reference: dict[str, str]) -> None:
    results = weightops.run(family / "recipe.yaml", job=family / "job", executor="threads")
    assert all(result.manifest is not None for result in results.values())
    assert outputs(family) == reference


def test_a_job_that_is_written_again_keeps_what_was_done(family: Path, reference: dict[str, str]) -> None:
    place, count = write(family)
    weightops.work(place, 1)
    (place / "groups/00000.json").unlink()  # a driver that died before its end
    assert write(family) == (place, count)
    assert [weightops.work(place, number) for number in range(count)] == [n != 1 for n in range(count)]
    weightops.finish(place)
    assert outputs(family) == reference


def test_what_is_missing_is_named_and_nothing_has_changed(
    family: Path, reference: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    place, count = write(family)
    weightops.work(place, 1)
    before = digests(family)
    with pytest.raises(Unfinished, match=f"{count - 1} of {count} groups are not done: 0,2") as caught:
        weightops.finish(place)
    assert caught.value.groups == tuple(number for number in range(count) if number != 1)
    assert run(["finish", str(place)]) == 1
    assert "sbatch --array=0,2" in capsys.readouterr().err
    assert digests(family) == before
    for number in caught.value.groups:
        weightops.work(place, number)
    weightops.finish(place)
    assert outputs(family) == reference


def test_the_task_of_an_array_is_a_variable(
    family: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, count = write(family)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    assert run(["work", str(place)]) == 2
    assert "give --group K" in capsys.readouterr().err
    for name, number in (("SLURM_ARRAY_TASK_ID", 0), ("JOB_COMPLETION_INDEX", count - 1)):
        monkeypatch.setenv(name, str(number))
        assert run(["work", str(place), "--quiet"]) == 0
        assert (place / f"records/{number:05}.json").is_file()
        monkeypatch.delenv(name)


def test_a_shard_that_is_gone_is_written_again(family: Path, reference: dict[str, str]) -> None:
    place, count = write(family)
    for number in range(count):
        weightops.work(place, number)
    lost = next((family / "two.partial/output").glob("*00001*"))
    lost.unlink()
    with pytest.raises(Unfinished, match="1 of 4 groups are not done"):
        weightops.finish(place)
    assert sum(weightops.work(place, number) for number in range(count)) == 1
    weightops.finish(place)
    assert outputs(family) == reference


def test_a_worker_that_wakes_up_after_the_end_writes_nothing(family: Path, reference: dict[str, str]) -> None:
    place, count = write(family)
    for number in range(count):
        weightops.work(place, number)
    weightops.finish(place)
    assert not weightops.work(place, 0)
    (place / "records/00001.json").unlink()
    before = digests(family)
    with pytest.raises(SourceMissing, match="nothing is being made here any more"):
        weightops.work(place, 1)
    assert digests(family) == before
    assert outputs(family) == reference


def test_a_job_is_finished_once_and_what_was_changed_since_is_told(family: Path, reference: dict[str, str]) -> None:
    place, count = write(family)
    for number in range(count):
        weightops.work(place, number)
    first, second = weightops.finish(place), weightops.finish(place)
    assert [each.manifest for each in first] == [each.manifest for each in second]
    shutil.rmtree(family / "one")
    with pytest.raises(Differs, match="was finished, and is not what is there now"):
        weightops.finish(place)


def test_a_driver_that_ends_between_two_outputs_goes_on(family: Path, reference: dict[str, str]) -> None:
    place, count = write(family)
    for number in range(count):
        weightops.work(place, number)
    (family / "two").mkdir()
    (family / "two/other").touch()  # in the way of the second output
    with pytest.raises(OutputExists, match="two"):
        weightops.finish(place)
    shutil.rmtree(family / "two")
    weightops.finish(place)
    assert outputs(family) == reference


def test_an_output_is_replaced_only_where_the_job_may(family: Path, reference: dict[str, str]) -> None:
    for name in NAMES:
        (family / name).mkdir()
        (family / name / "old").write_text("old")
    assert run(["run", str(family / "recipe.yaml"), "--job", str(family / "job")]) == 11
    place, count = write(family, overwrite=True, name="other")
    for number in range(count):
        weightops.work(place, number)
    assert {(family / name / "old").read_text() for name in NAMES} == {"old"}
    weightops.finish(place)
    assert outputs(family) == reference


def test_a_source_that_changes_meanwhile_is_refused_by_the_group_that_reads_it(family: Path) -> None:
    place, count = write(family)
    file = sorted((family / "raw").glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    errors = []
    for number in range(count):
        try:
            weightops.work(place, number)
        except (CorruptInput, IncompatibleInputs) as error:
            errors.append(str(error))
    assert errors
    with pytest.raises(Unfinished, match="are not done"):
        weightops.finish(place)
    assert not (family / "one").exists()


def test_the_wrong_original_is_refused_by_a_group_and_never_published(family: Path) -> None:
    file = sorted((family / "raw").glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)  # the same names and shapes: only reading it tells
    place, count = write(family)
    errors = []
    for number in range(count):
        try:
            weightops.work(place, number)
        except IncompatibleInputs as error:
            errors.append(str(error))
    assert len(errors) == 1
    assert "original" in errors[0] or "raw" in errors[0]
    with pytest.raises(Unfinished, match="are not done"):
        weightops.finish(place)


def test_what_a_shard_reads_is_watched_by_it_and_the_rest_by_a_group_of_its_own(family: Path) -> None:
    """Nothing is read twice: nothing has its name before all is proven, so it need not be proven beforehand."""
    place, count = write(family)
    groups = [msgspec.json.decode(path.read_bytes(), type=Group) for path in sorted((place / "groups").iterdir())]
    assert len(groups) == count
    assert not [group for group in groups if group.watch]
    weightops.finish(place, abandon=True)
    recipe = {
        "sources": {"raw": str(family / "raw"), "delta": str(family / "delta")},
        "tensors": {
            "tuned": {"recover": {"raw": "raw", "diff": "delta"}},
            "part": {"shard": {"source": "tuned", "drop": "[b-h].weight"}},
        },
        "outputs": {str(family / "one"): {"from": "part"}},
    }
    weightops.run(recipe, job=family / "part-job")
    groups = [
        msgspec.json.decode(path.read_bytes(), type=Group) for path in sorted((family / "part-job/groups").iterdir())
    ]
    assert [bool(group.parts) for group in groups] == [True, False]
    assert len(groups[1].watch) == 7


def test_a_stopped_worker_leaves_nothing_and_the_group_is_done_again(family: Path, reference: dict[str, str]) -> None:
    place, count = write(family)
    control = Control()
    control.cancel(143)
    with pytest.raises(Interrupted, match="interrupted"):
        weightops.work(place, 0, control=control)
    assert not (place / "records").exists()
    for number in range(count):
        weightops.work(place, number)
    finish(str(place), Control())
    assert outputs(family) == reference


def test_a_worker_stops_at_its_limit(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, _ = write(family)
    assert run(["work", str(place), "--group", "0", "--time-limit", "0.000001"]) == 143
    assert "continues" in capsys.readouterr().err or not (place / "records").exists()
    assert run(["work", str(place), "--group", "0", "--time-limit", "100", "--quiet"]) == 0


def test_there_is_no_such_group(family: Path) -> None:
    place, count = write(family)
    with pytest.raises(UsageError, match=f"there is no group {count}"):
        weightops.work(place, count)


def test_paths_are_those_of_every_process(
    family: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, str]
) -> None:
    monkeypatch.chdir(family)
    results = weightops.run("recipe.yaml", job="job")
    groups = next(iter(results.values())).groups
    assert groups is not None
    monkeypatch.chdir("/")
    for number in range(groups):
        weightops.work(family / "job", number)
    weightops.finish(family / "job")
    assert outputs(family) == reference


def test_what_has_fewer_bytes_than_could_be_known_is_made_by_a_job_too(family: Path) -> None:
    """A compressed delta."""
    options = {"compress": True, "max_shard_size": "9KB"}
    weightops.diff(family / "raw", family / "tuned", family / "plain", **options)
    made = weightops.diff(family / "raw", family / "tuned", family / "small", **options, job=family / "job")
    assert made.groups is not None
    assert made.groups > 1
    for number in range(made.groups):
        weightops.work(family / "job", number)
    weightops.finish(family / "job")
    assert digests(family / "small") == digests(family / "plain")
